"""Reading W&B's offline files back, so that a run that was never uploaded can be shown and checked."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.config_errors import UserError

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

MAGIC = b":W&B"
HEADER = 7  # bytes of the file's header, and of each piece's: crc32 (4), length (2), kind (1)
BLOCK = 32768  # bytes; a piece never crosses the end of a block
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path | str) -> Iterator[Record]:
    """Yield the records of a `run-*.wandb` file in their order.

    The file is a log in blocks of 32 KiB: a record is one piece, or a first, middle and last piece. Reading ends
    quietly at the first piece that is cut or whose checksum is wrong, for a killed run leaves its file so.

    Raises:
        UserError: if the file is not one of W&B's. An empty one is a run killed at its start, and yields nothing.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # importing wandb takes a second, and most reports need none

    for payload in payloads(Path(path).read_bytes(), str(path)):
        record = Record()
        record.ParseFromString(payload)
        yield record


def payloads(data: bytes, name: str) -> Iterator[bytes]:
    """Yield the joined pieces of each record in the bytes of a file; see `records`."""
    if data and not data.startswith(MAGIC):
        raise UserError(f"{name}: not a file of W&B: it begins with {data[:4]!r}, theirs with {MAGIC!r}")
    place, pieces = HEADER, []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # too short for a piece: padding
            place += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, place)
        piece = data[place + HEADER : place + HEADER + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        place += HEADER + length
        pieces = [piece] if kind in (FULL, FIRST) else [*pieces, piece]
        if kind in (FULL, LAST):
            yield b"".join(pieces)


def history(path: Path | str) -> list[dict[str, Any]]:
    """Return one dict a logged row, nested keys joined by "/"; W&B's own keys (`_step`, `_runtime`, ...) included.

    Raises:
        UserError: if the file is not one of W&B's.
    """
    rows = (record.history.item for record in records(path) if record.WhichOneof("record_type") == "history")
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
