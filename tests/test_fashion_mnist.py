"""Opt-in: the linear probe on Fashion-MNIST from the command line, killed on the way; needs Debian's package of it."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # apt-get install dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.skipif(not PACKAGE.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_probe_runs_from_the_command_line_and_resumes_after_a_kill(tmp_path: Path) -> None:
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for packed in PACKAGE.glob("*.gz"):
        with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    run = tmp_path / "run"
    words = ["test", "-c", "clip_cc3m", "-c", "laptop", "--vars.data", str(tmp_path / "data")]
    words += ["--trainer.default_root_dir", str(run), "--model.test.probe.lbfgs", "false"]
    command = [sys.executable, "-m", "mmtrain", *words]

    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(run.glob("features/fashion_mnist-train/*/rank0-*.pt"))) < 4:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    parts = {p: p.stat().st_mtime_ns for p in run.glob("features/*/*/*.pt")}
    assert len(parts) >= 4 + 5, "10,000 test pictures are 40 batches, five parts"

    second = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "fashion_mnist: features of 40 of 40 batches are in" in second.stdout
    assert "fashion_mnist/train: features of " in second.stdout
    assert {p: p.stat().st_mtime_ns for p in parts} == parts, "no part was written again"
    results = json.loads((run / "results.json").read_text())
    assert results["scale"] == "laptop" and results["evaluated"] == {"fashion_mnist": 10000}
    # even random convolutions tell clothes apart; chance is 0.1
    assert 0.6 < results["metrics"]["test/fashion_mnist/linear_probe"] < 0.95
    print(results["metrics"])
