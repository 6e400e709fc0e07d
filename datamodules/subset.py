"""Nested seeded subsets of the training data, for the ablation of its size (RankCLIP, figure 4)."""

from collections.abc import Sequence

import numpy as np

from datamodules.sources import Sample, Source, UnusableSample
from mmtrain.config_errors import UserError


def nested_positions(num_samples: int, size: int, seed: int, shard_starts: np.ndarray | None = None) -> np.ndarray:
    """Sorted positions [size] of a subset; with the same seed a smaller one is part of every larger one.

    Whole shards are taken in a random order, and the first samples of the last one, so that a small subset reads few
    shards. Without shards the samples themselves are put into a random order.

    Raises:
        UserError: more samples than there are, or none.

    Example:
        >>> nested_positions(10, 4, seed=1).tolist(), nested_positions(10, 6, seed=1).tolist()
        ([0, 4, 7, 8], [0, 1, 2, 4, 7, 8])
    """
    if not 0 < size <= num_samples:
        raise UserError(f"subset: {size} of {num_samples} samples; give a number from 1 to {num_samples}")
    generator = np.random.default_rng(seed)
    if shard_starts is None:
        order = generator.permutation(num_samples)
    else:
        shards = generator.permutation(len(shard_starts) - 1)
        order = np.concatenate([np.arange(shard_starts[s], shard_starts[s + 1]) for s in shards])
    return np.sort(order[:size])


class NestedSubset:
    """Part of a source, see `nested_positions`; its counts say what it is a part of."""

    def __init__(self, source: Source, size: int, seed: int = 0) -> None:
        self.source = source
        self.positions = nested_positions(len(source), size, seed, source.shard_starts)
        starts = source.shard_starts
        self.shard_starts = None if starts is None else np.searchsorted(self.positions, starts)
        self.counts = {**source.counts, "samples": size, "subset_of": len(source)}
        self.warnings = source.warnings

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        return self.source.read(self.positions[np.asarray(samples, np.int64)])
