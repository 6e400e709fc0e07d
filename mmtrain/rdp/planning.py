"""The slow step: raw observations of one or more robots in, plans out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmtrain.rdp.chunks import Plan
from mmtrain.robot_observations import base_pose, cut, relative_observation
from mmtrain.robot_tasks import PolicySpec

if TYPE_CHECKING:
    from mmtrain.rdp.module import PolicyModule


def prepare(observation: dict[str, np.ndarray], spec: PolicySpec) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The policy's inputs from a raw stack of observations, and the base pose.

    Args:
        observation: key -> [2, D] as the robot measures it, oldest first; pictures uint8 [2, H, W, 3].

    Returns:
        key -> [2, width] (poses relative to the newest if the policy wants that; pictures [2, 3, H, W]), and the
        newest absolute pose of every arm, [arms * pose_dim].
    """
    stack = {key: cut(key, np.asarray(observation[key], np.float64), width) for key, width in spec.low_dim.items()}
    base = base_pose(spec, stack)
    if spec.relative:
        stack = relative_observation(spec, stack)
    ready = {key: np.moveaxis(observation[key], -1, -3) for key in spec.images}
    return ready | {key: values.astype(np.float32) for key, values in stack.items()}, base


def start_noise(seeds: Sequence[tuple[int, int]], shape: tuple[int, int]) -> torch.Tensor:
    """Noise [B, *shape] to sample from: a function of each pair of numbers alone, whoever else is in the batch."""
    drawn = [np.random.default_rng(pair).standard_normal(shape, dtype=np.float32) for pair in seeds]
    return torch.from_numpy(np.stack(drawn))


def plans(
    module: "PolicyModule",
    observations: Sequence[dict[str, np.ndarray]],
    made: Sequence[int],
    seeds: Sequence[int],
) -> list[Plan]:
    """Plan for several robots at once.

    Args:
        observations: raw stacks, see `prepare`.
        made: frame of each newest observation.
        seeds: with `made` they seed the noise, so that an episode can be repeated.
    """
    spec = module.spec
    prepared = [prepare(observation, spec) for observation in observations]
    batch = {
        key: torch.from_numpy(np.stack([ready[key] for ready, _ in prepared])).to(module.device)
        for key in (*spec.images, *spec.low_dim)
    }
    noise = start_noise(list(zip(seeds, made, strict=True)), (module.length, module.channels)).to(module.device)
    with torch.no_grad():
        rows = module.rows(module.sampled(batch, noise)).cpu().numpy().astype(np.float64)
    return [
        Plan(
            made=frame,
            rows=row,
            base=base if spec.relative else None,
            first_prefix=spec.now + 1,
            period=spec.frames_per_step,
            num_rows=spec.horizon - spec.now,
        )
        for frame, row, (_, base) in zip(made, rows, prepared, strict=True)
    ]
