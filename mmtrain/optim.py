"""Optimizers and learning-rate schedules: parameter groups, warm-up with cosine, OneCycle."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

Decay = Literal["matrices", "by_name", "all"]


@dataclass
class AdamWSettings:
    """AdamW with a schedule in optimizer steps.

    Args:
        lr: highest learning rate.
        decay: which parameters decay. "matrices": those with two or more dimensions. "by_name": the released rule of
            CyCLIP and RankCLIP, all but names with bn, ln, bias or logit_scale; by oversight it decays
            visual.class_embedding and downsample.1.weight too. "all": every parameter (ALIP).
        schedule: "cosine" (linear warm-up, then cosine to 0) or "onecycle" (ALIP: warm-up share 0.1 of a OneCycle
            whose momentum cycling also moves beta1 between 0.95 and 0.85, overriding `betas`) or "constant".
        warmup_steps: steps of the linear warm-up of "cosine" and "constant".
        schedule_offset: steps by which the schedule runs ahead. The released trainer counts from epoch 1, so it is
            one epoch ahead and the rate rises again at the end; 0 is sound.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Decay = "matrices"
    schedule: Literal["cosine", "onecycle", "constant"] = "cosine"
    warmup_steps: int = 10_000
    schedule_offset: int | Literal["one_epoch"] = 0

    def configure(self, module: pl.LightningModule) -> dict[str, Any]:
        """The dict for `LightningModule.configure_optimizers`, stepping every batch."""
        groups = parameter_groups(module.named_parameters(), self.weight_decay, self.decay)
        # sharded parameters in one operation: how DTensors share out an operation is found out anew for each
        fused = True if any(isinstance(p, DTensor) for p in module.parameters()) else None
        optimizer = AdamW(groups, lr=self.lr, betas=tuple(self.betas), eps=self.eps, fused=fused)
        optimizer._step_supports_amp_scaling = False  # of float16 only; Lightning would not clip gradients with it
        per_epoch, total = training_steps(module.trainer)
        if self.schedule == "onecycle":
            schedule = OneCycleLR(optimizer, self.lr, total_steps=total, pct_start=0.1)
        elif self.schedule == "constant":
            schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        else:
            offset = per_epoch if self.schedule_offset == "one_epoch" else self.schedule_offset
            schedule = LambdaLR(optimizer, warmup_cosine(self.warmup_steps, total, offset))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(warmup: int, total: int, offset: int = 0) -> Callable[[int], float]:
    """Factor of the learning rate at a step: (step + 1) / warmup, then a half cosine from 1 to 0 at `total`."""

    def factor(step: int) -> float:
        step += offset
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, decay: Decay
) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; see `AdamWSettings.decay`. Frozen parameters are left out."""
    rules: dict[str, Callable[[str, nn.Parameter], bool]] = {
        "matrices": lambda name, p: p.ndim >= 2,
        "by_name": lambda name, p: not any(part in name for part in ("bn", "ln", "bias", "logit_scale")),
        "all": lambda name, p: True,
    }
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for name, p in trained if rules[decay](name, p)]
    kept = [p for name, p in trained if not rules[decay](name, p)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def training_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the whole run.

    `trainer.estimated_stepping_batches` would build the loaders before a checkpoint is restored, and their saved
    position would be lost; so a data module is asked for the length of a loader that is then thrown away.
    """
    if trainer.datamodule is None:
        total = int(trainer.estimated_stepping_batches)
        return max(1, total // max(1, trainer.max_epochs or 1)), total
    batches = len(trainer.datamodule.train_dataloader())
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    limits = [trainer.max_steps, per_epoch * (trainer.max_epochs or -1)]
    return per_epoch, min((limit for limit in limits if limit > 0), default=per_epoch)
