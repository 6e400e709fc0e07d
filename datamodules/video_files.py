"""Video files as a source of clips: a folder, or a csv that names them."""

import csv
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from datamodules.sources import UnusableSample
from mmtrain import media
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip, ClipFormat

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


class VideoFiles:
    """Video files, decoded each time: slow, for small sets; `data vggsound` makes shards of large ones."""

    fields = frozenset({"frames", "audio"})
    mel_preset = None
    shard_starts = None

    def __init__(self, rows: Sequence[dict[str, Any]], place: str, clip_format: ClipFormat) -> None:
        self.rows, self.place, self.format = list(rows), place, clip_format
        self.class_names = sorted({row["label"] for row in rows if row.get("label")})
        self.counts, self.warnings = {"samples": len(self.rows)}, []

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, samples: Sequence[int], fields: Collection[str]) -> list[Clip | UnusableSample]:
        return [self._read_one(self.rows[s], fields) for s in samples]

    def _read_one(self, row: dict[str, Any], fields: Collection[str]) -> Clip | UnusableSample:
        clip = Clip(row["id"], label=self.class_names.index(row["label"]) if row.get("label") else None)
        try:
            return read_video(row["path"], self.format, fields, clip, row.get("start", 0.0))
        except UserError:
            return UnusableSample("unreadable_video")


def read_video(
    path: Path, clip_format: ClipFormat, fields: Collection[str], clip: Clip | None = None, start: float = 0.0
) -> Clip:
    """Fill a clip from a video file, at most `clip_format.seconds` from `start` seconds on.

    Raises:
        UserError: the file cannot be used; says why.
    """
    clip = clip or Clip(path.stem)
    if "frames" in fields:
        clip.frames = media.read_frames(path, clip_format.fps, clip_format.frame_size, start, clip_format.seconds)
    if "audio" in fields:
        clip.audio = media.read_audio(path, clip_format.sample_rate, start, clip_format.seconds)
    return clip


def video_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Video files in a folder, `**/*` for those below it too, by name; none if there is no such folder.

    Hidden files are left out: they are half of a download, or notes that macOS makes.
    """
    found = folder.glob(pattern) if folder.is_dir() else ()
    return sorted(p for p in found if p.suffix.lower() in VIDEO_EXTENSIONS and not p.name.startswith("."))


def csv_rows(path: Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a csv with a column `path`, relative to it, perhaps `id`, `label`, `start` (seconds), `split`.

    Without a column `split` all are of "train"; without `id` it is the path, and the start where there is one.

    Args:
        path: the file.
        split: only its rows; None gives all.

    Raises:
        UserError: no such file, no column `path`, or a line that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "path" not in (reader.fieldnames or ()):
            raise UserError(f"{path}: a column `path` is wanted, the header has {reader.fieldnames}")
        for row in reader:
            own = row.get("split") or "train"
            if split not in (None, own):
                continue
            start = row.get("start") or ""
            try:
                seconds = float(start or 0)
            except ValueError:
                raise UserError(f"{path}: line {reader.line_num}: start: {start}: must be seconds") from None
            if not row["path"]:
                raise UserError(f"{path}: line {reader.line_num}: path is empty")
            name = str(Path(row["path"]).with_suffix("")) + (f"_{start}" if start else "")
            about = {"id": row.get("id") or name, "path": path.parent / row["path"], "start": seconds, "split": own}
            yield row | about
