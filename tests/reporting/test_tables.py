"""Reported and measured rows side by side: who enters, differences and when they are judged, marks, texts."""

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from mmtrain.reported import Column, ReportedTable, load, papers
from mmtrain.reporting.results import Run, RunGroup, estimate, group_runs
from mmtrain.reporting.tables import ComparedTable, Row, compare, laptop_tables, measured_tables, to_markdown, to_rich

PAPER = load("rankclip")
TOP1, I2T, T2I = "test/imagenet/zero_shot_top1", "test/coco/one_caption_i2t_r1", "test/coco/one_caption_t2i_r1"
SETTING = {"train_data": "CC3M", "backbone": "ViT-B-32-quickgelu"}
METRICS = {TOP1: 0.1126, I2T: 0.0678, T2I: 0.05}
TOY = ReportedTable(
    paper="rankclip",
    id="toy",
    title="A | B",
    source="paper, Table 9",
    status="exact",
    setting={"train_data": "CC3M", "backbone": "ViT-B/32"},
    inferred=["backbone"],
    error=None,
    columns=[
        Column("imagenet1k_top1", "percent", "higher", TOP1, True),
        Column("coco_t2i_r1", "percent", "higher", T2I, False, "counted otherwise"),
        Column("gap", "none", "lower", "test/coco/modality_gap", True, "full space"),
        Column("lambda", "none", "none"),
    ],
    rows={"CLIP": [9.06, 3.7, 0.5, None], "RankCLIP": [10.16, 3.74, 0.25, 1.0]},
    notes=["A note."],
)


def make(method: str = "RankCLIP", metrics: dict[str, float] = METRICS, **values) -> Run:
    defaults = {"scale": "full", "seed": 0, "setting": SETTING, "paper": "rankclip"}
    return Run(Path(values.pop("run", "r")), method=method, metrics=metrics, **{"run": "r"} | defaults | values)


def ours(table: ComparedTable) -> list[Row]:
    return [row for row in table.rows if row.kind == "ours"]


def groups_of(*runs: Run) -> list[RunGroup]:
    return group_runs(runs)


def test_reported_rows_come_first_then_ours_with_differences_to_the_same_method():
    table = compare(PAPER.table("rankclip_table1"), groups_of(make(), make("CLIP")))
    assert [(row.name, row.kind) for row in table.rows] == [
        ("CLIP", "reported"),
        ("CyCLIP", "reported"),
        ("ALIP", "reported"),
        ("RankCLIP", "reported"),
        ("RankCLIP", "ours"),
        ("CLIP", "ours"),
    ]
    rankclip, clip = ours(table)
    top1, i2t = rankclip.cells[0], rankclip.cells[3]
    assert (top1.value, top1.reported, top1.difference) == pytest.approx((11.26, 10.16, 1.10))
    assert (top1.text, top1.better) == ("11.26 (+1.10)", True)
    assert (i2t.text, i2t.better) == ("6.78 (-0.40)", False)
    assert clip.cells[0].text == "11.26 (+2.20)"
    assert (rankclip.cells[1].value, rankclip.cells[1].text, rankclip.cells[1].reported) == (None, "–", 19.57)
    assert rankclip.marks == []


def test_a_column_that_is_not_comparable_has_a_dagger_a_reason_and_no_difference():
    table = compare(PAPER.table("rankclip_table1"), groups_of(make()))
    cell = ours(table)[0].cells[6]
    assert [column.mark for column in table.columns] == [""] * 6 + ["†"] * 3
    assert (cell.value, cell.reported, cell.difference, cell.better) == (5.0, 3.70 + 0.04, None, None)
    assert cell.text == "5.00"
    reasons = [note for note in table.notes if note.startswith("† coco_t2i_r1, coco_t2i_r5, coco_t2i_r10: ")]
    assert len(reasons) == 1


@pytest.mark.parametrize(
    ("direction", "measured", "better"),
    [
        ("higher", 0.3, True),
        ("higher", 0.2, False),
        ("lower", 0.3, False),
        ("lower", 0.2, True),
        ("none", 0.3, None),
        ("higher", 0.25, None),
        ("higher", 0.2500001, None),
    ],
)
def test_a_difference_is_judged_by_direction(direction, measured, better):
    column = Column("gap", "none", direction, "test/coco/modality_gap", True)
    table = ReportedTable("rankclip", "t", "", "", "exact", SETTING, [], None, [column], {"RankCLIP": [0.25]}, [])
    row = ours(compare(table, groups_of(make(metrics={"test/coco/modality_gap": measured}))))[0]
    assert row.cells[0].better is better
    assert row.cells[0].difference == pytest.approx(measured - 0.25)


def test_within_the_reading_error_of_a_figure_nothing_is_better_or_worse():
    figure = PAPER.table("rankclip_fig3_lambda1")  # the dashed reference is 10.16, read within 0.06
    for measured, better in ((0.1021, None), (0.1011, None), (0.1023, True), (0.1009, False)):
        table = compare(figure, groups_of(make(metrics={TOP1: measured})))
        assert ours(table)[0].cells[1].better is better
    assert "Read off a figure, within ± 0.06." in table.notes


@pytest.mark.parametrize("table", PAPER.tables, ids=lambda table: table.id)
def test_a_laptop_run_never_enters_a_paper_s_table(table):
    metrics = {column.metric: 0.5 for column in table.columns if column.metric}
    laptop = make(metrics=metrics, scale="laptop")
    assert ours(compare(table, groups_of(laptop))) == []
    assert len(ours(compare(table, groups_of(laptop, make(metrics=metrics))))) == bool(metrics)


def test_only_runs_of_the_paper_with_a_metric_of_the_table_enter():
    runs = [make(metrics={"test/other/zero_shot_top1": 0.5}), make(paper="other"), make(metrics={})]
    assert ours(compare(PAPER.table("rankclip_table1"), groups_of(*runs))) == []


@pytest.mark.parametrize(
    ("setting", "marks"),
    [
        ({"train_data": "emoji", "backbone": "ViT-B/32"}, ["other training data: emoji instead of CC3M"]),
        ({"train_data": "cc3m", "backbone": "RN50"}, ["other backbone: RN50 instead of ViT-B/32"]),
        ({"backbone": "ViT-B/32"}, ["training data not recorded (CC3M in the table)"]),
        ({"train_data": "cc3m", "backbone": "vit_b_32"}, []),
    ],
)
def test_another_setting_is_marked_and_its_difference_is_not_judged(setting, marks):
    table = compare(PAPER.table("rankclip_table1"), groups_of(make(setting=setting)))
    row = ours(table)[0]
    assert row.marks == marks
    assert row.cells[0].text == "11.26 (+1.10)"
    assert row.cells[0].better is (None if marks else True)
    assert ("† RankCLIP (ours): " + "; ".join(marks) in table.footnotes()) is bool(marks)


def test_a_row_with_its_own_setting_is_compared_with_a_run_of_that_setting():
    table4 = PAPER.table("rankclip_table4")
    runs = [make(setting={"train_data": "YFCC15M", "backbone": name}) for name in ("RN50", "ViT-B/32", "RN101")]
    rows = ours(compare(table4, groups_of(*runs)))
    assert [row.cells[0].reported for row in rows] == [30.9, 26.2, None]
    assert [row.marks for row in rows] == [[], [], ["the table has no RankCLIP in this setting"]]
    assert rows[2].cells[0].text == "11.26"
    assert rows[0].name == "RankCLIP YFCC15M RN50"


def test_a_method_that_the_paper_does_not_report_has_no_difference():
    row = ours(compare(PAPER.table("rankclip_table1"), groups_of(make("SLIP"))))[0]
    assert (row.cells[0].text, row.cells[0].reported, row.marks) == ("11.26", None, [])


def test_seeds_give_a_mean_and_an_interval_in_the_table_s_unit():
    values = (0.10, 0.11, 0.13)
    runs = [make(seed=seed, metrics={TOP1: value}) for seed, value in enumerate(values)]
    table = compare(PAPER.table("rankclip_table1"), groups_of(*runs))
    row = ours(table)[0]
    expected = estimate([100 * value for value in values])
    cell = row.cells[0]
    assert (cell.value, cell.low, cell.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert (row.name, cell.text) == ("RankCLIP, 3 seeds", "11.33 ± 3.79 (+1.17)")
    assert any("95 %" in note for note in table.notes)


def test_a_value_that_could_not_be_measured_is_shown_as_nan():
    cell = ours(compare(PAPER.table("rankclip_table1"), groups_of(make(metrics={TOP1: math.nan}))))[0].cells[0]
    assert (cell.value, cell.text, cell.difference) == (None, "nan", None)


def test_qualitative_and_missing_tables_have_words_and_dashes():
    words = compare(PAPER.table("rankclip_fig7_activation_maps"), groups_of(make()))
    assert [cell.text for row in words.rows for cell in row.cells][:2] == ["man, motorcycles", "glasses, hat"]
    missing = compare(PAPER.table("rankclip_fig5_alignment_uniformity"), groups_of(make()))
    assert [[cell.text for cell in row.cells] for row in missing.rows] == [["–", "–"], ["–", "–"]]


def test_markdown_is_exactly_this():
    metrics = {TOP1: 0.1126, T2I: 0.05, "test/coco/modality_gap": 0.3}
    table = compare(
        TOY, groups_of(make(metrics=metrics), make("CLIP", {TOP1: 0.09}, setting=SETTING | {"train_data": "x"}))
    )
    assert to_markdown(table) == (
        "### A | B\n\n"
        "Source: paper, Table 9. Reported numbers: exact. "
        "Setting: training data CC3M, backbone ViT-B/32 (inferred).\n\n"
        "|  |  | imagenet1k_top1 %↑ | coco_t2i_r1 %↑† | gap ↓ | lambda |\n"
        "|---|---|---:|---:|---:|---:|\n"
        "| CLIP | reported | 9.06 | 3.70 | 0.50 | – |\n"
        "| RankCLIP | reported | 10.16 | 3.74 | 0.25 | 1.0 |\n"
        "| RankCLIP | ours | 11.26 (+1.10) | 5.00 | 0.300 (+0.050) | – |\n"
        "| CLIP † | ours | 9.00 (-0.06) | – | – | – |\n\n"
        "- † coco_t2i_r1: counted otherwise\n"
        "- gap: full space\n"
        "- A note.\n"
        "- † CLIP (ours): other training data: x instead of CC3M\n"
    )


def test_a_pipe_in_a_name_does_not_split_a_markdown_cell():
    line = to_markdown(compare(TOY, groups_of(make("Rank|CLIP")))).splitlines()[8]
    assert line.startswith("| Rank\\|CLIP | ours |")


def test_the_terminal_loses_no_number_at_80_characters():
    runs = [make(seed=seed, metrics={**METRICS, TOP1: 0.1126 + 0.01 * seed}) for seed in range(3)]
    table = compare(PAPER.table("rankclip_table2"), [])
    compared = compare(PAPER.table("rankclip_table1"), groups_of(*runs))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_rich(table), to_rich(compared))
    text = console.export_text()
    words = set(text.split())
    for cell in [cell for row in (*table.rows, *compared.rows) for cell in row.cells]:
        assert set(cell.text.split()) <= words
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_terminal_colours_better_green_and_worse_red():
    console = Console(width=100, record=True, color_system="standard", force_terminal=True, file=io.StringIO())
    console.print(to_rich(compare(PAPER.table("rankclip_table1"), groups_of(make()))))
    text = console.export_text(styles=True)
    assert re.search(r"\x1b\[1;32m +\(\+1\.10\)", text)
    assert re.search(r"\x1b\[1;31m +\(-0\.40\)", text)


def laptop_runs() -> list[Run]:
    runs = []
    for method, base in (("RankCLIP", 0.2), ("CLIP", 0.1)):
        for seed in (0, 1):
            metrics = {f"test/unseen_concepts/i2t_r{k}": base + 0.02 * seed for k in (10, 1)}
            metrics |= {"test/unseen_concepts/modality_gap": 0.5, "test/subgroups/linear_probe": base, "val/a/b": 1.0}
            chance = {"test/unseen_concepts/i2t_r1": 0.001}
            runs.append(make(method, metrics, scale="laptop", seed=seed, chance=chance))
    return runs


def test_laptop_runs_have_a_table_for_each_set_with_chance_below():
    full = make(metrics={"test/imagenet/all_classes_top1": 0.5})
    tables = laptop_tables(groups_of(*laptop_runs(), full))
    assert [table.id for table in tables] == ["laptop_unseen_concepts", "laptop_subgroups"]
    first, second = tables
    assert first.title == "unseen_concepts: laptop scale, not comparable with the paper"
    assert [(c.name, c.unit, c.direction) for c in first.columns] == [
        ("i2t_r10", "percent", "higher"),  # in the order in which they were logged
        ("i2t_r1", "percent", "higher"),
        ("modality_gap", "none", "none"),
    ]
    assert [(row.name, row.kind) for row in first.rows] == [
        ("RankCLIP, 2 seeds", "ours"),
        ("CLIP, 2 seeds", "ours"),
        ("chance", "chance"),
    ]
    # s = 0.0141, t(0.975, 1) = 12.706, divided by sqrt(2): 12.71 of 100
    assert [cell.text for cell in first.rows[0].cells] == ["21.00 ± 12.71", "21.00 ± 12.71", "0.500 ± 0.000"]
    assert [cell.text for cell in first.rows[2].cells] == ["–", "0.10", "–"]
    assert [row.kind for row in second.rows] == ["ours", "ours"]
    assert all(cell.difference is None and cell.better is None for row in first.rows for cell in row.cells)


def test_full_runs_have_tables_of_all_that_was_measured():
    tables = measured_tables(groups_of(*laptop_runs(), make(metrics={"test/imagenet/all_classes_top1": 0.5})))
    assert [table.id for table in tables] == ["full_imagenet"]
    assert "Source: our runs. Setting: CC3M ViT-B-32-quickgelu." in to_markdown(tables[0])
    assert "| RankCLIP | ours | 50.00 |" in to_markdown(tables[0])


def test_rows_of_one_method_are_told_apart_by_setting_then_by_run():
    runs = [make(), make(setting=SETTING | {"backbone": "RN50"}), make(setting=SETTING | {"backbone": "RN50"}, step=9)]
    names = [row.name for row in ours(compare(PAPER.table("rankclip_table1"), groups_of(*runs)))]
    assert names == [
        "RankCLIP CC3M ViT-B-32-quickgelu",
        "RankCLIP r, seed 0, step 0",
        "RankCLIP r, seed 0, step 9",
    ]


SIMULATED = {"scale": "simulation", "setting": {"backbone": "UNet 32-64-128", "train_data": "simulation"}}
SCORE, CLAMP = "test/lift/soft_score", "test/lift/soft_clamp"
BOUNDED = {SCORE: 0.95, f"{SCORE}_low": 0.892, f"{SCORE}_high": 0.981, CLAMP: 0.9, "test/lift/slow_p50_ms": 12.34}
ROBOT = dataclasses.replace(
    TOY,
    setting={},
    inferred=[],
    columns=[
        Column("soft_score", "score", "higher", SCORE, True),  # even where someone should call it comparable
        Column("soft_clamp", "percent", "higher", CLAMP),
        Column("time", "text", "lower", "test/lift/slow_p50_ms"),
    ],
    rows={"DP": [0.1, 20, "<1"], "RankCLIP": [0.8, 100, None]},
)


def test_a_simulated_row_stands_under_the_robot_s_marked_and_without_any_difference():
    table = compare(ROBOT, groups_of(make(metrics=BOUNDED, **SIMULATED)))
    assert [row.kind for row in table.rows] == ["reported", "reported", "ours"]
    (row,) = ours(table)
    assert [cell.text for cell in row.cells] == ["0.95 [0.89, 0.98]", "90.0", "12.340"]
    assert (row.cells[0].low, row.cells[0].high) == (0.892, 0.981)
    assert all((cell.reported, cell.difference, cell.better) == (None, None, None) for cell in row.cells)
    text = to_markdown(table)
    assert "| DP | reported | 0.1 | 20 | <1 |" in text
    assert "| RankCLIP † | simulation | 0.95 [0.89, 0.98] | 90.0 | 12.340 |" in text
    assert "- † RankCLIP (simulation): simulation, measured; the reported numbers are from the real robot" in text
    assert "In brackets: 95 % interval over the episodes of one run." in text


def test_several_simulated_seeds_have_the_interval_over_seeds():
    runs = [make(metrics=BOUNDED | {SCORE: value}, seed=seed, **SIMULATED) for seed, value in enumerate((0.9, 0.92))]
    (row,) = ours(compare(ROBOT, groups_of(*runs)))
    assert row.cells[0].text == "0.91 ± 0.13" and row.name == "RankCLIP, 2 seeds"


@pytest.mark.parametrize("table", [t for name in papers() for t in load(name).tables], ids=lambda table: table.id)
def test_no_table_of_any_paper_compares_with_a_simulation_or_takes_a_laptop_run(table):
    metrics = {column.metric: 0.5 for column in table.columns if column.metric}
    groups = groups_of(*(make(metrics=metrics, scale=s, paper=table.paper) for s in ("simulation", "laptop")))
    rows = ours(compare(table, groups))
    assert len(rows) == bool(metrics) and all(row.is_simulated and len(row.marks) == 1 for row in rows)
    assert not any(cell.reported or cell.difference or cell.better for row in rows for cell in row.cells)


def test_simulated_runs_have_tables_of_all_that_was_measured_with_bounds_in_their_cells():
    (table,) = measured_tables(groups_of(make(metrics=BOUNDED, **SIMULATED)))
    assert (table.id, table.title) == ("simulation_lift", "lift: all that was measured in simulation")
    assert [(c.name, c.unit) for c in table.columns] == [
        ("soft_score", "none"), ("soft_clamp", "percent"), ("slow_p50", "ms")
    ]  # fmt: skip
    assert [cell.text for cell in table.rows[0].cells] == ["0.950 [0.892, 0.981]", "90.0", "12.3"]
