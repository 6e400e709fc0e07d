"""Retrieval recall: golden values, a float64 loop, properties, ties, repeated samples and two processes."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.metrics.retrieval import RetrievalRecall, recall_at_k
from tests.golden.fill import array
from tests.metrics.tester import assert_values, largest_tensor, run_class, run_two_processes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rankclip" / "metrics.npz")
KEYS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
KS = (1, 2, 5)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def loop_recall(images, texts, text_image, ties: str) -> dict[str, float]:
    """Section 5.3 word by word, in float64 numpy: the trusted third implementation."""
    scores = np.round(unit(images.astype(float)) @ unit(texts.astype(float)).T, 6)
    ahead = (lambda other, own: other > own) if ties == "optimistic" else (lambda other, own: other >= own)
    i2t, t2i = [], []
    for i in range(len(images)):
        own = [j for j in range(len(texts)) if text_image[j] == i]
        wrong = [j for j in range(len(texts)) if text_image[j] != i]
        if own:
            i2t.append(min(1 + sum(ahead(scores[i, w], scores[i, j]) for w in wrong) for j in own))
    for j, i in enumerate(text_image):
        t2i.append(1 + sum(ahead(scores[w, j], scores[i, j]) for w in range(len(images)) if w != i))
    return {f"{way}_r{k}": float(np.mean(np.array(r) <= k)) for way, r in (("i2t", i2t), ("t2i", t2i)) for k in KS}


@pytest.fixture(scope="module")
def data():
    """13 images with 0 to 3 captions, with exact ties inside and across images."""
    text_image = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11])
    images = array("test.retrieval.image", (13, 6))
    texts = 0.6 * images[text_image] + array("test.retrieval.text", (18, 6))
    texts[6], texts[4], images[8] = texts[2], texts[3], images[7]
    return images, texts, text_image


def as_batches(images, texts, text_image, rows_of_batches) -> list[tuple[torch.Tensor, ...]]:
    """Updates with the given image rows each; ids are scattered so that they differ from rows."""
    batches = []
    for rows in rows_of_batches:
        texts_of = np.concatenate([np.flatnonzero(text_image == row) for row in rows]).astype(int)
        parts = (images[rows], 7 * np.array(rows) % 1000, texts[texts_of], 7 * text_image[texts_of] % 1000)
        batches.append(tuple(torch.tensor(part) for part in parts))
    return batches


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_golden_all_captions(chunk: int) -> None:
    x = array("rankclip.retrieval.image", (50, 64))
    texts = unit(0.25 * np.repeat(x, 5, axis=0) + array("rankclip.retrieval.text", (250, 64)))
    got = recall_at_k(torch.tensor(unit(x)), torch.tensor(texts), torch.arange(250) // 5, chunk=chunk)
    assert_values(got, {key: float(GOLDEN[f"retrieval/{key}"]) / 100 for key in KEYS})


@pytest.mark.parametrize("captions", ["all", "first"])
def test_golden_through_the_class(captions: str) -> None:
    x = array("rankclip.retrieval.image", (50, 64))
    texts = 0.25 * np.repeat(x, 5, axis=0) + array("rankclip.retrieval.text", (250, 64))
    batches = as_batches(3 * x, texts, np.arange(250) // 5, np.array_split(np.arange(50), 7))
    prefix = "retrieval/one_caption_" if captions == "first" else "retrieval/"
    got = run_class(partial(RetrievalRecall, captions=captions, chunk=8), batches)
    assert_values(got, {key: float(GOLDEN[prefix + key]) / 100 for key in KEYS})


def test_golden_of_both_protocols_from_the_same_rows() -> None:
    x = array("rankclip.retrieval.image", (50, 64))
    texts = 0.25 * np.repeat(x, 5, axis=0) + array("rankclip.retrieval.text", (250, 64))
    batches = as_batches(3 * x, texts, np.arange(250) // 5, np.array_split(np.arange(50), 7))
    keys = KEYS + [f"one_caption_{key}" for key in KEYS]
    got = run_class(partial(RetrievalRecall, captions="both"), batches)
    assert_values(got, {key: float(GOLDEN[f"retrieval/{key}"]) / 100 for key in keys})


def test_no_full_matrix_is_held() -> None:
    images, texts = torch.randn(300, 4), torch.randn(900, 4)
    call = partial(recall_at_k, images, texts, torch.arange(900) // 3, chunk=100)
    assert largest_tensor(call) <= 100 * 100 < 300 * 900


@pytest.mark.parametrize("ties", ["optimistic", "pessimistic"])
def test_function_and_class_equal_the_loop(data, ties: str) -> None:
    images, texts, text_image = data
    expected = loop_recall(*data, ties)
    got = recall_at_k(
        torch.tensor(unit(images)), torch.tensor(unit(texts)), torch.tensor(text_image), KS, ties, chunk=4
    )
    assert_values(got, expected)
    batches = as_batches(*data, [[0, 1, 2], [12, 3], [4, 5, 6, 7, 8, 9, 10, 11]])
    assert_values(run_class(partial(RetrievalRecall, KS, ties), batches), expected)


def test_the_tie_rules_differ_on_ties(data) -> None:
    assert loop_recall(*data, "optimistic") != loop_recall(*data, "pessimistic")
    same = torch.ones(4, 8)
    assert_values(recall_at_k(same, same, torch.arange(4), (1,)), {"i2t_r1": 1.0, "t2i_r1": 1.0})
    assert_values(recall_at_k(same, same, torch.arange(4), (1,), "pessimistic"), {"i2t_r1": 0.0, "t2i_r1": 0.0})


def test_equal_captions_of_one_image_do_not_compete() -> None:
    images, texts = torch.eye(2), torch.eye(2)[[0, 0, 0, 1]]
    got = recall_at_k(images, texts, torch.tensor([0, 0, 0, 1]), (1,), "pessimistic")
    assert_values(got, {"i2t_r1": 1.0, "t2i_r1": 1.0})


def test_invariant_to_permuting_images_with_their_captions(data) -> None:
    expected = loop_recall(*data, "optimistic")
    order = np.random.default_rng(0).permutation(13)
    assert_values(run_class(partial(RetrievalRecall, KS), as_batches(*data, [order])), expected)
    images, texts, text_image = data
    shuffled = np.random.default_rng(1).permutation(18)
    batch = (images[order], order, texts[shuffled], text_image[shuffled])
    assert_values(run_class(partial(RetrievalRecall, KS), [tuple(map(torch.tensor, batch))]), expected)


def test_directions_agree_on_a_symmetric_similarity() -> None:
    x = torch.tensor(array("test.retrieval.symmetric", (30, 8)))
    basis = torch.tensor(array("test.retrieval.map", (8, 8)))
    got = recall_at_k(x, x @ (basis + basis.T), torch.arange(30), KS)  # x (B + B^T) x^T is symmetric
    assert 0 < got["i2t_r1"] < 1
    assert [got[f"i2t_r{k}"] for k in KS] == [got[f"t2i_r{k}"] for k in KS]


def test_repeated_images_and_padding_count_once(data) -> None:
    # the sampler repeats images in a later update and within one
    batches = as_batches(*data, [[0, 1, 2, 0], [3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 2, 6]])
    batches[1] = (
        torch.cat([batches[1][0], torch.randn(2, 6)]),
        torch.cat([batches[1][1], torch.tensor([-1, -1])]),
        torch.cat([torch.randn(1, 6), batches[1][2]]),
        torch.cat([torch.tensor([-1]), batches[1][3]]),
    )
    assert_values(run_class(partial(RetrievalRecall, KS), batches), loop_recall(*data, "optimistic"))


SPLITS = {
    "uneven": ([[0, 1, 2], [3, 4, 5], [6]], [[7, 8, 9, 10, 11, 12]]),
    "padded": ([[0, 2, 4], [6, 8, 10], [12]], [[1, 3, 5], [7, 9, 11], [0]]),
    "rank 1 saw nothing": ([[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], []),
    "rank 0 saw nothing": ([], [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_two_processes_equal_one(data, two_processes, split: str, on_cpu: bool) -> None:
    shards = [as_batches(*data, rows) for rows in SPLITS[split]]
    make = partial(RetrievalRecall, KS, "pessimistic", compute_on_cpu=on_cpu)
    expected = loop_recall(*data, "pessimistic")
    assert_values({k: torch.tensor(v) for k, v in run_two_processes(two_processes, make, shards).items()}, expected)


def test_both_protocols_over_two_processes(data, two_processes) -> None:
    images, texts, text_image = data
    first = np.unique(text_image, return_index=True)[1]
    one_caption = loop_recall(images, texts[first], text_image[first], "optimistic")
    shards = [as_batches(*data, rows) for rows in SPLITS["padded"]]
    got = run_two_processes(two_processes, partial(RetrievalRecall, KS, captions="first"), shards)
    assert got == pytest.approx(one_caption, abs=1e-6)
    expected = loop_recall(*data, "optimistic") | {f"one_caption_{key}": value for key, value in one_caption.items()}
    got = run_two_processes(two_processes, partial(RetrievalRecall, KS, captions="both"), shards)
    assert got == pytest.approx(expected, abs=1e-6)


def test_no_data_gives_nan_and_says_so(two_processes) -> None:
    with pytest.warns(UserWarning, match="no image with a caption"):
        assert_values(RetrievalRecall(KS).compute(), {f"{way}_r{k}": math.nan for way in ("i2t", "t2i") for k in KS})
    with pytest.warns(UserWarning, match="no image with a caption"):
        assert len(RetrievalRecall(KS, captions="both").compute()) == 4 * len(KS)
    metric = RetrievalRecall((1,))
    metric.update(torch.ones(1, 4), torch.tensor([3]), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    with pytest.warns(UserWarning, match="no image with a caption"):
        assert math.isnan(metric.compute()["i2t_r1"])
    assert math.isnan(run_two_processes(two_processes, partial(RetrievalRecall, (1,)), [[], []])["t2i_r1"])


def test_nan_features_do_not_look_good() -> None:
    images = torch.eye(3)
    texts = torch.full((3, 3), math.nan)
    for ties in ("optimistic", "pessimistic"):
        assert_values(recall_at_k(images, texts, torch.arange(3), (3,), ties), {"i2t_r3": 0.0, "t2i_r3": 0.0})
        one_bad = torch.stack([images[0], texts[1], images[2]])  # it stands in front of the two good ones
        got = recall_at_k(one_bad, images, torch.arange(3), (1, 2), ties)
        assert_values(got, {"i2t_r1": 2 / 3, "i2t_r2": 2 / 3, "t2i_r1": 0.0, "t2i_r2": 2 / 3})


def test_equal_vectors_tie_exactly_and_near_ones_do_not() -> None:
    row = torch.nn.functional.normalize(torch.tensor(array("test.retrieval.tie", (1, 193))))
    same = row.repeat(517, 1)  # an odd size, so that blocked products take different paths for different rows
    for ties, want in (("optimistic", 1.0), ("pessimistic", 0.0)):
        got = recall_at_k(same, same, torch.arange(517), (516,), ties, chunk=100)
        assert_values(got, {"i2t_r516": want, "t2i_r516": want})
    near = torch.tensor([[1.0, 0.0], [1.0 - 1e-6, 0.0]])
    assert_values(recall_at_k(near, near[:1], torch.tensor([0]), (1,), "pessimistic"), {"i2t_r1": 1.0, "t2i_r1": 1.0})


def test_captions_split_over_updates_are_reported(data) -> None:
    images, texts = torch.tensor(data[0][:2]), torch.tensor(data[1][:2])
    metric = RetrievalRecall((1,))
    for text in texts:  # one row a caption: the same image comes with another caption
        metric.update(images[:1], torch.tensor([4]), text[None], torch.tensor([4]))
    with pytest.warns(UserWarning, match="1 repeated images came with other captions"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), torch.eye(2), torch.tensor([0])), "one entry a text, got 1 for 2"),
        ((torch.eye(2), torch.eye(2), torch.tensor([0, 2])), r"rows in \[0, 2\)"),
        ((torch.eye(2), torch.eye(2), torch.tensor([0, 1]), (0,)), "ks must be"),
        ((torch.eye(2), torch.eye(2), torch.tensor([0, 1]), (1,), "random"), "ties must be"),
    ],
)
def test_wrong_arguments_are_named(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recall_at_k(*arguments)


def test_wrong_updates_are_named() -> None:
    with pytest.raises(ValueError, match="captions must be one of"):
        RetrievalRecall(captions="five")
    metric = RetrievalRecall()
    with pytest.raises(ValueError, match=r"not in the batch: \[8\]"):
        metric.update(torch.eye(2), torch.tensor([1, 2]), torch.eye(2), torch.tensor([1, 8]))
    with pytest.raises(ValueError, match="image 1 is in the batch more than once"):
        metric.update(torch.eye(2), torch.tensor([1, 1]), torch.eye(2)[:1], torch.tensor([1]))
    with pytest.raises(ValueError, match="same number of rows"):
        metric.update(torch.eye(2), torch.tensor([1]), torch.eye(2), torch.tensor([1, 1]))
