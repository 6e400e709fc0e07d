"""The networks against outputs of the official modules; sizes; the parts that are ours."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from mmtrain.config_errors import UserError
from mmtrain.difffoley.first_stage import FirstStage, autoencoder_config, fade_weights, load_first_stage, tile_starts
from mmtrain.difffoley.networks import (
    AlignmentNetwork,
    ConditionEmbedder,
    FoleyUNet,
    FrameCondition,
    resample_tokens,
    times,
)
from mmtrain.difffoley.pretrained import load_alignment_network, load_foley_unet
from tests.difffoley.filling import (
    SMALL,
    assert_close,
    condition_shapes,
    filled,
    given,
    logistic,
    manifest,
    small_classifier,
    small_unet,
)
from tests.golden import load


@pytest.fixture
def unet(tmp_path: Path) -> FoleyUNet:
    state = filled(manifest("unet_small") | condition_shapes("cond_stage_model."))
    torch.save({"state_dict": state}, tmp_path / "ldm.ckpt")
    network = small_unet()
    load_foley_unet(network, tmp_path / "ldm.ckpt")
    return network


@torch.no_grad()
def test_unet(unet: FoleyUNet) -> None:
    golden, shown = load("difffoley/ldm_unet_cond_small.npz"), {}
    inner = unet.unet
    note = lambda name: lambda m, i, out: shown.__setitem__(name, out[0] if isinstance(out, tuple) else out)  # noqa: E731
    blocks = (inner.conv_in, inner.down_blocks[0].resnets[0], inner.down_blocks[0].downsamplers[0])
    blocks += (inner.down_blocks[1].attentions[0], inner.mid_block, inner.time_embedding)
    for index, block in enumerate(blocks):
        block.register_forward_hook(note(index))
    x, t, context = given("unet_x", 2, 4, 8, 16), torch.tensor([3, 741]), given("unet_context", 2, 10, 24)
    assert_close(unet(x, t, context), golden["unet_out"])
    for index in range(4):
        assert_close(shown[index].mean((-2, -1)), golden[f"unet_input_block_{index}_mean_hw"])
    assert_close(shown[4].mean((-2, -1)), golden["unet_middle_mean_hw"])
    assert_close(shown[5], golden["unet_time_embed"])
    assert_close(unet(x, t.float(), unet.null_context("embedded_zeros", 2, 10)), golden["unet_out_zero_context"])
    assert_close(inner.time_proj(t), golden["timestep_embedding_32"])
    full = AlignmentNetwork(block_out_channels=(320,), attention_levels=(False,)).time_proj
    assert_close(full(torch.tensor([0, 499.5, 999])), golden["timestep_embedding_320_float"], 3e-5)


@torch.no_grad()
def test_condition_embedder(unet: FoleyUNet) -> None:
    golden = load("difffoley/ldm_unet_cond_small.npz")
    assert_close(unet.context(given("cond_x", 2, 10, 20)), golden["cond_out"])
    assert_close(unet.null_context("raw_zeros", 2, 10), golden["cond_out_zero_input"])
    full = ConditionEmbedder()
    state = filled(condition_shapes("cond_stage_model.", 512, 768, 40))
    full.load_state_dict({name.removeprefix("cond_stage_model."): value for name, value in state.items()})
    assert_close(full(given("cond_full_x", 1, 32, 512))[..., ::16], golden["cond_full_out"])


def test_classifier(tmp_path: Path) -> None:
    golden = load("difffoley/alignment_classifier_small.npz")
    torch.save({"state_dict": filled(manifest("classifier_small") | condition_shapes("cond_model."))}, tmp_path / "c")
    network = small_classifier()
    load_alignment_network(network, tmp_path / "c")
    x, context = given("classifier_x", 3, 4, 8, 16).requires_grad_(), given("classifier_context", 3, 10, 24)
    logit = network(x, torch.tensor([0, 250, 999]), context)
    assert_close(logit.sigmoid(), golden["prob"].reshape(3))
    assert_close(torch.autograd.grad(functional.logsigmoid(logit).sum(), x)[0], golden["grad_logprob_x"])
    loss = functional.binary_cross_entropy_with_logits(logit, torch.tensor([1.0, 0.0, 1.0]))
    assert_close(loss, golden["bce_loss_labels_1_0_1"].reshape(()))
    assert_close((logit > 0).float(), golden["rounded"].reshape(3))


@torch.no_grad()
def test_autoencoder(tmp_path: Path) -> None:
    golden = load("difffoley/autoencoder_small.npz")
    torch.save({"state_dict": filled(manifest("autoencoder_small"))}, tmp_path / "ae.ckpt")
    stage = load_first_stage(tmp_path / "ae.ckpt")
    mel = logistic("ae_x", 1, 1, 16, 32)[:, 0]
    posterior = stage.autoencoder.encode(stage.picture(mel)).latent_dist
    for name in ("mean", "logvar"):
        assert_close(getattr(posterior, name), golden[name])
    assert_close(stage.autoencoder.decode(given("ae_z", 1, 4, 8, 16))[0], golden["decode_of_ae_z"])
    assert_close(stage.decode(0.18215 * given("ae_z", 1, 4, 8, 16)), golden["decode_of_ae_z"][:, 0])
    assert_close(stage.encode(mel, sample=False), 0.18215 * golden["mean"])
    torch.manual_seed(0)
    drawn = stage.encode(mel)
    torch.manual_seed(0)
    std = (0.5 * torch.as_tensor(golden["logvar"])).exp()
    assert_close(drawn, 0.18215 * (torch.as_tensor(golden["mean"]) + std * torch.randn(std.shape)))


def test_tiles_cover_a_long_latent(tmp_path: Path) -> None:
    for columns, tile, overlap in ((64, 64, 16), (65, 64, 16), (112, 64, 16), (113, 64, 16), (1000, 64, 0)):
        starts = tile_starts(columns, tile, overlap)
        assert starts[0] == 0 and starts[-1] + tile == columns
        assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))
    assert fade_weights(8, 3).tolist() == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    torch.save(filled(manifest("autoencoder_small")), tmp_path / "ae.ckpt")
    stage, z = load_first_stage(tmp_path / "ae.ckpt"), 0.18215 * given("z", 1, 4, 8, 90)
    seen = []
    stage.autoencoder.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    with torch.no_grad():
        tiled, whole = stage.decode_tiled(z, 32, 8), stage.decode(z)
        assert seen == [32] * 4 + [90]
        # apart from what depends on the tile (normalisation, attention), both are the same picture
        assert tiled.shape == whole.shape and torch.corrcoef(torch.stack([tiled, whole]).flatten(1))[0, 1] > 0.95
        # a constant decoder shows that the weights sum to 1 everywhere
        stage.decode = lambda z: z.new_full((len(z), 16, 2 * z.shape[-1]), 3.0)
        torch.testing.assert_close(stage.decode_tiled(z, 32, 8), torch.full((1, 16, 180), 3.0))


def test_patches_keep_place_and_size(tmp_path: Path) -> None:
    stage = FirstStage(autoencoder_config((32, 32, 32), 1, in_channels=1, has_mid_attention=False, patch=2)).eval()
    assert stage.patch == 2 and stage.factor == 8
    mel = torch.rand(2, 16, 32)
    torch.testing.assert_close(stage.mel(stage.picture(mel)), mel, rtol=0, atol=0)
    with torch.no_grad():
        z = stage.encode(mel)
        assert z.shape == (2, 4, 2, 4) and stage.decode(z).shape == mel.shape
    torch.save({f"first_stage.{key}": value for key, value in stage.state_dict().items()}, tmp_path / "ours.ckpt")
    read = load_first_stage(tmp_path / "ours.ckpt")
    assert read.patch == 2 and read.fingerprint() == stage.fingerprint()
    with pytest.raises(UserError, match="in_channels: 3 with patch 2"):
        autoencoder_config(patch=2)


def test_null_conditions() -> None:
    network = small_unet()
    assert network.null_context("embedded_zeros", 2, 5).abs().max() == 0
    torch.testing.assert_close(network.null_context("raw_zeros", 2, 5), network.context(torch.zeros(2, 5, 20)))
    token = network.null_context("learned", 2, 5)
    assert token.shape == (2, 5, 24) and (token == network.null_token).all()
    network(torch.randn(2, 4, 8, 8), 3.5, token).square().sum().backward()
    assert network.null_token.grad.abs().max() > 0 and network.embedder.pos_emb.weight.grad is None


def test_time_is_a_number_or_one_for_each() -> None:
    x = torch.zeros(3, 4, 8, 8)
    assert times(959.04, x).tolist() == pytest.approx([959.04] * 3)
    assert times(torch.tensor([1, 2, 3]), x).tolist() == [1, 2, 3]
    network, x, context = small_unet(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    torch.testing.assert_close(network(x, 3.5, context), network(x, torch.tensor([3.5, 3.5]), context))
    assert not torch.allclose(network(x, 3.5, context), network(x, 3.0, context), atol=1e-6)


def test_frame_condition_lands_at_its_time() -> None:
    """A feature at second 2 must come out at the columns of second 2, whatever the rates are."""
    fps, columns_a_second = 4.0, 16000 / 256 / 8
    tokens = torch.zeros(1, 32, 1)
    tokens[0, 8] = 1.0  # middle at 2.125 s
    columns = resample_tokens(tokens, 64, columns_a_second / fps)[0, :, 0]
    seconds = (torch.arange(64) + 0.5) / columns_a_second
    assert (columns * seconds).sum() / columns.sum() == pytest.approx(2.125, abs=0.02)
    late = torch.zeros(1, 32, 1)
    late[0, 30] = 1.0  # 7.625 s; stretching 8 s over 8.192 s puts it 0.18 s late
    centre = lambda c: ((c * seconds).sum() / c.sum()).item()  # noqa: E731
    assert centre(resample_tokens(late, 64, columns_a_second / fps)[0, :, 0]) == pytest.approx(7.625, abs=0.02)
    assert centre(resample_tokens(late, 64)[0, :, 0]) == pytest.approx(7.625 * 8.192 / 8, abs=0.02)
    one = FrameCondition(24, 3)(torch.zeros(2, 4, 8, 6), torch.randn(2, 1, 24))
    assert one.shape == (2, 7, 8, 6) and torch.equal(one[:, 4:, :1, :1].expand(-1, -1, 8, 6), one[:, 4:])


@pytest.mark.parametrize("build", [FoleyUNet, AlignmentNetwork])
def test_condition_channels_reach_the_output_and_pass_gradient(build: type) -> None:
    torch.manual_seed(0)
    network = build(**SMALL, condition_channels=8, columns_per_feature=1.6)
    features = torch.randn(2, 10, 20, requires_grad=True)
    y = network(torch.randn(2, 4, 8, 16), 10.0, network.context(features))
    y.square().sum().backward()
    assert y.shape == ((2, 4, 8, 16) if build is FoleyUNet else (2,))
    assert features.grad.abs().amax((0, 2)).min() > 0
    assert all(p.grad is not None for name, p in network.named_parameters() if name != "null_token")


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain, saving = small_unet().train(), FoleyUNet(**SMALL, gradient_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    for network in (plain, saving):
        network(x, 7, context).square().mean().backward()
    for a, b in zip(plain.unet.parameters(), saving.unet.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_feature_scale() -> None:
    torch.manual_seed(0)
    features = functional.normalize(torch.randn(64, 8, 512), dim=-1)
    spread = lambda scale: ConditionEmbedder(width=64, feature_scale=scale)(features).std(0).mean().item()  # noqa: E731
    assert spread(1.0) < 0.05 and spread(512**0.5) > 0.4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FoleyUNet(**SMALL | {"heads": 5}), r"network.heads: 5 does not divide \[64, 64\]"),
        (lambda: FoleyUNet(**SMALL | {"block_out_channels": (32, 48)}), r"block_out_channels: \[48\]"),
        (lambda: AlignmentNetwork(attention_levels=(True,)), "attention_levels: 1 entries"),
        (lambda: small_unet().context(torch.zeros(1, 13, 20)), "max_frames: 13 features"),
        (lambda: small_unet().context(torch.zeros(1, 3, 21)), "feature_dim: features of width 21"),
        (lambda: small_unet().null_context("zeros", 1, 1), "null_condition: zeros"),
    ],
)
def test_sizes_that_do_not_go_together(build, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()


def test_released_sizes() -> None:
    with torch.device("meta"):
        unet, classifier = FoleyUNet(), AlignmentNetwork()
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(unet.unet) == 859_520_964
    assert count(unet.embedder) == 768 * 512 + 768 + 40 * 768
    assert count(classifier) - count(classifier.embedder) == 11_450_753
    assert np.isclose(count(classifier.embedder) / 1e6, 0.28, atol=0.005)
