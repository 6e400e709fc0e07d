"""Runs command lines of `fit` one after the other, each in n processes forked from one warm one, which spares imports.

Usage: python -m tests.parallel_driver RUNS.json, a list of {"words": [...], "processes": 2, "log": FILE}; prints for
each a line of JSON: exit codes, numbers of graphs that torch.compile made, seconds of CPU.
"""

import contextlib
import importlib
import json
import os
import re
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

import mmtrain.cli  # noqa: F401
from mmtrain.__main__ import main

LIMIT = 400.0  # seconds for a run
WARM = (
    "torch._dynamo",
    "mmtrain.parallel",
    "mmtrain.rankclip.module",
    "mmtrain.difffoley.module",
    "mmtrain.rdp.module",
)


class StopAt(pl.Callback):
    """In a config: sends this process SIGUSR1 in the midst of a step, so that the run saves and stops after it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def run(words: list[str], processes: int, log: str) -> dict[str, Any]:
    """One command line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = cpu_seconds()
    pids = [
        fork([*words, "--trainer.devices", str(processes)], processes, rank, port, log) for rank in range(processes)
    ]
    codes = finish(pids)
    graphs = [int(number) for number in re.findall(r"^graphs: (\d+)$", Path(log).read_text(), re.MULTILINE)]
    return {"codes": codes, "graphs": graphs, "cpu_seconds": round(cpu_seconds() - before, 1)}


def cpu_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fork(words: list[str], processes: int, rank: int, port: int, log: str) -> int:
    """Start the process of a rank; returns its id."""
    if child := os.fork():
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= address | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
    code = 1
    try:
        code = main(["fit", *words])
    except BaseException:
        traceback.print_exc()
    finally:
        print(f"\ngraphs: {torch._dynamo.utils.counters['stats'].get('unique_graphs', 0)}", flush=True)
        os._exit(code)


def finish(pids: list[int]) -> list[int]:
    """Exit codes; a failure, or the limit, ends the others."""
    codes: dict[int, int] = {}
    end = time.monotonic() + LIMIT
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(code not in (0, 138) for code in codes.values()):
            for pid in set(pids) - codes.keys():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(**one)), flush=True)
