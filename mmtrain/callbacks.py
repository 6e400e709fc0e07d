"""Small callbacks that every run uses: random state, non-finite guard, data counters, final table."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.config_errors import UserError
from mmtrain.parallel import local
from mmtrain.reporting.tables import FRACTIONS


class RandomState(pl.Callback):
    """Keeps the state of Python's, NumPy's and torch's generators of every process in the checkpoint.

    They are set back just before the first batch after a resume, when nothing else draws from them any more.
    With another number of processes the states of the first ones are used, and new ones keep their seed.
    Without a resume training begins with generators that are seeded anew: what was drawn before, for the weights,
    depends on the strategy, and what is trained must not.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._loaded:
            reset_seed()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["random_state"] = distributed.gather_objects(random_state())

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._loaded = checkpoint.get("random_state")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._loaded and distributed.rank() < len(self._loaded):
            set_random_state(self._loaded[distributed.rank()])
        self._loaded = None


def random_state() -> dict[str, Any]:
    """State of all generators of this process, as tensors and plain types."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class NonFiniteGuard(pl.Callback):
    """Looks at losses and gradients of all processes before each optimizer step; one NaN would ruin all weights.

    Args:
        action: "stop" raises and leaves the weights as they were; "skip" leaves out the step, on all processes. While a
            gradient scaler (float16) looks for its scale, such steps are its own business, and it leaves them out.
        max_skipped: "skip" stops after this many steps in a row.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", max_skipped: int = 10) -> None:
        self.action, self.max_skipped, self.skipped = action, max_skipped, 0
        self._loss: Tensor | float = 0.0  # of the batches since the last step: not finite as soon as one was not

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._loss = self._loss + loss.detach().float().sum()  # no look at it here, which would wait for a GPU

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).sum() if grads else torch.zeros(())
        loss, self._loss = self._loss, 0.0
        sound = bool(torch.isfinite(norm + loss))  # one look for both
        if not distributed.any_process(not sound, pl_module.device):
            self.skipped = 0
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() >= 1:  # below 1 it is no overflow any more
            return
        found = distributed.gather_objects("" if sound else what_is_not_finite(pl_module, loss))
        message = f"step {trainer.global_step}: not finite: {by_process(found)}"
        self.skipped += 1
        if self.action == "stop" or self.skipped > self.max_skipped:
            raise UserError(
                f"{message}; no step was made with it. The last checkpoint is sound. Look at the learning rate, the "
                "precision and the data of this step, or set the NonFiniteGuard's action to skip"
            )
        rank_zero_warn(f"{message}: the step is left out ({self.skipped} in a row)", category=UserWarning)
        for parameter in pl_module.parameters():
            parameter.grad = None


def what_is_not_finite(module: nn.Module, loss: Tensor | float) -> str:
    """Loss, gradients or both, in words; of this process."""
    grads = {name: local(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
    found = [] if math.isfinite(loss) else [f"the loss ({float(loss):.3g})"]
    found += [f"the gradient of {len(bad)} parameters, first {bad[0]}"] if bad else []
    return ", ".join(found) or "the norm of the gradient"


def by_process(found: list[str]) -> str:
    """What processes found, in rank order, as a line: those first whose loss it was, as gradients are shared."""
    if len(found) == 1:
        return found[0]
    named = [f"process {rank}: {text}" for rank, text in enumerate(found) if text]
    named.sort(key=lambda text: "the loss" not in text)
    return "; ".join(named[:3]) + ("; ..." if len(named) > 3 else "")


class DataCounters(pl.Callback):
    """Logs samples read and left out, by reason, summed over the processes at the end of each epoch.

    The counters of every process go into the checkpoint.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, int]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = sum((Counter(counts) for counts in gather_counts(trainer)), Counter())
        if total and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"data/{name}": float(n) for name, n in sorted(total.items())}, trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["data_counters"] = gather_counts(trainer)
        data = getattr(trainer, "datamodule", None)
        checkpoint["data_counts"] = dict(getattr(data, "data_counts", {}))  # `test` puts it into the results

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._loaded = checkpoint.get("data_counters", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        own = self._loaded[distributed.rank() :: distributed.world_size()]  # also where there were more processes
        if own and hasattr(trainer.train_dataloader, "counts"):
            trainer.train_dataloader.counts = sum((Counter(counts) for counts in own), Counter())
        self._loaded = []


def gather_counts(trainer: pl.Trainer) -> list[dict[str, int]]:
    """Counters of the training loader of every process, in rank order."""
    return distributed.gather_objects(dict(getattr(trainer.train_dataloader, "counts", {})))


class EvaluationTable(pl.Callback):
    """Prints the metrics of `fit` (of its last evaluation) and `validate` beside what guessing would score.

    `test` has tables of its own: `mmtrain.reporting.callback.Results`.
    """

    def __init__(self) -> None:
        self.step = -1  # of the last evaluation

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.step = trainer.global_step
        if trainer.state.fn == "validate":
            self._print(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.step == trainer.global_step:  # otherwise the command line evaluates once more
            self._print(trainer, pl_module)

    @rank_zero_only
    def _print(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        chance = pl_module.chance_levels() if hasattr(pl_module, "chance_levels") else {}
        if not values:
            return
        step = f" at step {self.step}" if self.step > 0 else ""
        table = Table(title=f"evaluation{step}", title_justify="left")
        in_percent = {key for key in values if key in chance or FRACTIONS.fullmatch(key.rpartition("/")[2])}
        guessed = ("chance %", "times chance") if in_percent else ()
        for column in ("set", "metric", "value %" if in_percent else "value", *guessed):
            table.add_column(column, justify="left" if column in ("set", "metric") else "right")
        for key, value in values.items():
            name, _, metric = key.removeprefix("val/").rpartition("/")
            by_chance = chance.get(key)
            cells = (f"{100 * by_chance:.2f}", f"{value / by_chance:.1f}") if by_chance else ("", "") if guessed else ()
            table.add_row(name, metric, f"{100 * value:.2f}" if key in in_percent else f"{value:.4g}", *cells)
        Console(width=100).print(table)


class PredictionFiles(BasePredictionWriter):
    """`predict` writes what the model returns: `<run folder>/predictions/<loader>-<batch>-rank<r>.pt`, one a batch."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if not prediction:
            return  # nothing of the batch could be read
        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        on_cpu = {name: value.cpu() for name, value in prediction.items()}
        torch.save(on_cpu, folder / f"{dataloader_idx}-{batch_idx:05d}-rank{trainer.global_rank}.pt")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            for old in Path(trainer.default_root_dir, "predictions").glob("*-rank*.pt"):
                old.unlink()
        trainer.strategy.barrier()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say where they are, unless there are none, as of a model that writes files of its own."""
        trainer.strategy.barrier()  # what other processes wrote counts
        folder = Path(trainer.default_root_dir) / "predictions"
        if trainer.is_global_zero and any(folder.glob("*-rank*.pt")):
            Console().print(f"predictions are in {folder}")
