"""Reported numbers as W&B runs, read back; and the workspace and report that a W&B API receives."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from mmtrain import reported
from mmtrain.config_errors import UserError
from mmtrain.reported import Paper
from mmtrain.reporting.baselines import baselines
from mmtrain.reporting.dashboard import main, make
from tests.offline_runs import close, read_file
from tests.wandb_server import serve

PAPER = reported.load("rankclip")


@pytest.fixture(autouse=True)
def no_run_left(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    close()
    yield
    close()


def only(*tables: str) -> Paper:
    """The paper with some of its tables."""
    return dataclasses.replace(PAPER, tables=[PAPER.table(table) for table in tables])


def cells(paper: Paper) -> dict[str, dict[str, float]]:
    """Reported numbers as fractions, by name of the run and of the metric."""
    found: dict[str, dict[str, float]] = {}
    for table in paper.tables:
        for row in table.rows:
            for column in table.columns:
                value, name = table.value(row, column.name), column.metric or f"reported/{column.name}"
                if value is not None:
                    scaled = value * 0.01 if column.unit == "percent" else value
                    found.setdefault(f"reported/{table.id}/{row}", {})[name] = pytest.approx(scaled, rel=1e-12)
    return found


def own(row: dict[str, Any]) -> dict[str, Any]:
    """What was logged, without W&B's own keys."""
    return {key: value for key, value in row.items() if not key.startswith("_")}


def test_every_row_with_a_number_is_one_baseline() -> None:
    entries = baselines(PAPER)
    assert {entry.name: entry.metrics for entry in entries} == cells(PAPER) and len(entries) > 60
    assert len({entry.id for entry in entries}) == len(entries)
    assert [entry.id for entry in entries] == [entry.id for entry in baselines(PAPER)]
    tables = {entry.config["table"] for entry in entries}
    assert not tables & {"rankclip_fig5_alignment_uniformity", "rankclip_fig7_activation_maps"}, "no numbers"
    assert all(len(tag) <= 64 for entry in entries for tag in entry.tags), "W&B takes no longer ones"


def test_offline_baselines_hold_the_reported_values(tmp_path, capsys) -> None:
    """Nulls, a digitised figure, metrics that we have none of, and a table without numbers."""
    paper = only("rankclip_table1", "rankclip_fig3_lambda1", "alip_retrieval", "rankclip_fig5_alignment_uniformity")
    for _ in range(2):
        make(paper, "someone", "papers", tmp_path, is_offline=True)
        close()  # else a file may still be without its last records when it is read, or replaced
    assert f"wandb sync {tmp_path}/wandb/offline-run-" in capsys.readouterr().err
    files = [read_file(path) for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert len(files) == len({found["id"] for found in files}), "the second time the first ones were replaced"
    expected = cells(paper)
    assert {found["name"] for found in files} == set(expected) and len(files) == 4 + 6 + 7
    for found in files:
        _, table_id, row = found["name"].split("/", 2)
        (logged,) = found["history"]
        assert own(logged) == expected[found["name"]] and own(found["summary"]) == expected[found["name"]]
        assert (found["group"], found["job_type"], found["project"]) == ("reported", "baseline", "papers")
        table, config = PAPER.table(table_id), found["config"]
        assert {"reported", "rankclip", table_id, table.status} == found["tags"]
        assert (config["paper"], config["table"], config["method"]) == ("rankclip", table_id, table.method(row))
        for key in ("source", "status", "notes", "title"):
            assert config[key] == getattr(table, key)
        assert config["setting"] == table.row_setting(row)
    table1 = next(found["config"] for found in files if found["name"] == "reported/rankclip_table1/CLIP")
    assert table1["setting"] == {"train_data": "CC3M", "backbone": "ViT-B/32"}
    assert table1["not_comparable"] == [f"test/coco/one_caption_t2i_r{k}" for k in (1, 5, 10)]
    assert "could not be determined" in table1["protocol"]["test/coco/one_caption_t2i_r1"]


class FakeApi:
    """Takes what wandb-workspaces sends, and gives back what it saved before."""

    def __init__(self) -> None:
        self._service_api = self
        self.app_url = "https://wandb.test"
        self.default_entity = "someone"
        self.views: dict[str, dict[str, Any]] = {}  # by id
        self.received: list[dict[str, Any]] = []

    def execute_graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "ViewName" in query or "viewName" in variables:
            nodes = [view for view in self.views.values() if view["name"] == variables["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}
        assert "upsertView" in query, query
        self.received.append(variables)
        project = {"name": variables["projectName"], "entityName": variables["entityName"], "id": "1"}
        view = {key: variables[key] for key in ("name", "displayName", "description", "spec", "type")}
        view |= {"id": variables.get("id") or f"id{len(self.views)}", "project": project, "updatedAt": None}
        self.views[view["id"]] = view
        return {"upsertView": {"view": view, "inserted": not variables.get("id")}}

    def projects(self, entity: str) -> list[Any]:
        return [type("Project", (), {"name": "papers"})]

    def reports(self, path: str) -> list[Any]:
        assert path == "someone/papers"
        kept = [view for view in self.views.values() if view["type"] == "runs"]
        return [type("Report", (), {"id": view["id"], "display_name": view["displayName"]}) for view in kept]


def panels_of(panels: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """View type and what each panel shows."""
    keys = ("metrics", "metricRegex", "mediaKeys", "value")
    return [(p["viewType"], next((p["config"][k] for k in keys if p["config"].get(k)), None)) for p in panels]


def filters_of(runset: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(f["key"]["name"], f["op"], f["value"]) for f in runset["filters"]["filters"]]


def grouping_of(runset: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key["section"], key["name"]) for key in runset["grouping"]]


BY_ROW = [("run", "jobType"), ("config", "row.value")]
TABLE1 = [f"test/imagenet/zero_shot_top{k}" for k in (1, 3, 5)]
TABLE1 += [f"test/coco/one_caption_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
FIG4B = ["test/imagenet/zero_shot_top1", "test/imagenet_r/zero_shot_top1"]


def check_workspace(spec: dict[str, Any]) -> None:
    section = spec["section"]
    (runset,) = section["runSets"]
    assert filters_of(runset) == [("tags", "NIN", ["laptop"])] and grouping_of(runset) == BY_ROW
    assert section["settings"]["xAxis"] == "trainer/global_step"
    sections = {entry["name"]: panels_of(entry["panels"]) for entry in section["panelBankConfig"]["sections"]}
    titles = [PAPER.table(table).title for table in ("rankclip_table1", "rankclip_fig4b_robustness")]
    assert list(sections) == ["Training curves", *titles, "Pictures"], "nothing for a table without numbers"
    assert sections["Training curves"][0] == ("Run History Line Plot", ["train/loss"])
    for title, metrics in zip(titles, (TABLE1, FIG4B), strict=True):
        assert [what for kind, what in sections[title] if kind == "Bar Chart"] == [[metric] for metric in metrics]
    text = sections[titles[0]][0]
    assert text[0] == "Markdown Panel" and "| RankCLIP | reported | 10.16 |" in text[1]
    assert "Scatter Plot" in [kind for kind, _ in sections[titles[1]]]
    assert sections["Pictures"] == [("Media Browser", [key]) for key in ("figures", "samples", "videos")]


def check_report(spec: dict[str, Any]) -> None:
    blocks = spec["blocks"]
    texts = [json.dumps(block, ensure_ascii=False) for block in blocks]
    assert "arXiv 2404.09387" in texts[1] and "not comparable" in texts[2] and blocks[2]["type"] == "callout-block"
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert headings == [*(table.title for table in shown().tables), "Training curves", "Pictures"]
    tables = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert len(tables) == 3 and "| CyCLIP | reported | 9.40 | 17.32 |" in tables[0]
    assert "† coco_t2i_r1, coco_t2i_r5, coco_t2i_r10: " in tables[0] and "missing" in tables[1]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert len(grids) == 4, "two tables with numbers, curves, pictures"
    for grid, table, metrics in zip(
        grids[:2], ("rankclip_table1", "rankclip_fig4b_robustness"), (TABLE1, FIG4B), strict=True
    ):
        rows, ours = grid["runSets"]
        assert filters_of(rows) == [("tags", "IN", [table])]
        assert filters_of(ours) == [
            ("jobType", "!=", "baseline"),
            ("tags", "IN", ["full", "simulation"]),
            ("tags", "IN", ["rankclip"]),
        ]
        assert grouping_of(rows) == grouping_of(ours) == BY_ROW
        panels = panels_of(grid["panelBankSectionConfig"]["panels"])
        assert [what for kind, what in panels if kind == "Bar Chart"] == [[metric] for metric in metrics]
        assert f"tables/{table}" in json.dumps(grid), "the runs' own tables beside the reported ones"
    titles = [p["config"].get("chartTitle") for p in grids[0]["panelBankSectionConfig"]["panels"]]
    assert titles[:9].count("imagenet1k_top1") == 1 and titles[8] == "coco_t2i_r10 † not comparable"
    assert filters_of(grids[2]["runSets"][0]) == [("jobType", "!=", "baseline")]


def shown() -> Paper:
    return only("rankclip_table1", "rankclip_fig5_alignment_uniformity", "rankclip_fig4b_robustness")


@pytest.mark.timeout(600)  # thirty runs, each with a process of W&B's
def test_online_the_api_gets_runs_workspace_and_report_and_a_second_call_replaces_them(
    tmp_path, monkeypatch, capsys
) -> None:
    fake = FakeApi()
    monkeypatch.setattr(wandb, "Api", lambda: fake)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        make(shown(), "someone", "papers", tmp_path, is_offline=False)
        runs = server.runs()
        make(only("rankclip_fig5_alignment_uniformity"), "someone", "papers", tmp_path, is_offline=False)
        streams = server.streams
    entries = {entry.id: entry for entry in baselines(shown())}
    assert {run["name"] for run in runs} == set(entries)
    for run in runs:
        assert (run["entity"], run["project"]) == ("someone", "papers")
        assert (run["groupName"], run["jobType"]) == ("reported", "baseline")
        assert run["displayName"] == entries[run["name"]].name and set(run["tags"]) == set(entries[run["name"]].tags)
        (row,) = streams[run["name"]]
        assert own(row) == entries[run["name"]].metrics
    workspace, report, *again = fake.received
    assert (workspace["type"], workspace["displayName"]) == ("project-view", "RankCLIP: reported and ours")
    assert (report["type"], report["displayName"]) == ("runs", "RankCLIP: reported and measured")
    check_workspace(json.loads(workspace["spec"]))
    check_report(json.loads(report["spec"]))
    assert [view["id"] for view in again] == ["id0", "id1"] and again[0]["name"] == workspace["name"]
    assert len(fake.views) == 2
    assert "https://wandb.test/someone/papers" in capsys.readouterr().out


def test_dry_run_prints_the_specification_and_touches_nothing(tmp_path, monkeypatch, capsys) -> None:
    for name in ("Api", "init"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: pytest.fail("went to W&B"))
    monkeypatch.chdir(tmp_path)
    assert main(["--project", "papers", "--paper", "rankclip", "--dry-run"]) == 0
    (spec,) = json.loads(capsys.readouterr().out)
    assert len(spec["runs"]) == len(baselines(PAPER)) and spec["runs"][0]["tags"][0] == "reported"
    sections = spec["workspace"]["section"]["panelBankConfig"]["sections"]
    shown = {metric for entry in sections for kind, what in panels_of(entry["panels"]) for metric in what or ()}
    logged = {name for entry in baselines(PAPER) for name in entry.metrics if name.startswith("test/")}
    assert logged <= shown, "every reported metric of ours has a chart"
    assert spec["report"]["blocks"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_without_the_extra_the_error_says_what_to_install(more, tmp_path, monkeypatch) -> None:
    for name in ("wandb_workspaces", "wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(wandb, "init", lambda *_, **__: pytest.fail("logged before it could tell"))
    with pytest.raises(UserError, match=r"pip install 'mmtrain\[wandb\]'"):
        main(["--entity", "someone", "--project", "papers", "--dir", str(tmp_path), *more])


def test_what_cannot_be_done_is_said(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="--entity: is missing"):
        main(["--project", "papers"])
    with pytest.raises(UserError, match="paper 'rankclib' is not known; did you mean rankclip"):
        main(["--project", "papers", "--offline", "--paper", "rankclib"])
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with serve(401) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(UserError, match=r"did not take reported/rankclip_table1/CLIP .*401(.|\n)*--offline"):
            make(only("rankclip_table1"), "someone", "papers", Path(tmp_path), is_offline=False)
