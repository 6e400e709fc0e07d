"""Alignment, uniformity and modality gap: golden values, a float64 loop, the draw, bounded memory, two processes."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmtrain.metrics import geometry
from mmtrain.metrics.geometry import PairGeometry, modality_gap, uniformity_cosine, uniformity_distance
from tests.golden.fill import array
from tests.metrics.tester import assert_values, largest_tensor, run_class, run_two_processes

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rankclip" / "metrics.npz")
NAMES = ("alignment_cosine", "uniformity_cosine", "alignment_distance", "uniformity_distance", "modality_gap")


@pytest.fixture(scope="module")
def golden() -> tuple[torch.Tensor, torch.Tensor]:
    images = array("rankclip.eval.image", (200, 64)).astype(np.float64)
    texts = 0.7 * images + array("rankclip.eval.text", (200, 64))
    return tuple(torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (images, texts))


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """23 pairs that are not of unit length."""
    images = torch.tensor(array("test.geometry.image", (23, 6)))
    return images, 2 * images + torch.tensor(array("test.geometry.text", (23, 6)))


def loop_geometry(images, texts) -> dict[str, float]:
    """Section 5.4 word by word, pair by pair in float64 numpy."""
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images.double(), texts.double()))
    x, y, pairs = np.asarray(x), np.asarray(y), range(len(images))
    cosine = [math.exp(-x[i] @ y[j]) for i in pairs for j in pairs if i != j]
    distance = [math.exp(-2 * ((x[i] - y[j]) ** 2).sum()) for i in pairs for j in pairs if i != j]
    values = (
        np.mean([x[i] @ y[i] for i in pairs]),
        math.log(np.mean(cosine)),
        np.mean([((x[i] - y[i]) ** 2).sum() for i in pairs]),
        math.log(np.mean(distance)),
        np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)),
    )
    return dict(zip(NAMES, map(float, values), strict=True))


def as_batches(images, texts, rows_of_batches) -> list[tuple[torch.Tensor, ...]]:
    """Updates with the given rows; ids are scattered so that they differ from rows."""
    return [(images[rows], texts[rows], 7 * torch.as_tensor(rows) % 1000) for rows in rows_of_batches]


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_golden(golden, chunk: int) -> None:
    got = {
        "align": geometry.alignment_distance(*golden),
        "uniform": uniformity_distance(*golden, triangle="lower", chunk=chunk),
        "uniform_all_offdiagonal": uniformity_distance(*golden, chunk=chunk),
        "modality_gap": modality_gap(*golden),
    }
    assert_values(got, {name: float(GOLDEN[f"hypersphere/{name}"]) for name in got})


def test_golden_through_the_class(golden) -> None:
    got = run_class(PairGeometry, as_batches(*golden, torch.randperm(200).split(64)))
    expected = loop_geometry(*golden)
    assert_values(got, expected)
    assert expected["uniformity_distance"] == pytest.approx(float(GOLDEN["hypersphere/uniform_all_offdiagonal"]))


def test_functions_equal_the_loop_at_any_chunk(data) -> None:
    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in data]
    expected = loop_geometry(*data)
    for chunk in (1, 5, 23, 100):
        for name in ("uniformity_cosine", "uniformity_distance"):
            got = getattr(geometry, name)(*unit, chunk=chunk)
            assert float(got) == pytest.approx(expected[name], abs=1e-12)
    assert_values({name: getattr(geometry, name)(*unit) for name in NAMES}, expected)


def test_the_forms_agree_where_they_must(data) -> None:
    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in data]
    cosine, distance = geometry.alignment_cosine(*unit), geometry.alignment_distance(*unit)
    assert float(distance) == pytest.approx(2 - 2 * float(cosine))  # ||x - y||^2 = 2 - 2 x.y on the sphere
    both = math.exp(float(uniformity_distance(*unit, "lower"))) + math.exp(
        float(uniformity_distance(*reversed(unit), "lower"))
    )
    assert both / 2 == pytest.approx(math.exp(float(uniformity_distance(*unit))))  # swapping roles swaps the triangle


def test_no_full_matrix_is_held() -> None:
    rows = torch.nn.functional.normalize(torch.randn(1500, 4), dim=1)
    for measure in (uniformity_cosine, uniformity_distance):
        assert largest_tensor(partial(measure, rows, rows, chunk=10)) <= 10 * 1500


def test_repeated_pairs_and_padding_count_once(data) -> None:
    batches = as_batches(*data, [[0, 1, 1, 2], list(range(3, 23)), [0, 5, 22]])
    batches.append((torch.full((1, 6), math.nan), torch.ones(1, 6), torch.tensor([-1])))
    assert_values(run_class(PairGeometry, batches), loop_geometry(*data))


def draw(count: int, limit: int, seed: int) -> list[int]:
    """The documented draw, as positions in the order of ids."""
    return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].tolist())


def test_more_pairs_than_the_limit_are_drawn_by_the_seed(data) -> None:
    by_id = (7 * torch.arange(23) % 1000).argsort()
    for seed in (0, 3):
        rows = by_id[draw(23, 9, seed)]
        got = run_class(partial(PairGeometry, max_pairs=9, seed=seed), as_batches(*data, torch.randperm(23).split(8)))
        assert_values(got, loop_geometry(data[0][rows], data[1][rows]))


def test_pairs_for_the_figure(data) -> None:
    metric = PairGeometry()
    for batch in as_batches(*data, [list(range(22, 10, -1)), list(range(11))]):
        metric.update(*batch)
    unit = [torch.nn.functional.normalize(rows, dim=1) for rows in data]
    by_id = (7 * torch.arange(23) % 1000).argsort()
    for limit, rows in ((5, by_id[draw(23, 5, 2)]), (100, by_id)):
        images, texts = metric.pairs(limit, seed=2)
        torch.testing.assert_close((images, texts), (unit[0][rows], unit[1][rows]))
    assert [len(rows) for rows in PairGeometry().pairs(5)] == [0, 0]


SPLITS = {
    "uneven": ([range(0, 9), range(9, 17)], [range(17, 23)]),
    "padded": ([range(0, 23, 2)], [range(1, 23, 2), [0]]),
    "rank 1 saw nothing": ([range(23)], []),
    "rank 0 saw nothing": ([], [range(23)]),
}


def _pairs_of_one_rank(shards) -> list[list[list[float]]]:
    metric = PairGeometry()
    for batch in shards[dist.get_rank()]:
        metric.update(*batch)
    metric.compute()
    return [rows.tolist() for rows in metric.pairs(9)]


def test_pairs_gather_over_two_processes(data, two_processes) -> None:
    shards = [as_batches(*data, [list(b) for b in part]) for part in SPLITS["uneven"]]
    results = two_processes.starmap_async(_pairs_of_one_rank, [(shards,)] * 2, chunksize=1).get(timeout=200)
    rows = (7 * torch.arange(23) % 1000).argsort()[draw(23, 9, 0)]
    unit = [torch.nn.functional.normalize(part[rows], dim=1).tolist() for part in data]
    assert results == [unit, unit]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("max_pairs", [9, 100])
def test_two_processes_equal_one(data, two_processes, split: str, max_pairs: int) -> None:
    make = partial(PairGeometry, max_pairs)
    rows = (7 * torch.arange(23) % 1000).argsort()[draw(23, min(max_pairs, 23), 0)]
    shards = [as_batches(*data, [list(b) for b in part]) for part in SPLITS[split]]
    got = run_two_processes(two_processes, make, shards)
    assert got == pytest.approx(loop_geometry(data[0][rows], data[1][rows]), abs=1e-6)


def test_too_few_pairs_give_nan_and_say_so(data) -> None:
    for batches in ([], as_batches(*data, [[4]])):
        with pytest.warns(UserWarning, match="fewer than two pairs"):
            assert_values(run_class(PairGeometry, batches), dict.fromkeys(NAMES, math.nan))


def test_wrong_input_is_named(data) -> None:
    images, texts = data
    with pytest.raises(ValueError, match=r"got \(23, 6\) and \(22, 6\)"):
        uniformity_cosine(images, texts[1:])
    with pytest.raises(ValueError, match="triangle must be 'all' or 'lower', got 'upper'"):
        uniformity_distance(images, texts, triangle="upper")
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        uniformity_cosine(images, texts, chunk=0)
    with pytest.raises(ValueError, match="max_pairs must be at least 2, got 1"):
        PairGeometry(max_pairs=1)
    with pytest.raises(ValueError, match="one row a pair, got 23, 23 and 5"):
        PairGeometry().update(images, texts, torch.arange(5))
