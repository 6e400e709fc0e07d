"""Decoders, frames and plans for the tests of the runtime."""

import json
from pathlib import Path

import numpy as np

from mmtrain.normaliser import Affine, action_limits, limits
from mmtrain.rdp.chunks import Plan
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.robot_observations import stored_width
from mmtrain.robot_tasks import PolicySpec, policy_spec
from tests.golden.fill import array, fill

GOLDEN = Path(__file__).parents[1] / "golden" / "rdp"
TOUCH = {  # tag of the golden tokenizer -> action numbers, touch streams
    "peel_force": (4, {"left_robot_tcp_wrench": 6}),
    "wipe_gelsight": (10, {"left_gripper1_marker_offset_emb": 15}),
    "lift_two": (8, {"left_gripper2_marker_offset_emb": 15, "right_gripper1_marker_offset_emb": 15}),
}
SPECS: dict[str, PolicySpec] = {
    "peel_force": policy_spec("peel", "force", "rdp", "pose"),
    "wipe_gelsight": policy_spec("wipe", "gelsight", "rdp", "pose"),
    "lift_two": policy_spec("lift", "gelsight_mctac", "rdp", "pose"),
}


def golden_state(tag: str) -> dict[str, np.ndarray]:
    """Stand-in weights of a tokenizer of the released size."""
    manifest = json.loads((GOLDEN / f"manifest_at_{tag}.json").read_text())
    return {key: fill(key, tuple(entry["shape"])) for key, entry in manifest.items()}


def golden_affines(tag: str) -> dict[str, Affine]:
    width, touch = TOUCH[tag]
    affines = {key: limits(array(f"at.{tag}.fit.{key}", (200, size))) for key, size in touch.items()}
    return affines | {"action": action_limits(array(f"at.{tag}.fit.action", (200, width)))}


def golden_touch(tag: str) -> np.ndarray:
    """[3, 32, F], raw."""
    return np.concatenate([array(f"at.{tag}.{key}", (3, 32, size)) for key, size in TOUCH[tag][1].items()], -1)


def decoder(tag: str, dtype: type = np.float64) -> NumpyDecoder:
    return NumpyDecoder.from_state(golden_state(tag), golden_affines(tag), dtype)


def frames(spec: PolicySpec, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Random readings with proper rotations."""
    generator = np.random.default_rng(seed)
    identity = np.array([1.0, 0, 0, 0, 1, 0])
    made = []
    for _ in range(count):
        frame = {key: generator.standard_normal(stored_width(key)).astype(np.float32) for key in spec.low_dim}
        for side in spec.arms:
            rotation = identity + 0.3 * generator.standard_normal(6)
            frame[f"{side}_robot_tcp_pose"] = np.concatenate([generator.standard_normal(3), rotation])
        made.append(frame)
    return made


def condition_plan(made: int, dims: int, spec: PolicySpec, seed: int = 0, **changes: object) -> Plan:
    generator = np.random.default_rng((seed, made))
    base = np.tile([0.1, 0.2, 0.3, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0], len(spec.arms))
    return Plan(made, **{"rows": generator.standard_normal(dims), "base": base, **changes})


def action_plan(made: int, slope: float = 1.0, rows: int = 15, width: int = 4, offset: float = 0.0) -> Plan:
    """Diffusion Policy: every number is slope * (frame aimed at) + offset."""
    values = slope * (made + 2.0 * np.arange(1, rows + 1)) + offset
    return Plan(made, np.repeat(values[:, None], width, 1), period=2, num_rows=rows)
