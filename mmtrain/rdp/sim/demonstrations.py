"""Demonstrations recorded from the scripted experts, in the layout of the released stores (specification section 1.3).

Needs nothing but NumPy and the simulation: a data module writes what `Demonstrations.episodes` yields into a store.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np

from mmtrain.config_errors import UserError, nearest
from mmtrain.marker_pca import MarkerPca
from mmtrain.rdp import sim
from mmtrain.rdp.sim.experts import Expert
from mmtrain.rdp.sim.tactile import press_pca
from mmtrain.robot_tasks import ARMS, FRAME_RATE, MARKERS, POSE_DIM, TACTILE_IMAGE, Task

Mode = Literal["tactar", "vr_only"]

WORLD = 2  # raise it with every change of worlds or experts: stores made before are then refused
EPISODE_SEEDS = 1000  # episodes that one seed can number
EVALUATION_SEEDS = 100_000  # evaluation numbers its episodes from here on
PICTURE = 64  # pixels of a tactile picture's side
EPISODE_SPACING = 60.0  # s between the first frames of two episodes

# Half of the peeling and wiping demonstrations are perturbed in contact: the reaction must be seen to be learned (2).
VARIATION_CYCLES = {
    "peel": ("none", "after", "before", "after"),
    "wipe": ("none", "after", "before", "after"),
    "lift": ("soft", "hard"),
}


class Demonstrations:
    """Episodes of one task, driven by its expert. The same arguments give the same numbers.

    Args:
        task: "peel", "wipe" or "lift".
        episodes: how many, 1 to 1000; their variations take turns (a quarter none, a quarter before, a half after;
            Lifting: soft and hard).
        mode: "tactar" feels the contact force; "vr_only" has vision with noise and delay in its place.
        seed: 0 to 99; seeds of worlds stay below 100000, where those of evaluation begin.
        images: record the left GelSight's picture (64 x 64) too.

    Attributes:
        outcomes: what the world says of every episode yielded by the last `episodes()`, in order.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(self, task: Task, episodes: int = 60, mode: Mode = "tactar", seed: int = 0, images: bool = False):
        for name, value, known in (("task", task, get_args(Task)), ("mode", mode, get_args(Mode))):
            if value not in known:
                guess = nearest(str(value), known)
                raise UserError(f"demonstrations.{name}: {value} is not known{_did_you_mean(guess)} {list(known)}")
        if not 1 <= episodes <= EPISODE_SEEDS:
            raise UserError(f"demonstrations.episodes: {episodes}, must be 1 to {EPISODE_SEEDS}")
        if not 0 <= seed < EVALUATION_SEEDS // EPISODE_SEEDS:
            raise UserError(
                f"demonstrations.seed: {seed}, must be 0 to {EVALUATION_SEEDS // EPISODE_SEEDS - 1}, "
                f"as worlds from {EVALUATION_SEEDS} on are kept for evaluation"
            )
        self.task, self.count, self.mode, self.seed, self.images = task, episodes, mode, seed, images
        self.outcomes: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.count

    def describe(self) -> dict[str, Any]:
        """What a store must have been made from to be this one; plain types."""
        return {
            "made_by": "mmtrain.rdp.sim",
            "world": WORLD,
            "task": self.task,
            "episodes": self.count,
            "mode": self.mode,
            "seed": self.seed,
            "images": self.images,
        }

    def variation(self, index: int) -> str:
        """Variation of an episode."""
        cycle = VARIATION_CYCLES[self.task]
        return cycle[index % len(cycle)]

    def world_seed(self, index: int) -> int:
        """Seed of an episode's world; no two data seeds share one."""
        return self.seed * EPISODE_SEEDS + index

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield each episode as arrays [T, ...]: every stream of a frame, `timestamp` (float64 s), `target`, `action`.

        `variation` is the exception: one bytes scalar. All episodes are kept, the failed ones too: see `outcomes`.
        """
        self.outcomes = []
        env = sim.make(self.task, images=(TACTILE_IMAGE,) if self.images else (), size=PICTURE)
        try:
            for index in range(self.count):
                frames, outcome = self._record(env, index)
                self.outcomes.append(outcome)
                yield self._episode(frames, index)
        finally:
            env.close()

    def mean_score(self) -> float:
        """Mean score of the episodes yielded so far; NaN before the first."""
        scores = [outcome["score"] for outcome in self.outcomes]
        return float(np.mean(scores)) if scores else float("nan")

    def pca(self) -> dict[str, MarkerPca]:
        """The marker embedding of every kind of sensor, as used for the episodes."""
        return {sensor: press_pca(sensor) for sensor in MARKERS}

    def _record(self, env: Any, index: int) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
        seed = self.world_seed(index)
        expert = Expert(self.task, self.mode, np.random.default_rng([seed, 1]))
        frame, info = env.reset(seed=seed, options={"variation": self.variation(index)})
        frames, over = [frame], False
        while not over:
            frame, _, terminated, truncated, info = env.step(expert.act(frame, info))
            frames.append(frame)
            over = terminated or truncated
        return frames, env.unwrapped.outcome()

    def _episode(self, frames: list[dict[str, np.ndarray]], index: int) -> dict[str, np.ndarray]:
        arrays = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
        target = measured_states(arrays, self.task)
        arrays |= {
            "timestamp": index * EPISODE_SPACING + np.arange(len(frames)) / FRAME_RATE,
            "target": target,
            "action": next_states(target),
            "variation": np.array(self.variation(index), "S8"),
        }
        return arrays


def measured_states(arrays: dict[str, np.ndarray], task: Task) -> np.ndarray:
    """`target` [T, A] float32 of section 1.4: measured poses of all arms, then their gripper widths."""
    poses = [arrays[f"{side}_robot_tcp_pose"][..., : POSE_DIM[task]] for side in ARMS[task]]
    widths = [arrays[f"{side}_robot_gripper_width"] for side in ARMS[task]]
    return np.concatenate(poses + widths, axis=-1).astype(np.float32)


def next_states(target: np.ndarray) -> np.ndarray:
    """`action` [T, A] of section 1.4: the state one frame later; the last one repeats the one before.

    Example:
        >>> next_states(np.array([[1.0], [2.0], [4.0]])).ravel()
        array([2., 4., 4.])
    """
    return np.concatenate([target[1:], target[-1:]])


def _did_you_mean(guess: str | None) -> str:
    return f", did you mean {guess}?" if guess else ""
