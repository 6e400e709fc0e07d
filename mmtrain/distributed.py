"""The few collectives that the losses need, written so that they are the identity on one process."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes in the default group; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process in the default group; 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(local: Tensor) -> Tensor:
    """Concatenate [B, D] blocks of all processes in rank order to [n * B, D], without gradient.

    Every process must bring the same B; the train loaders of `datamodules` guarantee it.
    """
    local = local.detach().contiguous()
    if world_size() == 1:
        return local
    blocks = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(blocks, local)
    return torch.cat(blocks)


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of `value` over all processes, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def count_a_process(count: Tensor) -> Tensor:
    """Mean over the processes of how many things each has, at least one in all: what a mean over them divides by.

    The gradients of processes are averaged, so that sums divided by this come to the mean over all things, where means
    over each process's own would give every process the same weight.
    """
    return sum_over_processes(count).clamp(min=1) / world_size()


def sum_and_keep_own_rows(full: Tensor) -> Tensor:
    """Sum [n * B, D] over all processes and return the [B, D] block that belongs to this one."""
    if world_size() == 1:
        return full
    size = full.shape[0] // world_size()
    if dist.get_backend() == "nccl":
        own = full.new_empty(size, *full.shape[1:])
        dist.reduce_scatter_tensor(own, full.contiguous())
        return own
    full = sum_over_processes(full)  # gloo has no reduce-scatter that all supported torch releases share
    return full[rank() * size : (rank() + 1) * size].clone()


def gather_objects(value: Any) -> list[Any]:
    """What every process brings, in rank order: plain types."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process as soon as `flag` is True on one."""
    return bool(largest(int(flag), device))


def largest(value: int, device: torch.device) -> int:
    """The largest of the small whole numbers that the processes bring, on every process."""
    if world_size() == 1:
        return value
    found = torch.tensor([float(value)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


def rows_of_all(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of random numbers that are drawn for the global batch.

    Processes are seeded alike, so each draws the same numbers for all and takes its own rows; what is trained then does
    not depend on how many processes share the batch. One process draws what `draw(rows)` gives.

    Args:
        draw: makes the numbers of [n] samples, in rows.
        rows: samples of this process; the same on all.
    """
    if world_size() == 1:
        return draw(rows)
    return draw(world_size() * rows)[rank() * rows : (rank() + 1) * rows].clone()


def normal_like(tensor: Tensor) -> Tensor:
    """Standard normal numbers of the shape [B, ...] of a process's part of a batch, see `rows_of_all`."""
    shape, kind = tensor.shape[1:], {"device": tensor.device, "dtype": tensor.dtype}
    return rows_of_all(lambda rows: torch.randn(rows, *shape, **kind), len(tensor))


def uniform(rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers [rows] in [0, 1), see `rows_of_all`."""
    return rows_of_all(lambda every: torch.rand(every, device=device), rows)
