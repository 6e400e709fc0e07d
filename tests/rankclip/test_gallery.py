"""Figure 4 across runs: which points are drawn, and what is left out."""

from pathlib import Path

import pytest

from mmtrain.rankclip import figures, gallery
from mmtrain.reporting.results import Run, group_runs


def run(method: str, seed: int, top1: float, samples: int, scale: str = "full", r: float | None = 0.5) -> Run:
    metrics = {"test/imagenet/zero_shot_top1": top1} | ({} if r is None else {"test/imagenet_r/zero_shot_top1": r})
    setting = {"backbone": "RN50", "train_data": f"CC3M-{samples}"}
    counts = {"train": {"samples": samples}}
    return Run(
        Path("x"), "rankclip", method, "r", scale, seed=seed, setting=setting, metrics=metrics, data_counts=counts
    )


def test_points_are_means_over_seeds_by_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr(figures, "robustness", lambda reported, ours, path: drawn.update(robust=(reported, ours)))
    monkeypatch.setattr(figures, "data_size", lambda reported, ours, path: drawn.update(sizes=(reported, ours)))
    runs = [run("CLIP", 0, 0.1, 500_000), run("CLIP", 1, 0.2, 500_000), run("CLIP", 0, 0.3, 3_000_000, r=None)]
    runs += [run("RankCLIP", 0, 0.4, 500_000), run("RankCLIP", 0, 0.9, 1000, scale="laptop")]
    listed = gallery.across_runs(group_runs(runs), tmp_path)
    assert [entry["file"] for entry in listed] == ["figures/robustness.png", "figures/data_size.png"]
    reported, ours = drawn["robust"]
    assert reported["RankCLIP"]["15M"] == (30.8, 27.0) and len(reported["CLIP"]) == 5
    assert ours == {"CLIP": {"500K": (pytest.approx(15.0), 50.0)}, "RankCLIP": {"500K": (40.0, 50.0)}}
    reported, ours = drawn["sizes"]
    assert reported["CLIP"] == {500_000: 4.5, 750_000: 7.5, 1_000_000: 9.4, 3_000_000: 12.0, 15_000_000: 21.6}
    assert ours == {"CLIP": {500_000: pytest.approx(15.0), 3_000_000: 30.0}, "RankCLIP": {500_000: 40.0}}


def test_laptop_runs_are_not_drawn(tmp_path: Path) -> None:
    assert gallery.across_runs(group_runs([run("CLIP", 0, 0.1, 1000, scale="laptop")]), tmp_path) == []
    assert not any(tmp_path.iterdir())


def test_files_are_written(tmp_path: Path) -> None:
    for entry in gallery.across_runs(group_runs([run("ALIP", 0, 0.1, 750_000)]), tmp_path):
        assert (tmp_path / entry["file"]).read_bytes().startswith(b"\x89PNG")
