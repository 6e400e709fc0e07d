"""RDP's slow step on one thread: our sampling against a plain diffusers loop over the same UNet, in one run.

python -m tests.benchmarks.slow_step [--repeats 40] [--released]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from mmtrain.diffusion import ddim_scheduler, sample, timesteps
from mmtrain.rdp.networks import ConditionalUnet1D

SIM = {"input_dim": 6, "global_cond_dim": 40, "step_embed_dim": 32, "down_dims": (32, 64, 128), "kernel_size": 3}
STEPS = 8
RELEASED = {"input_dim": 16, "global_cond_dim": 1044, "kernel_size": 3}


@torch.no_grad()
def plain(unet: ConditionalUnet1D, x: Tensor, condition: Tensor, steps: int) -> Tensor:
    """The loop that one writes with diffusers."""
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        x = scheduler.step(unet(x, step, condition), step, x).prev_sample
    return x


@torch.no_grad()
def ours(unet: ConditionalUnet1D, x: Tensor, condition: Tensor, steps: int) -> Tensor:
    return sample(unet.denoiser(condition, timesteps(steps)), x, steps)


def compare(name: str, works: dict[str, Callable[[], Tensor]], repeats: int) -> None:
    """Run the works in turn, so that whatever else the machine does meets all; print medians against the first."""
    seconds: dict[str, list[float]] = {key: [] for key in works}
    results = {key: work() for key, work in works.items()}
    for _ in range(repeats):
        for key, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[key].append(time.perf_counter() - begin)
    first = next(iter(works))
    base = sorted(seconds[first])[repeats // 2]
    for key, values in seconds.items():
        middle = sorted(values)[repeats // 2]
        apart = (results[key] - results[first]).abs().max().item()
        print(f"{name:<26} {key:<24} {1e3 * middle:8.2f} ms  {middle / base:5.2f} x  largest difference {apart:.0e}")


def both(unet: ConditionalUnet1D, batch: int, sizes: dict) -> dict[str, Callable[[], Tensor]]:
    x, condition = torch.randn(batch, 8, sizes["input_dim"]), torch.randn(batch, sizes["global_cond_dim"])
    return {
        "plain diffusers loop": lambda: plain(unet, x, condition, STEPS),
        "ours": lambda: ours(unet, x, condition, STEPS),
    }


def report(repeats: int, released: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet = ConditionalUnet1D(**SIM).eval()
    for batch in (1, 50):
        compare(f"sim size, batch {batch}", both(unet, batch, SIM), repeats)
    if released:
        unet = ConditionalUnet1D(**RELEASED).eval()
        works = both(unet, 1, RELEASED)
        compare("released size, batch 1", works, 5)
        unet.arrange_for_cpu_inference()
        compare("  kernels channels-last", works, 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--released", action="store_true", help="the released size too: 0.8 GB, about a minute")
    options = parser.parse_args()
    report(options.repeats, options.released)
