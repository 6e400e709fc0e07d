"""`python -m mmtrain reproduce PAPER`: a paper's comparison at laptop scale, several seeds each, resumable.

Each run is an ordinary `fit` and `test` in a folder of its own. What is done is not done again, a run that was cut
short goes on from its last checkpoint, and in the end every claim of the paper gets a verdict over the seeds.
"""

import argparse
import importlib
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmtrain.config_errors import UserError
from mmtrain.reporting.results import Estimate, Run, estimate, read_run
from mmtrain.reporting.tables import FRACTIONS

PAPERS = ("rankclip",)
STAGES = ("fit", "test")
Verdict = Literal["holds", "does not hold", "undecided at this scale"]


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, as something to be measured: the own method is better than each rival in a metric."""

    text: str
    source: str
    metric: str
    rivals: tuple[str, ...]
    direction: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True)
class Plan:
    """What a paper's reproduction runs.

    Args:
        own_method: as the paper spells it, like the keys of `methods`.
        methods: method -> config.
        words: options of every run, after the config.
        epochs, seeds: of the whole and of the quick reproduction.
        claims: what is judged.
        shown: metrics that are reported without a claim.
    """

    paper: str
    own_method: str
    methods: dict[str, str]
    words: tuple[str, ...]
    epochs: tuple[int, int]
    seeds: tuple[int, int]
    claims: tuple[Claim, ...]
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One method with one seed."""

    method: str
    config: str
    seed: int
    folder: Path
    words: tuple[str, ...]

    def command(self, stage: str) -> list[str]:
        """The words after `python -m mmtrain` of one of `STAGES`; both stages have the same settings."""
        own = ["--seed_everything", str(self.seed), "--data.seed", str(self.seed), "--vars.name", self.folder.name]
        place = ["--trainer.default_root_dir", str(self.folder), "--trainer.enable_progress_bar", "false"]
        return [stage, "-c", self.config, *self.words, *own, *place, "--ckpt_path", "last"]


def jobs(plan: Plan, out: Path, quick: bool) -> list[Job]:
    """All runs, seed by seed, so that after each seed the methods can be compared."""
    epochs, seeds = plan.epochs[quick], plan.seeds[quick]
    every = str(max(1, epochs // 3))  # three evaluations on the way
    words = (*plan.words, "--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", every)
    return [
        Job(method, config, seed, out / f"{method.lower()}-seed{seed}", words)
        for seed in range(seeds)
        for method, config in plan.methods.items()
    ]


class Children:
    """The processes that are running, to be ended together."""

    def __init__(self, threads: int) -> None:
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.lock, self.running, self.stopped = threading.Lock(), set[subprocess.Popen](), False

    def run(self, words: Sequence[str], log: Path) -> tuple[int, float]:
        """Run `python -m mmtrain WORDS`, its output added to `log`; returns exit code and CPU seconds."""
        with open(log, "ab") as output:
            with self.lock:
                if self.stopped:
                    raise KeyboardInterrupt
                child = subprocess.Popen(
                    [sys.executable, "-m", "mmtrain", *words],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment,
                )  # fmt: skip
                self.running.add(child)
            _, status, usage = os.wait4(child.pid, 0)  # not `wait`, which does not tell the CPU time
            child.returncode = os.waitstatus_to_exitcode(status)
            with self.lock:
                self.running.discard(child)
        return child.returncode, usage.ru_utime + usage.ru_stime

    def stop(self) -> None:
        """End all; training finishes its batch and saves."""
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()


def run_stage(job: Job, stage: str, children: Children) -> None:
    """Run one stage of a job unless it is done, its output to `<folder>/<stage>.log`.

    CPU seconds are added up in `<folder>/stages.json`, also of a process that was ended early.

    Raises:
        UserError: it ended with an error; the message has the end of its output.
    """
    record = read_stages(job.folder)
    entry = record.setdefault(stage, {"done": False, "cpu_seconds": 0.0, "seconds": 0.0})
    if entry["done"]:
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    log, began = job.folder / f"{stage}.log", time.monotonic()
    code, cpu_seconds = children.run(job.command(stage), log)
    entry["cpu_seconds"] += cpu_seconds
    entry["seconds"] += time.monotonic() - began
    entry["done"] = code == 0
    part = job.folder / "stages.json.part"
    part.write_text(json.dumps(record, indent=1))
    part.replace(job.folder / "stages.json")
    if code and not children.stopped:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
        raise UserError(f"{stage} of {job.folder} failed with exit code {code}:\n{tail}")
    if code:
        raise KeyboardInterrupt


def run_all(todo: Sequence[Job], at_a_time: int) -> None:
    """Run all stages of all jobs, several jobs side by side, with a progress bar over the stages.

    Raises:
        UserError: a job failed; the others are ended, and go on the next time.
    """
    children = Children(threads=max(1, num_cores() // at_a_time))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("left"), TimeRemainingColumn())
    with (
        ThreadPoolExecutor(at_a_time) as pool,
        Progress(*columns, *left, console=Console(stderr=True), speed_estimate_period=7200) as progress,
    ):
        task = progress.add_task("", total=len(todo) * len(STAGES))

        def run(job: Job) -> None:
            for stage in STAGES:
                progress.update(task, description=f"{job.method}, seed {job.seed}: {stage}")
                run_stage(job, stage, children)
                progress.advance(task)

        futures = [pool.submit(run, job) for job in todo]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            children.stop()
            pool.shutdown(cancel_futures=True)
            raise


def num_cores() -> int:
    """Cores that this process may use; macOS cannot tell those from all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_stages(folder: Path) -> dict[str, dict[str, Any]]:
    """What is done in a job's folder, by stage; empty for a new one."""
    path = folder / "stages.json"
    return json.loads(path.read_text()) if path.exists() else {}


def verdict(difference: Estimate, direction: Literal["higher", "lower"]) -> Verdict:
    """What an interval of paired differences, own method minus rival, says of "own is better"."""
    if difference.low is None or difference.high is None:
        return "undecided at this scale"
    low, high = difference.low, difference.high
    if direction == "lower":
        low, high = -high, -low
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided at this scale"


def judge(plan: Plan, runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """One entry for each claim and rival, from the runs of each method in the order of seeds.

    Differences are paired by seed, which gives both methods the same order of data; their 95 % Student-t interval
    decides. Nothing is corrected for the number of claims.
    """
    found = []
    for claim in plan.claims:
        own = [run.metrics[claim.metric] for run in runs[plan.own_method]]
        for rival in claim.rivals:
            theirs = [run.metrics[claim.metric] for run in runs[rival]]
            difference = estimate([a - b for a, b in zip(own, theirs, strict=True)])
            found.append(
                {
                    "claim": claim.text,
                    "source": claim.source,
                    "metric": claim.metric,
                    "direction": claim.direction,
                    "rival": rival,
                    "ours": estimate(own).mean,
                    "theirs": estimate(theirs).mean,
                    "difference": asdict(difference),
                    "verdict": verdict(difference, claim.direction),
                }
            )
    return found


def reproduce(plan: Plan, out: Path, quick: bool, at_a_time: int, command: str) -> dict[str, Any]:
    """Run what is not done yet, judge, and write `reproduce.json` and `reproduce.md` into `out`."""
    todo = jobs(plan, out, quick)
    run_all(todo, at_a_time)
    runs: dict[str, list[Run]] = {method: [] for method in plan.methods}
    for job in todo:
        runs[job.method].append(read_run(job.folder))
    stages = [read_stages(job.folder)[stage] for job in todo for stage in STAGES]
    result = {
        "title": f"{plan.own_method} at laptop scale",
        "paper": plan.paper,
        "command": command,
        "quick": quick,
        "cpu_seconds": sum(stage["cpu_seconds"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "claims": judge(plan, runs),
        "metrics": {
            metric: {method: asdict(estimate([run.metrics[metric] for run in own])) for method, own in runs.items()}
            for metric in dict.fromkeys([*(claim.metric for claim in plan.claims), *plan.shown])
        },
    }
    (out / "reproduce.json").write_text(json.dumps(result, indent=1))
    (out / "reproduce.md").write_text(as_markdown(result))
    return result


def as_markdown(result: dict[str, Any]) -> str:
    """Two tables: mean with interval by method, and the verdicts. Fractions are shown in percent."""
    methods = list(next(iter(result["metrics"].values())))
    runs = len(next(iter(next(iter(result["metrics"].values())).values()))["values"])
    lines = [
        f"## {result['title']}{' (quick: a trial of the machinery, no evidence)' if result['quick'] else ''}",
        f"`{result['command']}`, {runs} seeds, {result['cpu_seconds'] / 3600:.2f} CPU-hours. "
        "Laptop scale, never to be read as the paper's numbers. Mean ± half of the 95 % Student-t interval.",
        table_line(["metric", *methods]),
        table_line(["---"] * (1 + len(methods))),
    ]
    for metric, row in result["metrics"].items():
        lines.append(table_line([metric.removeprefix("test/"), *(spread(metric, row[method]) for method in methods)]))
    lines += ["", table_line(["claim", "metric", "against", "difference", "verdict"]), table_line(["---"] * 5)]
    for claim in result["claims"]:
        lines.append(
            table_line(
                [
                    f"{claim['claim']} ({claim['source']})",
                    claim["metric"].removeprefix("test/"),
                    claim["rival"],
                    spread(claim["metric"], claim["difference"], sign="+"),
                    claim["verdict"],
                ]
            )
        )
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n"


def table_line(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(metric: str, found: dict[str, Any], sign: str = "") -> str:
    """`12.34 ± 0.56`, in percent if the metric is a fraction."""
    factor, digits = (100, 2) if FRACTIONS.fullmatch(metric.rpartition("/")[2]) else (1, 3)
    text = f"{factor * found['mean']:{sign}.{digits}f}"
    if found["high"] is None:
        return text
    return f"{text} ± {factor * (found['high'] - found['mean']):.{digits}f}"


def main(argv: list[str]) -> int:
    """Run a reproduction; the same command line goes on with one that was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m mmtrain reproduce", description=__doc__)
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--quick", action="store_true", help="few epochs and seeds: tries the machinery, in minutes")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/reproduce_PAPER, or ..._quick")
    parser.add_argument(
        "--jobs", type=int, default=min(4, num_cores()),
        help="runs side by side, which share the cores; default: the number of cores, at most 4",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs: {arguments.jobs} is not 1 or more")
    plan: Plan = importlib.import_module(f"mmtrain.{arguments.paper}.reproduce").PLAN
    out = arguments.out or Path("runs") / f"reproduce_{arguments.paper}{'_quick' if arguments.quick else ''}"
    command = shlex.join(["python", "-m", "mmtrain", "reproduce", *argv])
    reproduce(plan, out, arguments.quick, arguments.jobs, command)
    wide = Console(width=max(Console().width, 120))  # at 80 characters the names would be cut
    wide.print(Markdown((out / "reproduce.md").read_text()))
    print(f"all of it is in {out}; a page of it: python -m mmtrain report {out}")
    return 0
