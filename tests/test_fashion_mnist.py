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
import torch

from mmtrain.feature_cache import FeatureCache
from mmtrain.metrics.linear_probe import fit_probe, top1

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
    # the network is not trained, and its features are still told apart better than by chance (0.1)
    (train, train_labels), (test, test_labels) = (read(run, name) for name in ("fashion_mnist-train", "fashion_mnist"))
    assert (len(train), len(test)) == (60000, 10000)
    accuracy = float(top1(fit_probe(train, train_labels, 10), test, test_labels))
    assert results["metrics"]["test/fashion_mnist/linear_probe"] == accuracy > 0.15
    print(results["metrics"])


def read(run: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels that were kept, in the order of the samples."""
    (folder,) = (run / "features" / name).iterdir()
    parts = list(FeatureCache(folder).load())
    rows = {key: torch.cat([part[key] for part in parts]) for key in ("image", "label", "id")}
    assert torch.equal(rows["id"], torch.arange(len(rows["id"])))
    return rows["image"], rows["label"]
