"""Samples of WebDataset shards, each read directly at its place, from disk or an object store."""

import os
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from datamodules.paths import is_remote
from datamodules.stores import read_ranges
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
            OSError: a shard is gone, or ends before the place in the index.
            UserError: an object store does not answer.
        """
        contents = self.read_each(samples)
        if failed := next((content for content in contents if isinstance(content, OSError)), None):
            raise failed
        return contents

    def read_each(self, samples: Sequence[int]) -> list[dict[str, bytes] | OSError]:
        """The same, with the error in the place of each sample that cannot be read."""
        urls = [self.index.shards[s].url for s in self.index.shard_of(np.asarray(samples))]
        wanted = [
            (row, name, int(offsets[sample]), int(sizes[sample]))
            for row, sample in enumerate(samples)
            for name, (offsets, sizes) in self.places.items()
            if sizes[sample] >= 0
        ]
        blocks = {w[:2]: self._read_local(urls[w[0]], *w[2:]) for w in wanted if not is_remote(urls[w[0]])}
        remote = [w for w in wanted if is_remote(urls[w[0]])]
        for protocol in {urls[row].partition("://")[0] for row, *_ in remote}:
            asked = [w for w in remote if urls[w[0]].startswith(f"{protocol}://")]
            found = read_ranges([(urls[row], offset, size) for row, _, offset, size in asked])
            blocks |= {w[:2]: _whole(block, w[3], urls[w[0]]) for w, block in zip(asked, found, strict=True)}
        contents: list[dict[str, bytes] | OSError] = [{} for _ in urls]
        for (row, name), block in blocks.items():
            if isinstance(block, OSError):
                contents[row] = block
            elif isinstance(contents[row], dict):
                contents[row][name] = block
        return contents

    def _read_local(self, url: str, offset: int, size: int) -> bytes | OSError:
        try:
            block = _whole(os.pread(self._file(url), size, offset), size, url)
        except OSError as error:
            block = error
        if isinstance(block, OSError) and url in self._files:  # a file that was restored is another one: open it anew
            os.close(self._files.pop(url))
        return block

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


def _whole(block: bytes | OSError, size: int, url: str) -> bytes | OSError:
    if isinstance(block, OSError) or len(block) == size:
        return block
    return OSError(f"{url}: {len(block)} of {size} bytes were there; the shard is shorter than when it was indexed")
