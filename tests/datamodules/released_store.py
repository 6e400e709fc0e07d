"""A small store as RDP's recorder leaves it, with all its faults, and what it was made of."""

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr

EPOCH = 1.7e9
ENDS = np.array([60, 105, 150])
MARKERS = {"gripper1": 63, "gripper2": 25}


def recorded(num_frames: int = 150, seed: int = 0) -> dict[str, np.ndarray]:
    """Streams of the left arm, Peeling: sound float32 numbers, RGB pictures."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.normal(0, 0.002, (num_frames, 3)), 0) + np.array([0.5, 0.0, 0.3])
    angle = np.cumsum(rng.normal(0, 0.01, num_frames))
    zero = np.zeros(num_frames)
    columns = [np.cos(angle), np.sin(angle), zero, -np.sin(angle), np.cos(angle), zero]
    pose = np.concatenate([walk, np.stack(columns, 1)], 1)
    width = 0.03 + 0.01 * np.sin(np.arange(num_frames) / 20)[:, None]
    target = np.concatenate([walk, width], 1)
    data = {
        "left_robot_tcp_pose": pose,
        "left_robot_tcp_vel": rng.normal(0, 0.05, (num_frames, 6)),
        "left_robot_tcp_wrench": rng.normal(0, 2.0, (num_frames, 6)),
        "left_robot_gripper_width": width,
        "left_robot_gripper_force": rng.normal(10, 1, (num_frames, 1)),
        "target": target,
        "action": labels(target, ENDS),
    }
    for gripper, markers in MARKERS.items():
        data[f"left_{gripper}_initial_marker"] = np.tile(rng.uniform(0, 1, (1, markers, 2)), (num_frames, 1, 1))
        data[f"left_{gripper}_marker_offset"] = rng.normal(0, 0.01, (num_frames, markers, 2))
    data = {key: values.astype(np.float32) for key, values in data.items()}
    for key in ("left_wrist_img", "left_gripper1_img"):
        data[key] = rng.integers(0, 256, (num_frames, 6, 8, 3), dtype=np.uint8)
    return data


def labels(target: np.ndarray, ends: np.ndarray, shift: int = 1) -> np.ndarray:
    """The state `shift` frames on, within the episode; the last of an episode repeats the one before."""
    starts = np.concatenate([[0], ends[:-1]])
    last = np.repeat(ends - 1, ends - starts)
    return target[np.clip(np.arange(len(target)) + shift, 0, last)]


def write(path: Path, data: dict[str, np.ndarray], ends: Any = ENDS) -> Path:
    """Write arrays as they are: pictures in chunks of 100 frames, zarr format 2."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for key, values in data.items():
        chunks = (100 if values.ndim == 4 else 10_000, *values.shape[1:])
        group.create_array(
            f"data/{key}",
            data=values,
            chunks=chunks,
            compressors=numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE),
        )
    group.create_array("meta/episode_ends", data=np.asarray(ends, np.int64))
    return path


def as_released(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with the faults: float32 epoch time, blue first, GelSight's raw field as its embedding."""
    faulty = {key: values[..., ::-1] if key == "left_wrist_img" else values for key, values in data.items()}
    faulty["timestamp"] = (EPOCH + np.arange(len(data["action"])) / 24).astype(np.float32)
    faulty["left_gripper1_marker_offset_emb"] = data["left_gripper1_marker_offset"].reshape(len(data["action"]), -1)
    return faulty
