"""One tester for all metrics: function, class over updates and two merged processes, each against a float64 loop."""

import math
from collections.abc import Callable, Sequence
from multiprocessing.pool import Pool

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

Batch = tuple[Tensor, ...]
Values = dict[str, float]


def assert_values(got: dict[str, Tensor], expected: Values) -> None:
    assert got.keys() == expected.keys()
    wrong = {key: (float(got[key]), want) for key, want in expected.items() if not _same(float(got[key]), want)}
    assert not wrong, f"(got, expected): {wrong}"


def _same(got: float, want: float) -> bool:
    return math.isnan(got) if math.isnan(want) else abs(got - want) <= 1e-6


def run_class(make: Callable[[], Metric], batches: Sequence[Batch]) -> dict[str, Tensor]:
    metric = make()
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def largest_tensor(call: Callable[[], object]) -> int:
    """Return the number of entries of the largest tensor that any operation of `call` gave."""
    with _Largest() as largest:
        call()
    return largest.numel


def _one_rank(make: Callable[[], Metric], shards: Sequence[Sequence[Batch]]) -> tuple[int, Values]:
    """Runs inside a worker: feed this rank its shard; also go on after compute, as validation loops do."""
    metric = make()
    for batch in shards[dist.get_rank()]:
        metric.update(*batch)
    first = {key: float(value) for key, value in metric.compute().items()}
    metric._computed = None
    again = {key: float(value) for key, value in metric.compute().items()}
    assert str(first) == str(again), "computing twice changed the state"
    metric.reset()
    return dist.get_rank(), first


def run_two_processes(pool: Pool, make: Callable[[], Metric], shards: Sequence[Sequence[Batch]]) -> Values:
    """Return what both processes computed, after checking that they agree; `make` must be picklable."""
    # each task blocks in the gather until the other worker holds the other task, so that both ranks take part
    tasks = pool.starmap_async(_one_rank, [(make, shards)] * 2, chunksize=1)
    results = dict(tasks.get(timeout=500))  # on a loaded machine they take minutes to start
    assert set(results) == {0, 1}
    assert str(results[0]) == str(results[1])
    return results[0]
