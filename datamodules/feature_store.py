"""Features of the frames of all clips of a split, computed once and kept in one array on disk."""

import fcntl
import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.format import open_memmap
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from datamodules.clip_reader import ClipReader
from datamodules.sources import UnusableSample
from datamodules.tar_index import COLUMNS
from datamodules.video_audio_sources import VideoAudioSource
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat

ABOUT, FEATURES, DONE, IDS = "describe.json", "features.npy", "done.npy", "ids.json"
STEP = 32  # clips read at a time, and between two notes of what is done


class FeatureExtractor(Protocol):
    """Turns frames of clips into features, such as `mmtrain.difffoley.features.CavpFeatures`."""

    def describe(self) -> dict[str, Any]:
        """What the features depend on, as plain types; features of another description are computed anew."""

    def extract(self, frames: np.ndarray | Tensor) -> Tensor:
        """float32 [N, T, D] of frames uint8 [N, T, 3, H, W]."""


class FeatureStore:
    """Reads a store: `features.npy` float32 [N, T, D], `done.npy` bool [N], `ids.json`, `describe.json`.

    Args:
        folder: of the store.
        source: whose clips these are.
        clip_format: the features must be of so many frames; None takes any.

    Raises:
        UserError: there is none in the folder, it is not of these clips, or of another number of frames.
    """

    def __init__(self, folder: Path, source: VideoAudioSource, clip_format: ClipFormat | None = None) -> None:
        self.folder = folder
        try:
            self.about = json.loads((folder / ABOUT).read_text())
            self.features = np.load(folder / FEATURES, mmap_mode="r")
            self.done = np.load(folder / DONE)
            self.ids = json.loads((folder / IDS).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: no features, or broken ones ({error})") from error
        if len(self.features) != len(source):
            raise UserError(f"{folder}: features of {len(self.features)} clips, {source.place} has {len(source)}")
        frames = self.features.shape[1]
        if clip_format is not None and frames != clip_format.frames:
            raise UserError(
                f"{folder}: features of {frames} frames a clip, format.fps {clip_format.fps:g} and format.seconds "
                f"{clip_format.seconds:g} make {clip_format.frames}: set them as the features were made"
            )

    def read(self, sample: int, name: str) -> np.ndarray | UnusableSample:
        """float32 [T, D] of a clip.

        Raises:
            UserError: NaN or infinite, or those of another clip.
        """
        if not self.done[sample]:
            return UnusableSample("without_features")
        if self.ids[sample] != name:
            raise UserError(f"{self.folder}: clip {sample} is {self.ids[sample]!r}, the data have {name!r} there")
        features = np.array(self.features[sample])
        check_finite(features, name, self.folder / FEATURES)
        return features


class WithFeatures:
    """A source whose clips have the features of a store."""

    def __init__(self, source: VideoAudioSource, store: FeatureStore) -> None:
        self.source, self.store = source, store
        self.fields, self.mel_preset, self.place = source.fields | {"features"}, source.mel_preset, source.place
        self.class_names, self.warnings = source.class_names, source.warnings
        self.shard_starts = source.shard_starts
        missing = int((~store.done).sum())
        self.counts = {**source.counts} | ({"without_features": missing} if missing else {})

    def __len__(self) -> int:
        return len(self.source)

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        clips = self.source.read(samples, set(fields) - {"features"})
        if "features" in fields:
            for position, (sample, clip) in enumerate(zip(samples, clips, strict=True)):
                if isinstance(clip, Clip):
                    found = self.store.read(int(sample), clip.id)
                    if isinstance(found, UnusableSample):
                        clips[position] = found
                    else:
                        clip.features = found
        return clips


def check_finite(features: np.ndarray, name: str, where: Path | str) -> None:
    """Raise a UserError that names clip and file if there is a NaN or an infinity."""
    if not np.isfinite(features).all():
        raise UserError(
            f"{where}: clip {name}: the features hold NaN or infinity: check the weights of the extractor that "
            "data.features names"
        )


def store_folder(parent: Path, split: str, source: VideoAudioSource, about: dict[str, Any]) -> Path:
    """Where the features of these clips by this extractor lie: another folder for another description."""
    key = json.dumps({"extractor": about, "clips": len(source)}, sort_keys=True)
    return parent / f"{split}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def find_store(parent: Path, split: str) -> Path:
    """The one store of a split below a folder, or the folder itself if it is a store.

    Raises:
        UserError: none, or several.
    """
    if (parent / ABOUT).exists():
        return parent
    found = sorted(p.parent for p in parent.glob(f"{split}-*/{ABOUT}"))
    if len(found) != 1:
        raise UserError(
            f"data.features: {parent} has {len(found)} stores of split {split}, {parent}/{split}-*/{ABOUT}"
            + ("; give one of them" if found else "")
        )
    return found[0]


def extract_features(
    folder: Path, source: VideoAudioSource, extractor: FeatureExtractor, clip_format: ClipFormat
) -> FeatureStore:
    """Compute what is not there yet; stopped, it goes on where it was.

    Clips that cannot be read stay undone. The next clips are decoded while the extractor works. Of several runs that do
    so at a time the others wait for the first.

    Raises:
        UserError: the extractor gives another number of features than frames, or NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _extract(folder, source, extractor, clip_format)
    return FeatureStore(folder, source, clip_format)


def _extract(folder: Path, source: VideoAudioSource, extractor: FeatureExtractor, clip_format: ClipFormat) -> None:
    reader = ClipReader(source, clip_format, fields={"frames"})
    done, ids, features = np.zeros(len(source), bool), [""] * len(source), None
    if (folder / DONE).exists():
        done, ids = np.load(folder / DONE), json.loads((folder / IDS).read_text())
        features = np.load(folder / FEATURES, mmap_mode="r+")
    todo = np.flatnonzero(~done)
    groups = [todo[i : i + STEP] for i in range(0, len(todo), STEP)]
    with ThreadPoolExecutor(1) as pool, Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"features of {source.place}", total=len(source), completed=int(done.sum()))
        ahead = pool.submit(reader.read, groups[0]) if groups else None
        for number, group in enumerate(groups):
            clips = ahead.result()
            ahead = pool.submit(reader.read, groups[number + 1]) if number + 1 < len(groups) else None
            usable = [(sample, clip) for sample, clip in zip(group, clips, strict=True) if isinstance(clip, Clip)]
            if usable:
                frames = np.stack([clip.frames for _, clip in usable])
                rows = _checked(extractor.extract(frames), [clip.id for _, clip in usable], clip_format, folder)
                if features is None:
                    shape = (len(source), *rows.shape[1:])
                    features = open_memmap(folder / FEATURES, mode="w+", dtype=np.float32, shape=shape)
                for (sample, clip), row in zip(usable, rows, strict=True):
                    features[sample], ids[sample], done[sample] = row, clip.id, True
                features.flush()
                _note(folder, done, ids)
            progress.advance(bar, len(group))
    if features is None:
        raise UserError(f"{source.place}: none of its {len(source)} clips could be read, so there are no features")
    about = {"extractor": extractor.describe(), "clips": source.place, "count": len(source)}
    (folder / ABOUT).write_text(json.dumps(about, indent=1))


def _checked(rows: Any, names: Sequence[str], clip_format: ClipFormat, folder: Path) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 3 or rows.shape[:2] != (len(names), clip_format.frames):
        raise UserError(
            f"data.features: the extractor gives {list(rows.shape[1:])} for {clip_format.frames} frames, "
            f"[{clip_format.frames}, width] is wanted"
        )
    for name, row in zip(names, rows, strict=True):
        check_finite(row, name, folder / FEATURES)
    return rows


def _note(folder: Path, done: np.ndarray, ids: list[str]) -> None:
    """Keep what is done; the mask last, so that it never says more than is there."""
    (folder / f"{IDS}.part").write_text(json.dumps(ids))
    (folder / f"{IDS}.part").replace(folder / IDS)
    with open(folder / f"{DONE}.part", "wb") as file:
        np.save(file, done)
    (folder / f"{DONE}.part").replace(folder / DONE)
