"""Videos and sound files written and read back: times, rates, rotation, parts, and every kind of broken file."""

import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mmtrain.config_errors import UserError
from mmtrain.media import add_sound, duration, read_audio, read_frames, read_wav, write_video, write_wav

RATE = 16000


def grey_steps(frames: int = 40, step: int = 6, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame t is grey of brightness step * t."""
    return np.broadcast_to((np.arange(frames) * step).astype(np.uint8)[:, None, None, None], (frames, 3, height, width))


def click_at(seconds: float, length: float = 5.0) -> np.ndarray:
    sound = np.zeros(int(length * RATE), np.float32)
    at = int(seconds * RATE)
    sound[at : at + 64] = 0.8 * np.hanning(64)
    return sound


def brightness(frames: np.ndarray) -> np.ndarray:
    return frames.mean((1, 2, 3))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "new" / "clip.mp4", grey_steps(), 8, click_at(1.0), RATE)


@pytest.mark.parametrize("fps", [8, 4, 12, 30])
def test_frames_are_those_shown_at_their_time(video: Path, fps: float) -> None:
    frames = read_frames(video, fps, 32)
    assert frames.shape == (5 * fps, 3, 32, 32) and frames.dtype == np.uint8 and frames.flags.c_contiguous
    shown = np.floor(np.arange(len(frames)) * 8 / fps + 1e-6)
    assert np.abs(brightness(frames) - 6 * shown).max() < 3, "not the neighbour, which is 6 off"


def test_parts_of_pictures_and_sound_stay_in_step(video: Path) -> None:
    frames = read_frames(video, 8, 16, start=3.0, seconds=1.0)
    assert len(frames) == 8 and np.abs(brightness(frames) - 6 * np.arange(24, 32)).max() < 3
    sound = read_audio(video, RATE, start=0.9, seconds=1.0)
    assert len(sound) == RATE and abs(np.abs(sound).argmax() - (0.1 * RATE + 32)) <= 2
    assert len(read_frames(video, 8, 16, start=4.5, seconds=2.0)) == 4, "the end of the video is the end"
    assert len(read_audio(video, 8000, seconds=0.5)) == 4000


def test_sound_in_the_video_is_the_one_given(video: Path) -> None:
    sound = read_audio(video, RATE)[: 5 * RATE]
    assert sound.dtype == np.float32 and np.corrcoef(sound, click_at(1.0))[0, 1] > 0.99
    assert duration(video) == pytest.approx(5, abs=0.1)


def test_varying_frame_rate_is_read_by_time_stamps(tmp_path: Path) -> None:
    times = [0, 100, 150, 1000, 1900]  # milliseconds
    with av.open(str(tmp_path / "varying.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 32, 32, "yuv420p", Fraction(1, 1000)
        for time, picture in zip(times, grey_steps(5, 50, 32, 32), strict=True):
            frame = av.VideoFrame.from_ndarray(picture.transpose(1, 2, 0).copy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = read_frames(tmp_path / "varying.mkv", 10, 32, seconds=1.9)
    shown = [np.searchsorted(times, 100 * n, side="right") - 1 for n in range(19)]
    assert np.abs(brightness(frames) - 50 * np.array(shown)).max() < 5


def test_containers_without_index_and_with_a_late_first_time_stamp(tmp_path: Path) -> None:
    path = tmp_path / "stream.ts"  # its time stamps start at 1.4 s
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=8)
        picture.height, picture.width, picture.pix_fmt = 32, 32, "yuv420p"
        sound = container.add_stream("aac", rate=RATE, layout="stereo")
        for n, (image, part) in enumerate(zip(grey_steps(40, 6, 32, 32), click_at(1.0).reshape(40, -1), strict=True)):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(image.transpose(1, 2, 0).copy(), format="rgb24")))
            frame = av.AudioFrame.from_ndarray(np.stack([part, part]), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, n * len(part), Fraction(1, RATE)
            container.mux(sound.encode(frame))
        container.mux(picture.encode())
        container.mux(sound.encode())
    whole = read_frames(path, 8, 16)
    assert len(whole) in (40, 41), "the first is held while sound of the encoder's delay precedes it"
    for start in (0.25, 3.0):
        part = read_frames(path, 8, 16, start=start, seconds=0.5)
        np.testing.assert_array_equal(part, whole[int(8 * start) :][:4])
    places = [read_audio(path, RATE, start=start).argmax() + start * RATE for start in (0.0, 0.9)]
    assert max(places) - min(places) <= 2 and abs(places[0] - RATE) < 0.13 * RATE


def test_aspect_is_not_kept_and_rotation_is_done(tmp_path: Path) -> None:
    picture = np.zeros((8, 3, 32, 64), np.uint8)
    picture[:, 0, :, :32] = 220  # the left half is red
    path = write_video(tmp_path / "wide.mp4", picture, 4)
    frames = read_frames(path, 4, 16).astype(int)
    assert frames.shape == (8, 3, 16, 16) and frames[:, 0, :, :6].min() > 180 and frames[:, 0, :, 10:].max() < 60
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # of a version 0 track header, as players read a phone's upright video
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data[matrix : matrix + 36] = turned
    (tmp_path / "turned.mp4").write_bytes(data)
    frames = read_frames(tmp_path / "turned.mp4", 4, 16).astype(int)
    assert frames[:, 0, :6].min() > 180 and frames[:, 0, 10:].max() < 60, "turned clockwise: the top half is red"


def test_new_sound_leaves_the_pictures_untouched(video: Path, tmp_path: Path) -> None:
    path = add_sound(video, click_at(3.0), RATE, tmp_path / "new" / "clip.mp4")
    assert (read_frames(path, 8, 64) == read_frames(video, 8, 64)).all()
    assert abs(read_audio(path, RATE).argmax() - (3 * RATE + 32)) <= 2
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    silent = write_video(tmp_path / "silent.mp4", grey_steps(), 8)
    assert abs(read_audio(add_sound(silent, click_at(2.0), RATE, silent), RATE).argmax() - (2 * RATE + 32)) <= 2


def test_wav_files_come_back(tmp_path: Path) -> None:
    sound = np.clip(np.random.default_rng(0).normal(0, 0.5, 5000), -1, 1)
    path = write_wav(tmp_path / "new" / "a.wav", sound, 22050)
    for source in (path, path.read_bytes()):
        got, rate = read_wav(source)
        assert rate == 22050 and got.dtype == np.float32 and np.abs(got - sound).max() < 1e-4
    np.testing.assert_allclose(read_audio(path, 22050), got, atol=1e-6)
    assert write_wav(path, [2.0, -2.0], RATE) and np.abs(np.abs(read_wav(path)[0]) - 1).max() < 1e-4, "cut, not wrapped"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width_and_two_channels_reads_as_ffmpeg_does(tmp_path: Path, width: int) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((2, width, RATE, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(width).bytes(2 * width * 300))
    got, _ = read_wav(tmp_path / "a.wav")
    assert got.shape == (300,)
    np.testing.assert_allclose(got, read_audio(tmp_path / "a.wav", RATE), atol=1e-5)


def test_broken_files_are_named(tmp_path: Path, video: Path) -> None:
    sound = write_wav(tmp_path / "sound.wav", click_at(0.1, 1.0), RATE)
    silent = write_video(tmp_path / "silent.mp4", grey_steps(8), 8)
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:2000])
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match=r"none\.mp4: no such file"):
        read_frames(tmp_path / "none.mp4", 4, 16)
    for name in ("text.mp4", "cut.mp4", "empty.mp4"):
        for read in (lambda path: read_frames(path, 4, 16), lambda path: read_audio(path, RATE), duration):
            with pytest.raises(UserError, match=f"{name}: cannot be read as video or sound"):
                read(tmp_path / name)
    with pytest.raises(UserError, match=r"sound\.wav: has no video stream"):
        read_frames(sound, 4, 16)
    with pytest.raises(UserError, match=r"silent\.mp4: has no audio stream"):
        read_audio(silent, RATE)
    with pytest.raises(UserError, match=r"silent\.mp4: video without frames from 7 s on"):
        read_frames(silent, 4, 16, start=7.0)
    with pytest.raises(UserError, match=r"sound\.wav: audio stream without sound from 7 s on"):
        read_audio(sound, RATE, start=7.0)
    with pytest.raises(UserError, match=r"sound\.wav: has no video stream"):
        add_sound(sound, click_at(0.1), RATE, tmp_path / "out.mp4")
    for bad in (tmp_path / "text.mp4", b"RIFF", tmp_path / "none.wav"):
        with pytest.raises(UserError, match=r"not a PCM WAV|no such file"):
            read_wav(bad)


def test_wrong_arrays_are_told_and_leave_nothing(tmp_path: Path) -> None:
    for wrong in (np.zeros((2, 3, 8, 8)), np.zeros((0, 3, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            write_video(tmp_path / "a.mp4", wrong, 8)
    with pytest.raises(ValueError, match="not finite"):
        write_video(tmp_path / "a.mp4", grey_steps(4), 8, [0.0, np.nan])
    with pytest.raises(ValueError, match=r"waveform must be \[N\]"):
        write_wav(tmp_path / "a.wav", np.zeros((1, 8)), RATE)
    with pytest.raises(UserError, match="no encoder of no_such_encoder"):
        write_video(tmp_path / "a.mp4", grey_steps(4), 8, encoders=("no_such_encoder",))
    assert not list(tmp_path.iterdir())
