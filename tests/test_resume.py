"""Signals at random moments and a resume: the end is that of an undisturbed run, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.small_trainings import NAMES

ROOT = Path(__file__).parents[1]


def experiment(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What `tests.resume_driver` found, a dict for each training."""
    command = [sys.executable, "-m", "tests.resume_driver", str(folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_all_resumed(results: list[dict[str, Any]], kills: int) -> list[dict[str, Any]]:
    """Returns all kills: of those runs, each to be the undisturbed one in weights, optimizer, averages, evaluation."""
    runs = [run for result in results for run in result["runs"]]
    assert all(run["ok"] for run in runs), json.dumps([run for run in runs if not run["ok"]], indent=1)
    found = [kill for run in runs for kill in run["kills"]]
    assert len(found) == kills
    first_end = min(result["steps"] for result in results)
    assert any(0 < kill["saved_step"] < first_end for kill in found), (
        "no run was hit between its first and last checkpoint"
    )
    return found


def test_resumes_inside_an_epoch_of_accumulated_steps_with_loader_workers(tmp_path: Path) -> None:
    words = ("--data.num_workers", "2", "--trainer.accumulate_grad_batches", "5", "--vars.checkpoint_steps", "1")
    results = experiment(tmp_path, "--kills", "2", "--signals", "KILL", "TERM", "--seed", "4120", *words)
    assert results[0]["steps"] == 9  # 5 + 5 + 2 batches an epoch
    assert_all_resumed(results, 2)


def test_two_processes_resume_together(tmp_path: Path) -> None:
    words = ("--trainings", "tokenizer", "--processes", "2", "--kills", "2", "--seed", "1803")
    assert_all_resumed(experiment(tmp_path, *words), 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 0)])
def test_fifty_kills(tmp_path: Path, processes: int, workers: int) -> None:
    """25 each, over the four papers' trainings; signal, processes and moment are drawn."""
    kills = [5, *[4] * (len(NAMES) - 1)]
    words = ("--trainings", *NAMES, "--processes", str(processes), "--kills", *map(str, kills))
    found = assert_all_resumed(experiment(tmp_path, *words, "--data.num_workers", str(workers)), sum(kills))
    assert {kill["name"] for kill in found} == {"KILL", "TERM", "USR1"}
    assert len({kill["phase"] for kill in found}) > 4, "at all kinds of moments"
