import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.normaliser import Normaliser
from mmtrain.rdp.fast_step import DecoderWeights, NumpyDecoder, decoder_weights
from mmtrain.rdp.fast_step_torch import TorchDecoder
from mmtrain.rdp.networks import TokenizerNetwork
from tests.golden import load
from tests.golden.fill import array
from tests.rdp.runtime_pieces import TOUCH, decoder, golden_affines, golden_state, golden_touch

TAGS = list(TOUCH)


def network_and_normaliser(tag: str) -> tuple[TokenizerNetwork, Normaliser]:
    state, affines = golden_state(tag), golden_affines(tag)
    width = TOUCH[tag][0]
    network = TokenizerNetwork(width, sum(TOUCH[tag][1].values()), encoder_channels=len(state["post_quant.bias"]))
    network.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    normaliser = Normaliser({key: len(affine.scale) for key, affine in affines.items()})
    for key, affine in affines.items():
        normaliser.set(key, affine)
    return network, normaliser


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("kind", ["numpy32", "numpy64", "torch"])
def test_golden(tag: str, kind: str) -> None:
    golden, touch = load(f"rdp/at_{tag}.npz"), golden_touch(tag)
    if kind == "torch":
        fast = TorchDecoder.from_network(*network_and_normaliser(tag))
    else:
        fast = decoder(tag, np.float32 if kind == "numpy32" else np.float64)
    for condition, frames, *expected in zip(
        golden["post_quant_flat"], touch, *(golden[f"last_action_from_newest_{k}"] for k in (4, 8, 20)), strict=True
    ):
        for k, last in zip((4, 8, 20), expected, strict=True):
            np.testing.assert_allclose(fast.decode(condition, frames[-k:]), last, atol=1e-5)


@pytest.mark.parametrize("tag", TAGS)
def test_golden_whole_window(tag: str) -> None:
    golden, touch, fast = load(f"rdp/at_{tag}.npz"), golden_touch(tag), decoder(tag, np.float32)
    for i, condition in enumerate(golden["post_quant_flat"]):
        np.testing.assert_allclose(fast.decode_all(condition, touch[i]), golden["action_hat"][i], atol=1e-5)
        meant = fast.decode_all(condition, touch[i, -8:], horizon=32)
        np.testing.assert_allclose(meant, golden["action_hat_padded_from_newest_8"][i], atol=1e-5)


def test_golden_of_the_latent_policy() -> None:
    """The whole policy's rows, decoded over K touch frames in order."""
    golden = load("rdp/ldp_lowdim.npz")
    affines = golden_affines("peel_force")
    for key, name in (("action", "action"), ("left_robot_tcp_wrench", "left_robot_tcp_wrench")):
        scale, offset = golden[f"norm_{name}_scale"], golden[f"norm_{name}_shift"]
        affines[key] = affines[key]._replace(scale=scale, offset=offset)
    fast = NumpyDecoder.from_state(golden_state("peel_force"), affines)
    touch = array("ldp.ext_wrench", (2, 32, 6))
    for batch in range(2):
        for k in (4, 8, 20):
            got = fast.decode_all(golden["latent_rows"][batch, 0], touch[batch, -k:])
            np.testing.assert_allclose(got, golden[f"fast_{k}_pred"][batch], atol=1e-5)


def released_form(
    network: TokenizerNetwork, normaliser: Normaliser, condition: np.ndarray, touch: np.ndarray
) -> np.ndarray:
    """Every frame's action by running PyTorch's GRU over the frames, [k, A]."""
    dtype, start, parts = next(network.parameters()).dtype, 0, []
    frames = torch.as_tensor(touch, dtype=dtype)[None]
    for key, width in normaliser.widths.items():
        if key != "action":
            parts.append(normaliser.normalise(key, frames[..., start : start + width]))
            start += width
    with torch.no_grad():
        decoded = network.decode(torch.as_tensor(condition, dtype=dtype)[None], torch.cat(parts, -1))
        return normaliser.unnormalise("action", decoded)[0].numpy()


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_carrying_the_state_is_running_the_prefix(tag: str, dtype: type, tolerance: float) -> None:
    network, normaliser = network_and_normaliser(tag)
    network.to(torch.float64 if dtype is np.float64 else torch.float32)
    fast = decoder(tag, dtype)
    touch = golden_touch(tag)[0].astype(dtype)
    condition = load(f"rdp/at_{tag}.npz")["post_quant_flat"][0]
    by_torch = released_form(network, normaliser, condition, touch)
    state = fast.start(condition)
    for k in range(1, 33):
        stepped = fast.step(state, touch[k - 1])
        np.testing.assert_allclose(stepped, fast.decode(condition, touch[:k]), atol=tolerance)
        np.testing.assert_allclose(stepped, by_torch[k - 1], atol=tolerance)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_plans_do_not_disturb_each_other(kind: str) -> None:
    fast = (
        decoder("peel_force") if kind == "numpy" else TorchDecoder.from_network(*network_and_normaliser("peel_force"))
    )
    touch = golden_touch("peel_force")
    conditions = load("rdp/at_peel_force.npz")["post_quant_flat"]
    states = [fast.start(condition) for condition in conditions]
    for frames in touch.transpose(1, 0, 2)[:10]:
        outputs = [fast.step(state, frame) for state, frame in zip(states, frames, strict=True)]
    copy = fast.fork(states[0])
    fast.advance(copy, touch[1, 20])
    for i, condition in enumerate(conditions):
        alone = fast.decode(condition, touch[i, :10])
        np.testing.assert_allclose(outputs[i], alone, atol=1e-6)
        np.testing.assert_allclose(fast.action(states[i]), alone, atol=1e-6)
    assert not np.allclose(fast.action(copy), fast.action(states[0]))


def test_a_file_for_a_loop_without_torch(tmp_path: Path) -> None:
    fast, path = decoder("lift_two"), tmp_path / "decoder.npz"
    fast.save_npz(path)
    touch, condition = golden_touch("lift_two")[0], load("rdp/at_lift_two.npz")["post_quant_flat"][0]
    np.savez(tmp_path / "input.npz", touch=touch, condition=condition)
    code = f"""
import sys
import numpy as np
import mmtrain.rdp.chunks, mmtrain.rdp.ensembling, mmtrain.rdp.frame_history, mmtrain.rdp.runtime, mmtrain.rdp.threads
from mmtrain.rdp.fast_step import NumpyDecoder
fast = NumpyDecoder.load_npz({str(path)!r}, np.float64)
data = np.load({str(tmp_path / "input.npz")!r})
print(repr(fast.decode(data["condition"], data["touch"]).tolist()), fast.touch_keys)
assert "torch" not in sys.modules and "lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{fast.decode(condition, touch).tolist()!r} {tuple(TOUCH['lift_two'][1])}"


@pytest.mark.parametrize("owner", ["", "tokenizer."])
def test_from_a_checkpoint(tmp_path: Path, owner: str) -> None:
    """A tokenizer's, and a policy's that holds a tokenizer and has normalisers of its own."""
    network, normaliser = network_and_normaliser("lift_two")
    state = {f"{owner}network.{key}": value for key, value in network.state_dict().items()}
    state |= {f"{owner}normalizer.{key}": value for key, value in normaliser.state_dict().items()}
    if owner:
        state |= {"normalizer.params_dict.left_robot_tcp_pose.scale": torch.ones(3), "model.weight": torch.ones(2)}
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state}, path)
    fast, expected = NumpyDecoder.from_checkpoint(path), decoder("lift_two", np.float32)
    assert fast.touch_keys == tuple(TOUCH["lift_two"][1])
    touch, condition = golden_touch("lift_two")[0], load("rdp/at_lift_two.npz")["post_quant_flat"][0]
    np.testing.assert_array_equal(fast.decode(condition, touch), expected.decode(condition, touch))


def test_no_touch() -> None:
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape)  # noqa: E731
    weights = DecoderWeights(
        draw(6, 3), draw(6, 2), draw(6), draw(6), draw(4, 2), draw(4), np.ones(4), np.zeros(4), np.zeros(0), np.zeros(0)
    )
    numpy, by_torch = NumpyDecoder(weights, np.float64), TorchDecoder(weights, torch.float64)
    condition = draw(3)
    np.testing.assert_allclose(
        numpy.decode(condition, np.zeros((5, 0))), by_torch.decode(condition, np.zeros((5, 0))), atol=1e-12
    )


def test_bad_input(tmp_path: Path) -> None:
    state, affines = golden_state("peel_force"), golden_affines("peel_force")
    with pytest.raises(UserError, match="expected one fast decoder"):
        decoder_weights({"encoder.weight": np.zeros(3)})
    with pytest.raises(UserError, match="no normaliser of action"):
        decoder_weights(state)
    unfitted = affines | {"action": affines["action"]._replace(scale=np.full(4, np.nan))}
    with pytest.raises(UserError, match="normaliser of action is not fitted"):
        decoder_weights(state, unfitted)
    with pytest.raises(UserError, match="action normaliser has 10 numbers, the decoder gives 4"):
        decoder_weights(state, affines | {"action": golden_affines("wipe_gelsight")["action"]})
    with pytest.raises(UserError, match=r"shape \(64,\), the decoder takes \(32,\)"):
        decoder("peel_force").start(np.zeros(64))
    with pytest.raises(UserError, match=r"nowhere.npz: no such file"):
        NumpyDecoder.load_npz(tmp_path / "nowhere.npz")
    for name, content in (("text.npz", b"hello"), ("cut.ckpt", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"text.npz: cannot be read"):
        NumpyDecoder.load_npz(tmp_path / "text.npz")
    with pytest.raises(UserError, match=r"cut.ckpt: cannot be read as a checkpoint"):
        NumpyDecoder.from_checkpoint(tmp_path / "cut.ckpt")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"other.npz: lacks \['format', 'weight_ih'"):
        NumpyDecoder.load_npz(tmp_path / "other.npz")
