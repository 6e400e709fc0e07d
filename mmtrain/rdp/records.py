"""Episodes of a tested policy on disk: `rollouts.jsonl` in the run folder, one JSON object a line.

A record is the world's outcome (plain numbers) with `variation` and `seed`.
"""

import json
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError, clip

FILE = "rollouts.jsonl"
PERTURBATIONS = {"none": "no_perturb", "before": "perturb_before_contact", "after": "perturb_after_contact"}
CELLS = {  # task: variation -> its name in the keys
    "peel": PERTURBATIONS,
    "wipe": PERTURBATIONS,
    "lift": {"soft": "soft", "hard": "hard"},
}
LIFT_VALUES = {"clamp": "clamped", "lift": "lifted", "score": "score"}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run folder.

    Raises:
        UserError: no such file, or a line that is no record; names it.
    """
    path = Path(folder) / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); `python -m mmtrain test` writes it where a simulation is run"
        ) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); test the run again") from error
        if not isinstance(record, dict) or not {"variation", "seed"} <= record.keys():
            raise UserError(f"{path}:{number}: {clip(record)}, expected an object with variation and seed")
        records.append(record)
    return records


def value_name(task: str, cell: str) -> tuple[str | None, str]:
    """The variation (None: all) and the record's value that a cell of a table averages.

    >>> value_name("lift", "soft_clamp"), value_name("wipe", "perturb_after_contact"), value_name("peel", "all")
    (('soft', 'clamped'), ('after', 'score'), (None, 'score'))

    Raises:
        KeyError: the cell is no score.
    """
    names = {key: name for name, key in CELLS[task].items()} | {"all": None}
    if task != "lift":
        return names[cell], "score"
    cup, _, value = cell.rpartition("_")
    return names[cup], LIFT_VALUES[value]


def episode_values(folder: Path, metric: str) -> list[float]:
    """Values of the episodes in a run folder behind a logged score, e.g. `test/wipe/perturb_after_contact`.

    They are in [0, 1]; peel's are shares of the length, not divided by the demonstrations' mean, which is one constant
    for all methods.

    Raises:
        UserError: see `read_records`, or there is no such episode or value.
    """
    _, task, cell = metric.split("/")
    path = Path(folder) / FILE
    records = read_records(folder)
    try:
        variation, name = value_name(task, cell)
        values = [float(record[name]) for record in records if variation in (None, record["variation"])]
    except KeyError as error:
        raise UserError(f"{path}: {error} is not known there, but wanted for {metric}") from error
    if not values:
        raise UserError(f"{path}: has no episode for {metric}; test the run again")
    return values
