"""The released layout: read exactly, written so that it is read again, and refused with one clear line otherwise."""

from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.export import main, room
from mmtrain.normaliser import limits
from mmtrain.rdp.dp import DiffusionPolicy
from mmtrain.rdp.module import LatentDiffusionPolicy
from mmtrain.rdp.observation_encoder import group_norm_resnet18
from mmtrain.rdp.pretrained import (
    NORMALISER,
    export_policy,
    export_tokenizer,
    fit_into,
    load_policy_state,
    load_tokenizer_state,
)
from mmtrain.rdp.tokenizer import Tokenizer
from tests.rdp.test_networks_golden import POLICIES, manifest, shapes

WRENCH = "left_robot_tcp_wrench"


def released(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """A state with exactly the names and shapes of a manifest."""
    entries = {key: value["shape"] for key, value in manifest(name).items() if key != "_info"}
    return {key: torch.zeros(shape, device=device) for key, shape in entries.items()}


def saved(path: Path, **dicts: dict[str, Tensor]) -> Path:
    torch.save({"state_dicts": dicts, "pickles": {}}, path)
    return path


def fitted(module):
    """Normalisers of a module and of the tokenizer in it, fitted on noise."""
    rng = np.random.default_rng(0)
    for normaliser in [part for name, part in module.named_modules() if name.rpartition(".")[2] == "normalizer"]:
        for key, width in normaliser.widths.items():
            normaliser.set(key, limits(rng.standard_normal((50, width))))
    return module


def checkpoint(module, path: Path, **extra) -> Path:
    """A file as training writes it."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    content = {"state_dict": module.state_dict(), "settings": {"model.class": kind}, "pytorch-lightning_version": "2.6"}
    torch.save(content | extra, path)
    return path


@pytest.fixture(scope="module")
def policy() -> LatentDiffusionPolicy:
    torch.manual_seed(0)
    return fitted(LatentDiffusionPolicy("peel", "force", vision="pose", preset="sim"))


@pytest.mark.parametrize("name", POLICIES)
def test_exported_names_and_shapes_are_those_of_the_manifest(name: str) -> None:
    state = {key: value for key, value in released(name, "meta").items() if not key.endswith("_dummy_variable")}
    exported = export_policy(state)
    known = {key: list(value.shape) for key, value in exported.items() if not key.startswith(NORMALISER)}
    assert known == {key: list(value.shape) for key, value in released(name, "meta").items()}
    pictures = POLICIES[name][0]
    assert {key for key in exported if key.endswith(".scale")} == {f"{NORMALISER}{key}.scale" for key in pictures}


def test_full_size_policy_is_exactly_ours() -> None:
    """Without values, for the weights are 1.1 GB."""
    with torch.device("meta"):
        ours = DiffusionPolicy("peel", "image").state_dict()
        latent = LatentDiffusionPolicy("lift", "gelsight_mctac").state_dict()
    for state, name in ((ours, "dp_peel_tactile_img"), (latent, "ldp_lift_tactile")):
        weights = {k: list(v.shape) for k, v in state.items() if not k.startswith(("normalizer.", "tokenizer."))}
        assert weights == shapes(name)
    tokenizer = {k: v for k, v in latent.items() if k.startswith("tokenizer.network.")}
    assert {k.removeprefix("tokenizer.network."): list(v.shape) for k, v in tokenizer.items()} == shapes("at_lift_two")


@pytest.mark.parametrize("name", ["at_peel_force", "at_wipe_gelsight", "at_lift_two", "at_vq"])
@pytest.mark.parametrize("nested", [False, True])
def test_tokenizer_files(name: str, nested: bool, tmp_path: Path) -> None:
    state = released(name)
    parts = {key.partition(".")[0] for key in state}
    by_part = {part: {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{part}.")} for part in parts}
    path = saved(tmp_path / "at.ckpt", model=by_part if nested else state)
    read = load_tokenizer_state(path)
    assert {key.removeprefix("network."): list(value.shape) for key, value in read.items()} == shapes(name)
    assert {key: list(value.shape) for key, value in export_tokenizer(read).items()} == shapes(name)


def test_there_and_back(policy: LatentDiffusionPolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = {name: value + 1 for name, value in policy.named_parameters() if not name.startswith("tokenizer.")}
    source = checkpoint(policy, tmp_path / "last.ckpt", ema=average)
    out, fast = tmp_path / "policy.ckpt", tmp_path / "at.ckpt"
    assert main([str(source), str(out), "--tokenizer", str(fast)]) == 0
    assert "latent policy" in capsys.readouterr().out
    written = torch.load(out, weights_only=True)["state_dicts"]
    assert written.keys() == {"model", "ema_model"}
    assert (
        f"{NORMALISER}latent_action.scale" in written["model"] and f"{NORMALISER}latent.scale" not in written["model"]
    )
    assert not any(key.startswith("tokenizer.") for key in written["model"])

    again = LatentDiffusionPolicy("peel", "force", vision="pose", preset="sim")
    fit_into(again, load_policy_state(out, ema=False), out)
    fit_into(again.tokenizer, load_tokenizer_state(fast), fast)
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    averaged = load_policy_state(out)
    assert all(torch.equal(averaged[key], value) for key, value in average.items())


@pytest.mark.parametrize("has_normalisers", [True, False])
def test_a_released_policy_gets_its_tokenizer(policy, has_normalisers: bool, tmp_path: Path) -> None:
    """The file of a released policy holds none: it is loaded beside, and takes over what its own file lacks."""
    for key in policy.tokenizer.normalizer.widths:  # one normaliser for both stages
        policy.tokenizer.normalizer.set(key, policy.normalizer.affine(key))
    out = saved(tmp_path / "policy.ckpt", model=export_policy(policy_state(policy)))
    state = export_tokenizer(policy.tokenizer.state_dict())
    kept = {key: value for key, value in state.items() if has_normalisers or not key.startswith(NORMALISER)}
    fast = saved(tmp_path / "at.ckpt", model=kept)
    again = LatentDiffusionPolicy(
        "peel", "force", vision="pose", preset="sim", pretrained=str(out), tokenizer=str(fast)
    )
    for key, value in policy.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_pictures_are_normalised_as_the_file_says(tmp_path: Path) -> None:
    """Released code takes ImageNet's statistics from what the file's normaliser gives."""
    policy = fitted(DiffusionPolicy("peel", "image", preset="sim"))
    backbones = {key: group_norm_resnet18((0, 0)) for key in policy.spec.images}
    state = {k: v for k, v in policy.state_dict().items() if not k.startswith("obs_encoder")}
    for key, network in backbones.items():
        state |= {f"obs_encoder.key_model_map.{key}.{name}": value for name, value in network.state_dict().items()}
    for image_norm, scale in (("corrected", 1), ("reference", 2)):
        written = export_policy(state, image_norm=image_norm)
        assert written[f"{NORMALISER}left_wrist_img.scale"].tolist() == [scale]
        assert written[f"{NORMALISER}left_gripper1_img.scale"].tolist() == [2]  # a gel is brought to [-1, 1] by both
        path, other = saved(tmp_path / "dp.ckpt", model=written), {"corrected", "reference"} - {image_norm}
        load_policy_state(path, image_norm=image_norm)
        with pytest.raises(UserError, match=f"trained with image_norm {image_norm}, this model has {min(other)}"):
            load_policy_state(path, image_norm=min(other))


def test_export_of_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = fitted(Tokenizer("wipe", "gelsight"))
    source = checkpoint(module, tmp_path / "last.ckpt")
    assert room(source) == "rdp"
    assert main([str(source), str(tmp_path / "out.ckpt")]) == 0
    assert "14,522" in capsys.readouterr().out
    read = load_tokenizer_state(tmp_path / "out.ckpt")
    assert all(torch.equal(read[key], value) for key, value in module.state_dict().items())


def test_code_is_refused_and_the_way_out_is_named(tmp_path: Path) -> None:
    torch.save({"cfg": date(2025, 1, 1), "state_dicts": {}}, tmp_path / "latest.ckpt")
    for load in (load_policy_state, load_tokenizer_state):
        with pytest.raises(
            UserError, match=r"latest.ckpt: refused, it holds \S*date\S* besides weights(.|\n)*dill"
        ) as error:
            load(tmp_path / "latest.ckpt")
        assert f"torch.load('{tmp_path / 'latest.ckpt'}'" in str(error.value)


def test_files_that_are_something_else(policy: LatentDiffusionPolicy, tmp_path: Path) -> None:
    at, whole = released("at_peel_force"), export_policy(policy_state(policy))
    with pytest.raises(UserError, match="no such file"):
        load_policy_state(tmp_path / "none.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"broken.ckpt: refused, it is damaged"):
        load_policy_state(tmp_path / "broken.ckpt")
    with pytest.raises(UserError, match="looks like a tokenizer's file"):
        load_policy_state(saved(tmp_path / "at.ckpt", model=at))
    with pytest.raises(UserError, match="looks like a policy's file"):
        load_tokenizer_state(saved(tmp_path / "policy.ckpt", model=whole))
    with pytest.raises(UserError, match="is a checkpoint of ours"):
        load_policy_state(checkpoint(policy, tmp_path / "ours.ckpt"))
    less = {key: value for key, value in whole.items() if key != "model.final_conv.1.bias"}
    with pytest.raises(UserError, match=r"1 missing keys \(model.final_conv.1.bias\)"):
        load_policy_state(saved(tmp_path / "less.ckpt", model=less))
    with pytest.raises(UserError, match=r"1 unexpected keys \(quant.more\)"):
        load_tokenizer_state(saved(tmp_path / "more.ckpt", model=at | {"quant.more": torch.zeros(1)}))
    other = fitted(LatentDiffusionPolicy("wipe", "gelsight", vision="pose", preset="sim"))
    with pytest.raises(UserError, match=r"does not fit this model .another task.*cond_encoder"):
        fit_into(other, load_policy_state(saved(tmp_path / "peel.ckpt", model=whole)), "peel.ckpt")


def policy_state(policy: LatentDiffusionPolicy) -> dict[str, Tensor]:
    return {key: value for key, value in policy.state_dict().items() if not key.startswith("tokenizer.")}


def test_what_cannot_be_exported(policy: LatentDiffusionPolicy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="left_wrist_img has a small encoder; the released code has ResNet-18 alone"):
        export_policy(fitted(DiffusionPolicy("peel", preset="sim")).state_dict())
    with pytest.raises(UserError, match=r"params_dict.action.scale was never fitted"):
        export_tokenizer(Tokenizer("peel").state_dict())
    dp = checkpoint(fitted(DiffusionPolicy("peel", vision="pose", preset="sim")), tmp_path / "dp.ckpt")
    with pytest.raises(UserError, match="has no tokenizer inside"):
        main([str(dp), str(tmp_path / "out.ckpt"), "--tokenizer", str(tmp_path / "at.ckpt")])
    with pytest.raises(UserError, match="is the checkpoint itself"):
        main([str(dp), str(dp)])
    with pytest.raises(UserError, match="--architecture: is for CLIP models"):
        main([str(dp), str(tmp_path / "out.ckpt"), "--architecture", "RN50"])
    assert not (tmp_path / "out.ckpt").exists()


def test_the_verb_finds_the_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "clip.pt")
    assert room(tmp_path / "clip.pt") == room(tmp_path / "none.pt") == "rankclip"
    assert main([str(tmp_path / "clip.pt"), str(tmp_path / "out.pt")]) == 2  # RankCLIP's own answer
    assert "differs by" in capsys.readouterr().err
    with pytest.raises(UserError, match="mmtrain export: the following arguments are required: OUT"):
        main([str(tmp_path / "clip.pt")])
