"""A scripted person who wipes: approaches by coarse vision, holds the force by feel, searches after a loss (8.4)."""

import math
from collections import deque
from typing import Any, Literal

import numpy as np

from mmtrain.poses import rotation_from_ortho6d
from mmtrain.rdp.sim.wipe import SEGMENT, SEGMENTS

Mode = Literal["tactar", "vr_only"]

APPROACH = 0.005  # m a frame towards the hover point
HOVER, HOVER_NEAR = 0.025, 0.004  # m above the board where the descent begins, and how near counts
DESCENT = 0.0035  # m a frame
TOUCH_FORCE = 1.5  # N that counts as contact
COMPLIANCE, MOST_HEIGHT_STEP = 0.0005, 0.0035  # m per N and frame; m a frame
FORCE, ADVANCE = (6.5, 7.5), (0.0012, 0.0014)  # N and m a frame, drawn for each episode
ADVANCE_BAND = (4.0, 11.0)  # N: outside it the person waits until the force is right again
OVERRUN = 0.008  # m before and behind the mark that are wiped too: vision is off by millimetres
RETREAT = 0.005  # m that are wiped again after a loss of contact
LOST_FRAMES = 2  # frames without force until contact counts as lost
SIDE_STEP = 0.0035  # m a frame along the surface
TURN, MOST_SLOPE = 0.035, 0.4  # rad a frame; slope
SEEING = 0.35  # share of a new look in the smoothed pose of the board
SLOPE_MEMORY = 0.06  # share of a new step in the slope that is felt
LIFT_STEP, LIFT_FRAMES = 0.005, 10
PRESS = 0.005  # m: how deep an operator who only watches presses
WATCH_COMPLIANCE = 0.00008  # m per N and frame: late eyes must act slowly, or the hand begins to swing
WATCH_BAND = (1.0, 14.0)  # N: eyes do not tell a good press from a fair one
WATCH_NOISE, WATCH_MEMORY, WATCH_DELAY = 0.002, 0.95, 6  # m, share kept a frame, frames (0.25 s)


class WipeExpert:
    """Wipes along the mark at 1.2 to 1.4 mm a frame; `done` turns True when the tool has left the board.

    In mode "tactar" it uses what frames hold: TCP pose, wrench and the coarse, late `object_pose`. In mode "vr_only"
    the force loop is replaced by watching the gap (`info["gap"]`) with 2 mm of slowly varying error, 0.25 s late.

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
        self._along = -(SEGMENTS * SEGMENT / 2 + OVERRUN)
        self._slope, self._lost, self._left = 0.0, 0, 0
        self._position: np.ndarray | None = None
        self._board: np.ndarray | None = None
        self._error = WATCH_NOISE * self._rng.standard_normal()
        self._gaps: deque[float] = deque(maxlen=WATCH_DELAY + 1)

    def act(self, frame: dict[str, np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """The next command [10]: x y z, first and second column of the rotation, width."""
        self._look(frame, info)
        position, rotation = self._board[:3], rotation_from_ortho6d(self._board[3:])
        local = (self._position - position) @ rotation
        touch = self._touch(frame)
        if self.phase == "approach":
            step = self._approach(local)
        elif self.phase == "lift":
            step = np.array([0.0, 0.0, 0.0 if self.done else LIFT_STEP])
            self._left += 1
            self.done = self._left >= LIFT_FRAMES
        else:
            step = self._wipe(local, touch)
        self._position = self._position + rotation @ step
        columns = self._orientation(rotation)
        return np.concatenate([self._position, columns, frame["left_robot_gripper_width"]])

    def _look(self, frame: dict[str, np.ndarray], info: dict[str, Any]) -> None:
        seen = frame["object_pose"].astype(np.float64)
        if self._board is None:
            self._board = seen
            self._position = frame["left_robot_tcp_pose"][:3].astype(np.float64)
            self._axis = rotation_from_ortho6d(frame["left_robot_tcp_pose"][3:])[:, 2]
        self._board = self._board + SEEING * (seen - self._board)
        self._error = WATCH_MEMORY * self._error
        self._error += WATCH_NOISE * math.sqrt(1 - WATCH_MEMORY**2) * self._rng.standard_normal()
        self._gaps.append(info.get("gap", 0.0) + self._error)

    def _touch(self, frame: dict[str, np.ndarray]) -> float:
        """Newtons felt, or, for one who only watches, what the gap of a quarter second ago lets expect."""
        if self.mode == "tactar":
            return float(frame["left_robot_tcp_wrench"][2])
        return self._force * -self._gaps[0] / PRESS

    def _approach(self, local: np.ndarray) -> np.ndarray:
        to_go = np.array([self._along, 0.0, HOVER]) - local
        distance = float(np.linalg.norm(to_go))
        if distance < HOVER_NEAR:
            self.phase = "search"
        return to_go * min(1.0, APPROACH / max(distance, 1e-9))

    def _wipe(self, local: np.ndarray, touch: float) -> np.ndarray:
        """One step in the board's frame: height by force, progress only while the force is right."""
        height = max(-MOST_HEIGHT_STEP, min(MOST_HEIGHT_STEP, self._compliance * (touch - self._force)))
        self._lost = 0 if touch > TOUCH_FORCE else self._lost + 1
        if self.phase == "search":
            height = -DESCENT if touch < TOUCH_FORCE and self.mode == "tactar" else height
            self.phase = "search" if touch < TOUCH_FORCE else "wipe"
        elif self._lost >= LOST_FRAMES:
            self.phase = "search"
            self._along -= RETREAT
        elif self._band[0] < touch < self._band[1]:
            self._along += self._advance
            self._slope += SLOPE_MEMORY * (height / self._advance - self._slope)
            if self._along > SEGMENTS * SEGMENT / 2 + OVERRUN:
                self.phase = "lift"
        ahead = max(-SIDE_STEP, min(SIDE_STEP, self._along - float(local[0])))
        aside = max(-SIDE_STEP, min(SIDE_STEP, -float(local[1])))
        return np.array([ahead, aside, height])

    def _orientation(self, rotation: np.ndarray) -> np.ndarray:
        """Columns of a rotation whose z axis turns at a person's speed to the normal that is seen and felt."""
        slope = max(-MOST_SLOPE, min(MOST_SLOPE, self._slope))
        normal = rotation[:, 2] - slope * rotation[:, 0]
        change = normal / math.sqrt(1 + slope * slope) - self._axis
        axis = self._axis + change * min(1.0, TURN / max(math.sqrt(change @ change), 1e-9))
        self._axis = axis / math.sqrt(axis @ axis)
        x, y, z = self._axis.tolist()
        size = math.hypot(x, z)  # first column without yaw: (z, 0, -x); second = axis cross first
        return np.array([z / size, 0.0, -x / size, -x * y / size, size, -y * z / size])
