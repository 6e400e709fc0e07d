"""`submit`: the script that it writes, what it hands to sbatch, what it refuses; the batch scripts run by bash."""

import os
import subprocess
from pathlib import Path

import pytest

from mmtrain.__main__ import main
from mmtrain.submit import scripts_dir

FAKE_SBATCH = """#!/bin/bash
echo "$@" >> "$(dirname "$0")/calls"
[ -e "$(dirname "$0")/refuse" ] && { echo "sbatch: error: invalid partition specified: $1" >&2; exit 1; }
echo "$((41 + $(wc -l < "$(dirname "$0")/calls")));cluster"
"""
# srun and scontrol of a machine without Slurm: the first writes down what it would run and exits with $CODE
FAKE_TOOLS = {
    "sbatch": FAKE_SBATCH,
    "srun": """#!/bin/bash
echo "cores=$SRUN_CPUS_PER_TASK $@" >> "$(dirname "$0")/calls"
[ -n "$CUT_OFF" ] && { trap "exit 0" TERM; sleep 0.2; kill -TERM $PPID; sleep 30 >&- 2>&- & wait; }
exit "$CODE"
""",
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo first-host || echo "scontrol $@" >> "$(dirname "$0")/calls"\n',
    "nvidia-smi": '#!/bin/bash\nexit "${NO_GPU:-0}"\n',
}


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKE_TOOLS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def calls(tools: Path) -> list[str]:
    return (tools / "calls").read_text().splitlines()


def test_a_dry_run_shows_the_script(capsys, tools) -> None:
    words = ["--nodes", "4", "--gpus", "8", "--time", "24:00:00", "--partition", "long", "--vars.data", "/my data"]
    assert main(["submit", "-c", "configs/rankclip_cc3m.yaml", *words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "#!/bin/bash" and not (tools / "calls").exists()
    head = [line for line in lines if line.startswith("#SBATCH")]
    for option in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "time=24:00:00", "partition=long"):
        assert head.count(f"#SBATCH --{option}") == 1
    assert sum("--nodes" in line for line in head) == 1, "the script's own is replaced"
    assert "#SBATCH --requeue" in head and "#SBATCH --signal=USR1@120" in head
    arguments = next(line for line in lines if line.startswith("set -- "))
    assert arguments.endswith("configs/rankclip_cc3m.yaml --vars.data '/my data'")
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(option) < first for option in head), "sbatch reads no option behind the first command"


def test_a_job_is_submitted_and_told_how_to_follow(capsys, tools, tmp_path) -> None:
    assert main(["submit", "-c", "rankclip_emoji", "-c", "laptop", "--tasks", "2", "--trainer.max_epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "job 42: follow it with" in out and "squeue -j 42" in out and "scancel 42" in out
    (script,) = (tmp_path / "runs" / "rankclip_emoji" / "slurm").iterdir()
    assert calls(tools) == [f"--parsable {script.relative_to(tmp_path)}"]
    assert (
        "-c " + str(scripts_dir().parent / "configs" / "laptop.yaml") + " --trainer.max_epochs 2" in script.read_text()
    )
    assert "#SBATCH --ntasks-per-node=2" in script.read_text()


def test_an_array_has_a_row_each_and_one_report(capsys, tools) -> None:
    rows = ["configs=rankclip_emoji,clip_emoji", "seeds=0..1"]
    assert main(["submit", "-c", "rankclip_emoji", "--array", *rows, "--trainer.max_epochs", "1"]) == 0
    first, second = calls(tools)
    script = Path(first.split()[-1]).read_text()
    assert ("#SBATCH --array=0-3" in script and '"0 1"' in script) or "'0 1'" in script
    assert second.startswith("--parsable --dependency=afterany:42 ")
    report = Path(second.split()[-1]).read_text()
    for name in ("rankclip_emoji-seed0", "rankclip_emoji-seed1", "clip_emoji-seed0", "clip_emoji-seed1"):
        assert f"runs/{name}" in report
    assert main(["submit", "-c", "rankclip_emoji", "--array", *rows, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-3" in shown and "--out runs/report-JOB" in shown and len(calls(tools)) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which training? -c CONFIG"),
        (["-c", "rankclip_emojy"], "rankclip_emoji"),
        (["-c", "rankclip_emoji", "--time", "a day"], "--time a day: not a time limit"),
        (["-c", "rankclip_emoji", "--nodes", "0"], "--nodes 0: at least 1"),
        (["-c", "rankclip_emoji", "--array", "seeds=a"], "--array seeds=a: write seeds=0..2"),
        (["-c", "rankclip_emoji", "--array", "seeds=3..1"], "no seeds"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, tools, words, said) -> None:
    assert main(["submit", *words]) == 2
    assert said in capsys.readouterr().err and not (tools / "calls").exists()


def test_what_sbatch_says_is_passed_on(capsys, tools, monkeypatch) -> None:
    (tools / "refuse").touch()
    assert main(["submit", "-c", "rankclip_emoji"]) == 2
    assert "sbatch refused" in (told := capsys.readouterr().err) and "invalid partition" in told
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "-c", "rankclip_emoji"]) == 2
    assert "no sbatch here" in capsys.readouterr().err


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "first-host",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "4",
    "MMTRAIN_SLURM": str(scripts_dir()),
    "MMTRAIN_PYTHON": "python",
}


def batch(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    everything = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")} | SLURM | environment
    command = ["bash", str(scripts_dir() / script), *words]
    return subprocess.run(command, env=everything, capture_output=True, text=True)


def test_the_batch_script_requeues_what_saved_and_nothing_else(tools) -> None:
    for code, restarts, ended, requeued in (
        ("0", "0", 0, 0),
        ("138", "3", 0, 1),
        ("138", "50", 138, 0),
        ("1", "0", 1, 0),
    ):
        (tools / "calls").unlink(missing_ok=True)
        done = batch("train.sbatch", "a.yaml", "--x", "y z", CODE=code, SLURM_RESTART_COUNT=restarts)
        assert done.returncode == ended, done
        assert calls(tools).count("scontrol requeue 77") == requeued
        assert (
            "fit -c a.yaml -c cluster --trainer.num_nodes 2 --trainer.devices 4 --ckpt_path last --x y z"
            in calls(tools)[0]
        )
    batch("train.sbatch", "a.yaml", CODE="0", NO_GPU="9", SLURM_CPUS_PER_TASK="12")
    assert "-c cluster_cpu" in calls(tools)[-1] and calls(tools)[-1].startswith("cores=12 ")
    assert batch("train.sbatch", "a.yaml", CODE="0", CUT_OFF="1").returncode == 143, "cut off, whatever srun says"
    assert batch("train.sbatch", CODE="0").returncode != 0, "no config"


def test_an_array_task_is_one_config_and_one_seed(tools, tmp_path) -> None:
    found = []
    for task in range(5):
        (tools / "calls").unlink(missing_ok=True)
        (tmp_path / "runs" / f"{'ab'[min(task, 3) // 2]}-seed{min(task, 3) % 2 + 5}").mkdir(parents=True, exist_ok=True)
        done = batch("array.sbatch", "x/a.yaml x/b.yaml", "5 6", CODE="0", SLURM_ARRAY_TASK_ID=str(task))
        found.append(
            (done.returncode, [line.partition("-m mmtrain ")[2][:40] for line in calls(tools)] if task < 4 else [])
        )
    assert [code for code, _ in found] == [0, 0, 0, 0, 2], "there is no fifth row"
    assert found[2][1][0].startswith("fit -c x/b.yaml") and found[2][1][1].startswith("test -c x/b.yaml")
    again = batch("array.sbatch", "x/a.yaml x/b.yaml", "5 6", CODE="0", SLURM_ARRAY_TASK_ID="2")
    assert again.returncode == 0 and "test -c x/b.yaml" in calls(tools)[-1], "trained already: only tested"
