"""What `test` leaves in a W&B run: metrics, the tables beside the reported ones, pictures, and how it was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import wandb
from lightning.pytorch.utilities import rank_zero_warn

from mmtrain.reporting.results import Run, is_video
from mmtrain.reporting.tables import ComparedTable

TABLES = "tables"  # tables are logged as tables/<id>
PICTURES = {
    "figure": "figures",
    "sample": "samples",
    "video": "videos",
}  # kind of a picture: the key it is logged under
ABOUT = ("paper", "method", "scale", "seed", "setting", "checkpoint", "protocol", "missing", "evaluated", "skipped")


def log_results(experiment: wandb.Run, run: Run, compared_tables: Sequence[ComparedTable]) -> None:
    """Log a tested run to W&B. What cannot be logged is left out, with one warning for all of it.

    The run gets the paper's name and its scale as tags, which the dashboard looks for: a run of laptop scale never
    stands beside a paper's rows there either.

    Args:
        experiment: the W&B run, `WandbLogger.experiment`.
        run: what `test` measured; its pictures are looked for in its folder.
        compared_tables: tables to log as they are.
    """
    step = {"trainer/global_step": run.step}  # the axis that Lightning gives all metrics of the run
    metrics = {name: value for name, value in (run.metrics | step).items() if math.isfinite(value)}
    tables = {f"{TABLES}/{table.id}": table for table in compared_tables}
    parts = {
        "config": lambda: experiment.config.update(about(run, experiment.config), allow_val_change=True),
        "tags": lambda: setattr(experiment, "tags", sorted({*(experiment.tags or ()), run.paper, run.scale})),
        "metrics": lambda: experiment.log(metrics),
        "tables": lambda: experiment.log({key: as_table(table) for key, table in tables.items()} | step),
        "pictures": lambda: experiment.log(pictures(run) | step),
    }
    errors = []
    for name, log in parts.items():
        try:
            log()
        except Exception as error:
            errors.append(f"{name}: {error}")
    if errors:
        rank_zero_warn(f"W&B did not take all results ({'; '.join(errors)}); they are in {run.folder}")


def about(run: Run, config: Any) -> dict[str, Any]:
    """What a reader of the metrics must know, as config keys; `row` is the same for all seeds of a method.

    Args:
        run: the tested run.
        config: that of the W&B run, whose `data_counts` of the training are kept.
    """
    counts = {**dict(config.get("data_counts") or {}), **run.data_counts}
    return {key: getattr(run, key) for key in ABOUT} | {"row": row_name(run), "data_counts": counts}


def row_name(run: Run) -> str:
    """How the run's bar is called in charts: method and setting, e.g. `RankCLIP ViT-B-32 CC3M`."""
    scale = {"laptop": " (laptop scale)", "simulation": " (simulation)"}.get(run.scale, "")
    return " ".join([run.method, *run.setting.values()]) + scale


def as_table(table: ComparedTable) -> wandb.Table:
    """The rows as numbers, so that W&B can sort them; a column of differences after each column that has any."""
    columns, values = ["row", "kind"], [[row.name, row.shown_kind] for row in table.rows]
    for index, column in enumerate(table.columns):
        cells = [row.cells[index] for row in table.rows]
        has_words = table.status == "qualitative" or column.unit == "text"
        parts = {column.header: [cell.text if has_words else cell.value for cell in cells]}
        if any(cell.difference is not None for cell in cells):
            parts[f"{column.header} difference"] = [cell.difference for cell in cells]
        for header, entries in parts.items():
            columns.append(header)
            values = [[*row, entry] for row, entry in zip(values, entries, strict=True)]
    marks = ["; ".join(row.marks) for row in table.rows]
    return wandb.Table([*columns, "marks"], [[*row, mark] for row, mark in zip(values, marks, strict=True)])


def pictures(run: Run) -> dict[str, list[wandb.Image | wandb.Video]]:
    """The run's pictures and videos by key, each with its title; a file that is gone is left out."""
    found: dict[str, list[wandb.Image | wandb.Video]] = {}
    for figure in run.figures:
        path = run.folder / figure["file"]
        if path.is_file():
            kind = wandb.Video if is_video(figure) else wandb.Image
            image = kind(str(path), caption=figure.get("title"))
            found.setdefault(PICTURES.get(figure.get("kind"), "figures"), []).append(image)
    return found
