"""A scripted person who peels: approaches by coarse vision, holds the force by feel, takes up a broken strip (8.4)."""

import math
from collections import deque
from typing import Any, Literal

import numpy as np

from mmtrain.poses import rotation_from_ortho6d
from mmtrain.rdp.sim.peel import BLADE_RADIUS, LENGTH, RADIUS

Mode = Literal["tactar", "vr_only"]

APPROACH = 0.006  # m a frame towards the hover point
HOVER, HOVER_NEAR = 0.025, 0.004  # m above a cucumber of middling thickness where the descent begins; how near counts
SURFACE = sum(RADIUS) / 2  # m from the axis, as far as a look tells
DESCENT = 0.0035  # m a frame
TOUCH_FORCE = 1.5  # N that counts as contact
COMPLIANCE, MOST_HEIGHT_STEP = 0.0005, 0.0035  # m per N and frame; m a frame
FORCE, ADVANCE = (6.5, 7.5), (0.0015, 0.0017)  # N and m a frame, drawn for each episode
ADVANCE_BAND = (4.0, 11.0)  # N: outside it the person waits until the force is right again
OVERRUN = 0.009  # m before and behind the length that are peeled too: vision and grasp are off by millimetres
RETREAT = 0.006  # m that are gone back after a loss of contact
LOST_FRAMES = 2  # frames without force until contact counts as lost
SIDE_STEP = 0.0035  # m a frame along the surface
SEEING = 0.35  # share of a new look in the smoothed pose of the cucumber
LIFT_STEP, LIFT_FRAMES = 0.005, 10
PRESS = 0.005  # m: how deep an operator who only watches presses
WATCH_COMPLIANCE = 0.00008  # m per N and frame: late eyes must act slowly, or the hand begins to swing
WATCH_BAND = (1.0, 14.0)  # N: eyes do not tell a good press from a fair one
WATCH_NOISE, WATCH_MEMORY, WATCH_DELAY = 0.002, 0.95, 6  # m, share kept a frame, frames (0.25 s)


class PeelExpert:
    """Peels along the axis at 1.5 to 1.7 mm a frame, so that a lost contact can be made up for within the 10 s.

    In mode "tactar" it uses what frames hold: TCP position, wrench and the coarse, late `object_pose`; and it sees
    that the blade is stuck. In mode "vr_only" the force loop is replaced by watching the gap (`info["gap"]`) with 2 mm
    of slowly varying error, 0.25 s late. `done` turns True when the blade has been lifted off.

    Args:
        rng: draws this episode's force, speed and errors.
    """

    def __init__(self, mode: Mode = "tactar", rng: np.random.Generator | None = None) -> None:
        self.mode = mode
        self._rng = np.random.default_rng() if rng is None else rng
        self._force, self._advance = self._rng.uniform(*FORCE), self._rng.uniform(*ADVANCE)
        watches = mode == "vr_only"
        self._compliance, self._band = (WATCH_COMPLIANCE, WATCH_BAND) if watches else (COMPLIANCE, ADVANCE_BAND)
        self.phase, self.done = "approach", False
        self._along = -(LENGTH / 2 + OVERRUN)
        self._lost, self._left = 0, 0
        self._position: np.ndarray | None = None
        self._object: np.ndarray | None = None
        self._error = WATCH_NOISE * self._rng.standard_normal()
        self._gaps: deque[float] = deque(maxlen=WATCH_DELAY + 1)

    def act(self, frame: dict[str, np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """The next command [4]: x y z of the TCP in m, width."""
        self._look(frame, info)
        rotation = rotation_from_ortho6d(self._object[3:])
        local = (self._position - self._object[:3]) @ rotation
        local[1] -= _aside(rotation)
        touch = self._touch(frame)
        if self.phase == "approach":
            step = self._approach(local, touch)
        elif self.phase == "lift":
            step = np.array([0.0, 0.0, 0.0 if self.done else LIFT_STEP])
            self._left += 1
            self.done = self._left >= LIFT_FRAMES
        else:
            step = self._peel(local, touch, info.get("stuck", False))
        self._position = self._position + rotation @ step
        return np.concatenate([self._position, frame["left_robot_gripper_width"]])

    def _look(self, frame: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        seen = frame["object_pose"].astype(np.float64)
        if self._object is None:
            self._object = seen
            self._position = frame["left_robot_tcp_pose"][:3].astype(np.float64)
        self._object = self._object + SEEING * (seen - self._object)
        self._error = WATCH_MEMORY * self._error
        self._error += WATCH_NOISE * math.sqrt(1 - WATCH_MEMORY**2) * self._rng.standard_normal()
        self._gaps.append(info.get("gap", 0.0) + self._error)

    def _touch(self, frame: dict[str, np.ndarray]) -> float:
        """Newtons felt, or, for one who only watches, what the gap of a quarter second ago lets expect."""
        if self.mode == "tactar":
            return float(frame["left_robot_tcp_wrench"][2])
        return self._force * -self._gaps[0] / PRESS

    def _approach(self, local: np.ndarray, touch: float) -> np.ndarray:
        to_go = np.array([self._along, 0.0, SURFACE + BLADE_RADIUS + HOVER]) - local
        distance = float(np.linalg.norm(to_go))
        if distance < HOVER_NEAR or touch > TOUCH_FORCE:
            self.phase = "search"
        return to_go * min(1.0, APPROACH / max(distance, 1e-9))

    def _peel(self, local: np.ndarray, touch: float, stuck: bool) -> np.ndarray:
        """One step in the cucumber's frame: height by force, progress only while the force is right."""
        height = max(-MOST_HEIGHT_STEP, min(MOST_HEIGHT_STEP, self._compliance * (touch - self._force)))
        self._lost = 0 if touch > TOUCH_FORCE else self._lost + 1
        if stuck:
            return np.array([0.0, 0.0, height])
        if self.phase == "search":
            height = -DESCENT if touch < TOUCH_FORCE and self.mode == "tactar" else height
            self.phase = "search" if touch < TOUCH_FORCE else "peel"
        elif self._lost >= LOST_FRAMES:
            self.phase = "search"
            self._along -= RETREAT
        elif self._band[0] < touch < self._band[1]:
            self._along += self._advance
            if self._along > LENGTH / 2 + OVERRUN:
                self.phase = "lift"
        ahead = max(-SIDE_STEP, min(SIDE_STEP, self._along - float(local[0])))
        aside = max(-SIDE_STEP, min(SIDE_STEP, -float(local[1])))
        return np.array([ahead, aside, height])


def _aside(rotation: np.ndarray) -> float:
    """Metres beside the axis at which the blade's middle touches a cucumber [3, 3] that is turned about its axis."""
    _, blade_y, blade_z = rotation[1].tolist()  # the blade's line, the world's y, seen from the cucumber
    return -(SURFACE + BLADE_RADIUS) * blade_z / math.hypot(blade_y, blade_z)
