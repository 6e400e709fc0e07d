"""The verb `submit`: writes a Slurm batch script from those in `slurm/`, and hands it to `sbatch`."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mmtrain.config_errors import UserError
from mmtrain.config_layers import find_config, load, split_arguments

TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")  # minutes, minutes:seconds, hours:minutes:seconds, days-hours...


def scripts_dir() -> Path:
    """The folder of batch scripts: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "slurm"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "slurm"


def main(argv: list[str]) -> int:
    """Write the script into `<run folder>/slurm/`, submit it, and say how to follow the job.

    Raises:
        UserError: a setting that cannot be, a config that does not merge, no sbatch, or what sbatch says against it.
    """
    options, words = parse(argv)
    names, settings = split_arguments(words)
    if not names:
        raise UserError("submit: which training? -c CONFIG")
    rows = array_rows(options.array, names)
    layer = load(names, settings)
    fit_words = [*(word for name in names[1:] for word in ("-c", str(find_config(name)))), *plain_words(settings)]
    if rows is None:
        script = batch_script("train.sbatch", options, "", [str(find_config(names[0])), *fit_words])
        folder = Path(str(layer.data["trainer"]["default_root_dir"]))
    else:
        configs, seeds = rows
        shapes = [" ".join(str(find_config(config)) for config in configs), " ".join(map(str, seeds))]
        script = batch_script("array.sbatch", options, f"0-{len(configs) * len(seeds) - 1}", [*shapes, *fit_words])
        folder = Path("runs")
    if options.dry_run:
        print(script, end="")
        if rows:
            print(f"\n# and after it, in a job of its own:\n{report_script(rows, 'JOB', options)}", end="")
        return 0
    job = send(script, folder, [])
    print(f"job {job}: follow it with\n  squeue -j {job}\n  tail -F slurm-{job}{'_*' if rows else ''}.log")
    print(f"  tail -F slurm-logs/{'*' if rows else job}/rank-0.log\nend it with scancel {job}")
    if rows:
        after = send(report_script(rows, job, options), folder, [f"--dependency=afterany:{job}"])
        print(f"job {after} then writes runs/report-{job}/report.html")
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the job, and the words that are for `fit`."""
    parser = argparse.ArgumentParser(
        prog="python -m mmtrain submit",
        description="Submit `fit -c CONFIG --key value` as a Slurm job. Further words go to fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="hosts")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs a host, a process each; 0: none")
    parser.add_argument("--tasks", type=int, default=1, help="processes a host where there are no GPUs")
    parser.add_argument("--cpus", type=int, help="cores a process")
    parser.add_argument("--time", help="limit, as 24:00:00 or 2-12:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--sbatch", default="", help="more options for sbatch, in quotes")
    parser.add_argument("--array", nargs="+", metavar="WHAT=VALUES", help="seeds=0..2, configs=a,b: a row each")
    parser.add_argument("--dry-run", action="store_true", help="show the script")
    options, words = parser.parse_known_args(argv)
    for name in ("nodes", "tasks"):
        if getattr(options, name) < 1:
            raise UserError(f"submit: --{name} {getattr(options, name)}: at least 1")
    if options.time and not TIME.fullmatch(options.time):
        raise UserError(f"submit: --time {options.time}: not a time limit; write hours:minutes:seconds, as 24:00:00")
    return options, words


def array_rows(given: list[str] | None, names: list[str]) -> tuple[list[str], list[int]] | None:
    """Configs and seeds of an array; None where none is asked for.

    >>> array_rows(["seeds=0..2"], ["a"])
    (['a'], [0, 1, 2])
    """
    if given is None:
        return None
    configs, seeds = names[:1], [0]
    for entry in given:
        what, _, values = entry.partition("=")
        span = re.fullmatch(r"(\d+)\.\.(\d+)", values)
        if what == "seeds" and span:
            seeds = list(range(int(span[1]), int(span[2]) + 1))
        elif what == "seeds" and re.fullmatch(r"\d+(,\d+)*", values):
            seeds = [int(seed) for seed in values.split(",")]
        elif what == "configs" and values:
            configs = values.split(",")
        else:
            raise UserError(f"submit: --array {entry}: write seeds=0..2, seeds=0,5 or configs=a,b")
    if not seeds:
        raise UserError("submit: --array: no seeds; the first is larger than the last")
    return configs, seeds


def batch_script(name: str, options: argparse.Namespace, array: str, words: list[str]) -> str:
    """A script of `slurm/` with the job's options in its head and its arguments set."""
    text = (scripts_dir() / name).read_text(encoding="utf-8")
    own = header(options, array)
    replaced = [line.split("=")[0] + "=" for line in own]
    kept = [line for line in text.splitlines() if not any(line.startswith(start) for start in replaced)]
    at = next(i for i, line in enumerate(kept) if line.startswith("#SBATCH"))
    first_command = next(i for i, line in enumerate(kept) if line and not line.startswith("#"))
    arguments = [
        f"export MMTRAIN_SLURM={shlex.quote(str(scripts_dir()))} MMTRAIN_PYTHON={shlex.quote(sys.executable)}",
        f"set -- {shlex.join(words)}",
    ]
    return "\n".join([*kept[:at], *own, *kept[at:first_command], *arguments, *kept[first_command:]]) + "\n"


def header(options: argparse.Namespace, array: str = "") -> list[str]:
    """Lines for the head of a batch script."""
    found = {
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus or options.tasks,
        "gpus-per-node": options.gpus or None,
        "cpus-per-task": options.cpus,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "array": array or None,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in found.items() if value is not None]
    return lines + [f"#SBATCH {word}" for word in shlex.split(options.sbatch)]


def report_script(rows: tuple[list[str], list[int]], job: str, options: argparse.Namespace) -> str:
    """A batch script on one core that writes one page of all rows of an array."""
    folders = [f"runs/{Path(config).stem}-seed{seed}" for config in rows[0] for seed in rows[1]]
    queue = {"partition": options.partition, "account": options.account}
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=mmtrain-report",
        "#SBATCH --output=slurm-%j.log",
        *(f"#SBATCH --{key}={value}" for key, value in queue.items() if value),
        f"{shlex.quote(sys.executable)} -m mmtrain report {shlex.join(folders)} --out runs/report-{job}",
    ]
    return "\n".join(lines) + "\n"


def plain_words(settings: list[tuple[str, str]]) -> list[str]:
    """Options as they are written on a command line."""
    return [word for key, value in settings for word in (f"--{key}", value)]


def send(script: str, folder: Path, words: list[str]) -> str:
    """Keep the script beside the run, hand it to sbatch, and return the job's number."""
    if shutil.which("sbatch") is None:
        raise UserError("submit: no sbatch here; run it where jobs are submitted, or see the script with --dry-run")
    path = folder / "slurm" / f"{time.strftime('%Y%m%d-%H%M%S')}-{len(script)}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", *words, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"submit: sbatch refused {path}: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
