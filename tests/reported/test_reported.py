"""The reported numbers against independent copies (printed*.txt) and each other; the loader against bad files."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mmtrain import reported
from mmtrain.config_errors import UserError
from mmtrain.reported import as_logged, as_reported, load, papers, read
from mmtrain.reporting.tables import compare

COPY = Path(__file__).with_name("printed.txt")
COPIES = {"rankclip": COPY} | {
    name: COPY.with_name(f"printed_{name}.txt") for name in ("difffoley", "rdp", "storyweaver")
}
PAPER = load("rankclip")
COLUMNS = [(table, column) for table in PAPER.tables for column in table.columns]
Cell = tuple[str, str, str, str]


def blocks(copy: Path = COPY) -> dict[str, list[str]]:
    """Lines of a copy by table: [status, units, error], rows, columns."""
    text = re.sub(r"^#.*\n", "", copy.read_text(), flags=re.MULTILINE)
    parts = [block.split("\n") for block in text.strip().split("\n\n")]
    return {lines[0].partition(":")[0]: [lines[0].partition(":")[2], *lines[1:]] for lines in parts}


def units_of(head: str, num_columns: int) -> list[str]:
    """Units of all columns, of a table's first line."""
    units = [unit for part in head.split()[1:2] for unit in part.split(",")]
    return (units * num_columns)[:num_columns]


def printed_cells(copy: Path = COPY) -> set[Cell]:
    """(table, row, column, digits as printed) of a copy."""
    cells = set()
    for table, (head, rows, *columns) in blocks(copy).items():
        units = units_of(head, len(columns)) or ["text"]
        for unit, (name, values) in zip(units, (line.strip().split("  ") for line in columns), strict=True):
            words = values.split(" | ") if unit == "text" else values.split()
            cells |= {(table, row, name, value) for row, value in zip(rows.split(" | "), words, strict=True)}
    return cells


def as_numbers(cells: set[Cell]) -> set[tuple]:
    return {(*cell[:3], float(cell[3]) if re.fullmatch(r"-?\d+(\.\d+)?", cell[3]) else cell[3]) for cell in cells}


def our_cells(paper: reported.Paper) -> set[tuple]:
    cells = set()
    for table in paper.tables:
        for row, values in table.rows.items():
            if table.columns:
                pairs = [(column.name, table.value(row, column.name)) for column in table.columns]
            else:
                pairs = [("words", " ".join(values))]
            cells |= {(table.id, row, name, "?" if value is None else str(value)) for name, value in pairs}
    return as_numbers(cells)


@pytest.mark.parametrize(
    ("name", "num_cells"), [("rankclip", 486), ("rdp", 141), ("difffoley", 330), ("storyweaver", 100)]
)
def test_every_cell_equals_the_independent_copy_and_none_is_missing_on_either_side(name, num_cells):
    copy, ours = as_numbers(printed_cells(COPIES[name])), our_cells(load(name))
    assert ours - copy == set()
    assert copy - ours == set()
    assert len(ours) == num_cells


@pytest.mark.parametrize("name", ["rankclip", "rdp", "difffoley", "storyweaver"])
def test_status_unit_and_reading_error_equal_the_independent_copy(name):
    tables, copy = load(name).tables, blocks(COPIES[name])
    assert [table.id for table in tables] == list(copy)
    for table in tables:
        head = copy[table.id][0]
        assert table.status == head.split()[0], table.id
        assert [column.unit for column in table.columns] == units_of(head, len(table.columns)), table.id
        assert table.error == (float(head.split()[2]) if head.split()[2:] else None), table.id


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_paper_s_tables_are_shown_with_the_printed_digits(number):
    table = compare(PAPER.table(f"rankclip_table{number}"), [])
    names = [column.name for column in table.columns]
    shown = {(table.id, row.name, n, c.text) for row in table.rows for n, c in zip(names, row.cells, strict=True)}
    assert shown == {cell for cell in printed_cells() if cell[0] == table.id}


def test_averages_are_plain_means_to_rounding():
    for name in ("rankclip_table3", "alip_zeroshot"):
        for row, values in PAPER.table(name).rows.items():
            # 0.055: half of the last printed digit, and ALIP's 41.7, which its README rounds up from 41.645
            assert sum(values[:-1]) / len(values[:-1]) == pytest.approx(values[-1], abs=0.0551), (name, row)


def test_retrieval_of_table1_counts_5000_queries_both_ways():
    for column in PAPER.table("rankclip_table1").columns[3:]:
        for row in PAPER.table("rankclip_table1").rows:
            queries = PAPER.table("rankclip_table1").value(row, column.name) / 100 * 5000
            assert queries == pytest.approx(round(queries), abs=1e-6)


def test_top_k_and_recall_at_k_rise_with_k():
    pattern = re.compile(r"(.*)_(top|r)(\d+)$")
    families: dict[tuple, list[tuple[int, float]]] = {}
    for table, column in COLUMNS:
        if match := pattern.fullmatch(column.name):
            for row in table.rows:
                families.setdefault((table.id, row, match[1], match[2]), []).append(
                    (int(match[3]), table.value(row, column.name))
                )
    checked = [sorted(family) for family in families.values() if len(family) > 1 and family[0][1] is not None]
    assert len(checked) == 68
    assert all([value for _, value in family] == sorted(value for _, value in family) for family in checked)


def test_figures_agree_with_the_tables_within_their_reading_error():
    table1, table4 = PAPER.table("rankclip_table1"), PAPER.table("rankclip_table4")
    for half in ("lambda1", "lambda2"):
        figure = PAPER.table(f"rankclip_fig3_{half}")
        assert figure.value("dashed_reference", "imagenet1k_top1") == table1.value("RankCLIP", "imagenet1k_top1")
        mean = (table1.value("RankCLIP", "coco_i2t_r1") + table1.value("RankCLIP", "coco_t2i_r1")) / 2
        assert figure.value("dashed_reference", "coco_mean_r1") == pytest.approx(mean, abs=figure.error)
    sizes, points = PAPER.table("rankclip_fig4a_datasize"), PAPER.table("rankclip_fig4b_robustness")
    for method in ("CLIP", "RankCLIP"):
        assert sizes.value(method, "15M") == table4.value(f"{method} RN50", "imagenet1k_top1")
        for size in ("500K", "750K", "1M", "3M", "15M"):
            x = points.value(f"{method}-{size}", "imagenet1k_top1")
            assert x == pytest.approx(sizes.value(method, size), abs=points.error)
    for text, image, gap in PAPER.table("rankclip_fig6_modality_gap").rows.values():
        assert image - text == pytest.approx(gap, abs=1e-9)


def test_directions_are_sane():
    for table, column in COLUMNS:
        if column.unit == "percent":
            assert column.direction == "higher", (table.id, column.name)
        else:  # only the gap has a way that is better: which way uniformity is better was not found
            assert column.direction == ("lower" if column.name == "gap" else "none"), (table.id, column.name)


def expected_metric(table: str, column: str) -> str | None:
    """Our key by the names alone, another way than a list."""
    if "datasize" in table or table in ("cyclip_coco_remeasured", "rankclip_iclr2025_version"):
        return None
    if table.endswith(("table3", "linear_probe")):
        return f"test/{column.replace('imagenet1k', 'imagenet')}/linear_probe"
    if match := re.fullmatch(r"(imagenet\w*?)(1k)?_top(\d)", column):
        return f"test/{match[1]}/zero_shot_top{match[3]}"
    if match := re.fullmatch(r"coco_(\w2\w)_(r\d+)", column):
        return f"test/coco/{'' if table == 'alip_retrieval' else 'one_caption_'}{match[1]}_{match[2]}"
    if table == "alip_zeroshot":
        return "test/imagenet/zero_shot_top1" if column == "imagenet1k" else None
    return {
        "linear_probe_average": "test/average/linear_probe",
        "alignment_SA": "test/coco/alignment_cosine",
        "uniformity_SU": "test/coco/uniformity_cosine",
        "gap": "test/coco/modality_gap",
    }.get(column)


def test_each_column_names_our_metric():
    for table, column in COLUMNS:
        assert column.metric == expected_metric(table.id, column.name), (table.id, column.name)


def test_only_what_is_counted_differently_or_unknown_is_not_comparable_and_says_why():
    refused = {(table.id, column.name) for table, column in COLUMNS if column.metric and not column.comparable}
    expected = {(f"rankclip_table{n}", f"coco_t2i_r{k}") for n in (1, 4) for k in (1, 5, 10)}
    expected |= {("rankclip_table4", "linear_probe_average"), ("rankclip_fig6_modality_gap", "gap")}
    expected |= {("rankclip_fig5_alignment_uniformity", name) for name in ("alignment_SA", "uniformity_SU")}
    assert refused == expected
    assert all(column.protocol for table, column in COLUMNS if (table.id, column.name) in expected)
    assert all("class set" in column.protocol for _, column in COLUMNS if column.name.startswith("imagenet_r_"))


def test_the_misprint_keeps_its_note():
    table = PAPER.table("rankclip_table2")
    assert table.value("CLIP", "imagenet_r_top3") == 10.56
    assert any("10.56" in note and "misprint" in note for note in table.notes)


def test_a_row_is_found_by_method_and_by_the_settings_that_its_name_stands_for():
    table4, points = PAPER.table("rankclip_table4"), PAPER.table("rankclip_fig4b_robustness")
    assert table4.row_of("RankCLIP", {"backbone": "ViT-B-32-quickgelu", "train_data": "x"}) == "RankCLIP ViT-B/32"
    assert table4.row_of("CLIP", {"backbone": "RN50"}) == "CLIP RN50"
    assert table4.row_of("RankCLIP", {"backbone": "RN101"}) is None
    assert points.row_of("CLIP", {"train_data": "cc3m-750k"}) == "CLIP-750K"
    assert points.row_setting("CLIP-3M") == {"backbone": "RN50", "train_data": "CC3M"}
    assert PAPER.table("rankclip_fig3_lambda1").row_of("RankCLIP", {}) == "dashed_reference"
    assert PAPER.table("rankclip_table1").row_of("SLIP", {}) is None


def test_units_convert_both_ways():
    assert as_reported(0.1016, "percent") == pytest.approx(10.16)
    assert as_reported(0.1016, "cosine") == 0.1016
    assert as_reported(0.6496, "cosine_x100") == pytest.approx(64.96)
    for unit in reported.UNITS:
        assert as_logged(as_reported(0.3, unit), unit) == pytest.approx(0.3)


def test_unknown_papers_and_tables_are_refused_with_the_nearest_name():
    assert papers() == ["difffoley", "rankclip", "rdp", "storyweaver"]
    with pytest.raises(UserError, match=r"did you mean rankclip\?"):
        load("rankclipp")
    with pytest.raises(UserError, match=r"did you mean rankclip_table3\?"):
        PAPER.table("rankclip_tabel3")


def test_the_loader_is_light():
    code = (
        "import sys, mmtrain.reported as r; r.load('rankclip'); print(*{'torch', 'numpy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


GOOD = """
paper: {title: T, citation: C, own_method: A}
tables:
- id: one
  title: One
  source: paper
  status: exact
  setting: {backbone: RN50}
  columns:
  - {name: top1, unit: percent, direction: higher, metric: test/imagenet/zero_shot_top1, comparable: true}
  - {name: gap, unit: none, direction: lower}
  rows:
    A: [1.5, 2]
    B: [3, null]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "paper.yaml"
    path.write_text(text)
    return path


def test_a_minimal_file_loads_with_defaults(tmp_path):
    table = read(written(tmp_path, GOOD)).table("one")
    assert (table.paper, table.notes, table.error, table.inferred) == ("paper", [], None, [])
    assert table.value("B", "gap") is None
    assert table.columns[1].metric is None and table.columns[1].comparable is False
    with pytest.raises(KeyError):
        table.value("A", "top3")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("A: [1.5, 2]", "A: [1.5, 2]\n    A: [1, 1]", "'A' is given twice"),
        ("A: [1.5, 2]", "A: [1.5]", r"table one: row A: \[1.5\], expected a list of 2 values"),
        ("A: [1.5, 2]", "A: [1.5, two]", "table one: row A: gap is 'two', expected a number or null"),
        ("A: [1.5, 2]", "A: [yes, 2]", "row A: top1 is True, expected a number"),
        ("A: [1.5, 2]", "A: [.nan, 2]", "row A: top1 is nan, expected a number"),
        ("A: [1.5, 2]", "A: [101.5, 2]", r"row A: top1 is 101.5, expected a percentage in \[0, 100\]"),
        ("status: exact", "status: exactly", "table one: status 'exactly' is not known; did you mean exact?"),
        ("status: exact", "status: missing", "row A: .* expected only null"),
        ("status: exact", "status: digitised", "error is None; a digitised table has one"),
        ("status: exact", "status: qualitative", "qualitative with 2 columns"),
        ("unit: none", "unit: percents", "column gap: unit 'percents' is not known; did you mean percent?"),
        ("direction: lower", "direction: down", "direction 'down' is not known"),
        ("direction: lower", "direction: lower, comparable: true", "no metric to compare with"),
        ("direction: lower", "direction: lower, metrics: x", "key 'metrics' is not known; did you mean metric?"),
        ("direction: lower", "direction: lower, metric: imagenet/top1", "expected test/<set>/<metric>"),
        ("direction: lower", "direction: lower, metric: test/imagenet/zero_shot_top1", "metric .* is given twice"),
        ("name: gap", "name: top1", "column 'top1' is given twice"),
        ("  source: paper\n", "", "table one: has no source"),
        ("setting: {backbone: RN50}", "setting: RN50", "setting is 'RN50', expected a dict"),
        ("setting: {backbone: RN50}", "inferred: [train_data]", "inferred names 'train_data'"),
        ("setting: {backbone: RN50}", "row_settings: {C: {method: A}}", "row_settings: row 'C' is not known"),
        ("own_method: A", "own_methods: A", "paper: key 'own_methods' is not known; did you mean own_method?"),
        ("tables:", "tables: [", "not valid YAML"),
        ("tables:", "table:", "key 'table' is not known"),
    ],
)
def test_a_bad_file_is_refused_by_name_table_and_key(tmp_path, old, new, message):
    assert GOOD.count(old) >= 1
    with pytest.raises(UserError, match=message) as caught:
        read(written(tmp_path, GOOD.replace(old, new, 1)))
    assert "paper.yaml" in str(caught.value)


@pytest.mark.parametrize("change", [lambda c: c["tables"].append(c["tables"][0]), lambda c: c.update(tables={"a": 1})])
def test_a_table_twice_or_no_list_of_tables_is_refused(tmp_path, change: Callable[[dict], None]):
    content = yaml.safe_load(GOOD)
    change(content)
    with pytest.raises(UserError, match=r"paper\.yaml: table"):
        read(written(tmp_path, yaml.safe_dump(content, sort_keys=False)))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nothing.yaml")
