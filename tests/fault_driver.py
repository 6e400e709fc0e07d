"""Runs small trainings in which something goes wrong: reads requests, prints what became of each, a line of JSON each.

One warm process imports everything and forks the processes of each run: the tree that Lightning's launcher makes, where
the first process is the parent of the second. What a dead process leaves behind is adopted here, and so is seen.
Usage: python -m tests.fault_driver FOLDER
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

import mmtrain.cli
import mmtrain.rankclip.module  # noqa: F401
from mmtrain.__main__ import main
from mmtrain.preemption import leaving_at_once
from mmtrain.watchdog import Watchdog, die_with_launcher
from tests.small_trainings import write_training

PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 90.0  # seconds for a run
SIGNALS = {number.name: number for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)}


class Inject(pl.Callback):
    """Does something bad in one process after some optimizer steps.

    Args:
        what: a signal's name and "in backward", "while saving" or "in validation"; "hang"; "inf in loss"; "full disk".
        rank: of the process.
        step: optimizer steps done before.
        until: "full disk": there is room again after this many steps.
        seconds: from then on the patience of every process's watchdog.
    """

    def __init__(self, what: str, rank: int = 0, step: int = 2, until: int = 10**6, seconds: float = 60.0) -> None:
        self.what, self.rank, self.step, self.until, self.seconds = what, rank, step, until, seconds

    def _is_due(self, trainer: pl.Trainer, what: str) -> bool:
        return self.what == what and trainer.global_step == self.step and trainer.global_rank == self.rank

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.what == "inf in loss":
            step = module.training_step
            module.training_step = lambda *batch: (
                step(*batch) + (float("inf") if self._is_due(trainer, self.what) else 0.0)
            )
        if self.what.endswith("while saving") and trainer.global_rank == self.rank:
            sync = os.fsync
            os.fsync = lambda file: (os.kill(os.getpid(), SIGNALS[self.what.split()[0]]), sync(file))

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, *_: Any) -> None:
        if self.what == "full disk" and trainer.global_rank == self.rank:
            is_full = self.step <= trainer.global_step < self.until
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if is_full else resource.RLIM_INFINITY, -1))

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == self.step:
            watchdog = next(callback for callback in trainer.callbacks if isinstance(callback, Watchdog))
            watchdog.seconds, watchdog._armed = self.seconds, 0.0
            watchdog._arm()
        for name, number in SIGNALS.items():
            if self._is_due(trainer, f"{name} in backward"):
                loss.register_hook(lambda gradient, told=number: os.kill(os.getpid(), told))
        if self._is_due(trainer, "hang"):
            self.hang()

    def hang(self) -> None:
        time.sleep(1000)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self._is_due(trainer, "SIGUSR1 in validation"):
            os.kill(os.getpid(), signal.SIGUSR1)


class Faults:
    """The runs, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.number = root, 0
        self.config = write_training(root / "training", "rankclip")

    def run(
        self,
        inject: dict[str, Any] | None = None,
        processes: int = 1,
        folder: str | None = None,
        resume: bool = False,
        words: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """A run of 6 steps without validation, saved after 3 and 6; further words for `fit` may change that.

        Returns its folder, the exit codes in rank order, what it printed, and whether no process was left.
        """
        self.number += 1
        name = self.root / f"run{self.number}"
        trainer: dict[str, Any] = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
        if inject:
            trainer["callbacks+"] = {"class_path": "tests.fault_driver.Inject", "init_args": inject}
        layer, log = name.with_suffix(".yaml"), name.with_suffix(".log")
        layer.write_text(f"# fault\n{yaml.safe_dump({'trainer': trainer})}")
        argv = ["fit", "-c", str(self.config), "-c", str(layer), "--trainer.default_root_dir", folder or str(name)]
        argv += ["--trainer.max_steps", "6", "--trainer.limit_val_batches", "0", *words]
        argv += ["--ckpt_path", "last"] if resume else []
        first = launch(argv, processes, log)
        codes = reap(PATIENCE)
        if codes is None:
            os.killpg(first, signal.SIGKILL)
            reap(PATIENCE)
        second = Path(f"{log}.second")
        pids = [first, *([int(second.read_text())] if second.exists() else [])]
        found = [(codes or {}).get(pid) for pid in pids]
        return {"folder": folder or str(name), "codes": found, "log": log.read_text(), "left": codes is None}


def launch(argv: list[str], processes: int, log: Path) -> int:
    """Start the one or two processes of a run; returns the first one's id, that of their group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if first := os.fork():
        return first
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if processes > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2"}
            os.environ["LOCAL_RANK"] = "0"
            die_with_launcher()  # notes that this is the launcher
            if second := os.fork():
                Path(f"{log}.second").write_text(str(second))
            else:
                os.environ["LOCAL_RANK"] = "1"
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def reap(seconds: float) -> dict[int, int] | None:
    """Exit codes of all descendants by process id, once none is left; None if some are after that time."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end:
            done, status = os.waitpid(-1, os.WNOHANG)
            if done:
                codes[done] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.01)
        return None
    return codes


def told_at_start() -> dict[str, Any]:
    """A signal before there is anything to save."""
    child = os.fork()
    if not child:
        with leaving_at_once():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(60)
        os._exit(0)
    return {"codes": [(reap(30) or {}).get(child)]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    faults = Faults(Path(sys.argv[1]))
    gc.freeze()  # else each child's first collection copies all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(told_at_start() if request == "at start" else faults.run(**request)), flush=True)
