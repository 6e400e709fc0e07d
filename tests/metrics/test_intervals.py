"""Intervals against formulas written another way, their coverage, and the corners where they must not lie."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from mmtrain.metrics import intervals
from mmtrain.metrics.intervals import Interval, apart, bootstrap, mean_of, score_interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(5, 10), (0, 50), (50, 50), (47, 50), (140, 150), (2.5, 10), (1, 1)])
def test_wilson_is_where_the_score_test_just_accepts(successes: float, n: int) -> None:
    """Wilson's bounds solve |rate - p| = z sqrt(p (1 - p) / n), here found numerically."""
    rate, z = successes / n, norm.ppf(0.975)

    def score(p: float) -> float:
        return (rate - p) ** 2 - z**2 * p * (1 - p) / n

    low = 0.0 if rate == 0 else brentq(score, 0, rate - 1e-12)
    high = 1.0 if rate == 1 else brentq(score, rate + 1e-12, 1)
    assert wilson(successes, n) == pytest.approx((rate, low, high), abs=1e-8)


def test_ten_trials_at_one_half_give_what_the_specification_says() -> None:
    _, low, high = wilson(5, 10)
    assert (high - low) / 2 == pytest.approx(0.26, abs=0.005)


def test_wilson_refuses_and_knows_nothing() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 10\], got 11"):
        wilson(11, 10)
    assert all(math.isnan(value) for value in wilson(0, 0))


def test_bootstrap_is_about_the_normal_interval_of_many_values_and_repeats_itself() -> None:
    values = np.random.default_rng(1).beta(2, 5, size=400)
    half = 1.96 * values.std() / 20
    got = bootstrap(values, seed=3)
    assert got == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=half / 15)
    assert got == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_bootstrap_in_chunks_draws_the_same(monkeypatch) -> None:
    values = np.random.default_rng(2).random(37)
    draw = lambda: (bootstrap(values, 5, draws=300), bootstrap(values, 5, np.arange(37) % 3, draws=300))  # noqa: E731
    whole = draw()
    for at_once in (37, 1000):  # also less than a row, and chunks that end in the middle of a 64-bit draw
        monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", at_once)
        assert draw() == whole


def test_bootstrap_equals_the_exact_distribution_of_a_few_values() -> None:
    """All 3^3 resamples of three values can be listed; the quantiles of 10 000 draws are theirs."""
    values = np.array([0.0, 0.1, 0.7])
    means = np.sort([np.mean([a, b, c]) for a in values for b in values for c in values])
    assert bootstrap(values)[1:] == pytest.approx((means[0], means[-1]), abs=1e-9), "each end has 1 of 27"


def test_clusters_widen_an_interval_of_values_that_differ_by_cluster() -> None:
    seeds = np.repeat([0, 1, 2], 50)
    random = np.random.default_rng(0)
    values = (random.random(150) < np.array([0.5, 0.7, 0.9])[seeds]).astype(float)
    plain, by_seed = bootstrap(values), bootstrap(values, clusters=seeds)
    assert plain.mean == by_seed.mean
    assert by_seed.low < plain.low - 0.03 and by_seed.high > plain.high + 0.03
    one = bootstrap(values, clusters=np.zeros(150))
    assert one == pytest.approx(plain, abs=0.01), "one cluster is no cluster"


def test_equal_scores_have_a_width_and_bad_ones_are_refused() -> None:
    assert score_interval([1.0] * 50) == wilson(50, 50) and score_interval([1.0] * 50).low < 0.95
    assert score_interval([0.5] * 4) == wilson(2, 4)
    assert score_interval([0.5, 1.0]) == bootstrap([0.5, 1.0])
    assert all(math.isnan(v) for scores in ([], [1.0, math.nan]) for v in score_interval(scores))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 0.5 to 1.2"):
        score_interval([0.5, 1.2])


def test_interval_of_a_mean_of_equal_cells_is_narrower_by_the_root_of_their_number() -> None:
    cell = wilson(40, 50)
    got = mean_of([cell] * 4)
    assert got == pytest.approx((0.8, 0.8 - (0.8 - cell.low) / 2, 0.8 + (cell.high - 0.8) / 2))
    assert math.isnan(mean_of([cell, Interval(*[math.nan] * 3)]).mean)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_coverage_is_about_95_percent(rate: float) -> None:
    random = np.random.default_rng(7)
    intervals = [wilson(k, 50) for k in random.binomial(50, rate, 4000)]
    assert 0.92 < np.mean([low <= rate <= high for _, low, high in intervals]) < 0.99


def test_apart() -> None:
    low, high = Interval(0.2, 0.1, 0.3), Interval(0.5, 0.4, 0.6)
    touching = Interval(0.35, 0.3, 0.4)
    assert (apart(high, low), apart(low, high), apart(high, touching), apart(low, touching)) == (1, -1, 0, 0)
    assert apart(high, Interval(*[math.nan] * 3)) == 0
