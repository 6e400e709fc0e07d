"""First gradients and last weights of small trainings on 1, 2 and 4 processes, in float64; prints JSON.

Usage: python -m tests.agreement_driver FOLDER PROCESSES[,...] CASE [CASE ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from tests.resume_driver import Run
from tests.small_trainings import write_training

STEPS = 3
ALIP_TEXT = ["--data.extra_captions", "json:captions"]
# name -> training of tests.small_trainings, and what is changed of it; no dropout, whose masks belong to a process
CASES: dict[str, tuple[str, list[str]]] = {
    "RankCLIP": ("rankclip", []),
    "CLIP": ("rankclip", ["--model.class_path", "mmtrain.rankclip.module.Clip"]),
    "CyCLIP": ("rankclip", ["--model.class_path", "mmtrain.rankclip.cyclip.CyClip"]),
    "ALIP": (
        "rankclip",
        ["--model.class_path", "mmtrain.rankclip.alip.Alip", "--data.extra_captions", "json:captions"],
    ),
    "CAVP": ("cavp", ["--model.dropout", "0"]),
    "Diff-Foley": ("ldm", []),
    "Diff-Foley, flow": ("ldm", ["--model.objective", "flow", "--model.sampler.name", "euler"]),
    "RDP tokenizer": ("tokenizer", []),
    "RDP": ("latent_policy", []),
    "DP": ("latent_policy", ["--model.class_path", "mmtrain.rdp.dp.DiffusionPolicy", "--data.method", "dp"]),
    "StoryWeaver": ("storyweaver", ["--data.batch_size", "4"]),
    "StoryWeaver, full": ("storyweaver", ["--data.batch_size", "4", "--model.trains", "full"]),
    "StoryWeaver, frozen": ("storyweaver", ["--data.batch_size", "4", "--model.guidance.encoder", "frozen_prior"]),
}


class Keep(pl.Callback):
    """Keeps the first gradients in the run folder; BatchNorm and dropout stay in evaluation mode."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.Dropout) or "Dropout" in type(part).__name__:
                part.eval()

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
            torch.save(gradients, Path(trainer.default_root_dir) / "gradients.pt")


def run(folder: Path, config: Path, words: list[str], processes: int) -> dict[str, dict[str, Tensor]]:
    """Gradients and weights of a training."""
    options = ["--trainer.precision", "64-true", "--trainer.max_steps", str(STEPS), "--trainer.limit_val_batches", "0"]
    keep = ["--trainer.callbacks+", "{class_path: tests.agreement_driver.Keep}"]
    children = Run(config, folder, [*words, *options, *keep], processes, False)
    assert children.finish() == [0] * processes, children.log.read_text()[-3000:]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {"gradients": torch.load(folder / "gradients.pt", weights_only=True), "weights": last["state_dict"]}


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Of all tensors, relative to the largest entry of each; and where."""
    assert ours.keys() == theirs.keys()
    found = [(0.0, "")]
    for name, tensor in ours.items():
        if tensor.is_floating_point() and tensor.numel():
            size = float(tensor.abs().max())
            found.append((float((tensor - theirs[name]).abs().max()) / max(size, 1e-9), name))
    return max(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, counts = Path(sys.argv[1]), [int(count) for count in sys.argv[2].split(",")]
    result: dict[str, Any] = {}
    for case in sys.argv[3:]:
        kind, changes = CASES[case]
        own = root / case.replace(" ", "_").replace(",", "")
        training = write_training(own, kind)
        if kind == "rankclip":  # without patch dropout
            vit = own / "small_vit.json"
            settings = json.loads(vit.read_text())
            settings["vision_cfg"].pop("patch_dropout", None)
            vit.write_text(json.dumps(settings))
        states = {count: run(own / f"on{count}", training, changes, count) for count in counts}
        base = states[counts[0]]
        result[case] = {
            f"{what} {count}": largest_difference(base[what], states[count][what])
            for what in base
            for count in counts[1:]
        } | {"tensors": len(base["gradients"])}
        print(case, result[case], file=sys.stderr, flush=True)
    print(json.dumps(result))
