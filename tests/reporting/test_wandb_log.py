"""What a tested run leaves in W&B, read back from its offline file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image

from mmtrain import reported
from mmtrain.rdp.figures import write_video
from mmtrain.reporting.results import Run, group_runs, read_run, write_run
from mmtrain.reporting.tables import ComparedTable, compare, laptop_tables
from mmtrain.reporting.wandb_log import log_results
from tests.offline_runs import close, read_file
from tests.reporting.runs import write_figure, write_full_run, write_laptop_run, write_sample

TRAINED = {"train": {"samples": 2_905_954}}


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Iterator[wandb.Run]:
    """The offline run of a training, which knows the data it was trained on."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    close()
    config = {"model": {"lr": 1e-3}, "data_counts": TRAINED}
    yield wandb.init(mode="offline", dir=tmp_path, project="p", config=config, tags=["mine"])
    close()


def full_run(folder: Path) -> Run:
    """A run of full scale with two pictures and one that is gone, and a metric that could not be measured."""
    run = read_run(write_full_run(folder, "RankCLIP", 0, 1.0))
    write_figure(folder / "figures/gap.png", 1)
    write_sample(folder / "figures/nearest.png", 2)
    run.figures = [
        {"file": "figures/gap.png", "title": "Modality gap on coco", "kind": "figure"},
        {"file": "figures/gone.png", "title": "gone", "kind": "figure"},
        {"file": "figures/nearest.png", "title": "Nearest", "kind": "sample"},
    ]
    run.metrics["test/imagenetv2_top/zero_shot_top1"] = math.nan
    run.protocol, run.data_counts = {"cifar10": "linear probe: AdamW"}, {"imagenet": {"samples": 50_000}}
    write_run(run)
    return read_run(folder)


def compared(run: Run) -> ComparedTable:
    return compare(reported.load("rankclip").table("rankclip_table1"), group_runs([run]))


def files_of(experiment: wandb.Run) -> tuple[Path, dict[str, Any]]:
    """The folder of its files, and what its .wandb file holds."""
    folder = Path(experiment.dir)
    close()
    (path,) = folder.parent.glob("run-*.wandb")
    return folder, read_file(path)


def test_offline_file_holds_config_counts_metrics_table_and_pictures(experiment, tmp_path) -> None:
    run = full_run(tmp_path / "run")
    table = compared(run)
    log_results(experiment, run, [table])
    folder, found = files_of(experiment)
    config, logged = found["config"], {key: row[key] for row in found["history"] for key in row}

    assert config["model"] == {"lr": 1e-3} and config["row"] == "RankCLIP ViT-B/32 CC3M"
    assert config["data_counts"] == TRAINED | run.data_counts
    for key in ("paper", "method", "scale", "setting", "protocol", "missing", "evaluated", "seed"):
        assert config[key] == getattr(run, key)
    assert found["tags"] == {"mine", "rankclip", "full"}

    measured = {key: value for key, value in run.metrics.items() if math.isfinite(value)}
    assert {key: logged[key] for key in logged if key.startswith("test/")} == measured
    assert len(measured) == len(run.metrics) - 1 and logged["trainer/global_step"] == run.step
    assert measured.items() <= found["summary"].items()

    content = json.loads((folder / logged["tables/rankclip_table1/path"]).read_text())
    assert (len(content["data"]), content["columns"][:2], content["columns"][-1]) == (5, ["row", "kind"], "marks")
    ours = dict(zip(content["columns"], content["data"][-1], strict=True))
    assert (ours["row"], ours["kind"], ours["marks"]) == ("RankCLIP", "ours", "")
    for column, cell in zip(table.columns, table.rows[-1].cells, strict=True):
        assert ours[column.header] == cell.value and ours.get(f"{column.header} difference") == cell.difference
    assert ours["imagenet1k_top1 %↑"] == pytest.approx(10.31) and "coco_t2i_r1 %↑† difference" not in ours
    assert content["data"][0][2] == 9.06, "CLIP's printed value"

    for key, title, size in (("figures", "Modality gap on coco", (640, 420)), ("samples", "Nearest", (480, 240))):
        assert logged[f"{key}/captions"] == [title]
        (name,) = logged[f"{key}/filenames"]
        assert Image.open(folder / name).size == size


def test_what_w_and_b_does_not_take_costs_one_warning_and_nothing_else(experiment, tmp_path, monkeypatch) -> None:
    run = full_run(tmp_path / "run")
    (tmp_path / "run/figures/gap.png").write_text("no picture")
    monkeypatch.setattr(type(experiment.config), "update", None)
    with pytest.warns(UserWarning, match=f"config: .*pictures: .*{tmp_path}/run") as warned:
        log_results(experiment, run, [compared(run)])
    assert len([w for w in warned if "W&B" in str(w.message)]) == 1
    _, found = files_of(experiment)
    logged = {key for row in found["history"] for key in row}
    assert {"test/imagenet/zero_shot_top1", "tables/rankclip_table1/path"} <= logged
    assert not any(key.startswith("figures") for key in logged)


def test_laptop_scale_is_named_so_that_no_chart_mixes_it_with_the_paper(experiment, tmp_path) -> None:
    run = read_run(write_laptop_run(tmp_path / "run", "CLIP", 1))
    log_results(experiment, run, laptop_tables(group_runs([run])))
    _, found = files_of(experiment)
    assert "laptop" in found["tags"] and "full" not in found["tags"]
    assert found["config"]["row"] == "CLIP rn_small emoji (laptop scale)"
    assert found["summary"]["test/unseen_concepts/zero_shot_top1"] == run.metrics["test/unseen_concepts/zero_shot_top1"]
    tables = {key for row in found["history"] for key in row if key.startswith("tables/")}
    assert "tables/laptop_unseen_concepts/path" in tables and not any("rankclip" in key for key in tables)


def test_simulation_is_named_and_its_videos_are_logged(experiment, tmp_path) -> None:
    folder = tmp_path / "run"
    write_video(folder / "figures" / "rollout.mp4", np.full((8, 32, 32, 3), 90, np.uint8), 24)
    run = Run(folder, "rdp", "DP", "dp_wipe_sim", "simulation", step=7, metrics={"test/wipe/all": 0.5})
    run.setting = {"backbone": "UNet 32-64-128"}
    run.figures = [{"file": "figures/rollout.mp4", "title": "Rollout", "kind": "video"}]
    table = compare(reported.load("rdp").table("rdp_table3_wiping"), group_runs([run]))
    log_results(experiment, run, [table])
    folder, found = files_of(experiment)
    assert "simulation" in found["tags"] and found["config"]["row"] == "DP UNet 32-64-128 (simulation)"
    logged = {key: row[key] for row in found["history"] for key in row}
    (video,) = logged["videos/videos"]
    assert (folder / video["path"]).stat().st_size > 500 and video["caption"] == "Rollout"
    content = json.loads((folder / logged["tables/rdp_table3_wiping/path"]).read_text())
    assert content["data"][-1][:2] == ["DP", "simulation"] and "real robot" in content["data"][-1][-1]
    assert not any("difference" in column for column in content["columns"])
