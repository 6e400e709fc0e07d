"""`mmtrain.preflight`: what it finds before a big allocation is used, and what it says to do."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmtrain import preflight
from tests.small_trainings import write_training


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_training(tmp_path_factory.mktemp("training"), "rankclip")


def checked(capsys, config: Path, *words: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Exit code, and state and text of every check."""
    code = preflight.main(["-c", str(config), *words])
    lines = re.findall(r"^(.{11}) (ok|FAILED) +[0-9.]+ s  (.*)$", capsys.readouterr().out, re.MULTILINE)
    return code, {name.strip(): (state, text) for name, state, text in lines}


def test_a_sound_training_makes_two_steps(capsys, config, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("SLURM_NTASKS", "2")  # inside a job of two processes
    code, found = checked(capsys, config, "--vars.name", "checked")
    assert code == 0 and list(found) == ["config", "run folder", "disk", "data", "two steps"], found
    assert found["two steps"][1].startswith("4 samples a process"), "its share of 8"
    assert not list(tmp_path.rglob("*.ckpt")) and "SLURM_NTASKS" not in os.environ, "a trial leaves nothing behind"


@pytest.fixture
def no_steps(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(preflight, "check_steps", lambda *_: "left out")
    monkeypatch.chdir(tmp_path)


def test_what_would_fail_is_found(capsys, config, no_steps, monkeypatch) -> None:
    code, found = checked(capsys, config, "--model.temprature", "1")
    assert code == 1 and list(found) == ["config"] and "temprature" in found["config"][1]
    code, found = checked(capsys, config, "--data.train", "/nowhere/{00..03}.tar")
    assert code == 1 and found["data"][0] == "FAILED" and "/nowhere/00.tar" in found["data"][1]
    assert "two steps" not in found, "they would say the same"
    code, found = checked(capsys, config, "--ranks", "3")
    assert code == 1 and "global batch of 8 cannot be divided among 3 processes" in found["data"][1]
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, found = checked(capsys, config)
    assert code == 1 and "free some" in found["disk"][1]
    code, found = checked(capsys, config, "--trainer.default_root_dir", "/proc/a_run")
    assert code == 1 and "/proc/a_run" in found["run folder"][1]
