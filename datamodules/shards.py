"""Samples of WebDataset shards, each read directly at its place, from disk or an object store."""

import os
from collections import OrderedDict
from collections.abc import Sequence

import fsspec
import numpy as np

from datamodules.paths import is_remote
from datamodules.tar_index import ShardIndex

OPEN_FILES = 128  # kept open for each process; CC12M has 1,242 shards, the usual limit is 1,024


class ShardReader:
    """Reads chosen fields of chosen samples.

    Args:
        index: the shards' index.
        fields: name -> extensions, the first one present is read, for example {"image": ("jpg", "png")}.
    """

    def __init__(self, index: ShardIndex, fields: dict[str, Sequence[str]]) -> None:
        self.index = index
        self.places = {name: index.field(extensions) for name, extensions in fields.items()}
        self._files: OrderedDict[str, int] = OrderedDict()
        self._owner = os.getpid()

    def has(self, field: str) -> np.ndarray:
        """Boolean [S]: the sample has this field, with at least one byte."""
        return self.places[field][1] > 0

    def read(self, samples: Sequence[int]) -> list[dict[str, bytes]]:
        """Bytes of every field of the samples; fields that a sample lacks are left out.

        Raises:
            OSError: a shard is gone, ends before the place in the index, or does not answer.
        """
        urls = [self.index.shards[s].url for s in self.index.shard_of(np.asarray(samples))]
        wanted = [
            (row, name, int(offsets[sample]), int(sizes[sample]))
            for row, sample in enumerate(samples)
            for name, (offsets, sizes) in self.places.items()
            if sizes[sample] >= 0
        ]
        remote = [w for w in wanted if is_remote(urls[w[0]])]
        contents = {w[:2]: self._read_local(urls[w[0]], *w[2:]) for w in wanted if not is_remote(urls[w[0]])}
        if remote:  # all at once: an object store answers many small requests in the time of one
            fs, _ = fsspec.core.url_to_fs(urls[remote[0][0]])
            paths = [urls[row] for row, *_ in remote]
            blocks = fs.cat_ranges(paths, [o for *_, o, _ in remote], [o + s for *_, o, s in remote])
            for (row, name, _, size), block in zip(remote, blocks, strict=True):
                contents[row, name] = _whole(block, size, urls[row])
        return [
            {name: contents[row, name] for name in self.places if (row, name) in contents} for row in range(len(urls))
        ]

    def _read_local(self, url: str, offset: int, size: int) -> bytes:
        return _whole(os.pread(self._file(url), size, offset), size, url)

    def _file(self, url: str) -> int:
        if self._owner != os.getpid():  # a forked worker must not share the parent's files
            self._files, self._owner = OrderedDict(), os.getpid()
        if url not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[url] = os.open(url, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files.move_to_end(url)
        return self._files[url]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict(), "_owner": -1}


def _whole(block: bytes, size: int, url: str) -> bytes:
    if len(block) != size:
        raise OSError(f"{url}: {len(block)} of {size} bytes were there; the shard is shorter than when it was indexed")
    return block
