"""A small made-up robot store in the released layout, for tests, benchmarks and demos: smooth motion, no physics."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from mmtrain.marker_pca import MarkerPca, embed, fit
from mmtrain.robot_tasks import ARMS, CAMERAS, FRAME_RATE, MARKERS, OBJECT_POSE, POSE_DIM, TACTILE_IMAGE, Task

START = 1_700_000_000.0  # seconds since 1970 of the first frame: only float64 tells frames apart there


class SyntheticDemonstrations:
    """Episodes of one task whose streams are smooth seeded curves, consistent with each other.

    `target` is the measured state, `action` the state one frame later, embeddings come from `pca()`. A picture is of
    one colour: red counts the frames of the store (modulo 256), green its hundreds, blue tells the camera.

    Args:
        frames: of the shortest episode; each next one has 3 more.
        images: record the cameras of the task and the GelSight's picture, `size` = (height, width).
    """

    def __init__(
        self,
        task: Task,
        episodes: int = 4,
        frames: int = 40,
        images: bool = False,
        size: tuple[int, int] = (12, 16),
        seed: int = 0,
    ) -> None:
        self.task, self.count, self.frames = task, episodes, frames
        self.images, self.size, self.seed = images, size, seed

    def __len__(self) -> int:
        return self.count

    def describe(self) -> dict[str, Any]:
        """All arguments."""
        return {"made_by": "synthetic", **{name: value for name, value in vars(self).items()}}

    def pca(self) -> dict[str, MarkerPca]:
        """A matrix for each kind of sensor."""
        generator = np.random.default_rng(self.seed)
        return {
            sensor: fit(0.02 * generator.standard_normal((200, rows * columns, 2)))
            for sensor, (rows, columns) in MARKERS.items()
        }

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """Each episode as arrays [T, ...] and the scalar `variation`."""
        start, matrices = 0, self.pca()
        for number in range(self.count):
            length = self.frames + 3 * number
            yield self._episode(np.random.default_rng((self.seed, number)), start, length, matrices)
            start += length

    def _episode(
        self, generator: np.random.Generator, start: int, length: int, matrices: dict[str, MarkerPca]
    ) -> dict[str, np.ndarray]:
        curve = lambda width, size: smooth(generator, length, width) * size  # noqa: E731
        streams: dict[str, np.ndarray] = {"timestamp": START + (start + np.arange(length)) / FRAME_RATE}
        streams[OBJECT_POSE] = poses(curve(3, 0.1), curve(6, 0.2))
        for side in ARMS[self.task]:
            streams[f"{side}_robot_tcp_pose"] = poses(curve(3, 0.2), curve(6, 0.3))
            streams[f"{side}_robot_tcp_vel"] = curve(6, 0.1)
            streams[f"{side}_robot_tcp_wrench"] = curve(6, 5.0)
            streams[f"{side}_robot_gripper_width"] = 0.04 + curve(1, 0.01)
            streams[f"{side}_robot_gripper_force"] = 5 + curve(1, 1.0)
            for gripper, sensor in ((1, "gelsight"), (2, "mctac")):
                rows, columns = MARKERS[sensor]
                name = f"{side}_gripper{gripper}"
                offsets = curve(rows * columns * 2, 0.02).reshape(length, -1, 2).astype(np.float32)
                streams[f"{name}_initial_marker"] = np.full_like(offsets, 0.5)
                streams[f"{name}_marker_offset"] = offsets
                streams[f"{name}_marker_offset_emb"] = embed(matrices[sensor], offsets)
        if self.images:
            keys = sorted({*CAMERAS[self.task], TACTILE_IMAGE})
            streams |= {key: self._pictures(start, length, place) for place, key in enumerate(keys)}
        pose_dim = POSE_DIM[self.task]
        tcp = [streams[f"{side}_robot_tcp_pose"][:, :pose_dim] for side in ARMS[self.task]]
        target = np.concatenate([*tcp, *(streams[f"{side}_robot_gripper_width"] for side in ARMS[self.task])], axis=1)
        streams |= {"target": target, "action": np.concatenate([target[1:], target[-1:]])}
        return streams | {"variation": np.bytes_(b"none")}

    def _pictures(self, start: int, length: int, camera: int) -> np.ndarray:
        frames = start + np.arange(length)
        colour = np.stack([frames % 256, frames // 100, np.full(length, 10 * (camera + 1))], axis=1).astype(np.uint8)
        return np.broadcast_to(colour[:, None, None], (length, *self.size, 3)).copy()


def smooth(generator: np.random.Generator, length: int, width: int) -> np.ndarray:
    """Slow curves [length, width] of about unit size: three sines each."""
    time = np.arange(length)[:, None, None] / FRAME_RATE
    rate, phase, size = generator.uniform(0.2, 1.5, (3, 1, width, 3)) * np.array([2.0, 6.0, 0.5]).reshape(3, 1, 1, 1)
    return (size * np.sin(rate * time + phase)).sum(axis=-1)


def poses(position: np.ndarray, wobble: np.ndarray) -> np.ndarray:
    """9-number poses [T, 9] near the identity: orthonormal columns of the identity's plus `wobble` [T, 6]."""
    x = np.array([1.0, 0, 0]) + wobble[:, :3]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.array([0, 1.0, 0]) + wobble[:, 3:]
    y -= (x * y).sum(axis=1, keepdims=True) * x
    return np.concatenate([position, x, y / np.linalg.norm(y, axis=1, keepdims=True)], axis=1)
