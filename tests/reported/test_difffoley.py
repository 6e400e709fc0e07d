"""Diff-Foley's reported numbers against each other, and what a reader must be told beside them."""

import pytest

from mmtrain.reported import load
from mmtrain.reporting.tables import compare
from tests.reported.test_reported import COPIES, printed_cells

PAPER = load("difffoley")
COLUMNS = [(table, column) for table in PAPER.tables for column in table.columns]
MAIN = PAPER.table("difffoley_main_vggsound")
METRICS = {name: f"test/vggsound/{name}" for name in ("inception_score", "fid", "kl", "align_acc")}
BY_PAPER = [MAIN.id, *(f"difffoley_ablation_{name}" for name in ("visual_feature", "split_merge", "stage1_data"))]
FAMILY = "Metric family: "


def family(id: str) -> str:
    """Name of the metric family of a table, from the note that warns of others."""
    (note,) = (note for note in PAPER.table(id).notes if note.startswith(FAMILY))
    name, _, warning = note.removeprefix(FAMILY).rpartition("; ")
    assert warning == "numbers of different families must not be mixed.", id
    return name


@pytest.mark.parametrize("id", [*BY_PAPER, "specvqgan_codebooks", "specvqgan_a_vggsound_vggsound"])
def test_numbers_are_shown_with_the_printed_digits(id):
    table = compare(PAPER.table(id), [])
    names = [column.name for column in table.columns]
    shown = {(table.id, row.name, n, c.text) for row in table.rows for n, c in zip(names, row.cells, strict=True)}
    printed = {cell for cell in printed_cells(COPIES["difffoley"]) if cell[0] == table.id}
    # frame rates are printed as 21.5 and 4; a column is shown with as many decimals everywhere
    assert {cell for cell in shown if cell[2] != "fps"} == {cell for cell in printed if cell[2] != "fps"}


def test_only_columns_of_the_paper_s_own_evaluation_name_a_metric_of_ours():
    for table, column in COLUMNS:
        expected = METRICS.get(column.name) if table.id in BY_PAPER else None
        if (table.id, column.name) == (MAIN.id, "time"):
            expected = "test/vggsound/seconds_per_clip"
        assert column.metric == expected, (table.id, column.name)


def test_nothing_is_called_comparable_and_each_metric_says_why():
    reasons = {
        **dict.fromkeys(("inception_score", "fid", "kl"), ("melception", "how many samples", "is not known")),
        "align_acc": ("released metric classifier", "positives only", "is not known"),
        "time": ("device, batch", "are not known"),
    }
    for table, column in COLUMNS:
        assert column.comparable is False, (table.id, column.name)
        if column.metric:
            assert all(words in column.protocol for words in reasons[column.name]), (table.id, column.name)


def test_metric_families_are_named_and_not_mixed():
    for table in PAPER.tables:
        if table.columns:
            assert family(table.id), table.id
        if any(column.metric for column in table.columns):
            assert family(table.id) == "melception", table.id
        others = "measured by others with their own implementation"
        is_by_others = not table.id.startswith("specvqgan_") and table.id not in (*BY_PAPER, "difffoley_not_found")
        assert (others in table.source) is is_by_others, table.id
        assert is_by_others <= (not table.columns or not family(table.id).startswith("melception")), table.id


def test_scores_of_the_families_lie_so_far_apart_that_a_mixed_up_table_would_show():
    for table, column in COLUMNS:
        is_melception = family(table.id).startswith("melception")
        values = [table.value(row, column.name) for row in table.rows]
        values = [value for value in values if value is not None]
        if column.name == "inception_score":
            assert all(value > 25 if is_melception else value < 20 for value in values), table.id
        if column.unit == "nat" and table.id != "specvqgan_codebooks":  # reconstructions are near the original
            assert all(value > 5 if is_melception else value < 4 for value in values), table.id


def test_directions_follow_from_units():
    better = dict.fromkeys(("distance", "nat", "s", "million"), "lower") | dict.fromkeys(("score", "percent"), "higher")
    for table, column in COLUMNS:
        assert column.direction == better.get(column.unit, "none"), (table.id, column.name)


def test_ablations_agree_with_each_other_and_differ_from_the_main_table():
    features, merge = (PAPER.table(f"difffoley_ablation_{name}") for name in ("visual_feature", "split_merge"))
    for name in METRICS:
        chosen = features.value("CAVP", name)
        assert chosen == merge.value("with split-and-merge", name)
        main = MAIN.value("Diff-Foley (CFG)", name)
        assert chosen != main and chosen == pytest.approx(main, rel=0.05), name
    quoted = [PAPER.table(id) for id in BY_PAPER[1:]]
    assert all("secondary quotation, not checked" in table.source for table in quoted)


def test_quotations_of_the_paper_elsewhere_are_its_own_numbers():
    quoted = PAPER.table("difffoley_aggregator_misc")
    assert float(quoted.value("vggsound_original_is", "value")) == MAIN.value(PAPER.own_method, "inception_score")
    assert any("never as a target" in note for note in quoted.notes)
    peers, user = PAPER.table("difffoley_modern_peers_vggsound"), PAPER.table("difffoley_mmaudio_s16k_reproduction")
    for column in user.columns:  # a reproduction lies near, once its one other unit is heeded
        found = user.value("MMAudio-S-16kHz, a user", column.name) * (100 if column.name == "imagebind_score" else 1)
        assert found == pytest.approx(peers.value("MMAudio-S-16kHz", column.name), rel=0.02), column.name
    assert any("not times 100" in note for note in user.notes)
    assert "The ImageBind score is times 100." in peers.notes


def test_what_is_best_in_the_main_table():
    best = {}
    for column in MAIN.columns:
        if column.direction != "none":
            values = {row: MAIN.value(row, column.name) for row in MAIN.rows}
            wanted = (max if column.direction == "higher" else min)(values.values())
            best[column.name] = [row for row, value in values.items() if value == wanted]
    own = PAPER.own_method
    assert best == {
        "inception_score": [own],
        "fid": ["SpecVQGAN (RGB+Flow)"],
        "kl": ["Im2Wav"],
        "align_acc": [own],
        "time": ["Diff-Foley (CFG)", own],
    }


def test_samples_of_specvqgan_are_one_for_its_resnet_rows():
    for id in ("specvqgan_a_vggsound_vggsound", "specvqgan_b_vggsound_vas", "specvqgan_c_vas_vas"):
        table = PAPER.table(id)
        for row in table.rows:
            assert table.value(row, "samples") == ("1" if "ResNet50" in row else "10"), (id, row)


def test_a_row_is_found_by_its_method():
    for method in ("Diff-Foley (CFG)", "Diff-Foley (double guidance)", "Im2Wav", "SpecVQGAN (ResNet50)"):
        assert MAIN.row_of(method, {}) == method
    assert MAIN.row_of("Diff-Foley (no guidance)", {}) is None
    assert MAIN.row_of("Diff-Foley (CFG, flow 25 steps)", {}) is None  # another objective is another method


def test_what_the_sources_disagree_about_is_said():
    conflicts = [(t.id, note) for t in PAPER.tables for note in t.notes if note.startswith("Conflict: ")]
    assert [id for id, _ in conflicts] == [
        *[MAIN.id] * 4,
        "difffoley_ablation_visual_feature",
        "specvqgan_a_vggsound_vggsound",
        "difffoley_remeasured_mgaudio",
        "difffoley_remeasured_align_acc_flowley",
    ]
    told = " ".join(note for _, note in conflicts)
    for words in ("own README", "guidance weight", "8.192 s", "14,512", "15,446", "52.07", "92.28", "89.73"):
        assert words in told, words
    first, second = (PAPER.table(f"difffoley_remeasured_{name}") for name in ("mgaudio", "align_acc_flowley"))
    assert first.value("MMAudio", "align_acc") != second.value("MMAudio", "align_acc")
    unread = PAPER.table("difffoley_not_found")
    assert unread.status == "qualitative" and all(words == ["not found"] for words in unread.rows.values())
