"""Scores of the tasks of Reactive Diffusion Policy, by variation and with intervals (RDP spec sections 7.1, 7.4).

Every metric is fed episodes and counts each (variation, seed) once over all processes, whatever order they come in.
Values are fractions in [0, 1] or newtons; the keys NAME_low and NAME_high are the bounds of a 95 % interval.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from mmtrain.metrics.intervals import NOTHING, Interval, mean_of, score_interval, wilson
from mmtrain.metrics.ranking import RowMetric, in_order_of_ids

PERTURBATIONS = {  # variation of the simulation: column of Tables II and III
    "none": "no_perturb",
    "before": "perturb_before_contact",
    "after": "perturb_after_contact",
}
CUPS = {"soft": "soft", "hard": "hard"}  # Table IV
CLEAN, PARTLY = 0.05, 1 / 3
MAX_SEED = 2**40
ROUNDING = 1e-6  # a float32 residue of 0.05 is above 0.05


def wipe_score(residue: ArrayLike, clean: float = CLEAN, partly: float = PARTLY) -> np.ndarray:
    """Score of a wiped surface: 1 up to the residue `clean`, 0.5 below `partly`, else 0.

    Args:
        residue: share of the handwriting that is left, in [0, 1], any shape.
        clean: residue that the demonstrations leave.
        partly: the paper says "under one third of the handwriting length".

    Example:
        >>> wipe_score([0.0, 0.05, 0.2, 1 / 3, 1.0])
        array([1. , 1. , 0.5, 0. , 0. ])
    """
    residue = np.asarray(residue, dtype=np.float64)
    return np.where(residue <= clean + ROUNDING, 1.0, np.where(residue < partly - ROUNDING, 0.5, 0.0))


def lift_score(lifted: ArrayLike, compression: ArrayLike, whole: float, partly: float) -> np.ndarray:
    """Score of a lifted cup: 1 lifted with less compression than `whole`, 0.5 with less than `partly`, else 0.

    Args:
        lifted: whether it was lifted along the path and not dropped, any shape.
        compression: largest compression on the way, as the limits in any unit, same shape.

    Example:
        >>> lift_score([True, True, True, False], [1.0, 9.0, 15.0, 1.0], 8.0, 14.0)
        array([1. , 0.5, 0. , 0. ])
    """
    compression = np.asarray(compression, dtype=np.float64)
    score = np.where(compression < whole, 1.0, np.where(compression < partly, 0.5, 0.0))
    return np.where(np.asarray(lifted, dtype=bool), score, 0.0)


def stable_force_share(force: ArrayLike, contact: ArrayLike, band: tuple[float, float]) -> float:
    """Share of the frames in contact whose normal force lies inside the band (TactAR's stable-force ratio).

    Args:
        force: [T] newtons.
        contact: bool [T]; without any contact the share is NaN.
        band: lowest and highest force that count as stable, newtons.

    Example:
        >>> stable_force_share([0.0, 2.0, 9.0, 5.0], [False, True, True, True], (3.0, 12.0))
        0.6666666666666666
    """
    force, contact = np.asarray(force, dtype=np.float64), np.asarray(contact, dtype=bool)
    return float(np.mean((force >= band[0]) & (force <= band[1]), where=contact)) if contact.any() else math.nan


class EpisodeMetric(RowMetric):
    """Values of episodes by variation.

    Args:
        variations: name of each variation -> its name in the keys.
        columns: names of the values of an episode, which `update` takes in this order.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, variations: Mapping[str, str], columns: Sequence[str], seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variations, self.columns, self.seed = dict(variations), tuple(columns), seed
        self.add_rows("ids", torch.int64)
        for name in self.columns:
            self.add_rows(name, torch.float32)

    def add(self, variation: Sequence[str], seed: Tensor, *values: Tensor) -> None:
        """Keep a batch of episodes.

        Args:
            variation: [B] names.
            seed: int64 [B], which tells the episodes of a variation apart; below 0 for padding, which is left out.
            values: one [B] for each of `columns`.

        Raises:
            ValueError: lengths differ, a variation is not known, or a seed is not below 2^40.
        """
        seed = torch.as_tensor(seed, device=self.device).long()
        values = tuple(torch.as_tensor(value, device=self.device).float() for value in values)
        if len({len(variation), len(seed), *map(len, values)}) != 1:
            lengths = [len(variation), len(seed), *map(len, values)]
            raise ValueError(f"variation, seed and {', '.join(self.columns)} must be equally long, got {lengths}")
        known = list(self.variations)
        for name in variation:
            if name not in known:
                raise ValueError(f"variation must be one of {known}, got {name!r}")
        if seed.numel() and seed.max() >= MAX_SEED:
            raise ValueError(f"seeds must be below 2^40, got {int(seed.max())}")
        cell = torch.tensor([known.index(name) for name in variation], dtype=torch.int64, device=self.device)
        real = seed >= 0
        self.ids.append((cell * MAX_SEED + seed)[real])
        for name, value in zip(self.columns, values, strict=True):
            getattr(self, name).append(value[real])

    def episodes(self) -> dict[str, dict[str, np.ndarray]]:
        """Values float64 by variation (as in the keys) and column, in the order of seeds, each episode once."""
        ids = self.rows("ids")
        chosen = in_order_of_ids(ids)
        cells = (ids[chosen] // MAX_SEED).cpu().numpy()
        values = {name: self.rows(name)[chosen].cpu().double().numpy() for name in self.columns}
        if absent := [name for place, name in enumerate(self.variations) if not (cells == place).any()]:
            warnings.warn(f"{type(self).__name__} saw no episode of {', '.join(absent)}: NaN there", stacklevel=3)
        return {
            key: {name: value[cells == place] for name, value in values.items()}
            for place, key in enumerate(self.variations.values())
        }

    def result(self, intervals: Mapping[str, Interval]) -> dict[str, Tensor]:
        """Keys with `_low` and `_high` beside them, float64 on the CPU."""
        found = {}
        for key, interval in intervals.items():
            for suffix, value in zip(("", "_low", "_high"), interval, strict=True):
                found[key + suffix] = torch.tensor(value, dtype=torch.float64)
        return found


class PeelScore(EpisodeMetric):
    """Peeled share of the length, divided by the mean of the demonstrations (Table II).

    Args:
        demonstration_mean: mean share that the demonstrations peel, in (0, 1]; above it a score exceeds 1.
        variations, seed, kwargs: see `EpisodeMetric`.

    Example:
        >>> metric = PeelScore(0.8, variations={"none": "no_perturb"})
        >>> metric.update(torch.tensor([0.4, 0.8]), ["none", "none"], torch.tensor([0, 1]))
        >>> metric.compute()["no_perturb"]
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(
        self,
        demonstration_mean: float = 1.0,
        variations: Mapping[str, str] = PERTURBATIONS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(variations, ("length_ratio",), seed, **kwargs)
        if not 0 < demonstration_mean <= 1:
            raise ValueError(f"demonstration_mean must be in (0, 1], got {demonstration_mean}")
        self.demonstration_mean = demonstration_mean

    def update(self, length_ratio: Tensor, variation: Sequence[str], seed: Tensor) -> None:
        """Add episodes: longest strip / length, float [B] in [0, 1]; the rest see `EpisodeMetric.add`."""
        self.add(variation, seed, length_ratio)

    def compute(self) -> dict[str, Tensor]:
        """Return the score of each variation and of `all`, their mean, each with its interval."""
        cells = {
            key: Interval(*(v / self.demonstration_mean for v in score_interval(part["length_ratio"], self.seed)))
            for key, part in self.episodes().items()
        }
        return self.result(cells | {"all": mean_of(list(cells.values()))})


class WipeScore(EpisodeMetric):
    """Tiers of the handwriting that is left (Table III), see `wipe_score`.

    Args:
        clean, partly: limits of the tiers.
        variations, seed, kwargs: see `EpisodeMetric`.

    Example:
        >>> metric = WipeScore(variations={"none": "no_perturb"})
        >>> metric.update(torch.tensor([0.0, 0.3]), ["none", "none"], torch.tensor([0, 1]))
        >>> metric.compute()["all"]
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(
        self,
        clean: float = CLEAN,
        partly: float = PARTLY,
        variations: Mapping[str, str] = PERTURBATIONS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(variations, ("residue", "failed"), seed, **kwargs)
        self.clean, self.partly = clean, partly

    def update(self, residue: Tensor, variation: Sequence[str], seed: Tensor, failed: Tensor | None = None) -> None:
        """Add episodes.

        Args:
            residue: share of the handwriting that is left, float [B] in [0, 1].
            variation, seed: see `EpisodeMetric.add`.
            failed: bool [B], episodes that score 0 whatever they cleaned, e.g. stopped for too much force; None: none.
        """
        self.add(variation, seed, residue, torch.zeros(len(residue)) if failed is None else failed)

    def compute(self) -> dict[str, Tensor]:
        """Return the score of each variation and of `all`, their mean, each with its interval."""
        cells = {}
        for key, part in self.episodes().items():
            scores = np.where(part["failed"] > 0, 0.0, wipe_score(part["residue"], self.clean, self.partly))
            cells[key] = score_interval(scores, self.seed)
        return self.result(cells | {"all": mean_of(list(cells.values()))})


class LiftScore(EpisodeMetric):
    """Clamped, lifted and score by cup, and the mean score of the cups (Table IV).

    Clamp and lift are rates with Wilson's interval, the score has a bootstrap interval.

    Args:
        variations, seed, kwargs: see `EpisodeMetric`.

    Example:
        >>> metric = LiftScore(variations={"soft": "soft"})
        >>> yes = torch.tensor([True, True])
        >>> metric.update(yes, yes, torch.tensor([1.0, 0.5]), ["soft", "soft"], torch.tensor([0, 1]))
        >>> metric.compute()["soft_score"]
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(self, variations: Mapping[str, str] = CUPS, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(variations, ("clamped", "lifted", "score"), seed, **kwargs)

    def update(self, clamped: Tensor, lifted: Tensor, score: Tensor, variation: Sequence[str], seed: Tensor) -> None:
        """Add episodes: bool [B], bool [B], float [B] in [0, 1] (see `lift_score`); see `EpisodeMetric.add`."""
        self.add(variation, seed, clamped, lifted, score)

    def compute(self) -> dict[str, Tensor]:
        """Return CUP_clamp, CUP_lift and CUP_score for each cup, and `all_score`, each with its interval."""
        intervals = {}
        for key, part in self.episodes().items():
            for name, column in (("clamp", "clamped"), ("lift", "lifted")):
                intervals[f"{key}_{name}"] = wilson(float(part[column].sum()), len(part[column]))
            intervals[f"{key}_score"] = score_interval(part["score"], self.seed)
        scores = [interval for key, interval in intervals.items() if key.endswith("_score")]
        return self.result(intervals | {"all_score": mean_of(scores)})


class ForceStability(EpisodeMetric):
    """How well the normal force is held, over all variations together.

    Args:
        variations, seed, kwargs: see `EpisodeMetric`.
    """

    def __init__(self, variations: Mapping[str, str] = PERTURBATIONS, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(variations, ("share", "peak", "stopped"), seed, **kwargs)

    def update(
        self, stable_share: Tensor, peak_force: Tensor, stopped: Tensor, variation: Sequence[str], seed: Tensor
    ) -> None:
        """Add episodes.

        Args:
            stable_share: float [B] in [0, 1], see `stable_force_share`; NaN for an episode without contact.
            peak_force: float [B], newtons.
            stopped: bool [B], whether the episode was ended for too much force.
            variation, seed: see `EpisodeMetric.add`.
        """
        self.add(variation, seed, stable_share, peak_force, stopped)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures, over episodes.

        `stable_force` is the mean share over the episodes with contact, with its interval; `no_contact` the share of
        the others; `peak_force` the median peak in newtons; `stopped_for_force` the share of stopped ones.
        """
        parts = list(self.episodes().values())
        share, peak, stopped = (np.concatenate([part[name] for part in parts]) for name in self.columns)
        touched = share[np.isfinite(share)]
        num = len(share)
        found = self.result({"stable_force": score_interval(touched, self.seed) if num else NOTHING})
        others = {
            "no_contact": 1 - len(touched) / num if num else math.nan,
            "peak_force": float(np.median(peak)) if num else math.nan,
            "stopped_for_force": float(stopped.mean()) if num else math.nan,
        }
        return found | {key: torch.tensor(value, dtype=torch.float64) for key, value in others.items()}
