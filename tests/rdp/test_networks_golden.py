"""The networks against outputs of the official modules, and their names and shapes against the released manifests."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tests.golden
from mmtrain.config_errors import UserError
from mmtrain.diffusion import noised, sample, timesteps
from mmtrain.normaliser import action_limits, limits
from mmtrain.rdp.losses import denoising_loss, tokenizer_loss
from mmtrain.rdp.networks import ConditionalUnet1D, TokenizerNetwork
from mmtrain.rdp.observation_encoder import ObservationEncoder
from mmtrain.rdp.vq import ResidualVQ
from tests.golden import load
from tests.golden.fill import array, fill

TOLERANCE = 2e-5
UNETS = {"latent_k3": (16, 8, 3), "action_k5": (4, 16, 5)}  # channels, steps, kernel
TOKENIZERS = {  # action, encoder channels, touch, parameters
    "peel_force": (4, 4, {"left_robot_tcp_wrench": 6}, 8_588),
    "wipe_gelsight": (10, 8, {"left_gripper1_marker_offset_emb": 15}, 14_522),
    "lift_two": (8, 8, {"left_gripper2_marker_offset_emb": 15, "right_gripper1_marker_offset_emb": 15}, 15_576),
}
CAMERA = (240, 320)
POLICIES = {  # pictures, numbers of the low-dimensional streams, channels, kernel
    "dp_peel": (["left_wrist_img"], 4, 4, 5),
    "dp_peel_tactile_img": (["left_wrist_img", "left_gripper1_img"], 4, 4, 5),
    "dp_peel_tactile_emb": (["left_wrist_img"], 19, 4, 5),
    "ldp_peel_force": (["left_wrist_img"], 10, 16, 3),
    "ldp_peel_gelsight": (["left_wrist_img"], 19, 16, 3),
    "ldp_wipe_force": (["left_wrist_img"], 16, 16, 3),
    "ldp_lift_tactile": (["external_img", "left_wrist_img", "right_wrist_img"], 38, 16, 3),
}


def manifest(name: str) -> dict[str, dict]:
    return json.loads((Path(tests.golden.__file__).parent / f"rdp/manifest_{name}.json").read_text())


def shapes(name: str) -> dict[str, list[int]]:
    """Names and shapes of a manifest; the empty `_dummy_variable`s are no weights."""
    return {k: v["shape"] for k, v in manifest(name).items() if k != "_info" and not k.endswith("_dummy_variable")}


def filled(network: nn.Module, prefix: str = "") -> nn.Module:
    state = {k: torch.from_numpy(fill(prefix + k, tuple(v.shape))) for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    return network.eval()


def given(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(array(name, shape))


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tag", UNETS)
def test_unet(tag: str) -> None:
    channels, steps, kernel = UNETS[tag]
    golden = load(f"rdp/unet_{tag}.npz")
    unet = filled(ConditionalUnet1D(channels, 26, 32, (32, 64, 128), kernel))
    assert {k: list(v.shape) for k, v in unet.state_dict().items()} == shapes(f"unet_{tag}")
    x, noise = given(f"unet.{tag}.x", 2, steps, channels), given(f"unet.{tag}.noise", 2, steps, channels)
    condition = given(f"unet.{tag}.cond", 2, 26)
    for step in (0, 37, 99):
        assert_close(unet(x, step, condition), golden[f"eps_t{step}"])
        assert_close(unet(x, torch.tensor([step, step]), condition), golden[f"eps_t{step}"])
    assert_close(noised(x, noise, torch.tensor([37, 37])), golden["noisy_t37"], 1e-6)
    assert timesteps(8) == golden["ddim_8_timesteps"].tolist()
    assert_close(sample(lambda y, t: unet(y, t, condition), x, 8), golden["ddim_8"], 1e-4)
    for count in (8, 100):
        assert_close(sample(unet.denoiser(condition, timesteps(count)), x, count), golden[f"ddim_{count}"], 1e-4)


def test_layouts_agree() -> None:
    torch.manual_seed(0)
    unet = ConditionalUnet1D(6, 10, 32, (32, 64, 128), 3)
    x, condition = torch.randn(3, 8, 6), torch.randn(3, 10)
    runs = []
    for arrange in (False, False, True):
        unet.is_channels_last = bool(runs)
        if arrange:
            unet.arrange_for_cpu_inference()
        unet.zero_grad()
        y = unet(x, torch.tensor([3, 50, 99]), condition)
        y.square().mean().backward()
        runs.append([y.detach(), *(p.grad.clone() for p in unet.parameters())])
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tag", TOKENIZERS)
def test_tokenizer(tag: str) -> None:
    action_dim, channels, touch, parameters = TOKENIZERS[tag]
    golden = load(f"rdp/at_{tag}.npz")
    network = filled(TokenizerNetwork(action_dim, sum(touch.values()), channels))
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == shapes(f"at_{tag}")
    assert sum(p.numel() for p in network.parameters()) == parameters

    scaling = action_limits(array(f"at.{tag}.fit.action", (200, action_dim)))
    scale, offset = torch.from_numpy(scaling.scale), torch.from_numpy(scaling.offset)
    assert_close(scale, golden["n_action_scale"], 1e-6)
    assert_close(offset, golden["n_action_offset"], 1e-6)
    action = given(f"at.{tag}.action", 3, 32, action_dim) * scale + offset
    assert_close(action, golden["normalized_action"])
    parts = []
    for key, width in touch.items():
        fitted = limits(array(f"at.{tag}.fit.{key}", (200, width)))
        parts.append(given(f"at.{tag}.{key}", 3, 32, width) * torch.from_numpy(fitted.scale) + fitted.offset)
    seen = torch.cat(parts, -1).float()
    assert_close(seen, golden["temporal_cond"])

    assert_close(network.encoder(action.transpose(1, 2)).transpose(1, 2), golden["encoder_out"])
    encoded = network.encode(action)
    assert_close(encoded, golden["moments"])
    mean, logvar = network.moments(encoded)
    assert_close(mean, golden["latent_mean"])
    assert_close(logvar, golden["latent_logvar"])
    assert_close(mean.transpose(1, 2).flatten(1), golden["latent_flat"])
    condition = network.condition(mean)
    assert_close(condition, golden["post_quant_flat"])
    decoded = network.decode(condition, seen)
    assert_close(decoded, golden["decoder_out"])
    in_units = lambda y: (y - offset) / scale  # noqa: E731
    assert_close(in_units(decoded), golden["action_hat"], 1e-4)
    loss, logged = tokenizer_loss(decoded, action, mean, logvar)
    assert_close(
        torch.stack([loss, logged["l1"], logged["mse"]]), [golden[f"loss_{n}"] for n in ("total", "l1", "mse")]
    )
    assert_close(logged["kl"] / golden["loss_kl"], 1.0)
    for count in (4, 8, 20):
        newest = network.decode(condition, seen[:, -count:])
        assert_close(in_units(newest[:, -1]), golden[f"last_action_from_newest_{count}"], 1e-4)
    padded = torch.cat([seen[:, -8:], seen[:, -1:].expand(-1, 24, -1)], 1)
    assert_close(in_units(network.decode(condition, padded)), golden["action_hat_padded_from_newest_8"], 1e-4)


def test_whole_latent_policy() -> None:
    """Section (h), wired by hand: observations -> UNet -> latent -> condition -> GRU."""
    golden = load("rdp/ldp_lowdim.npz")
    action, pose = (
        action_limits(array(f"ldp.fit.{name}", (200, width))) for name, width in (("action", 4), ("pose", 3))
    )
    width, wrench, latent = (
        limits(array(f"ldp.fit.{name}", (200, n))) for name, n in (("width", 1), ("wrench", 6), ("latent", 16))
    )
    scaled = lambda x, affine: x * torch.from_numpy(affine.scale) + torch.from_numpy(affine.offset)  # noqa: E731
    back = lambda y, affine: (y - torch.from_numpy(affine.offset)) / torch.from_numpy(affine.scale)  # noqa: E731
    tokenizer = filled(TokenizerNetwork(4, 6, 4))
    encoder = ObservationEncoder({}, {"gripper_width": 1, "tcp_pose": 3, "tcp_wrench": 6})
    unet = filled(ConditionalUnet1D(16, 20, 32, (32, 64, 128), 3), "model.")
    assert {f"model.{k}": list(v.shape) for k, v in unet.state_dict().items()} == shapes("ldp_lowdim")

    condition = encoder(
        {
            "tcp_pose": scaled(given("ldp.pose", 2, 2, 3), pose),
            "tcp_wrench": scaled(given("ldp.wrench", 2, 2, 6), wrench),
            "gripper_width": scaled(given("ldp.width", 2, 2, 1), width),
        }
    )
    mean, _ = tokenizer.moments(tokenizer.encode(scaled(given("ldp.action", 2, 32, 4), action)))
    clean, noise, steps = scaled(mean.transpose(1, 2), latent), given("ldp.noise", 2, 8, 16), torch.tensor([11, 73])
    loss = denoising_loss(unet(noised(clean, noise, steps), steps, condition), noise)
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)

    sampled = sample(unet.denoiser(condition, timesteps(8)), given("ldp.x_init", 2, 8, 16), 8)
    row = tokenizer.condition(back(sampled, latent).transpose(1, 2))
    assert_close(row[:, None].expand(-1, 29, -1), golden["latent_rows"], 1e-4)
    touch = scaled(given("ldp.ext_wrench", 2, 32, 6), wrench)
    planned = back(tokenizer.decode(row, touch), action)
    assert_close(planned, golden["action_pred"], 1e-4)
    assert_close(planned[:, 3:], golden["action"], 1e-4)
    for count in (4, 8, 20):
        assert_close(back(tokenizer.decode(row, touch[:, -count:]), action), golden[f"fast_{count}_pred"], 1e-4)


def test_vector_quantised_tokenizer() -> None:
    golden = load("rdp/at_vq.npz")
    network = TokenizerNetwork(4, 6, 4, quantizer="vq")
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == shapes("at_vq")
    is_filled = lambda k: not k.startswith("vq_embedding") or k.endswith("embed")  # noqa: E731
    state = {
        k: torch.from_numpy(fill(k, tuple(v.shape))) if is_filled(k) else v for k, v in network.state_dict().items()
    }
    network.load_state_dict(state)
    network.eval()
    features = network.encode(given("at.vq.action", 3, 32, 4))
    assert_close(features.transpose(1, 2), golden["encoder_out"])
    latent, loss = network.quantize(features)
    assert_close(network.condition(latent), golden["quantized_flat"])
    assert loss.item() == golden["vq_loss"] == 0
    assert network.vq_embedding(features.transpose(1, 2))[1].flatten(1).tolist() == golden["codes"].tolist()
    assert network.latent_dim == 4


def test_codebooks_follow_the_data_and_revive() -> None:
    torch.manual_seed(0)
    quantizer = ResidualVQ(4, 16, 4).train()
    centres = torch.randn(20, 4) * 3
    draw = lambda: centres[torch.randint(20, (256,))] + 0.05 * torch.randn(256, 4)  # noqa: E731
    errors = []
    for _ in range(60):
        x = draw().requires_grad_()
        y, codes, loss = quantizer(x)
        errors.append((y - x).square().mean().item())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))  # straight through
    assert errors[-1] < 0.1 * centres.var() and errors[-1] <= errors[0]
    assert codes.shape == (256, 4) and loss > 0
    book = quantizer.layers[0]._codebook
    with torch.no_grad():  # far from all data, so nobody's nearest
        book.embed[0, 3], book.embed_avg[0, 3], book.cluster_size[0, 3] = 1e3, 1e3, 0.0
    quantizer(draw())
    assert book.embed[0, 3].abs().max() < 20


@pytest.mark.parametrize("name", POLICIES)
def test_released_sizes(name: str) -> None:
    images, low_dim, channels, kernel = POLICIES[name]
    info = manifest(name)["_info"]
    with torch.device("meta"):
        encoder = ObservationEncoder(dict.fromkeys(images, CAMERA), {"rest": low_dim})
        unet = ConditionalUnet1D(channels, 2 * encoder.feature_dim, kernel_size=kernel)
    policy = nn.ModuleDict({"obs_encoder": encoder, "model": unet})
    assert {k: list(v.shape) for k, v in policy.state_dict().items()} == shapes(name)
    assert encoder.feature_dim == info["obs_feature_dim"]
    for module, key in ((policy, "total"), (unet, "unet"), (encoder, "obs_encoder")):
        assert sum(p.numel() for p in module.parameters()) == info[f"params_{key}"]


def test_symmetric_tokenizer_and_no_touch() -> None:
    network = TokenizerNetwork(4, 6, 4, 6, symmetric=True)
    action, touch = torch.randn(2, 32, 4), torch.randn(2, 32, 6)
    assert not torch.equal(network.encode(action, touch), network.encode(action, touch + 1))
    blind = TokenizerNetwork(4, 0, 4, 6)
    assert blind.decode(torch.randn(2, 32), torch.zeros(2, 7, 0)).shape == (2, 7, 4)
    assert blind.decoder.fc.bias.abs().max() == 0
    torch.testing.assert_close(blind.decoder.fc.weight @ blind.decoder.fc.weight.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenizerNetwork(4, 6, horizon=30), "horizon: 30 is not a multiple of 4"),
        (lambda: TokenizerNetwork(4, 6, quantizer="fsq"), "quantizer: fsq is not known"),
        (lambda: TokenizerNetwork(4, 0, symmetric=True), "symmetric"),
        (lambda: ConditionalUnet1D(4, 8, kernel_size=4), "kernel_size: 4 is even"),
        (lambda: ConditionalUnet1D(4, 8, down_dims=(32, 60)), r"down_dims: \[60\]"),
        (lambda: ConditionalUnet1D(4, 8, step_embed_dim=3), "step_embed_dim: 3"),
    ],
)
def test_sizes_that_do_not_go_together(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
