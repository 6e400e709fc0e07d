"""The negatives of CAVP's loss are the right ones, and ways to save memory change no gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.difffoley.cavp import CavpNetwork, encode_clips
from mmtrain.difffoley.losses import cavp_loss, semantic_contrast, temporal_contrast

CLIPS = 3


def test_temporal_negatives_are_the_clips_of_the_same_video() -> None:
    generator = torch.Generator().manual_seed(0)
    video, audio = (F.normalize(torch.randn(12, 8, generator=generator), dim=-1) for _ in range(2))
    scale = torch.tensor(5.0)
    alone = [semantic_contrast(video[i : i + CLIPS], audio[i : i + CLIPS], scale) for i in range(0, len(video), CLIPS)]
    together = temporal_contrast(video, audio, scale, CLIPS)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    with pytest.raises(ValueError, match="multiple"):
        temporal_contrast(video[:5], audio[:5], scale, CLIPS)


def gradients(network: CavpNetwork, frames: Tensor, mel: Tensor, micro_batch: int | None = None) -> dict[str, Tensor]:
    network.zero_grad()
    loss, _ = cavp_loss(*encode_clips(network, frames, mel, micro_batch), network.logit_scale.exp(), 2)
    loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def clips(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (number, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return frames, torch.rand(number, 128, 32, generator=generator, dtype=torch.float64)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-6, msg=name)


def copy_of(network: CavpNetwork, **settings: bool) -> CavpNetwork:
    copy = CavpNetwork(4, 4, 16, **settings).double()
    copy.load_state_dict(network.state_dict())
    return copy


def test_micro_batches_keep_all_negatives() -> None:
    network = (
        CavpNetwork(4, 4, 16).double().eval()
    )  # in evaluation mode BatchNorm does not tie the clips of a micro-batch
    frames, mel = clips(4)
    whole = gradients(network, frames, mel)
    assert_same(gradients(copy_of(network).eval(), frames, mel, micro_batch=3), whole)


def test_gradient_checkpointing_gives_the_same_gradients_and_statistics() -> None:
    torch.manual_seed(0)
    network = CavpNetwork(4, 4, 16).double()
    other = copy_of(network, gradient_checkpointing=True)
    frames, mel = clips(4)
    torch.manual_seed(5)  # dropout
    whole = gradients(network, frames, mel)
    torch.manual_seed(5)
    assert_same(gradients(other, frames, mel), whole)
    for name, value in network.state_dict().items():  # BatchNorm counts the batch once
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)
    both = copy_of(network, gradient_checkpointing=True)
    before = both.video_encoder.conv1.bn.num_batches_tracked.item()
    gradients(both, frames, mel, micro_batch=2)
    assert both.video_encoder.conv1.bn.num_batches_tracked.item() == before + 2
