"""Checkpoints that Diff-Foley's configs name, as trainings would leave them, of small networks with fresh weights."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from mmtrain.checkpoint import plain
from mmtrain.config_layers import load
from mmtrain.difffoley.checkpoints import CLASS, class_path


def merged(*names: str) -> dict[str, Any]:
    """A shipped config with its layers, merged and resolved."""
    return load(list(names), []).data


def model_settings(*names: str) -> dict[str, Any]:
    """The `model.init_args` of a shipped config with its layers."""
    return merged(*names)["model"]["init_args"]


def save(module: pl.LightningModule, path: Path) -> Path:
    """Write a module as a training of it would."""
    content = {"state_dict": module.state_dict(), "hyper_parameters": plain(dict(module.hparams))}
    content |= {"pytorch-lightning_version": pl.__version__, "global_step": 1, CLASS: class_path(type(module))}
    module.on_save_checkpoint(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def lay_out(stand_ins: Path, here: Path, but: str) -> None:
    """All stand-ins in the current folder of a test, but those of the run that is about to be made."""
    for run in (stand_ins / "runs").iterdir():
        if run.name != but and not (here / "runs" / run.name).exists():
            shutil.copytree(run, here / "runs" / run.name)
