"""What a run does when it is told to stop: save, and end with a code that tells the launcher why.

SIGUSR1 asks for the run to be saved and started again (Slurm sends it before the time limit): exit code 138, on which
`slurm/train.sbatch` requeues the job. SIGTERM ends it for good: exit code 143.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from mmtrain import distributed
from mmtrain.checkpoint import LastCheckpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # told both, the later one counts: the job is to go on
EXIT_CODES = {number: 128 + number for number in SIGNALS}


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """While a run starts, and where nothing saves it, a signal ends the process at once: there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, _leave_at_once) for number in SIGNALS}
    try:
        yield
    except SystemExit:  # a launcher may signal the rest of a run that is leaving, which must not change its exit code
        before = {}
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_at_once(number: int, _: Any) -> None:
    os.write(sys.stderr.fileno(), f"{signal.Signals(number).name}: nothing new to save\n".encode())
    os._exit(EXIT_CODES[number])  # no teardown: it may wait for processes that do not come


class Preemption(pl.Callback):
    """On SIGUSR1 or SIGTERM of any process: finish the optimizer step, write `last.ckpt`, exit with 138 or 143.

    The handler only sets a flag, for the signal can come inside a backward pass, a collective or the writing of a
    checkpoint; one that comes during validation, where processes may have different numbers of batches, is acted on
    after the next training batch. The first process's exit code speaks for the run.
    """

    def __init__(self) -> None:
        self._received = 0  # index into SIGNALS, from 1
        self._step_before = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After a signal in the midst of the last writing all is saved; what follows is left to a resume."""
        received = distributed.largest(self._received, trainer.strategy.root_device)
        self._restore()
        if received:
            self._exit(trainer, SIGNALS[received - 1], "")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, _: Any) -> None:
        self._received = max(self._received, 1 + SIGNALS.index(number))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step_before:
            return  # gradients are being accumulated, and a checkpoint does not hold them
        if received := distributed.largest(self._received, pl_module.device):
            self._leave(trainer, SIGNALS[received - 1])

    def _leave(self, trainer: pl.Trainer, number: signal.Signals) -> None:
        last = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        self._exit(trainer, number, last.save(trainer) if last else "no LastCheckpoint among the callbacks")

    def _exit(self, trainer: pl.Trainer, number: signal.Signals, error: str) -> None:
        if trainer.is_global_zero:
            last = next((c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), "")
            saved = f"nothing saved: {error}" if error else f"saved {last}, go on with --ckpt_path last"
            verb = "told to make room" if number == signal.SIGUSR1 else "terminated"
            print(f"{verb} at step {trainer.global_step}; {saved}", file=sys.stderr, flush=True)
        # The first process speaks for the run. A launcher that sees one leave signals the others in mid-teardown.
        for told in SIGNALS:
            signal.signal(told, signal.SIG_IGN)
        self._previous = {}
        raise SystemExit(EXIT_CODES[number] if trainer.is_global_zero else 0)
