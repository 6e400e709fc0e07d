"""The order of the data: the same global batches for any number of processes and workers, resumed exactly."""

import gc
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import loading
from datamodules.image_text import ImageTextDataset
from datamodules.loading import Draw, EvaluationLoader, TrainLoader, epoch_order
from datamodules.pictures import Pictures
from datamodules.sources import CsvSource, FolderSource, ShardSource
from datamodules.synthetic import jpeg, pairs, picture, write_pairs, write_shard
from mmtrain.config_errors import UserError

PICTURES = Pictures(size=16, crop_scale=(0.3, 1.0), flip=0.5, context_length=8)
COUNTS = (9, 5, 14, 3)  # samples of the shards; 31 in all
TOTAL = sum(COUNTS)


class Places(torch.utils.data.Dataset):
    """A data set that hands the draws back."""

    def __len__(self) -> int:
        return TOTAL

    def __getitem__(self, draws: list[Draw]) -> dict:
        return {"draws": draws, "skipped": {"odd": sum(d.sample % 2 for d in draws)}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ShardSource:
    return ShardSource(write_pairs(tmp_path_factory.mktemp("shards"), COUNTS, size=24), captions="json:captions")


def samples(loader: TrainLoader) -> list[list[int]]:
    return [[d.sample for d in batch["draws"]] for batch in loader]


def identical(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    """Pixels and tokens, bit for bit."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def joined(ranks: list[list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """The global batches of several processes."""
    return [{k: torch.cat([part[k] for part in parts]) for k in parts[0]} for parts in zip(*ranks, strict=True)]


def test_order_is_a_pure_permutation_of_seed_and_epoch() -> None:
    orders = {(seed, epoch): epoch_order(TOTAL, seed, epoch) for seed in range(3) for epoch in range(3)}
    np.random.seed(5)  # the global generator must not matter
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(TOTAL))
        np.testing.assert_array_equal(order, epoch_order(TOTAL, seed, epoch))
    assert len({tuple(order) for order in orders.values()}) == 9


def test_shards_are_mixed_in_groups() -> None:
    starts, k = np.array([0, 9, 14, 28, 31, 31, 40, 47]), 3  # 7 shards, one of them empty
    shard_of = np.repeat(np.arange(7), np.diff(starts))
    orders = []
    for epoch in range(4):
        order = epoch_order(47, 0, epoch, starts, k)
        assert sorted(order) == list(range(47))
        shards = np.random.default_rng((0, epoch)).permutation(7)  # first number drawn of this seed: the shards' order
        first = 0
        for group in (shards[:3], shards[3:6], shards[6:]):
            size = int(sum(np.diff(starts)[group]))
            assert set(shard_of[order[first : first + size]]) <= set(group)
            first += size
        orders.append(tuple(order))
    assert len(set(orders)) == 4
    changes = (np.diff(shard_of[list(orders[0])]) != 0).sum()
    assert changes > 12, "samples of a group's shards are mixed, not read one shard after the other"


@pytest.mark.parametrize("shuffle_shards", [None, 2])
def test_processes_share_out_the_same_global_batches(shuffle_shards) -> None:
    options = {"shard_starts": np.cumsum([0, *COUNTS]), "shuffle_shards": shuffle_shards, "seed": 3}
    for epoch in range(2):
        expected = None
        for world_size in (1, 2, 4):
            loaders = [TrainLoader(Places(), 8, rank=r, world_size=world_size, **options) for r in range(world_size)]
            for loader in loaders:
                loader.sampler.set_epoch(epoch)  # what Lightning calls
            ranks = [samples(loader) for loader in loaders]
            assert {len(batch) for rank in ranks for batch in rank} == {8 // world_size}
            together = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
            expected = expected or together
            assert together == expected
        assert len(expected) == TOTAL // 8 == len(loaders[0])
        assert max(Counter(chain(*expected)).values()) == 1, "a sample came twice in an epoch"


def test_crops_and_captions_do_not_depend_on_processes_or_workers(source) -> None:
    dataset = ImageTextDataset(source, PICTURES, training=True)
    one = list(TrainLoader(dataset, 8, seed=1))
    workers = TrainLoader(dataset, 8, seed=1, num_workers=2)
    assert identical(one, list(workers))
    # 4 shards for 4 processes, of which one holds 3 samples: shards are shared by all
    assert identical(one, joined([list(TrainLoader(dataset, 8, seed=1, rank=r, world_size=4)) for r in range(4)]))
    workers.sampler.set_epoch(1)  # the same workers, kept alive
    again = list(workers)
    assert len(again) == len(one) and not identical(one, again)
    other_seed = list(TrainLoader(dataset, 8, seed=2))
    assert not torch.equal(other_seed[0]["image"], one[0]["image"])


def test_fewer_shards_than_processes_and_workers(tmp_path) -> None:
    dataset = ImageTextDataset(ShardSource(write_pairs(tmp_path / "s", [12], size=24)), PICTURES, training=True)
    alone = list(TrainLoader(dataset, 4))
    ranks = [list(TrainLoader(dataset, 4, rank=r, world_size=2, num_workers=2)) for r in range(2)]
    assert len(alone) == 3 and identical(alone, joined(ranks))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (0, 2), (2, 0)])
def test_resumes_inside_an_epoch_with_other_workers_and_processes(source, before, after) -> None:
    dataset = ImageTextDataset(source, PICTURES, training=True)
    full = TrainLoader(dataset, 4, seed=7)
    full.sampler.set_epoch(2)
    expected = list(full)
    first = TrainLoader(dataset, 4, seed=7, num_workers=before)
    first.sampler.set_epoch(2)
    iterator = iter(first)
    read = [next(iterator) for _ in range(3)]  # workers are several batches ahead by now
    state = first.state_dict()
    assert identical(read, expected[:3])
    assert (state["epoch"], state["position"], dict(first.counts)) == (2, 3, {"read": 12})
    ranks = []
    for rank in range(2):
        resumed = TrainLoader(dataset, 4, seed=7, num_workers=after, rank=rank, world_size=2)
        resumed.load_state_dict(state)
        resumed.sampler.set_epoch(2)  # as Lightning does when it goes on: must not lose the place
        ranks.append(list(resumed))
    assert identical(joined(ranks), expected[3:])


def test_workers_stop_at_once_when_a_loader_is_let_go_in_mid_epoch(source) -> None:
    """A loader that only the garbage collector frees has lost its queues: torch then waits 5 s for each worker."""
    loader = TrainLoader(ImageTextDataset(source, PICTURES, training=True), 4, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    workers = loader._loader._iterator._workers
    gc.disable()
    try:
        del iterator, loader
        assert not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()


def test_set_epoch_keeps_the_place_only_in_the_same_epoch() -> None:
    loader = TrainLoader(Places(), 8)
    whole = samples(loader)
    assert samples(loader) == [], "an epoch that was read to its end has nothing left"
    loader.sampler.set_epoch(0)
    assert loader.sampler.position == 3
    loader.sampler.set_epoch(1)
    iterator = iter(loader)
    next(iterator)
    loader.sampler.set_epoch(1)
    assert loader.sampler.position == 1
    loader.sampler.set_epoch(0)
    assert samples(loader) == whole
    assert loader.counts["read"] == 24 + 8 + 24  # counted over the whole run


def test_counters_stop_a_lossy_run() -> None:
    loader = TrainLoader(Places(), 8, max_lost=1.0)
    iterator = iter(loader)
    odd = sum(d % 2 for batch in (next(iterator), next(iterator)) for d in (x.sample for x in batch["draws"]))
    assert dict(loader.counts) == {"read": 16, "odd": odd}
    resumed = TrainLoader(Places(), 8, max_lost=0.3)
    resumed.counts.update({"read": 992, "odd": 300})
    with pytest.raises(UserError, match=r"odd \d+\), more than max_lost = 30\.00%"):
        list(resumed)


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="batch of 10 cannot be divided among 4 processes"):
        TrainLoader(Places(), 10, world_size=4)
    with pytest.raises(UserError, match="batch of 32 is larger than the 31 samples found"):
        TrainLoader(Places(), 32)
    loader = TrainLoader(Places(), 8)
    with pytest.raises(UserError, match="made with 30 training samples, now there are 31"):
        loader.load_state_dict(loader.state_dict() | {"samples": 30})
    with pytest.raises(UserError, match="batch_size: 8 now, 4 in the checkpoint"):
        loader.load_state_dict(TrainLoader(Places(), 4).state_dict())


def test_global_generators_are_left_alone(source) -> None:
    dataset = ImageTextDataset(source, PICTURES, training=True)
    torch.manual_seed(11)
    np.random.seed(11)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(TrainLoader(dataset, 8))
    list(EvaluationLoader(dataset, 8))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_gives_every_sample_over_the_processes(source, world_size) -> None:
    dataset = ImageTextDataset(source, PICTURES, training=False)
    loaders = [EvaluationLoader(dataset, 3, r, world_size, num_workers=2 * (r == 1)) for r in range(world_size)]
    batches = [list(loader) for loader in loaders]
    ids = [[int(i) for batch in rank for i in batch["id"]] for rank in batches]
    assert len({len(rank) for rank in ids}) == 1, "processes take part in equally many steps"
    assert set(chain(*ids)) == set(range(TOTAL))
    assert sum(map(len, ids)) - TOTAL == -TOTAL % world_size  # only the short ones repeat
    assert [len(rank) for rank in batches] == [len(loader) for loader in loaders]
    for batch in batches[-1]:  # each caption knows its picture
        assert batch["text_id"].tolist() == [int(i) for i in batch["id"] for _ in range(2)]
        assert len(batch["text"]) == 2 * len(batch["id"])
        for row, sample in enumerate(batch["id"]):
            assert torch.equal(batch["image"][row], dataset[[Draw(int(sample), 0, 0, 0)]]["image"][0])


def test_more_processes_than_samples() -> None:
    draws = [[d.sample for b in EvaluationLoader(Places(), 8, r, 40) for d in b["draws"]] for r in range(40)]
    assert [len(d) for d in draws] == [1] * 40 and {d[0] for d in draws} == set(range(TOTAL))


def test_csv_pairs_train_and_evaluate(tmp_path) -> None:
    rows = ["image,caption"]
    for number, sample in zip(range(10), pairs(10, size=24), strict=True):
        (tmp_path / f"{number}.jpg").write_bytes(sample["jpg"])
        rows.append(f'{number}.jpg,"{sample["txt"]}, number {number}"')
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    source = CsvSource(str(tmp_path / "pairs.csv"))
    training, evaluation = (ImageTextDataset(source, PICTURES, training=t) for t in (True, False))
    plain = list(TrainLoader(training, 4, seed=1))
    assert identical(plain, list(TrainLoader(training, 4, seed=1, num_workers=2)))
    captions = {tuple(row) for batch in plain for row in batch["text"].tolist()}
    everything = list(EvaluationLoader(evaluation, 3))
    assert len(captions) == 8 and captions <= {tuple(row) for b in everything for row in b["text"].tolist()}
    assert [int(i) for b in everything for i in b["text_id"]] == list(range(10))


def test_picture_folder_is_evaluated_with_labels_in_number_order(tmp_path) -> None:
    for label in (0, 2, 10):  # as text, 10 would come before 2
        (tmp_path / str(label)).mkdir()
        for number in range(2):
            (tmp_path / str(label) / f"{number}.jpg").write_bytes(jpeg(picture(label, number, 24)))
    source = FolderSource(str(tmp_path))
    (batch,) = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 8)
    assert source.class_names == ["0", "2", "10"]
    assert (batch["label"].tolist(), batch["id"].tolist(), "text" in batch) == ([0, 0, 1, 1, 2, 2], [*range(6)], False)


def test_shard_boundaries_follow_the_usable_samples(tmp_path: Path, source) -> None:
    np.testing.assert_array_equal(source.shard_starts, np.cumsum([0, *COUNTS]))
    samples = list(pairs(6, size=24))
    del samples[1]["txt"]
    del samples[4]["txt"]
    paths = [str(write_shard(tmp_path / f"{i}.tar", samples[3 * i : 3 * i + 3], stats=False)) for i in range(2)]
    np.testing.assert_array_equal(ShardSource(paths, max_lost=1.0).shard_starts, [0, 2, 4])


# ------------------------------------------------------------------------------------------------ a thousand processes

MILLIONS = 3_300_000  # CC3M, in as many shards
SHARDS = np.linspace(0, MILLIONS, 577).astype(np.int64) - np.arange(577) % 7 * (np.arange(577) % 576 > 0)
PER_PROCESS, BATCH = 32, 32 * 1024


class Numbers(torch.utils.data.Dataset):
    """As many samples, of which only the numbers are read."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draws: list[Draw]) -> dict:
        return {"sample": np.array([draw.sample for draw in draws]), "skipped": {}}


@pytest.fixture
def one_order(monkeypatch) -> None:
    """All processes of this simulation compute an epoch's order; here once for all."""
    orders: dict[tuple, np.ndarray] = {}

    def remembered(*arguments: object) -> np.ndarray:
        key = (arguments[1], arguments[2], arguments[4])
        if key not in orders:
            orders[key] = epoch_order(*arguments)
        return orders[key]

    monkeypatch.setattr(loading, "epoch_order", remembered)


def read_by_all(world_size: int, shuffle_shards: int | None, state: dict | None = None) -> np.ndarray:
    """Samples [processes, batches, samples of a process] of epoch 3, or of what is left of it."""
    found = []
    for rank in range(world_size):
        options = {"seed": 5, "rank": rank, "world_size": world_size, "shard_starts": SHARDS}
        loader = TrainLoader(Numbers(MILLIONS), BATCH, shuffle_shards=shuffle_shards, **options)
        if state:
            loader.load_state_dict(state)
        loader.sampler.set_epoch(3)
        found.append(np.array([[draw.sample for draw in draws] for draws in loader.sampler]))
    return np.stack(found)


def test_a_thousand_processes_share_the_samples_out(one_order) -> None:
    read = read_by_all(1024, 16)
    assert read.shape == (1024, MILLIONS // BATCH, PER_PROCESS), "each process has as many batches of as many samples"
    counts = np.bincount(read.ravel(), minlength=MILLIONS)
    assert counts.max() == 1 and counts.sum() == MILLIONS // BATCH * BATCH, "a sample came twice"
    alone = epoch_order(MILLIONS, 5, 3, SHARDS, 16)[: counts.sum()]
    np.testing.assert_array_equal(read.transpose(1, 0, 2).ravel(), alone)  # what one process would read, in its order
    shards = np.searchsorted(SHARDS, read[:, 10], side="right")
    assert len(np.unique(shards)) <= 2 * 16, "all processes read from the shards of one or two groups at a time"


@pytest.mark.parametrize("now", [256, 2048])
def test_a_thousand_processes_become_others_in_mid_epoch(one_order, now) -> None:
    first = TrainLoader(Numbers(MILLIONS), BATCH, seed=5, rank=1023, world_size=1024, shard_starts=SHARDS)
    first.sampler.set_epoch(3)
    for _, _batch in zip(range(90), first, strict=False):
        pass
    state = first.state_dict()
    assert (state["epoch"], state["position"]) == (3, 90)
    read = read_by_all(now, None, state)
    assert read.shape == (now, 10, BATCH // now)
    left = epoch_order(MILLIONS, 5, 3)[90 * BATCH : 100 * BATCH]
    np.testing.assert_array_equal(read.transpose(1, 0, 2).ravel(), left)


def test_a_thousand_processes_evaluate_every_sample() -> None:
    total = 50_003
    ranks = [list(EvaluationLoader(Numbers(total), 16, rank, 1024)) for rank in range(1024)]
    assert {len(batches) for batches in ranks} == {4}, "processes take part in equally many steps"
    counts = np.bincount(np.concatenate([batch["sample"] for batches in ranks for batch in batches]), minlength=total)
    assert counts.min() == 1 and counts.sum() - total == -total % 1024  # the short ones repeat the last sample
    assert (counts[:-1] == 1).all()
