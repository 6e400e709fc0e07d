"""How video clips with sound are cut in all stages of Diff-Foley, and what one clip holds: data and models share it.

The defaults are the paper's: 10 s at 4 frames/s and 16 kHz; contrast over 16 frames, diffusion over 32 features, which
span 8.000 s, and 512 mel frames, which span 8.192 s.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from mmtrain.config_errors import UserError

CONTRAST_HOP, WINDOW_HOP = 250, 256  # samples between mel frames of `mel_cavp` and `mel_ldm`


@dataclass(frozen=True)
class ClipFormat:
    """Units and lengths.

    Args:
        fps: video frames, and so features, a second.
        seconds: length of a clip.
        frame_size: height and width of the frames; the aspect is not kept.
        sample_rate: of the sound, in Hz.
        contrast_frames: video frames of one item of contrastive training.
        min_shift_frames: least distance between two items of one clip.
        window_frames: features of one window of the diffusion model.
        window_mel_frames: mel frames, at a hop of 256, of one window.

    Raises:
        UserError: lengths that do not fit each other.
    """

    fps: float = 4.0
    seconds: float = 10.0
    frame_size: int = 224
    sample_rate: int = 16000
    contrast_frames: int = 16
    min_shift_frames: int = 8
    window_frames: int = 32
    window_mel_frames: int = 512

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise UserError(f"format.{name}: {value}, must be above 0")
        per_frame = self.sample_rate / CONTRAST_HOP / self.fps
        if per_frame != int(per_frame):
            raise UserError(
                f"format.fps: {self.fps} gives {per_frame:g} mel frames (hop {CONTRAST_HOP}, {self.sample_rate} Hz) a "
                "video frame; it must be a whole number, as 16 at 4 frames/s"
            )
        if self.contrast_frames > self.frames or self.window_frames > self.frames:
            raise UserError(
                f"format.seconds: {self.seconds} s are {self.frames} frames, fewer than contrast_frames "
                f"{self.contrast_frames} or window_frames {self.window_frames}"
            )

    @property
    def frames(self) -> int:
        """Video frames of a clip."""
        return round(self.fps * self.seconds)

    @property
    def samples(self) -> int:
        """Samples of a clip's sound."""
        return round(self.sample_rate * self.seconds)

    @property
    def mel_per_frame(self) -> int:
        """Mel frames of `mel_cavp` (hop 250) that fall on one video frame."""
        return round(self.sample_rate / CONTRAST_HOP / self.fps)

    @property
    def contrast_mel_frames(self) -> int:
        """Mel frames of one item of contrastive training: 256."""
        return self.contrast_frames * self.mel_per_frame

    @property
    def window_samples(self) -> int:
        """Samples under the mel frames of a diffusion window: 131,072."""
        return self.window_mel_frames * WINDOW_HOP

    @property
    def window_seconds(self) -> float:
        """Seconds of sound of a diffusion window: 8.192."""
        return self.window_samples / self.sample_rate

    @property
    def mel_rate(self) -> float:
        """Mel frames of `mel_ldm` a second: 62.5."""
        return self.sample_rate / WINDOW_HOP


def check_same(own: ClipFormat, other: ClipFormat | dict[str, Any], where: str) -> None:
    """Refuse a file whose clips were cut otherwise.

    Args:
        own: what this stage works with.
        other: what the file was made with.
        where: the file, as the message names it.

    Raises:
        UserError: a value differs; says which.
    """
    other = other if isinstance(other, ClipFormat) else ClipFormat(**other)
    for field in fields(ClipFormat):
        mine, theirs = getattr(own, field.name), getattr(other, field.name)
        if mine != theirs:
            raise UserError(
                f"{where}: was made with format.{field.name} {theirs}, this stage has {mine}: give both the same"
            )


@dataclass
class Clip:
    """One clip; what a source does not have, or was not asked for, is None.

    Args:
        id: unique in its set.
        frames: uint8 [T, 3, H, W].
        audio: float32 [N] in [-1, 1], mono.
        mel: stored spectrogram float32 [128, F] in [0, 1], of the preset that the source names.
        features: float32 [T, D] of the video frames.
        label: number of its class.
        onsets: times in seconds at which something is struck, where they are known.
    """

    id: str
    frames: np.ndarray | None = None
    audio: np.ndarray | None = None
    mel: np.ndarray | None = None
    features: np.ndarray | None = None
    label: int | None = None
    onsets: list[float] | None = None
