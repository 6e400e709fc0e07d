"""Where clips with sound come from: our shards, both layouts of the Diff-Foley release, or video files.

A source knows how many clips it has and reads chosen fields of chosen ones; `open_source` finds which kind is there.
"""

import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from datamodules.paths import expand_shards, is_remote, unpacked
from datamodules.shards import ShardReader
from datamodules.sources import UNREADABLE_SHARD, UnusableSample
from datamodules.tar_index import ShardIndex, open_index
from datamodules.video_audio_shards import SOURCE_FILE, decode_strip, decode_wav
from datamodules.video_audio_windows import stored_mel_frames
from datamodules.video_files import VideoFiles, csv_rows, video_files
from mmtrain.config_errors import UserError
from mmtrain.video_audio import CONTRAST_HOP, WINDOW_HOP, Clip, ClipFormat

RATE_CLIPS, RATE_TOLERANCE = 5, 0.2  # of released data: looked at when they are opened; 40 features may be 37
FIELDS = ("frames", "audio", "mel", "features")
MEMBERS = {"frames": "video.jpg", "audio": "wav", "mel": "mel.npy", "features": "cavp.npy"}
LAYOUTS = """
  {path}/{split}-00000.tar ...        our shards, as `python -m mmtrain data vggsound` writes them
  {path}/{Split}/*.tar                released stage-1 shards (<key>.spec.npy, <key>.video.jpg)
  {path}/{Split}.txt                  released stage-2 lists, with {Split}/audio_npy_spec and CAVP_feat/{Split}
  {path}/{split}/*.mp4, {path}/*.mp4  video files; or path is a csv with a column `path`, perhaps id, label, split"""


class VideoAudioSource(Protocol):
    """What `datamodules.clip_reader.ClipReader` reads.

    Attributes:
        fields: which of `FIELDS` its clips have.
        mel_preset: preset of the stored spectrograms, None without.
        place: the file or folder, for messages.
        counts: clips and lost ones by reason. shard_starts: see `datamodules.loading.epoch_order`.
    """

    fields: frozenset[str]
    mel_preset: str | None
    place: str
    counts: dict[str, int]
    warnings: list[str]
    class_names: list[str]
    shard_starts: np.ndarray | None

    def __len__(self) -> int: ...

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        """The clips with these fields, or for each that cannot be used the reason."""


class ClipShards:
    """Our shards, see `datamodules.video_audio_shards`.

    Raises:
        UserError: the shards were cut at another frame rate, size, length or sample rate than `clip_format`.
    """

    def __init__(self, index: ShardIndex, place: str, clip_format: ClipFormat) -> None:
        self.index, self.place, self.format = index, place, clip_format
        self.fields = frozenset(name for name, member in MEMBERS.items() if member in index.extensions)
        self.mel_preset = "mel_ldm" if "mel" in self.fields else None
        self._readers: dict[frozenset[str], ShardReader] = {}
        self.samples = np.flatnonzero(self._reader(frozenset()).has("json"))
        self.shard_starts = np.searchsorted(self.samples, index.first_sample)
        self.counts = _shard_counts(index, len(self.samples), len(index) - len(self.samples))
        self.warnings = [f"{s.url}: {', '.join(s.problems)}" for s in index.shards if s.problems]
        about = read_source_file(Path(place))
        self.class_names = list(about.get("class_names", ()))
        if about.get("complete") is False:
            self.warnings.append(f"{place}: is not complete; run `python -m mmtrain data vggsound` again")
        _check_format(about.get("format", {}), clip_format, f"{place}/{SOURCE_FILE}")

    def __len__(self) -> int:
        return len(self.samples)

    def _reader(self, fields: frozenset[str]) -> ShardReader:
        if fields not in self._readers:
            wanted = {"json": ("json",)} | {name: (MEMBERS[name],) for name in fields}
            self._readers[fields] = ShardReader(self.index, wanted)
        return self._readers[fields]

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        places = self.samples[np.asarray(samples, np.int64)]
        contents = _read_each(self._reader(frozenset(fields)), places)
        return [
            content
            if isinstance(content, UnusableSample)
            else self._clip(content, fields, self.index.shards[int(self.index.shard_of(place))].url)
            for content, place in zip(contents, places, strict=True)
        ]

    def _clip(self, content: dict[str, bytes], fields: Collection[str], shard: str) -> Clip | UnusableSample:
        if missing := [name for name in fields if name not in content]:
            return UnusableSample(f"without_{missing[0]}")
        try:
            about = json.loads(content["json"])
            clip = Clip(str(about["id"]), label=about.get("label"), onsets=about.get("onsets"))
        except (ValueError, KeyError, TypeError):
            return UnusableSample("bad_json")
        where = f"{shard}: {clip.id}"
        _check_format({name: about[name] for name in ("fps", "sample_rate") if name in about}, self.format, where)
        try:
            if "frames" in fields:
                clip.frames = _sized(decode_strip(content["frames"]), self.format, where)
            if "audio" in fields:
                clip.audio, rate = decode_wav(content["audio"])
                _check_format({"sample_rate": rate}, self.format, where)
            if "mel" in fields:
                clip.mel = _array(content["mel"])
                check_hop(clip.mel, "mel_ldm", self.format, where)
            if "features" in fields:
                clip.features = _array(content["features"])
        except (ValueError, EOFError):
            return UnusableSample("broken_member")
        check_finite(clip, where)
        return clip


class ReleasedShards:
    """Stage-1 shards of the release: `<key>.spec.npy` (128, 640), `mel_cavp`, and `<key>.video.jpg`."""

    fields = frozenset({"frames", "mel"})
    mel_preset = "mel_cavp"

    def __init__(self, index: ShardIndex, place: str, clip_format: ClipFormat) -> None:
        self.index, self.place, self.format, self.class_names = index, place, clip_format, []
        members = {"mel": ("spec.npy",), "frames": (MEMBERS["frames"],)}
        self._whole = ShardReader(index, members)
        self._readers = {
            name: ShardReader(index, {name: extension}) for name, extension in members.items()
        }  # one kind alone
        self.samples = np.flatnonzero(self._whole.has("mel") & self._whole.has("frames"))
        self.shard_starts = np.searchsorted(self.samples, index.first_sample)
        self.counts = _shard_counts(index, len(self.samples), len(index) - len(self.samples))
        self.warnings = [f"{s.url}: {', '.join(s.problems)}" for s in index.shards if s.problems]

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        places = self.samples[np.asarray(samples, np.int64)]
        reader = self._readers[next(iter(fields))] if len(set(fields)) == 1 else self._whole
        clips: list[Clip | UnusableSample] = []
        for place, content in zip(places, _read_each(reader, places), strict=True):
            if isinstance(content, UnusableSample):
                clips.append(content)
                continue
            clip = Clip(self._key(int(place)))
            where = f"{self.place}: {clip.id}"
            try:
                if "frames" in content:
                    clip.frames = _sized(decode_strip(content["frames"]), self.format, where)
                if "mel" in content:
                    clip.mel = _array(content["mel"])
                    check_hop(clip.mel, self.mel_preset, self.format, where)
            except (ValueError, EOFError):
                clips.append(UnusableSample("broken_member"))
            else:
                check_finite(clip, where)
                clips.append(clip)
        return clips

    def _key(self, sample: int) -> str:
        """The key from the tar header before the member; its place, where it has a long name or is remote."""
        shard = self.index.shards[int(self.index.shard_of(np.array(sample)))]
        by_place = f"{Path(shard.url).stem}/{sample}"
        if is_remote(shard.url):
            return by_place
        offset = int(self.index.members["offset"][self.index.first_member[sample]])
        try:
            with open(shard.url, "rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except (OSError, tarfile.TarError):
            return by_place
        return member.name.rpartition("/")[2].partition(".")[0]


class ReleasedFiles:
    """Stage-2 layout of the release: lists of ids, `<Split>/audio_npy_spec/<id>_mel.npy` and `CAVP_feat/<Split>/`.

    The features of a clip are `CAVP_feat/<Split>/<id>.npz`, or, as for the released evaluation, in `contrast_feat`
    below it, under the key `feat`.
    """

    fields = frozenset({"mel", "features"})
    mel_preset = "mel_ldm"
    shard_starts = None

    def __init__(self, root: Path, listed: Path, clip_format: ClipFormat) -> None:
        self.place, self.format, self.class_names = str(listed), clip_format, []
        split = listed.stem
        self.ids = [line.strip() for line in listed.read_text().splitlines() if line.strip()]
        features = root / "CAVP_feat" / split
        if (features / "contrast_feat").is_dir() and not any(features.glob("*.npz")):
            features = features / "contrast_feat"
        self.paths = {"mel": root / split / "audio_npy_spec", "features": features}
        self.counts, self.warnings = {"samples": len(self.ids)}, []
        for folder in self.paths.values():
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder; {listed} wants it")

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        return [self._read_one(self.ids[s], fields) for s in samples]

    def _read_one(self, name: str, fields: Collection[str]) -> Clip | UnusableSample:
        clip = Clip(name)
        try:
            if "mel" in fields:
                path = self.paths["mel"] / f"{name}_mel.npy"
                clip.mel = np.load(path).astype(np.float32)
                check_hop(clip.mel, self.mel_preset, self.format, str(path))
            if "features" in fields:
                with np.load(self.paths["features"] / f"{name}.npz") as archive:
                    clip.features = archive["feat"].astype(np.float32)
        except FileNotFoundError:
            return UnusableSample("missing_file")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return UnusableSample("broken_file")
        check_finite(clip, f"{self.place}: {name}")
        return clip


def open_source(path: str | Path, split: str, clip_format: ClipFormat) -> VideoAudioSource | None:
    """The clips of a split; None if there is nothing of that split under `path`.

    Raises:
        UserError: what is there does not fit `clip_format`.
    """
    path = Path(path)
    if path.suffix == ".csv" and path.is_file():
        rows = list(csv_rows(path, split))
        return VideoFiles(rows, str(path), clip_format) if rows else None
    for pattern in (path / f"{split}-*.tar", path / split.capitalize() / "*.tar", path / split / "*.tar"):
        if any(pattern.parent.glob(pattern.name)):
            index, _ = open_index([unpacked(url) for url in expand_shards(str(pattern))])
            if "spec.npy" not in index.extensions:
                return ClipShards(index, str(pattern.parent), clip_format)
            return _checked_rate(ReleasedShards(index, str(pattern.parent), clip_format), "frames")
    listed = [*path.glob(f"{split.capitalize()}.txt"), *path.glob(f"*/{split.capitalize()}.txt")]
    if listed:
        return _checked_rate(ReleasedFiles(path, listed[0], clip_format), "features")
    for folder in (path / split, *([path] if split == "train" else [])):
        if videos := video_files(folder):
            rows = [{"id": str(p.relative_to(folder).with_suffix("")), "path": p} for p in videos]
            return VideoFiles(rows, str(folder), clip_format)
    return None


def read_source_file(folder: Path) -> dict[str, Any]:
    """What the shards' writer says of them; {} without."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / SOURCE_FILE}: {error}") from error


def check_hop(mel: np.ndarray, preset: str, clip_format: ClipFormat, where: str) -> None:
    """Refuse a stored spectrogram whose length shows that it has the other hop, or another number of mels.

    Raises:
        UserError: it has 250 samples between frames where 256 are wanted, or the other way round.
    """
    whole = {"mel_cavp": 1 + (clip_format.samples - 1) // 250, "mel_ldm": stored_mel_frames(clip_format)}
    other = "mel_ldm" if preset == "mel_cavp" else "mel_cavp"
    if mel.ndim != 2 or len(mel) != 128:
        raise UserError(f"{where}: a spectrogram of shape {mel.shape}, [128, frames] is wanted")
    if mel.shape[1] == whole[other]:
        raise UserError(
            f"{where}: {mel.shape[1]} mel frames of format.seconds {clip_format.seconds} are of preset {other}; "
            f"here {preset} with {whole[preset]} is wanted"
        )


def check_finite(clip: Clip, where: str) -> None:
    """Refuse features or a spectrogram that hold NaN or infinity.

    Raises:
        UserError: names the clip and what is broken.
    """
    for what, array in (("features", clip.features), ("spectrogram", clip.mel)):
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"{where}: the stored {what} hold NaN or infinity: write this clip anew, or leave it out")


def _checked_rate(source: ReleasedShards | ReleasedFiles, pictures: str) -> ReleasedShards | ReleasedFiles:
    """Released data do not say their frame rate; frames or features beside mel frames do.

    Raises:
        UserError: most of the first clips have another rate than `format.fps`.
    """
    hop = CONTRAST_HOP if source.mel_preset == "mel_cavp" else WINDOW_HOP
    rates = []
    for clip in source.read(range(min(RATE_CLIPS, len(source))), {pictures, "mel"}):
        if isinstance(clip, Clip):
            rates.append(len(getattr(clip, pictures)) * source.format.sample_rate / (clip.mel.shape[1] * hop))
    if rates and abs(np.median(rates) / source.format.fps - 1) > RATE_TOLERANCE:
        raise UserError(
            f"{source.place}: its clips have about {np.median(rates):.3g} {pictures} a second of sound, format.fps is "
            f"{source.format.fps:g}: set it so, or extract them anew"
        )
    return source


def _check_format(found: dict[str, Any], clip_format: ClipFormat, where: str) -> None:
    for name, value in found.items():
        own = getattr(clip_format, name)
        if name == "seconds":
            if value < own:
                raise UserError(f"{where}: clips of {value} s, shorter than format.seconds {own}")
        elif value != own:
            raise UserError(f"{where}: {name} {value}, format.{name} is {own}: set it so, or write the shards anew")


def _sized(frames: np.ndarray, clip_format: ClipFormat, where: str) -> np.ndarray:
    if frames.shape[-1] != clip_format.frame_size:
        _check_format({"frame_size": frames.shape[-1]}, clip_format, where)
    return frames


def _shard_counts(index: ShardIndex, samples: int, incomplete: int) -> dict[str, int]:
    lost: Counter[str] = Counter(incomplete=incomplete, missing_from_shards=sum(s.lost for s in index.shards))
    return {"samples": samples, "shards": len(index.shards)} | {name: n for name, n in lost.items() if n}


def _read_each(reader: ShardReader, places: np.ndarray) -> list[dict[str, bytes] | UnusableSample]:
    contents = reader.read_each(places)
    return [UnusableSample(UNREADABLE_SHARD, str(c)) if isinstance(c, OSError) else c for c in contents]


def _array(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)


def layouts(path: str | os.PathLike, split: str) -> str:
    """Where `open_source` looks, for messages."""
    return LAYOUTS.format(path=path, split=split, Split=split.capitalize())
