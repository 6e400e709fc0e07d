"""Static pictures of the report's tables and curves, for slides and papers. No display and no global state is used."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtrain.reporting import palette
from mmtrain.reporting.contents import Chart, Contents
from mmtrain.reporting.page_tables import signed, split_name
from mmtrain.reporting.results import Run
from mmtrain.reporting.tables import ARROWS, UNIT_SIGNS, Cell, ComparedTable, Row, TableColumn

DPI = 160
CHARACTER = 0.088  # inches of a character at 9.5 pt
LINE = 0.19  # inches of a line of text
TEXT, MUTED, RULE, OURS = "#1b1f24", "#59636e", "#9aa3ad", "#e9f1ff"


def write_images(contents: Contents, folder: Path) -> list[Path]:
    """Write a PNG of each table and each chart into the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"table_{table.paper}_{table.id}" for table in contents.tables()]
    names += [f"curve_{chart.setting}_{chart.metric}" for chart in contents.charts]
    paths = [folder / f"{name}.png" for name in _file_names(names)]
    figures = [table_figure(table) for table in contents.tables()]
    figures += [chart_figure(chart, contents.runs, contents.methods) for chart in contents.charts]
    for figure, path in zip(figures, paths, strict=True):
        figure.savefig(path, dpi=DPI, facecolor="white")
    return paths


def table_figure(table: ComparedTable) -> Figure:
    """Draw a table: reported rows plain, ours bold on blue, differences with arrow and sign, footnotes below."""
    names = [_row_name(row) for row in table.rows]
    heads = _heads(table.columns)
    first = max([len(name) for name in names] + [8]) * CHARACTER + 0.25
    widths = [_width([head, *(_cell_text(row.cells[i]) for row in table.rows)]) for i, head in enumerate(heads)]
    edges = first + np.cumsum([0.0, *widths])
    width = max(edges[-1] + 0.2, 6.5)
    title = textwrap.wrap(table.title, int(width * 9))
    source = textwrap.wrap(" · ".join(filter(None, [table.source, table.status, table.setting])), int(width * 14.5))
    notes = [line for note in table.footnotes() for line in textwrap.wrap(note, int(width * 14.5))]
    head_height = (heads[0].count("\n") + 1) * LINE + 0.1
    heights = [_row_height(row) for row in table.rows]
    height = 0.6 + 0.24 * len(title) + 0.16 * (len(source) + len(notes)) + head_height + sum(heights)
    figure, axes = _blank(width, height)
    y = _lines(axes, title, 0.16, 0.24, size=12, weight="bold", color=TEXT)
    y = _lines(axes, source, y, 0.16, size=8, color=MUTED) + 0.08
    y = _draw_row(axes, y, head_height, "", heads, edges, weight="bold")
    for place, (row, name, row_height) in enumerate(zip(table.rows, names, heights, strict=True)):
        if place == 0 or row.kind != table.rows[place - 1].kind:
            _rule(axes, y, edges[-1])
        y = _draw_table_row(axes, y, row_height, row, name, edges, is_tinted=table.status != "measured")
    _rule(axes, y, edges[-1])
    _lines(axes, notes, y + 0.1, 0.16, size=8, color=MUTED)
    return figure


def chart_figure(chart: Chart, runs: Sequence[Run], methods: Sequence[str]) -> Figure:
    """Draw a chart: each seed thin, the mean of each method thick and dashed in its own way."""
    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for place, method in enumerate(methods):
        curves = [curve for run, curve in chart.curves.items() if runs[run].method == method]
        colour, dash = palette.method_colour(place)[0], palette.DASHES[place % len(palette.DASHES)]
        if len(curves) > 1:
            for steps, values in curves:
                axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.6)
        if curves:
            label = f"{method}, mean of {len(curves)} seeds" if len(curves) > 1 else method
            axes.plot(*_mean(curves), color=colour, linewidth=1.5, linestyle=_line_style(dash), label=label)
    axes.set_title(f"{chart.metric}\n", loc="left", fontsize=11, fontweight="bold", color=TEXT, parse_math=False)
    axes.text(0, 1.03, chart.setting, transform=axes.transAxes, fontsize=8.5, color=MUTED, parse_math=False)
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=8.5).get_texts():
        text.set_parse_math(False)
    return figure


def _mean(curves: Sequence[tuple[list[int], list[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at all their steps inside the range that they share."""
    first, last = max(steps[0] for steps, _ in curves), min(steps[-1] for steps, _ in curves)
    union = np.unique(np.concatenate([steps for steps, _ in curves]))
    union = union[(union >= first) & (union <= last)]
    return union, np.mean([np.interp(union, *curve) for curve in curves], axis=0)


def _line_style(dash: str) -> str | tuple[int, list[float]]:
    return (0, [float(part) / 2 for part in dash.split()]) if dash else "-"


def _file_names(names: Sequence[str]) -> list[str]:
    """Names that any file system takes, each once."""
    plain: list[str] = []
    for name in names:
        base = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:100]
        taken = sum(other == base or re.fullmatch(rf"{base}_\d+", other) is not None for other in plain)
        plain.append(f"{base}_{taken}" if taken and base in plain else base)
    return plain


def _row_name(row: Row) -> str:
    kind = f" ({row.shown_kind})" if row.kind == "ours" else ""
    return row.name + kind + ("†" if row.marks else "")


def _heads(columns: Sequence[TableColumn]) -> list[str]:
    """Heads of the same number of lines, so that the signs stand in one line."""
    heads = [_head(column) for column in columns]
    most = max(head.count("\n") for head in heads)
    return ["\n" * (most - head.count("\n")) + head for head in heads]


def _head(column: TableColumn) -> str:
    signs = f"{UNIT_SIGNS.get(column.unit, column.unit)} {ARROWS[column.direction]}{column.mark}".strip()
    group, label = split_name(column.name)
    return "\n".join([*textwrap.wrap(group, 11), *textwrap.wrap(label, 11), signs])


def _cell_text(cell: Cell) -> str:
    """Value and interval, and below them the difference."""
    value = cell.text.partition(" (")[0]
    digits = len(value.split()[0].partition(".")[2]) if value else 0
    return value if cell.difference is None else f"{value}\n{signed(cell.difference, digits)}"


def _row_height(row: Row) -> float:
    return (1 + any("\n" in _cell_text(cell) for cell in row.cells)) * LINE + 0.1


def _width(texts: Sequence[str]) -> float:
    return max(len(line) for text in texts for line in text.split("\n")) * CHARACTER + 0.2


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose coordinates are inches from the top left."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.1, width - 0.1), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def _lines(axes: Axes, lines: Sequence[str], y: float, step: float, size: float, **style: str) -> float:
    for line in lines:
        axes.text(0.05, y, line, fontsize=size, va="top", parse_math=False, **style)
        y += step
    return y


def _rule(axes: Axes, y: float, right: float) -> None:
    axes.plot([0, right], [y, y], color=RULE, linewidth=0.8)


def _draw_row(
    axes: Axes, y: float, height: float, name: str, texts: Sequence[str], edges: np.ndarray, **style: str
) -> float:
    axes.text(0.05, y + 0.05, name, fontsize=9.5, va="top", color=TEXT, parse_math=False, **style)
    for text, right in zip(texts, edges[1:], strict=True):
        for place, line in enumerate(text.split("\n")):
            at = (right - 0.08, y + 0.05 + place * LINE)
            axes.text(*at, line, fontsize=9.5, va="top", ha="right", color=TEXT, parse_math=False, **style)
    return y + height


def _draw_table_row(
    axes: Axes, y: float, height: float, row: Row, name: str, edges: np.ndarray, is_tinted: bool
) -> float:
    """A row, and over its blank second line the coloured differences. Ours stand out where others are beside them."""
    stands_out = is_tinted and row.kind == "ours"
    if stands_out:
        axes.fill_between([0, edges[-1]], y, y + height, color=OURS, linewidth=0)
    values = [_cell_text(cell).split("\n")[0] for cell in row.cells]
    _draw_row(axes, y, height, name, values, edges, weight="bold" if stands_out else "normal")
    for cell, right in zip(row.cells, edges[1:], strict=True):
        if cell.difference is not None:
            colour = {True: palette.BETTER, False: palette.WORSE, None: palette.NEUTRAL}[cell.better][0]
            text = _cell_text(cell).split("\n")[1]
            at = (right - 0.08, y + 0.05 + LINE)
            axes.text(*at, text, fontsize=8.5, va="top", ha="right", color=colour, weight="bold", parse_math=False)
    return y + height
