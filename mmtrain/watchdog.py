"""A process that hangs ends itself and shows where; one whose launcher died goes with it."""

import ctypes
import faulthandler
import os
import signal
import sys
import time
from typing import Any

import lightning.pytorch as pl

PR_SET_PDEATHSIG = 1  # of Linux's prctl


class Watchdog(pl.Callback):
    """Ends the process with exit code 1, and the stack of every thread on stderr, when nothing happens in `fit`.

    The timer is a thread of the interpreter's own that needs no lock: it also fires while a collective waits for a
    process that does not come.

    Args:
        seconds: allowed from one batch of training or validation to the next, writing of checkpoints included.
    """

    def __init__(self, seconds: float = 1800.0) -> None:
        self.seconds, self._armed = seconds, 0.0

    def _arm(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        if now - self._armed > min(1.0, self.seconds / 10):  # arming costs a thread
            self._armed = now
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)

    on_train_start = on_train_batch_start = on_train_batch_end = _arm
    on_validation_start = on_validation_batch_end = on_validation_end = _arm

    def _disarm(self, *_: Any, **__: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._armed = 0.0

    on_train_end = on_exception = teardown = _disarm


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when its parent dies, so that no orphan waits for the others. Linux only.

    Only for processes that Lightning's launcher started: their parent is the first process of the run.
    """
    if int(os.environ.get("LOCAL_RANK") or 0) == 0 or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before we asked
        os._exit(1)
