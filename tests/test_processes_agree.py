"""What is trained does not depend on the number of processes: first gradients and last weights for one global batch.

In float64, so that nothing but rounding may differ. BatchNorm and dropout, which belong to a process, stand still.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agreement_driver import CASES

ROOT = Path(__file__).parents[1]
GRADIENTS, WEIGHTS = 1e-6, 1e-4  # relative to each tensor's largest entry; Adam divides gradients by their size


def check(folder: Path, processes: str, cases: list[str]) -> None:
    command = [sys.executable, "-m", "tests.agreement_driver", str(folder), processes, *cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == cases
    for case, differences in found.items():
        assert differences.pop("tensors") > 10
        for what, (difference, where) in differences.items():
            assert difference <= (GRADIENTS if "gradients" in what else WEIGHTS), (case, what, difference, where)


def test_two_processes_train_what_one_does(tmp_path) -> None:
    check(tmp_path, "1,2", ["RankCLIP", "Diff-Foley", "RDP", "StoryWeaver"])


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_two_and_four_processes_agree_in_every_training(tmp_path) -> None:
    check(tmp_path, "1,2,4", list(CASES))
