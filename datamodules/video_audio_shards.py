"""Clips in tar shards: one JPEG strip of the frames, a WAV and a JSON for each clip, and who writes them.

Members of a clip: `<id>.video.jpg` (the frames side by side, T * width pixels wide), `<id>.wav` (16-bit mono),
`<id>.json` (id, label, class_name, fps, sample_rate, seconds, onsets); `<id>.mel.npy` and `<id>.cavp.npy` where known.
"""

import io
import json
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import webdataset as wds
from rich.console import Console
from rich.progress import Progress
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from datamodules.tar_index import COLUMNS
from mmtrain.config_errors import UserError
from mmtrain.media import encode_wav, read_wav
from mmtrain.video_audio import Clip, ClipFormat

WIDEST_JPEG = 65_500  # pixels, a limit of the format
QUALITY = 95  # of the strips; the released shards do not say theirs
SOURCE_FILE = "source.json"
CLIPS_FOR_A_WORKER = 100  # a worker takes seconds to start


class ClipMaker(Protocol):
    """Makes clips where there are no shards yet, such as `datamodules.impacts.Impacts`. Is sent to other processes."""

    format: ClipFormat
    class_names: list[str]

    def describe(self) -> dict[str, Any]:
        """What the clips depend on, as plain types; kept beside the shards."""

    def sizes(self) -> dict[str, int]:
        """Number of clips of each split."""

    def clip(self, split: str, index: int) -> Clip:
        """One clip, always the same for the same arguments."""


def encode_strip(frames: np.ndarray, quality: int = QUALITY) -> bytes:
    """JPEG of frames uint8 [T, 3, H, W] side by side.

    Raises:
        UserError: too many frames for one JPEG.
    """
    count, _, height, width = frames.shape
    if count * width > WIDEST_JPEG:
        raise UserError(
            f"{count} frames of {width} pixels make a strip of {count * width} pixels, a JPEG has at most "
            f"{WIDEST_JPEG}: give shorter clips, smaller frames or fewer frames/s"
        )
    strip = torch.from_numpy(np.ascontiguousarray(frames.transpose(1, 2, 0, 3))).reshape(3, height, count * width)
    return encode_jpeg(strip, quality).numpy().tobytes()


def decode_strip(content: bytes) -> np.ndarray:
    """Frames uint8 [T, 3, H, H], which are square, of a strip.

    Raises:
        ValueError: not a JPEG, or no whole number of square frames.
    """
    try:
        strip = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB).numpy()
    except RuntimeError as error:
        raise ValueError(f"not a JPEG: {error}") from error
    _, height, width = strip.shape
    if width % height:
        raise ValueError(f"a strip of {width} x {height} pixels is no row of square frames")
    return np.ascontiguousarray(strip.reshape(3, height, width // height, height).transpose(2, 0, 1, 3))


def decode_wav(content: bytes) -> tuple[np.ndarray, int]:
    """float32 [N] in [-1, 1] and the sample rate of a PCM WAV; channels are averaged.

    Raises:
        ValueError: not a PCM WAV.
    """
    try:
        return read_wav(content)
    except UserError as error:
        raise ValueError(str(error)) from error


def encode_clip(clip: Clip, clip_format: ClipFormat, class_names: Sequence[str] = ()) -> dict[str, bytes | str]:
    """A sample as webdataset's writer takes it."""
    about: dict[str, Any] = {
        "id": clip.id,
        "label": clip.label,
        "class_name": class_names[clip.label] if clip.label is not None and class_names else None,
        "fps": clip_format.fps,
        "sample_rate": clip_format.sample_rate,
        "seconds": clip_format.seconds,
        "onsets": clip.onsets,
    }
    sample: dict[str, bytes | str] = {
        "__key__": shard_key(clip.id),
        "json": json.dumps({key: value for key, value in about.items() if value is not None}).encode(),
    }
    if clip.frames is not None:
        sample["video.jpg"] = encode_strip(clip.frames)
    if clip.audio is not None:
        sample["wav"] = encode_wav(clip.audio, clip_format.sample_rate)
    for name, array in (("mel.npy", clip.mel), ("cavp.npy", clip.features)):
        if array is not None:
            buffer = io.BytesIO()
            np.save(buffer, array)
            sample[name] = buffer.getvalue()
    return sample


def shard_key(name: str) -> str:
    """Name of a clip in a tar: a key ends at the first dot, and a slash would make a folder."""
    return name.replace(".", "_").replace("/", "_")


def write_shard(path: Path, clips: Iterable[Clip], clip_format: ClipFormat, class_names: Sequence[str] = ()) -> int:
    """Write one tar, under a temporary name first; returns the number of clips."""
    part, count = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part"), 0
    try:
        with open(part, "wb") as file, wds.TarWriter(file) as writer:
            for clip in clips:
                writer.write(encode_clip(clip, clip_format, class_names))
                count += 1
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def shard_name(split: str, number: int) -> str:
    """`train-00000.tar`."""
    return f"{split}-{number:05d}.tar"


def make_shards(path: Path, maker: ClipMaker, shard_size: int = 128, workers: int | None = None) -> None:
    """Write all clips of all splits into a folder of its own first, so that `path` is never half a set.

    Of several processes that do so at a time the first one's shards stay.

    Args:
        shard_size: clips a tar.
        workers: processes; None takes the cores that this one may use.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    jobs = [
        (part / shard_name(split, start // shard_size), maker, split, range(start, min(start + shard_size, size)))
        for split, size in maker.sizes().items()
        for start in range(0, size, shard_size)
    ]
    total = sum(maker.sizes().values())
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs), total // CLIPS_FOR_A_WORKER)
    try:
        with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"clips for {path}", total=total)
            if workers > 1:
                with clip_processes(workers) as pool:
                    for done in as_completed([pool.submit(_make_shard, *job) for job in jobs]):
                        progress.advance(bar, done.result())
            else:
                for job in jobs:
                    progress.advance(bar, _make_shard(*job))
        (part / SOURCE_FILE).write_text(json.dumps(describe_maker(maker), indent=1))
        part.rename(path)
    except OSError:
        if not (path / SOURCE_FILE).exists():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def clip_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that make or decode clips; what they have not begun when the block is left is dropped.

    They leave Ctrl-C to this process and use one thread, since there is one of them for each core.
    """
    # spawn: a fork would copy the parent's threads' locks
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_process)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def describe_maker(maker: ClipMaker) -> dict[str, Any]:
    """What is kept beside the shards, as it reads back from JSON."""
    format_ = {name: getattr(maker.format, name) for name in ("fps", "seconds", "frame_size", "sample_rate")}
    return json.loads(
        json.dumps({"source": maker.describe(), "format": format_, "class_names": list(maker.class_names)})
    )


def _make_shard(path: Path, maker: ClipMaker, split: str, indices: range) -> int:
    return write_shard(path, (maker.clip(split, i) for i in indices), maker.format, maker.class_names)
