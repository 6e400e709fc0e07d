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


def assert_all_equal(result: dict, kills: int, steps: int = 36) -> None:
    assert result["steps"] == steps and len(result["runs"]) == kills // 2
    assert all(run["equal"] for run in result["runs"]), result
    saved = [kill["saved_step"] for run in result["runs"] for kill in run["kills"]]
    assert any(0 < step < steps for step in saved), "no run was killed between its first and last checkpoint"


@pytest.mark.parametrize(("workers", "processes"), [(2, 1), (0, 2)])
def test_resumes_to_identical_weights_after_kill_9_again_and_again(tmp_path, workers, processes) -> None:
    assert_all_equal(experiment(tmp_path, kills=4, workers=workers, processes=processes, seed=1), 4)


def test_resumes_inside_an_epoch_of_accumulated_steps(tmp_path) -> None:
    assert_all_equal(experiment(tmp_path, kills=4, accumulate=5, seed=1), 4, steps=9)  # 5 + 5 + 2 batches


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_resumes_to_identical_weights_after_20_kills(tmp_path, workers, processes) -> None:
    assert_all_equal(experiment(tmp_path, kills=20, workers=workers, processes=processes), 20)


def test_sigterm_saves_and_exits_with_143(tmp_path) -> None:
    result = experiment(tmp_path, kills=4, processes=2, signal=signal.SIGTERM, seed=1)
    assert_all_equal(result, 4)
    codes = [kill["codes"] for run in result["runs"] for kill in run["kills"]]
    assert [143, 0] in codes, codes  # the first process speaks for the run
    # the others: it was over already, or had not begun to train
    assert all(code in ([143, 0], [0, 0], [-15, -15]) for code in codes), codes
