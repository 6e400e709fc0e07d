"""Training curves: versions merged, gaps skipped, W&B files as good as CSV files, thinning that keeps the shape."""

from pathlib import Path

import numpy as np
import pytest
import wandb

from mmtrain.config_errors import UserError
from mmtrain.reporting.curves import read_curves, thin
from mmtrain.reporting.wandb_files import history, records


def write_csv(folder: Path, version: int, text: str) -> None:
    path = folder / f"logs/version_{version}/metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_versions_are_merged_by_step_and_the_later_wins(tmp_path) -> None:
    """Version 10 comes after 2; a validation's step 0 is no step of training, and a killed run's last line is cut."""
    write_csv(tmp_path, 2, "epoch,step,train/loss,val/a/x\n0,0,5.0,\n0,10,4.0,\n0,10,,0.1\n0,20,3.0,\n")
    write_csv(tmp_path, 10, "step,epoch,train/loss,val/a/x,test/a/x\n20,0,2.5,,\n20,0,nan,0.3,\n30,1,2.0,,0.9\n40,1,1.")
    write_csv(tmp_path, 11, "step,epoch,val/a/x\n0,0,0.7\n")
    curves = read_curves(tmp_path)
    assert curves == {"train/loss": ([0, 10, 20, 30], [5.0, 4.0, 2.5, 2.0]), "val/a/x": ([10, 20], [0.1, 0.3])}
    assert read_curves(tmp_path / "logs") == {}


@pytest.fixture
def wandb_file(tmp_path, monkeypatch) -> Path:
    """An offline run of 40 rows; one of them is longer than two blocks of the file."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=tmp_path, project="curves", settings=wandb.Settings(console="off"))
    for place in range(40):
        values = {"train/loss": 4.0 / (place + 1), "trainer/global_step": place * 5, "epoch": 0, "nested": {"x": place}}
        run.log(values | ({"note": "long " * 20_000} if place == 20 else {}))
    run.finish()
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    return path


def test_wandb_file_gives_the_same_curves_where_there_is_no_csv(wandb_file, tmp_path) -> None:
    rows = history(wandb_file)
    assert len(rows) == 40 and len(rows[20]["note"]) == 100_000 and rows[7]["nested/x"] == 7
    kinds = [record.WhichOneof("record_type") for record in records(wandb_file)]
    assert {"header", "run", "exit"} <= set(kinds) and kinds.count("history") == 40
    steps, values = read_curves(tmp_path)["train/loss"]
    assert steps == list(range(0, 200, 5)) and values == [4.0 / (place + 1) for place in range(40)]
    write_csv(tmp_path, 0, "step,train/loss\n1,0.5\n")
    assert read_curves(tmp_path) == {"train/loss": ([1], [0.5])}


def test_cut_and_foreign_wandb_files(wandb_file, tmp_path) -> None:
    """Rows before the damage are read; what is no file of W&B is refused by name."""
    data = wandb_file.read_bytes()
    wandb_file.write_bytes(data[: len(data) // 2])
    assert len(history(wandb_file)) == 20, "the long row spans the middle of the file"
    damaged = bytearray(data)
    damaged[-len(data) // 2] ^= 1
    wandb_file.write_bytes(damaged)
    assert len(history(wandb_file)) == 20, "the checksum tells"
    wandb_file.write_bytes(b"")
    assert history(wandb_file) == [] and read_curves(tmp_path) == {}
    wandb_file.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(UserError, match=r"run-.*\.wandb: not a file of W&B"):
        read_curves(tmp_path)


@pytest.mark.parametrize("count", [5, 300, 301, 100_000])
def test_thin_curve_has_the_extremes_and_the_ends(count) -> None:
    values = np.random.default_rng(count).normal(size=count).tolist()
    steps = list(range(0, 7 * count, 7))
    thinned = dict(zip(*thin(steps, values), strict=True))
    assert len(thinned) == min(count, len(thinned)) <= 300 and list(thinned) == sorted(thinned)
    assert all(values[step // 7] == value for step, value in thinned.items()), "points are taken, never made up"
    assert {steps[0], steps[-1]} <= set(thinned) and {min(values), max(values)} <= set(thinned.values())
