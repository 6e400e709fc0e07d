"""CAVP's encoders and losses against outputs of the official modules, and their names against the released manifest."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.golden
from mmtrain.difffoley.cavp import CavpNetwork
from mmtrain.difffoley.losses import cavp_loss, mean_pool_loss, semantic_contrast, temporal_semantic_loss
from mmtrain.difffoley.slowonly import SlowOnly
from tests.golden import load
from tests.golden.fill import array, fill

TRAINABLE = 113_406_593


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    path = Path(tests.golden.__file__).parent / f"difffoley/manifest_{name}.json"
    return {key: tuple(about["shape"]) for key, about in json.loads(path.read_text()).items()}


def filled(network: nn.Module, prefix: str = "") -> nn.Module:
    state = {
        key: torch.from_numpy(np.asarray(fill(prefix + key, tuple(value.shape)))).to(value.dtype)
        for key, value in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def logistic(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(1 / (1 + np.exp(-array(name, shape).astype(np.float64)))).float()


def assert_close(actual: Tensor, name: str, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual.numpy(), load("difffoley/cavp_encoders.npz")[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize(("name", "make"), [("cavp", CavpNetwork), ("slowonly_tiny_base8", lambda: SlowOnly(8))])
def test_names_and_shapes_are_the_released_ones(name: str, make) -> None:
    with torch.device("meta"):
        network = make()
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes(name)
    if name == "cavp":
        assert sum(p.numel() for p in network.parameters()) == TRAINABLE


@torch.no_grad()
def test_every_stage_of_the_video_encoder() -> None:
    network = filled(SlowOnly(8), "video_encoder.")
    video = logistic("cavp_video_tiny", 2, 3, 4, 32, 32).transpose(1, 2)
    x = network.stem(video)
    assert_close(x.unflatten(0, (2, 4)).transpose(1, 2)[..., ::2, ::2], "tiny_stem")
    for number in range(1, 5):
        x = network.stage(number, x, 4)
        assert_close(x.unflatten(0, (2, 4)).transpose(1, 2).mean(dim=(3, 4)), f"tiny_layer{number}_mean")
    assert_close(network(video).transpose(1, 2)[..., None, None], "tiny_video_out")


@torch.no_grad()
def test_full_size_encoders() -> None:
    network = filled(CavpNetwork())
    video, mel = logistic("cavp_video", 1, 16, 3, 32, 32), logistic("cavp_spec", 1, 128, 256)
    assert_close(network.video_encoder(video).transpose(1, 2)[:, ::8], "video_backbone")
    assert_close(network.encode_video(video, normalize=False), "video_frames_raw")
    assert_close(network.encode_video(video), "video_frames_norm")
    assert_close(network.encode_video(video, pool=True), "video_pooled_norm")
    assert_close(network.encode_spectrogram(mel, normalize=False), "spec_frames_raw")
    assert_close(network.encode_spectrogram(mel), "spec_frames_norm")
    assert_close(network.encode_spectrogram(mel, pool=True), "spec_pooled_norm")
    assert_close(network.encode_video(logistic("cavp_video5", 1, 5, 3, 48, 48)), "video5_frames_norm")
    assert_close(network.logit_scale.exp(), "forward_logit_scale")


def golden_losses() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in load("difffoley/cavp_losses.npz").items()}


def unit(name: str, *shape: int) -> Tensor:
    return F.normalize(torch.from_numpy(array(name, shape)).double(), dim=-1).float()


def test_loss_parts_and_gradients() -> None:
    golden = golden_losses()
    video = unit("loss_video", 12, 16)
    torch.testing.assert_close(video, golden["feat_video"], atol=1e-6, rtol=0)
    leaves = [golden["feat_video"].clone(), golden["feat_spec"].clone(), torch.tensor(1 / 0.07)]
    video, audio, scale = (leaf.requires_grad_() for leaf in leaves)
    loss, parts = cavp_loss(video, audio, scale, clips_per_video=3, intra_weight=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(golden["intra_total_loss"].item(), rel=1e-6)
    assert parts["semantic"].item() == pytest.approx(golden["intra_extra_contrast_loss"].item(), rel=1e-6)
    assert parts["temporal"].item() == pytest.approx(golden["intra_intra_contrast_loss"].item(), rel=1e-6)
    torch.testing.assert_close(video.grad, golden["intra_grad_video"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(audio.grad, golden["intra_grad_spec"], atol=1e-6, rtol=1e-5)
    assert scale.grad.item() == pytest.approx(golden["intra_grad_scale"].item(), rel=1e-5)
    assert semantic_contrast(video, audio, scale).item() == pytest.approx(golden["clip_loss"].item(), rel=1e-6)


def test_variants_of_the_released_code() -> None:
    golden, scale = golden_losses(), torch.tensor(1 / 0.07)
    video, audio = golden["feat_video"], golden["feat_spec"]
    given = (video, audio, golden["feat_video_mean"], golden["feat_spec_mean"], scale)
    loss, parts = mean_pool_loss(*given, audio_side="released_fault")
    assert loss.item() == pytest.approx(golden["intramean_total_loss"].item(), rel=1e-6)
    assert parts["temporal"].item() == pytest.approx(golden["intramean_intra_contrast_loss"].item(), rel=1e-6)
    swapped = mean_pool_loss(audio, video, given[3], given[2], scale)[1]["temporal"]
    assert mean_pool_loss(*given)[1]["temporal"].item() == pytest.approx(swapped.item(), rel=1e-6)  # no fault, no side
    frames = golden["feat_video_temporal"], golden["feat_spec_temporal"]
    loss, parts = temporal_semantic_loss(*frames, video[:3], audio[:3], scale, temporal_weight=0.5)
    assert loss.item() == pytest.approx(golden["tempsem_total_loss"].item(), rel=1e-6)
    assert parts["temporal"].item() == pytest.approx(golden["tempsem_temporal_contrast_loss"].item(), rel=1e-6)
    with pytest.raises(ValueError, match="audio_side"):
        mean_pool_loss(*given, audio_side="both")
