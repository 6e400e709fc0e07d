"""What a report is made of: the runs, their tables beside the papers', their curves, and claims that were tested."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain import reported
from mmtrain.reporting.claims import FILE as CLAIMS_FILE
from mmtrain.reporting.claims import read_claims
from mmtrain.reporting.curves import Curve, read_curves
from mmtrain.reporting.results import Run, RunGroup, group_runs
from mmtrain.reporting.tables import ComparedTable, compare, laptop_tables, measured_tables

SCALE_ORDER = ("full", "simulation", "laptop")
LAPTOP_WARNING = "Laptop scale, never comparable with the paper's rows: other data, other networks, short training."


@dataclass(frozen=True)
class PaperTables:
    """A paper's tables with our rows, in the paper's order, and tables of all that our runs measured, but laptop scale.

    `errors` has the reading error of each digitised table by its id, in the unit of its columns.
    """

    name: str
    title: str
    citation: str
    tables: list[ComparedTable]
    measured: list[ComparedTable]
    errors: dict[str, float]
    own_method: str | None = None

    @property
    def has_ours(self) -> bool:
        return any(has_ours(table) for table in self.tables)


@dataclass(frozen=True)
class Chart:
    """One metric of the runs that share a setting; `curves` by the run's place in `Contents.runs`."""

    setting: str
    metric: str
    curves: dict[int, Curve]


@dataclass(frozen=True)
class Contents:
    """All of a report. `laptop` are tables of runs that may not stand beside a paper's rows."""

    title: str
    runs: list[Run]
    groups: list[RunGroup]
    papers: list[PaperTables]
    laptop: list[ComparedTable]
    charts: list[Chart]
    claims: list[dict[str, Any]]

    @property
    def methods(self) -> list[str]:
        """Methods of the runs, each once, in their order."""
        return list(dict.fromkeys(run.method for run in self.runs))

    def tables(self) -> list[ComparedTable]:
        """Every table of the report."""
        return [table for paper in self.papers for table in [*paper.tables, *paper.measured]] + self.laptop


def gather(runs: Sequence[Run], title: str) -> Contents:
    """Read what the run folders hold and put the runs into tables.

    Raises:
        UserError: a file of curves or claims is there, but is not what it should be.
    """
    runs = _in_order(runs)
    groups = group_runs(runs)
    names = dict.fromkeys(run.paper for run in runs)
    papers = [_paper_tables(name, groups) for name in names]
    folders = dict.fromkeys(run.folder.parent for run in runs)
    claims = [read_claims(path) for folder in folders if (path := folder / CLAIMS_FILE).exists()]
    return Contents(title, runs, groups, papers, laptop_tables(groups), _charts(runs), claims)


def has_ours(table: ComparedTable) -> bool:
    return any(row.kind == "ours" for row in table.rows)


def groups_of_rows(table: ComparedTable, groups: Sequence[RunGroup]) -> list[RunGroup]:
    """The groups behind the rows of ours, in their order: those of the paper and the scale that have a metric of it."""
    scales = (table.id.partition("_")[0],) if table.status == "measured" else ("full", "simulation")
    metrics = {column.metric for column in table.columns}
    candidates = [group for group in groups if group.paper == table.paper and group.scale in scales]
    return [group for group in candidates if metrics & group.metrics.keys()]


def is_laptop(table: ComparedTable) -> bool:
    return table.status == "measured" and table.id.startswith("laptop_")


def seed_name(run: Run) -> str:
    """The seed as the page's filter names it."""
    return "none" if run.seed is None else str(run.seed)


def scale_name(run: Run) -> str:
    """`full scale`, `laptop scale` or `simulation`."""
    return run.scale if run.scale == "simulation" else f"{run.scale} scale"


def setting_name(run: Run) -> str:
    """What runs must share to be drawn in one chart, in words: `laptop scale: rn_small, emoji`."""
    return f"{scale_name(run)}: {', '.join(map(str, run.setting.values())) or run.run}"


def _in_order(runs: Sequence[Run]) -> list[Run]:
    """Full scale, then simulation, then laptop; in them by method, the paper's own first, then by seed."""
    methods: list[str] = []
    for name in dict.fromkeys(run.paper for run in runs):
        if name in reported.papers():
            paper = reported.load(name)
            methods += [paper.own_method, *(table.method(row) for table in paper.tables for row in table.rows)]
    methods += [run.method for run in runs]
    return sorted(
        runs, key=lambda run: (SCALE_ORDER.index(run.scale), methods.index(run.method), run.seed is None, run.seed or 0)
    )


def _paper_tables(name: str, groups: Sequence[RunGroup]) -> PaperTables:
    """A paper without reported numbers has only what was measured."""
    measured = measured_tables([group for group in groups if group.paper == name])
    if name not in reported.papers():
        return PaperTables(name, name, "no reported numbers for this paper", [], measured, {})
    paper = reported.load(name)
    tables = [compare(table, groups) for table in paper.tables]
    errors = {table.id: table.error for table in paper.tables if table.error is not None}
    return PaperTables(name, paper.title, paper.citation, tables, measured, errors, paper.own_method)


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each setting and metric with at least two points, losses first."""
    found: dict[tuple[str, str], dict[int, Curve]] = {}
    for place, run in enumerate(runs):
        for metric, curve in read_curves(run.folder).items():
            found.setdefault((setting_name(run), metric), {})[place] = curve
    charts = [
        Chart(*key, curves) for key, curves in found.items() if any(len(steps) > 1 for steps, _ in curves.values())
    ]
    settings = list(dict.fromkeys(setting_name(run) for run in runs))
    return sorted(charts, key=lambda chart: (settings.index(chart.setting), *_importance(chart.metric)))


def _importance(metric: str) -> tuple[int, list[str | int]]:
    """Losses, then other training values, then evaluation, then counters and the rest; R@5 before R@10."""
    prefixes = ("train/loss", "train/", "val/")
    place = next((place for place, prefix in enumerate(prefixes) if metric.startswith(prefix)), len(prefixes))
    return place, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", metric)]
