"""Features on disk, so that an evaluation that was cut short goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Rows = dict[str, Tensor]


def fingerprint(network: nn.Module, **about: Any) -> str:
    """16 hexadecimal digits of the weights and of everything else that the features depend on."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Rows of the batches of one loader on one process, in parts of several batches.

    A part is a file `rank<r>-<number>.pt`, written beside its name and renamed, so that a part is whole or not there.

    Args:
        folder: of this loader and these weights; see `fingerprint`.
        rank: of this process.
        every: batches a part; what is lost when the process is killed.
    """

    def __init__(self, folder: Path, rank: int = 0, every: int = 8) -> None:
        self.folder, self.rank, self.every = folder, rank, every
        self.batches = 0  # in the parts on disk
        self._part = 0
        self._waiting: list[Rows] = []

    def load(self) -> Iterator[Rows]:
        """The rows of the parts on disk, in order; afterwards `batches` says how many batches they hold."""
        self.batches = self._part = 0
        while (path := self._path(self._part)).exists():
            try:
                part = torch.load(path, map_location="cpu", weights_only=True)
            except Exception:  # not written by us, or a broken disk: computed again from here on
                path.unlink()
                return
            self._part += 1
            self.batches += part["batches"]
            if part["rows"]:
                yield part["rows"]

    def add(self, rows: Rows) -> None:
        """Keep the rows of the next batch; none if nothing of it could be read."""
        self._waiting.append({name: value.detach().cpu() for name, value in rows.items()})
        if len(self._waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what waits. A disk that refuses costs the cache, not the evaluation."""
        if not self._waiting:
            return
        names = {name for rows in self._waiting for name in rows}
        rows = {name: torch.cat([r[name] for r in self._waiting if name in r]) for name in names}
        part = self._path(self._part).with_suffix(".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save({"batches": len(self._waiting), "rows": rows}, part)
            os.replace(part, self._path(self._part))
        except (OSError, RuntimeError):  # torch raises RuntimeError when the disk is full
            with suppress(OSError):
                part.unlink()
            return
        self._part += 1
        self.batches += len(self._waiting)
        self._waiting = []

    def _path(self, part: int) -> Path:
        return self.folder / f"rank{self.rank}-{part:05d}.pt"
