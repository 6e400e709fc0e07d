"""Exponential moving average of a module's trainable weights: evaluated with, kept in checkpoints, exact on resume.

The schedule is Diffusion Policy's, which RDP takes over. Frozen parts (a tokenizer, a text encoder) do not change, so
they are neither copied nor averaged, as Lightning's own callback does.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.parallel import let_go, like, local, whole

KEY, UPDATES = "ema", "ema_updates"  # in a checkpoint: name -> tensor, and the number of updates behind it


def decay_at(step: int, power: float = 0.75, max_decay: float = 0.9999) -> float:
    """Weight of the old average at update `step`, 0 first: min(max_decay, 1 - (1 + step)^-power).

    >>> decay_at(0), round(decay_at(1), 4), decay_at(10**6)
    (0.0, 0.4054, 0.9999)
    """
    return min(max_decay, 1 - (1 + max(step, 0)) ** -power)


def ema_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint's state dict with the averaged weights in the place of the raw ones, where it has any."""
    state = dict(checkpoint["state_dict"])
    for name, value in checkpoint.get(KEY, {}).items():
        if name in state:
            state[name] = value.to(state[name].dtype)
    return state


class TrainableEma(pl.Callback):
    """Averages the parameters that are trained; validation, test and predict see the average, training the raw weights.

    It is updated after each step of the optimizer, so not between accumulated batches, nor after one that a gradient
    scaler leaves out. Checkpoints hold the raw weights in `state_dict`, also when they are written in the midst of a
    validation, and the average in `ema`. Half-precision weights are averaged in float32. Buffers are not averaged.
    Where the model is sharded the average is too, and whole in checkpoints.

    A file saved with weights only has no average: Lightning does not ask callbacks then.

    Args:
        power, max_decay: see `decay_at`.
        update_after_step: until this many updates were made the average is the raw weights.

    Raises:
        UserError: a setting out of range, several optimizers, or a checkpoint's average that does not fit the module.
    """

    def __init__(self, power: float = 0.75, max_decay: float = 0.9999, update_after_step: int = 0) -> None:
        if power <= 0 or not 0 <= max_decay < 1 or update_after_step < 0:
            raise UserError(
                f"ema: power {power}, max_decay {max_decay}, update_after_step {update_after_step}: "
                "power must be above 0, max_decay in [0, 1), update_after_step at least 0"
            )
        self.power, self.max_decay, self.update_after_step = power, max_decay, update_after_step
        self.weights: dict[str, Tensor] = {}  # the average; empty until training begins or a checkpoint is loaded
        self.updates = 0
        self._raw: dict[str, Tensor] = {}  # the raw weights while the average stands in for them
        self._from_before = False  # the average is of an earlier call in this process
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.weights, self.updates = {}, 0
        self._from_before = bool(self.weights)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.weights, self.updates, self._from_before = {}, 0, False
        if KEY not in checkpoint:
            rank_zero_warn("the checkpoint has no averaged weights: its raw ones are used", category=UserWarning)
            return
        self._check(pl_module, checkpoint[KEY])
        first = set(first_names(pl_module).values())
        self.weights = {name: value.detach().clone() for name, value in checkpoint[KEY].items() if name in first}
        self.updates = int(checkpoint[UPDATES])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        if not self.weights:
            return
        names, state = first_names(pl_module), checkpoint["state_dict"]
        scalars = getattr(trainer.strategy, "scalars", ())
        average = {first: whole(value, first in scalars) for first, value in self.weights.items()}
        raw = {first: whole(value, first in scalars) for first, value in self._raw.items()}
        checkpoint[KEY] = {name: average[first] for name, first in names.items() if first in average}
        checkpoint[UPDATES] = self.updates
        state.update({name: raw[first] for name, first in names.items() if first in raw and name in state})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise UserError(f"ema: one optimizer is needed to count steps by, the model has {len(trainer.optimizers)}")
        parameters = trainable(pl_module)
        if not self.weights:
            self.weights = {name: _master(parameter) for name, parameter in parameters.items()}
        if missing := parameters.keys() - self.weights.keys():
            raise UserError(
                f"ema: {min(missing)} ({len(missing)} in all) is trained, but the checkpoint has no average of it: "
                "freeze what was frozen then, or start a new run"
            )
        self._to_device(parameters)
        # not in on_train_batch_end: another callback may write a checkpoint there before it is this one's turn
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self.update(parameters))

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter]) -> None:
        """One step of the average towards `parameters`."""
        decay = decay_at(self.updates - self.update_after_step, self.power, self.max_decay)
        averages = [local(self.weights[name]) for name in parameters]
        raw = [local(p.detach()).to(a.dtype) for p, a in zip(parameters.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, raw, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def _swap_in(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._from_before and trainer.ckpt_path:
            # a file of weights alone does not reach `on_load_checkpoint`, and an earlier `fit`'s average is not its
            self.weights, self._from_before = {}, False
        if not self.weights or self._raw:
            return
        # by name, for `requires_grad` of a module that is only evaluated may be another
        parameters = {name: p for name, p in pl_module.named_parameters() if name in self.weights}
        self._to_device(parameters)
        self._raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.weights[name])  # in place: the optimizer, DDP and cuDNN keep hold of the memory

    @torch.no_grad()
    def _swap_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        let_go(pl_module)  # whole copies that an evaluation used do not take the raw weights back
        for name, parameter in pl_module.named_parameters():
            if name in self._raw:
                parameter.copy_(self._raw[name])
        self._raw = {}

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._swap_out(trainer, pl_module)
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _to_device(self, parameters: dict[str, nn.Parameter]) -> None:
        # Lightning evaluates in inference mode, and a tensor made there could never be updated in place again
        with torch.inference_mode(False):
            for name, parameter in parameters.items():
                self.weights[name] = like(self.weights[name].to(parameter.device), parameter)

    def _check(self, pl_module: pl.LightningModule, weights: dict[str, Tensor]) -> None:
        own = {name: tuple(p.shape) for name, p in pl_module.named_parameters(remove_duplicate=False)}
        for name, value in weights.items():
            if own.get(name) != tuple(value.shape):
                raise UserError(
                    f"ema: the checkpoint's average of {name} has shape {tuple(value.shape)}, the model's is "
                    f"{own.get(name, 'not there')}; set the model up as it was trained"
                )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of those that training changes."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def first_names(module: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first name of the same one, which differ where weights are tied."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(p, name) for name, p in module.named_parameters(remove_duplicate=False)}


def _master(parameter: nn.Parameter) -> Tensor:
    """A copy to average in: half precision would lose steps smaller than its resolution."""
    return parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
