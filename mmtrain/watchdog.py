"""No process of a run is left behind: one that hangs ends itself and shows where, others go with their launcher."""

import ctypes
import faulthandler
import os
import signal
import sys
import time
from typing import Any

import lightning.pytorch as pl
from torch import distributed as dist

from mmtrain import distributed

PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHER = "MMTRAIN_LAUNCHER"  # process id of the first process, as its children see it


class Watchdog(pl.Callback):
    """Ends the process with exit code 1, and the stack of every thread on stderr, when a run does not move on.

    The timer is a thread of the interpreter's own that needs no lock: it also fires while a collective waits for a
    process that does not come.

    Args:
        seconds: allowed from one batch to the next, evaluation and writing of checkpoints included. What follows the
            last batch of a `test` or `predict` is not timed: tables, figures and rollouts take what they take.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        self.seconds, self._armed = seconds, 0.0

    def _arm(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        if now - self._armed > min(1.0, self.seconds / 10):  # arming costs a thread
            self._armed = now
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    on_train_start = on_train_batch_start = on_train_batch_end = on_train_end = _arm  # the last checkpoint comes after
    on_validation_start = on_validation_batch_end = on_validation_end = _arm
    on_test_batch_start = on_test_batch_end = on_predict_batch_start = on_predict_batch_end = _arm

    def _disarm(self, *_: Any, **__: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._armed = 0.0

    on_fit_end = on_test_epoch_end = on_predict_epoch_end = on_exception = teardown = _disarm


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no orphan waits for the others. Linux only.

    Lightning's launcher is the first process of the run itself, whose children would survive it.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) == 0:
        os.environ[LAUNCHER] = str(os.getpid())
    elif sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it died before we asked
            os._exit(1)


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    in_a_run = distributed.world_size() > 1
    return in_a_run and (isinstance(error, dist.DistError) or "/gloo/" in str(error))  # gloo has no class of its own
