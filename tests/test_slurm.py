"""The batch scripts on a real Slurm with two virtual nodes. Opt-in, minutes: `make slurm`."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from mmtrain.submit import scripts_dir
from tests.slurm_cluster import Cluster, is_installed

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not is_installed(), reason="needs Slurm and munge (Debian: slurm-wlm, munge)"),
]
CONFIG = "configs/rankclip_emoji.yaml"
QUIET = ["--trainer.enable_progress_bar", "false"]
SHORT = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2", *QUIET]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Cluster:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.stop()


@pytest.fixture
def project(tmp_path, monkeypatch, cluster) -> Path:
    """A folder to submit from."""
    for name in ("slurm", "configs"):
        shutil.copytree(scripts_dir().parent / name, tmp_path / name)
    cluster.environment |= {"MMTRAIN_PYTHON": sys.executable, "PYTHONPATH": str(Path(__file__).parents[1])}
    return tmp_path


def final(project: Path, name: str) -> dict:
    checkpoint = torch.load(project / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def flat(value: object) -> list:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in [key, *flat(value[key])]]
    return [leaf for entry in value for leaf in flat(entry)] if isinstance(value, list | tuple) else [value]


def test_usr1_requeues_and_the_end_is_that_of_an_undisturbed_run(cluster, project) -> None:
    calm = cluster.submit("slurm/train.sbatch", CONFIG, *SHORT, "--vars.name", "calm", cwd=project)
    assert cluster.wait(calm, OVER) == "COMPLETED", (project / f"slurm-{calm}.log").read_text()
    told = cluster.submit("slurm/train.sbatch", CONFIG, *SHORT, "--vars.name", "told", cwd=project)
    metrics = project / "runs" / "told" / "logs" / "version_0" / "metrics.csv"
    end = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:  # it is training
        assert time.monotonic() < end, (project / f"slurm-{told}.log").read_text()
        time.sleep(0.1)
    cluster.run("scancel", "--signal=USR1", told)
    cluster.wait(told, ("PENDING",))
    cluster.run("scontrol", "update", f"JobId={told}", "StartTime=now")  # instead of waiting two minutes
    assert cluster.wait(told, OVER) == "COMPLETED", (project / f"slurm-{told}.log").read_text()
    log = (project / "slurm-logs" / told / "rank-0.log").read_text()
    assert "told to make room at step" in log and "Restored all states from the checkpoint" in log
    assert len(list((project / "slurm-logs" / told).glob("rank-*.log"))) == 4
    first, second = flat(final(project, "calm")), flat(final(project, "told"))
    assert len(first) == len(second) and first[1] == 32
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_an_array_of_two_methods_and_two_seeds_fills_one_report(cluster, project) -> None:
    configs = f"{CONFIG} configs/clip_emoji.yaml"
    words = ["--trainer.max_epochs", "1", *QUIET, "--model.test.figures", "false"]
    array = cluster.submit("--array=0-3", "slurm/array.sbatch", configs, "0 1", *words, cwd=project)
    report = f"{sys.executable} -m mmtrain report 'runs/*-seed*' --out table"
    after = cluster.submit(f"--dependency=afterany:{array}", "--wrap", report, cwd=project)
    assert cluster.wait(after, OVER, 1500) == "COMPLETED"
    rows = [json.loads(path.read_text()) for path in sorted((project / "runs").glob("*-seed*/results.json"))]
    found = [(row["method"], row["seed"]) for row in rows]
    assert found == [("CLIP", 0), ("CLIP", 1), ("RankCLIP", 0), ("RankCLIP", 1)]
    page = (project / "table" / "report.html").read_text()
    assert "RankCLIP" in page and "clip_emoji-seed1" in page
