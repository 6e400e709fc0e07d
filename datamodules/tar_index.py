"""The index of a set of tar shards: where every member lies, how many samples each shard holds, what is wrong with it.

WebDataset streams a shard and takes what it finds: a shard that was cut at a member boundary is silently shorter.
Here every shard is scanned once. With the index any sample can be read directly, the data order can be a pure
function of (seed, epoch, position), a run resumes without re-reading, and lost samples are counted before training.
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.paths import cache_folder, is_remote
from datamodules.stores import open_store, patiently
from mmtrain.config_errors import UserError

MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("extension", "<i2")])
VERSION = 2
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@dataclass
class Shard:
    """One shard as it was when the index was made."""

    url: str
    bytes: int
    modified: float | None  # seconds since 1970; None for a remote shard
    samples: int
    expected: int | None  # from img2dataset's `<shard>_stats.json`, where there is one
    problems: dict[str, int] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        """Samples known to be missing: named by the stats file, or cut off."""
        found = self.samples
        return max(0, (self.expected or 0) - found, self.problems.get("cut_sample", 0))


@dataclass
class ShardIndex:
    """Members of all shards in one table.

    members: structured [M] (offset, size, extension number) in sample order.
    first_member: [S + 1], the members of sample s are members[first_member[s] : first_member[s + 1]].
    first_sample: [number of shards + 1], likewise for the samples of a shard.
    """

    shards: list[Shard]
    extensions: list[str]
    members: np.ndarray
    first_member: np.ndarray
    first_sample: np.ndarray

    def __len__(self) -> int:
        return len(self.first_member) - 1

    def field(self, extensions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size, each [S] int64, of the first member with one of `extensions`; size -1 where none is."""
        wanted = [i for i, name in enumerate(self.extensions) if name in extensions]
        rows = np.flatnonzero(np.isin(self.members["extension"], wanted))
        samples = np.searchsorted(self.first_member, rows, side="right") - 1
        samples, first = np.unique(samples, return_index=True)
        offsets, sizes = np.zeros(len(self), np.int64), np.full(len(self), -1, np.int64)
        offsets[samples], sizes[samples] = self.members["offset"][rows[first]], self.members["size"][rows[first]]
        return offsets, sizes

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        """Index of the shard that holds each sample."""
        return np.searchsorted(self.first_sample, samples, side="right") - 1

    def problems(self) -> dict[str, int]:
        """All problems of all shards, added up."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.problems)
        return dict(total)


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path part; "" for a name without extension."""
    folder, _, last = name.rpartition("/")
    key, _, extension = last.partition(".")
    return (f"{folder}/{key}" if folder else key), extension.lower()


def scan_shard(url: str) -> tuple[Shard, list[list[tuple[str, int, int]]]]:
    """Read the headers of one shard.

    Broken blocks are stepped over, so that good samples behind them are found. Members that reach past the end of
    the file are dropped with their sample. Problems counted: empty_file, not_a_tar, broken_header, duplicate_member,
    cut_sample, no_end_marker (the tar was cut, or its writer was killed), fewer_than_stats.

    Raises:
        UserError: a remote shard is not there, may not be read, or its store does not answer.
    """
    if not is_remote(url):
        return _scan(url)
    try:
        return patiently(url, lambda: _scan(url))
    except OSError as error:
        raise UserError(str(error)) from error


def _scan(url: str) -> tuple[Shard, list[list[tuple[str, int, int]]]]:
    with _open(url) as (file, size):
        problems: Counter[str] = Counter()
        samples = _scan_members(file, size, problems)
        if size == 0:
            problems["empty_file"] += 1
        elif not samples:
            problems["not_a_tar"] += 1
        elif not _ends_with_marker(file, size):
            problems["no_end_marker"] += 1
    expected = _expected_count(url)
    if expected is not None and len(samples) < expected:
        problems["fewer_than_stats"] += expected - len(samples)
    modified = None if is_remote(url) else os.path.getmtime(url)
    return Shard(url, size, modified, len(samples), expected, {name: n for name, n in problems.items() if n}), samples


class _open:
    """A shard and its size in bytes, local or remote."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> tuple[IO[bytes], int]:
        if is_remote(self.url):
            fs, path = open_store(self.url)
            self.file, size = fs.open(path, "rb", block_size=2**22, cache_type="readahead"), fs.size(path)
        else:
            self.file, size = open(self.url, "rb"), os.path.getsize(self.url)
        return self.file, size

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _scan_members(file: IO[bytes], size: int, problems: Counter[str]) -> list[list[tuple[str, int, int]]]:
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    cut: set[str] = set()
    for member in _headers(file, size, problems):
        key, extension = split_name(member.name)
        if not member.isfile() or not extension or key.rpartition("/")[2].startswith("__"):
            continue
        if member.offset_data + member.size > size:
            cut.add(key)
        elif extension in samples.setdefault(key, {}):
            problems["duplicate_member"] += 1
        else:
            samples[key][extension] = (member.offset_data, member.size)
    for key in cut:
        samples.pop(key, None)
        problems["cut_sample"] += 1
    return [[(extension, *place) for extension, place in fields.items()] for fields in samples.values() if fields]


def _headers(file: IO[bytes], size: int, problems: Counter[str]) -> Iterator[tarfile.TarInfo]:
    """All headers that can be read; behind a broken one the next sound one is looked for, block by block."""
    if size < tarfile.BLOCKSIZE:
        return
    with tarfile.TarFile(fileobj=file, mode="r", ignore_zeros=True) as tar:
        while tar.offset < size:
            try:
                member = tar.next()
            except tarfile.TarError:
                tar.offset += tarfile.BLOCKSIZE
                problems["broken_header"] += tar.offset + tarfile.BLOCKSIZE < size
                continue
            if member is None:
                return
            tar.members.clear()  # tarfile keeps every header otherwise
            yield member


def _ends_with_marker(file: IO[bytes], size: int) -> bool:
    file.seek(max(0, size - 1024))
    return not any(file.read(1024))


def _expected_count(url: str) -> int | None:
    stats = url.removesuffix(".gz").removesuffix(".tar") + "_stats.json"
    try:
        if is_remote(stats):
            fs, path = open_store(stats)
            content = patiently(stats, lambda: fs.cat_file(path))
        else:
            content = Path(stats).read_bytes()
        return int(json.loads(content)["successes"])
    except (OSError, ValueError, KeyError, TypeError):  # optional
        return None


def build_index(urls: Sequence[str], workers: int = 1) -> ShardIndex:
    """Scan all shards, `workers` at a time, with a progress bar on stderr, and join the results."""
    extensions: dict[str, int] = {}
    shards, tables, members_per_sample = [], [], []
    workers = min(workers, len(urls) // 8)  # a worker takes about a second to start
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else _InThisProcess()
    with pool, Progress(*COLUMNS, console=Console(stderr=True), transient=True) as bar:
        for shard, samples in bar.track(pool.map(scan_shard, urls), total=len(urls), description="indexing shards"):
            shards.append(shard)
            rows = [
                (offset, size, extensions.setdefault(name, len(extensions)))
                for fields in samples
                for name, offset, size in fields
            ]
            tables.append(np.array(rows, MEMBER))
            members_per_sample.append(np.array([len(fields) for fields in samples], np.int64))
    return ShardIndex(
        shards,
        list(extensions),
        np.concatenate(tables) if tables else np.zeros(0, MEMBER),
        np.concatenate([[0], *members_per_sample]).cumsum(),
        np.concatenate([[0], [s.samples for s in shards]]).cumsum(),
    )


class _InThisProcess:
    map = staticmethod(map)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass


def index_folders(urls: Sequence[str]) -> list[Path]:
    """Where the index of these shards may lie: beside them when they share a local folder, and in the cache."""
    whole = [url if is_remote(url) else os.path.abspath(url) for url in urls]
    name = hashlib.sha256("\n".join(whole).encode()).hexdigest()[:12]
    places = [cache_folder() / "index" / name]
    folders = {os.path.dirname(os.path.abspath(url)) for url in urls}
    if not any(map(is_remote, urls)) and len(folders) == 1:
        places.insert(0, Path(folders.pop()) / ".mmtrain_index" / name)
    return places


def save_index(index: ShardIndex, folder: Path) -> None:
    """Write the index as a folder of one JSON and two arrays that are memory-mapped when read; atomic."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part", dir=folder.parent))
    np.save(part / "members.npy", index.members)
    np.save(part / "first_member.npy", index.first_member)
    about = {"version": VERSION, "extensions": index.extensions, "shards": [asdict(s) for s in index.shards]}
    (part / "index.json").write_text(json.dumps(about, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:  # another process was first with the same content
        shutil.rmtree(part)


def load_index(folder: Path) -> ShardIndex:
    """Open a saved index; the arrays stay on disk, shared by all processes of a machine.

    Raises:
        UserError: a shard has another size than when it was indexed, or is gone.
    """
    about = json.loads((folder / "index.json").read_text())
    shards = [Shard(**s) for s in about["shards"]]
    for shard in shards:
        _check_unchanged(shard, folder)
    members, first_member = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("members", "first_member"))
    first_sample = np.concatenate([[0], [s.samples for s in shards]]).cumsum()
    return ShardIndex(shards, about["extensions"], members, first_member, first_sample)


def is_current(folder: Path) -> bool:
    """There is an index of this version, and no shard was rewritten since (another time, the same size)."""
    try:
        about = json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return False
    if about.get("version") != VERSION:
        return False
    local = [s for s in about["shards"] if s["modified"] is not None and os.path.exists(s["url"])]
    return all(os.path.getsize(s["url"]) != s["bytes"] or os.path.getmtime(s["url"]) == s["modified"] for s in local)


def _check_unchanged(shard: Shard, folder: Path) -> None:
    if is_remote(shard.url):
        return  # one request a shard at every start is too much; a short read is noticed when it happens
    again = "if that is meant, run `python -m mmtrain data index --rebuild` on the shards"
    if not os.path.exists(shard.url):
        raise UserError(
            f"{shard.url}: the shard is gone, but the index {folder} has it ({shard.samples} samples); {again}"
        )
    size = os.path.getsize(shard.url)
    if size != shard.bytes:
        raise UserError(
            f"{shard.url}: {size:,} bytes, but {shard.bytes:,} when it was indexed ({shard.samples} samples); {again}"
        )


def open_index(
    urls: Sequence[str], workers: int = 1, rebuild: bool = False, folder: Path | None = None
) -> tuple[ShardIndex, Path]:
    """Load the index of these shards, or build and save it; returns the index and its folder.

    Raises:
        UserError: a shard changed its size or is gone since it was indexed, or no folder can be written to.
    """
    places = [folder] if folder else index_folders(urls)
    for place in places:
        if not rebuild and is_current(place):
            return load_index(place), place
    index = build_index(urls, workers)
    for place in places:
        if not rebuild and is_current(place):  # another run was faster: leave its index, it may be in use
            return load_index(place), place
        try:
            save_index(index, place)
            return load_index(place), place
        except OSError as error:
            reason = error
    raise UserError(f"the index can be written to none of {', '.join(map(str, places))}: {reason}")
