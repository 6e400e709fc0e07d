"""Where image-text pairs come from: WebDataset shards, a csv with a picture folder, or a folder of labelled pictures.

A source knows how many samples it has and reads one as `Sample`. What is missing is counted before training starts.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from datamodules.paths import expand_shards, is_remote, unpacked
from datamodules.shards import ShardReader
from datamodules.tar_index import Shard, open_index
from mmtrain.config_errors import UserError

UNREADABLE_SHARD = "unreadable_shard"  # what samples are counted under whose shard is gone, or cut
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")


class UnusableSample(ValueError):
    """A sample that cannot be used; `reason` is a short name to count by, `detail` tells a reader more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Sample:
    """One picture, as encoded bytes or uint8 [3, H, W], with captions, perhaps a second kind of them, and a label."""

    image: bytes | Tensor
    captions: list[str] = field(default_factory=list)
    extra_captions: list[str] = field(default_factory=list)
    label: int | None = None


class Source(Protocol):
    """What `ImageTextDataset` reads. `counts` holds samples and lost ones by reason."""

    counts: dict[str, int]

    def __len__(self) -> int: ...

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        """The samples, or for each that cannot be used the reason."""


def substitute(sample: int, reason: str, shard_starts: np.ndarray | None, num_samples: int) -> int:
    """The sample that is tried next in place of one that cannot be used.

    The next one; but where a whole shard cannot be read, one of the next shard, and each of its samples another one.

    Args:
        shard_starts: [number of shards + 1], where the samples of the shards begin; None without shards.

    Example:
        >>> starts = np.array([0, 4, 9])
        >>> substitute(1, "empty_caption", starts, 9), substitute(1, UNREADABLE_SHARD, starts, 9)
        (2, 5)
    """
    if reason != UNREADABLE_SHARD or shard_starts is None:
        return (sample + 1) % num_samples
    after = np.searchsorted(shard_starts, sample, side="right")
    within = sample - shard_starts[after - 1]
    first = shard_starts[after] % num_samples
    size = shard_starts[np.searchsorted(shard_starts, first, side="right")] - first
    return int(first + within % size)


class ShardSource:
    """Pairs from tar shards, as img2dataset writes them.

    Args:
        shards: paths, folders, globs, brace ranges, URLs.
        captions: member extension of the text ("txt"), or "json:KEY" for a field of the json member, where a list
            holds several captions of one picture. None reads no text.
        extra_captions: a second text in the same notation, for example ALIP's synthetic caption "caption.txt".
        label: member extension ("cls") or "json:KEY" of a class: its number, or its name in `class_names`.
        max_lost: share of samples that may be missing from the shards, in [0, 1].

    Raises:
        UserError: no shard, none usable, or more than `max_lost` missing, with the counts by reason.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        captions: str | None = "txt",
        extra_captions: str | None = None,
        label: str | None = None,
        max_lost: float = 0.01,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.label_of_name = {name: label for label, name in enumerate(class_names or ())}
        self.fields = {"captions": captions, "extra_captions": extra_captions, "label": label}
        self.fields = {name: spec for name, spec in self.fields.items() if spec}
        index, self.index_folder = open_index([unpacked(u) for u in expand_shards(shards)])
        extensions = {name: (_extension(spec),) for name, spec in self.fields.items()}
        self.reader = ShardReader(index, {"image": IMAGE_EXTENSIONS, **extensions})
        usable = np.ones(len(index), bool)
        lost: Counter[str] = Counter()
        for name in self.reader.places:
            missing = usable & ~self.reader.has(name)
            lost[f"without_{name}"] += int(missing.sum())
            usable &= ~missing
        self.samples = np.flatnonzero(usable)
        self.shard_starts = np.searchsorted(self.samples, index.first_sample)
        lost["missing_from_shards"] = _missing_from_shards(index.shards)
        self.counts = {"samples": len(self.samples), "shards": len(index.shards)} | {k: n for k, n in lost.items() if n}
        self.warnings = [f"{s.url}: {', '.join(s.problems)}" for s in index.shards if s.problems]
        self._check(sum(lost.values()), max_lost)

    def _check(self, lost: int, max_lost: float) -> None:
        total = len(self.samples) + lost
        counts = ", ".join(f"{name} {n}" for name, n in self.counts.items() if name not in ("samples", "shards"))
        worst = f"; first: {self.warnings[0]}" if self.warnings else ""
        if not len(self.samples):
            wanted = ", ".join(f"{name} from {spec!r}" for name, spec in self.fields.items())
            have = sorted(self.reader.index.extensions)
            raise UserError(
                f"no usable sample in {self.counts['shards']} shards: wanted a picture and {wanted or 'nothing else'}; "
                f"members found: {', '.join(have) or 'none'} ({counts}){worst}"
            )
        if lost > max_lost * total:
            raise UserError(
                f"{lost} of {total} samples are missing from the shards ({counts}), "
                f"more than max_lost = {max_lost:.2%}: mend the shards, or raise max_lost{worst}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        contents = self.reader.read_each(self.samples[np.asarray(samples, np.int64)])
        return [self._sample(c) for c in contents]

    def _sample(self, content: dict[str, bytes] | OSError) -> Sample | UnusableSample:
        if isinstance(content, OSError):
            return UnusableSample(UNREADABLE_SHARD, str(content))
        sample = Sample(content["image"])
        try:
            for name, spec in self.fields.items():
                value = _field(content[name], spec)
                setattr(sample, name, self._label(value) if name == "label" else _captions(value))
        except UnusableSample as problem:
            return problem
        return sample

    def _label(self, value: Any) -> int:
        try:
            return self.label_of_name[value] if value in self.label_of_name else int(value)
        except (ValueError, TypeError):
            raise UnusableSample("bad_label") from None

    def labels(self) -> list[int]:
        """Class of every sample that has a readable one; reads nothing else of the shards."""
        spec = self.fields["label"]
        reader = ShardReader(self.reader.index, {"label": (_extension(spec),)})
        found = []
        for content in reader.read(self.samples):
            try:
                found.append(self._label(_field(content["label"], spec)))
            except UnusableSample:
                continue
        return found


def _extension(spec: str) -> str:
    return "json" if spec.startswith("json:") else spec


def _field(content: bytes, spec: str) -> Any:
    text = content.decode("utf-8", errors="replace")
    if not spec.startswith("json:"):
        return text
    try:
        value = json.loads(text)
        for key in spec.removeprefix("json:").split("."):
            value = value[key]
    except (ValueError, KeyError, TypeError, IndexError):
        raise UnusableSample("bad_json") from None
    return value


def _captions(value: Any) -> list[str]:
    texts = [
        t.replace("\x00", " ").strip() for t in (value if isinstance(value, list) else [value]) if isinstance(t, str)
    ]
    if not any(texts):
        raise UnusableSample("empty_caption")
    return [t for t in texts if t]


def _missing_from_shards(shards: Sequence[Shard]) -> int:
    """Samples lost with cut, short or unreadable shards. One that cannot be read at all counts as an average one."""
    readable = [s.samples for s in shards if s.samples]
    average = round(sum(readable) / len(readable)) if readable else 1
    unknown = [s for s in shards if not s.samples and not s.expected and s.problems]
    return sum(s.lost for s in shards if s not in unknown) + average * len(unknown)


@dataclass
class Columns:
    """Names of the columns of a csv, and what separates them; None is a tab in a .tsv, else a comma."""

    image: str = "image"
    caption: str = "caption"
    delimiter: str | None = None


class CsvSource:
    """Pairs from a csv or tsv with a header, as the official code reads: paths relative to the file's folder.

    Args:
        group: rows of the same picture are one sample with several captions, as retrieval wants it.

    Raises:
        UserError: no such file or column, or the official list of URLs, which has no pictures yet.
    """

    shard_starts = None

    @classmethod
    def from_pairs(cls, root: Path, pairs: Iterable[tuple[str, str]]) -> "CsvSource":
        """The same of (picture path below `root`, caption) pairs that come from elsewhere; grouped by picture."""
        source = cls.__new__(cls)
        source._fill(root, pairs, group=True)
        return source

    def __init__(self, path: str, columns: Columns | None = None, max_lost: float = 0.01, group: bool = False) -> None:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file")
        empty = self._fill(Path(path).parent, _pairs(path, columns or Columns()), group)
        total = len(self.paths) + empty
        if not len(self.paths) or empty > max_lost * total:
            raise UserError(
                f"{path}: {empty} of {total} rows have no path or no caption, more than max_lost = {max_lost:.2%}"
            )

    def _fill(self, root: Path, pairs: Iterable[tuple[str, str]], group: bool) -> int:
        """Keep the pairs; returns how many had no path or no caption."""
        self.root = root
        empty = 0
        self.paths, self.texts = _Strings(), _Strings()
        rows_of: dict[str, list[int]] = {}
        for image, caption in pairs:
            if not image or not caption:
                empty += 1
                continue
            if group:
                rows_of.setdefault(image, []).append(len(self.paths))
            self.paths.append(image)
            self.texts.append(caption)
        self.paths.freeze()
        self.texts.freeze()
        self.groups = list(rows_of.values()) if group else None
        self.counts = {"samples": len(self)} | ({"empty_path_or_caption": empty} if empty else {})
        self.warnings: list[str] = []
        return empty

    def __len__(self) -> int:
        return len(self.groups) if self.groups is not None else len(self.paths)

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        return [self._read_one(s) for s in samples]

    def _read_one(self, sample: int) -> Sample | UnusableSample:
        rows = self.groups[sample] if self.groups is not None else [sample]
        try:
            return Sample((self.root / self.paths[rows[0]]).read_bytes(), [self.texts[row] for row in rows])
        except OSError:
            return UnusableSample("missing_file")


def _pairs(path: str, columns: Columns) -> Iterator[tuple[str, str]]:
    """Path and caption of every row, stripped; a row that is too short gives empty ones."""
    delimiter = columns.delimiter or ("\t" if path.endswith(".tsv") else ",")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # a quote in a tsv is part of the caption
    csv.field_size_limit(2**24)
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting)
        header = next(rows, [])
        if any(cell.startswith(("http://", "https://")) for cell in header):
            raise UserError(
                f"{path}: this is the list of captions and URLs; fetch the pictures first: add a header line "
                f"`caption{delimiter}url` and run img2dataset --input_format tsv --url_col url --caption_col caption "
                "--output_format webdataset --resize_mode keep_ratio --resize_only_if_bigger True"
            )
        if columns.image not in header or columns.caption not in header:
            raise UserError(
                f"{path}: columns {columns.image!r} and {columns.caption!r} are wanted, the header has {header}: "
                "set columns.image and columns.caption"
            )
        image, caption = header.index(columns.image), header.index(columns.caption)
        try:
            for row in rows:
                long_enough = len(row) > max(image, caption)
                yield (row[image].strip(), row[caption].strip()) if long_enough else ("", "")
        except csv.Error as error:
            raise UserError(f"{path}: line {rows.line_num}: {error}") from error


class _Strings:
    """Many strings in one array: millions of Python strings would be copied into every worker by reference counts."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), [0]

    def append(self, text: str) -> None:
        self.data += text.encode("utf-8", errors="replace")
        self.ends.append(len(self.data))

    def freeze(self) -> "_Strings":
        self.data, self.ends = np.frombuffer(bytes(self.data), np.uint8), np.array(self.ends)
        return self

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return bytes(self.data[self.ends[i] : self.ends[i + 1]]).decode("utf-8")


class FolderSource:
    """Labelled pictures in one sub-folder a class, in the order of the folder names (as numbers where all are)."""

    shard_starts = None

    def __init__(self, path: str) -> None:
        folders = [p for p in Path(path).iterdir() if p.is_dir() and not p.name.startswith(".")]
        numeric = all(p.name.isdigit() for p in folders)
        folders.sort(key=lambda p: int(p.name) if numeric else p.name)
        self.class_names = [p.name for p in folders]
        self.files = [
            (file, label)
            for label, folder in enumerate(folders)
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS
        ]
        if not self.files:
            raise UserError(f"{path}: no pictures in sub-folders; the layout is {path}/<class name>/<picture>.jpg")
        self.counts, self.warnings = {"samples": len(self.files), "classes": len(folders)}, []

    def set_labels(self, labels: Sequence[int]) -> None:
        """Give each folder, in the order of `class_names`, a class of its own numbering."""
        self.files = [(file, labels[position]) for file, position in self.files]

    def labels(self) -> list[int]:
        """Class of every sample."""
        return [label for _, label in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        return [self._read_one(*self.files[s]) for s in samples]

    def _read_one(self, file: Path, label: int) -> Sample | UnusableSample:
        try:
            return Sample(file.read_bytes(), label=label)
        except OSError:
            return UnusableSample("missing_file")


def is_csv(path: str | Sequence[str]) -> bool:
    """True for one path that ends like a table of pairs."""
    return isinstance(path, str) and path.endswith((".csv", ".tsv"))


def is_picture_folder(path: str | Sequence[str]) -> bool:
    """True for a local folder that holds sub-folders and no shards."""
    if not isinstance(path, str) or is_remote(path) or not os.path.isdir(path):
        return False
    names = os.listdir(path)
    return not any(n.endswith((".tar", ".tar.gz")) for n in names) and any(
        os.path.isdir(os.path.join(path, n)) for n in names
    )
