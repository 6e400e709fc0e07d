"""One pair of gloo processes for all metric tests: starting them costs more than all they compute."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def _join_group(counter, rendezvous: str) -> None:
    with counter.get_lock():
        rank = counter.value
        counter.value += 1
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    rendezvous: Path = tmp_path_factory.mktemp("gloo") / "rendezvous"
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, initializer=_join_group, initargs=(context.Value("i", 0), str(rendezvous))) as pool:
        yield pool
