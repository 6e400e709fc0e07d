"""Runs small trainings undisturbed, then again and again with signals at random moments and a resume.

One warm process imports everything and forks the processes of each run, which makes a start cost a moment. It does what
a launcher does: once a process has failed it ends the others. Signals go to whole process groups, loader workers with
them, as Slurm sends them. Prints a line of JSON for each training and number of processes.

Usage: python -m tests.resume_driver FOLDER --trainings rankclip ldm --processes 1 2 --kills 4 --seed 0 [words for fit]
"""

import argparse
import contextlib
import csv
import importlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import mmtrain.cli  # noqa: F401
from mmtrain.__main__ import main
from tests import phases
from tests.small_trainings import NAMES, write_training

SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
OUTCOMES = {"KILL": {-9}, "TERM": {143, -15}, "USR1": {138, -10}}  # negative: before the program could set a handler
GRACE = 5.0  # seconds that a launcher leaves those whose peer is gone, before it kills them
LIMIT = 90.0  # seconds for a run that nobody disturbs


class Run:
    """The processes of one start of `fit`."""

    def __init__(self, config: Path, folder: Path, words: Sequence[str], processes: int, resume: bool) -> None:
        self.folder, self.codes, self.killed = folder, {}, False
        self.log = folder.with_name(f"{folder.name}.{len(list(folder.parent.glob(f'{folder.name}.*.log')))}.log")
        argv = ["fit", "-c", str(config), "--trainer.default_root_dir", str(folder), *phases.OPTION, *words]
        argv += ["--trainer.devices", str(processes), "--trainer.strategy", "ddp" if processes > 1 else "auto"]
        argv += ["--ckpt_path", "last"] if resume else []
        self.boards = [phases.Board() for _ in range(processes)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = [self._fork(argv, rank, processes, port) for rank in range(processes)]

    def _fork(self, argv: list[str], rank: int, processes: int, port: int) -> int:
        if child := os.fork():
            with contextlib.suppress(OSError):
                os.setpgid(child, child)  # here too: a signal may come before the child has done it
            return child
        code = 1
        try:
            os.setpgid(0, 0)
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            phases.board = self.boards[rank]
            if processes > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= address | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
            code = main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def is_over(self) -> bool:
        """Whether all processes have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all have ended, or so long, or until something holds; returns whether all have ended."""
        end = time.monotonic() + seconds
        while not self.is_over() and time.monotonic() < end and not until():
            time.sleep(0.001)
        return self.is_over()

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """A signal to the groups of these processes, where they still run."""
        for rank in ranks:
            if rank not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pids[rank], number)

    def finish(self) -> list[int]:
        """Wait for the end as a launcher does: the first failure ends the others; returns all exit codes."""
        if not self.wait(LIMIT, until=lambda: any(self.codes.values())):
            self.send(signal.SIGTERM, range(len(self.pids)))
        if not self.wait(GRACE):
            self.killed = True
            self.send(signal.SIGKILL, range(len(self.pids)))
            self.wait(GRACE)
        return [self.codes[rank] for rank in range(len(self.pids))]


def final_state(folder: Path) -> dict[str, Any]:
    """All that must be equal at the end: the checkpoint but for its file names and clocks, and the last evaluation."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    place = checkpoint.pop("loops")["fit_loop"]["state_dict"]["combined_loader"][0]
    checkpoint.pop("callbacks")
    return checkpoint | {"place": (place["epoch"], place["position"]), "evaluation": last_evaluation(folder)}


def last_evaluation(folder: Path) -> dict[str, str]:
    """The last value of each validation metric that any of the run's starts has logged, as written."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if name.startswith("val/") and value and int(row["step"]) >= found.get(name, (0, ""))[0]:
                    found[name] = int(row["step"]), value
    return {name: value for name, (_, value) in found.items()}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places of two structures that are not equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i in range(len(a)) for found in differences(a[i], b[i], f"{where}.{i}")]
    return [] if a == b else [where]


class Experiment:
    """One training on so many processes: an undisturbed run, then ones with signals.

    Args:
        root: where all of it goes.
        signals: of `SIGNALS`, to draw from.
        words: more options for `fit`.
    """

    def __init__(
        self, root: Path, training: str, processes: int, signals: Sequence[str], seed: int, words: Sequence[str]
    ) -> None:
        self.root, self.training, self.processes = root / f"{training}-{processes}", training, processes
        self.signals, self.words, self.random = signals, words, random.Random(f"{seed} {training} {processes}")
        self.config = write_training(self.root, training)
        sections = yaml.safe_load(self.config.read_text())
        for section in ("model", "data"):
            importlib.import_module(sections[section]["class_path"].rpartition(".")[0])
        run = self.start(self.root / "calm", resume=False)
        codes = run.finish()
        assert not any(codes), (training, processes, codes, run.log.read_text()[-3000:])
        run.boards[0].enter("start")  # so that the end has an end too
        self.calm = final_state(run.folder)
        self.counts = dict(zip(phases.PHASES, run.boards[0].counts, strict=True))
        self.lengths = {phase: run.boards[0].mean_seconds(phase) for phase in phases.PHASES}

    def start(self, folder: Path, resume: bool) -> Run:
        return Run(self.config, folder, self.words, self.processes, resume)

    def report(self, kills: int) -> dict[str, Any]:
        """Runs of two signals each, then left in peace, until so many signals came while a run was going on."""
        runs: list[dict[str, Any]] = []
        while (left := kills - sum(len(run["kills"]) for run in runs)) > 0 and len(runs) < 2 * kills:
            runs.append(self.killed_run(self.root / f"killed{len(runs)}", min(2, left)))
        about = {"training": self.training, "processes": self.processes, "steps": self.calm["global_step"]}
        return about | {"runs": runs}

    def killed_run(self, folder: Path, attempts: int) -> dict[str, Any]:
        """A run that is hit at random moments, and then goes on to its end; says what was seen."""
        kills = []
        for attempt in range(attempts):
            kill = self.hit(self.start(folder, resume=attempt > 0), saved_step(folder))
            if kill:
                kill["saved_step"] = saved_step(folder)
                kill["explained"] = is_explained(**kill, is_done=kill["saved_step"] == self.calm["global_step"])
                kills.append(kill)
        step = saved_step(folder)
        run = self.start(folder, resume=True)
        codes = run.finish()
        unequal = differences(final_state(folder), self.calm)[:5] if saved_step(folder) else ["no checkpoint"]
        # Lightning says so; a run that began anew would end in the same weights, and prove nothing
        restored = "Restored all states from the checkpoint" in run.log.read_text()
        explained = all(kill["explained"] for kill in kills)
        ok = not any(codes) and not unequal and restored == (step > 0) and explained
        row = {"kills": kills, "resumed": codes, "from_step": step, "restored": restored, "unequal": unequal, "ok": ok}
        if not ok:
            row["log"] = {
                path.name: path.read_text()[-2500:] for path in sorted(self.root.glob(f"{folder.name}.*.log"))
            }
        return row

    def hit(self, run: Run, step: int) -> dict[str, Any] | None:
        """Draw signal, processes and moment, wait for it and send; None if the run was over before."""
        name, phase = self.random.choice(self.signals), self.random.choice(phases.PHASES)
        victims = self.random.choice([[rank] for rank in range(self.processes)] + [list(range(self.processes))])
        share = self.random.random() * (1 - step / self.calm["global_step"])  # a resumed run has less before it
        entry = 1 if phase in ("start", "end") else 1 + int(share * self.counts[phase])
        moment = self.random.random() * self.lengths[phase]
        board = run.boards[victims[0]]
        if run.wait(LIMIT, until=lambda: board.counts[phases.PHASES.index(phase)] >= entry) or run.wait(moment):
            run.finish()
            return None
        hit_in = board.phase
        run.send(SIGNALS[name], victims)
        codes = run.finish()
        if name == "KILL" and not any(codes):
            return None  # it ended by itself in that moment
        return {"name": name, "ranks": victims, "phase": hit_in, "codes": codes, "reaped": run.killed}


def saved_step(folder: Path) -> int:
    """Step of the last checkpoint, 0 without one."""
    path = folder / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)["global_step"] if path.exists() else 0


def is_explained(name: str, ranks: list[int], phase: str, codes: list[int], is_done: bool, **_: Any) -> bool:
    """Whether the exit codes are those that the README promises of a signal."""
    if not any(codes):
        return is_done  # it came after the last step
    if name == "KILL":
        return all(codes[rank] == -9 for rank in ranks)
    if phase in ("start", "end"):  # each process leaves by itself, and the launcher ends the others
        return any(codes[rank] in OUTCOMES[name] for rank in ranks)
    return codes[0] in OUTCOMES[name] and not any(codes[1:])  # together, and the first speaks for the run


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the words for `fit` that are left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainings", nargs="+", choices=NAMES, default=["rankclip"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--kills", nargs="+", type=int, default=[4], help="of each training, or of all alike")
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=list(SIGNALS))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_known_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options, words = parse()
    cases = [(training, n) for training in options.trainings for n in options.processes]
    kills = options.kills * len(cases) if len(options.kills) == 1 else options.kills
    for (training, n), number in zip(cases, kills, strict=True):
        with contextlib.redirect_stdout(sys.stderr):  # what writing of data has to say
            experiment = Experiment(options.folder, training, n, options.signals, options.seed, words)
        print(json.dumps(experiment.report(number)), flush=True)
