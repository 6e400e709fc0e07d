"""Tells another process what a training is doing at the moment, how often it did so before, and how long that takes."""

import time
from multiprocessing.sharedctypes import RawArray
from typing import Any

import lightning.pytorch as pl

PHASES = ("start", "forward", "backward", "step", "saving", "validation", "end")
OPTION = ("--trainer.callbacks+", "{class_path: tests.phases.Phases}")  # of `fit`


class Board:
    """Memory that a process shares with those it forks: the phase of a training, entries of each, seconds in each."""

    def __init__(self) -> None:
        self.counts, self.seconds = RawArray("l", len(PHASES)), RawArray("d", len(PHASES))
        self._now = RawArray("d", 2)  # number of the phase, and when it was entered
        self.enter("start")

    def enter(self, phase: str) -> None:
        """Leave the present phase for another."""
        before, since = int(self._now[0]), self._now[1] or time.monotonic()
        self.seconds[before] += time.monotonic() - since
        self._now[:] = PHASES.index(phase), time.monotonic()
        self.counts[PHASES.index(phase)] += 1

    @property
    def phase(self) -> str:
        """The present one."""
        return PHASES[int(self._now[0])]

    def mean_seconds(self, phase: str) -> float:
        """Average length of a phase that was left; 0 if there was none."""
        number = PHASES.index(phase)
        return self.seconds[number] / max(1, self.counts[number])


board: Board | None = None  # of this process


class Phases(pl.Callback):
    """Keeps the board of this process."""

    def _enter(self, phase: str) -> None:
        if board is not None and board.phase != "end":  # which has a last checkpoint and an evaluation of its own
            board.enter(phase)

    def on_train_batch_start(self, *_: Any) -> None:
        self._enter("forward")

    def on_before_backward(self, *_: Any) -> None:
        self._enter("backward")

    def on_after_backward(self, *_: Any) -> None:
        self._enter("step")

    def on_save_checkpoint(self, *_: Any) -> None:
        self._enter("saving")

    def on_validation_start(self, *_: Any) -> None:
        self._enter("validation")

    def on_validation_end(self, *_: Any) -> None:
        self._enter("step")

    def on_train_end(self, *_: Any) -> None:
        self._enter("end")
