"""RDP's reported numbers against each other, and what a reader must be told beside them."""

import re

import pytest

from mmtrain.reported import load
from mmtrain.reporting.tables import compare
from tests.reported.test_reported import COPIES, printed_cells

PAPER = load("rdp")
COLUMNS = [(table, column) for table in PAPER.tables for column in table.columns]
TASKS = {"rdp_table2_peeling": "peel", "rdp_table3_wiping": "wipe", "rdp_table4_lifting": "lift"}
OF_ONE_COLUMN = {
    ("rdp_table5_chunk_and_ensembling", "score"): "test/wipe/perturb_after_contact",
    ("rdp_table6_tokenizer_ablation", "all"): "test/peel/all",
    ("rdp_fig10_relative_and_latency", "all"): "test/peel/all",
}


@pytest.mark.parametrize("id", ["rdp_table2_peeling", "rdp_table3_wiping", "rdp_table6_tokenizer_ablation"])
def test_scores_are_shown_with_the_printed_digits(id):
    table = compare(PAPER.table(id), [])
    names = [column.name for column in table.columns]
    shown = {(table.id, row.name, n, c.text) for row in table.rows for n, c in zip(names, row.cells, strict=True)}
    assert shown == {cell for cell in printed_cells(COPIES["rdp"]) if cell[0] == table.id}


def test_all_is_the_mean_of_the_variations_but_for_the_cell_that_its_note_names():
    for id in ("rdp_table2_peeling", "rdp_table3_wiping"):
        for row, values in PAPER.table(id).rows.items():
            off = (id, row) == ("rdp_table2_peeling", "DP w. tactile img.")
            assert (abs(sum(values[:3]) / 3 - values[3]) < 0.005) is not off, (id, row)
    assert any("0.4167" in note and note.startswith("Conflict") for note in PAPER.table("rdp_table2_peeling").notes)
    lifting = PAPER.table("rdp_table4_lifting")
    for row in lifting.rows:
        mean = (lifting.value(row, "soft_score") + lifting.value(row, "hard_score")) / 2
        assert lifting.value(row, "all_score") == pytest.approx(mean, abs=0.0051), row


def test_appendix_and_project_page_agree_with_the_main_tables():
    peeling, wiping = PAPER.table("rdp_table2_peeling"), PAPER.table("rdp_table3_wiping")
    chunks, after = PAPER.table("rdp_table5_chunk_and_ensembling"), "perturb_after_contact"
    assert chunks.value("RDP", "score") == wiping.value("RDP (GelSight)", after)
    assert chunks.value("DP w. tactile emb., chunk 8", "score") == wiping.value("DP w. tactile emb.", after)
    ablation = PAPER.table("rdp_table6_tokenizer_ablation")
    assert ablation.value("RDP (Force)", "all") == peeling.value("RDP (Force)", "all")
    source = PAPER.table("rdp_policy_by_data_source")
    for column, gap in (("no_perturb", 0.303), ("perturb_before_contact", 0.439), (after, 0.330)):
        best = source.value("TactAR", column)
        assert best == peeling.value("RDP (Force)", column)
        assert source.value("VR without feedback", column) == pytest.approx(best * (1 - gap), abs=source.error)
    quality = PAPER.table("rdp_data_quality")
    for column, gap in (("normalized_peel_length", 0.209), ("stable_force_ratio", 0.333)):
        best = quality.value("TactAR", column)
        assert 1 - quality.value("VR without feedback", column) / best == pytest.approx(gap, abs=0.0005)


def test_scores_with_ten_trials_come_in_steps():
    """Tiers of 0, 0.5 and 1 over ten trials are multiples of 0.05, shares multiples of 10 %."""
    for id in ("rdp_table3_wiping", "rdp_table4_lifting", "rdp_table5_chunk_and_ensembling"):
        for column in PAPER.table(id).columns:
            if column.name in ("all", "all_score"):
                continue
            step = 10 if column.unit == "percent" else 0.05
            for row in PAPER.table(id).rows:
                steps = PAPER.table(id).value(row, column.name) / step
                assert steps == pytest.approx(round(steps), abs=1e-9), (id, row, column.name)


def test_each_column_names_our_metric_and_no_real_robot_is_called_comparable_with_a_simulation():
    for table, column in COLUMNS:
        if task := TASKS.get(table.id) or ("peel" if table.id == "rdp_policy_by_data_source" else None):
            expected = f"test/{task}/{column.name}"
        else:
            expected = OF_ONE_COLUMN.get((table.id, column.name))
        assert column.metric == expected, (table.id, column.name)
        assert column.comparable is False
        assert column.metric is None or re.search("real robot.*simulation", column.protocol)


def test_scores_and_shares_of_success_are_better_when_higher():
    for table, column in COLUMNS:
        if column.unit in ("score", "ratio") or column.metric:
            assert column.direction == "higher", (table.id, column.name)
    assert PAPER.table("rdp_table1_inference_time").columns[0].direction == "lower"


def test_a_row_is_found_by_its_method_and_the_settings_in_its_name():
    chunks = PAPER.table("rdp_table5_chunk_and_ensembling")
    assert chunks.row_of("DP w. tactile emb., ensembling tau 0.5", {}) == "DP w. tactile emb., ensembling tau 0.5"
    assert chunks.row_of("DP w. tactile emb.", {}) == "DP w. tactile emb., chunk 8"
    assert chunks.row_of("RDP (GelSight)", {}) == "RDP"
    assert PAPER.own_method in PAPER.table("rdp_table2_peeling").rows


def test_what_the_sources_disagree_about_is_said():
    conflicts = [table.id for table in PAPER.tables for note in table.notes if note.startswith("Conflict: ")]
    assert conflicts == [
        "rdp_table2_peeling",
        "rdp_table5_chunk_and_ensembling",
        "rdp_sensors",
        "rdp_headline",
    ]
    unread = [table.id for table in PAPER.tables if "readers" in table.source and table.status == "partial"]
    assert unread == ["rdp_table5_chunk_and_ensembling", "rdp_table6_tokenizer_ablation"]
