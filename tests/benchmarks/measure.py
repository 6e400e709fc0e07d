"""Time and peak memory of a piece of work in a fresh process of its own, so that the measurements don't mix."""

import multiprocessing as mp
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil


def measure(work: Callable[..., Callable[[], Any]], *args: Any, repeats: int = 1) -> tuple[float, float]:
    """Best seconds and peak extra MiB of `work(*args)()`; `work` prepares its inputs and returns what is measured."""
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_run, args=(work, args, repeats, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def _run(work: Callable, args: tuple, repeats: int, queue: Any) -> None:
    run = work(*args)
    me = psutil.Process()
    before = me.memory_info().rss
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], me.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    done.set()
    watcher.join()
    queue.put((min(seconds), (peak[0] - before) / 2**20))
