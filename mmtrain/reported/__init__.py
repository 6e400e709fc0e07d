"""Numbers that papers report, one YAML file a paper: read, checked, and tied to the metrics that `test` logs.

A file has `paper` (title, citation, own_method) and `tables`; their keys are the fields of the classes below. Light to
import: the standard library and PyYAML only.
"""

import dataclasses
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from mmtrain.config_errors import UserError, clip, nearest

FOLDER = Path(__file__).parent
Direction = Literal["higher", "lower", "none"]
Status = Literal["exact", "digitised", "missing", "qualitative", "partial"]
UNITS = (
    "percent",
    "cosine",
    "cosine_x100",
    "log",
    "projection",
    "score",
    "ratio",
    "count",
    "Hz",
    "ms",
    "us",
    "s",
    "distance",
    "nat",
    "million",
    "frames/s",
    "text",
    "none",
)
HUNDREDFOLD = ("percent", "cosine_x100")  # units in which our numbers are a hundred times as large
METRIC = re.compile(r"test/[a-z0-9_]+/[a-z0-9_]+")


@dataclass(frozen=True)
class Column:
    """One quantity of a table.

    Args:
        name: unique in the table.
        unit: "percent" (of 100), "cosine", "cosine_x100" (times 100), "log", "projection" (a coordinate in a plot),
            "score", "ratio", "count", "Hz", "ms", "us", "s", "distance" (of distributions), "nat", "million",
            "frames/s", "text" (words, and numbers printed as bounds: "<1"), or "none".
        direction: which way is better; "none" if neither, or if the paper does not say.
        metric: our key beside it, None if we measure no such thing. No two columns of a table share one.
        comparable: whether both count alike. False if they differ, or if the paper's way is not known.
        protocol: how the paper counts, or why the numbers are not comparable; may be empty.
    """

    name: str
    unit: str
    direction: Direction
    metric: str | None = None
    comparable: bool = False
    protocol: str = ""


@dataclass(frozen=True)
class ReportedTable:
    """One table or figure.

    Args:
        paper: name of the file it comes from.
        id: unique in that file.
        source: where the numbers were read.
        status: "exact" printed digits; "digitised" read off a figure, within `error` in the column's unit; "missing"
            the figure exists but its numbers were not found; "partial" fragments; "qualitative" no numbers.
        setting: what all rows share, e.g. train_data and backbone. inferred: those of its keys that are not printed.
        columns: empty for a qualitative table.
        rows: values in the order of the columns, None where the paper has none; words if qualitative, and in columns
            whose unit is "text".
        row_settings: what a row's name says: its `method` if that is not the name itself, and settings of its own.
        notes: what a reader must know before comparing.
    """

    paper: str
    id: str
    title: str
    source: str
    status: Status
    setting: dict[str, str]
    inferred: list[str]
    error: float | None
    columns: list[Column]
    rows: dict[str, list[float | str | None]] | dict[str, list[str]]
    notes: list[str]
    row_settings: dict[str, dict[str, str]] = field(default_factory=dict)

    def value(self, row: str, column: str) -> float | str | None:
        """The reported value in the column's unit; words, if there are any, only where that is "text".

        Raises:
            KeyError: no such row or column.
        """
        names = [entry.name for entry in self.columns]
        if column not in names:
            raise KeyError(column)
        return self.rows[row][names.index(column)]

    def method(self, row: str) -> str:
        """The method of a row."""
        return self.row_settings.get(row, {}).get("method", row)

    def row_setting(self, row: str) -> dict[str, str]:
        """The setting of a row: the table's and its own."""
        own = {key: value for key, value in self.row_settings.get(row, {}).items() if key != "method"}
        return self.setting | own

    def row_of(self, method: str, setting: dict[str, str]) -> str | None:
        """The row of a method, None if there is none. A row with settings of its own must agree with `setting` there.

        The table's common setting is not asked for: a run in another setting is shown beside the row, and marked.
        """
        for row in self.rows:
            own = self.row_settings.get(row, {})
            asked = {key: value for key, value in own.items() if key != "method"}
            if self.method(row) == method and all(same_setting(setting.get(key), asked[key]) for key in asked):
                return row
        return None


@dataclass(frozen=True)
class Paper:
    """All tables of one file. `own_method` is the method that the paper proposes."""

    name: str
    title: str
    citation: str
    own_method: str
    tables: list[ReportedTable]

    def table(self, id: str) -> ReportedTable:
        """The table of an id.

        Raises:
            UserError: no such table; names the nearest.
        """
        for table in self.tables:
            if table.id == id:
                return table
        raise UserError(_unknown(f"paper {self.name}: table", id, [table.id for table in self.tables]))


def papers() -> list[str]:
    """Names that `load` takes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(paper: str) -> Paper:
    """The reported numbers of a paper.

    Raises:
        UserError: no such paper, or its file is broken; see `read`.
    """
    if paper not in papers():
        raise UserError(_unknown("paper", paper, papers()))
    return read(FOLDER / f"{paper}.yaml")


def as_reported(value: float, unit: str) -> float:
    """Our metric in the unit of a table: percent are 100 times our fractions, as are some cosines; others are ours.

    >>> as_reported(0.5, "percent")
    50.0
    """
    return value * 100 if unit in HUNDREDFOLD else value


def as_logged(value: float, unit: str) -> float:
    """A reported value as we log it: the inverse of `as_reported`."""
    return value / 100 if unit in HUNDREDFOLD else value


def same_setting(ours: str | None, reported: str) -> bool:
    """Whether two names mean the same backbone or data: case, punctuation and open_clip's activation suffix aside.

    >>> same_setting("ViT-B-32-quickgelu", "ViT-B/32"), same_setting("RN50", "RN101"), same_setting(None, "RN50")
    (True, False, False)
    """
    if ours is None:
        return False
    plain = (re.sub(r"[^a-z0-9]", "", str(name).lower()).removesuffix("quickgelu") for name in (ours, reported))
    return len(set(plain)) == 1


def read(path: Path) -> Paper:
    """Read and check a file of reported numbers.

    Raises:
        UserError: no such file, not YAML, a key twice, an unknown or absent key, a row whose length differs from the
            columns', a value that is no number or (percent) outside [0, 100], or a status that does not fit the rows.
            Names file, table and key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    _check_keys(f"{path.name}", content, ("paper", "tables"), ())
    head = content["paper"]
    _check_keys(f"{path.name}: paper", head, ("title", "citation", "own_method"), ())
    if not isinstance(content["tables"], list):
        raise UserError(f"{path.name}: tables is {clip(content['tables'])}, expected a list of tables")
    tables = [_table(path, entry) for entry in content["tables"]]
    _check_unique(f"{path.name}: table id", [table.id for table in tables])
    return Paper(path.stem, **head, tables=tables)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _table(path: Path, entry: Any) -> ReportedTable:
    where = f"{path.name}: table {entry.get('id', '?') if isinstance(entry, dict) else clip(entry)}"
    optional = ("setting", "inferred", "error", "row_settings", "notes")
    _check_keys(where, entry, ("id", "title", "source", "status", "columns", "rows"), optional)
    if entry["status"] not in get_args(Status):
        raise UserError(_unknown(f"{where}: status", entry["status"], get_args(Status)))
    defaults = {"setting": {}, "inferred": [], "error": None, "row_settings": {}, "notes": []}
    values = {"paper": path.stem} | defaults | entry
    for key, kind in {
        "columns": list,
        "rows": dict,
        **{k: type(v) for k, v in defaults.items() if v is not None},
    }.items():
        if not isinstance(values[key], kind):
            raise UserError(f"{where}: {key} is {clip(values[key])}, expected a {kind.__name__}")
    values["columns"] = [_column(where, column) for column in values["columns"]]
    table = ReportedTable(**values)
    _check_table(where, table)
    return table


def _column(where: str, entry: Any) -> Column:
    where = f"{where}: column {entry.get('name', '?') if isinstance(entry, dict) else clip(entry)}"
    required = tuple(key.name for key in dataclasses.fields(Column) if key.default is dataclasses.MISSING)
    _check_keys(where, entry, required, ("metric", "comparable", "protocol"))
    column = Column(**entry)
    for key, allowed in (("unit", UNITS), ("direction", get_args(Direction)), ("comparable", (True, False))):
        if getattr(column, key) not in allowed:
            raise UserError(_unknown(f"{where}: {key}", getattr(column, key), allowed))
    if column.metric is not None and not METRIC.fullmatch(str(column.metric)):
        raise UserError(f"{where}: metric is {clip(column.metric)}, expected test/<set>/<metric>")
    if column.comparable and column.metric is None:
        raise UserError(f"{where}: comparable is true but there is no metric to compare with")
    return column


def _check_table(where: str, table: ReportedTable) -> None:
    _check_unique(f"{where}: column", [column.name for column in table.columns])
    _check_unique(f"{where}: metric", [column.metric for column in table.columns if column.metric])
    for row, values in table.rows.items():
        _check_row(f"{where}: row {row}", table, values)
    for key in table.inferred:
        if key not in table.setting and not any(key in own for own in table.row_settings.values()):
            raise UserError(f"{where}: inferred names {clip(key)}, which is no key of its settings")
    for row in table.row_settings:
        if row not in table.rows:
            raise UserError(_unknown(f"{where}: row_settings: row", row, table.rows))
    if (table.status == "digitised") != (table.error is not None):
        raise UserError(f"{where}: error is {table.error}; a digitised table has one, and only that")
    if (table.status == "qualitative") != (not table.columns):
        raise UserError(
            f"{where}: status is {table.status} with {len(table.columns)} columns; only qualitative has none"
        )


def _check_row(where: str, table: ReportedTable, values: Any) -> None:
    if not isinstance(values, list) or (table.columns and len(values) != len(table.columns)):
        raise UserError(f"{where}: {clip(values)}, expected a list of {len(table.columns)} values, one a column")
    if not table.columns:
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: {clip(values)}, expected words, as the table is qualitative")
        return
    if table.status == "missing" and any(value is not None for value in values):
        raise UserError(f"{where}: {clip(values)}, expected only null, as the status is missing")
    for column, value in zip(table.columns, values, strict=True):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        is_words = column.unit == "text" and isinstance(value, str)
        if value is not None and not is_number and not is_words:
            hint = ", or words if its unit were text" * isinstance(value, str)
            raise UserError(f"{where}: {column.name} is {clip(value)}, expected a number or null{hint}")
        if value is not None and column.unit == "percent" and not 0 <= value <= 100:
            raise UserError(f"{where}: {column.name} is {value}, expected a percentage in [0, 100]")
        if value is not None and column.unit == "cosine_x100" and not -100 <= value <= 100:
            raise UserError(f"{where}: {column.name} is {value}, expected a cosine times 100, in [-100, 100]")


def _check_keys(where: str, entry: Any, required: Collection[str], optional: Collection[str]) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {clip(entry)}, expected a mapping with {', '.join(required)}")
    known = [*required, *optional]
    for key in entry:
        if key not in known:
            raise UserError(_unknown(f"{where}: key", key, known))
    for key in required:
        if key not in entry:
            raise UserError(f"{where}: has no {key}; required are {', '.join(required)}")


def _check_unique(where: str, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} {twice[0]!r} is given twice")


def _unknown(where: str, found: Any, known: Collection) -> str:
    guess = nearest(str(found), known)
    hint = f"; did you mean {guess}?" if guess else "."
    return f"{where} {clip(found)} is not known{hint} Known: {', '.join(map(str, known))}."
