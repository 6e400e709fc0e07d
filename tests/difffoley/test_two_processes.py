"""What two processes do as one does: CAVP's loss, the evaluation of sounds, accuracies of pairs. One spawn for all."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmtrain.difffoley.alignment import PairAccuracy
from mmtrain.difffoley.losses import cavp_loss
from tests.difffoley.test_evaluate import CLIPS, batches, evaluation, other_sound
from tests.processes import run_in_processes


class Encoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = (nn.Linear(16, 16, bias=False).double() for _ in range(2))
        for encoder in (self.video, self.audio):
            nn.init.eye_(encoder.weight)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, video: Tensor, audio: Tensor) -> Tensor:
        features = F.normalize(self.video(video), dim=-1), F.normalize(self.audio(audio), dim=-1)
        return cavp_loss(*features, self.logit_scale.exp(), 3, 0.7)[0]


def loss_and_gradients(rank: int, world_size: int) -> tuple[float, list[np.ndarray]]:
    network = Encoders()
    generator = torch.Generator().manual_seed(3)
    video, audio = (torch.randn(12, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    own = slice(rank * 12 // world_size, (rank + 1) * 12 // world_size)
    wrapped = DistributedDataParallel(network) if world_size > 1 else network
    loss = wrapped(video[own], audio[own])
    loss.backward()
    return loss.item(), [p.grad.numpy() for p in network.parameters()]


def evaluate(rank: int, world_size: int) -> tuple[dict[str, float], list[str], str, list[dict[str, Any]]]:
    """Clip 3 comes on both processes, as a sampler's padding does."""
    shards = [batches([0, 1, 2, 3, 4]), batches([3, *range(5, CLIPS)])]
    own = evaluation()
    for batch in shards[rank] if world_size > 1 else [*shards[0], *shards[1]]:
        own.add(batch, *other_sound(batch), {"diffusion": 4.0})
    return own.compute(), own.ids(), own.protocol().split(";")[0], own.records()


def pair_accuracies(rank: int, world_size: int) -> dict[str, float]:
    """5 pairs on 2 processes: the last one comes twice."""
    logits = torch.tensor([2.0, -1.0, 1.0, -3.0, 4.0])
    match, kind = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2])
    own = torch.tensor([min(rank + world_size * i, 4) for i in range(-(-5 // world_size))])
    metric = PairAccuracy()
    metric.update(logits[own], match[own], kind[own], own)
    return metric.compute()


def everything(rank: int, world_size: int) -> tuple[Any, Any, Any]:
    """Runs in a process."""
    given = rank, world_size
    return loss_and_gradients(*given), evaluate(*given), pair_accuracies(*given)


def test_two_processes_equal_one() -> None:
    (loss, gradients), (expected, ids, protocol, records), accuracies = everything(0, 1)
    results = run_in_processes(everything, 2)
    assert np.mean([result[0][0] for result in results]) == pytest.approx(loss, rel=1e-12)
    assert accuracies["accuracy"] == 2 / 5 and accuracies["accuracy_wrong"] == 0
    for (_, found), (values, *rest), pairs in results:
        for got, wanted in zip(found, gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-14)
        assert values.keys() == expected.keys()
        for key, value in expected.items():
            assert key.startswith("seconds") or values[key] == pytest.approx(value, abs=1e-5), key
        assert rest == [ids, protocol, records]
        assert pairs == accuracies
