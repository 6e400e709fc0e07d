"""Checks before a big allocation is used: config, data, disk space, and two steps of training on one process.

`python -m mmtrain.preflight -c CONFIG [--ranks N] [words for fit]`, or `slurm/preflight.sh CONFIG ...`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError

TRIAL_SECONDS = 100  # of the two steps, which leaves some of the two minutes for the rest
COPIES = 3  # last.ckpt, previous.ckpt, and the one that is being written


def main(argv: list[str]) -> int:
    """One line a check, ok or what to do; exit code 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m mmtrain.preflight", allow_abbrev=False)
    parser.add_argument(
        "--ranks", type=int, help="processes that the batch is for; by default those of the Slurm job, or 1"
    )
    options, words = parser.parse_known_args(argv)
    ranks = options.ranks or int(os.environ.get("SLURM_NTASKS") or 1)
    for name in [key for key in os.environ if key.startswith("SLURM_")]:
        del os.environ[name]  # this is one process, not one of the job's
    made: dict[str, Any] = {}
    checks: list[tuple[str, Callable[[], str]]] = [
        ("config", lambda: check_config(words, made)),
        ("run folder", lambda: check_folder(made)),
        ("disk", lambda: check_disk(made)),
        ("data", lambda: check_data(made, ranks)),
        ("two steps", lambda: check_steps(words, made, ranks)),
    ]
    failed = 0
    for name, check in checks:
        begin = time.monotonic()
        try:
            found, state = check(), "ok"
        except UserError as error:
            found, state, failed = str(error).strip(), "FAILED", failed + 1
        print(f"{name:<11} {state:<7} {time.monotonic() - begin:5.1f} s  {found}", flush=True)
        if state == "FAILED" and name in ("config", "data"):
            break  # what follows cannot be, or says the same once more
    return 1 if failed else 0


def check_config(words: list[str], made: dict[str, Any]) -> str:
    """Merge the config and make trainer, model and data."""
    from mmtrain.cli import build
    from mmtrain.config_layers import load, split_arguments

    made["layer"] = load(*split_arguments(words))
    # the machine that checks may have no GPU, and is not all the hosts of the job
    here = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "sync_batchnorm": False}
    made["layer"].data["trainer"].update(here)
    trainer, made["model"], made["data"] = build(made["layer"])
    made["folder"] = Path(str(trainer.default_root_dir))
    return f"{type(made['model']).__name__} with {type(made['data']).__name__}"


def check_data(made: dict[str, Any], ranks: int) -> str:
    """Open the data as `fit` does, which counts them and compares the index; the batch must be shared out evenly."""
    data = made["data"]
    try:
        data.prepare_data()
        data.setup("fit")
        batches = len(data.train_dataloader())
    except (OSError, ValueError) as error:
        raise UserError(f"{type(error).__name__}: {error}") from error
    if (size := global_batch(data)) and size % ranks:
        raise UserError(f"data.batch_size: the global batch of {size} cannot be divided among {ranks} processes")
    missing = getattr(data, "missing", {})
    left_out = f"; evaluation sets that are not there: {', '.join(missing)}" if missing else ""
    return f"{batches} batches an epoch{left_out}"


def global_batch(data: Any) -> int | None:
    """Samples of a training step over all processes; None where the data module does not tell."""
    return getattr(data, "batch_size", None) or getattr(data.hparams, "batch_size", None)


def check_folder(made: dict[str, Any]) -> str:
    """Write a file where the run will write."""
    from mmtrain.run_folder import check_writable

    check_writable(str(made["folder"]))
    return str(made["folder"])


def check_disk(made: dict[str, Any]) -> str:
    """Room for the checkpoints: weights, and two moments of those that are trained, three times."""
    weights = sum(p.numel() * p.element_size() for p in made["model"].state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in made["model"].parameters() if p.requires_grad)
    size = weights + 2 * trained
    free = shutil.disk_usage(made["folder"]).free
    told = f"a checkpoint has about {size / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free in {made['folder']}"
    if free < COPIES * size:
        raise UserError(f"{told}: needed is {COPIES} times as much; free some, or set trainer.default_root_dir")
    return told


def check_steps(words: list[str], made: dict[str, Any], ranks: int) -> str:
    """`fit` for two steps of one process's share of the batch, in a folder that is thrown away."""
    size = global_batch(made["data"])
    share = ["--data.batch_size", str(max(1, size // ranks))] if size else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mmtrain", "fit", *words, *share]
        for key, value in (
            *(("max_steps", 2), ("max_epochs", 1), ("limit_val_batches", 1), ("log_every_n_steps", 1)),
            *(("devices", 1), ("num_nodes", 1), ("strategy", "auto"), ("sync_batchnorm", "false")),
            *(("accelerator", "auto"), ("enable_progress_bar", "false"), ("default_root_dir", folder)),
        ):
            command += [f"--trainer.{key}", str(value)]
        begin = time.monotonic()
        environment = os.environ | {"WANDB_MODE": "disabled"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TRIAL_SECONDS, env=environment)
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"two steps took over {TRIAL_SECONDS} s: the data may be slow, or the model is meant for a GPU"
            ) from error
        if done.returncode:
            lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or [done.stdout[-300:]]
            told = next((i for i, line in enumerate(lines) if line.startswith("error")), len(lines) - 3)
            raise UserError(f"exit code {done.returncode}: {' / '.join(lines[max(0, told) :])}")
        return f"{share[1] if share else 'all'} samples a process, {time.monotonic() - begin:.0f} s with start-up"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)
