"""Exports: open_clip loads them, they come whole or not at all, and the command line explains mistakes in one line."""

import hashlib
import json
import os
from pathlib import Path

import open_clip
import pytest
import torch

from mmtrain.rankclip.pretrained import _guess_for_export, export, load_pretrained, main, read_state_dict
from tests.rankclip.tiny import FOLDER, TINY, TINY_GELU, build, filled_state, lightning, outputs, prefixed, trainer

pytestmark = pytest.mark.usefixtures("architectures")


def test_export_loads_in_open_clip_and_back(state, expected, tmp_path: Path) -> None:
    source, out = tmp_path / "last.ckpt", tmp_path / "rankclip.pt"
    torch.save(lightning(state, "network.", architecture=TINY), source)
    done = export(source, out)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    content = torch.load(out, weights_only=True)
    assert content["mmtrain"] == {"architecture": TINY, "source": "last.ckpt", "sha256": digest}
    assert done["keys"] == len(state) and done["parameters"] == sum(v.numel() for v in state.values())
    assert torch.equal(outputs(open_clip.create_model(TINY, pretrained=str(out))), expected)
    network = build("vit_tiny")
    load_pretrained(network, out, TINY)
    assert torch.equal(outputs(network), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "rankclip.pt"], "no part file may stay behind"


def test_export_counts_no_running_statistics(tmp_path: Path) -> None:
    torch.save(trainer(filled_state("rn_tiny")), tmp_path / "rn.pt")
    done = export(tmp_path / "rn.pt", tmp_path / "out.pt", "some-unregistered-quickgelu")
    assert done["parameters"] == sum(p.numel() for p in build("rn_tiny").parameters())


@pytest.mark.parametrize("failing", ["save", "replace"])
def test_failed_export_keeps_the_old_file(failing: str, state, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "last.ckpt", tmp_path / "out.pt"
    torch.save(lightning(state, "network.", architecture=TINY), source)
    out.write_bytes(b"old")

    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*((torch, "save") if failing == "save" else (os, "replace")), disk_full)
    with pytest.raises(OSError, match="no space"):
        export(source, out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "out.pt"]


def test_alip_layout_is_guessed_without_quickgelu(tmp_path: Path) -> None:
    """Full-size shapes; expanded zeros keep file and memory small."""
    tensors = json.loads((FOLDER / "manifest_full.json").read_text())["ViT-B/32"]["tensors"]
    zeros = {key: torch.zeros(1).expand(spec["shape"] or [1]) for key, spec in tensors.items()}
    zeros["logit_scale"] = torch.zeros(())
    torch.save(prefixed(zeros, "module."), tmp_path / "alip.pt")
    state, about = read_state_dict(tmp_path / "alip.pt")
    assert _guess_for_export(state, about, tmp_path / "alip.pt") == "ViT-B-32"
    assert _guess_for_export(state, about | {"layout": "trainer"}, tmp_path / "alip.pt") == "ViT-B-32-quickgelu"


def test_command_line(state, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "last.ckpt", tmp_path / "out.pt"
    torch.save(trainer(state), source)
    assert main([str(source), str(out), "--architecture", TINY]) == 0
    printed = capsys.readouterr().out
    parameters = sum(v.numel() for v in state.values())
    for part in (TINY, f"{len(state)}", f"{parameters:,}", hashlib.sha256(source.read_bytes()).hexdigest()):
        assert part in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: CHECKPOINT, OUT"),
        (["missing.ckpt", "out.pt"], "missing.ckpt: no such file"),
        (["tiny.ckpt", "out.pt"], "tiny.ckpt: neither of ViT-B-32-quickgelu and RN50-quickgelu"),
        (["tiny.ckpt", "out.pt", "--architecture", "RN50"], "tiny.ckpt: does not fit RN50:"),
        (["ours.ckpt", "out.pt", "--architecture", TINY_GELU], f"ours.ckpt: was trained as {TINY}"),
        (["tiny.ckpt", "tiny.ckpt", "--architecture", TINY], "tiny.ckpt: is the checkpoint itself"),
        (["tiny.ckpt", "out.safetensors"], "exports are PyTorch files"),
        (["tiny.ckpt", "ours.ckpt/out.pt", "--architecture", TINY], "File exists: 'ours.ckpt'"),
        (["tiny.ckpt", "out.pt", "--architecure", TINY], "unrecognized arguments: --architecure"),
    ],
)
def test_user_mistakes_give_one_line_and_2(arguments, message, state, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trainer(state), "tiny.ckpt")
    torch.save(lightning(state, "network.", architecture=TINY), "ours.ckpt")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("mmtrain export: ") and message in captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.ckpt", "tiny.ckpt"]
