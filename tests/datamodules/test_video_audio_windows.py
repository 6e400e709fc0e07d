"""Which part of a clip an item is cut from: ranges of the paper, picture and sound at the same instant."""

from dataclasses import replace

import numpy as np
import pytest

from datamodules.video_audio_windows import (
    contrast_starts,
    shifted_window,
    single_window,
    split_and_merge,
    stored_mel_frames,
)
from mmtrain.config_errors import UserError
from mmtrain.video_audio import ClipFormat

PAPER = ClipFormat()
IMPACTS = ClipFormat(fps=8, seconds=5, frame_size=64, window_mel_frames=256)
NUMBERS = np.random.default_rng(0)


def test_contrast_starts_are_those_of_the_paper() -> None:
    drawn = np.array([contrast_starts(PAPER, 3, NUMBERS) for _ in range(3000)])
    assert drawn.min(axis=0).tolist() == [0, 8, 16] and drawn.max(axis=0).tolist() == [8, 16, 24]
    assert (np.diff(drawn, axis=1) >= 8).all()
    two = np.array([contrast_starts(PAPER, 2, NUMBERS) for _ in range(3000)])
    assert two.min(axis=0).tolist() == [0, 8] and two.max(axis=0).tolist() == [16, 24]
    with pytest.raises(UserError, match="clips: 4 items"):
        contrast_starts(replace(PAPER, min_shift_frames=9), 4, NUMBERS)


@pytest.mark.parametrize("form", [PAPER, IMPACTS])
def test_aligned_windows_begin_at_the_same_instant(form: ClipFormat) -> None:
    parts = [single_window(form, NUMBERS) for _ in range(500)]
    parts += [part for _ in range(500) for part in split_and_merge(form, NUMBERS)]
    for part in parts:
        assert abs(part.feature_start / form.fps - part.mel_start / form.mel_rate) <= 0.5 / form.mel_rate + 1e-9
        assert 0 <= part.feature_start <= form.frames - part.features
        assert 0 <= part.mel_start <= stored_mel_frames(form) - part.mel_frames
    assert {part.feature_start for part in parts[:500]} == set(range(8))


@pytest.mark.parametrize("aligned", [True, False])
def test_merged_parts_fill_one_window_and_last_two_seconds(aligned: bool) -> None:
    for _ in range(500):
        first, second = split_and_merge(PAPER, NUMBERS, aligned)
        assert first.features + second.features == 32 and first.mel_frames + second.mel_frames == 512
        assert 125 <= first.mel_frames <= (384 if aligned else 386)
        if aligned:  # the boundary lies at the same instant in both, too
            assert abs(first.features / 4 - first.mel_frames / 62.5) < 0.00801


def test_released_windows_floor_each_start_for_itself() -> None:
    parts = [single_window(PAPER, NUMBERS, aligned=False) for _ in range(2000)]
    lags = np.array([part.mel_start / 62.5 - part.feature_start / 4 for part in parts])
    assert lags.min() > -0.016 and 0.22 < lags.max() < 0.25
    assert max(part.mel_start for part in parts) <= 625 - 512 and max(p.feature_start for p in parts) <= 7


@pytest.mark.parametrize("form", [PAPER, IMPACTS])
@pytest.mark.parametrize("start", [None, 0])
def test_shifted_features_are_cut_from_the_clip_half_a_second_away(form: ClipFormat, start: int | None) -> None:
    for _ in range(300):
        part, feature, rotation = shifted_window(form, NUMBERS, 0.5, start)
        assert rotation == 0 and 0 <= feature <= form.frames - form.window_frames
        assert abs(feature - part.feature_start) / form.fps >= 0.5
        assert start is None or part.feature_start == start


def test_without_room_features_are_rotated() -> None:
    no_room = replace(PAPER, seconds=8.192)
    shifts = {shifted_window(no_room, NUMBERS, 0.5)[2] for _ in range(500)}
    assert shifts == set(range(2, 17))  # half a second to half a window
