"""Onsets: detection on made sounds, matching against a search over all pairings, the score, and two processes."""

import math
from functools import partial
from itertools import combinations, permutations
from multiprocessing.pool import Pool

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.metrics.onsets import OnsetSynchrony, detect_onsets, match_onsets, score_onsets
from tests.metrics.tester import assert_values, run_class, run_two_processes

RATE = 16000


def sound(times: list[float], seconds: float = 2.0, rate: int = RATE, frequency: float = 500.0) -> Tensor:
    """Decaying tones that start at `times`, with faint noise."""
    clock = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    wave = 1e-4 * torch.randn(len(clock), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for time in times:
        since = (clock - time).clamp(min=0)
        wave += 0.3 * (clock >= time) * torch.exp(-since / 0.1) * torch.sin(2 * math.pi * frequency * since)
    return wave.float()


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_onsets_are_found_at_their_times(rate: int, gain: float) -> None:
    times = [0.2, 0.55, 1.0, 1.731]
    found = detect_onsets(gain * sound(times, rate=rate), rate)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(times, abs=0.01)


def test_times_do_not_drift_where_the_hop_is_no_whole_number_of_samples() -> None:
    found = detect_onsets(sound([0.5, 19.5], 20.0, 22050), 22050)
    assert found.tolist() == pytest.approx([0.5, 19.5], abs=0.01)  # 46 ms off if the hop were taken for 4 ms


def test_nothing_is_found_in_silence_in_a_steady_tone_and_in_noise_that_is_cut_off() -> None:
    assert len(detect_onsets(torch.zeros(RATE), RATE)) == 0
    assert len(detect_onsets(torch.zeros(10), RATE)) == 0
    assert len(detect_onsets(0.3 * torch.sin(torch.arange(RATE) * 0.3), RATE)) == 0
    tail = sound([0.2])[int(0.25 * RATE) : int(0.4 * RATE)]  # begins and ends in the middle of a sound
    assert len(detect_onsets(tail, RATE)) == 0


def test_unusable_waveforms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[N\]"):
        detect_onsets(torch.zeros(2, RATE), RATE)
    with pytest.raises(ValueError, match="finite"):
        detect_onsets(torch.full((RATE,), math.nan), RATE)


def _best_by_search(found: list[float], reference: list[float], tolerance: float) -> tuple[int, float]:
    best = (0, 0.0)
    for size in range(1, min(len(found), len(reference)) + 1):
        for rows in combinations(range(len(found)), size):
            for columns in permutations(range(len(reference)), size):
                off = [abs(found[row] - reference[column]) for row, column in zip(rows, columns, strict=True)]
                if max(off) <= tolerance:
                    best = min(best, (-size, sum(off)))
    return -best[0], best[1]


def test_matching_is_the_best_of_all_pairings() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        found, reference = (np.sort(rng.uniform(0, 0.6, rng.integers(0, 5))) for _ in range(2))
        hits, offsets = match_onsets(torch.tensor(found), torch.tensor(reference))
        number, distance = _best_by_search(found.tolist(), reference.tolist(), 0.1)
        assert len(hits) == number
        assert float(offsets.abs().sum()) == pytest.approx(distance, abs=1e-9)
        assert len(set(hits[:, 0].tolist())) == len(set(hits[:, 1].tolist())) == number


def test_score_counts_misses_false_alarms_and_the_window() -> None:
    score = score_onsets(torch.tensor([0.51, 0.9, 1.5, 2.5]), torch.tensor([0.5, 1.2, 1.45, 1.7, 2.5]), 2.0)
    assert score.hits == 2 and score.precision == pytest.approx(2 / 3) and score.recall == 0.5
    assert score.f1 == pytest.approx(4 / 7) and score.distance == pytest.approx(0.06, abs=1e-6)
    assert score_onsets(torch.tensor([]), torch.tensor([]), 1.0).f1 == 1.0
    assert score_onsets(torch.tensor([]), torch.tensor([0.5]), 1.0).f1 == 0.0
    assert score_onsets(torch.tensor([0.5]), torch.tensor([]), 1.0).f1 == 0.0


def test_onsets_that_the_window_cuts_off_count_for_nothing() -> None:
    reference = torch.tensor([0.02, 0.5, 0.97])
    for found in ([0.5], [0.06, 0.5], [0.01, 0.5, 0.92], [0.5, 0.99]):
        assert score_onsets(torch.tensor(found), reference, 1.0).f1 == 1.0
    assert score_onsets(torch.tensor([0.2, 0.5]), reference, 1.0).f1 == pytest.approx(2 / 3)
    assert score_onsets(torch.tensor([0.04]), torch.tensor([0.06]), 1.0).f1 == 1.0  # a hit, though found at the edge


BATCHES = [
    (torch.stack([sound([0.5, 1.0]), sound([0.4])]), [[0.5, 1.0], [0.4, 1.2]], torch.tensor([3, 1])),
    (torch.stack([sound([0.3, 0.8, 1.4]), sound([0.4])]), [[0.31], [0.4, 1.2]], torch.tensor([0, 1])),
    (torch.stack([sound([0.6]), sound([1.1])]), [[1.5], [1.5]], torch.tensor([7, -1])),
]


def _expected() -> dict[str, float]:
    """By hand: clips 3, 1, 0, 7 once each; hits 2, 1, 1, 0 of 2, 2, 1, 1 references and 2, 1, 3, 1 found."""
    return {
        "onset_f1": (1 + 2 / 3 + 1 / 2 + 0) / 4,
        "onset_precision": (1 + 1 + 1 / 3 + 0) / 4,
        "onset_recall": (1 + 1 / 2 + 1 + 0) / 4,
    }


def test_metric_counts_every_clip_once_in_one_and_in_two_processes(two_processes: Pool) -> None:
    make = partial(OnsetSynchrony, RATE)
    got = run_class(make, BATCHES)
    assert_values({key: got[key] for key in _expected()}, _expected())
    assert float(got["onset_offset"]) < 0.01
    assert got["onset_f1_low"] < got["onset_f1"] < got["onset_f1_high"]
    values = {key: float(value) for key, value in got.items()}
    assert run_two_processes(two_processes, make, [BATCHES[:1], BATCHES[1:]]) == values
    assert run_two_processes(two_processes, make, [BATCHES, []]) == values


def test_rows_of_clips_come_in_order_of_ids() -> None:
    metric = OnsetSynchrony(RATE)
    for batch in BATCHES:
        metric.update(*batch)
    clips = metric.clips()
    assert clips["ids"].tolist() == [0, 1, 3, 7]
    assert clips["f1"] == pytest.approx([0.5, 2 / 3, 1.0, 0.0])


def test_unknown_references_are_detected_in_the_real_sound() -> None:
    metric = OnsetSynchrony(RATE)
    metric.update([sound([0.5, 1.0])], [None], torch.tensor([0]), real=[sound([0.53, 1.04], frequency=900)])
    values = metric.compute()
    assert float(values["onset_f1"]) == 1.0 and float(values["onset_offset"]) == pytest.approx(0.035, abs=0.006)


def test_metric_without_clips_and_with_wrong_input() -> None:
    metric = OnsetSynchrony(RATE)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(math.isnan(value) for value in metric.compute().values())
    with pytest.raises(ValueError, match="equally many"):
        metric.update(torch.zeros(2, RATE), [[0.5]], torch.tensor([0]))
    with pytest.raises(ValueError, match="clip 4: give its reference times"):
        metric.update(torch.zeros(1, RATE), [None], torch.tensor([4]))
    with pytest.raises(ValueError, match="sample_rate 0"):
        OnsetSynchrony(0)
