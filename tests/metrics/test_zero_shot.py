"""Zero-shot accuracy: golden values, a float64 loop, ties, repeated samples and two processes."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.metrics.zero_shot import ZeroShotAccuracy, class_weights, topk_correct
from tests.golden.fill import array
from tests.metrics.tester import assert_values, run_class, run_two_processes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rankclip" / "metrics.npz")
KS = (1, 2, 4)


@pytest.fixture(scope="module")
def golden_weights() -> torch.Tensor:
    templates = np.stack([array(f"rankclip.zeroshot.class{c}", (6, 64)) for c in range(20)])
    return class_weights(torch.tensor(templates))


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    """23 images, 5 classes of which two are the same: images, labels, weights, ids."""
    weights = torch.nn.functional.normalize(torch.tensor(array("test.zeroshot.weights", (5, 6))), dim=-1)
    weights[3] = weights[1]
    labels = torch.arange(23) % 5
    images = torch.tensor(array("test.zeroshot.image", (23, 6))) + weights[labels]
    return images, labels, weights, torch.arange(23) * 11


def loop_accuracy(data, ties: str) -> dict[str, float]:
    """Count by hand in float64 the classes in front of the label."""
    images, labels, weights = (part.numpy() for part in data[:3])
    scores = np.round(images.astype(float) @ weights.astype(float).T, 6)
    ranks = []
    for row, label in zip(scores, labels, strict=True):
        others = np.delete(row, label)
        ranks.append(1 + int((others > row[label]).sum() if ties == "optimistic" else (others >= row[label]).sum()))
    return {f"top{k}": float(np.mean([rank <= k for rank in ranks])) for k in KS}


def as_batches(data, rows_of_batches) -> list[tuple[torch.Tensor, ...]]:
    images, labels, weights, ids = data
    return [(images[rows], labels[rows], weights, ids[rows]) for rows in rows_of_batches]


def test_golden(golden_weights: torch.Tensor) -> None:
    np.testing.assert_allclose(golden_weights, GOLDEN["zeroshot/class_weights"], rtol=0, atol=1e-6)
    labels = torch.arange(300) % 20
    images = torch.tensor(array("rankclip.zeroshot.image", (300, 64))) + 4 * golden_weights[labels]
    expected = {f"top{k}": float(GOLDEN[f"zeroshot/zeroshot_top{k}"]) for k in (1, 3, 5, 10)}
    assert expected["top1"] < expected["top3"] < 1
    hits = topk_correct(images, labels, golden_weights, (1, 3, 5, 10)).float().mean(dim=0)
    assert_values(dict(zip(expected, hits, strict=True)), expected)
    batches = as_batches((images, labels, golden_weights, torch.arange(300)), torch.arange(300).split(64))
    assert_values(run_class(partial(ZeroShotAccuracy, (1, 3, 5, 10)), batches), expected)


def test_class_weights_ignore_the_length_of_single_templates() -> None:
    templates = torch.tensor(array("test.zeroshot.templates", (3, 4, 8)))
    scaled = templates * torch.rand(3, 4, 1).add(0.5)
    torch.testing.assert_close(class_weights(templates), class_weights(scaled))
    assert not torch.allclose(class_weights(templates), torch.nn.functional.normalize(scaled.mean(1), dim=-1))
    with pytest.raises(ValueError, match=r"\[classes, templates, D\], got \(4, 8\)"):
        class_weights(templates[0])


@pytest.mark.parametrize("ties", ["optimistic", "pessimistic"])
def test_function_and_class_equal_the_loop(data, ties: str) -> None:
    expected = loop_accuracy(data, ties)
    hits = topk_correct(*data[:3], KS, ties).float().mean(dim=0)
    assert_values(dict(zip(expected, hits, strict=True)), expected)
    assert_values(run_class(partial(ZeroShotAccuracy, KS, ties), as_batches(data, torch.arange(23).split(5))), expected)


def test_tie_rules(data) -> None:
    assert loop_accuracy(data, "optimistic") != loop_accuracy(data, "pessimistic")
    collapsed = (torch.ones(4, 3), torch.arange(4) % 3, torch.ones(3, 3))
    assert not topk_correct(*collapsed, (1, 2)).any()
    assert topk_correct(*collapsed, (1,), "optimistic").all()


def test_k_above_the_number_of_classes_is_clipped() -> None:
    got = topk_correct(torch.eye(3), torch.tensor([1, 2, 0]), torch.eye(3), ks=(1, 3, 100))
    assert got.tolist() == [[False, True, True]] * 3
    assert not topk_correct(torch.full((1, 3), math.nan), torch.tensor([0]), torch.eye(3), ks=(100,)).any()


def test_repeated_samples_and_padding_count_once(data) -> None:
    images, _, weights, _ = data
    batches = as_batches(data, [torch.tensor([0, 1, 1, 2]), torch.arange(3, 23), torch.tensor([0, 5, 22])])
    batches.append((images[:2], torch.tensor([-1, 99]), weights, torch.tensor([-1, -1])))  # labels of padding are free
    assert_values(run_class(partial(ZeroShotAccuracy, KS), batches), loop_accuracy(data, "pessimistic"))


SPLITS = {
    "uneven": ([range(0, 9), range(9, 17)], [range(17, 23)]),
    "padded": ([range(0, 23, 2)], [range(1, 23, 2), [0]]),
    "rank 1 saw nothing": ([range(23)], []),
    "rank 0 saw nothing": ([], [range(23)]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(data, two_processes, split: str) -> None:
    shards = [as_batches(data, [torch.tensor(list(rows)) for rows in part]) for part in SPLITS[split]]
    got = run_two_processes(two_processes, partial(ZeroShotAccuracy, KS), shards)
    assert got == pytest.approx(loop_accuracy(data, "pessimistic"), abs=1e-6)


def test_no_data_gives_nan_and_says_so() -> None:
    with pytest.warns(UserWarning, match="saw no samples"):
        assert_values(ZeroShotAccuracy((1,)).compute(), {"top1": math.nan})


def test_wrong_input_is_named(data) -> None:
    images, labels, weights, ids = data
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 1 to 5"):
        ZeroShotAccuracy().update(images[:5], labels[:5] + 1, weights, ids[:5])
    with pytest.raises(ValueError, match="one row a sample, got 5, 4 and 5"):
        ZeroShotAccuracy().update(images[:5], labels[:4], weights, ids[:5])
    with pytest.raises(ValueError, match="ks must be"):
        ZeroShotAccuracy(ks=(0,))
