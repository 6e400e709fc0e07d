"""The `test` verb over all kinds of sets: against features taken by hand, resumed, on two processes, and its files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml

from datamodules.evaluation_sets import EvaluationSet
from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from datamodules.synthetic import CLASSES, jpeg, pairs, picture, write_shard
from mmtrain.__main__ import main
from mmtrain.config_errors import UserError
from mmtrain.metrics.linear_probe import ProbeSettings, fit_probe
from mmtrain.rankclip import evaluate
from mmtrain.rankclip.evaluate import PROBE_AVERAGE, probe_average
from mmtrain.rankclip.module import Clip, TestSettings
from mmtrain.rankclip.networks import encode_texts, project_images
from mmtrain.reported import load
from mmtrain.reporting.curves import read_curves
from mmtrain.reporting.results import read_run
from tests.offline_runs import close, read_file

ARCHITECTURE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PICTURES = Pictures(16, context_length=8)
FEW = [2, 5, 11]  # classes of the restricted set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of all classes (37 samples) and of three (9), an ImageNet of two classes, and the tiny architecture."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_shard(folder / "all.tar", pairs(37, size=20))
    chosen = [s for s in pairs(48, size=20, start=100) if json.loads(s["json"])["label"] in FEW]
    write_shard(folder / "few.tar", chosen)
    for label, wordnet_id in ((0, "n01440764"), (999, "n15075141")):
        for i in range(3):
            path = folder / "root/imagenet/val" / wordnet_id / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(picture(label % 16, i, 20)))
    (folder / "evaluation_vit.json").write_text(json.dumps(ARCHITECTURE))
    return folder


def sets(folder: Path) -> dict[str, EvaluationSet]:
    every, few = str(folder / "all.tar"), str(folder / "few.tar")
    named = {"label": "json:label", "classes": CLASSES, "templates": ["a {}", "{}"]}
    return {
        "both": EvaluationSet(every, captions="json:captions", **named),
        "few": EvaluationSet(few, captions=None, restrict=True, **named),
        "probed": EvaluationSet(few, captions=None, label="json:label", templates=None, probe_train=every),
    }


def evaluated(folder: Path, run: Path, model: Clip, **trainer: Any) -> dict[str, float]:
    data = ImageTextDataModule(
        train="unused.tar", evaluate=sets(folder), pictures=PICTURES, eval_batch_size=4, batch_size=4
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=run, use_distributed_sampler=False, **quiet, **trainer
    )
    trainer.test(model, data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def model(folder: Path, **settings: Any) -> Clip:
    torch.manual_seed(0)
    return Clip(str(folder / "evaluation_vit.json"), test=TestSettings(ProbeSettings(epochs=3), **settings))


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return evaluated(folder, tmp_path_factory.mktemp("run"), model(folder, keep_features=False, figures=False))


def by_hand(folder: Path, network: Any, name: str) -> tuple[torch.Tensor, torch.Tensor, list[list[str]]]:
    """Raw features, labels and captions of a shard, one sample at a time."""
    source = EvaluationSet(str(folder / name), captions="json:captions", label="json:label", classes=CLASSES).open()
    data = ImageTextDataModule(train="x", evaluate={"s": EvaluationSet(str(folder / name))}, pictures=PICTURES)
    data.setup("validate")
    network.eval()
    with torch.no_grad():
        features = [project_images(network, b["image"]) for b in data.val_dataloader()[0]]
    samples = source.read(range(len(source)))
    return torch.cat(features), torch.tensor([s.label for s in samples]), [s.captions for s in samples]


def test_every_figure_equals_what_is_computed_by_hand(folder: Path, undisturbed: dict[str, float]) -> None:
    network = model(folder).network
    with torch.no_grad():
        texts = [encode_texts(network, PICTURES.tokens([f"a {name}", name])) for name in CLASSES]
    weights = torch.stack([F.normalize(two.mean(0), dim=0) for two in texts])
    few, few_labels, _ = by_hand(folder, network, "few.tar")
    scores = few @ weights.T
    among_all = (scores.argmax(1) == few_labels).float().mean()
    among_few = torch.tensor(FEW)[scores[:, FEW].argmax(1)].eq(few_labels).float().mean()
    assert undisturbed["test/few/all_classes_top1"] == pytest.approx(float(among_all))
    assert undisturbed["test/few/zero_shot_top1"] == pytest.approx(float(among_few))
    assert undisturbed["test/few/zero_shot_top3"] == 1.0, "of three classes"

    features, labels, captions = by_hand(folder, network, "all.tar")
    with torch.no_grad():
        first = encode_texts(network, PICTURES.tokens([own[0] for own in captions]))
    gap = F.normalize(features, dim=1).mean(0) - first.mean(0)
    assert undisturbed["test/both/modality_gap"] == pytest.approx(float(gap.norm()), abs=1e-6)
    cosines = (F.normalize(features, dim=1) * first).sum(1)
    assert undisturbed["test/both/alignment_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    class_gap = F.normalize(few, dim=1).mean(0) - weights[few_labels].mean(0)
    assert undisturbed["test/few/modality_gap"] == pytest.approx(float(class_gap.norm()), abs=1e-6)

    probe = fit_probe(features, labels, len(CLASSES), epochs=3)
    right = (probe(few).argmax(1) == few_labels).float().mean()
    assert undisturbed["test/probed/linear_probe"] == pytest.approx(float(right))
    assert {name for name in undisturbed if name.startswith("test/probed")} == {"test/probed/linear_probe"}


def test_a_killed_test_goes_on_without_encoding_again(folder, undisturbed, tmp_path, monkeypatch) -> None:
    encoded = []

    def counted(network: Any, pictures: torch.Tensor) -> torch.Tensor:
        encoded.append(len(pictures))
        if len(encoded) == 15:
            raise KeyboardInterrupt
        return project_images(network, pictures)

    monkeypatch.setattr(evaluate, "project_images", counted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        evaluated(folder, tmp_path, model(folder, figures=False))
    before = len(encoded)
    assert evaluated(folder, tmp_path, model(folder, figures=False)) == pytest.approx(undisturbed, abs=1e-7)
    needed = 10 + 3 + 3 + 10  # batches of both, few, probed, probed/train
    assert before == 15 and len(encoded) - before < needed - 7, "a part of 8 batches was on disk"
    before = len(encoded)
    assert evaluated(folder, tmp_path, model(folder, figures=False)) == pytest.approx(undisturbed, abs=1e-7)
    assert len(encoded) == before, "all is on disk"
    other = model(folder, figures=False)
    with torch.no_grad():
        other.network.visual.proj.mul_(2)
    evaluated(folder, tmp_path, other)
    assert len(encoded) - before == needed, "features of other weights are not taken"


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    named = {"label": "json:label", "classes": CLASSES, "templates": ["{}"]}
    every, few = str(folder / "all.tar"), str(folder / "few.tar")
    chosen = {
        "imagenet": {"path": str(folder / "root/imagenet/val"), "classes": "imagenet", "templates": ["{}"]},
        "both": {"path": every, "captions": "json:captions", **named},
        "probed": {"path": few, "captions": None, "label": "json:label", "templates": None, "probe_train": every},
        "gone": {"path": str(folder / "gone.tar")},
    }
    parts = {
        "vars": {"train_data": "shapes"},
        "seed_everything": 7,
        "trainer": {"max_epochs": 1, "default_root_dir": str(tmp_path / "run"), **quiet},
        "model": {
            "class_path": "mmtrain.rankclip.module.Clip",
            "init_args": {
                "architecture": str(folder / "evaluation_vit.json"),
                "optim": {"lr": 1e-3, "warmup_steps": 1},
                "test": {"probe": {"epochs": 2}},
            },
        },
        "data": {
            "class_path": "datamodules.image_text.ImageTextDataModule",
            "init_args": {
                "train": every,
                "batch_size": 8,
                "eval_batch_size": 8,
                "pictures": {"size": 16, "context_length": 8},
                "evaluate": chosen,
                "benchmarks": str(folder / "root"),
            },
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text("# Small run\n" + yaml.safe_dump(parts))
    return path


def test_the_verb_leaves_results_tables_and_pictures(config: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """In the run folder, and in the W&B run of the training, which is logged offline here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    close()
    assert main(["fit", "-c", str(config)]) == 0
    close()  # as the end of the process does
    capsys.readouterr()
    assert main(["test", "-c", str(config), "--ckpt_path", "last"]) == 0
    close()
    shown = capsys.readouterr()
    assert "Zero-shot ImageNet-1k classification" in shown.out
    assert "9.06" in shown.out and "reported" in shown.out, "the paper's row of CLIP stands in the table"
    run = read_run(tmp_path / "run")
    assert (run.method, run.seed, run.step, run.scale) == ("CLIP", 7, 4, "full")
    assert run.setting == {"backbone": "evaluation_vit", "train_data": "shapes"}
    assert {"gone", "coco", "imagenetv2_top", "cifar10"} <= set(run.missing) and "imagenet" not in run.missing
    assert run.data_counts["train"] == {"samples": 37, "shards": 1} and run.evaluated["imagenet"] == 6
    assert run.metrics["test/imagenet/zero_shot_top1"] <= run.metrics["test/imagenet/zero_shot_top5"]
    assert run.chance["test/imagenet/zero_shot_top5"] == 5 / 1000 and run.chance["test/probed/linear_probe"] == 1 / 3
    assert "2 epochs" in run.protocol["probed"] and "1000" in run.protocol["imagenet"]
    for figure in run.figures:
        assert (tmp_path / "run" / figure["file"]).stat().st_size > 1000
    kinds = {(figure["file"].removeprefix("figures/"), figure["kind"]) for figure in run.figures}
    assert {("modality_gap_both.png", "figure"), ("answers_imagenet.png", "sample")} <= kinds
    assert {("activation_maps_both.png", "sample"), ("data_size.png", "figure")} <= kinds
    text = (tmp_path / "run/results.md").read_text()
    reported = load("rankclip").table("rankclip_table1").value("RankCLIP", "imagenet1k_top1")
    assert f"{reported:.2f}" in text and "evaluation_vit" in text and "## Not there" in text
    # training's own evaluation logged the same sets under val/, without the probe
    curves = read_curves(tmp_path / "run")
    assert "val/imagenet/zero_shot_top1" in curves and not any("linear_probe" in name for name in curves)

    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    fitted, measured = (read_file(path) for path in files)
    assert fitted["id"] == measured["id"] and len(files) == 2, "one W&B run in two pieces"
    assert fitted["config"]["data"]["init_args"]["batch_size"] == 8, "the resolved config"
    assert fitted["config"]["data_counts"]["train"]["samples"] == 37
    assert measured["config"]["method"] == "CLIP" and "gone" in measured["config"]["missing"]
    logged = {key: row[key] for row in measured["history"] for key in row}
    assert {key: logged[key] for key in run.metrics} == pytest.approx(run.metrics)
    assert "tables/rankclip_table1/path" in logged
    assert len(logged["figures/captions"]) + len(logged["samples/captions"]) == len(run.figures)


def test_two_processes_measure_the_same(config: Path, tmp_path: Path) -> None:
    """37, 9 and 7 samples, one of them unreadable, on two processes: each process repeats a sample or has fewer."""
    broken = tmp_path / "root/imagenet/val"
    shutil.copytree(Path(yaml.safe_load(config.read_text())["data"]["init_args"]["benchmarks"]), tmp_path / "root")
    (broken / "n01440764/broken.JPEG").write_bytes(b"no picture")
    results, skipped = [], []
    for devices, strategy in (("1", "auto"), ("2", "ddp")):
        words = ["--trainer.devices", devices, "--trainer.strategy", strategy, "--model.test.figures", "false"]
        root = ["--trainer.default_root_dir", str(tmp_path / devices)]
        root += ["--data.evaluate.imagenet.path", str(broken)]
        command = [sys.executable, "-m", "mmtrain", "test", "-c", str(config), *words, *root]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(read_run(tmp_path / devices).metrics)
        skipped.append(read_run(tmp_path / devices).skipped)
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    assert results[1] == pytest.approx(results[0], abs=1e-6)
    assert skipped == [{"imagenet": {"undecodable_image": 1}}] * 2


def test_a_figure_that_cannot_be_drawn_costs_no_result(folder, undisturbed, tmp_path, monkeypatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("mmtrain.rankclip.figures.save", refuses)
    with pytest.warns(UserWarning, match="not all figures could be drawn: No space left"):
        assert evaluated(folder, tmp_path, model(folder, keep_features=False)) == pytest.approx(undisturbed, abs=1e-7)
    with pytest.raises(UserError, match="umap needs umap-learn"):
        monkeypatch.setitem(sys.modules, "umap", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        TestSettings(projection="umap")


def test_the_average_needs_all_ten_sets() -> None:
    values = {f"test/{name}/linear_probe": i / 10 for i, name in enumerate(PROBE_AVERAGE)}
    assert probe_average(values, "test") == {"test/average/linear_probe": pytest.approx(0.45)}
    del values["test/svhn/linear_probe"]
    assert probe_average(values, "test") == {}
