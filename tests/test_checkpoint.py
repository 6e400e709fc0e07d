"""Checkpoints that are whole or not there, and the guard that a run goes on with its settings."""

import os
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmtrain.checkpoint import AtomicCheckpointIO, ResumeGuard
from mmtrain.config_errors import UserError
from tests.test_callbacks import Data, Net, Optim, Other, SaveAfter, trainer

# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_midway_leaves_the_old_checkpoint(tmp_path, monkeypatch, error) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "folder" / "last.ckpt"
    version = {"pytorch-lightning_version": "2.6"}
    io.save_checkpoint({"step": 1, "weights": torch.ones(3)} | version, path)
    before = path.read_bytes()

    def fail(_: Any, file: Any) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    for target in (path, path.with_name("new.ckpt")):
        with pytest.raises(type(error)):
            io.save_checkpoint({"step": 2} | version, target)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.ckpt"]
    assert io.load_checkpoint(path)["step"] == 1
    monkeypatch.undo()
    io.save_checkpoint({"step": 3} | version, path)
    assert io.load_checkpoint(path) == {"step": 3} | version and os.listdir(path.parent) == ["last.ckpt"]


def test_the_checkpoint_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert calls == ["sync", "replace", "sync"]


@dataclass
class Settings:
    folder: Path = Path("a/b")
    inner: list[Optim] = field(default_factory=lambda: [Optim()])


def test_settings_are_saved_as_plain_types(tmp_path) -> None:
    AtomicCheckpointIO().save_checkpoint({"hyper_parameters": {"s": Settings(), "p": Path("c")}}, tmp_path / "a.ckpt")
    expected = {"s": {"folder": "a/b", "inner": [{"lr": 0.1, "betas": (0.9, 0.999)}]}, "p": "c"}
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"] == expected


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("what", ["empty", "garbage", "text", "cut", "code", "folder", "missing", "weights"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, what) -> None:
    path, mark = tmp_path / "bad.ckpt", tmp_path / "code ran"
    torch.save({"x": torch.ones(1000)}, path)
    whole = path.read_bytes()
    content = {"empty": b"", "garbage": random.Random(0).randbytes(5000), "text": b"<html>", "cut": whole[:2000]}
    if what in content:
        path.write_bytes(content[what])
    elif what == "code":
        torch.save({"state_dict": {}, "x": Code(mark)}, path)
    elif what != "weights":
        path.unlink()
    if what == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"^ckpt_path: .*bad\.ckpt: (not a|no such) checkpoint") as error:
        AtomicCheckpointIO().load_checkpoint(path)
    assert not mark.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", random.Random(0).randbytes(5000)])
def test_a_damaged_last_checkpoint_is_passed_over_but_no_other_is(tmp_path, content) -> None:
    io, sound = AtomicCheckpointIO(), {"pytorch-lightning_version": "2.6", "global_step": 7}
    io.save_checkpoint(sound, tmp_path / "previous.ckpt")
    for name in ("last.ckpt", "mine.ckpt"):
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt: not a checkpoint .*: going on from .*previous\.ckpt, step 7"):
        assert io.load_checkpoint(tmp_path / "last.ckpt") == sound
    with pytest.raises(UserError, match=r"mine\.ckpt: not a checkpoint"):
        io.load_checkpoint(tmp_path / "mine.ckpt")


# -------------------------------------------------------------------------------------------------------- resume guard


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    saving = SaveAfter(2, tmp_path / "guarded.ckpt")
    trainer(tmp_path, ResumeGuard(), saving, max_steps=4).fit(Net(optim=Optim()), Data())
    return tmp_path / "guarded.ckpt"


def test_resume_guard_names_every_changed_setting(checkpoint, tmp_path) -> None:
    net, data = Net(width=5, optim=Optim(lr=0.2, betas=(0.8, 0.999))), Data(batch_size=4, path=Path("there"))
    with pytest.raises(UserError) as refused:
        trainer(tmp_path, ResumeGuard(), max_steps=6, precision="bf16-true").fit(net, data, ckpt_path=checkpoint)
    message = str(refused.value)
    for line in (
        "model.width: 2 then, 5 now",
        "model.optim.lr: 0.1 then, 0.2 now",
        "model.optim.betas: [0.9, 0.999] then, [0.8, 0.999] now",
        "data.batch_size: 2 then, 4 now",
        "data.path: 'here' then, 'there' now",
        "trainer.max_steps: 4 then, 6 now",
        "trainer.precision: '32-true' then, 'bf16-true' now",
    ):
        assert f"  {line}\n" in message
    assert message.count(" then, ") == 7, "nothing else has changed"


def test_resume_guard_lets_the_same_and_the_harmless_pass(checkpoint, tmp_path) -> None:
    net = Net(optim=Optim(), chunk=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="resuming with another")
        trainer(tmp_path, ResumeGuard(), max_steps=4).fit(net, Data(num_workers=3), ckpt_path=checkpoint)
    assert len(net.seen) == 2


@pytest.mark.parametrize("allow", [["trainer.max_steps", "data.path"], "all"])
def test_resume_guard_warns_of_what_it_was_told_to_allow(checkpoint, tmp_path, allow) -> None:
    net, data = Net(optim=Optim()), Data(path=Path("there"))
    with pytest.warns(UserWarning) as warned:
        trainer(tmp_path, ResumeGuard(allow), max_steps=3).fit(net, data, ckpt_path=checkpoint)
    lines = {str(w.message) for w in warned if "resuming with another" in str(w.message)}
    assert lines == {
        "resuming with another data.path: 'here' then, 'there' now",
        "resuming with another trainer.max_steps: 4 then, 3 now",
    }
    assert len(net.seen) == 1
    with pytest.raises(UserError, match=r"data\.path: 'here' then"):
        trainer(tmp_path, ResumeGuard(["trainer.max_steps"]), max_steps=3).fit(
            Net(optim=Optim()), data, ckpt_path=checkpoint
        )


def test_resume_guard_sees_another_class_and_does_not_look_outside_fit(checkpoint, tmp_path) -> None:
    with pytest.raises(UserError, match=r"model\.class: 'tests\.test_callbacks\.Net' then, .*Other"):
        trainer(tmp_path, ResumeGuard(), max_steps=4).fit(Other(optim=Optim()), Data(), ckpt_path=checkpoint)
    run = trainer(tmp_path, ResumeGuard())
    run.validate(Other(optim=Optim()), DataLoader(torch.ones(2, 3)), ckpt_path=checkpoint)
