"""Runs a function in n gloo processes on this machine and collects what they return."""

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results of function(rank, world_size, *args), in rank order; the function must be importable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, port, queue, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    failed = [value for ok, value in results.values() if not ok]
    assert not failed, failed[0]
    return [results[rank][1] for rank in range(world_size)]


def _entry(function: Callable, rank: int, world_size: int, port: int, queue: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        queue.put((rank, (True, function(rank, world_size, *args))))
    except Exception:
        queue.put((rank, (False, traceback.format_exc())))
    dist.destroy_process_group()
