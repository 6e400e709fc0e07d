"""A compared table as the page shows it: heads over columns, and cells with the value of each seed behind them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmtrain.reported import as_reported
from mmtrain.reporting.contents import Contents, groups_of_rows, has_ours, is_laptop, seed_name
from mmtrain.reporting.results import RunGroup
from mmtrain.reporting.tables import ARROWS, DAGGER, UNIT_SIGNS, Cell, ComparedTable, Row, TableColumn

RANKS = re.compile(r"(.+)_(top|r)(\d+)")


def table_values(table: ComparedTable, contents: Contents, error: float = 0.0) -> dict[str, Any]:
    """What the template shows of a table.

    Args:
        table: one of `contents.tables()`.
        contents: for the runs behind the rows.
        error: of a digitised table, in its unit: no smaller difference is judged.
    """
    groups = iter(groups_of_rows(table, contents.groups))
    rows = [_row_values(table, row, next(groups) if row.kind == "ours" else None, contents) for row in table.rows]
    is_words = table.status == "qualitative"
    columns = [_column_values(place, column, table, is_words) for place, column in enumerate(table.columns)]
    return {
        "title": table.title,
        "source": table.source,
        "setting": table.setting,
        "status": table.status,
        "error": error,
        "is_laptop": is_laptop(table),
        "is_open": has_ours(table) and not table.id.startswith(("full_", "simulation_")),
        "is_words": is_words,
        "heads": _heads(columns),
        "rows": rows,
        "notes": table.footnotes(),
    }


def split_name(name: str) -> tuple[str, str]:
    """A column's name as the head it shares with its neighbours, empty if there is none, and its own.

    >>> split_name("coco_i2t_r10"), split_name("fgvc_aircraft")
    (('coco i2t', 'R@10'), ('', 'fgvc aircraft'))
    """
    ranked = RANKS.fullmatch(name)
    group, label = (ranked[1], f"{'R@' if ranked[2] == 'r' else 'top-'}{ranked[3]}") if ranked else ("", name)
    return group.replace("_", " "), label.replace("_", " ")


def _column_values(place: int, column: TableColumn, table: ComparedTable, is_words: bool) -> dict[str, Any]:
    """What is measured by us alone is comparable with itself."""
    group, label = split_name(column.name)
    is_comparable = table.status == "measured" or bool(column.metric and not column.mark)
    return {
        "place": place,
        "name": column.name,
        "metric": column.metric,
        "group": group,
        "label": label,
        "full_label": f"{group} {label}".strip(),
        "mark": column.mark,
        "signs": f"{UNIT_SIGNS.get(column.unit, column.unit)} {ARROWS[column.direction]}".strip(),
        "search": f"{column.name} {column.name.replace('_', ' ')} {column.metric or ''}".lower(),
        "is_comparable": is_comparable,
        "is_words": is_words,
        "judged_direction": column.direction if is_comparable and column.direction != "none" else "",
    }


def _heads(columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbours of one group under a common head; a column alone has its full name."""
    heads: list[dict[str, Any]] = []
    for column in columns:
        if heads and column["group"] and heads[-1]["title"] == column["group"]:
            heads[-1]["columns"].append(column)
        else:
            heads.append({"title": column["group"], "columns": [column]})
    for head in heads:
        if len(head["columns"]) == 1:
            head["columns"][0]["label"] = head["columns"][0]["full_label"]
    return heads


def _row_values(table: ComparedTable, row: Row, group: RunGroup | None, contents: Contents) -> dict[str, Any]:
    methods = contents.methods
    detail = {"reported": "reported", "chance": "guessing"}.get(row.kind, "")
    if group:
        detail = f"{len(group.runs)} seed{'s' * (len(group.runs) != 1)}"
    if group and table.status != "measured":
        detail = " · ".join([row.shown_kind, detail, ", ".join(map(str, group.setting.values()))])
    cells = zip(row.cells, table.columns, strict=True)
    return {
        "name": row.name.removesuffix(f", {len(group.runs)} seeds") if group else row.name,
        "kind": row.kind,
        "method": row.method,
        "colour": methods.index(row.method) if row.method in methods else None,
        "detail": detail,
        "mark": DAGGER if row.marks else "",
        "is_judged": not row.marks,
        "cells": [_cell_values(cell, column, table, group) for cell, column in cells],
    }


def _cell_values(cell: Cell, column: TableColumn, table: ComparedTable, group: RunGroup | None) -> dict[str, Any]:
    """A reported cell is its text; one of ours has the value of each seed, which the script averages again."""
    is_apart = table.status != "measured" and bool(column.mark)
    values = {"text": cell.text, "is_apart": is_apart, "reported": cell.reported, "seeds": None}
    if group is None or cell.value is None:
        return values
    digits = len(cell.text.split()[0].partition(".")[2])
    half = None if cell.high is None or cell.own_interval else cell.high - cell.value
    measured = [(seed_name(run), run.metrics.get(column.metric, math.nan)) for run in group.runs]
    return values | {
        "seeds": [(seed, as_reported(value, column.unit)) for seed, value in measured if math.isfinite(value)],
        "digits": digits,
        "mean": f"{cell.value:.{digits}f}",
        "half": None if half is None else f"{half:.{digits}f}",
        "own_interval": cell.own_interval,
        "difference": None if cell.difference is None else signed(cell.difference, digits),
        "verdict": _verdict(cell, half),
    }


def signed(value: float, digits: int) -> str:
    """A difference with its sign as an arrow as well, for those who do not see the colour: `▲ +0.30`."""
    rounded = round(value, digits)
    sign = "▲ +" if rounded > 0 else "▼ −" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.{digits}f}"


def _verdict(cell: Cell, half: float | None) -> str:
    if cell.better is None:
        return ""
    within = half is not None and abs(cell.difference) <= half
    return ("better" if cell.better else "worse") + " within" * within
