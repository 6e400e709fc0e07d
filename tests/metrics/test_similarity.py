"""Cosines with references and texts against plain loops over pairs, over two processes, and what a network sees."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from mmtrain.metrics.intervals import bootstrap, mean_of
from mmtrain.metrics.similarity import (
    ReferenceSimilarity,
    TextSimilarity,
    fit_pictures,
    mean_reference,
    similarity_to_references,
)
from tests.metrics.tester import assert_values, run_class, run_two_processes

G = torch.Generator().manual_seed(0)
LINES, SEEDS, WIDTH = 9, 2, 5
REFERENCES = {
    "Ada": torch.randn(4, WIDTH, generator=G),
    "Bo": torch.randn(2, WIDTH, generator=G),
    "Cy": torch.ones(1, 5),
}
FEATURES = torch.randn(LINES * SEEDS, WIDTH, generator=G) + 0.5
TEXTS = torch.randn(LINES, WIDTH, generator=G).repeat_interleave(SEEDS, dim=0)
IDS, SAMPLES = torch.arange(LINES).repeat_interleave(SEEDS), torch.arange(SEEDS).repeat(LINES)
# Ada alone, Ada and Bo, Bo alone; nobody asks for Cy
PRESENT = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0]] * 3).repeat_interleave(SEEDS, dim=0)


def expected_references() -> dict[str, float]:
    """By loops over every pair."""
    intervals = []
    for place, references in enumerate(list(REFERENCES.values())[:2]):
        by_line: dict[int, list[float]] = {}
        for row in range(LINES * SEEDS):
            if PRESENT[row, place]:
                pairs = [float(cosine_similarity(FEATURES[row].double(), r.double(), dim=0)) for r in references]
                by_line.setdefault(int(IDS[row]), []).append(sum(pairs) / len(pairs))
        intervals.append(bootstrap([sum(values) / len(values) for values in by_line.values()]))
    assert intervals[0].mean != intervals[1].mean
    return dict(zip(("similarity", "similarity_low", "similarity_high"), mean_of(intervals), strict=True))


def reference_batch(rows: list[int]) -> tuple:
    return FEATURES[rows], PRESENT[rows], IDS[rows], SAMPLES[rows]


def text_batch(rows: list[int]) -> tuple:
    return FEATURES[rows], TEXTS[rows], IDS[rows], SAMPLES[rows]


ORDER = np.random.default_rng(0).permutation(LINES * SEEDS).tolist()


def test_references_against_loops_over_pairs(two_processes) -> None:
    make, expected = partial(ReferenceSimilarity, REFERENCES), expected_references()
    assert_values(run_class(make, [reference_batch(ORDER[:5]), reference_batch(ORDER[3:])]), expected)
    for cut in (5, 18):  # uneven, repeated; and a process without any
        shards = [[reference_batch(ORDER[:cut])], [reference_batch(ORDER[3:])] if cut == 5 else []]
        assert_values(run_two_processes(two_processes, make, shards), expected)


def test_texts_against_a_loop(two_processes) -> None:
    by_line = [
        np.mean([float(cosine_similarity(FEATURES[r].double(), TEXTS[r].double(), dim=0)) for r in (2 * i, 2 * i + 1)])
        for i in range(LINES)
    ]
    expected = dict(zip(("similarity", "similarity_low", "similarity_high"), bootstrap(by_line), strict=True))
    assert_values(run_class(TextSimilarity, [text_batch(ORDER)]), expected)
    shards = [[text_batch(ORDER[:7])], [text_batch(ORDER[6:])]]
    assert_values(run_two_processes(two_processes, TextSimilarity, shards), expected)


def test_a_character_without_pictures_is_left_out_and_one_that_diverged_is_not() -> None:
    metric = ReferenceSimilarity(REFERENCES)
    assert metric.compute()["similarity"].isnan()
    metric = ReferenceSimilarity(REFERENCES)
    metric.update(*reference_batch(ORDER))
    assert list(metric.by_character()) == ["Ada", "Bo"]
    metric.update(torch.full((1, WIDTH), math.nan), torch.tensor([[0, 1, 0]]), torch.tensor([99]))
    metric._computed = None
    assert metric.compute()["similarity"].isnan(), "diverged features must not look good"
    assert math.isfinite(metric.by_character()["Ada"].mean)


def test_length_of_a_feature_does_not_matter() -> None:
    mean = mean_reference(REFERENCES["Ada"])
    scaled = mean_reference(REFERENCES["Ada"] * torch.tensor([[1.0], [5.0], [0.1], [2.0]]))
    torch.testing.assert_close(mean, scaled)
    found = similarity_to_references(torch.cat([FEATURES, 7 * FEATURES]), mean).view(2, -1)
    torch.testing.assert_close(found[0], found[1])


def test_the_published_crop_of_a_wide_picture() -> None:
    """Shorter side to 256, centre 224, as torchvision does it."""
    from torchvision.transforms.v2 import functional as TF

    picture = torch.randint(256, (2, 3, 300, 520), generator=G, dtype=torch.uint8)
    scaled = TF.resize(picture.float() / 255, [256], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    expected = TF.center_crop(scaled.clamp(0, 1), [224, 224])
    torch.testing.assert_close(fit_pictures(picture, 224, "crop", 256), expected, atol=1e-5, rtol=0)


def test_padding_and_squashing_lose_nothing() -> None:
    picture = torch.full((1, 3, 40, 80), 255, dtype=torch.uint8)
    padded = fit_pictures(picture, 20, "pad")
    assert padded.shape[-2:] == (20, 20) and padded[..., 5:15, :].min() > 0.999
    assert padded[..., :5, :].max() == padded[..., 15:, :].max() == 0
    picture[..., :8] = 0
    assert fit_pictures(picture, 20, "crop").min() > 0.9 > 0.1 > fit_pictures(picture, 20, "squash").min()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="uint8"):
        fit_pictures(torch.zeros(1, 3, 4, 4), 2)
    with pytest.raises(ValueError, match="crop, pad, squash"):
        fit_pictures(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2, "stretch")
    with pytest.raises(ValueError, match="at least one reference"):
        ReferenceSimilarity({"Ada": torch.zeros(0, 3)})
    with pytest.raises(ValueError, match="must be \\[B, 3\\]"):
        ReferenceSimilarity(REFERENCES).update(FEATURES, PRESENT[:, :2], IDS, SAMPLES)
