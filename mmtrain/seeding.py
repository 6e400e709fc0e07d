"""Random numbers that belong to a sample: the same whatever its batch, its process or the number of processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN_RATIO = 0.6180339887498949


def clip_generator(seed: int, clip: int, sample: int = 0) -> torch.Generator:
    """Generator on the CPU of one sample of one clip.

    Args:
        seed: of the whole run.
        clip: number of the clip.
        sample: number of the sample of that clip.
    """
    # 2654435761 is Knuth's multiplicative constant: neighbouring clips begin far from each other
    mixed = (int(seed) * 1_000_003 + int(clip) * 2_654_435_761 + int(sample) * 97_911_103) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def clip_noise(
    ids: Tensor | Sequence[int],
    shape: Sequence[int],
    seed: int = 0,
    sample: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Standard normal noise [B, *shape], a row a clip, drawn on the CPU so that every device gets the same.

    Args:
        ids: [B] numbers of the clips.
        shape: of one clip's noise.
        seed, sample: see `clip_generator`.
        device: where the noise goes.
    """
    rows = [torch.randn(tuple(shape), generator=clip_generator(seed, int(clip), sample)) for clip in ids]
    return torch.stack(rows).to(device)


def spread_times(ids: Tensor) -> Tensor:
    """[B] numbers in [0, 1), one a clip, that cover the interval evenly for consecutive clips (golden-ratio sequence).

    >>> spread_times(torch.arange(3))
    tensor([0.5000, 0.1180, 0.7361])
    """
    return ((ids.double() * GOLDEN_RATIO + 0.5) % 1.0).float()
