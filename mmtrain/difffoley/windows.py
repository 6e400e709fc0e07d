"""Where the windows of a long clip lie, and the network over all of them as one function.

T features of the clip, h x L latent, K windows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.difffoley.guidance import GuidedDenoiser
from mmtrain.video_audio import WINDOW_HOP, ClipFormat


@dataclass(frozen=True)
class Window:
    """Where a window of a long clip starts: in latent columns, and in features."""

    column: int
    feature: int


def sound_frames(features: int, clip: ClipFormat) -> int:
    """Mel frames whose waveform, (F - 1) * 256 samples, is no shorter than the video of so many features."""
    return math.ceil(features / clip.fps * clip.sample_rate / WINDOW_HOP) + 1


def plan_windows(features: int, clip: ClipFormat, factor: int = 8) -> tuple[list[Window], int]:
    """Windows that cover a clip, each overlapping the next by about half, and the latent's columns L.

    A window starts at a feature, and its first column is the nearest to that feature's time. So picture and sound are
    no further apart than half a column (0.064 s), in the last window a column, however long the clip, although the
    features of a window span 8.000 s and its columns 8.192 s.

    Args:
        features: T of the whole clip.
        factor: mel frames of a latent column.

    Raises:
        UserError: `window_mel_frames` is no multiple of `factor`.
    """
    width, rest = divmod(clip.window_mel_frames, factor)
    if rest:
        raise UserError(f"format.window_mel_frames: {clip.window_mel_frames}, must be a multiple of {factor}")
    needed = math.ceil(sound_frames(features, clip) / factor)
    columns_per_feature = clip.sample_rate / clip.fps / (factor * WINDOW_HOP)
    last = max(features - clip.window_frames, 0)
    firsts = [*range(0, last, max(clip.window_frames // 2, 1)), last]
    windows = [Window(round(first * columns_per_feature), first) for first in firsts]
    end = needed - width
    if end > windows[-1].column:  # rounded down, or windows with less sound than picture: the clip's end is uncovered
        windows[max(len(windows) - 1, 1) :] = [Window(end, min(round(end / columns_per_feature), last))]
    return windows, windows[-1].column + width


def consecutive_windows(features: int, clip: ClipFormat) -> list[Window]:
    """As released: features 0..31, 32..63 and so on, each a latent of its own; a shorter tail is dropped.

    Raises:
        UserError: fewer features than a window.
    """
    if features < clip.window_frames:
        raise UserError(
            f"sampler.long: consecutive, needs at least {clip.window_frames} video frames at {clip.fps:g} frames/s, "
            f"got {features}: give overlapping"
        )
    return [Window(0, first) for first in range(0, features - clip.window_frames + 1, clip.window_frames)]


class WindowedDenoiser:
    """Noise, or velocity, in the latent of a whole clip: the average over its windows, weighted with Hann windows.

    Args:
        denoise: of all K windows.
        windows: the K starts.
        columns: L of the clip's latent.
        width: columns of a window.
        batch: windows of one call of the network.
        like: tensor on the device of the latents.
    """

    def __init__(
        self, denoise: GuidedDenoiser, windows: list[Window], columns: int, width: int, batch: int, like: Tensor
    ) -> None:
        self.denoise, self.windows, self.width, self.batch = denoise, windows, width, batch
        # Samples at half columns: a Hann window that is nowhere 0, so that the clip's ends have a weight.
        centres = (torch.arange(width, dtype=torch.float64) + 0.5) / width
        hann = torch.sin(math.pi * centres) ** 2
        total = torch.zeros(columns, dtype=torch.float64)
        for window in windows:
            total[window.column : window.column + width] += hann
        shares = [hann / total[window.column : window.column + width] for window in windows]
        self.shares = torch.stack(shares).to(like.device, torch.float32)  # [K, width]; add to 1 at every column

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """x [1, 4, h, L] -> [1, 4, h, L]."""
        result = torch.zeros_like(x)
        for first in range(0, len(self.windows), self.batch):
            rows = slice(first, first + self.batch)
            crops = [x[..., window.column : window.column + self.width] for window in self.windows[rows]]
            outputs = self.denoise(torch.cat(crops), t, rows) * self.shares[rows, None, None]
            for window, output in zip(self.windows[rows], outputs, strict=True):
                result[0, ..., window.column : window.column + self.width] += output
        return result
