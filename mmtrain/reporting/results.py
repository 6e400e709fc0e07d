"""What a run measured: `results.json` in its folder, runs found on disk, and means with intervals over seeds.

Metrics are fractions in [0, 1] or plain numbers under the keys that `test` logs, e.g. `test/imagenet/zero_shot_top1`.
"""

import glob
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from mmtrain.config_errors import UserError, clip

FORMAT = 1
FILE = "results.json"
SCALES = ("laptop", "full", "simulation")


@dataclass
class Run:
    """One evaluated checkpoint.

    Args:
        folder: the run folder; it holds `results.json`, `config.yaml`, `figures/` and `logs/`.
        paper: name of the paper whose tables the run belongs to, e.g. "rankclip".
        method: the row's name, as the paper spells it.
        run: name of the run.
        scale: "full"; "simulation", which may stand under the rows of a real robot, but is never compared with them; or
            "laptop" for runs that may never stand in a paper's table.
        verb: what was run, "test" for example.
        seed: of the training, None if unknown.
        step, epoch: where in the training the checkpoint was written; 0 if unknown.
        setting: what the training used: `backbone`, `train_data`, and more if a table asks for it.
        metrics: measured values by key; NaN where a set held nothing to measure.
        chance: value of guessing, for the keys where that is known.
        evaluated: samples by set. skipped: by set, then by reason.
        missing: sets that were not there, and the layout in which they are looked for.
        protocol: how a number was measured, by data set.
        data_counts: samples by set and kind. code: versions by package.
        figures: `{"file": path in the folder, "title": ..., "kind": "figure", "sample" or "video"}`.
    """

    folder: Path
    paper: str
    method: str
    run: str
    scale: str
    verb: str = "test"
    seed: int | None = None
    step: int = 0
    epoch: int = 0
    checkpoint: str | None = None
    setting: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    data_counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    code: dict[str, Any] = field(default_factory=dict)
    figures: list[dict[str, str]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of this run among others, e.g. `RankCLIP rankclip_emoji, seed 0, step 225`."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.method} {self.run}{seed}, step {self.step}"


def is_video(figure: dict[str, str]) -> bool:
    """Whether one of `Run.figures` is a video, which a picture's place cannot show."""
    return figure.get("kind") == "video"


def write_run(run: Run) -> Path:
    """Write `results.json` into the run's folder, which is made if needed; an older one is replaced in one move.

    NaN and infinities become null, as JSON has neither.

    Raises:
        UserError: the scale is none of `SCALES`, or the file cannot be written; an older one then stays.
    """
    _check_scale(run.scale, run.folder)
    content = {"format": FORMAT} | {key: value for key, value in asdict(run).items() if key != "folder"}
    for key in ("metrics", "chance"):
        content[key] = {name: float(v) if math.isfinite(v) else None for name, v in content[key].items()}
    text = json.dumps(content, indent=1, allow_nan=False)
    target = Path(run.folder) / FILE
    part = target.with_name(f".{FILE}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{target}: cannot be written ({error.strerror})") from error
    return target


def read_run(folder: Path | str) -> Run:
    """Read the run of a folder. Keys that this version does not know are left out, null metrics become NaN.

    Raises:
        UserError: no `results.json` there, or one that is broken, of another format, or lacks a key.
    """
    path = Path(folder) / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `python -m mmtrain test` writes it into the run folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); evaluate the run again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path}: format is {clip(found)}, this version reads {FORMAT}; evaluate the run again")
    values = {entry.name: content[entry.name] for entry in fields(Run) if entry.name in content}
    _check_content(values, path)
    for key in ("metrics", "chance"):
        values[key] = {name: math.nan if value is None else float(value) for name, value in values.get(key, {}).items()}
    return Run(**values | {"folder": Path(folder)})


def _check_content(values: dict[str, Any], path: Path) -> None:
    """Refuse what would fail far from here: absent keys, wrong kinds, metrics that are no numbers."""
    for key in ("paper", "method", "run", "scale", "metrics"):
        if key not in values:
            raise UserError(f"{path}: has no {key!r}; evaluate the run again")
    kinds = {"setting": dict, "metrics": dict, "chance": dict, "missing": dict, "protocol": dict, "evaluated": dict}
    kinds |= {"skipped": dict, "data_counts": dict, "code": dict, "figures": list}
    kinds |= {"paper": str, "method": str, "run": str, "step": int, "epoch": int, "seed": int | None}
    for key, value in values.items():
        if not isinstance(value, kinds.get(key, object)):
            raise UserError(f"{path}: {key} is {clip(value)}, expected {getattr(kinds[key], '__name__', kinds[key])}")
    for name, value in (values["metrics"] | values.get("chance", {})).items():
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"{path}: metric {name} is {clip(value)}, expected a number or null")
    _check_scale(values["scale"], path)


def _check_scale(scale: str, path: Path) -> None:
    if scale not in SCALES:
        raise UserError(f"{path}: scale is {clip(scale)}, expected one of {', '.join(SCALES)}")


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read all runs at or under the paths, each once, in the order of the paths and then of folder names.

    Args:
        paths: each a run folder, its `results.json`, a folder that holds run folders at any depth, or a glob pattern.

    Raises:
        UserError: nothing was found under a path, or a result found is broken.
    """
    folders: dict[Path, Path] = {}
    for path in paths:
        roots = [Path(path)] if Path(path).exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
        found = [folder for root in roots for folder in _run_folders(root)]
        if not found:
            raise UserError(f"{path}: no {FILE} at or under it; `python -m mmtrain test` writes one into a run folder")
        for folder in found:
            folders.setdefault(folder.resolve(), folder)
    return [read_run(folder) for folder in folders.values()]


def _run_folders(root: Path) -> list[Path]:
    """Folders with a result at or under a root, sorted. What lies inside a run folder belongs to that run."""
    if root.is_file():
        return [root.parent] if root.name == FILE else []
    found = []
    for folder, inner, files in os.walk(root):
        if FILE in files:
            found.append(Path(folder))
            inner.clear()
        inner.sort()
    return found


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values and its 95 % Student-t interval; the bounds are None for a single value or beside NaN."""

    mean: float
    low: float | None
    high: float | None
    n: int
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of independent values, e.g. of one metric over seeds.

    The interval is mean +/- t(0.975, n - 1) s / sqrt(n), s the sample's standard deviation. NaN among the values gives
    a NaN mean: a seed that could not be measured is not left out in silence.

    Raises:
        ValueError: no value was given.

    Example:
        >>> estimate([1.0, 2.0, 6.0]).mean
        3.0
    """
    if not values:
        raise ValueError("estimate needs at least one value")
    values = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in values):
        return Estimate(math.nan, None, None, len(values), values)
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, 1, values)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, values)


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seed, and each metric's mean and interval over those that have it."""

    paper: str
    method: str
    setting: dict[str, str]
    scale: str
    runs: list[Run]
    metrics: dict[str, Estimate]

    @property
    def chance(self) -> dict[str, float]:
        """Value of guessing by metric, of the first run that knows it."""
        return {key: value for run in reversed(self.runs) for key, value in run.chance.items()}


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Put runs of the same paper, method, setting and scale together, seeds side by side.

    A group holds a seed once, for two checkpoints of one seed are no independent values: the runs that bring a seed
    again (another step, another name; in that order) form a further group. An unknown seed counts as one seed.
    """
    kinds: dict[str, list[dict[int | None, Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.step, run.run)):
        layers = kinds.setdefault(_kind(run), [])
        layer = next((layer for layer in layers if run.seed not in layer), None)
        if layer is None:
            layers.append(layer := {})
        layer[run.seed] = run
    order = list(dict.fromkeys(_kind(run) for run in runs))
    return [_group(list(layer.values())) for kind in order for layer in kinds[kind]]


def _kind(run: Run) -> str:
    return json.dumps([run.paper, run.method, run.scale, run.setting], sort_keys=True)


def _group(runs: list[Run]) -> RunGroup:
    runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0))
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    metrics = {name: estimate([run.metrics[name] for run in runs if name in run.metrics]) for name in names}
    first = runs[0]
    return RunGroup(first.paper, first.method, first.setting, first.scale, runs, metrics)
