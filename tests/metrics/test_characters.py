"""F-Acc and C-F1 against scikit-learn and plain counts, over two processes, with repeated pictures and seeds."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from mmtrain.metrics.characters import (
    CharacterF1,
    FrameAccuracy,
    OrderKept,
    character_f1,
    frames_right,
    order_kept,
)
from mmtrain.metrics.intervals import wilson
from tests.metrics.tester import assert_values, run_class, run_two_processes

G = torch.Generator().manual_seed(1)
LINES, SEEDS, NAMES = 30, 2, 5
PRESENT = torch.zeros(LINES, NAMES)
for line in range(LINES):  # one or two of four characters; the fifth is never asked for
    PRESENT[line, torch.randperm(4, generator=G)[: 1 + line % 2]] = 1
PRESENT = PRESENT.repeat_interleave(SEEDS, dim=0)
PROBABILITIES = (PRESENT * 0.6 + torch.rand(LINES * SEEDS, NAMES, generator=G) * 0.55).clamp(max=1)
PROBABILITIES[:, 4] *= 0.9  # nor ever seen, for it stays below one half
IDS, SAMPLES = torch.arange(LINES).repeat_interleave(SEEDS), torch.arange(SEEDS).repeat(LINES)
SEEN, ASKED = (PROBABILITIES > 0.5).numpy(), PRESENT.bool().numpy()


def batch(rows: list[int]) -> tuple:
    return PROBABILITIES[rows], PRESENT[rows], IDS[rows], SAMPLES[rows]


ORDER = np.random.default_rng(0).permutation(LINES * SEEDS).tolist()
SHARDS = [[batch(ORDER[:20])], [batch(ORDER[15:40]), batch(ORDER[40:])]]


def expected_accuracy() -> dict[str, float]:
    found = {}
    for name, wanted in (("f_acc", (1, 2)), ("f_acc_single", (1,)), ("f_acc_two", (2,))):
        rows = np.isin(ASKED.sum(axis=1), wanted)
        right = accuracy_score(ASKED[rows], SEEN[rows], normalize=False)
        interval = wilson(right / SEEDS, int(rows.sum()) // SEEDS)
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    assert 0.1 < found["f_acc"] < 0.9
    return found


def test_frame_accuracy_against_scikit_learn(two_processes) -> None:
    assert_values(run_class(FrameAccuracy, [batch(ORDER[:20]), batch(ORDER[10:])]), expected_accuracy())
    assert_values(run_two_processes(two_processes, FrameAccuracy, SHARDS), expected_accuracy())
    assert_values(run_two_processes(two_processes, FrameAccuracy, [[], [batch(ORDER)]]), expected_accuracy())


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_f1_against_scikit_learn(two_processes, average: str) -> None:
    expected = f1_score(ASKED, SEEN, average=average, zero_division=np.nan)
    assert_values(run_class(partial(CharacterF1, average), [batch(ORDER), batch(ORDER[:9])]), {"f1": expected})
    assert_values(run_two_processes(two_processes, partial(CharacterF1, average), SHARDS), {"f1": expected})


def test_a_character_that_nobody_asks_for_or_sees_does_not_count() -> None:
    seen, asked = torch.tensor([[0.9, 0.1], [0.2, 0.2]]), torch.tensor([[1, 0], [1, 0]])
    assert character_f1(seen, asked, "macro") == pytest.approx(2 / 3)
    seen[1, 1] = 0.8  # seen but not asked for: now it counts, as 0
    assert character_f1(seen, asked, "macro") == pytest.approx(1 / 3)
    assert math.isnan(character_f1(seen[:0], asked[:0]))


def test_one_half_is_no_and_nan_is_wrong() -> None:
    assert frames_right(torch.tensor([[0.5], [0.50001]]), torch.tensor([[1], [1]])).tolist() == [False, True]
    assert not frames_right(torch.tensor([[math.nan]]), torch.tensor([[0]])).any()


def test_order_needs_both_halves() -> None:
    """The first character on the left, the second on both sides equally: not kept; mirrored pictures never keep it."""
    first, second = torch.tensor([0]), torch.tensor([1])
    left, right = torch.tensor([[0.9, 0.4]]), torch.tensor([[0.1, 0.8]])
    assert order_kept(left, right, first, second) and not order_kept(right, left, first, second)
    assert order_kept(right, left, second, first)
    left[0, 1] = 0.8
    assert not order_kept(left, right, first, second)


def test_share_of_orders_counts_prompts(two_processes) -> None:
    halves = torch.rand(2, LINES * SEEDS, 2, generator=G)
    first, second = torch.zeros(LINES * SEEDS, dtype=torch.int64), torch.ones(LINES * SEEDS, dtype=torch.int64)
    one = lambda rows: (*halves[:, rows], first[rows], second[rows], IDS[rows], SAMPLES[rows])  # noqa: E731
    kept = sum(float(a[0] > b[0] and b[1] > a[1]) for a, b in zip(*halves, strict=True))
    names = ("order_kept", "order_kept_low", "order_kept_high")
    expected = dict(zip(names, wilson(kept / SEEDS, LINES), strict=True))
    assert_values(run_class(OrderKept, [one(ORDER), one(ORDER[:9])]), expected)
    shards = [[one(ORDER[:20])], [one(ORDER[15:])]]
    assert_values(run_two_processes(two_processes, OrderKept, shards), expected)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="two \\[B, K\\]"):
        FrameAccuracy().update(PROBABILITIES, PRESENT[:, :3], IDS)
    with pytest.raises(ValueError, match="micro, macro"):
        CharacterF1("weighted")
    with pytest.raises(ValueError, match="threshold"):
        FrameAccuracy(1.0)
