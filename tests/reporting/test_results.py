"""Results on disk and over seeds: round trip, broken files, runs found, estimates against scipy, grouping."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mmtrain.config_errors import UserError
from mmtrain.reporting.results import Run, estimate, find_runs, group_runs, read_run, write_run

TOP1 = "test/imagenet/zero_shot_top1"


def make(folder: Path = Path("x"), method: str = "RankCLIP", **values) -> Run:
    defaults = {"scale": "full", "seed": 0, "step": 10, "metrics": {TOP1: 0.25}}
    return Run(folder, "rankclip", method, **{"run": folder.name} | defaults | values)


def test_a_run_comes_back_as_it_was_written_nan_included(tmp_path):
    run = make(tmp_path / "a" / "b", seed=None, epoch=3, checkpoint="c.ckpt", setting={"backbone": "RN50"})
    run.metrics = {TOP1: np.float32(0.25), "test/coco/i2t_r1": math.nan, "test/coco/modality_gap": math.inf}
    run.chance, run.evaluated, run.skipped = {TOP1: 0.001}, {"imagenet": 5}, {"imagenet": {"undecodable_image": 1}}
    run.missing, run.protocol, run.code = {"coco": "ROOT/coco"}, {"cifar10": "probe"}, {"mmtrain": "0.1.0"}
    run.data_counts = {"train": {"samples": 7}}
    run.figures = [{"file": "figures/a.png", "title": "Ä", "kind": "figure"}]
    path = write_run(run)
    assert path == tmp_path / "a" / "b" / "results.json"
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["format"] == 1 and content["metrics"]["test/coco/i2t_r1"] is None and "folder" not in content
    back = read_run(path.parent)
    assert math.isnan(back.metrics.pop("test/coco/i2t_r1")) and math.isnan(back.metrics.pop("test/coco/modality_gap"))
    run.metrics = {TOP1: 0.25}
    assert back == run


def test_keys_of_a_later_version_are_left_out(tmp_path):
    path = write_run(make(tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1, "folder": "elsewhere"}))
    assert read_run(tmp_path) == make(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    write_run(make(tmp_path))

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left on device"):
        write_run(make(tmp_path, method="CLIP"))
    assert read_run(tmp_path).method == "RankCLIP"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"format": None}, "format is None"),
        ({"metrics": [1]}, r"metrics is \[1\], expected dict"),
        ({"metrics": {TOP1: "high"}}, f"metric {TOP1} is 'high', expected a number or null"),
        ({"metrics": {TOP1: True}}, f"metric {TOP1} is True"),
        ({"chance": {TOP1: []}}, f"metric {TOP1} is "),
        ({"seed": "zero"}, "seed is 'zero'"),
        ({"scale": "huge"}, "scale is 'huge', expected one of laptop, full"),
    ],
)
def test_a_bad_value_is_refused_with_file_key_and_value(tmp_path, change, message):
    path = write_run(make(tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        read_run(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", ["paper", "method", "run", "scale", "metrics"])
def test_an_absent_key_is_refused(tmp_path, key):
    path = write_run(make(tmp_path))
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has no '{key}'"):
        read_run(tmp_path)


def test_no_file_and_a_cut_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"results\.json: no such file; .*mmtrain test"):
        read_run(tmp_path)
    path = write_run(make(tmp_path))
    for text in (path.read_text()[:40], "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match="evaluate the run again"):
            read_run(tmp_path)


def test_a_scale_that_is_not_known_is_never_written(tmp_path):
    with pytest.raises(UserError, match="scale is 'small'"):
        write_run(make(tmp_path, scale="small"))
    assert not list(tmp_path.iterdir())


def test_runs_are_found_by_folder_parent_pattern_and_file_each_once(tmp_path):
    for name in ("b/seed1", "b/seed0", "a", "c/deep/er"):
        write_run(make(tmp_path / name))
    write_run(make(tmp_path / "a" / "wandb" / "copy"))  # inside a run folder: belongs to that run
    (tmp_path / "c" / "other").mkdir()

    def found(*paths: Path | str) -> list[str]:
        return [str(run.folder.relative_to(tmp_path)) for run in find_runs(paths)]

    assert found(tmp_path) == ["a", "b/seed0", "b/seed1", "c/deep/er"]
    assert found(tmp_path / "b" / "seed1", tmp_path / "b") == ["b/seed1", "b/seed0"]
    assert found(f"{tmp_path}/*/seed*", tmp_path / "a" / "results.json") == ["b/seed0", "b/seed1", "a"]


@pytest.mark.parametrize("name", ["absent", "*.json", "empty", "empty/notes.txt"])
def test_a_path_without_runs_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"no results\.json at or under it") as caught:
        find_runs([tmp_path / name])
    assert str(tmp_path / name) in str(caught.value)


def test_the_label_tells_runs_apart():
    assert make(Path("r")).label == "RankCLIP r, seed 0, step 10"
    assert make(Path("r"), seed=None).label == "RankCLIP r, step 10"


def test_the_estimate_of_three_by_hand():
    result = estimate([1.0, 2.0, 3.0])  # s = 1, t(0.975, 2) = 4.30265, divided by sqrt(3): 2.48414
    assert result.mean == 2.0 and result.n == 3 and result.values == (1.0, 2.0, 3.0)
    assert (result.low, result.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_scipy_s(n):
    values = np.random.default_rng(n).normal(0.3, 0.02, n)
    result = estimate(values.tolist())
    expected = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (result.low, result.high) == pytest.approx(expected, rel=1e-9)


def test_estimates_without_an_interval():
    assert estimate([0.5]) == estimate((0.5,))
    assert (estimate([0.5]).mean, estimate([0.5]).low, estimate([0.5]).high) == (0.5, None, None)
    missing = estimate([0.5, math.nan])
    assert math.isnan(missing.mean) and missing.low is None and missing.n == 2
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_runs_that_differ_in_the_seed_alone_form_a_group():
    runs = [make(Path(f"r{seed}"), seed=seed, metrics={TOP1: 0.1 * (seed + 1)}) for seed in (2, 0, 1)]
    runs[0].metrics["test/coco/i2t_r1"] = 0.4
    others = [
        make(Path("m"), method="CLIP"),
        make(Path("l"), scale="laptop"),
        make(Path("s"), setting={"backbone": "RN50"}),
    ]
    group, *rest = group_runs([*runs, *others])
    assert [run.seed for run in group.runs] == [0, 1, 2]
    assert group.metrics[TOP1] == estimate([0.1, 0.2, 0.1 * 3])
    assert group.metrics["test/coco/i2t_r1"].n == 1
    assert [(g.method, g.scale, g.setting) for g in rest] == [
        ("CLIP", "full", {}),
        ("RankCLIP", "laptop", {}),
        ("RankCLIP", "full", {"backbone": "RN50"}),
    ]


def test_the_order_of_setting_keys_does_not_split_a_group():
    one = make(Path("a"), setting={"backbone": "RN50", "train_data": "CC3M"})
    two = make(Path("b"), setting={"train_data": "CC3M", "backbone": "RN50"}, seed=1)
    assert len(group_runs([one, two])) == 1


def test_a_seed_counts_once_and_steps_stay_together():
    runs = [make(Path(f"{step}_{seed}"), seed=seed, step=step) for seed in (0, 1) for step in (20, 10)]
    runs += [make(Path("unknown_a"), seed=None), make(Path("unknown_b"), seed=None)]
    groups = group_runs(runs)
    assert [[run.folder.name for run in group.runs] for group in groups] == [
        ["10_0", "10_1", "unknown_a"],
        ["20_0", "20_1", "unknown_b"],
    ]


def test_chance_is_that_of_the_first_run_that_knows_it():
    runs = [make(Path("a"), chance={TOP1: 0.001}), make(Path("b"), seed=1, chance={TOP1: 0.5, "test/a/b": 0.1})]
    assert group_runs(runs)[0].chance == {TOP1: 0.001, "test/a/b": 0.1}
