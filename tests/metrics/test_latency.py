"""Latency: percentiles against sorted lists, the warm-up of each process, and wrong input. No clock is read."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from mmtrain.metrics.latency import InferenceLatency, device_name
from tests.metrics.tester import assert_values, run_class, run_two_processes

SECONDS = torch.tensor(np.random.default_rng(2).gamma(3.0, 2.0, size=200), dtype=torch.float32)
MAKE = partial(InferenceLatency, warm_up=5)


def by_sorting(seconds: list[float]) -> dict[str, float]:
    """Linear between the sorted values."""
    ordered = sorted(seconds)
    found = {}
    for percent in (50, 95, 99):
        place = percent / 100 * (len(ordered) - 1)
        low = math.floor(place)
        found[f"p{percent}"] = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    return found


@pytest.mark.parametrize("size", [1, 3, 5, 64, 200])
def test_the_warm_up_is_dropped_however_the_batches_fall(size: int) -> None:
    got = run_class(MAKE, [(part,) for part in SECONDS.split(size)])
    assert_values(got, by_sorting(SECONDS[5:].tolist()))


def test_every_process_drops_its_own_warm_up(two_processes) -> None:
    shards = [[(SECONDS[:80],)], [(SECONDS[80:82],), (SECONDS[82:],)]]
    expected = by_sorting([*SECONDS[5:80].tolist(), *SECONDS[85:].tolist()])
    assert run_two_processes(two_processes, MAKE, shards) == pytest.approx(expected, abs=1e-5)


def test_a_reset_warms_up_again_and_forward_keeps_what_was_seen() -> None:
    metric = MAKE()
    metric.update(SECONDS[:10])
    metric.reset()
    metric.update(SECONDS[:6])
    assert_values(metric.compute(), by_sorting([float(SECONDS[5])]))
    metric(SECONDS[6:50])
    assert_values(metric.compute(), by_sorting(SECONDS[5:50].tolist()))


def test_single_numbers_and_the_name_of_the_device() -> None:
    metric = InferenceLatency(warm_up=0)
    metric.update(0.25)
    assert float(metric.compute()["p99"]) == 0.25
    assert metric.device_name == device_name("cpu") != ""
    assert InferenceLatency("meta").device_name == "meta"


def test_nothing_left_and_wrong_input() -> None:
    metric = MAKE()
    metric.update(SECONDS[:5])
    with pytest.warns(UserWarning, match="no measurement after the warm-up"):
        assert math.isnan(metric.compute()["p50"])
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite and not negative"):
            metric.update(bad)
    with pytest.raises(ValueError, match="warm_up must be 0 or more"):
        InferenceLatency(warm_up=-1)
