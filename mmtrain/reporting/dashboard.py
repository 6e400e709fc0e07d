"""`python -m mmtrain dashboard`: a paper's reported numbers as W&B runs, a workspace that compares, and a report.

The workspace and the report are the same at every call: an earlier one of the same name is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtrain import reported
from mmtrain.config_errors import UserError
from mmtrain.reported import Paper, ReportedTable
from mmtrain.reporting.tables import DAGGER, compare, to_markdown

MAX_BARS = 60
STEP = "trainer/global_step"
CURVES = {  # title: metric, or a pattern of metrics
    "Training loss": "train/loss",
    "Temperature": "train/tau",
    "Zero-shot top-1 while training": "val/.*/zero_shot_top1",
    "Retrieval R@1 while training": "val/.*/(i2t|t2i)_r1",
}
WARNING = (
    f"Charts are in our scale: fractions where the paper prints percent. {DAGGER} marks what is not comparable, as the "
    "protocols differ or the paper's is not known. The name of a reported bar says which table it is from; its run "
    "holds setting, source, status and protocol. Bars called (simulation) were measured in one, the reported ones "
    "beside them on a real robot: only orderings can be compared. Our runs of laptop scale are left out."
)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code.

    Raises:
        UserError: no such paper, wandb-workspaces is not installed, or W&B does not take what is made.
    """
    parser = argparse.ArgumentParser(prog="python -m mmtrain dashboard", description=__doc__.splitlines()[0])
    parser.add_argument("--entity", help="W&B user or team")
    parser.add_argument("--project", required=True, help="W&B project of your runs")
    parser.add_argument("--paper", action="append", help="may be given several times; default: all papers")
    parser.add_argument("--offline", action="store_true", help="only write the reported runs to disk, for wandb sync")
    parser.add_argument("--dir", type=Path, default=Path("runs/reported"), help="folder of the reported runs' files")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be made, as JSON")
    arguments = parser.parse_args(argv)
    papers = [reported.load(name) for name in arguments.paper or reported.papers()]
    if arguments.dry_run:
        print(json.dumps([specification(paper, arguments.entity, arguments.project) for paper in papers], indent=1))
        return 0
    if not arguments.offline:
        if not arguments.entity:
            raise UserError("--entity: is missing; give your W&B user or team, as in --entity NAME")
        extra()  # before anything is logged
    for paper in papers:
        make(paper, arguments.entity, arguments.project, arguments.dir, arguments.offline)
    return 0


def extra() -> tuple[Any, Any]:
    """The modules `wandb_workspaces.workspaces` and `wandb_workspaces.reports.v2`.

    Raises:
        UserError: they are not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError(
            f"dashboard: wandb-workspaces cannot be imported ({error})\n"
            "pip install 'mmtrain[wandb]', or: pip install 'wandb-workspaces>=0.4'"
        ) from error
    return ws, wr


def make(paper: Paper, entity: str | None, project: str, folder: Path, is_offline: bool) -> None:
    """Log the reported runs of a paper and, online, save its workspace and its report.

    Raises:
        UserError: W&B does not take them.
    """
    from mmtrain.reporting.baselines import baselines, log_baselines  # wandb takes a second to import

    written = log_baselines(baselines(paper), entity, project, folder, is_offline)
    print(f"{paper.name}: {len(written)} reported rows logged", file=sys.stderr)
    if is_offline:
        print(f"upload them with: wandb sync {folder}/wandb/offline-run-*-reported-*", file=sys.stderr)
        print("then call this without --offline for the workspace and the report", file=sys.stderr)
        return
    space, text = workspace(paper, entity, project), report(paper, entity, project)
    try:
        space, text = save_workspace(space, paper), save_report(text)
    except Exception as error:
        raise UserError(f"W&B did not take the dashboard of {paper.name} in {entity}/{project}: {error}") from error
    print(f"workspace: {space.url}\nreport: {text.url}")


def specification(paper: Paper, entity: str | None, project: str) -> dict[str, Any]:
    """What `make` would send to W&B, as plain values."""
    from mmtrain.reporting.baselines import baselines

    extra()
    models = {
        "workspace": workspace(paper, entity or "", project)._to_model(),
        "report": report(paper, entity or "", project)._to_model(),
    }
    specs = {key: json.loads(m.spec.model_dump_json(by_alias=True, exclude_none=True)) for key, m in models.items()}
    return {"paper": paper.name, "runs": [asdict(entry) for entry in baselines(paper)], **specs}


def workspace(paper: Paper, entity: str, project: str) -> Any:
    """A section for each table that has a metric of ours, one for training curves, one for pictures.

    Runs are grouped by job type (reported or ours) and then by `row`, so that a bar of ours is the mean over seeds.
    """
    ws, wr = extra()
    tables = [table for table in paper.tables if compared(table)]
    sections = [(table.title, [wr.MarkdownPanel(markdown=markdown(table)), *charts(table)]) for table in tables]
    sections = [("Training curves", curves()), *sections, ("Pictures", media())]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{paper.own_method}: reported and ours",
        sections=[ws.Section(name=name, panels=panels, is_open=i < 2) for i, (name, panels) in enumerate(sections)],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=MAX_BARS),
        runset_settings=ws.RunsetSettings(
            filters="Tags() not in ['laptop']",
            groupby=[ws.Metric("JobType"), ws.Config("row")],
            pinned_columns=["run:displayName", "run:jobType", "config:row.value", "config:table.value"],
        ),
    )


def report(paper: Paper, entity: str, project: str) -> Any:
    """Text and tables of a paper; under each table that we can measure, charts of its own rows and our runs."""
    _, wr = extra()
    blocks = [wr.P(f"{paper.title}. {paper.citation}."), wr.CalloutBlock(WARNING), wr.TableOfContents()]
    for table in paper.tables:
        blocks += [wr.H2(table.title), wr.MarkdownBlock(markdown(table))]
        if compared(table):
            blocks.append(wr.PanelGrid(runsets=[_rows(table), _ours(paper)], panels=charts(table)))
    training = wr.Runset(name="ours", filters="Metric('JobType') != 'baseline'", groupby=["config.row"])
    blocks += [wr.H2("Training curves"), wr.PanelGrid(runsets=[training], panels=curves())]
    blocks += [wr.H2("Pictures"), wr.PanelGrid(runsets=[_ours(paper)], panels=media())]
    title = f"{paper.own_method}: reported and measured"
    return wr.Report(entity=entity, project=project, title=title, description=paper.title, blocks=blocks, width="fluid")


def compared(table: ReportedTable) -> list[reported.Column]:
    """The columns that have a metric of ours and a reported value."""
    cells = {column: [table.value(row, column.name) for row in table.rows] for column in table.columns}
    return [
        column for column, values in cells.items() if column.metric and any(isinstance(v, int | float) for v in values)
    ]


def charts(table: ReportedTable) -> list[Any]:
    """Bars for each metric of a table, a scatter where it has two, and our runs' own tables beside the reported."""
    _, wr = extra()
    columns = compared(table)
    panels = [
        wr.BarPlot(
            title=f"{column.name}{'' if column.comparable else f' {DAGGER} not comparable'}",
            metrics=[column.metric],
            max_bars_to_show=MAX_BARS,
            max_runs_to_show=MAX_BARS,
        )
        for column in columns
    ]
    if len(columns) == 2:
        x, y = columns
        panels.append(wr.ScatterPlot(title=f"{y.name} against {x.name}", x=_summary(x), y=_summary(y)))
    return [*panels, wr.WeavePanelSummaryTable(table_name=f"tables/{table.id}", layout=wr.Layout(w=24, h=8))]


def _summary(column: reported.Column) -> Any:
    return extra()[1].SummaryMetric(column.metric)


def curves() -> list[Any]:
    """Line plots over the optimizer steps; a group of seeds is drawn as mean and range."""
    _, wr = extra()
    panels = []
    for title, metric in CURVES.items():
        what = {"metric_regex": metric} if "*" in metric else {"y": [metric]}
        panels.append(wr.LinePlot(title=title, x=STEP, groupby_aggfunc="mean", groupby_rangefunc="minmax", **what))
    return panels


def media() -> list[Any]:
    """Figures and sample pictures that `test` logs."""
    _, wr = extra()
    return [wr.MediaBrowser(title=key.capitalize(), media_keys=[key]) for key in ("figures", "samples", "videos")]


def markdown(table: ReportedTable) -> str:
    """The reported table under its source and setting, with all its warnings; without its title, which stands above."""
    return to_markdown(compare(table, [])).partition("\n\n")[2]


def _rows(table: ReportedTable) -> Any:
    """The reported runs of one table."""
    name = f"reported, {table.status}"
    return extra()[1].Runset(name=name, filters=f"Tags() in ['{table.id}']", groupby=["JobType", "config.row"])


def _ours(paper: Paper) -> Any:
    """Our tested runs of this paper, of full scale or in simulation."""
    filters = f"Metric('JobType') != 'baseline' and Tags() in ['full', 'simulation'] and Tags() in ['{paper.name}']"
    return extra()[1].Runset(name="ours", filters=filters, groupby=["JobType", "config.row"])


def save_workspace(space: Any, paper: Paper) -> Any:
    """Save the workspace over the one that an earlier call made.

    Raises:
        Exception: of whatever kind W&B raises.
    """
    ws, _ = extra()
    name = hashlib.sha1(f"mmtrain {space.entity}/{space.project}/{paper.name}".encode()).hexdigest()[:11]
    space._internal_name = f"nw-{name}-v"  # W&B's own form of a view's name; the part between is in its address
    with contextlib.suppress(ValueError):  # there is none yet
        known = ws.Workspace.from_url(f"https://wandb.ai/{space.entity}/{space.project}?nw={name}")
        space._internal_id = known._internal_id
    return space.save()


def save_report(text: Any) -> Any:
    """Save the report over an earlier one of the same title.

    Raises:
        Exception: of whatever kind W&B raises.
    """
    import wandb

    earlier = wandb.Api().reports(f"{text.entity}/{text.project}")
    text.id = next((known.id for known in earlier if known.display_name == text.title), "")
    return text.save()
