"""`reproduce`: verdicts, what is not done again, failures, interruption, and the tables; runs are stand-ins but one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmtrain import reproduce
from mmtrain.__main__ import main
from mmtrain.config_errors import UserError
from mmtrain.rankclip.reproduce import PLAN
from mmtrain.reporting.results import Run, estimate, write_run
from mmtrain.reproduce import Claim, Job, Plan, judge, read_stages, run_all, verdict

CLAIM = Claim("better", "Table 1", "test/a/zero_shot_top1", ("Rival",))
GAP = "test/a/modality_gap"
CONFIGS = {"Own": "own_config", "Rival": "rival_config"}
SMALL = Plan("paper", "Own", CONFIGS, (), (4, 1), (3, 2), (CLAIM,), (GAP,))


def run(method: str, seed: int, top1: float, folder: Path = Path("x")) -> Run:
    metrics = {"test/a/zero_shot_top1": top1, GAP: 0.5}
    return Run(folder, "paper", method, folder.name, "laptop", seed=seed, metrics=metrics)


@pytest.mark.parametrize(
    ("differences", "direction", "expected"),
    [
        ([0.10, 0.11, 0.12], "higher", "holds"),
        ([0.10, 0.11, 0.12], "lower", "does not hold"),
        ([-0.10, -0.11, -0.12], "higher", "does not hold"),
        ([-0.10, -0.11, -0.12], "lower", "holds"),
        ([-0.01, 0.02, 0.03], "higher", "undecided at this scale"),
        ([0.5], "higher", "undecided at this scale"),
        ([0.1, float("nan"), 0.1], "higher", "undecided at this scale"),
        ([0.1, 0.1, 0.1], "higher", "holds"),
        ([0.0, 0.0, 0.0], "higher", "undecided at this scale"),
    ],
)
def test_an_interval_gives_the_verdict(differences, direction, expected) -> None:
    assert verdict(estimate(differences), direction) == expected


def test_differences_are_paired_by_seed() -> None:
    """The seeds vary far more than the methods differ: only pairs tell."""
    own, rival = [0.2, 0.5, 0.8], [0.19, 0.489, 0.791]
    runs = {
        "Own": [run("Own", s, v) for s, v in enumerate(own)],
        "Rival": [run("Rival", s, v) for s, v in enumerate(rival)],
    }
    (entry,) = judge(SMALL, runs)
    assert entry["verdict"] == "holds" and entry["rival"] == "Rival"
    assert entry["difference"]["mean"] == pytest.approx(0.01) and entry["difference"]["n"] == 3
    assert (entry["ours"], entry["theirs"]) == (pytest.approx(0.5), pytest.approx(0.49))


def test_scores_below_zero_have_episodes_too() -> None:
    """Similarities are no shares: their interval is the bootstrap's alone."""
    scores = {"Own": [-0.2, 0.5, 0.4, 0.45] * 20, "Rival": [-0.5, -0.3, 0.1, 0.0] * 20}
    plan = replace(SMALL, episodes=lambda folder, metric: scores[folder.name])
    runs = {name: [run(name, seed, 0.5, Path(name)) for seed in range(2)] for name in scores}
    (entry,) = judge(plan, runs)
    assert entry["episodes"]["pooled"]["verdict"] == "holds" and entry["episodes"]["n"] == [160, 160]


class Recorder(reproduce.Children):
    """Stands in for the processes: writes what `test` would, or fails where told."""

    values = {("Own", 0): 0.30, ("Own", 1): 0.32, ("Rival", 0): 0.20, ("Rival", 1): 0.21}  # noqa: RUF012
    failing = ""
    calls: list[str] = []  # noqa: RUF012

    def run(self, words, log):
        folder = Path(words[words.index("--trainer.default_root_dir") + 1])
        self.calls.append(f"{words[0]} {folder.name}")
        log.write_text("line of output\nthe reason")
        if self.failing == self.calls[-1]:
            return 1, 2.0
        method, _, seed = folder.name.partition("-seed")
        if words[0] == "test":
            write_run(run(method.capitalize(), int(seed), self.values[method.capitalize(), int(seed)], folder))
        return 0, 1.5


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(reproduce, "Children", Recorder)
    Recorder.calls, Recorder.failing = [], ""
    return Recorder


def test_all_runs_and_then_nothing_is_done_again(recorder, tmp_path: Path) -> None:
    first = reproduce.reproduce(SMALL, tmp_path, True, 1, "the command")
    assert recorder.calls == [
        f"{stage} {m}-seed{s}" for s in (0, 1) for m in ("own", "rival") for stage in ("fit", "test")
    ]
    assert first["claims"][0]["difference"]["mean"] == pytest.approx(0.105)
    assert first["cpu_seconds"] == pytest.approx(8 * 1.5)
    assert first["metrics"][GAP]["Own"]["mean"] == 0.5
    assert json.loads((tmp_path / "reproduce.json").read_text())["command"] == "the command"
    text = (tmp_path / "reproduce.md").read_text()
    assert "| a/zero_shot_top1 | 31.00 ± 12.71 | 20.50 ± 6.35 |" in text and "quick: a trial" in text
    assert "| better (Table 1) | a/zero_shot_top1 | Rival | +10.50 ± 6.35 | holds |" in text
    assert "| a/modality_gap | 0.500 ± 0.000 | 0.500 ± 0.000 |" in text
    recorder.calls.clear()
    assert reproduce.reproduce(SMALL, tmp_path, True, 2, "the command") == first and not recorder.calls


def test_a_failure_names_log_and_reason_and_only_that_is_done_again(recorder, tmp_path: Path) -> None:
    recorder.failing = "test rival-seed0"
    with pytest.raises(UserError, match=r"test of .*rival-seed0 failed with exit code 1:(.|\n)*the reason"):
        reproduce.reproduce(SMALL, tmp_path, True, 1, "the command")
    assert read_stages(tmp_path / "rival-seed0")["test"] == {
        "done": False, "cpu_seconds": 2.0, "seconds": pytest.approx(0, abs=5)
    }  # fmt: skip
    recorder.failing = ""
    recorder.calls.clear()
    result = reproduce.reproduce(SMALL, tmp_path, True, 1, "the command")
    assert recorder.calls[0] == "test rival-seed0" and "fit rival-seed0" not in recorder.calls
    assert result["cpu_seconds"] == pytest.approx(8 * 1.5 + 2.0), "what failed was also spent"


def test_real_processes_are_ended_when_one_fails(tmp_path: Path) -> None:
    """`fit` with a config that does not exist fails at once; the other job would take hours."""
    jobs = [Job("A", "no_such_config", 0, tmp_path / "a", ())]
    with pytest.raises(UserError, match=r"fit of .* failed with exit code 2:(.|\n)*no_such_config"):
        run_all(jobs, 1)
    assert read_stages(tmp_path / "a")["fit"]["cpu_seconds"] > 0


def test_sigterm_is_an_exception_here_so_that_the_runs_end_too(monkeypatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(reproduce, "reproduce", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        reproduce.main(["rankclip", "--quick", "--out", str(tmp_path)])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mmtrain",
        "reproduce",
        "rankclip",
        "--quick",
        "--out",
        str(tmp_path),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    while len(list(tmp_path.glob("*/stages.json"))) < 1:
        assert process.poll() is None
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    done = {p: read_stages(p.parent) for p in tmp_path.glob("*/stages.json")}
    assert main(["reproduce", "rankclip", "--quick", "--out", str(tmp_path)]) == 0
    for path, stages in done.items():
        kept = {name: stage for name, stage in stages.items() if stage["done"]}
        assert kept.items() <= read_stages(path.parent).items(), "what was done is not done again"
    result = json.loads((tmp_path / "reproduce.json").read_text())
    assert len(result["claims"]) == sum(len(claim.rivals) for claim in PLAN.claims)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0


def test_the_plan_names_what_there_is() -> None:
    from datamodules.emoji.datamodule import EmojiDataModule
    from mmtrain.listing import configs_dir

    assert all((configs_dir() / f"{config}.yaml").exists() for config in PLAN.methods.values())
    sets = set(EmojiDataModule(split="concept").evaluate)
    metrics = [claim.metric for claim in PLAN.claims] + list(PLAN.shown)
    assert {metric.split("/")[1] for metric in metrics} <= sets
    assert PLAN.own_method in PLAN.methods and all(set(claim.rivals) < set(PLAN.methods) for claim in PLAN.claims)


def test_a_child_that_was_told_to_stop_and_says_all_is_well_is_not_done(monkeypatch, tmp_path: Path) -> None:
    """As Lightning's `test`, which ends with 0 on SIGTERM."""
    program = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True)"
    popen = reproduce.subprocess.Popen
    command = [sys.executable, "-c", f"{program}; time.sleep(60)"]
    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda words, **options: popen(command, **options))
    children, log = reproduce.Children(threads=1), tmp_path / "log"

    def stop_when_up() -> None:
        while not (log.exists() and "up" in log.read_text()):
            time.sleep(0.05)
        children.stop()

    thread = threading.Thread(target=stop_when_up)
    thread.start()
    code, _ = children.run(["test"], log)
    thread.join()
    assert code == 143 and children.stopped
