"""Video files to our shards, once: `python -m mmtrain data vggsound`.

For VGGSound with its list `vggsound.csv` (youtube id, start second, label, split), and for any folder of videos.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import webdataset as wds

from datamodules.video_audio_shards import SOURCE_FILE, clip_processes, encode_clip, shard_key, shard_name
from datamodules.video_audio_sources import read_source_file
from datamodules.video_files import VIDEO_EXTENSIONS, csv_rows, read_video, video_files
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat

FAILURES, NO_FILE = "failures.csv", "no such file"


class Row(NamedTuple):
    """One clip to be; `path` is None where no file was found."""

    id: str
    path: Path | None
    split: str
    label: str | None = None
    start: float = 0.0


@dataclass
class Written:
    """What a call found out: clips by split, and (id, path, reason) of those that could not be used."""

    counts: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str, str]] = field(default_factory=list)


def vggsound_rows(source: Path, listed: Path | None, splits: Sequence[str] = ()) -> list[Row]:
    """Clips of a folder of videos, or of a csv.

    Args:
        source: folder, searched with its sub-folders, or a csv with a column `path` (see `csv_rows`). Clips of a folder
            without a list are named by their path in it.
        listed: VGGSound's list, without a header. A file is found as `<id>_<start>`, `<id>_<start, 6 digits>`,
            `<id>_<start>_<end>` in milliseconds, or `<id>`.
        splits: of the list, only these, all if there are none; of a folder without a list the one name that all clips
            get, "train" by default.

    Raises:
        UserError: no such folder or list, none of the files or splits, a line that cannot be read, or two clips of one
            name.
    """
    if source.suffix == ".csv":
        if listed is not None:
            raise UserError(f"--csv: {listed}: is for a folder of videos, {source} is a csv itself")
        rows = [Row(r["id"], r["path"], r["split"], r.get("label"), r["start"]) for r in csv_rows(source)]
        rows = [row for row in rows if not splits or row.split in splits]
        if not rows:
            raise UserError(f"{source}: no lines" + (f" of split {' '.join(splits)}" if splits else ""))
    else:
        rows = _folder_rows(source, listed, splits)
    for split, count in Counter((row.split, shard_key(row.id)) for row in rows).items():
        if count > 1:
            raise UserError(f"{listed or source}: {count} clips of split {split[0]} are named {split[1]}: rename them")
    return rows


def _folder_rows(source: Path, listed: Path | None, splits: Sequence[str]) -> list[Row]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    videos = video_files(source, "**/*")
    if not videos:
        raise UserError(f"{source}: no videos ({', '.join(VIDEO_EXTENSIONS)}) in it or below")
    if listed is None:
        if len(splits) > 1:
            raise UserError(f"--split: {' '.join(splits)}: without --csv all clips are of one split")
        split = splits[0] if splits else "train"
        return [Row(str(path.relative_to(source).with_suffix("")), path, split) for path in videos]
    files = {path.stem: path for path in videos}
    rows = [row for row in _listed_rows(listed, files) if not splits or row.split in splits]
    if not any(row.path for row in rows):
        wanted = f"{rows[0].id}.mp4" if rows else f"split {' '.join(splits)}"
        raise UserError(f"{source}: has none of the {len(rows)} clips of {listed}, such as {wanted}")
    return rows


def _listed_rows(listed: Path, files: dict[str, Path]) -> Iterator[Row]:
    if not listed.is_file():
        raise UserError(f"{listed}: no such file")
    with open(listed, newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            try:
                video, start, label, split = cells
                second = int(start)
            except ValueError:
                raise UserError(f"{listed}: line {number}: {cells}: wanted are youtube id, second, label, split") from (
                    None
                )
            name = f"{video}_{second:06d}"
            names = (name, f"{video}_{second}", f"{video}_{1000 * second}_{1000 * (second + 10)}", video)
            yield Row(name, next((files[n] for n in names if n in files), None), split, label)


def write_vggsound(
    rows: Sequence[Row],
    out: Path,
    clip_format: ClipFormat,
    shard_size: int = 512,
    workers: int | None = None,
    show: Callable[[int, int], None] | None = None,
) -> Written:
    """Write the shards that are not there yet; stopped, it goes on where it was.

    Beside the shards: `<shard>_stats.json` (counts, ids, failures), `<split>_ids.txt` and `failures.csv`. A shard that
    lacks a file which is there now, as when a download went on, is written anew; one with a broken file stays as it is
    until its `_stats.json` is deleted.

    Args:
        rows: the clips.
        out: folder.
        clip_format: frame rate, size, length, sample rate.
        shard_size: clips a tar.
        workers: processes that decode; None takes the cores that this one may use.
        show: called with the clips done and all of them.

    Raises:
        UserError: the folder holds shards of other clips or settings, or `shard_size` is below 1.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size: {shard_size}: must be at least 1")
    about = _about(rows, clip_format, shard_size)
    found = read_source_file(out)
    if found and {**found, "complete": None} != {**about, "complete": None}:
        differing = [key for key in about if key != "complete" and found.get(key) != about[key]]
        raise UserError(f"{out / SOURCE_FILE}: was written with another {', '.join(differing)}: give another folder")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / SOURCE_FILE, about)
    splits = sorted({row.split for row in rows})
    workers = workers or len(os.sched_getaffinity(0))
    done, written, ids = 0, Written(dict.fromkeys(splits, 0)), {split: [] for split in splits}
    with clip_processes(workers) if workers > 1 else nullcontext() as pool:
        for name, part in _shards(rows, splits, shard_size):
            stats = out / f"{name.removesuffix('.tar')}_stats.json"
            if not _is_written(stats, part):
                encoded = (pool.map if pool else map)(_encode, [(r, clip_format, about["class_names"]) for r in part])
                _write_one(
                    out / name, stats, part, encoded, lambda n, before=done: show and show(before + n, len(rows))
                )
            result = json.loads(stats.read_text())
            done += len(part)
            if show:
                show(done, len(rows))
            ids[part[0].split] += result["ids"]
            written.failures += [tuple(f) for f in result["failures"]]
    for split, names in ids.items():
        written.counts[split] = len(names)
        (out / f"{split}_ids.txt").write_text("".join(f"{name}\n" for name in names))
    with open(out / FAILURES, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "path", "reason"), *written.failures])
    _write_json(out / SOURCE_FILE, about | {"complete": True})
    return written


def _shards(rows: Sequence[Row], splits: Sequence[str], shard_size: int) -> Iterator[tuple[str, list[Row]]]:
    for split in splits:
        own = [row for row in rows if row.split == split]
        for start in range(0, len(own), shard_size):
            yield shard_name(split, start // shard_size), own[start : start + shard_size]


def _is_written(stats: Path, rows: Sequence[Row]) -> bool:
    """Whether a shard is there and no file that it lacked has come since."""
    if not stats.exists():
        return False
    missing = {name for name, _, reason in json.loads(stats.read_text())["failures"] if reason == NO_FILE}
    return not any(row.id in missing and row.path is not None and row.path.is_file() for row in rows)


def _about(rows: Sequence[Row], clip_format: ClipFormat, shard_size: int) -> dict:
    listed = "\n".join(f"{row.split}/{row.id}/{row.start}" for row in rows)
    return {
        "source": {"clips": len(rows), "sha256": hashlib.sha256(listed.encode()).hexdigest()[:16]},
        "format": {name: getattr(clip_format, name) for name in ("fps", "seconds", "frame_size", "sample_rate")},
        "class_names": sorted({row.label for row in rows if row.label}),
        "shard_size": shard_size,
        "complete": False,
    }


def _write_one(
    path: Path, stats: Path, rows: Sequence[Row], encoded: Iterator[dict | str], show: Callable[[int], None]
) -> None:
    part = path.with_name(f"{path.name}.part")
    ids, failures = [], []
    with open(part, "wb") as file, wds.TarWriter(file) as writer:
        for number, (row, sample) in enumerate(zip(rows, encoded, strict=True), start=1):
            if isinstance(sample, str):
                failures.append((row.id, str(row.path or ""), sample))
            else:
                writer.write(sample)
                ids.append(row.id)
            show(number)
    if ids:
        part.replace(path)
    else:
        part.unlink()
    _write_json(stats, {"count": len(rows), "successes": len(ids), "ids": ids, "failures": failures})


def _encode(job: tuple[Row, ClipFormat, list[str]]) -> dict | str:
    """A sample for the tar writer, or why there is none."""
    row, clip_format, class_names = job
    if row.path is None or not row.path.is_file():
        return NO_FILE
    label = class_names.index(row.label) if row.label else None
    try:
        clip = read_video(row.path, clip_format, ("frames", "audio"), Clip(row.id, label=label), row.start)
        if not len(clip.frames) or len(clip.audio) * clip_format.fps < clip_format.sample_rate:
            return f"shorter than one frame of 1/{clip_format.fps:g} s"
        return encode_clip(clip, clip_format, class_names)
    except (UserError, ValueError, RuntimeError, MemoryError) as error:  # one odd file must not stop the others
        return str(error) or type(error).__name__


def _write_json(path: Path, content: dict) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)
