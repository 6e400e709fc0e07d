"""Force plots, bars and videos, read back from disk."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from mmtrain.config_errors import UserError
from mmtrain.rdp import figures
from mmtrain.rdp.figures import force_plot, score_bars, write_video


def moving_square(frames: int = 12, height: int = 64, width: int = 96) -> np.ndarray:
    """A red square that moves to the right over grey."""
    video = np.full((frames, height, width, 3), 90, np.uint8)
    for t in range(frames):
        video[t, 20:40, 4 + 5 * t : 24 + 5 * t] = (230, 30, 30)
    return video


def decoded(path: Path) -> tuple[np.ndarray, str, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        name, rate = stream.codec_context.name, float(stream.average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), name, rate


@pytest.mark.parametrize("encoders", [figures.ENCODERS, ("no_such_encoder", "mpeg4")])
def test_a_video_comes_back_with_its_frames_and_colours(tmp_path, monkeypatch, encoders) -> None:
    monkeypatch.setattr(figures, "ENCODERS", encoders)
    video = moving_square()
    path = write_video(tmp_path / "new" / "video.mp4", video, 24)
    got, name, rate = decoded(path)
    assert got.shape == video.shape and rate == 24 and name == ("mpeg4" if encoders[0].startswith("no") else "h264")
    assert np.abs(got.astype(int) - video).mean() < 6, "red stays red, and moves"
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_odd_sizes_grow_by_one_pixel(tmp_path: Path) -> None:
    got, _, _ = decoded(write_video(tmp_path / "odd.mp4", moving_square(5, 63, 95), 10))
    assert got.shape == (5, 64, 96, 3)


def test_no_encoder_and_wrong_frames_are_named_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    for wrong in (np.zeros((2, 8, 8, 3)), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            write_video(tmp_path / "wrong.mp4", wrong)
    monkeypatch.setattr(figures, "ENCODERS", ("no_such_encoder",))
    with pytest.raises(UserError, match="no encoder of no_such_encoder"):
        write_video(tmp_path / "none.mp4", moving_square())
    assert not list(tmp_path.iterdir())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def amount(path: Path, colour: str) -> int:
    """Pixels near a colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(path) - wanted).max(-1) < 40).sum())


def test_force_plot_shows_curve_band_and_perturbation(tmp_path: Path) -> None:
    frames = np.arange(100)
    force = 5 + 2 * np.sin(frames / 10)
    bare = force_plot(tmp_path / "bare.png", frames, force)
    full = force_plot(tmp_path / "full.png", frames, force, (3.0, 12.0), 40)
    assert amount(bare, figures.BLUE) > 100 and amount(bare, figures.VERMILLION) == 0
    assert amount(full, figures.VERMILLION) > 50
    assert (pixels(full) != pixels(bare)).any(-1).mean() > 0.2, "the band is shaded"
    three = force_plot(tmp_path / "three.png", [frames] * 3, [force] * 3, None, [-1, 5, 9], titles=["a", "b", "c"])
    assert pixels(three).shape[0] > 2 * pixels(bare).shape[0]
    force_plot(tmp_path / "arms.png", frames, np.stack([force, force / 2], 1))
    with pytest.raises(ValueError, match="episode 0 has 100 frames and 99 forces"):
        force_plot(tmp_path / "x.png", frames, force[:99])


def test_bars_of_methods_and_gaps(tmp_path: Path) -> None:
    cells = {"no_perturb": (0.9, 0.8, 0.95), "perturb_after_contact": (0.5, 0.4, 0.6)}
    path = score_bars(tmp_path / "bars.png", {"RDP": cells, "DP": {"no_perturb": (0.4, 0.3, 0.5)}}, "wipe $x_1$")
    assert amount(path, figures.VERMILLION) > 3 * amount(path, figures.BLUE) / 2 > 1000
    score_bars(tmp_path / "nan.png", {"": {"all": (float("nan"),) * 3}})
