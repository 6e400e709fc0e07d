"""A paper's table with our rows in it, as plain data that terminal, markdown, HTML and W&B show alike.

A difference is ours minus the reported value of the same method. It gets a judgement (`better`) only where setting and
protocol are the same. Runs in simulation stand under the rows of a real robot, marked, and without any difference.
Runs of laptop scale never stand in a paper's table; they have tables of their own.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mmtrain.reported import HUNDREDFOLD, METRIC, Column, ReportedTable, as_reported, same_setting
from mmtrain.reporting.results import Estimate, RunGroup

DAGGER = "†"
ARROWS = {"higher": "↑", "lower": "↓", "none": ""}
UNIT_SIGNS = {"percent": "%", "cosine_x100": "×100", "none": ""}
SETTING_NAMES = {"train_data": "training data"}
FRACTIONS = re.compile(
    r"(zero_shot|all_classes)_top\d+|(one_caption_)?(i2t|t2i)_r\d+|linear_probe(_lbfgs)?|(soft|hard)_(clamp|lift)|"
    r"f_acc(_single|_two)?|c_f1(_macro)?|order_kept"
)
SIMULATION = "simulation, measured; the reported numbers are from the real robot"
BOUNDS = ("_low", "_high")  # ends of the keys of a metric's own 95 % interval
DECIMALS = {
    "percent": 1,
    "cosine_x100": 2,
    "score": 2,
    "ratio": 2,
    "ms": 1,
    "us": 1,
    "count": 0,
}  # of what was simulated
INTERVAL_NOTE = "Our values: mean ± half of the 95 % Student-t interval over seeds, where there are several."
EPISODES_NOTE = "In brackets: 95 % interval over the episodes of one run."


@dataclass(frozen=True)
class Cell:
    """One number of a table, in the column's unit.

    Args:
        value: None if there is none, or if it is NaN.
        low, high: bounds of the 95 % interval over seeds; for a single run those that it measured itself, else None.
        reported: the paper's value of the same method, for our cells.
        difference: value minus reported; None where the protocols are not comparable.
        better: whether the difference is for the better; None if that cannot be said.
        text: as shown.
        own_interval: the bounds are the run's own and stand in brackets, as `text` shows them.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reported: float | None = None
    difference: float | None = None
    better: bool | None = None
    text: str = "–"
    own_interval: str = ""


@dataclass(frozen=True)
class Row:
    """A row; `marks` say why it is not to be compared with the others, e.g. trained on other data.

    `shown_kind` is what is printed for `kind`: rows of ours that were measured in simulation say so.
    """

    name: str
    kind: Literal["reported", "ours", "chance"]
    cells: list[Cell]
    marks: list[str]
    method: str
    is_simulated: bool = False

    @property
    def shown_kind(self) -> str:
        return "simulation" if self.is_simulated else self.kind


@dataclass(frozen=True)
class TableColumn:
    """A column; `mark` is a dagger if our protocol and the paper's are not comparable, else empty."""

    name: str
    unit: str
    direction: Literal["higher", "lower", "none"]
    mark: str = ""
    metric: str | None = None

    @property
    def header(self) -> str:
        """Name, unit sign, the way that is better, mark: `coco_t2i_r1 %↑†`."""
        return f"{self.name} {UNIT_SIGNS.get(self.unit, self.unit)}{ARROWS[self.direction]}{self.mark}".rstrip()


@dataclass(frozen=True)
class ComparedTable:
    """Rows under common columns. `status` is that of the reported numbers, "measured" if there are none."""

    paper: str
    id: str
    title: str
    source: str
    status: str
    setting: str
    columns: list[TableColumn]
    rows: list[Row]
    notes: list[str]

    def footnotes(self) -> list[str]:
        """All that belongs under the table: the notes, and the marks of its rows with a dagger."""
        return self.notes + [
            f"{DAGGER} {row.name} ({row.shown_kind}): {'; '.join(row.marks)}" for row in self.rows if row.marks
        ]


def compare(table: ReportedTable, groups: Sequence[RunGroup]) -> ComparedTable:
    """Put our runs under the rows of a reported table.

    Args:
        table: the reported one; its rows come first.
        groups: those of this paper, of full scale or simulated, and with at least one metric of the table enter.
    """
    ours = [column for column in table.columns if column.metric]
    groups = [group for group in groups if group.paper == table.paper and group.scale != "laptop"]
    groups = [group for group in groups if any(column.metric in group.metrics for column in ours)]
    marks = [DAGGER if column.metric and not column.comparable else "" for column in table.columns]
    columns = [
        TableColumn(column.name, column.unit, column.direction, mark, column.metric)
        for column, mark in zip(table.columns, marks, strict=True)
    ]
    rows = [_reported_row(table, name) for name in table.rows]
    rows += [_our_row(table, group, name) for group, name in zip(groups, _names(groups), strict=True)]
    columns = columns or [TableColumn("shown", "none", "none")]
    notes = _notes(table) + _interval_notes(groups, rows)
    setting = ", ".join(
        f"{_words(key)} {value}{' (inferred)' if key in table.inferred else ''}" for key, value in table.setting.items()
    )
    return ComparedTable(table.paper, table.id, table.title, table.source, table.status, setting, columns, rows, notes)


def laptop_tables(groups: Sequence[RunGroup]) -> list[ComparedTable]:
    """Our runs of laptop scale, a table for each evaluated set: a row a method, and one of chance where it is known."""
    return _measured(groups, "laptop", "laptop scale, not comparable with the paper")


def measured_tables(groups: Sequence[RunGroup]) -> list[ComparedTable]:
    """Every metric of our runs, a table for each evaluated set; also those that no paper reports. No laptop scale."""
    simulated = _measured(groups, "simulation", "all that was measured in simulation")
    return _measured(groups, "full", "all that was measured") + simulated


def _reported_row(table: ReportedTable, name: str) -> Row:
    values = table.rows[name]
    if not table.columns:
        cells = [Cell(None, text=", ".join(values))]
    else:
        cells = [_reported_cell(value, _decimals(table, index)) for index, value in enumerate(values)]
    return Row(name, "reported", cells, [], table.method(name))


def _reported_cell(value: float | str | None, decimals: int) -> Cell:
    if value is None or isinstance(value, str):
        return Cell(None, text=value or "–")
    return Cell(value, text=f"{value:.{decimals}f}")


def _our_row(table: ReportedTable, group: RunGroup, name: str) -> Row:
    if group.scale == "simulation":
        cells = [_simulated_cell(group, column.metric, column.unit) for column in table.columns]
        return Row(name, "ours", cells, [SIMULATION], group.method, is_simulated=True)
    reported_row = table.row_of(group.method, group.setting)
    marks = _setting_marks(table, group, reported_row)
    cells = []
    for index, column in enumerate(table.columns):
        reported = table.rows[reported_row][index] if reported_row else None
        reported = None if isinstance(reported, str) else reported
        measured = group.metrics.get(column.metric)
        decimals = max(_decimals(table, index), 2 if column.unit in HUNDREDFOLD else 3)
        cells.append(_our_cell(measured, column, reported, table.error or 0.0, bool(marks), decimals))
    return Row(name, "ours", cells, marks, group.method)


def _our_cell(
    measured: Estimate | None, column: Column, reported: float | None, error: float, is_marked: bool, decimals: int
) -> Cell:
    """A cell of ours. Within the reading error of a digitised value no difference is better or worse."""
    if measured is None or math.isnan(measured.mean):
        return Cell(None, reported=reported, text="–" if measured is None else "nan")
    value, low, high = (
        None if bound is None else as_reported(bound, column.unit)
        for bound in (measured.mean, measured.low, measured.high)
    )
    text = _with_interval(value, high, decimals)
    if reported is None or not column.comparable:
        return Cell(value, low, high, reported, text=text)
    difference = value - reported
    shown = round(difference, decimals) + 0.0  # no -0.00
    better = None
    if not is_marked and column.direction != "none" and shown and abs(difference) > error:
        better = (difference > 0) == (column.direction == "higher")
    return Cell(value, low, high, reported, difference, better, f"{text} ({shown:+.{decimals}f})")


def _simulated_cell(group: RunGroup, metric: str | None, unit: str) -> Cell:
    """A value measured in simulation: never beside a reported one, and with its own interval if it is of one run."""
    measured = group.metrics.get(metric)
    if measured is None or math.isnan(measured.mean):
        return Cell(None, text="–" if measured is None else "nan")
    bounds = [group.metrics.get(f"{metric}{end}") for end in BOUNDS] if measured.n == 1 else []
    is_own = len(bounds) == 2 and all(bound is not None and math.isfinite(bound.mean) for bound in bounds)
    low, high = (bound.mean for bound in bounds) if is_own else (measured.low, measured.high)
    value, low, high = (None if bound is None else as_reported(bound, unit) for bound in (measured.mean, low, high))
    decimals = DECIMALS.get(unit, 3)
    if not is_own:
        return Cell(value, low, high, text=_with_interval(value, high, decimals))
    interval = f"[{low:.{decimals}f}, {high:.{decimals}f}]"
    return Cell(value, low, high, text=f"{value:.{decimals}f} {interval}", own_interval=interval)


def _interval_notes(groups: Sequence[RunGroup], rows: Sequence[Row]) -> list[str]:
    has_own = any(cell.own_interval for row in rows for cell in row.cells)
    return [INTERVAL_NOTE] * any(len(group.runs) > 1 for group in groups) + [EPISODES_NOTE] * has_own


def _with_interval(value: float, high: float | None, decimals: int) -> str:
    half = "" if high is None else f" ± {high - value:.{decimals}f}"
    return f"{value:.{decimals}f}{half}"


def _decimals(table: ReportedTable, index: int) -> int:
    """Printed decimals of a column: those of its longest value, as YAML keeps no trailing zeros."""
    values = [row[index] for row in table.rows.values() if isinstance(row[index], int | float)]
    as_float = float if any(isinstance(value, float) for value in values) else int
    return max((len(repr(as_float(value)).partition(".")[2]) for value in values), default=0)


def _setting_marks(table: ReportedTable, group: RunGroup, reported_row: str | None) -> list[str]:
    """Why a run's setting is not the table's, in words; empty if it is."""
    expected = table.row_setting(reported_row) if reported_row else table.setting
    marks = []
    for key, value in expected.items():
        if key not in group.setting:
            marks.append(f"{_words(key)} not recorded ({value} in the table)")
        elif not same_setting(group.setting[key], value):
            marks.append(f"other {_words(key)}: {group.setting[key]} instead of {value}")
    if not reported_row and group.method in map(table.method, table.rows):
        marks.append(f"the table has no {group.method} in this setting")
    return marks


def _words(key: str) -> str:
    return SETTING_NAMES.get(key, key.replace("_", " "))


def _notes(table: ReportedTable) -> list[str]:
    """How the paper counted, once for all columns that share it, then the reading error and the table's own notes."""
    protocols: dict[tuple[str, str], list[str]] = {}
    for column in table.columns:
        if column.protocol:
            mark = f"{DAGGER} " if column.metric and not column.comparable else ""
            protocols.setdefault((mark, column.protocol), []).append(column.name)
    notes = [f"{mark}{', '.join(names)}: {protocol}" for (mark, protocol), names in protocols.items()]
    if table.error is not None:
        notes.append(f"Read off a figure, within ± {table.error:g}.")
    return notes + table.notes


def _names(groups: Sequence[RunGroup]) -> list[str]:
    """Row names: the method, and as much more as tells the groups apart; the number of seeds if there are several."""
    ways: list[Callable[[RunGroup], str]] = [
        lambda group: group.method,
        lambda group: f"{group.method} {_setting(group)}",
        lambda group: group.runs[0].label,
        lambda group: f"{group.runs[0].label} ({group.runs[0].folder})",
    ]
    names = [ways[0](group) for group in groups]
    for way in ways[1:]:
        names = [way(group) if names.count(name) > 1 else name for group, name in zip(groups, names, strict=True)]
    seeds = [f", {len(group.runs)} seeds" if len(group.runs) > 1 else "" for group in groups]
    return [name + count for name, count in zip(names, seeds, strict=True)]


def _setting(group: RunGroup) -> str:
    return " ".join(map(str, group.setting.values()))


def _measured(groups: Sequence[RunGroup], scale: str, title: str) -> list[ComparedTable]:
    groups = [group for group in groups if group.scale == scale]
    keys = [(group.paper, metric) for group in groups for metric in group.metrics if METRIC.fullmatch(metric)]
    pairs = dict.fromkeys((paper, metric.split("/")[1]) for paper, metric in keys)
    return [_set_table([g for g in groups if g.paper == paper], paper, name, scale, title) for paper, name in pairs]


def _set_table(groups: list[RunGroup], paper: str, name: str, scale: str, title: str) -> ComparedTable:
    """Our table of one evaluated set."""
    prefix = f"test/{name}/"
    groups = [group for group in groups if any(metric.startswith(prefix) for metric in group.metrics)]
    metrics = list(dict.fromkeys(m for group in groups for m in group.metrics if m.startswith(prefix)))
    metrics = [metric for metric in metrics if not _repeats(metric, groups) and not _is_bound(metric, groups)]
    units = [_unit(metric.removeprefix(prefix)) for metric in metrics]
    columns = [
        TableColumn(
            metric.removeprefix(prefix).removesuffix(f"_{unit}"),
            unit,
            "higher" if unit == "percent" else "none",
            "",
            metric,
        )
        for metric, unit in zip(metrics, units, strict=True)
    ]
    rows = []
    for group, row_name in zip(groups, _names(groups), strict=True):
        is_simulated = group.scale == "simulation"
        cells = [
            _simulated_cell(group, metric, unit) if is_simulated else _plain_cell(group.metrics.get(metric), unit)
            for metric, unit in zip(metrics, units, strict=True)
        ]
        rows.append(Row(row_name, "ours", cells, [], group.method, is_simulated))
    chance = {metric: value for group in reversed(groups) for metric, value in group.chance.items()}
    if any(metric in chance for metric in metrics):
        known = [Estimate(chance[m], None, None, 1, (chance[m],)) if m in chance else None for m in metrics]
        cells = [_plain_cell(value, unit) for value, unit in zip(known, units, strict=True)]
        rows.append(Row("chance", "chance", cells, [], "chance"))
    settings = dict.fromkeys(map(_setting, groups))
    notes = _interval_notes(groups, rows)
    return ComparedTable(
        paper, f"{scale}_{name}", f"{name}: {title}", "our runs", "measured", "; ".join(settings), columns, rows, notes
    )


def _repeats(metric: str, groups: Sequence[RunGroup]) -> bool:
    """Whether this is a one-caption protocol's value in a set that has one caption a picture, where it says nothing."""
    standard = metric.replace("/one_caption_", "/")
    return standard != metric and all(group.metrics.get(metric) == group.metrics.get(standard) for group in groups)


def _is_bound(metric: str, groups: Sequence[RunGroup]) -> bool:
    """Whether this is a bound of another metric's interval, in whose cell it is shown."""
    base = metric.removesuffix("_low").removesuffix("_high")
    return base != metric and any(base in group.metrics for group in groups)


def _unit(name: str) -> str:
    ending = name.rpartition("_")[2]
    return "percent" if FRACTIONS.fullmatch(name) else ending if ending in ("ms", "us") else "none"


def _plain_cell(measured: Estimate | None, unit: str) -> Cell:
    direction = "higher" if unit == "percent" else "none"
    return _our_cell(measured, Column("", unit, direction), None, 0.0, False, 2 if unit == "percent" else 3)


def to_rich(table: ComparedTable, columns: int = 6) -> RenderableType:
    """The table for a terminal, in blocks of at most `columns` columns so that 80 characters hold it."""
    num_blocks = max(1, math.ceil(len(table.columns) / columns))
    bounds = [round(len(table.columns) * block / num_blocks) for block in range(num_blocks + 1)]
    blocks = [_rich_block(table, start, stop) for start, stop in itertools.pairwise(bounds)]
    head = Text(table.title, style="bold") + Text(f"\n{_source_line(table)}", style="dim not bold")
    return Group(head, *blocks, Text("\n".join(table.footnotes()), style="dim"))


def _rich_block(table: ComparedTable, start: int, stop: int) -> Table:
    block = Table(box=None, pad_edge=False, header_style="bold")
    block.add_column("", overflow="fold")
    block.add_column("", overflow="fold")
    for column in table.columns[start:stop]:
        block.add_column(column.header.replace("_", " "), justify="right", overflow="fold")
    colors = {True: "green", False: "red", None: ""}
    for row in table.rows:
        cells = [
            Text(re.sub(r" (?=[(\[])", "\n", cell.text, count=1), style=colors[cell.better])
            for cell in row.cells[start:stop]
        ]
        block.add_row(_marked(row), row.shown_kind, *cells, style="bold" if row.kind == "ours" else "")
    return block


def to_markdown(table: ComparedTable) -> str:
    """The table as GitHub-flavoured markdown with a heading, its source, and its footnotes; ends with a newline."""
    head = ["", "", *(column.header for column in table.columns)]
    lines = [_pipes(head), "|---|---|" + "---:|" * len(table.columns)]
    lines += [_pipes([_marked(row), row.shown_kind, *(cell.text for cell in row.cells)]) for row in table.rows]
    notes = [f"- {note}" for note in table.footnotes()]
    parts = [f"### {table.title}", _source_line(table), "\n".join(lines), "\n".join(notes)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _source_line(table: ComparedTable) -> str:
    setting = f" Setting: {table.setting}." if table.setting else ""
    reported = "" if table.status == "measured" else f" Reported numbers: {table.status}."
    return f"Source: {table.source}.{reported}{setting}"


def _marked(row: Row) -> str:
    return f"{row.name} {DAGGER}" if row.marks else row.name


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
