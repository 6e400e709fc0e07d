"""What a simulated test runs: episodes of every variation with fixed seeds, the same for all methods."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

EPISODES_AT_ONCE = 25


def closed_loop_items(variations: Sequence[str], episodes: int, first_seed: int) -> list[tuple[str, int]]:
    """(variation, seed) of every episode: the same `episodes` seeds for each variation."""
    return [(variation, first_seed + i) for variation in variations for i in range(episodes)]


class ClosedLoopLoader:
    """Batches `{"variation": list[str], "seed": int64 [b], "id": int64 [b]}` of one variation each.

    Every process gets the same number of batches and, of n processes, each n-th episode; where they do not divide, some
    repeat the last one, which its id tells. "id" is the number in `closed_loop_items`.
    """

    def __init__(
        self, variations: Sequence[str], episodes: int, first_seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        items = closed_loop_items(variations, episodes, first_seed)
        own = [min(rank + i * world_size, episodes - 1) for i in range(-(-episodes // world_size))]
        self._batches = [
            [(*items[cell * episodes + i], cell * episodes + i) for i in own[start : start + EPISODES_AT_ONCE]]
            for cell in range(len(variations))
            for start in range(0, len(own), EPISODES_AT_ONCE)
        ]
        self.counts: Counter[str] = Counter()  # nothing is ever skipped

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            variations, seeds, numbers = zip(*batch, strict=True)
            yield {"variation": list(variations), "seed": torch.tensor(seeds), "id": torch.tensor(numbers)}
