"""What a training step of a config needs: bytes by kind, floating-point operations, size of its checkpoint.

Measured, not modelled: three steps of the training itself are run on this CPU with a few samples, and every allocation
is counted. What grows with the batch is then extended to the batch of the config.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.checkpoint import LastCheckpoint
from mmtrain.cli import build
from mmtrain.config_errors import UserError, say_once
from mmtrain.config_layers import load
from mmtrain.ema import TrainableEma
from mmtrain.throughput import Throughput

MIB = 2**20
FEW = (2, 4)  # samples of the two measurements, between and beyond which bytes and operations are taken as a line
MEASURED_STEP, COUNTED_STEP = 1, 2  # from the second on there are states of the optimizer


@dataclass(frozen=True)
class Footprint:
    """Bytes unless told otherwise; of one process that holds the whole model.

    Attributes:
        parameters, trained: numbers.
        weights: parameters and buffers.
        gradients, optimizer: of what is trained; the optimizer's states and averages of weights.
        fixed, each: activations and temporaries of forward and backward: for any batch, and more for each sample.
            `fixed` is below zero where the highest moment comes after the old gradients were let go.
        update: temporaries of the optimizer's step.
        flops: floating-point operations of forward and backward, for a sample.
        checkpoint: size of the file.
        loader_seconds: time of one core to read a sample.
        samples: of an epoch of the data at hand.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    fixed: int
    each: float
    update: int
    flops: float
    checkpoint: int
    loader_seconds: float
    samples: int

    def passing(self, samples: float) -> float:
        """Bytes that come and go in a step with so many samples, at their highest."""
        return max(self.fixed + self.each * samples, self.update)

    def peak(self, samples: int) -> int:
        """Bytes at the highest moment of a step with so many samples."""
        return self.weights + self.gradients + self.optimizer + round(self.passing(samples))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live while it is entered, and their highest sum."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0
        for tensor in held:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or not size:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result


class Measure(pl.Callback):
    """Fills itself with what a run of three steps shows."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._open = contextlib.ExitStack()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == MEASURED_STEP:
            held = kinds(trainer, module)
            self.found |= {kind: sum(sizes(tensors).values()) for kind, tensors in held.items()}
            inputs = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
            everything = [tensor for tensors in (*held.values(), inputs) for tensor in tensors]
            self.live = self._open.enter_context(LiveBytes(everything))
        if index == COUNTED_STEP:
            self.flops = self._open.enter_context(FlopCounterMode(display=False))

    def on_before_optimizer_step(self, *_: Any) -> None:
        if "forward" not in self.found and hasattr(self, "live"):
            self.found["forward"], self.live.most = self.live.most, self.live.now

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self._open.close()
        if hasattr(self, "flops"):
            self.found["flops"] = self.flops.get_total_flops()
            self.found["update"] = self.live.most

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        path = os.path.join(trainer.default_root_dir, "size.ckpt")
        trainer.save_checkpoint(path)
        self.found["checkpoint"] = os.path.getsize(path)


def kinds(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, list[Tensor]]:
    """The tensors that stay from step to step."""
    states = [leaf for o in trainer.optimizers for leaf in tree_leaves(dict(o.state)) if isinstance(leaf, Tensor)]
    averages = [w for c in trainer.callbacks if isinstance(c, TrainableEma) for w in c.weights.values()]
    return {
        "weights": [*module.parameters(), *module.buffers()],
        "gradients": [p.grad for p in module.parameters() if p.grad is not None],
        "optimizer": [*states, *averages],
    }


def sizes(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes by storage, each once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def measure(names: list[str], settings: list[tuple[str, str]]) -> Footprint:
    """Run the config for three steps with a few samples, twice.

    Where the data are not at hand and their data module has a `stand_in`, that takes their place.

    Args:
        names, settings: as `config_layers.load` takes them.

    Raises:
        UserError: any mistake in the config, or data that are not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            small = run_few(names, settings, FEW[0], root)
        except UserError as error:
            why = str(error).splitlines()[0]
            say_once(f"the data are not at hand ({why}): made-up ones stand in; --samples tells how many there are")
            settings = [*settings, *stand_in_settings(names, settings, root / "data", error)]
            small = run_few(names, settings, FEW[0], root)
        large = run_few(names, settings, FEW[1], root)
    slope = lambda key: (large[key] - small[key]) / (FEW[1] - FEW[0])  # noqa: E731
    each = max(0.0, slope("forward"))
    held = large["weights"] + large["gradients"] + large["optimizer"]
    whole = {
        key: int(large[key]) for key in ("parameters", "trained", "weights", "gradients", "optimizer", "checkpoint")
    }
    return Footprint(
        **whole,
        fixed=int(large["forward"] - each * FEW[1] - held),
        each=each,
        update=int(large["update"] - held),
        flops=max(slope("flops"), 0.5 * large["flops"] / FEW[1]),
        loader_seconds=large["loader_seconds"],
        samples=int(large["samples"]),
    )


def stand_in_settings(
    names: list[str], settings: list[tuple[str, str]], folder: Path, error: UserError
) -> list[tuple[str, str]]:
    """Settings with made-up data, or the error where the data module has none."""
    data = load(names, settings).data.get("data", {})
    module, _, name = str(data.get("class_path", "")).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None) if module else None
    if not hasattr(kind, "stand_in"):
        raise error
    made = kind.stand_in(folder, data.get("init_args") or {})
    as_words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in made.items()}
    return [(f"data.init_args.{key}", value) for key, value in as_words.items()]


def run_few(names: list[str], settings: list[tuple[str, str]], samples: int, root: Path) -> dict[str, float]:
    """What three steps with so many samples on this CPU show."""
    layer = load(names, settings)
    layer.data["trainer"].update(
        {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
        | {"max_steps": 3, "max_epochs": None, "limit_val_batches": 0, "default_root_dir": str(root / str(samples))}
        | {"enable_progress_bar": False, "enable_model_summary": False, "accumulate_grad_batches": 1}
    )
    layer.data["data"].setdefault("init_args", {}).update({"batch_size": samples, "num_workers": 0})
    trainer, module, data = build(layer)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, LastCheckpoint | Throughput)]
    trainer.callbacks.append(measured := Measure())
    try:
        trainer.fit(module, datamodule=data)
    except (OSError, ValueError) as error:
        raise UserError(f"plan: the training cannot be tried here: {error}") from error
    begin, read = time.perf_counter(), 0
    for _, batch in zip(range(8), loader := data.train_dataloader(), strict=False):
        read += len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
    parameters = list(module.parameters())
    return measured.found | {
        "loader_seconds": (time.perf_counter() - begin) / max(1, read),
        "samples": len(loader) * samples,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }


def resident_bytes() -> int:
    """Highest resident memory of this process so far (Linux), see `reset_resident_bytes`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


@contextlib.contextmanager
def watched_resident_bytes() -> Iterator[list[int]]:
    """A list that gets, at the end, how much resident memory grew at most."""
    grown: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes()
    yield grown
    grown.append(resident_bytes() - before)
