"""Synthetic run folders as `fit` and `test` leave them: 4 methods x 3 seeds on the emoji, and two full-scale runs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from mmtrain.rankclip.reproduce import PLAN
from mmtrain.reporting.results import Run, find_runs, write_run
from mmtrain.reproduce import judge

METHODS = {"RankCLIP": 0.23, "CLIP": 0.215, "CyCLIP": 0.05, "ALIP": 0.205}  # zero-shot top-1 of each, on average
SEEDS = (0, 1, 2)
RECALLS = {"zero_shot_top1": 1.0, "zero_shot_top3": 1.6, "zero_shot_top5": 2.1, "i2t_r1": 1.0, "i2t_r5": 2.0}
RECALLS |= {"i2t_r10": 2.5, "t2i_r1": 1.1, "t2i_r5": 2.1, "t2i_r10": 2.6}
SHAPES = {"alignment_cosine": 0.55, "uniformity_cosine": -0.08, "alignment_distance": 0.9}
SHAPES |= {"uniformity_distance": -2.6, "modality_gap": 0.42}
SETS = ("unseen_concepts", "twemoji_style", "unseen_twemoji")
CODE = {"mmtrain": "0.1.0", "torch": "2.11.0", "lightning": "2.6.1", "commit": "0123456789abcdef" * 2, "dirty": True}
MISSING = {"imagenetv2_top": "ROOT/imagenetv2_top/<0..999>/*.jpeg", "coco": "ROOT/coco/val2017.tar"}
FULL = {"zero_shot_top1": 0.1031, "zero_shot_top3": 0.1961, "zero_shot_top5": 0.2387}


def write_curves(folder: Path, level: float, seed: int, columns: Sequence[str], version: int = 0) -> None:
    """A noisy falling loss at every 5th of 900 steps, and rising values at the end of each of 15 epochs."""
    random = np.random.default_rng([seed, int(level * 1e6)])
    target = folder / "logs" / f"version_{version}" / "metrics.csv"
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epoch", "train/loss", "train/tau", *columns], restval="")
        writer.writeheader()
        for step in range(4, 900, 5):
            loss = 6 * np.exp(-step / 250) + 1.5 - 2 * level + random.normal(scale=0.15)
            writer.writerow({"step": step, "epoch": step // 60, "train/loss": loss, "train/tau": 0.07 - step * 3e-5})
            if step % 60 == 59:
                done = 1 - np.exp(-step / 300)
                values = {name: level * factor * done + random.normal(scale=0.004) for name, factor in columns.items()}
                writer.writerow({"step": step, "epoch": step // 60, **values})


def write_figure(path: Path, seed: int) -> None:
    """Two clouds of points, 640 x 420."""
    random = np.random.default_rng(seed)
    picture = Image.new("RGB", (640, 420), "white")
    pen = ImageDraw.Draw(picture)
    for centre, colour in ((220, "#1f6feb"), (400, "#c2560c")):
        for x, y in random.normal((centre, 210), 45, size=(600, 2)):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_sample(path: Path, seed: int) -> None:
    """A photograph's worst case for the size: smooth colours under noise, 480 x 240."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:240, 0:480] / 60
    smooth = np.stack([np.sin(rows + seed), np.cos(columns), np.sin(rows * columns / 8)], axis=-1) * 90 + 128
    pixels = (smooth + random.normal(scale=12, size=smooth.shape)).clip(0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_laptop_run(folder: Path, method: str, seed: int, figures: int = 3) -> Path:
    """One run on the emoji, with curves, figures, config and results; returns its folder."""
    random = np.random.default_rng([seed, len(method)])
    level = METHODS.get(method, 0.2) + random.normal(scale=0.006)
    metrics = {f"test/{name}/{key}": level * f for name in SETS for key, f in RECALLS.items()}
    metrics |= {f"test/{name}/{key}": value + 0.3 * level for name in SETS for key, value in SHAPES.items()}
    metrics["test/subgroups/linear_probe"] = 0.4 + level
    chance = {key: 1 / 1418 for key in metrics if key.endswith(("top1", "r1"))}
    run = Run(folder, "rankclip", method, "rankclip_emoji", "laptop", seed=seed, step=900, epoch=15, code=CODE)
    run.setting = {"backbone": "rn_small", "train_data": "emoji"}
    run.metrics, run.chance, run.missing, run.checkpoint = metrics, chance, dict(MISSING), "checkpoints/last.ckpt"
    run.evaluated, run.data_counts = {"unseen_concepts": 141}, {"train": {"samples": 3828}}
    for number in range(figures):
        write_figure(folder / f"figures/gap_{number}.png", seed * 10 + number)
        run.figures.append({"file": f"figures/gap_{number}.png", "title": f"Modality gap on {SETS[number % 3]}"})
        run.figures[-1]["kind"] = "figure"
    write_sample(folder / "figures/sample.png", seed + len(method))
    run.figures.append({"file": "figures/sample.png", "title": "Nearest pictures of a caption", "kind": "sample"})
    write_curves(folder, level, seed, {f"val/{name}/{key}": f for name in SETS[:2] for key, f in RECALLS.items()})
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\nmodel:\n  optim: {{lr: 0.002}}\n" + "# more\n" * 80)
    write_run(run)
    return folder


def write_full_run(folder: Path, method: str, seed: int, gain: float) -> Path:
    """One run that may stand beside the paper's tables: CC3M, ViT-B/32, with the sets of Tables 1, 2 and part of 3."""
    run = Run(folder, "rankclip", method, "rankclip_cc3m", "full", seed=seed, step=180_000, epoch=64, code=CODE)
    run.setting = {"backbone": "ViT-B/32", "train_data": "CC3M"}
    for name, factor in (("imagenet", 1.0), ("imagenetv2_matched", 0.88), ("imagenet_r", 1.1)):
        run.metrics |= {f"test/{name}/{key}": value * factor * gain for key, value in FULL.items()}
    for way, factor in (("i2t", 1.0), ("t2i", 0.53)):
        recalls = {1: 0.0712, 5: 0.1951, 10: 0.2833}
        run.metrics |= {f"test/coco/{way}_r{k}": value * factor * gain * 1.8 for k, value in recalls.items()}
        run.metrics |= {f"test/coco/one_caption_{way}_r{k}": value * factor * gain for k, value in recalls.items()}
    for name, value in {"cifar10": 0.786, "cifar100": 0.561, "dtd": 0.431, "sst2": 0.531}.items():
        run.metrics[f"test/{name}/linear_probe"] = value * gain
    run.missing, run.evaluated = dict(MISSING), {"imagenet": 50_000}
    write_curves(folder, 0.1 * gain, seed, {"val/imagenet/zero_shot_top1": 1.0, "val/cc3m_val/i2t_r1": 2.0})
    (folder / "config.yaml").write_text(f"seed_everything: {seed}\ndata:\n  train: https://example.org/cc3m-0.tar\n")
    write_run(run)
    return folder


def write_claims(folder: Path) -> None:
    """`reproduce.json` as the verb `reproduce` leaves it above its run folders, judged on the laptop runs in there."""
    runs = [run for run in find_runs([folder]) if run.scale == "laptop"]
    by_method = {method: [run for run in runs if run.method == method] for method in METHODS}
    content = {
        "title": "rankclip at laptop scale",
        "paper": "rankclip",
        "command": "python -m mmtrain reproduce rankclip",
    }
    content |= {"quick": False, "cpu_seconds": 13_320.0, "claims": judge(PLAN, by_method)}
    (folder / "reproduce.json").write_text(json.dumps(content))


def write_all(folder: Path) -> Path:
    """The 14 runs and the claims; returns the folder that holds them all."""
    for method in METHODS:
        for seed in SEEDS:
            write_laptop_run(folder / f"{method.lower()}_seed{seed}", method, seed)
    for seed, gain in ((0, 1.0), (1, 1.03)):
        write_full_run(folder / f"cc3m_seed{seed}", "RankCLIP", seed, gain)
    write_claims(folder)
    return folder
