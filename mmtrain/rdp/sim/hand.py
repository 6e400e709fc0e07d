"""The invisible hand that holds the object, and the movement by which it disturbs an episode (section 8.4)."""

from typing import NamedTuple

import mujoco
import numpy as np

from mmtrain.rdp.sim.world import TIMESTEP


class Push(NamedTuple):
    """A movement of the hand: metres [3] and rotation vector [3] in radians, both in the world frame, in seconds."""

    shift: np.ndarray
    turn: np.ndarray
    seconds: float


class Hand:
    """Moves the first mocap body by a push, along a path of least jerk, once `is_moving` is set."""

    def __init__(self, data: mujoco.MjData, push: Push) -> None:
        self.is_moving = False
        self._data, self._push = data, push
        self._step, self._steps = 0, max(1, round(push.seconds / TIMESTEP))
        self._position, self._rotation = data.mocap_pos[0].copy(), data.mocap_quat[0].copy()
        self._angle = float(np.linalg.norm(push.turn))

    def move(self) -> None:
        """One sub-step of the movement; the last one ends it."""
        if not self.is_moving:
            return
        self._step += 1
        self.is_moving = self._step < self._steps
        time = self._step / self._steps
        share = time**3 * (10 - 15 * time + 6 * time**2)
        self._data.mocap_pos[0] = self._position + share * self._push.shift
        turn, rotation = np.empty(4), np.empty(4)
        mujoco.mju_axisAngle2Quat(turn, self._push.turn / max(self._angle, 1e-12), share * self._angle)
        mujoco.mju_mulQuat(rotation, turn, self._rotation)
        self._data.mocap_quat[0] = rotation
