"""RDP's fast step on one thread: NumPy and torch, carried from frame to frame, against running the prefix again.

python -m tests.benchmarks.fast_step [--repeats 3000]
Sizes as released for Wiping with GelSight: 15 touch numbers, condition 64, GRU 32, 10 action numbers. The prefix is run
the way the released code does it, the condition beside every frame through torch's GRU, and in NumPy over our own step.
All forms take turns in one process.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from mmtrain.normaliser import Normaliser, action_limits, limits
from mmtrain.rdp.chunks import Plan
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.rdp.fast_step_torch import TorchDecoder
from mmtrain.rdp.networks import TokenizerNetwork
from mmtrain.rdp.runtime import Controller, RuntimeSettings
from mmtrain.robot_observations import stored_width
from mmtrain.robot_tasks import policy_spec

SPEC = policy_spec("wipe", "gelsight", "rdp", "pose")
KEY = "left_gripper1_marker_offset_emb"
PREFIX = 23
BLOCK = 50  # calls of one form before the next has its turn


def pieces() -> tuple[TokenizerNetwork, Normaliser]:
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    network = TokenizerNetwork(SPEC.action_dim, SPEC.touch_dim).eval()
    normaliser = Normaliser({"action": SPEC.action_dim, KEY: SPEC.touch_dim})
    normaliser.set("action", action_limits(generator.standard_normal((99, SPEC.action_dim))))
    normaliser.set(KEY, limits(generator.standard_normal((99, SPEC.touch_dim))))
    return network, normaliser


def released_prefix(network: TokenizerNetwork, normaliser: Normaliser, condition: np.ndarray) -> Callable:
    rows = torch.from_numpy(condition)[None]

    @torch.no_grad()
    def run(touch: np.ndarray) -> np.ndarray:
        seen = normaliser.normalise(KEY, torch.from_numpy(touch)[None])
        return normaliser.unnormalise("action", network.decode(rows, seen)[:, -1])[0].numpy()

    return run


def whole_command(fast: NumpyDecoder, condition: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """`Controller.observe` and `command`, with a plan every 16 frames and the pose composed."""
    controller, identity = Controller(RuntimeSettings(), fast, SPEC), np.array([0, 0, 0, 1, 0, 0, 0, 1, 0.0])
    frame = {key: np.zeros(stored_width(key), np.float32) for key in SPEC.low_dim}
    step = 0

    def run(touch: np.ndarray) -> np.ndarray:
        nonlocal step
        controller.observe(frame | {KEY: touch, "left_robot_tcp_pose": identity}, step)
        if controller.wants_plan(step):
            controller.accept(Plan(step, condition, identity), step + 4)
        step += 1
        return controller.command(step - 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3000)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    network, normaliser = pieces()
    by_torch = TorchDecoder.from_network(network, normaliser)
    by_numpy = NumpyDecoder.from_state(network.state_dict(), {key: normaliser.affine(key) for key in normaliser.widths})
    generator = np.random.default_rng(1)
    condition = generator.standard_normal(by_numpy.condition_dim).astype(np.float32)
    touch = generator.standard_normal((PREFIX, SPEC.touch_dim)).astype(np.float32)
    numpy_state, torch_state = by_numpy.start(condition), by_torch.start(condition)
    prefix, command = released_prefix(network, normaliser, condition), whole_command(by_numpy, condition)
    reference = prefix(touch)
    for fast in (by_numpy, by_torch):
        np.testing.assert_allclose(fast.decode(condition, touch), reference, atol=1e-5)
    forms: dict[str, Callable[[], object]] = {
        "numpy, one step": lambda: by_numpy.step(numpy_state, touch[3]),
        "torch, one step": lambda: by_torch.step(torch_state, touch[3]),
        f"torch GRU, prefix of {PREFIX} (released)": lambda: prefix(touch),
        f"numpy, prefix of {PREFIX}": lambda: by_numpy.decode(condition, touch),
        "numpy, start of a plan": lambda: by_numpy.start(condition),
        "whole command (numpy)": lambda: command(touch[3]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for block in range(repeats // BLOCK + 1):
        for name, form in forms.items():
            for _ in range(BLOCK):
                begin = time.perf_counter()
                form()
                if block:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - begin)
    quantiles = {name: 1e6 * np.percentile(values, (50, 95, 99)) for name, values in seconds.items()}
    slowest = quantiles[f"torch GRU, prefix of {PREFIX} (released)"][0]
    print(f"{'':38}{'p50 us':>9}{'p95':>9}{'p99':>9}   released prefix / this, p50")
    for name, (p50, p95, p99) in quantiles.items():
        print(f"{name:38}{p50:9.1f}{p95:9.1f}{p99:9.1f}   {slowest / p50:.1f}")


if __name__ == "__main__":
    main()
