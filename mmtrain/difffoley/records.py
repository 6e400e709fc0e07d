"""Scores of single clips on disk: `clips.jsonl` in the run folder, one JSON object for each (clip, sample).

A record has `name`, `sample`, and of the metrics that were measured `onset_f1` in [0, 1] and `align_acc`, 0 or 1.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError

FILE = "clips.jsonl"


def write_records(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write the records of a run folder; returns the file."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
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


def clip_values(folder: Path, metric: str) -> list[float] | None:
    """Values of the clips in a run folder behind a logged metric; None for one that no single clip has, such as FID.

    Raises:
        UserError: see `read_records`.
    """
    name = metric.rpartition("/")[2]
    values = [record.get(name) for record in read_records(folder)]
    return None if not values or None in values else [float(value) for value in values]
