"""Gradient checkpointing that does not count a batch twice in BatchNorm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], module: nn.Module, *inputs: Any) -> Any:
    """`function(*inputs)` that keeps no activations and runs again in the backward pass.

    Args:
        function: what is run, over layers of `module`.
        module: its BatchNorm layers keep their running statistics in the second run; dropout draws the same again.
        inputs: of the function.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    contexts = lambda: (nullcontext(), frozen_statistics(module))  # noqa: E731
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are, while batches are still normalised with their own."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, counts = [m.momentum for m in norms], [m.num_batches_tracked for m in norms]
    for norm, count in zip(norms, counts, strict=True):
        norm.momentum = 0.0
        norm.num_batches_tracked = None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
