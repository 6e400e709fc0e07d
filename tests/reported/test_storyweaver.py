"""StoryWeaver's reported numbers against each other, and what a reader must be told beside them."""

import pytest

from mmtrain.reported import load
from mmtrain.reporting.results import Run, group_runs
from mmtrain.reporting.tables import compare
from mmtrain.storyweaver.parameters import params_per_world
from tests.reported.test_reported import COPIES, printed_cells

PAPER = load("storyweaver")
COLUMNS = [(table, column) for table in PAPER.tables for column in table.columns]
SINGLE, MULTI = PAPER.table("storyweaver_table1_single"), PAPER.table("storyweaver_table1_multi")
WORLDS = ("pororo", "frozen")


@pytest.mark.parametrize("table", [SINGLE, MULTI], ids=["single", "multi"])
def test_table1_is_shown_with_the_printed_digits(table):
    shown = compare(table, [])
    names = [column.name for column in shown.columns]
    cells = {(table.id, row.name, n, c.text) for row in shown.rows for n, c in zip(names, row.cells, strict=True)}
    assert cells == {cell for cell in printed_cells(COPIES["storyweaver"]) if cell[0] == table.id}


def test_each_column_of_table1_names_our_metric_and_says_why_it_is_not_comparable():
    for table, column in COLUMNS:
        kind = {SINGLE.id: "single", MULTI.id: "multi"}.get(table.id)
        world, _, metric = column.name.partition("_")
        expected = f"test/{world}_{kind}/{metric}" if kind else None
        if column.name == "params_per_db":
            expected = "test/parameters/per_world"
        assert column.metric == expected, (table.id, column.name)
        assert column.comparable is False
        assert column.metric is None or "not known" in column.protocol or "2^20" in column.protocol
    assert all(column.direction == ("lower" if column.unit == "million" else "higher") for _, column in COLUMNS)


def test_what_is_best_in_table1():
    for table in (SINGLE, MULTI):
        for column in table.columns:
            best = (min if column.direction == "lower" else max)(table.value(row, column.name) for row in table.rows)
            assert table.value(PAPER.own_method, column.name) == best, (table.id, column.name)


def gain(metric: str, rival: str) -> list[float]:
    """Relative gain in percent over a rival in both worlds."""
    values = [(SINGLE.value("StoryWeaver", f"{w}_{metric}"), SINGLE.value(rival, f"{w}_{metric}")) for w in WORLDS]
    return [100 * (ours / theirs - 1) for ours, theirs in values]


def test_the_abstract_s_gains_follow_from_table1_over_different_rivals():
    claims = PAPER.table("storyweaver_abstract_claims")
    gains = [
        sum(gain("dino_i", "DreamBooth")) / 2,
        sum(gain("clip_t", "IP-Adapter(base)")) / 2,
        gain("clip_t", "IP-Adapter(base)")[0],
        gain("clip_i", "DreamBooth")[0],
    ]
    for row, value in zip(claims.rows, gains, strict=True):
        assert claims.value(row, "recomputed") == pytest.approx(value, abs=0.0051), row
        assert claims.value(row, "claimed") == pytest.approx(value, abs=0.011), row
    told = " ".join(claims.notes)
    pairs = [gain("dino_i", "DreamBooth"), gain("clip_t", "IP-Adapter(base)")]
    pairs += [gain(metric, "IP-Adapter(plus)") for metric in ("dino_i", "clip_i")]
    assert all(f"{first:.2f} and {second:.2f} percent" in told for first, second in pairs)


def test_parameters_agree_between_the_tables_and_with_our_count_in_the_paper_s_units():
    printed = {row: SINGLE.value(row, "params_per_db") for row in SINGLE.rows}
    for row in MULTI.rows:
        value = MULTI.value(row, "params_per_db")
        assert printed.setdefault(row, value) == value
    accounting = PAPER.table("storyweaver_params_accounting")
    for row in accounting.rows:
        method = row.split(" ")[0]
        assert accounting.value(row, "printed") == printed.pop(method), row
        if method != "LoRA-Composer":
            assert params_per_world(method, 7, unit="paper") == accounting.value(row, "printed")
            assert accounting.value(row, "reconstructed") == pytest.approx(accounting.value(row, "printed"), abs=0.2)
    assert not printed


def test_our_row_is_shown_in_the_paper_s_units_with_a_mark_and_without_a_judgement(tmp_path):
    metrics = {"test/pororo_single/dino_i": 0.65123, "test/pororo_multi/f_acc": 0.5, "test/frozen_multi/clip_t": 0.3}
    run = Run(
        tmp_path, "storyweaver", "StoryWeaver", "r", "full", setting={"evaluated_on": "TBC-Bench"}, metrics=metrics
    )
    for table, shown in (
        (SINGLE, {"pororo_dino_i": "65.12"}),
        (MULTI, {"pororo_f_acc": "50.00", "frozen_clip_t": "30.00"}),
    ):
        compared = compare(table, group_runs([run]))
        ours = compared.rows[-1]
        texts = {
            c.name: cell.text for c, cell in zip(compared.columns, ours.cells, strict=True) if cell.value is not None
        }
        assert texts == shown and ours.marks == []
        assert all(cell.difference is None for cell in ours.cells)
        assert all(column.mark == "†" for column in compared.columns)
    assert compare(SINGLE, []).columns[1].header == "pororo_dino_i ×100↑†"


def test_what_the_sources_disagree_about_is_said():
    conflicts = [(table.id, note) for table in PAPER.tables for note in table.notes if note.startswith("Conflict: ")]
    ((id, note),) = conflicts
    assert id == "storyweaver_third_party_listing"
    assert all(f"{SINGLE.value('StoryWeaver', f'{world}_dino_i')}" in note for world in WORLDS)
    unread = PAPER.table("storyweaver_not_found")
    assert unread.status == "qualitative" and all(words == ["not found"] for words in unread.rows.values())
