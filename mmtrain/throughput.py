"""How fast a training is and what holds it up: samples a second, time waiting for data, step times, memory, FLOPs."""

import contextlib
import math
import multiprocessing
import os
import time
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmtrain import distributed
from mmtrain.config_errors import UserError
from mmtrain.gpus import gpu_of

GIB = 2**30
MEMORY_EVERY = 60.0  # seconds: adding up the memory of processes takes about 15 ms for each GiB
Moment = float | torch.cuda.Event


class Batch(NamedTuple):
    """When the batch before ended, this one started and ended, and seconds in which the loader let us wait for it."""

    before: Moment
    start: Moment
    end: Moment
    waited: float


class Throughput(pl.Callback):
    """Logs `throughput/...` every `trainer.log_every_n_steps` optimizer steps and sums the run up in a closing line.

    Logged, over the steps since the last time: `samples_per_second` of all processes, `step_seconds_p50`, `_p90` and
    `_p99`, `data_wait_seconds` a step and `data_wait_share` in [0, 1] of the process that waits longest, `memory_gib`
    (of a process with its loader processes, the largest), on a GPU `gpu_memory_gib` (the most that was ever allocated)
    and `mfu`, the share of its peak in [0, 1].

    A step is waiting for data, forward, backward and optimizer. Evaluation and writing of checkpoints do not count, nor
    does the first step after a start, which warms up. On a GPU the time is the GPU's own, which is looked at once a
    log line, so that nothing waits for it in between; it waits for data only while it has nothing else to do.

    Args:
        warn_above: share of the time spent waiting for data above which there is a warning, once, with what to change.
        warn_steps: that share is taken over so many steps.
        flops: of one batch on one process, forward and backward. None counts them in the first batch; what is run
            again to save memory counts again. With compiled blocks they cannot be counted: give them here.
        peak_tflops: of the device in the run's precision, for one that `mmtrain.gpus` does not know.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        warn_above: float = 0.2,
        warn_steps: int = 100,
        flops: float | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        if not 0 < warn_above <= 1 or warn_steps < 1:
            raise UserError(
                f"Throughput: warn_above {warn_above} must be in (0, 1], warn_steps {warn_steps} at least 1"
            )
        self.warn_above, self.warn_steps, self.flops, self.peak_tflops = warn_above, warn_steps, flops, peak_tflops
        self._counter = FlopCount()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step: list[Batch] = []  # the present one
        self._window: list[list[Batch]] = []  # steps since the last log line
        self._steps = array("d")  # seconds of every step
        self._batches, self._waiting = 0, 0.0  # of all these steps
        self._judged = np.zeros(3)  # steps, seconds and seconds of waiting since the loader was last looked at
        self._has_warned, self._is_warm = False, False
        self._memory, self._memory_time, self._last = 0.0, -math.inf, {}
        self._flops, self._peak = self.flops, self.peak_tflops or peak_of(pl_module.device, trainer.precision)
        self._last_step, self._loader_waited = trainer.global_step, waited(trainer)
        self._end = now(pl_module.device)

    # --- what happens at every batch ---

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._peak and self._flops is None and not self._is_warm and not is_compiled(pl_module):
            self._counter.__enter__()
        self._start = now(pl_module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._counter.is_on:
            self._counter.__exit__(None, None, None)
            self._flops = self._counter.total
        before, self._end = self._end, now(pl_module.device)
        self._loader_waited, loader_before = waited(trainer), self._loader_waited
        self._step.append(Batch(before, self._start, self._end, self._loader_waited - loader_before))
        if trainer.global_step == self._last_step:
            return  # gradients are accumulated
        if self._is_warm:
            self._window.append(self._step)
        self._is_warm, self._step, self._last_step = True, [], trainer.global_step
        if len(self._window) >= max(1, trainer.log_every_n_steps):
            self._look(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._counter.is_on:
            self._counter.__exit__(None, None, None)

    # --- what happens at every log line, on all processes ---

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device, loader = pl_module.device, trainer.train_dataloader
        if isinstance(self._end, torch.cuda.Event):
            self._end.synchronize()
        # [steps, 2]; the last step of an epoch may have fewer batches
        times = np.array([np.sum([times_of(batch) for batch in step], axis=0) for step in self._window])
        num_batches = sum(len(step) for step in self._window)
        self._window = []
        own = torch.tensor([[times[:, 0].sum(), self._host_memory(), gpu_memory(device)]], device=device)
        waiting, memory, on_gpu = distributed.gather_rows(own).max(0).values.tolist()
        seconds = times.sum(1)
        self._steps.extend(seconds)
        self._batches, self._waiting = self._batches + num_batches, self._waiting + waiting
        self._judged += len(seconds), seconds.sum(), waiting
        found = summary(seconds, waiting) | self._rates(seconds.sum(), num_batches, loader)
        self._last = {name: value for name, value in (("memory_gib", memory), ("gpu_memory_gib", on_gpu)) if value}
        if trainer.is_global_zero:
            metrics = {f"throughput/{name}": float(value) for name, value in (found | self._last).items()}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, trainer.global_step)
        self._judge_loader(trainer, loader)

    def _rates(self, seconds: float, num_batches: int, loader: Any) -> dict[str, float]:
        rates = {}
        if hasattr(loader, "batch_size"):
            rates["samples_per_second"] = num_batches * loader.batch_size / seconds
        if self._peak and self._flops:
            rates["mfu"] = num_batches * self._flops / seconds / (self._peak * 1e12)
        return rates

    def _host_memory(self) -> float:
        if time.monotonic() - self._memory_time > MEMORY_EVERY:
            self._memory, self._memory_time = host_memory(), time.monotonic()
        return self._memory

    def _judge_loader(self, trainer: pl.Trainer, loader: Any) -> None:
        steps, seconds, waiting = self._judged
        if steps < self.warn_steps:
            return
        if waiting > self.warn_above * seconds and not self._has_warned:
            self._has_warned = True
            change = advice(waiting / seconds, loader.num_workers, cores(trainer), getattr(trainer, "datamodule", None))
            rank_zero_warn(
                f"the loader is the bottleneck: of the last {steps:.0f} steps of {seconds / steps:.3g} s, "
                f"{waiting / seconds:.0%} was waiting for data. {change}",
                category=UserWarning,
            )
        self._judged[:] = 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._window:
            self._look(trainer, pl_module)
        if not self._steps:
            return
        seconds = np.array(self._steps)
        found = summary(seconds, self._waiting)
        found |= self._last | self._rates(seconds.sum(), self._batches, trainer.train_dataloader)
        rank_zero_info(closing_line(found))


# --- clocks and numbers ---


def now(device: torch.device) -> Moment:
    """This moment on the device's own time line."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Moment, end: Moment) -> float:
    """Seconds; of events that have come."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def times_of(batch: Batch) -> tuple[float, float]:
    """Seconds of waiting for data, and of work.

    The device stood still before the batch for other reasons too, such as an evaluation; and while the loader let us
    wait it may still have been at work. Waiting for data is what was both.
    """
    return min(batch.waited, between(batch.before, batch.start)), between(batch.start, batch.end)


def waited(trainer: pl.Trainer) -> float:
    """Seconds in which the training loader let the trainer wait so far; 0 for one that does not count them."""
    return getattr(trainer.train_dataloader, "waited", 0.0)


def summary(seconds: np.ndarray, waiting: float) -> dict[str, float]:
    """Percentiles of the times of steps [S], seconds, and what of them was waiting."""
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99))
    return {
        "step_seconds_p50": p50,
        "step_seconds_p90": p90,
        "step_seconds_p99": p99,
        "data_wait_seconds": waiting / len(seconds),
        "data_wait_share": min(1.0, waiting / seconds.sum()),
    }


def closing_line(found: dict[str, float]) -> str:
    """The run in one line."""
    parts = [f"{found['samples_per_second']:.4g} samples/s"] if "samples_per_second" in found else []
    p50, p90, p99 = (found[f"step_seconds_p{percent}"] for percent in (50, 90, 99))
    parts.append(f"a step {p50:.3g} s (90 %: {p90:.3g} s, 99 %: {p99:.3g} s)")
    parts.append(f"{found['data_wait_share']:.0%} waiting for data")
    parts += [f"memory {found['memory_gib']:.3g} GiB"] if "memory_gib" in found else []
    parts += [f"GPU memory {found['gpu_memory_gib']:.3g} GiB"] if "gpu_memory_gib" in found else []
    parts += [f"{found['mfu']:.1%} of the peak FLOP/s"] if "mfu" in found else []
    return f"throughput: {', '.join(parts)}"


# --- what to change ---


def advice(share: float, workers: int, available: int, data: Any = None) -> str:
    """What makes loading keep up.

    Args:
        share: of the time that is spent waiting for data, in (0, 1].
        workers: loader processes now; 0 loads in between the steps.
        available: cores for each training process.
        data: the data module, for the settings that it has.

    Example:
        >>> advice(0.5, 4, 16)
        'Set --data.num_workers 8 (4 now, 16 cores for a process), or make samples cheaper: smaller pictures'
        >>> advice(0.5, 4, 5)
        'Ask for 9 cores for a process (5 now) with --data.num_workers 8, or make samples cheaper: smaller pictures'
    """
    share = min(share, 0.99)
    # busy all the time, `workers` take as long as a whole step; enough of them take as long as the work of one
    needed = math.ceil(round(workers / (1 - share) if workers else share / (1 - share), 6))
    if needed < available:
        first = f"Set --data.num_workers {needed} ({workers} now, {available} cores for a process)"
    else:
        first = f"Ask for {needed + 1} cores for a process ({available} now) with --data.num_workers {needed}"
    cache = "--data.cache true, " if getattr(data, "cache", None) is False else ""
    return f"{first}, or make samples cheaper: {cache}smaller pictures"


def cores(trainer: pl.Trainer) -> int:
    """Cores for each training process of this host."""
    granted = os.environ.get("SLURM_CPUS_PER_TASK")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(granted) if granted else max(1, usable // trainer.num_devices)


# --- memory and FLOPs ---


def host_memory() -> float:
    """GiB of this process and its children in RAM, shared pages divided among those that share them; 0 if unknown."""
    total = 0
    for pid in ("self", *(child.pid for child in multiprocessing.active_children())):
        with contextlib.suppress(OSError):  # no Linux, or it has just ended
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 2**20


def gpu_memory(device: torch.device) -> float:
    """GiB of tensors at the worst moment so far; 0 without a GPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def peak_of(device: torch.device, precision: str) -> float | None:
    """TFLOP/s that the device can reach; None without a GPU, and for one that the table does not know."""
    gpu = gpu_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak(precision, torch.get_float32_matmul_precision() != "highest") if gpu else None


def is_compiled(module: nn.Module) -> bool:
    """Whether parts of it are compiled: under a dispatch mode they would run uncompiled, with other rounding."""
    return any(getattr(part, "_compiled_call_impl", None) is not None for part in module.modules())


class FlopCount(TorchDispatchMode):
    """Adds up FLOPs by torch's own formulas; what runs under it runs as always.

    `torch.utils.flop_counter.FlopCounterMode` counts the same, and also hangs hooks on all modules.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total, self.is_on = 0, False

    def __enter__(self) -> "FlopCount":
        self.total, self.is_on = 0, True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.is_on = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out: Tensor = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            with contextlib.suppress(Exception):  # a count that fails must not end a training
                self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
