"""The loss over 2 and 4 processes gives the single-process value and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmtrain import distributed
from mmtrain.rankclip.losses import (
    RowObjective,
    alip_objective,
    alip_weights,
    clip_objective,
    cyclip_objective,
    rankclip_objective,
    row_chunked_loss,
)
from tests.golden import load
from tests.golden.fill import array
from tests.processes import run_in_processes

METHODS = ("clip", "cyclip", "rankclip_epoch64", "rankclip_true", "alip")


class Encoders(nn.Module):
    """Linear encoders that start as the identity, so that the golden features come out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3)).double()
        for encoder in self.encoders:
            nn.init.eye_(encoder.weight)
        self.logit_scale = nn.Parameter(torch.tensor(float(np.log(1 / 0.07)), dtype=torch.float64))

    def forward(self, own: list[Tensor], method: str, gradient_scale: str) -> Tensor:
        """The loss of this process's rows; inside `forward`, as a training step is under DDP."""
        features = tuple(F.normalize(e(x), dim=1) for e, x in zip(self.encoders, own, strict=False))
        objective = {
            "clip": clip_objective(),
            "cyclip": cyclip_objective(0.25, 0.25),
            "rankclip_epoch64": rankclip_objective(2.0, eps=1e-10),
            "rankclip_true": rankclip_objective(2.0),
            "alip": weighted(features) if method == "alip" else None,
        }[method]
        return row_chunked_loss(objective, features, self.logit_scale, chunk=7, gradient_scale=gradient_scale)[0]


def weighted(features: tuple[Tensor, ...]) -> RowObjective:
    image, text, caption = features
    pairs = [(text, caption), (image, text), (image, caption)]
    similarities = torch.stack([(a * b).sum(-1).detach() for a, b in pairs])
    means = distributed.sum_over_processes(similarities.mean(-1)) / distributed.world_size()
    weights = alip_weights(similarities, means)
    return alip_objective(weights[0] * weights[1], weights[0] * weights[2], distributed.rank() * len(image))


def inputs() -> list[Tensor]:
    a = array("rankclip.image.B128", (128, 64))
    b = np.float32(0.5) * a + array("rankclip.text.B128", (128, 64))
    c = np.float32(0.8) * a + array("rankclip.caption.B128", (128, 64))
    return [torch.from_numpy(x).double() for x in (a, b, c)]


def loss_and_gradients(rank: int, world_size: int, method: str, gradient_scale: str) -> tuple[float, list[np.ndarray]]:
    model = Encoders()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world_size > 1 else model
    size = 128 // world_size
    own = [x[rank * size : (rank + 1) * size] for x in inputs()]
    loss = wrapped(own if method == "alip" else own[:2], method, gradient_scale)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss.item(), [g.numpy() for g in grads]


def all_methods(rank: int, world_size: int) -> dict:
    cases = [(m, s) for m in METHODS for s in ("exact", "reference")]
    return {case: loss_and_gradients(rank, world_size, *case) for case in cases}


@pytest.mark.parametrize("world_size", [2, 4])
def test_n_processes_equal_one(world_size: int) -> None:
    single = all_methods(0, 1)
    golden = load("rankclip/losses_float64.npz")
    for results in run_in_processes(all_methods, world_size):
        for (method, scale), (loss, grads) in results.items():
            expected_loss, expected = single[method, scale]
            assert loss == pytest.approx(expected_loss, rel=1e-10)
            if f"B128/init/{method}/loss" in golden:
                assert loss == pytest.approx(float(golden[f"B128/init/{method}/loss"]), rel=1e-9)
            share = 1 if scale == "exact" else world_size  # the released scaling divides encoder gradients by n
            (scale_grad, *encoder_grads), (scale_expected, *encoder_expected) = (
                sorted(g, key=lambda x: x.ndim) for g in (grads, expected)
            )
            np.testing.assert_allclose(scale_grad, scale_expected, rtol=1e-10)
            for got, want in zip(encoder_grads, encoder_expected, strict=True):
                np.testing.assert_allclose(got * share, want, rtol=1e-9, atol=1e-12)
