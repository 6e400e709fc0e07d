"""IS, FID, KL, KID and Align Acc against golden values, plain loops, repeated clips, and two processes in any split."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from mmtrain.metrics.generation import (
    AlignmentAccuracy,
    GeneratedSounds,
    HitRate,
    clip_means,
    frechet_distance,
    inception_score,
    kernel_distance,
    paired_kl,
)
from mmtrain.metrics.intervals import bootstrap, wilson
from tests.golden import load
from tests.golden.fill import array
from tests.metrics.tester import assert_values, run_class, run_two_processes

GOLDEN = "difffoley/eval_metrics.npz"
FAKE, REAL, UNBIASED = (
    torch.from_numpy(2 * array(f"metric_logits_{name}", (rows, 9)))
    for name, rows in (("fake", 120), ("real", 12), ("unbiased_fake", 120))
)
FAKE_FEATURES = torch.from_numpy(1.3 * array("metric_feat_fake", (120, 6)) + np.float32(0.2))
REAL_FEATURES = torch.from_numpy(array("metric_feat_real", (40, 6)))
PAIRED = REAL.repeat_interleave(10, dim=0)  # row 10 i + j is sample j of video i
IDS, SAMPLES = torch.arange(12).repeat_interleave(10), torch.arange(10).repeat(12)


def golden(name: str) -> float:
    return float(load(GOLDEN)[name])


def test_golden_values() -> None:
    assert inception_score(UNBIASED) == pytest.approx((golden("is_mean"), golden("is_std")), rel=1e-6)
    assert inception_score(UNBIASED, splits=1, seed=None)[0] == pytest.approx(golden("is_split1_mean"), rel=1e-6)
    assert frechet_distance(FAKE_FEATURES, REAL_FEATURES) == pytest.approx(golden("fid"), rel=1e-6)
    assert frechet_distance(REAL_FEATURES, REAL_FEATURES) == pytest.approx(0, abs=1e-12)
    kid = kernel_distance(FAKE_FEATURES, REAL_FEATURES, subset_size=30)
    assert kid == pytest.approx((golden("kid_mean"), golden("kid_std")), rel=1e-6)


def test_kl_is_of_real_from_generated_and_not_the_reverse() -> None:
    assert float(paired_kl(PAIRED, FAKE).mean()) == pytest.approx(golden("kl"), rel=1e-6)
    reverse = float(paired_kl(FAKE, PAIRED).mean())
    assert reverse == pytest.approx(golden("kl_reversed_fake_to_real"), rel=1e-6) and reverse > golden("kl") + 0.3


def test_frechet_distance_of_fewer_rows_than_features() -> None:
    """Two points each, along one axis: means 0 and 3, variances 2 and 8 (unbiased), so 9 + (sqrt 2 - sqrt 8)^2."""
    one, other = torch.zeros(2, 50), torch.zeros(2, 50)
    one[:, 7], other[:, 7] = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 5.0])
    assert frechet_distance(one, other) == pytest.approx(9 + (math.sqrt(2) - math.sqrt(8)) ** 2)
    other[0, 0] = math.nan
    assert math.isnan(frechet_distance(one, other)), "diverged features must not look good"


def outputs(features: torch.Tensor, logits: torch.Tensor, unbiased: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"2048": features, "logits": logits, "logits_unbiased": unbiased}


REAL_ROWS = REAL_FEATURES[:12].repeat_interleave(10, dim=0)


def sound_batch(rows: list[int]) -> tuple:
    generated = outputs(FAKE_FEATURES[rows], FAKE[rows], UNBIASED[rows])
    return generated, outputs(REAL_ROWS[rows], PAIRED[rows], PAIRED[rows]), IDS[rows], SAMPLES[rows]


def expected_sounds() -> dict[str, float]:
    """KL by a plain loop; the rest through the functions that the golden values cover."""
    by_clip = []
    for clip in range(12):
        total = 0.0
        for row in range(10 * clip, 10 * clip + 10):
            p = np.exp(PAIRED[row].double().numpy())
            q = np.exp(FAKE[row].double().numpy())
            p, q = p / p.sum(), q / q.sum()
            total += sum(a * math.log(a / (b + 1e-6)) for a, b in zip(p, q, strict=True))
        by_clip.append(total / 10)
    kl = bootstrap(by_clip)
    return {
        "inception_score": golden("is_mean"),
        "inception_score_std": golden("is_std"),
        "fid": frechet_distance(FAKE_FEATURES, REAL_FEATURES[:12]),
        "kid": kernel_distance(FAKE_FEATURES, REAL_FEATURES[:12], subset_size=12)[0],
        "kl": kl.mean,
        "kl_low": kl.low,
        "kl_high": kl.high,
    }


ORDER = np.random.default_rng(1).permutation(120).tolist()
SPLITS = {
    "one batch": [range(120)],
    "any order": [ORDER[:50], ORDER[50:51], ORDER[51:]],
    "repeated": [range(120), range(30, 50)],
}


@pytest.mark.parametrize("split", SPLITS)
def test_sounds_in_any_order_each_once(split: str) -> None:
    assert_values(run_class(GeneratedSounds, [sound_batch(list(rows)) for rows in SPLITS[split]]), expected_sounds())


def test_sounds_over_two_processes(two_processes) -> None:
    shards = [[sound_batch(ORDER[:30]), sound_batch(ORDER[30:70])], [sound_batch(ORDER[60:])]]
    assert_values(run_two_processes(two_processes, GeneratedSounds, shards), expected_sounds())
    got = run_two_processes(two_processes, GeneratedSounds, [[sound_batch(ORDER)], []])
    assert_values(got, expected_sounds())


LOGITS = torch.from_numpy(array("alignment", (4, 20)))
CLIPS = torch.arange(10).repeat_interleave(2)
LOGITS[1:] = LOGITS[1:, ::2].repeat_interleave(2, dim=1)  # of real sound, so the same for both samples


def alignment_batch(rows: list[int]) -> tuple:
    return *LOGITS[:, rows], CLIPS[rows], torch.arange(20)[rows] % 2


def expected_alignment() -> dict[str, float]:
    mean, low, high = wilson(sum(float(value > 0) for value in LOGITS[0]) / 2, 10)
    real, shifted, wrong = ([float(value) for value in row[::2]] for row in LOGITS[1:])
    return {
        "align_acc": mean,
        "align_acc_low": low,
        "align_acc_high": high,
        "align_acc_shifted": sum(value <= 0 for value in shifted) / 10,
        "align_acc_wrong": sum(value <= 0 for value in wrong) / 10,
        "align_acc_real": sum(value > 0 for value in real) / 10,
    }


def test_alignment_by_itself_and_over_two_processes(two_processes) -> None:
    order = np.random.default_rng(2).permutation(20).tolist()
    batches = [alignment_batch(order[:7]), alignment_batch(order[7:]), alignment_batch(order[3:5])]
    assert_values(run_class(AlignmentAccuracy, batches), expected_alignment())
    shards = [[alignment_batch(order[:12])], [alignment_batch(order[10:])]]
    assert_values(run_two_processes(two_processes, AlignmentAccuracy, shards), expected_alignment())


def test_alignment_says_what_was_not_measured_or_broke() -> None:
    generated = torch.tensor([1.0, 0.0, math.nan])
    metric = AlignmentAccuracy()
    metric.update(generated[:2], generated[:2], None, None, torch.arange(2))
    found = metric.compute()
    assert found["align_acc"] == 0.5, "a probability of exactly one half is no match, as torch.round has it"
    assert found["align_acc_shifted"].isnan() and found["align_acc_wrong"].isnan()
    metric.update(generated[2:], generated[:1], None, None, torch.tensor([2]))
    assert metric.compute()["align_acc"].isnan()


def test_hit_rate_over_two_processes(two_processes) -> None:
    right = torch.arange(9) % 3 == 0
    shards = [[(right[:5], torch.arange(5))], [(right[4:], torch.arange(4, 9))]]
    mean, low, high = wilson(3, 9)
    expected = {"rate": mean, "rate_low": low, "rate_high": high}
    assert_values(run_two_processes(two_processes, HitRate, shards), expected)


def test_padding_is_left_out_and_clips_weigh_the_same() -> None:
    metric = HitRate()
    metric.update(torch.tensor([True, False]), torch.tensor([3, -1]))
    assert metric.compute()["rate"] == 1
    means = clip_means(torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([5, 5, 5, 9]))
    assert means.tolist() == [2.0, 10.0]


def test_too_few_and_wrong_input() -> None:
    with pytest.raises(ValueError, match="splits must be in"):
        inception_score(UNBIASED[:9])
    with pytest.raises(ValueError, match="subset_size must be in"):
        kernel_distance(FAKE_FEATURES, REAL_FEATURES)
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(FAKE_FEATURES, FAKE)
    with pytest.raises(ValueError, match="shapes must be equal"):
        paired_kl(FAKE, REAL)
    with pytest.raises(ValueError, match="expected 2 rows"):
        HitRate().update(torch.tensor([True]), torch.arange(2))
    with pytest.raises(ValueError, match="sample must be in"):
        AlignmentAccuracy().update(*LOGITS[:, :1], CLIPS[:1], -1)
    with pytest.warns(UserWarning, match="needs at least"):
        found = run_class(partial(GeneratedSounds, 0), [sound_batch([0])])
    assert found["inception_score"].isnan() and found["fid"].isnan() and found["kl"].isfinite()
