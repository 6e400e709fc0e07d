"""`python -m mmtrain reproduce PAPER`: a paper's comparison at laptop scale, several seeds each, resumable.

Each run is an ordinary `fit` and `test` in a folder of its own, after further trainings if the method has such. What is
done is not done again, a run that was cut short goes on from its last checkpoint, and in the end every claim of the
paper gets a verdict over the seeds.
"""

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmtrain.config_errors import UserError, nearest
from mmtrain.metrics.intervals import Interval, apart, bootstrap, score_interval
from mmtrain.plans import Claim, Job, Plan, jobs, preparations, shared_trainings
from mmtrain.reporting.results import Estimate, Run, estimate, read_run
from mmtrain.reporting.tables import FRACTIONS

PAPERS = ("rankclip", "rdp", "difffoley", "storyweaver")
Verdict = Literal["holds", "does not hold", "undecided at this scale"]


class Children:
    """The processes that are running, to be ended together."""

    def __init__(self, threads: int) -> None:
        # A user's own settings win. Threads that wait by spinning are many times slower where other work shares cores.
        self.environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"} | os.environ
        self.lock, self.running, self.stopped = threading.Lock(), set[subprocess.Popen](), False
        self.told: set[subprocess.Popen] = set()  # to stop

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
                if child in self.told and not child.returncode:  # Lightning's `test` ends with 0 then, incomplete
                    child.returncode = 128 + signal.SIGTERM
        return child.returncode, usage.ru_utime + usage.ru_stime

    def stop(self) -> None:
        """End all; training finishes its batch and saves."""
        with self.lock:
            self.stopped, self.told = True, self.told | self.running
            for child in self.running:
                child.terminate()


def run_stage(job: Job, stage: str, children: Children) -> None:
    """Run one of a job's `stages` unless it is done, its output to `<folder>/<stage>.log`.

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
        task = progress.add_task("", total=sum(len(job.stages) for job in todo))

        def run(job: Job) -> None:
            for stage in job.stages:
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
        method = claim.own or plan.own_method
        own = [run.metrics[claim.metric] for run in runs[method]]
        for rival in claim.rivals:
            theirs = [run.metrics[claim.metric] for run in runs[rival]]
            difference = estimate([a - b for a, b in zip(own, theirs, strict=True)])
            pooled = by_episodes(plan, claim, runs[method], runs[rival])
            found.append(
                pooled
                | {
                    "claim": claim.text,
                    "own": method,
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


def by_episodes(plan: Plan, claim: Claim, own: Sequence[Run], theirs: Sequence[Run]) -> dict[str, Any]:
    """What the episodes of all seeds together say of a claim: it holds if their 95 % intervals do not overlap.

    `{"episodes": {...}}`, or nothing where the plan or the metric has no values of single episodes.

    Twice: `pooled` takes every episode as independent, `by_seed` draws seeds first and episodes inside them, which is
    also about other seeds than these, but coarse with three of them. Both are bootstrap intervals of the mean.
    """
    sides = {}
    for side, runs in (("ours", own), ("theirs", theirs)):
        parts = [plan.episodes(run.folder, claim.metric) if plan.episodes else None for run in runs]
        if None in parts:
            return {}
        values = [value for part in parts for value in part]
        seeds = [place for place, part in enumerate(parts) for _ in part]
        is_share = min(values) >= 0 and max(values) <= 1
        interval = score_interval if is_share else bootstrap  # similarities may lie below zero
        sides[side] = interval(values), interval(values, clusters=seeds), len(values)
    found = {"n": [sides["ours"][2], sides["theirs"][2]]}
    for place, name in enumerate(("pooled", "by_seed")):
        ours, rival = (sides[side][place] for side in ("ours", "theirs"))
        sign = apart(ours, rival) * (-1 if claim.direction == "lower" else 1)
        text: Verdict = {1: "holds", -1: "does not hold", 0: "undecided at this scale"}[sign]
        found[name] = {"ours": ours._asdict(), "theirs": rival._asdict(), "verdict": text}
    return {"episodes": found}


def reproduce(plan: Plan, out: Path, quick: bool, at_a_time: int, command: str) -> dict[str, Any]:
    """Run what is not done yet, judge, and write `reproduce.json` and `reproduce.md` into `out`."""
    todo = jobs(plan, out, quick)
    groups = [preparations(plan, out, quick), *shared_trainings(plan, out, quick), todo]
    for group in groups:
        run_all(group, at_a_time)
    runs: dict[str, list[Run]] = {method: [] for method in plan.methods}
    for job in todo:
        runs[job.method].append(read_run(job.folder))
    stages = [read_stages(job.folder)[stage] for group in groups for job in group for stage in job.stages]
    result = {
        "title": plan.title or f"{plan.own_method} at laptop scale",
        "note": plan.note,
        "paper": plan.paper,
        "command": command,
        "quick": quick,
        "cpu_seconds": sum(stage["cpu_seconds"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "claims": judge(plan, runs),
        "metrics": {
            metric: {
                method: asdict(estimate([run.metrics[metric] for run in own]))
                for method, own in runs.items()
                if all(metric in run.metrics for run in own)  # real sound takes no time to generate
            }
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
        f"{result['note']} Mean ± half of the 95 % Student-t interval over seeds.",
        table_line(["metric", *methods]),
        table_line(["---"] * (1 + len(methods))),
    ]
    for metric, row in result["metrics"].items():
        lines.append(
            table_line([metric.removeprefix("test/"), *(spread(metric, row.get(method)) for method in methods)])
        )
    if not result["claims"]:
        return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n"
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
    lines += episode_lines([claim for claim in result["claims"] if "episodes" in claim])
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:]) + "\n"


def episode_lines(claims: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the verdicts over episodes; empty without such claims."""
    if not claims:
        return []
    lines = ["", "By the episodes of all seeds: a claim holds if the 95 % bootstrap intervals do not overlap.", ""]
    head = ["claim", "metric", "against", "ours", "theirs", "episodes", "verdict", "verdict, seeds drawn first"]
    lines += [table_line(head), table_line(["---"] * len(head))]
    for claim in claims:
        found = claim["episodes"]
        sides = [bounds(claim["metric"], Interval(**found["pooled"][side])) for side in ("ours", "theirs")]
        numbers = " and ".join(map(str, dict.fromkeys(found["n"])))
        names = [claim["claim"], claim["metric"].removeprefix("test/"), claim["rival"]]
        lines.append(table_line([*names, *sides, numbers, found["pooled"]["verdict"], found["by_seed"]["verdict"]]))
    return lines


def bounds(metric: str, interval: Interval) -> str:
    """`0.95 [0.89, 0.98]`, in percent if the metric is a fraction."""
    factor, digits = (100, 1) if FRACTIONS.fullmatch(metric.rpartition("/")[2]) else (1, 2)
    mean, low, high = (f"{factor * value:.{digits}f}" for value in interval)
    return f"{mean} [{low}, {high}]"


def table_line(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def spread(metric: str, found: dict[str, Any] | None, sign: str = "") -> str:
    """`12.34 ± 0.56`, in percent if the metric is a fraction; a dash for what was not measured."""
    if found is None:
        return "–"
    factor, digits = (100, 2) if FRACTIONS.fullmatch(metric.rpartition("/")[2]) else (1, 3)
    text = f"{factor * found['mean']:{sign}.{digits}f}"
    if found["high"] is None:
        return text
    return f"{text} ± {factor * (found['high'] - found['mean']):.{digits}f}"


def main(argv: list[str]) -> int:
    """Run a reproduction; the same command line goes on with one that was interrupted.

    Raises:
        UserError: a run failed, or there is no such task or method.
    """
    parser = argparse.ArgumentParser(prog="python -m mmtrain reproduce", description=__doc__)
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--quick", action="store_true", help="few epochs and seeds: tries the machinery, in minutes")
    parser.add_argument("--out", type=Path, help="folder of the runs; default: runs/reproduce_PAPER, or ..._quick")
    parser.add_argument(
        "--jobs", type=int, default=min(4, num_cores()),
        help="runs side by side, which share the cores; default: the number of cores, at most 4",
    )  # fmt: skip
    parser.add_argument("--task", nargs="+", help="tasks of a paper that has several; default: all")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods, as the paper's tables name them")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs: {arguments.jobs} is not 1 or more")
    plans = chosen_plans(arguments.paper, arguments.task)
    out = arguments.out or Path("runs") / f"reproduce_{arguments.paper}{'_quick' if arguments.quick else ''}"
    command = shlex.join(["python", "-m", "mmtrain", "reproduce", *argv])
    if arguments.only:
        plans = only(plans, arguments.only)
    wide = Console(width=max(Console().width, 120))  # at 80 characters the names would be cut
    # an exception, so that the runs are ended too, and save
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for task, plan in plans.items():
            folder = out / task if task else out
            reproduce(plan, folder, arguments.quick, arguments.jobs, command)
            wide.print(Markdown((folder / "reproduce.md").read_text()))
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"all of it is in {out}; a page of it: python -m mmtrain report {out}")
    return 0


def only(plans: dict[str, Plan], names: Sequence[str]) -> dict[str, Plan]:
    """The plans with some of their methods; a task that has none of them is left out.

    Raises:
        UserError: no plan has such a method.
    """
    known = {name: None for plan in plans.values() for name in plan.methods}
    for name in names:
        if name not in known:
            guess = nearest(name, known)
            hint = f", did you mean {guess!r}?" if guess else "."
            raise UserError(f"--only: no method {name!r}{hint} There are: {', '.join(known)}")
    return {task: plan.only(names) for task, plan in plans.items() if set(names) & set(plan.methods)}


def chosen_plans(paper: str, tasks: Sequence[str] | None) -> dict[str, Plan]:
    """The plans of a paper by task; the one plan of a paper without tasks has the name "".

    Raises:
        UserError: there is no such task.
    """
    module = importlib.import_module(f"mmtrain.{paper}.reproduce")
    if not hasattr(module, "PLANS"):
        if tasks:
            raise UserError(f"--task: {paper} has no tasks")
        return {"": module.PLAN}
    for task in tasks or ():
        if task not in module.PLANS:
            raise UserError(f"--task: {task!r} is not known; {paper} has {', '.join(module.PLANS)}")
    return {task: plan for task, plan in module.PLANS.items() if task in (tasks or module.PLANS)}
