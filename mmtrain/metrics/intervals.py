"""95 % intervals of a rate and of a mean over episodes (RDP spec section 7.4). NumPy only, the same at every call."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

CONFIDENCE = 0.95
DRAWS = 10_000
ROUNDING = 1e-6  # of float32 scores
DRAWN_AT_ONCE = 2**22  # values, which bounds the memory to about 64 MB


class Interval(NamedTuple):
    """A mean and the bounds of its interval; all NaN where there was nothing to measure."""

    mean: float
    low: float
    high: float


NOTHING = Interval(np.nan, np.nan, np.nan)


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a rate.

    It keeps within [0, 1] and has a width even for 0 or n successes. A sum of scores in [0, 1] may stand for the
    successes: a score varies at most as much as a coin of the same mean, so that the interval is too wide, if anything.

    Args:
        successes: number in [0, n].
        n: number of trials; 0 gives NaN.
        confidence: share of intervals that hold the true rate, in (0, 1).

    Raises:
        ValueError: successes outside [0, n].

    Example:
        >>> [round(value, 3) for value in wilson(5, 10)]
        [0.5, 0.237, 0.763]
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, {n}], got {successes}")
    if n == 0:
        return NOTHING
    rate, z = successes / n, float(ndtri(0.5 + confidence / 2))
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return Interval(rate, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def bootstrap(
    values: ArrayLike,
    seed: int = 0,
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap interval of a mean.

    Args:
        values: [N]; none gives NaN, and so does a NaN among them.
        seed: of the draws: equal values in equal order and an equal seed give equal bounds.
        clusters: [N] what values have in common, e.g. the training seed. Then clusters are drawn first and values
            inside each drawn cluster second, so that the interval is also about other clusters than these.
        draws: number of resamples.

    Example:
        >>> bootstrap([0.0, 1.0] * 20).mean
        0.5
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        return NOTHING
    random = np.random.default_rng(seed)
    if clusters is None:
        means = _resampled_means(values, draws, random)
    else:
        clusters = np.asarray(clusters)
        parts = [values[clusters == name] for name in np.unique(clusters)]
        sums = np.zeros(draws)
        counts = np.zeros(draws)
        for _ in parts:  # as many clusters as there are, each draw with its own choice
            chosen = random.integers(len(parts), size=draws)
            for place, part in enumerate(parts):
                where = np.flatnonzero(chosen == place)
                sums[where] += _resampled_means(part, len(where), random) * len(part)
                counts[where] += len(part)
        means = sums / counts
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(values.mean()), float(low), float(high))


def _resampled_means(values: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Means [draws]; the chunks draw the same numbers as one large array would."""
    means = np.empty(draws)
    step = max(1, DRAWN_AT_ONCE // len(values))
    for begin in range(0, draws, step):
        part = means[begin : begin + step]
        part[:] = values[random.integers(len(values), size=(len(part), len(values)))].mean(axis=1)
    return means


def score_interval(values: ArrayLike, seed: int = 0, clusters: ArrayLike | None = None) -> Interval:
    """Interval of the mean of scores in [0, 1]: bootstrap, and Wilson's where all scores are the same.

    There the bootstrap would claim to know the mean exactly, after however few episodes. Arguments as `bootstrap` has.

    Raises:
        ValueError: a score outside [0, 1].

    Example:
        >>> [round(value, 3) for value in score_interval([1.0] * 10)]
        [1.0, 0.722, 1.0]
    """
    values = np.asarray(values, dtype=np.float64)
    if ((values < -ROUNDING) | (values > 1 + ROUNDING)).any():
        raise ValueError(f"scores must be in [0, 1], got {values.min():g} to {values.max():g}")
    values = values.clip(0, 1)
    if values.size and np.isfinite(values).all() and np.ptp(values) == 0:
        return wilson(float(values.sum()), values.size)
    return bootstrap(values, seed, clusters)


def mean_of(intervals: Sequence[Interval]) -> Interval:
    """Interval of the mean of independent means, e.g. over variations, from their own intervals.

    The distances to the bounds are added in quadrature (MOVER, Zou and Donner 2008), lower and upper apart, so that it
    fits Wilson's and bootstrap intervals alike.

    Example:
        >>> mean_of([Interval(0.5, 0.1, 0.8), Interval(0.5, 0.2, 0.9)])
        Interval(mean=0.5, low=0.25, high=0.75)
    """
    if not intervals:
        return NOTHING
    means, lows, highs = np.array(intervals, dtype=np.float64).T
    below = np.sqrt(np.sum((means - lows) ** 2)) / len(means)
    above = np.sqrt(np.sum((highs - means) ** 2)) / len(means)
    mean = float(means.mean())
    return Interval(mean, mean - float(below), mean + float(above))


def apart(ours: Interval, theirs: Interval) -> int:
    """1 if our whole interval lies above theirs, -1 if below, 0 if they overlap or one is NaN."""
    return int(ours.low > theirs.high) - int(ours.high < theirs.low)
