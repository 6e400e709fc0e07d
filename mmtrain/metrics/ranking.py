"""What the ranking metrics share: scores, ranks with a tie rule, and state that merges exactly over processes."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Ties = Literal["pessimistic", "optimistic"]
TIES = ("pessimistic", "optimistic")
MISS = torch.iinfo(torch.int64).max  # rank of a query whose correct answer has no finite score: larger than any k


def similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the inner products [R, N] of `rows` [R, D] and `columns` [N, D] in float32.

    They are summed in float64 and then rounded, so that equal vectors score equally (ties are real ties) and the
    ranks depend neither on the block size, nor on TF32, nor on where a row stands.
    """
    if rows.device.type == "mps":  # has no float64
        return rows.float() @ columns.float().T
    return (rows.double() @ columns.double().T).float()


def row_similarity(rows: Tensor, others: Tensor) -> Tensor:
    """Return the inner product [R] of each row of `rows` [R, D] with that row of `others`, summed like the above."""
    return (rows.double() * others.double()).sum(dim=1).float()


def rank_of_best(scores: Tensor, correct: Tensor, ties: Ties) -> Tensor:
    """Return the rank (from 1) of the best correct candidate of each row, int64 [R].

    rank = 1 + number of wrong candidates that score higher ("optimistic") or not lower ("pessimistic"). Correct
    candidates never stand in each other's way. A NaN counts against the query: collapsed or diverged features must
    not look good.

    Args:
        scores: [R, N].
        correct: bool [R, N]; a row without any correct candidate, or whose best one is not finite, gets `MISS`.
        ties: how an exactly equal wrong candidate counts.
    """
    best = scores.masked_fill(~correct, -torch.inf).amax(dim=1, keepdim=True)
    ahead = ~(scores <= best) if ties == "optimistic" else ~(scores < best)  # the negation catches NaN
    ranks = 1 + (ahead & ~correct).sum(dim=1)
    return torch.where(best.squeeze(1).isfinite(), ranks, MISS)


def first_occurrence(ids: Tensor) -> Tensor:
    """Return the positions, ascending, at which each id of `ids` [N] stands for the first time.

    Samplers repeat samples to give every process the same number; this is how they are counted once.

    Example:
        >>> first_occurrence(torch.tensor([4, 2, 4, 2, 9]))
        tensor([0, 1, 4])
    """
    ordered, positions = ids.sort(stable=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return positions[is_first].sort().values


def in_order_of_ids(ids: Tensor) -> Tensor:
    """Return the positions of first occurrence by ascending id: the same rows in the same order on any number of
    processes.

    Example:
        >>> in_order_of_ids(torch.tensor([4, 2, 4, 2, 9]))
        tensor([1, 0, 4])
    """
    positions = first_occurrence(ids)
    return positions[ids[positions].argsort()]


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise ValueError if a label is outside [0, num_classes)."""
    if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}")


def check_options(ks: tuple[int, ...], ties: str) -> tuple[int, ...]:
    """Return `ks` as a sorted tuple without repeats; raise ValueError for a k below 1 or an unknown tie rule."""
    if not ks or any(not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"ks must be whole numbers from 1, got {ks!r}")
    if ties not in TIES:
        raise ValueError(f"ties must be one of {TIES}, got {ties!r}")
    return tuple(sorted(set(ks)))


class RowMetric(Metric):
    """A metric that keeps rows (no sums), so that after the gather repeated samples can be recognised by their id."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._row_types: dict[str, torch.dtype] = {}

    def add_rows(self, name: str, dtype: torch.dtype) -> None:
        """Declare a state: 1-D tensors of `dtype`, concatenated over updates and then over processes.

        1-D even for features, since a process that saw no data does not know their width.
        """
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._row_types[name] = dtype

    def rows(self, name: str) -> Tensor:
        """Return all rows of a state as one tensor, empty if there were none."""
        value = getattr(self, name)
        if isinstance(value, Tensor):
            return value
        return torch.cat(value) if value else torch.empty(0, dtype=self._row_types[name], device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather; first give a process without data an empty tensor of the right type.

        torchmetrics would put an empty float32 tensor there, which misaligns the gather of the int64 states.
        Rows kept on the CPU (`compute_on_cpu`) return to the device, because NCCL gathers nothing else.
        """
        if not self._is_synced:
            for name in self._row_types:
                setattr(self, name, [self.rows(name).to(self.device)])
        super().sync(*args, **kwargs)
