"""Which part of a clip becomes an item: starts for contrast, windows of the diffusion model, shifted pairs.

Pure functions of a clip's length and a random generator; nothing here reads data.
"""

from typing import NamedTuple

import numpy as np

from mmtrain.config_errors import UserError
from mmtrain.video_audio import WINDOW_HOP, ClipFormat

SHORTEST_PART = 2.0  # seconds of either part of a split-and-merge item, as in the paper


class Part(NamedTuple):
    """A run of features and the run of mel frames (`mel_ldm`) that goes with it."""

    feature_start: int
    features: int
    mel_start: int
    mel_frames: int


def contrast_starts(clip_format: ClipFormat, clips: int, generator: np.random.Generator) -> list[int]:
    """First video frames of the items of one clip, ascending, at least `min_shift_frames` apart.

    Each is uniform over what leaves room for the later ones. With the paper's format and three items: s1 in [0, 8], s2
    in [s1 + 8, 16], s3 in [s2 + 8, 24], both ends included.

    Raises:
        UserError: the clip has no room for so many.

    Example:
        >>> contrast_starts(ClipFormat(seconds=8), 3, np.random.default_rng(0))
        [0, 8, 16]
    """
    slack, shift = clip_format.frames - clip_format.contrast_frames, clip_format.min_shift_frames
    if slack < (clips - 1) * shift:
        raise UserError(
            f"clips: {clips} items of format.contrast_frames {clip_format.contrast_frames}, min_shift_frames {shift} "
            f"apart, do not fit into {clip_format.frames} frames: give fewer clips, or shorter items"
        )
    starts: list[int] = []
    for number in range(clips):
        lowest = starts[-1] + shift if starts else 0
        starts.append(int(generator.integers(lowest, slack - (clips - 1 - number) * shift, endpoint=True)))
    return starts


def last_start(clip_format: ClipFormat, features: int, mel_frames: int) -> int:
    """Last feature at which a run of `features` and, at the same instant, of `mel_frames` still fits into a clip."""
    by_sound = (stored_mel_frames(clip_format) - mel_frames) / clip_format.mel_rate * clip_format.fps
    return max(0, min(clip_format.frames - features, int(by_sound)))


def stored_mel_frames(clip_format: ClipFormat) -> int:
    """Mel frames (`mel_ldm`) of a whole clip: 625 of 10 s."""
    return 1 + (clip_format.samples - 1) // WINDOW_HOP


def mel_start(clip_format: ClipFormat, feature: int, mel_frames: int) -> int:
    """Mel frame nearest to the instant of a feature, at most half a mel frame (8 ms) off, such that the run fits."""
    return min(round(feature / clip_format.fps * clip_format.mel_rate), stored_mel_frames(clip_format) - mel_frames)


def window_at(clip_format: ClipFormat, feature: int) -> Part:
    """The window that begins at a feature, its sound at the same instant."""
    mels = clip_format.window_mel_frames
    return Part(feature, clip_format.window_frames, mel_start(clip_format, feature, mels), mels)


def single_window(clip_format: ClipFormat, generator: np.random.Generator, aligned: bool = True) -> Part:
    """One window of a clip.

    Args:
        aligned: both begin at the same instant. False is the released code: a start in samples, from which the first
            feature and the first mel frame are floored each for itself, so that the picture lies up to one video frame
            (0.25 s at 4 frames/s) ahead of the sound.
    """
    if aligned:
        last = last_start(clip_format, clip_format.window_frames, clip_format.window_mel_frames)
        return window_at(clip_format, int(generator.integers(last, endpoint=True)))
    start = int(generator.integers(max(1, clip_format.samples - clip_format.window_samples)))
    feature = int(clip_format.fps * start / clip_format.sample_rate)
    feature = min(feature, clip_format.frames - clip_format.window_frames)
    return Part(feature, clip_format.window_frames, start // WINDOW_HOP, clip_format.window_mel_frames)


def split_and_merge(clip_format: ClipFormat, generator: np.random.Generator, aligned: bool = True) -> tuple[Part, Part]:
    """Parts of two clips that make one window together, the temporal augmentation of the paper.

    Either part has at least 2 s, or a quarter of a short window.

    Args:
        aligned: the parts are whole video frames, features and sound begin at the same instant. False is the released
            code: a split in mel frames, and every start floored to the video frame before it.
    """
    frames, mels, fps = clip_format.window_frames, clip_format.window_mel_frames, clip_format.fps
    shortest = min(SHORTEST_PART, clip_format.window_seconds / 4)
    if not aligned:
        return _released_split(clip_format, generator, int(shortest * clip_format.mel_rate))
    least = max(1, int(shortest * fps))
    first = int(generator.integers(least, max(least, frames - least), endpoint=True))
    first_mels = round(first / fps * clip_format.mel_rate)
    parts = []
    for count, length in ((first, first_mels), (frames - first, mels - first_mels)):
        start = int(generator.integers(last_start(clip_format, count, length), endpoint=True))
        parts.append(Part(start, count, mel_start(clip_format, start, length), length))
    return parts[0], parts[1]


def _released_split(clip_format: ClipFormat, generator: np.random.Generator, least: int) -> tuple[Part, Part]:
    mels, per_mel = clip_format.window_mel_frames, clip_format.fps / clip_format.mel_rate
    first = int(generator.integers(least, max(least, mels - least - 1), endpoint=True))
    starts = [int(generator.integers(max(1, mels - length))) for length in (first, mels - first)]
    features = int(first * per_mel)
    return (
        Part(int(starts[0] * per_mel), features, starts[0], first),
        Part(int(starts[1] * per_mel), clip_format.window_frames - features, starts[1], mels - first),
    )


def shifted_window(
    clip_format: ClipFormat, generator: np.random.Generator, min_shift_seconds: float, start: int | None = None
) -> tuple[Part, int, int]:
    """A window whose features come from another time of the same clip, at least `min_shift_seconds` away.

    Both are cut from the clip, so that neither has a seam. Where the clip has no room for that the features of the
    window are rotated, up to half of it; the seam then tells a shifted pair without a look at the sound.

    Args:
        start: first feature of the sound's window; None draws it.

    Returns:
        The window of the sound, the first feature of the shifted picture, and by how many features to rotate it.
    """
    least = max(1, int(np.ceil(min_shift_seconds * clip_format.fps)))
    last = last_start(clip_format, clip_format.window_frames, clip_format.window_mel_frames)
    last_feature = clip_format.frames - clip_format.window_frames
    sounds = np.arange(last + 1) if start is None else np.array([start])
    sound, picture = (grid.ravel() for grid in np.meshgrid(sounds, np.arange(last_feature + 1), indexing="ij"))
    fits = abs(sound - picture) >= least
    if fits.any():
        distances = abs(sound - picture)
        distance = generator.choice(np.unique(distances[fits]))  # uniform in the shift, then in the place
        chosen = generator.choice(np.flatnonzero(distances == distance))
        return window_at(clip_format, int(sound[chosen])), int(picture[chosen]), 0
    if start is None:
        start = int(generator.integers(last, endpoint=True))
    frames = clip_format.window_frames
    rotation = int(generator.integers(min(least, frames // 2), max(least, frames // 2), endpoint=True))
    return window_at(clip_format, start), start, rotation
