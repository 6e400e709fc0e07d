"""Loaders whose order is a pure function of (seed, epoch, position), whatever the number of processes and workers."""

import hashlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmtrain.config_errors import UserError

LOSS_CHECK_FROM = 1000  # samples read before the share of lost ones is judged


class Draw(NamedTuple):
    """One place in the data order: which sample, and the numbers that seed its random transforms."""

    sample: int
    seed: int
    epoch: int
    position: int

    def generator(self) -> np.random.Generator:
        """Random numbers of this draw."""
        return np.random.default_rng((self.seed, self.epoch, self.position))


class BatchDataset(Protocol):
    """A data set that the loaders can read: it is given a whole batch of draws at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        """The collated batch; key "skipped" holds a dict of reason -> count."""


def epoch_order(
    num_samples: int, seed: int, epoch: int, shard_starts: np.ndarray | None = None, shuffle_shards: int | None = None
) -> np.ndarray:
    """Permutation of the samples [num_samples] for one epoch.

    With `shuffle_shards` = k the shards are permuted, and samples are mixed among k neighbouring shards only, so that
    a slow disk or a small page cache sees k files at a time; None mixes all samples.

    Args:
        shard_starts: [number of shards + 1], sample offsets of the shards; needed with `shuffle_shards`.
    """
    generator = np.random.default_rng((seed, epoch))
    if shuffle_shards is None or shard_starts is None:
        return generator.permutation(num_samples)
    shards = generator.permutation(len(shard_starts) - 1)
    groups = [shards[i : i + shuffle_shards] for i in range(0, len(shards), shuffle_shards)]
    return np.concatenate(
        [
            generator.permutation(np.concatenate([np.arange(shard_starts[s], shard_starts[s + 1]) for s in group]))
            for group in groups
        ]
    )


class TrainBatches(Sampler):
    """Lists of draws, one a batch of this process, from the present position to the end of the epoch.

    Lightning calls `set_epoch` on a loader's `sampler`.
    """

    def __init__(
        self,
        order: Callable[[int], np.ndarray],
        num_samples: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.order, self.num_samples, self.batch_size, self.seed = order, num_samples, batch_size, seed
        self.local, self.rank = batch_size // world_size, rank
        self.epoch = self.position = 0  # position counts batches of this epoch that were handed out

    def __len__(self) -> int:
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.order(self.epoch)
        for batch in range(self.position, len(self)):
            start = batch * self.batch_size + self.rank * self.local
            yield [
                Draw(sample, self.seed, self.epoch, start + i)
                for i, sample in enumerate(order[start : start + self.local].tolist())
            ]

    def set_epoch(self, epoch: int) -> None:
        """Start `epoch` from its beginning, unless it is already the present one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0


class TrainLoader:
    """Endless-epoch training loader: equal batches on every process, exact state inside an epoch.

    The global batch is a run of `batch_size` places of the epoch's order; process r of n takes its r-th part, so that
    the samples of a step do not depend on n. What is left at the end of an epoch is dropped (another part each time).
    `state_dict` counts batches handed out, so a loader that resumes reads nothing twice, with any number of workers.

    Attributes:
        counts: samples read, and lost ones by reason.
        waited: seconds in which whoever takes the batches had to wait for them.

    Args:
        batch_size: GLOBAL batch size; must be divisible by the number of processes.
        max_lost: share of samples that may be unreadable before training stops, in [0, 1].
        order: an epoch's order in place of `epoch_order`: samples, as many in each epoch; some may occur twice.

    Raises:
        UserError: batch size not divisible, more than the data, or too many samples lost.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        shard_starts: np.ndarray | None = None,
        shuffle_shards: int | None = None,
        max_lost: float = 0.01,
        order: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        places = len(dataset) if order is None else len(order(0))
        if batch_size % world_size:
            raise UserError(
                f"batch_size: the global batch of {batch_size} cannot be divided among {world_size} processes"
            )
        if batch_size > places:
            raise UserError(f"batch_size: the global batch of {batch_size} is larger than the {places} samples found")
        self.max_lost, self.counts, self.waited = max_lost, Counter[str](), 0.0
        if order is None:
            order = lambda epoch: epoch_order(places, seed, epoch, shard_starts, shuffle_shards)  # noqa: E731
        self.sampler = TrainBatches(order, places, batch_size, seed, rank, world_size)
        self._loader = _dataloader(dataset, self.sampler, num_workers, pin_memory)

    def __len__(self) -> int:
        return len(self.sampler)

    @property
    def batch_size(self) -> int:
        """Samples of a batch of all processes together."""
        return self.sampler.batch_size

    @property
    def num_workers(self) -> int:
        """Loader processes; 0: batches are made in this one, when they are asked for."""
        return self._loader.num_workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begun = time.perf_counter()
        for batch in _told_plainly(self._loader):
            self.waited += time.perf_counter() - begun
            self.sampler.position += 1
            self._count(batch.pop("skipped"))
            yield batch
            begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Place in the order: the same on all processes. The counters differ; `DataCounters` keeps them."""
        return {
            "epoch": self.sampler.epoch,
            "position": self.sampler.position,
            "samples": self.sampler.num_samples,
            "batch_size": self.sampler.batch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch that was handed out.

        Raises:
            UserError: the data now holds another number of samples, so the order would be another.
        """
        if state["samples"] != self.sampler.num_samples:
            raise UserError(
                f"the checkpoint was made with {state['samples']} training samples, "
                f"now there are {self.sampler.num_samples}: restore the data, or start a new run from the weights"
            )
        if state["batch_size"] != self.sampler.batch_size:
            raise UserError(
                f"batch_size: {self.sampler.batch_size} now, {state['batch_size']} in the checkpoint, "
                "so its place in the epoch cannot be found: set it back, or start a new run from the weights"
            )
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]

    def _count(self, skipped: dict[str, int]) -> None:
        self.counts["read"] += self.sampler.local
        self.counts.update(skipped)
        lost = sum(n for name, n in self.counts.items() if name != "read")
        if self.counts["read"] >= LOSS_CHECK_FROM and lost > self.max_lost * self.counts["read"]:
            reasons = ", ".join(f"{name} {n}" for name, n in self.counts.most_common() if name != "read")
            raise UserError(
                f"{lost} of {self.counts['read']} samples read could not be used ({reasons}), "
                f"more than max_lost = {self.max_lost:.2%}: mend the data, or raise max_lost"
            )


class EvaluationLoader:
    """Every sample once, in order. On n processes each takes every n-th; short ones repeat a sample at the end.

    Metrics drop the repetition by the sample's id, which the data set puts into each batch.

    Args:
        identity: text that tells this data set with its transforms from others.

    Attributes:
        skip: batches at the beginning that are not read; `{}` stands in their place. For what is known already.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        identity: str = "",
    ) -> None:
        per_process = -(-len(dataset) // world_size)
        own = [min(rank + i * world_size, len(dataset) - 1) for i in range(per_process)] if len(dataset) else []
        draws = [Draw(sample, 0, 0, sample) for sample in own]
        self._batches = [draws[i : i + batch_size] for i in range(0, len(draws), batch_size)]
        self._open = lambda batches: _dataloader(dataset, batches, num_workers, pin_memory)
        self._loader: DataLoader | None = None
        self.counts: Counter[str] = Counter()
        self.skip = 0
        self.identity = f"{identity} {len(dataset)} {batch_size} {rank} {world_size}"

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what the batches depend on."""
        return hashlib.sha256(self.identity.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.counts.clear()
        if self.skip:
            yield from ({} for _ in self._batches[: self.skip])
            loader = self._open(self._batches[self.skip :])
        else:
            loader = self._loader = self._loader or self._open(self._batches)  # its workers stay for the next time
        for batch in _told_plainly(loader):
            self.counts.update(batch.pop("skipped"))
            yield batch


def place(trainer: pl.Trainer | None) -> dict[str, Any]:
    """This process among all, and whether to pin memory, as arguments of a loader; without a trainer it is alone."""
    if trainer is None:
        return {"rank": 0, "world_size": 1}
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return {"rank": trainer.global_rank, "world_size": trainer.world_size, "pin_memory": on_gpu}


def _told_plainly(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """Its batches; a user's mistake that a loader process met without the traceback that torch puts around it."""
    try:
        yield from loader
    except UserError as error:
        where, _, told = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
        if not where.startswith("Caught "):
            raise
        raise UserError(told.strip()) from error


def _dataloader(dataset: Dataset, batches: Any, num_workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        dataset,
        sampler=batches,
        batch_size=None,  # the data set collates; a batch is one item
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=heed_the_trainer_only if num_workers else None,
        # DataLoader draws a base seed each epoch; from a generator of its own, so that the model's stays untouched.
        generator=torch.Generator(),
    )


def heed_the_trainer_only(_: int = 0) -> None:
    """Let a loader process leave when its trainer says so, and not before.

    Slurm sends the signals that announce the end of a job to all its processes, and a loader process that died of one
    would fail the training step in which the trainer is about to save.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return  # no Slurm there
    told, trainer = {signal.SIGTERM, signal.SIGUSR1}, os.getppid()

    def wait() -> None:
        while True:
            info = signal.sigwaitinfo(told)
            if info.si_signo == signal.SIGTERM and (info.si_pid == trainer or os.getppid() != trainer):
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, told)  # the thread inherits it, and only waiting lets them through
    threading.Thread(target=wait, daemon=True).start()
