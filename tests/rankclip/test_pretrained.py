"""Reading checkpoints: every layout of section 6 gives the same network; code, damage and misfits are refused."""

import json
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmtrain.rankclip.pretrained import guess_architecture, load_pretrained, read_state_dict
from tests.rankclip.tiny import FOLDER, TINY, TINY_GELU, build, filled_state, lightning, outputs, prefixed, trainer

pytestmark = pytest.mark.usefixtures("architectures")


def save_torchscript(state: dict[str, torch.Tensor], path: Path) -> None:
    """OpenAI's kind of file: a traced module in half precision with three sizes among its buffers."""
    network = build("vit_tiny").eval()
    network.load_state_dict(state)
    for name, size in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 512)):
        if hasattr(network, name):
            delattr(network, name)
        network.register_buffer(name, torch.tensor(size))
    inputs = (torch.zeros(1, 3, 32, 32).half(), torch.zeros(1, 16, dtype=torch.long))
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(network.half(), inputs, check_trace=False).save(path)


LAYOUTS: dict[str, tuple[Callable[[dict], Any], str, str]] = {
    "plain.pt": (trainer, "trainer", ""),
    "ddp.pt": (lambda s: trainer(prefixed(s, "module.")), "trainer", "module."),
    "lightning.ckpt": (lambda s: lightning(s, "model."), "lightning", "model."),
    "lightning_ddp.ckpt": (lambda s: lightning(s, "model.module."), "lightning", "model.module."),
    "without_version.ckpt": (lambda s: {"state_dict": prefixed(s, "model.module.")}, "trainer", "model.module."),
    "alip.pt": (lambda s: prefixed(s, "module."), "bare", "module."),
    "open_clip.pt": (lambda s: s, "bare", ""),
    "with_extras.pt": (lambda s: s | {"vocab_size": torch.tensor(512)}, "bare", ""),
    "ours.ckpt": (lambda s: lightning(s, "network.", architecture=TINY), "lightning", "network."),
    "compiled.ckpt": (lambda s: lightning(s, "network._orig_mod."), "lightning", "network._orig_mod."),
}


@pytest.mark.parametrize("file", LAYOUTS)
def test_every_layout_gives_the_same_network(file: str, state, expected, tmp_path: Path) -> None:
    make, layout, prefix = LAYOUTS[file]
    torch.save(make(state), tmp_path / file)
    got, about = read_state_dict(tmp_path / file)
    assert got.keys() == state.keys()
    assert (about["layout"], about["prefix"]) == (layout, prefix)
    network = build("vit_tiny")
    load_pretrained(network, tmp_path / file)
    assert torch.equal(outputs(network), expected)


def test_safetensors(state, expected, tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in prefixed(state, "module.").items()}, tmp_path / "model.safetensors")
    network = build("vit_tiny")
    load_pretrained(network, tmp_path / "model.safetensors")
    assert torch.equal(outputs(network), expected)


def test_torchscript_drops_the_extra_keys_and_is_quickgelu(state, expected, tmp_path: Path) -> None:
    save_torchscript(state, tmp_path / "openai.pt")
    got, about = read_state_dict(tmp_path / "openai.pt")
    assert got.keys() == state.keys()
    assert about == {"layout": "torchscript", "prefix": "", "architecture": None, "quick_gelu": True}
    network = build("vit_tiny")
    load_pretrained(network, tmp_path / "openai.pt")
    torch.testing.assert_close(outputs(network), expected, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="trained with QuickGELU"):
        load_pretrained(build("vit_tiny", quick_gelu=False), tmp_path / "openai.pt")


def test_half_precision_becomes_float32_and_counters_stay_whole(tmp_path: Path) -> None:
    resnet = filled_state("rn_tiny")
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in resnet.items()}, tmp_path / "half.pt")
    got, _ = read_state_dict(tmp_path / "half.pt")
    assert {str(v.dtype) for v in got.values()} == {"torch.float32", "torch.int64"}
    load_pretrained(build("rn_tiny"), tmp_path / "half.pt")


class Malicious:
    """Unpickling it runs a command: it would write the file named in `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", ["zip", "plain pickle"])
def test_code_in_a_file_is_refused_and_not_run(protocol: str, state, tmp_path: Path) -> None:
    content = trainer(state) | {"args": Malicious(tmp_path / "ran")}
    if protocol == "zip":
        torch.save(content, tmp_path / "bad.pt")
    else:
        (tmp_path / "bad.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    with pytest.raises(ValueError, match=r"bad\.pt: refused, it needs code to be read \(\w+\.mkdir\)"):
        read_state_dict(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


BROKEN = {
    "empty.pt": b"",
    "page.pt": b"<!DOCTYPE html><html><body>quota exceeded</body></html>",
    "noise.pt": bytes(range(256)) * 20,
    "noise.safetensors": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_files_are_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(BROKEN[file])
    with pytest.raises(ValueError, match=rf"{file}: (refused|damaged)"):
        read_state_dict(tmp_path / file)


def test_cut_and_foreign_files_are_named(state, tmp_path: Path) -> None:
    torch.save(trainer(state), tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", (tmp_path / "cut.pt").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cut\.pt: damaged"):
        read_state_dict(tmp_path / "cut.pt")
    for content, message in (
        ({"conv.weight": torch.ones(2)}, r"no logit_scale among its keys \(conv.weight\)"),
        ({"state_dict": 5}, "holds no state dict"),
        ([1, 2], "holds a list"),
    ):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(ValueError, match=rf"foreign\.pt: .*{message}"):
            read_state_dict(tmp_path / "foreign.pt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_state_dict(tmp_path / "nowhere.pt")


def test_keys_and_shapes_that_do_not_fit_are_listed(state, tmp_path: Path) -> None:
    changed = dict(state)
    del changed["ln_final.bias"]
    changed["visual.proj"] = torch.ones(128, 32)
    changed |= {f"extra.{i}": torch.ones(1) for i in range(7)}
    torch.save(trainer(changed), tmp_path / "odd.pt")
    network = build("vit_tiny")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_pretrained(network, tmp_path / "odd.pt")
    message = str(caught.value)
    assert "odd.pt: does not fit the network: 1 missing keys (ln_final.bias); 7 unexpected keys (extra.0" in message
    assert "extra.4, ...)" in message and "extra.5" not in message
    assert "1 other shapes (visual.proj [128, 32] instead of [128, 64])" in message
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("stored_in", ["hyper_parameters", "mmtrain"])
@pytest.mark.parametrize("given", [True, False])
def test_the_other_activation_is_refused(stored_in: str, given: bool, state, tmp_path: Path) -> None:
    file = tmp_path / "ours.ckpt"
    stored = {"architecture": TINY}
    torch.save(lightning(state, "network.", **stored) if stored_in == "hyper_parameters" else trainer(state), file)
    if stored_in == "mmtrain":
        torch.save({"state_dict": state, "mmtrain": stored}, file)
    gelu, quick = build("vit_tiny", quick_gelu=False), build("vit_tiny")
    with pytest.raises(ValueError, match=r"ours\.ckpt: trained with QuickGELU .* uses GELU"):
        load_pretrained(gelu, file, TINY_GELU if given else None)
    load_pretrained(quick, file, TINY if given else None)


@pytest.mark.parametrize(("name", "full"), [("ViT-B-32-quickgelu", "ViT-B/32"), ("RN50-quickgelu", "RN50")])
def test_guess_architecture_from_shapes(name: str, full: str) -> None:
    tensors = json.loads((FOLDER / "manifest_full.json").read_text())[full]["tensors"]
    shapes = {key: torch.empty(spec["shape"], device="meta") for key, spec in tensors.items()}
    assert guess_architecture(shapes) == name
    del shapes["ln_final.bias"]
    with pytest.raises(ValueError, match=rf"from {name} it differs by 1 missing keys \(ln_final.bias\)"):
        guess_architecture(shapes)


def test_guess_architecture_refuses_other_sizes(state) -> None:
    with pytest.raises(ValueError, match=r"neither of ViT-B-32-quickgelu and RN50-quickgelu; from ViT.* instead of"):
        guess_architecture(state)
