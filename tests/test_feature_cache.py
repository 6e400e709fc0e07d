"""Features on disk: what was written comes back in order, and other weights or settings have another place."""

from pathlib import Path

import torch
from torch import nn

from mmtrain.feature_cache import FeatureCache, fingerprint


def batch(number: int) -> dict[str, torch.Tensor]:
    return {"image": torch.full((3, 2), float(number)), "id": torch.arange(3) + 3 * number}


def test_rows_come_back_in_order_and_the_last_part_may_be_missing(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "x", rank=1, every=2)
    assert list(cache.load()) == [] and cache.batches == 0
    for number in range(5):
        cache.add(batch(number))
    again = FeatureCache(tmp_path / "x", rank=1)
    rows = list(again.load())
    assert again.batches == 4, "the fifth was still waiting when the process was killed"
    assert torch.equal(torch.cat([r["id"] for r in rows]), torch.arange(12))
    again.add(batch(4))
    again.add({})  # nothing of this batch could be read, yet it is done
    again.flush()
    third = FeatureCache(tmp_path / "x", rank=1)
    assert torch.equal(torch.cat([r["id"] for r in third.load()]), torch.arange(15)) and third.batches == 6
    assert list(FeatureCache(tmp_path / "x", rank=0).load()) == []


def test_a_broken_part_and_what_follows_are_computed_again(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, every=1)
    for number in range(3):
        cache.add(batch(number))
    (tmp_path / "rank0-00001.pt").write_bytes(b"cut")
    again = FeatureCache(tmp_path, every=1)
    assert len(list(again.load())) == again.batches == 1
    again.add(batch(1))
    assert [int(r["id"][0]) for r in FeatureCache(tmp_path).load()] == [0, 3, 6]


def test_a_disk_that_refuses_costs_the_cache_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(tmp_path / "file", every=1)
    cache.add(batch(0))
    assert cache.batches == 0


def test_the_fingerprint_sees_weights_and_settings() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    first = fingerprint(net, precision="32-true")
    assert first == fingerprint(net, precision="32-true") != fingerprint(net, precision="bf16-mixed")
    with torch.no_grad():
        net[0].weight[0, 0] += 1e-6
    assert fingerprint(net, precision="32-true") != first
