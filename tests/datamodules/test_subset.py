"""Nested subsets of the training data: nested, seeded, few shards, and the same samples as in the whole."""

from itertools import pairwise

import numpy as np
import pytest

from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from datamodules.subset import nested_positions
from datamodules.synthetic import write_pairs
from mmtrain.config_errors import UserError

STARTS = np.array([0, 10, 25, 25, 40, 60])  # one shard is empty


@pytest.mark.parametrize("starts", [None, STARTS])
def test_smaller_subsets_are_parts_of_larger_ones(starts) -> None:
    subsets = [set(nested_positions(60, size, 3, starts).tolist()) for size in (1, 7, 30, 59, 60)]
    assert [len(s) for s in subsets] == [1, 7, 30, 59, 60]
    assert all(a < b for a, b in pairwise(subsets))
    other = set(nested_positions(60, 30, 4, starts).tolist())
    assert other != subsets[2]


def test_all_but_one_of_the_shards_are_taken_whole() -> None:
    kept = nested_positions(60, 33, 0, STARTS)
    shares = [np.isin(np.arange(a, b), kept).mean() for a, b in pairwise(STARTS) if b > a]
    assert sum(0 < share < 1 for share in shares) <= 1 and sum(share == 1 for share in shares) >= 1


def test_training_sees_the_subset_only(tmp_path) -> None:
    shards = write_pairs(tmp_path, [6, 5, 7], size=16)
    data = ImageTextDataModule(
        train=shards, subset=8, subset_seed=1, batch_size=4, pictures=Pictures(8, context_length=8), shuffle_shards=1
    )
    data.setup("fit")
    source = data.train_source
    assert data.data_counts["train"] == {"samples": 8, "shards": 3, "subset_of": 18}
    assert source.shard_starts[-1] == 8 and len(data.train_dataloader()) == 2
    whole = source.source.read(source.positions)
    assert [s.captions for s in source.read(range(8))] == [s.captions for s in whole]
    seen = sorted(draw.sample for batch in data.train_dataloader().sampler for draw in batch)
    assert seen == list(range(8))


def test_a_size_that_cannot_be_is_named(tmp_path) -> None:
    for size in (0, 19):
        data = ImageTextDataModule(train=write_pairs(tmp_path, [18], size=16), subset=size, batch_size=2)
        with pytest.raises(UserError, match=f"subset: {size} of 18 samples"):
            data.setup("fit")
