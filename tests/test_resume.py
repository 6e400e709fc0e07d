"""Kill and resume: the final weights are those of an undisturbed run, bit for bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def experiment(folder: Path, **options: int) -> dict:
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(int(value)))]
    command = [sys.executable, "-m", "tests.resume_driver", str(folder), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_all_equal(result: dict, kills: int) -> None:
    assert result["steps"] == 36 and len(result["runs"]) == kills
    assert all(run["equal"] for run in result["runs"]), result
    assert any(0 < run["saved_step"] < 36 for run in result["runs"]), "no run was killed between its checkpoints"


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2)])
def test_resumes_to_identical_weights_after_kill_9(tmp_path, workers, processes) -> None:
    assert_all_equal(experiment(tmp_path, kills=2, workers=workers, processes=processes, seed=1), 2)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_resumes_to_identical_weights_after_20_kills(tmp_path, workers, processes) -> None:
    assert_all_equal(experiment(tmp_path, kills=20, workers=workers, processes=processes), 20)


def test_sigterm_saves_and_exits_with_143(tmp_path) -> None:
    result = experiment(tmp_path, kills=2, processes=2, signal=signal.SIGTERM, seed=1)
    assert_all_equal(result, 2)
    assert all(run["codes"] in ([143, 143], [0, 0], [-15, -15]) for run in result["runs"]), result
    assert any(run["codes"] == [143, 143] for run in result["runs"]), result
