"""What simulated sensors make of the truth: delays, noise, drift, the tared wrench and coarse vision (section 8.4)."""

from collections import deque
from typing import Generic, TypeVar

import numpy as np

from mmtrain.robot_tasks import GRIPPER_SENSORS, MARKERS

CAMERA_DELAY, GELSIGHT_DELAY, MCTAC_DELAY = 2, 2, 1  # frames of 1/24 s; wrench, poses and gripper come at once
SENSOR_DELAY = {"gelsight": GELSIGHT_DELAY, "mctac": MCTAC_DELAY}
FORCE_NOISE, TORQUE_NOISE = 0.3, 0.01  # N, N m: standard deviation of white noise on each reading
FORCE_DRIFT, TORQUE_DRIFT = 0.2, 0.005  # N, N m: standard deviation that the slow drift settles at
DRIFT_MEMORY = 1 - 1 / 240  # per frame: forgets within about 10 s
VISION_BIAS = (0.003, 0.02)  # m, rad: standard deviation of the error that stays for the episode
VISION_NOISE = (0.0005, 0.003)  # m, rad: standard deviation of the error of one frame

Value = TypeVar("Value")


class Delay(Generic[Value]):
    """Gives back what was put in a number of frames ago; at first the oldest there is.

    >>> late = Delay(2)
    >>> [late(value) for value in (1, 2, 3, 4)]
    [1, 1, 1, 2]
    """

    def __init__(self, frames: int) -> None:
        self._values: deque[Value] = deque(maxlen=frames + 1)

    def __call__(self, value: Value) -> Value:
        self._values.append(value)
        return self._values[0]


class WrenchSensor:
    """Force and torque at the tool's tip, [6] in N and N m: bias of the tool's weight taken off, noise and drift added.

    Args:
        bias: [6] true reading at rest, before anything is touched.
        rng: noise of this episode and arm.
    """

    _SCALE = np.repeat([FORCE_NOISE, TORQUE_NOISE], 3)
    _DRIFT = np.repeat([FORCE_DRIFT, TORQUE_DRIFT], 3)

    def __init__(self, bias: np.ndarray, rng: np.random.Generator) -> None:
        self._bias, self._rng = bias, rng
        self._drift = np.zeros(6)

    def __call__(self, truth: np.ndarray) -> np.ndarray:
        """One reading [6] of the true interaction force and torque [6]."""
        noise = self._rng.standard_normal((2, 6))
        step = np.sqrt(1 - DRIFT_MEMORY**2)
        self._drift = DRIFT_MEMORY * self._drift + step * self._DRIFT * noise[0]
        return truth - self._bias + self._drift + self._SCALE * noise[1]


class CoarseVision:
    """Stands for cameras: a pose with an error that stays for the episode and one of each frame (section 8.2)."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        bias = rng.standard_normal((2, 3))
        self._shift, self._turn = VISION_BIAS[0] * bias[0], VISION_BIAS[1] * bias[1]

    def __call__(self, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Position [3] and rotation [3, 3] as seen: 9 numbers (position, first and second column of the rotation)."""
        noise = self._rng.standard_normal((2, 3))
        pose = np.empty(9)
        pose[:3] = position + self._shift + VISION_NOISE[0] * noise[0]
        turned = small_rotation(self._turn + VISION_NOISE[1] * noise[1]) @ rotation
        pose[3:6], pose[6:] = turned[:, 0], turned[:, 1]
        return pose


def small_rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of a rotation vector [3] in radians (Rodrigues)."""
    x, y, z = (float(value) for value in vector)
    angle = (x * x + y * y + z * z) ** 0.5
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    if angle < 1e-12:
        return np.eye(3) + cross
    return np.eye(3) + (np.sin(angle) / angle) * cross + ((1 - np.cos(angle)) / angle**2) * (cross @ cross)


def frame_widths(arms: tuple[str, ...], markers: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a frame's number arrays (all float32), named as the store's arrays without `data/`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for side in arms:
        widths = {"tcp_pose": 9, "tcp_vel": 6, "tcp_wrench": 6, "gripper_width": 1, "gripper_force": 1}
        shapes |= {f"{side}_robot_{name}": (width,) for name, width in widths.items()}
        for number, sensor in GRIPPER_SENSORS.items():
            if sensor in markers:
                count = MARKERS[sensor][0] * MARKERS[sensor][1]
                shapes[f"{side}_gripper{number}_initial_marker"] = (count, 2)
                shapes[f"{side}_gripper{number}_marker_offset"] = (count, 2)
                shapes[f"{side}_gripper{number}_marker_offset_emb"] = (15,)
    return shapes | {"object_pose": (9,)}
