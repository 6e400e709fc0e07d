"""Training curves of a run folder, from Lightning's CSV files or, where there are none, from W&B's own files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmtrain.reporting.wandb_files import history

Curve = tuple[list[int], list[float]]  # optimizer steps, ascending; values
NOT_CURVES = ("epoch", "step", "trainer/global_step")
MOST_POINTS = 300  # of a drawn curve: a pixel or two each


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curve of each metric that was logged while training; `{}` if nothing was.

    Several versions of a run, as resumes leave them, are merged by step: the later one wins. Empty cells and values
    that are not finite are left out, and so are versions of `validate` and `test`, whose step says nothing.

    Raises:
        UserError: if a `.wandb` file is not one of W&B's.
    """
    logs = [_csv_rows(path) for path in sorted(folder.glob("logs/version_*/metrics.csv"), key=_version)]
    if not any(logs):
        files = sorted(folder.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.partition("run-")[2])
        logs = [_wandb_rows(path) for path in files]
    training = [rows for rows in logs if any(key.startswith("train/") for _, row in rows for key in row)]
    merged: dict[str, dict[int, float]] = {}
    for rows in training or logs:
        for step, row in rows:
            for key, value in row.items():
                merged.setdefault(key, {})[step] = value
    return {key: _in_order(points) for key, points in sorted(merged.items())}


def thin(steps: Sequence[int], values: Sequence[float], limit: int = MOST_POINTS) -> Curve:
    """Return at most `limit` points that look like the whole curve: the lowest and highest of each stretch.

    The first and last point stay. Points are never averaged, so that a spike is as high as it was.

    Args:
        steps: ascending [N].
        values: finite [N].
        limit: at least 4.

    Example:
        >>> thin(range(1000), [0.0] * 500 + [9.0] + [0.0] * 499, limit=4)
        ([0, 1, 500, 999], [0.0, 0.0, 9.0, 0.0])
    """
    if len(steps) <= limit:
        return list(steps), list(values)
    inner = np.asarray(values[1:-1])
    kept = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(inner)), (limit - 2) // 2):
        kept |= {int(stretch[place(inner[stretch])]) + 1 for place in (np.argmin, np.argmax)}
    return [steps[place] for place in sorted(kept)], [values[place] for place in sorted(kept)]


def _in_order(points: Mapping[int, float]) -> Curve:
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _version(path: Path) -> int:
    digits = path.parent.name.removeprefix("version_")
    return int(digits) if digits.isdigit() else -1


def _csv_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Rows of the whole lines: a killed run may leave half a number at the end."""
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    return list(_steps_and_values(csv.DictReader(whole.splitlines()), ("step",)))


def _wandb_rows(path: Path) -> list[tuple[int, dict[str, float]]]:
    return list(_steps_and_values(history(path), ("trainer/global_step", "_step")))


def _steps_and_values(
    rows: Iterable[Mapping[str, Any]], step_keys: Sequence[str]
) -> Iterable[tuple[int, dict[str, float]]]:
    """Each row's step and its finite numbers; rows without a step are left out."""
    for row in rows:
        step = next((number for key in step_keys if (number := _number(row.get(key))) is not None), None)
        numbers = {key: _number(value) for key, value in row.items() if _is_metric(key)}
        found = {key: number for key, number in numbers.items() if number is not None}
        if step is not None and found:
            yield int(step), found


def _is_metric(key: Any) -> bool:
    return isinstance(key, str) and key not in NOT_CURVES and not key.startswith(("_", "test/"))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
