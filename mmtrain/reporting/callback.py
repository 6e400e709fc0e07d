"""What `test` leaves behind: the paper's tables with our row on the terminal, results.json, markdown, W&B."""

from collections import Counter
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
import torch
from rich.console import Console

from mmtrain import distributed, reported
from mmtrain.reporting.across import draw_across
from mmtrain.reporting.results import Run, group_runs, is_video, write_run
from mmtrain.reporting.tables import ComparedTable, compare, laptop_tables, measured_tables, to_markdown, to_rich
from mmtrain.reporting.wandb_log import log_results
from mmtrain.run_folder import code_version

Scale = Literal["full", "simulation", "laptop"]


class Results(pl.Callback):
    """Writes the results of `test` into the run folder and prints them beside the reported ones.

    Args:
        scale: "full"; "simulation" for runs that stand under a paper's rows, marked and without any difference; or
            "laptop" for runs that are never put into a paper's table.
        train_data: name of the training data as the paper writes it, to mark rows that were trained on other data.
    """

    def __init__(self, scale: Scale = "full", train_data: str | None = None) -> None:
        self.scale, self.train_data = scale, train_data

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not getattr(pl_module, "paper", None):
            return
        skipped = gather_skipped(trainer)
        if not trainer.is_global_zero:
            return
        run = collect(trainer, pl_module, self.scale, self.train_data)
        run.skipped = skipped
        run.figures += draw_across(group_runs([run]), run.folder)
        tables = tables_of(run)
        console = Console()
        for table in tables:
            console.print(to_rich(table, columns=max(3, (console.width - 20) // 12)))
        written = write_run(run)
        (run.folder / "results.md").write_text(as_markdown(run, tables), encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.WandbLogger):
                log_results(logger.experiment, run, tables)
        console.print(f"results are in {written}, results.md and figures/ beside it")


def collect(trainer: pl.Trainer, module: pl.LightningModule, scale: Scale, train_data: str | None) -> Run:
    """The run that a trainer has just tested."""
    trained = getattr(module, "trained", {})
    data = trainer.datamodule
    seed = trained.get("seed")
    return Run(
        folder=Path(trainer.default_root_dir),
        paper=module.paper,
        method=module.method,
        run=Path(trainer.default_root_dir).name,
        scale=scale,
        seed=None if seed is None else int(seed),
        step=trained.get("step", 0),
        epoch=trained.get("epoch", 0),
        checkpoint=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        setting={"backbone": module.backbone, "train_data": train_data or "unknown"},
        metrics={name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("test/")},
        chance=module.chance_levels(),
        evaluated={name: about["num_samples"] for name, about in data.evaluation_sets.items()},
        missing=dict(data.missing),
        protocol=module.protocols(),
        data_counts={**trained.get("data_counts", {}), **data.data_counts},
        code=code_version(),
        figures=list(module.figures),
    )


def gather_skipped(trainer: pl.Trainer) -> dict[str, dict[str, int]]:
    """Samples of each loader that could not be read, by reason, over all processes; call it on every one.

    Batches whose features were on disk already are not read again, so their losses are not counted again.
    """
    loaders = zip(trainer.datamodule.loader_names, trainer.test_dataloaders, strict=True)
    counts = [{name: dict(loader.counts) for name, loader in loaders}]
    if distributed.world_size() > 1:
        own, counts = counts[0], [{}] * distributed.world_size()
        torch.distributed.all_gather_object(counts, own)
    total = {name: sum((Counter(part[name]) for part in counts), Counter()) for name in counts[0]}
    return {name: dict(reasons) for name, reasons in total.items() if reasons}


def tables_of(run: Run) -> list[ComparedTable]:
    """The paper's tables that the run has a figure for, then its other figures; of laptop scale the latter only."""
    groups = group_runs([run])
    if run.scale == "laptop":
        return laptop_tables(groups)
    tables = [compare(table, groups) for table in reported.load(run.paper).tables]
    tables = [table for table in tables if any(row.kind == "ours" for row in table.rows)]
    if run.scale == "simulation":  # a paper may report one cell in several tables: those that have this method's row
        tables = [t for t in tables if any(r.kind == "reported" and r.method == run.method for r in t.rows)] or tables[
            :1
        ]
    shown = {column.metric for table in tables for column in table.columns}
    rest = [t for t in measured_tables(groups) if any(column.metric not in shown for column in t.columns)]
    return tables + rest


def has_method(table: ComparedTable, method: str) -> bool:
    """Whether the paper reports a method in a table."""
    return any(row.kind == "reported" and row.method == method for row in table.rows)


def as_markdown(run: Run, tables: list[ComparedTable]) -> str:
    """The tables of one run, its figures, what was missing, and how things were counted."""
    parts = [f"# {run.label}", *(to_markdown(table) for table in tables)]
    parts += [f"{'' if is_video(figure) else '!'}[{figure['title']}]({figure['file']})" for figure in run.figures]
    for title, entries in (("Not there", run.missing), ("How it was counted", run.protocol)):
        if entries:
            parts.append(f"## {title}\n\n" + "\n".join(f"* {name}: {text}" for name, text in entries.items()))
    return "\n\n".join(parts) + "\n"
