"""Made clips with sound for tests and benchmarks: a flash and a click at the same moment, one pitch a class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.video_audio import Clip, ClipFormat

SMALL = ClipFormat(
    fps=8.0,
    seconds=3.0,
    frame_size=16,
    contrast_frames=8,
    min_shift_frames=4,
    window_frames=16,
    window_mel_frames=128,
)


class SyntheticClips:
    """Clips whose picture counts frames and whose sound clicks with flashes.

    Red is 10 times the number of the frame, green tells the class, blue is bright in a frame with a click, which comes
    at the beginning of the frame.

    Args:
        splits: number of clips of each.
        format: lengths; `SMALL` if None.
        seed: another world for another seed.
    """

    class_names = ("low", "middle", "high")
    pitches = (500.0, 1500.0, 4000.0)  # Hz of a class

    def __init__(self, splits: dict[str, int] | None = None, format: ClipFormat | None = None, seed: int = 0) -> None:
        self.splits, self.format, self.seed = dict(splits or {"train": 6, "val": 3, "test": 4}), format or SMALL, seed

    def describe(self) -> dict[str, Any]:
        """All arguments."""
        return {"made_by": "synthetic clips", "splits": self.splits, "seed": self.seed}

    def sizes(self) -> dict[str, int]:
        """Number of clips of each split."""
        return self.splits

    def clip(self, split: str, index: int) -> Clip:
        """One clip; the same for the same arguments."""
        generator = np.random.default_rng((self.seed, sorted(self.splits).index(split), index))
        label = index % len(self.class_names)
        flashes = np.sort(generator.choice(np.arange(1, self.format.frames, 2), 3, replace=False))
        frames = np.zeros((self.format.frames, 3, self.format.frame_size, self.format.frame_size), np.uint8)
        frames[:, 0] = (10 * np.arange(self.format.frames) % 250)[:, None, None]
        frames[:, 1] = 80 * label
        frames[flashes, 2] = 255
        time = np.arange(self.format.samples) / self.format.sample_rate
        audio = 1e-4 * generator.standard_normal(len(time))
        for onset in flashes / self.format.fps:
            since = time - onset
            audio += (since >= 0) * np.exp(-30 * since.clip(0)) * np.sin(2 * np.pi * self.pitches[label] * since) / 4
        onsets = [float(t) for t in flashes / self.format.fps]
        return Clip(f"{split}_{index:05d}", frames, audio.astype(np.float32), label=label, onsets=onsets)


class MeanColours:
    """Features float32 [..., T, 3] of synthetic clips: number of the frame, class, flash; an extractor for tests."""

    def describe(self) -> dict[str, Any]:
        """What the features are."""
        return {"extractor": "mean colours"}

    def extract(self, frames: np.ndarray | Tensor) -> Tensor:
        """Of frames uint8 [..., T, 3, H, W]."""
        return torch.as_tensor(frames).float().mean((-2, -1)) / torch.tensor([10.0, 80.0, 255.0])
