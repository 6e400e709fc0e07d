"""From the outcomes of simulated episodes to metrics, figures and words (RDP spec sections 7.4 and 8.4)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.metrics.manipulation import CLEAN, PARTLY, ForceStability, LiftScore, PeelScore, WipeScore
from mmtrain.rdp.records import CELLS
from mmtrain.robot_tasks import FRAME_RATE, Task

NEEDED = {"peel": ("length_ratio",), "wipe": ("residue",), "lift": ("clamped", "lifted", "score")}
FORCE = ("stable_force_share", "mean_contact_force", "peak_force", "stopped_for_force")


class RolloutEvaluation:
    """Metrics of one task from its episodes.

    It gathers nothing itself: give it the records of all processes. A (variation, seed) counts once.

    Args:
        task: "peel", "wipe" or "lift".
        demonstration_mean: of peel: mean share of the length that the demonstrations peel, in (0, 1].
        seed: of the bootstrap.

    Raises:
        UserError: an unknown task, or a mean outside (0, 1].
    """

    def __init__(self, task: Task, demonstration_mean: float = 1.0, seed: int = 0) -> None:
        if task not in get_args(Task):
            raise UserError(f"task: {task!r} is not known; one of {', '.join(get_args(Task))}")
        if not 0 < demonstration_mean <= 1:
            raise UserError(
                f"demonstration_mean: {demonstration_mean} is not in (0, 1]; do the demonstrations succeed?"
            )
        self.task, self.demonstration_mean = task, float(demonstration_mean)
        common = {"variations": CELLS[task], "seed": seed, "sync_on_compute": False}
        self.score = {
            "peel": lambda: PeelScore(self.demonstration_mean, **common),
            "wipe": lambda: WipeScore(**common),
            "lift": lambda: LiftScore(**common),
        }[task]()
        self.force = ForceStability(**common)
        self.seeds: set[int] = set()

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add finished episodes.

        Args:
            records: the world's `outcome()` of each, with `variation` and `seed`.

        Raises:
            UserError: a record lacks a value, or its variation is not one of the task's.
        """
        for record in records:
            if absent := [name for name in ("variation", "seed", *NEEDED[self.task], *FORCE) if name not in record]:
                raise UserError(f"outcome of {self.task}: has no {', '.join(absent)}; it has {', '.join(record)}")
            if record["variation"] not in CELLS[self.task]:
                known = ", ".join(CELLS[self.task])
                raise UserError(
                    f"outcome of {self.task}: variation is {record['variation']!r}, expected one of {known}"
                )
        if not records:
            return
        about = [record["variation"] for record in records], torch.tensor([int(record["seed"]) for record in records])
        share, contact, peak, stopped = (_column(records, name) for name in FORCE)
        failed = (stopped,) if self.task == "wipe" else ()  # the worlds of peel and lift have it in their numbers
        self.score.update(*(_column(records, name) for name in NEEDED[self.task]), *about, *failed)
        self.force.update(torch.where(contact > 0, share, math.nan), peak, stopped, *about)
        self.seeds |= {int(record["seed"]) for record in records}

    def compute(self) -> dict[str, float]:
        """Return the metrics as they are logged: `test/TASK/CELL`, its `_low` and `_high`, and those of the force."""
        found = {**self.score.compute(), **self.force.compute()}
        return {f"test/{self.task}/{key}": float(value) for key, value in found.items()}

    def protocol(self, max_frames: int = 240) -> str:
        """How the numbers were measured, in words; `max_frames` is the time limit of an episode."""
        rule = {
            "peel": f"score: strip / length, divided by the demonstrations' mean of {self.demonstration_mean:.3f}",
            "wipe": f"score: 1 up to {CLEAN:.0%} of the mark left, 0.5 below {PARTLY:.0%}, else or if stopped 0",
            "lift": "clamp, lift: share of episodes; score: 1 lifted without much compression, 0.5 with some, else 0",
        }[self.task]
        seeds = f" (seeds {min(self.seeds)} to {max(self.seeds)}, the same for every method)" if self.seeds else ""
        return (
            f"simulation, not the paper's robot: {len(self.seeds)} episodes of each of {', '.join(CELLS[self.task])}"
            f"{seeds}, at most {max_frames / FRAME_RATE:g} s each; {rule}; 95 % intervals over episodes: Wilson for "
            "rates, bootstrap for scores"
        )

    def figures(self, records: Sequence[Mapping[str, Any]], folder: Path, episodes: int = 3) -> list[dict[str, str]]:
        """Draw the scores, and the force of a few episodes of each variation, into `<folder>/figures`.

        Args:
            records: with `force`, the true normal force of every frame in newtons (those without are not drawn), and
                `force_band`, what counts as stable.
            folder: the run folder.
            episodes: how many of each variation, the first seeds.

        Returns:
            `{"file": path in the folder, "title": ..., "kind": "figure"}` for each.
        """
        from mmtrain.rdp.figures import force_plot, score_bars

        metrics, drawn = self.compute(), []
        prefix = f"test/{self.task}/"
        cells = [key.removeprefix(prefix) for key in metrics if key + "_low" in metrics]
        values = {c: tuple(metrics[f"{prefix}{c}{end}"] for end in ("", "_low", "_high")) for c in cells}
        score_bars(folder / "figures" / "scores.png", {"": values}, f"{self.task}: scores in simulation")
        drawn.append(("scores.png", f"Scores in simulation, {self.task}"))
        for variation in CELLS[self.task]:
            mine = [r for r in records if r["variation"] == variation and len(r.get("force", ()))]
            mine = sorted(mine, key=lambda record: record["seed"])[:episodes]
            if not mine:
                continue
            name = f"force-{variation}.png"
            force_plot(
                folder / "figures" / name,
                [np.arange(len(record["force"])) for record in mine],
                [record["force"] for record in mine],
                mine[0].get("force_band"),  # a cup's own
                [int(record.get("perturbed_at", -1)) for record in mine],
                titles=[f"seed {record['seed']}" for record in mine],
            )
            drawn.append((name, f"Normal force in simulation, {self.task}, {variation}"))
        return [{"file": f"figures/{name}", "title": title, "kind": "figure"} for name, title in drawn]


def _column(records: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    return torch.tensor([float(record[name]) for record in records], dtype=torch.float64)
