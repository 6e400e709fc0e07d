"""Scores of single pictures on disk: `pictures.jsonl` in the run folder, one JSON object a picture of a test.

A record has `set`, `story`, `line`, `seed`, `file` (in the run folder), `prompt`, `event` and `characters`; of what was
measured `predicted` (names), `f_acc` and `order_kept` (0 or 1), `clip_t`, `clip_t_full`, `clip_i`, `dino_i` (cosines).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError

FILE = "pictures.jsonl"


def write_records(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> Path:
    """Write the records of a set in place of its older ones; those of other sets stay. Returns the file.

    Args:
        folder: of the run.
        name: of the set.
    """
    path = Path(folder) / FILE
    others = [record for record in read_records(folder) if record.get("set") != name] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{FILE}.part")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in [*others, *records])
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, path)
    return path


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run folder.

    Raises:
        UserError: no such file, or a line that is not JSON; names it.
    """
    path = Path(folder) / FILE
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); `python -m mmtrain test` writes it") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); test the run again") from error


def picture_values(folder: Path, metric: str) -> list[float] | None:
    """Values of the pictures in a run folder behind a logged metric such as `test/pororo_single/clip_t`.

    Returns:
        those that have one; None for a metric that no single picture has, such as C-F1.

    Raises:
        UserError: see `read_records`.
    """
    _, name, key = metric.split("/")
    values = [r[key] for r in read_records(folder) if r.get("set") == name and r.get(key) is not None]
    return [float(value) for value in values] or None
