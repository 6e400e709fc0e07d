"""A world of impacts that a laptop can learn: bodies of eight materials bounce in a box, seen and heard.

Everything is computed from (seed, split, number of the clip): the same clip always comes out the same, and the times of
the contacts are known exactly. The class (material) can be seen by shape, colour and pattern and heard by modes and
decay; the size of a body sets its pitch, the speed of a contact its loudness.
"""

import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from datamodules.impact_physics import simulate
from datamodules.impact_pictures import frames_of
from datamodules.impact_sounds import MATERIALS, sound_of
from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat

VERSION = 1  # raise when the same arguments would give other clips
SIZES = {"train": 3000, "val": 100, "test": 200}
FORMAT = ClipFormat(fps=8.0, seconds=5.0, frame_size=64, window_frames=32, window_mel_frames=256)


class Impacts:
    """Maker of clips for the data modules.

    Args:
        splits: number of clips by split; classes take turns, so they are balanced.
        seed: of the whole world.
        format: frames a second, length, frame size and sample rate of the clips; None: 8 frames/s, 5 s, 64 px, 16 kHz.

    Raises:
        UserError: a number of clips below 0.

    Example:
        >>> clip = Impacts({"test": 1}).clip("test", 0)
        >>> clip.frames.shape, clip.audio.shape
        ((40, 3, 64, 64), (80000,))
    """

    def __init__(
        self, splits: Mapping[str, int] | None = None, seed: int = 0, format: ClipFormat | None = None
    ) -> None:
        self.splits = dict(SIZES if splits is None else splits)
        for split, number in self.splits.items():
            if number < 0:
                raise UserError(f"splits.{split}: {number}: must be a number of clips, 0 or more")
        self.seed = seed
        self.format = FORMAT if format is None else settings(ClipFormat, format)
        self.class_names = [material.name for material in MATERIALS]

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on, in plain types: kept beside stored clips to tell them apart."""
        return {
            "maker": "impacts",
            "version": VERSION,
            "seed": self.seed,
            "splits": dict(self.splits),
            "format": asdict(self.format),
            "class_names": list(self.class_names),
        }

    def sizes(self) -> dict[str, int]:
        """Return the number of clips of each split."""
        return dict(self.splits)

    def clip(self, split: str, index: int) -> Clip:
        """Return one clip with frames, audio, label and onsets (the times of its contacts, in seconds).

        Raises:
            UserError: there is no such split.
            IndexError: `index` is not in [0, size of the split).
        """
        if split not in self.splits:
            raise UserError(f"split: {split}: must be one of {', '.join(self.splits)}")
        if not 0 <= index < self.splits[split]:
            raise IndexError(f"index: {index}: must be in [0, {self.splits[split]})")
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), index])
        label = index % len(MATERIALS)
        scene = simulate(rng, self.format.seconds)
        form = self.format
        return Clip(
            id=f"{split}-{index:06d}",
            frames=frames_of(scene, MATERIALS[label].name, rng, form.frames, form.fps, form.frame_size),
            audio=sound_of(scene, MATERIALS[label], rng, form.seconds, form.sample_rate),
            label=label,
            onsets=[float(contact.time) for contact in scene.contacts],
        )
