"""Reported numbers as W&B runs of their own, so that any chart of a project compares with them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb

from mmtrain.config_errors import UserError
from mmtrain.reported import Column, Paper, ReportedTable, as_logged

GROUP, JOB_TYPE = "reported", "baseline"
SECONDS_TO_CONNECT, SECONDS_TO_FINISH = 30.0, 120.0


@dataclass(frozen=True)
class Baseline:
    """One row of a reported table as a run.

    Args:
        id: depends on paper, table and row only, so that logging it again changes the same run.
        metrics: under our names and in our scale (fractions where the paper prints percent); what we do not measure is
            called `reported/<column>`.
        config: what the numbers are: setting, source, status, how the paper counts, and the notes of the table.
    """

    id: str
    name: str
    metrics: dict[str, float]
    config: dict[str, Any]
    tags: tuple[str, ...]


def baselines(paper: Paper) -> list[Baseline]:
    """A baseline for each row that has a number; null cells and words are left out."""
    return [_baseline(paper, table, row) for table in paper.tables for row in table.rows if _metrics(table, row)]


def _baseline(paper: Paper, table: ReportedTable, row: str) -> Baseline:
    digest = hashlib.sha1(f"{paper.name}/{table.id}/{row}".encode()).hexdigest()
    config = {
        "paper": paper.name,
        "citation": paper.citation,
        "table": table.id,
        "title": table.title,
        "row": f"{row} ({table.id})",
        "method": table.method(row),
        "scale": "reported",
        "setting": table.row_setting(row),
        "inferred": list(table.inferred),
        "source": table.source,
        "status": table.status,
        "error": table.error,
        "protocol": {_name(column): column.protocol for column in table.columns if column.protocol},
        "not_comparable": [column.metric for column in table.columns if column.metric and not column.comparable],
        "notes": list(table.notes),
    }
    tags = (GROUP, paper.name, table.id, table.status)
    return Baseline(f"reported-{digest[:16]}", f"reported/{table.id}/{row}", _metrics(table, row), config, tags)


def _name(column: Column) -> str:
    return column.metric or f"reported/{column.name}"


def _metrics(table: ReportedTable, row: str) -> dict[str, float]:
    cells = zip(table.columns, table.rows[row], strict=False)  # a table of words has no columns
    return {_name(column): as_logged(value, column.unit) for column, value in cells if isinstance(value, int | float)}


def log_baselines(
    entries: Sequence[Baseline], entity: str | None, project: str, folder: Path, is_offline: bool
) -> list[Path]:
    """Log the baselines, each as a finished run, and return the folders of the runs.

    Offline, files that an earlier call left in the folder for the same rows are replaced.

    Raises:
        UserError: W&B does not take a run: no key, no network, no right to the project, or a full disk.
    """
    written = []
    for entry in entries:
        for old in folder.glob(f"wandb/offline-run-*-{entry.id}") if is_offline else ():
            shutil.rmtree(old)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(_log(entry, entity, project, folder, is_offline))
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            hint = "" if is_offline else "\n--offline writes them to disk instead, for `wandb sync`"
            raise UserError(f"W&B did not take {entry.name} for {entity}/{project}: {reason}{hint}") from error
    return written


def _log(entry: Baseline, entity: str | None, project: str, folder: Path, is_offline: bool) -> Path:
    settings = wandb.Settings(
        init_timeout=SECONDS_TO_CONNECT,
        finish_timeout=SECONDS_TO_FINISH,
        console="off",
        silent=True,
        x_disable_stats=True,
        disable_git=True,
    )
    run = wandb.init(
        entity=entity,
        project=project,
        dir=folder,
        id=entry.id,
        name=entry.name,
        group=GROUP,
        job_type=JOB_TYPE,
        tags=entry.tags,
        config=entry.config,
        allow_val_change=True,
        mode="offline" if is_offline else "online",
        resume=None if is_offline else "allow",
        reinit="finish_previous",
        settings=settings,
    )
    if not run.resumed:  # else its one step of history is there
        run.log(entry.metrics)
    run.summary.update(entry.metrics)
    run.finish()
    return Path(run.dir).parent
