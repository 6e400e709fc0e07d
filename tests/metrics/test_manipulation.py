"""Task scores: tiers, a plain loop, repeated episodes, two processes in any split, and wrong input."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from mmtrain.metrics.intervals import bootstrap, wilson
from mmtrain.metrics.manipulation import (
    ForceStability,
    LiftScore,
    PeelScore,
    WipeScore,
    lift_score,
    stable_force_share,
    wipe_score,
)
from tests.metrics.tester import assert_values, run_class, run_two_processes

NAMES = {"none": "no_perturb", "before": "perturb_before_contact", "after": "perturb_after_contact"}
VARIATIONS = [name for name in NAMES for _ in range(8)]
SEEDS = torch.arange(8).repeat(3) + 100_000  # the same list for every variation
RANDOM = np.random.default_rng(5)
RESIDUE = torch.tensor(RANDOM.choice([0, 1, 2, 9, 10, 30], size=24) / 30)
CUP_NAMES = [name for name in ("soft", "hard") for _ in range(12)]
CUP_SEEDS = torch.arange(12).repeat(2)
CLAMPED, LIFTED = torch.tensor(RANDOM.random((2, 24)) < 0.7)
COMPRESSION = torch.tensor(RANDOM.random(24) * 20)
CUP_SCORES = torch.tensor(lift_score(LIFTED, COMPRESSION, 8.0, 14.0))


def loop_cells(values: list[float], names: list[str], keys: dict[str, str], scale: float = 1.0) -> dict[str, float]:
    """Means, percentile intervals and their quadrature, by plain Python over the listed episodes."""
    found, below, above = {}, [], []
    for name, key in keys.items():
        mine = [value for value, other in zip(values, names, strict=True) if other == name]
        picks = np.random.default_rng(0).integers(len(mine), size=(10_000, len(mine)))
        means = sorted(sum(mine[i] for i in row) / len(mine) for row in picks.tolist())

        def quantile(share: float, means: list[float] = means) -> float:
            place = share * (len(means) - 1)
            low = int(place)
            return means[low] + (place - low) * (means[min(low + 1, len(means) - 1)] - means[low])

        mean = sum(mine) / len(mine)
        found[key] = mean / scale
        found[f"{key}_low"], found[f"{key}_high"] = quantile(0.025) / scale, quantile(0.975) / scale
        below.append(found[key] - found[f"{key}_low"])
        above.append(found[f"{key}_high"] - found[key])
    mean = sum(found[key] for key in keys.values()) / len(keys)
    return found | {
        "all": mean,
        "all_low": mean - math.sqrt(sum(d * d for d in below)) / len(keys),
        "all_high": mean + math.sqrt(sum(d * d for d in above)) / len(keys),
    }


def tier(residue: float) -> float:
    segments = round(residue * 30)
    return 1.0 if segments <= 1 else 0.5 if segments < 10 else 0.0


WIPE = loop_cells([tier(value) for value in RESIDUE.tolist()], VARIATIONS, NAMES)
PEEL = loop_cells((1 - RESIDUE).tolist(), VARIATIONS, NAMES, scale=0.8)


def batches(*values: torch.Tensor, rows, names=VARIATIONS, seeds=SEEDS):
    return [(*(v[list(part)] for v in values), [names[i] for i in part], seeds[list(part)]) for part in rows]


def test_tiers_at_their_limits() -> None:
    assert wipe_score(np.array([0, 0.05, 0.0501, 0.333, 1 / 3, 1], dtype=np.float32)).tolist() == [1, 1, 0.5, 0.5, 0, 0]
    assert wipe_score([0.1, 0.3], clean=0.1, partly=0.2).tolist() == [1, 0], "the demonstrations' level"
    got = lift_score([True, True, True, True, True, False], [7.9, 8, 13.9, 14, math.nan, 0], 8, 14)
    assert got.tolist() == [1, 0.5, 0.5, 0, 0, 0], "a compression that is not known is no success"


def test_stable_force_counts_contact_only() -> None:
    force, contact = [0, 3, 12, 12.1, 2.9, 7], [False, True, True, True, True, False]
    assert stable_force_share(force, contact, (3, 12)) == 0.5
    assert math.isnan(stable_force_share(force, [False] * 6, (3, 12)))


SPLITS = {
    "one batch": [range(24)],
    "small batches backwards": [range(20, 24), range(10, 20), range(10)],
    "repeated": [range(24), range(3, 9)],
}


@pytest.mark.parametrize("split", SPLITS)
def test_class_equals_the_loop(split: str) -> None:
    assert_values(run_class(WipeScore, batches(RESIDUE, rows=SPLITS[split])), WIPE)
    assert_values(run_class(partial(PeelScore, 0.8), batches(1 - RESIDUE, rows=SPLITS[split])), PEEL)


def test_lift_has_rates_with_wilson_and_a_score_with_bootstrap() -> None:
    rows = [range(5), range(5, 24), range(2)]
    values = batches(CLAMPED, LIFTED, CUP_SCORES, rows=rows, names=CUP_NAMES, seeds=CUP_SEEDS)
    expected = loop_cells(CUP_SCORES.tolist(), CUP_NAMES, {"soft": "soft_score", "hard": "hard_score"})
    expected = {key.replace("all", "all_score"): value for key, value in expected.items()}
    for cup, part in (("soft", slice(0, 12)), ("hard", slice(12, 24))):
        for name, flags in (("clamp", CLAMPED), ("lift", LIFTED)):
            mean, low, high = wilson(int(flags[part].sum()), 12)
            expected |= {f"{cup}_{name}": mean, f"{cup}_{name}_low": low, f"{cup}_{name}_high": high}
    got = run_class(LiftScore, values)
    assert_values(got, {key: expected[key] for key in got})
    assert got.keys() == expected.keys()


def test_force_stability_leaves_episodes_without_contact_out_of_the_share_only() -> None:
    share = torch.linspace(0.2, 0.9, 24).double()
    share[3] = math.nan
    peak, stopped = torch.arange(24.0), torch.arange(24) >= 20
    got = run_class(ForceStability, batches(share, peak, stopped, rows=[range(9), range(9, 24)]))
    mean, low, high = bootstrap(share[share.isfinite()].float())
    expected = {"stable_force": mean, "stable_force_low": low, "stable_force_high": high, "no_contact": 1 / 24}
    assert_values(got, expected | {"peak_force": 11.5, "stopped_for_force": 4 / 24})


SHARDS = {
    "uneven": ([range(0, 15), range(15, 17)], [range(17, 24)]),
    "interleaved and padded": ([range(0, 24, 2)], [range(1, 24, 2), [0, 5]]),
    "rank 1 saw nothing": ([range(24)], []),
}


@pytest.mark.parametrize("split", SHARDS)
def test_two_processes_equal_one(two_processes, split: str) -> None:
    shards = [batches(RESIDUE, rows=part) for part in SHARDS[split]]
    assert run_two_processes(two_processes, WipeScore, shards) == pytest.approx(WIPE, abs=1e-6)


def test_an_absent_variation_is_nan_and_says_so() -> None:
    metric = WipeScore()
    metric.update(torch.zeros(2), ["none", "before"], torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="WipeScore saw no episode of after"):
        got = metric.compute()
    assert got["no_perturb"] == 1 and math.isnan(got["perturb_after_contact"]) and math.isnan(got["all"])


def test_padding_is_left_out_and_wrong_input_is_named() -> None:
    metric = WipeScore(variations={"none": "no_perturb"})
    metric.update(torch.tensor([0.0, 1.0]), ["none", "none"], torch.tensor([4, -1]))
    assert metric.compute()["no_perturb"] == 1
    with pytest.raises(ValueError, match=r"variation must be one of \['none'\], got 'After'"):
        metric.update(torch.zeros(1), ["After"], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"equally long, got \[1, 1, 2, 2\]"):
        metric.update(torch.zeros(2), ["none"], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"below 2\^40"):
        metric.update(torch.zeros(1), ["none"], torch.tensor([2**40]))
    with pytest.raises(ValueError, match=r"demonstration_mean must be in \(0, 1\], got 0"):
        PeelScore(0)
    peel = PeelScore(variations={"none": "no_perturb"})
    peel.update(torch.tensor([1.5]), ["none"], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"scores must be in \[0, 1\], got 1.5"):
        peel.compute()
