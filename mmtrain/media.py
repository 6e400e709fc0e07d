"""Reading and writing of videos and sound files through PyAV, which brings its own FFmpeg.

Shapes: T frames, H and W pixels, N samples. Frames are uint8 [T, 3, H, W] RGB, sound is float32 [N] mono in [-1, 1].
Time 0 of a file is that of its container, so picture and sound that start at different times stay in step.
"""

import io
import math
import wave
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import ArrayLike

from mmtrain.audio import resample
from mmtrain.config_errors import UserError

ENCODERS = ("libx264", "mpeg4")  # the first that the installed FFmpeg has; browsers play the first only
BIT_RATE, SOUND_BIT_RATE = 2_000_000, 128_000
SEEK_MARGIN = 0.5  # seconds: sound decoders need a while before the wanted place to settle
ROUNDING = 1e-3  # seconds: time stamps of some containers are whole milliseconds
GAP = 0.05  # seconds: a longer hole in the sound is filled with silence


def duration(path: Path | str) -> float:
    """Length in seconds, as the container says it, else from the last packet of picture or sound.

    Raises:
        UserError: the file is missing, cannot be read, or has neither picture nor sound.
    """
    with _opened(path) as container:
        streams = [*container.streams.video[:1], *container.streams.audio[:1]]
        if not streams:
            raise UserError(f"{path}: has no video stream and no audio stream")
        if container.duration:
            return container.duration / av.time_base
        packets = (packet for packet in container.demux(streams) if packet.pts is not None)
        end = max((float((packet.pts + (packet.duration or 0)) * packet.time_base) for packet in packets), default=0.0)
        return end - _origin(container)


def read_frames(
    path: Path | str, fps: float, size: int, start: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """Frames of a video at another rate and size.

    The frame of time t is the last whose time stamp is t or before, so videos of varying rate are read right. Both
    sides are resized to `size`, the aspect is not kept, as in the released data of Diff-Foley. A rotation that the
    file asks players for is done.

    Args:
        path: video file.
        fps: frames a second of the result.
        size: height and width of the result.
        start: time of the first frame in seconds.
        seconds: length; None is to the end.

    Returns:
        uint8 [T, 3, size, size] RGB, T = round(seconds * fps), or fewer where the video ends before; 1 at least.

    Raises:
        UserError: the file is missing or cannot be read, has no video stream, or no frame in that part.
    """
    wanted = math.inf if seconds is None else max(1, round(seconds * fps))
    frames: list[np.ndarray] = []

    def show(frame: av.VideoFrame, until: float) -> None:
        picture = None
        while len(frames) < wanted and start + len(frames) / fps < until - ROUNDING:
            picture = _picture(frame, size) if picture is None else picture
            frames.append(picture)

    with _opened(path) as container:
        stream = _first(container.streams.video, path, "video")
        stream.thread_type = "AUTO"
        shown, end = None, 0.0
        for frame, time, until in _timed(container, stream, start):
            if shown is not None:
                show(shown, time)
            shown, end = frame, until
            if len(frames) >= wanted:
                break
        if shown is not None:
            show(shown, end)
    if not frames:
        raise UserError(f"{path}: video without frames from {start:g} s on")
    return np.stack(frames)


def read_audio(path: Path | str, sample_rate: int, start: float = 0.0, seconds: float | None = None) -> np.ndarray:
    """Sound of a video or sound file: mean of the channels, resampled.

    Args:
        path: file.
        sample_rate: of the result in Hz.
        start: time of the first sample in seconds.
        seconds: length; None is to the end.

    Returns:
        float32 [N], N = round(seconds * sample_rate), or fewer where the sound ends before. Silent until the sound
        begins.

    Raises:
        UserError: the file is missing or cannot be read, has no audio stream, or no sound in that part.
    """
    parts: list[np.ndarray] = []
    have, rate = 0, 0
    with _opened(path) as container:
        stream = _first(container.streams.audio, path, "audio")
        for frame, time, _ in _timed(container, stream, start):
            rate = rate or frame.sample_rate
            enough = math.inf if seconds is None else round((seconds + SEEK_MARGIN) * rate)
            samples = _mono(frame)
            place = round((time - start) * rate)
            if have == 0 and place < 0:  # from the key frame before `start`
                samples, place = samples[-place:], 0
            if not len(samples):
                continue
            if place - have > (GAP * rate if have else 0):
                parts.append(np.zeros(place - have, np.float32))
                have = place
            parts.append(samples)
            have += len(samples)
            if have >= enough:
                break
    if not parts:
        raise UserError(f"{path}: audio stream without sound from {start:g} s on")
    sound = resample(np.concatenate(parts), rate, sample_rate).numpy()
    return sound if seconds is None else sound[: round(seconds * sample_rate)]


def write_wav(path: Path | str, waveform: ArrayLike, sample_rate: int) -> Path:
    """Write 16-bit PCM; louder than 1 is cut. Returns the path; its folder is made.

    Args:
        path: file to write.
        waveform: float [N].
        sample_rate: Hz.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    path, content = Path(path), encode_wav(waveform, sample_rate)
    with _part_file(path) as part:
        part.write_bytes(content)
    return path


def encode_wav(waveform: ArrayLike, sample_rate: int) -> bytes:
    """A WAV file of 16-bit PCM as bytes; arguments and errors as of `write_wav`, `read_wav` reads it."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(np.round(_checked_sound(waveform) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def read_wav(source: bytes | Path | str, where: str = "wav") -> tuple[np.ndarray, int]:
    """Sound and sample rate of a PCM WAV file, without FFmpeg: fast for many short ones.

    Args:
        source: path, or the bytes of the file.
        where: what messages call bytes.

    Returns:
        float32 [N], mean of the channels, and Hz.

    Raises:
        UserError: no such file, or no PCM WAV.
    """
    file, where = (io.BytesIO(source), where) if isinstance(source, bytes) else (str(source), str(source))
    try:
        with wave.open(file, "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file") from error
    except (wave.Error, EOFError, OSError) as error:
        raise UserError(f"{where}: not a PCM WAV file: {error}") from error
    data = data[: len(data) // (width * channels) * width * channels]  # a cut file may end inside a sample
    if width == 3:  # 24 bits become the high bytes of 32
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        samples = padded.view("<i4")[:, 0]
    else:
        samples = np.frombuffer(data, {1: np.uint8, 2: np.dtype("<i2"), 4: np.dtype("<i4")}[width])
    return _to_float(samples).reshape(-1, channels).mean(1), rate


def write_video(
    path: Path | str,
    frames: np.ndarray,
    fps: float,
    waveform: ArrayLike | None = None,
    sample_rate: int = 16000,
    encoders: Sequence[str] = ENCODERS,
) -> Path:
    """Write an MP4: H.264 where the installed FFmpeg has an encoder of it, else MPEG-4; sound in AAC. Returns the path.

    Args:
        path: file to write; its folder is made. Nothing is left there if it fails.
        frames: uint8 [T, 3, H, W] RGB, T at least 1; an odd edge is repeated once, as the encoders take even sizes.
        fps: frames a second.
        waveform: float [N] in [-1, 1]; None writes no sound.
        sample_rate: of the waveform, Hz.
        encoders: of pictures, the first that is there is used.

    Raises:
        UserError: FFmpeg has none of the encoders.
        ValueError: frames of another shape or type, or none.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 [T, 3, H, W] with T > 0, got {frames.dtype} {list(frames.shape)}")
    frames = np.pad(frames, ((0, 0), (0, 0), (0, frames.shape[2] % 2), (0, frames.shape[3] % 2)), "edge")
    frames = np.ascontiguousarray(frames.transpose(0, 2, 3, 1))
    path = Path(path)
    rate = Fraction(fps).limit_denominator(1001)
    with _part_file(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream(_encoder(encoders), rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = BIT_RATE
        sound = None if waveform is None else _SoundTrack(container, waveform, sample_rate)
        for place, frame in enumerate(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            if sound is not None:
                sound.write(until=float((place + 1) / rate))
        container.mux(stream.encode())
        if sound is not None:
            sound.finish()
    return path


def add_sound(video_path: Path | str, waveform: ArrayLike, sample_rate: int, out_path: Path | str) -> Path:
    """Give a video another sound: its pictures are copied bit by bit, the sound is AAC. Returns the path written.

    Args:
        video_path: file whose pictures are kept.
        waveform: float [N] in [-1, 1], from time 0 of the video.
        sample_rate: Hz.
        out_path: file to write, its suffix tells the container; its folder is made.

    Raises:
        UserError: the video is missing, cannot be read, has no video stream, or one that the container cannot hold.
        ValueError: waveform of another shape, or not finite.
    """
    out_path = Path(out_path)
    waveform = _checked_sound(waveform)
    with _opened(video_path) as source:
        picture = _first(source.streams.video, video_path, "video")
        origin = round(_origin(source) / picture.time_base)
        with _part_file(out_path) as part:
            try:
                with av.open(str(part), "w") as container:
                    copy = container.add_stream_from_template(picture)
                    sound = _SoundTrack(container, waveform, sample_rate)
                    for packet in source.demux(picture):
                        if packet.dts is None:  # marks the end
                            continue
                        packet.dts -= origin
                        packet.pts = packet.dts if packet.pts is None else packet.pts - origin
                        until = float(packet.pts * packet.time_base)
                        packet.stream = copy
                        container.mux(packet)
                        sound.write(until)
                    sound.finish()
            except (av.error.FFmpegError, ValueError) as error:
                held = f"the {picture.codec_context.name} pictures of {video_path} with AAC sound"
                raise UserError(f"{out_path}: cannot hold {held} ({error}): name the result .mkv") from error
    return out_path


class _SoundTrack:
    """AAC stream of a container, written in pieces beside the pictures, so that players need not jump."""

    def __init__(self, container: av.container.OutputContainer, waveform: ArrayLike, sample_rate: int) -> None:
        self.container, self.rate, self.written = container, int(sample_rate), 0
        self.samples = _checked_sound(waveform)
        self.stream = container.add_stream("aac", rate=self.rate, layout="mono")
        self.stream.bit_rate = SOUND_BIT_RATE

    def write(self, until: float) -> None:
        """Write the sound up to a time in seconds, and not beyond its end."""
        end = min(len(self.samples), round(until * self.rate))
        if end <= self.written:
            return
        piece = np.ascontiguousarray(self.samples[None, self.written : end])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = self.rate, self.written, Fraction(1, self.rate)
        self.container.mux(self.stream.encode(frame))
        self.written = end

    def finish(self) -> None:
        """Write what is left."""
        self.write(len(self.samples) / self.rate)
        self.container.mux(self.stream.encode())


@contextmanager
def _opened(path: Path | str) -> Iterator[av.container.InputContainer]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot be read as video or sound: {error.strerror or error}") from error


@contextmanager
def _part_file(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _first(streams: tuple[av.stream.Stream, ...], path: Path | str, kind: str) -> av.stream.Stream:
    if not streams:
        raise UserError(f"{path}: has no {kind} stream")
    return streams[0]


def _origin(container: av.container.InputContainer) -> float:
    return (container.start_time or 0) / av.time_base


def _timed(
    container: av.container.InputContainer, stream: av.stream.Stream, start: float
) -> Iterator[tuple[av.VideoFrame | av.AudioFrame, float, float]]:
    """Frames with the times of their begin and end in seconds, from the key frame before `start` on."""
    origin = _origin(container)
    frames, first = _stamped(container, stream, origin), None
    if start > SEEK_MARGIN:
        container.seek(int((start - SEEK_MARGIN + origin) * av.time_base))
        first = next(frames, None)
        if first is None or first[1] > start:  # files without an index, such as .ts, may land too late
            container.seek(int(origin * av.time_base))
            frames, first = _stamped(container, stream, origin), None
    yield from frames if first is None else chain([first], frames)


def _stamped(
    container: av.container.InputContainer, stream: av.stream.Stream, origin: float
) -> Iterator[tuple[av.VideoFrame | av.AudioFrame, float, float]]:
    end = 0.0
    for frame in container.decode(stream):
        time = end if frame.time is None else frame.time - origin
        if isinstance(frame, av.AudioFrame):
            length = frame.samples / frame.sample_rate
        elif frame.duration and frame.time_base:
            length = float(frame.duration * frame.time_base)
        else:
            length = float(1 / (stream.average_rate or 25))
        end = time + length
        yield frame, time, end


def _picture(frame: av.VideoFrame, size: int) -> np.ndarray:
    small = frame.reformat(size, size, "rgb24", interpolation=Interpolation.BICUBIC)
    picture = small.to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)).transpose(2, 0, 1))


def _mono(frame: av.AudioFrame) -> np.ndarray:
    samples = _to_float(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return samples.mean(0)


def _to_float(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "i":
        return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32)


def _checked_sound(waveform: ArrayLike) -> np.ndarray:
    samples = np.asarray(waveform, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"waveform must be [N], got {list(samples.shape)}")
    if not np.isfinite(samples).all():
        raise ValueError("waveform has values that are not finite")
    return samples.clip(-1, 1)


def _encoder(names: Sequence[str]) -> str:
    for name in names:
        try:
            return av.codec.Codec(name, "w").name
        except (ValueError, av.error.FFmpegError):  # no such encoder in this FFmpeg
            continue
    raise UserError(f"video: the installed FFmpeg has no encoder of {', '.join(names)}; pip install av")
