"""Wipe-v0: wipe a mark off a curved board that a hand holds in the air (specification sections 7.1 and 8.4).

The board's frame: origin at the middle of the mark on the surface, x along the mark, z out of the surface. The board is
a cylinder about y; a segment of the mark goes once the eraser passes over it with the right force and tilt.
"""

import math
from typing import Any

import mujoco
import numpy as np

from mmtrain.rdp.sim import world
from mmtrain.rdp.sim.base import ContactEnv
from mmtrain.rdp.sim.frames import small_rotation
from mmtrain.rdp.sim.hand import Push

SEGMENTS, SEGMENT = 30, 0.0045  # metres along the surface
CLEAN_FORCE = (2.5, 15.0)  # N, mean of a frame
FOOTPRINT = 0.004  # m before and behind the touching point that the eraser wipes
HALF_WIDTH = 0.015  # m: how far beside the mark the eraser may pass
MOST_TILT = 0.35  # rad between tool and surface normal: beyond it only the eraser's edge touches
FEW, THIRD = 0.05, 1 / 3  # residue for score 1 and 0.5
PAD_RADIUS = 0.01
HOME = (0.0, 0.0, 0.15)  # TCP at the start, m; the board's middle is at the origin
SPREAD_POSITION, SPREAD_ANGLE = 0.03, 0.2  # of the board's pose: m and rad, uniform on either side
TOOL_OFFSET = (0.003, 0.003, 0.006)  # m, uniform on either side: how the eraser was grasped
CURVATURE, FRICTION = (0.0, 4.0), (0.3, 0.5)  # 1/m; sliding
FLATTEST = 0.05  # 1/m: stands for a plane
PUSH, PUSH_ASIDE, PUSH_TURN = (0.015, 0.03), 0.01, 0.1  # m, m, rad
PUSH_SECONDS = {"before": 0.5, "after": 0.4}
VIEW = 'pos="0 -0.3 0.24" xyaxes="1 0 0 0 0.55 0.83"'  # of the external camera
AXES = ("x", "y", "z", "pitch", "roll")


class WipeEnv(ContactEnv):
    """One arm with an eraser: position, pitch and roll follow the action x y z r6 width (yaw and width are ignored).

    Perturbations: "before" moves the board 15 to 30 mm towards the tool or away from it once they are closer than
    45 mm; "after" moves it away by as much after 12 to 60 frames of contact, so that contact breaks; both also move it
    up to 10 mm aside and turn it up to 0.1 rad about each axis, within 0.5 and 0.4 s. The episode ends when the mark
    is gone, when the true force passes 30 N, or at the time limit. `info` also has `gap`: metres
    between the eraser's undeformed tip and the surface, negative when pressed in; for scripted operators who watch.
    """

    task = "wipe"
    stable_band = CLEAN_FORCE
    object_body = "board"

    def _build(self, rng: np.random.Generator) -> str:
        position = rng.uniform(-SPREAD_POSITION, SPREAD_POSITION, 3)
        turn = rng.uniform(-SPREAD_ANGLE, SPREAD_ANGLE, 3)
        self.curvature = max(FLATTEST, float(rng.uniform(*CURVATURE)))
        friction = float(rng.uniform(*FRICTION))
        self.tool_offset = rng.uniform(-1, 1, 3) * TOOL_OFFSET
        self._pad_position = self.tool_offset + np.array([0, 0, PAD_RADIUS])
        self.segments = (np.arange(SEGMENTS) + 0.5 - SEGMENTS / 2) * SEGMENT
        self.is_clean = np.zeros(SEGMENTS, bool)
        self._last_along: float | None = None
        self._board_rotation = small_rotation(turn)
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._board_rotation.ravel())
        pad = (
            f'<geom name="left_eraser" type="sphere" size="{PAD_RADIUS}" {world.COLLIDE} friction="{friction!r} 0 0" '
            f'priority="1" condim="3" solref="0.005 1" rgba="0.9 0.75 0.2 1"/>'
        )
        tool = world.tool("left", (0, 0, 0), AXES, pad, self._pad_position, visual=self._tool_visual())
        board = world.held_object("board", position, quaternion, self._board_parts(), 0.3, (1e-3, 1e-3, 1.5e-3))
        return world.document(
            tool + board, world.servos("left", AXES), world.sensors("left"), world.grip("board"), view=VIEW
        )

    def _board_parts(self) -> str:
        radius = 1 / self.curvature
        parts = (
            f'<geom type="cylinder" size="{radius!r} 0.07" pos="0 0 {-radius!r}" '
            f'quat="0.7071067811865476 0.7071067811865475 0 0" {world.COLLIDE} group="3"/>'
        )
        if not self.shows:
            return parts
        for index in range(-10, 11):  # flat strips stand for the board
            parts += self._strip(f"strip{index}", index * 0.009, 0.0046, 0.07, 0.001, "0.85 0.85 0.9 1")
        for index, along in enumerate(self.segments):
            parts += self._strip(f"mark{index}", along, SEGMENT / 2, 0.004, -0.0004, "0.1 0.1 0.5 1")
        return parts

    def _strip(self, name: str, along: float, half: float, half_width: float, depth: float, colour: str) -> str:
        angle, radius = along * self.curvature, 1 / self.curvature
        place = (np.sin(angle) * (radius - depth), 0.0, np.cos(angle) * (radius - depth) - radius)
        thick = abs(depth) or 0.0005
        return (
            f'<geom name="{name}" type="box" size="{half} {half_width} {thick}" pos="{world.numbers(place)}" '
            f'euler="{world.numbers((0, angle, 0))}" {world.SHOW_ONLY} rgba="{colour}"/>'
        )

    def _tool_visual(self) -> str:
        if not self.shows:
            return ""
        return (
            f'<geom type="cylinder" size="0.012 0.04" pos="0 0 0.06" {world.SHOW_ONLY} rgba="0.3 0.3 0.35 1"/>'
            f'<geom type="box" size="0.02 0.012 0.004" pos="0 0 0.022" {world.SHOW_ONLY} rgba="0.5 0.5 0.55 1"/>'
        )

    def _start(self, rng: np.random.Generator) -> np.ndarray:
        shift, tilt = rng.uniform(-0.01, 0.01, 3), rng.uniform(-0.05, 0.05, 2)
        return np.concatenate([HOME + shift, tilt])

    def _controls(self, action: np.ndarray) -> np.ndarray:
        """Slides take the position; pitch and roll are those of the tool's z axis (R = Ry(pitch) Rx(roll))."""
        x, y, z = tool_axis(action[3:9])
        pitch, roll = math.atan2(x, z), math.asin(max(-1.0, min(1.0, -y)))
        return np.array([*action[:3], max(-1.0, min(1.0, pitch)), max(-1.0, min(1.0, roll))])

    def _draw_push(self, rng: np.random.Generator, variation: str) -> Push:
        away = rng.uniform(*PUSH) * (-1 if variation == "after" else rng.choice((-1, 1)))
        aside = rng.uniform(-PUSH_ASIDE, PUSH_ASIDE, 2)
        shift = self._board_rotation @ np.array([*aside, away])
        return Push(shift, rng.uniform(-PUSH_TURN, PUSH_TURN, 3), PUSH_SECONDS[variation])

    def _where(self) -> tuple[float, float, float, float]:
        """Where the eraser's tip is, from the truth: along the mark, beside it, gap (m), and the tool's tilt (rad)."""
        board = self.data.xmat[self._board].reshape(3, 3)
        tool = self.data.site_xmat[self._tcp_site].reshape(3, 3)
        pad = self.data.site_xpos[self._tcp_site] + tool @ self._pad_position
        x, y, z = ((pad - self.data.xpos[self._board]) @ board).tolist()
        radius = 1 / self.curvature
        angle = math.atan2(x, z + radius)
        gap = math.hypot(x, z + radius) - radius - PAD_RADIUS
        axis = (tool[:, 2] @ board).tolist()  # in the board's frame
        cosine = axis[0] * math.sin(angle) + axis[2] * math.cos(angle)
        return angle * radius, y, gap, math.acos(max(-1.0, min(1.0, cosine)))

    def _prepare_sensing(self) -> None:
        super()._prepare_sensing()
        self._board, self._tcp_site = self._object, self._sensing[0].tcp
        self._place = self._where()

    def _distance(self) -> float:
        return self._place[2]

    def _advance(self, force: np.ndarray) -> bool:
        self._place = along, beside, _, tilt = self._where()
        wipes = CLEAN_FORCE[0] <= force[0] <= CLEAN_FORCE[1] and abs(beside) < HALF_WIDTH and tilt < MOST_TILT
        if wipes:
            start = along if self._last_along is None else self._last_along
            low, high = min(start, along) - FOOTPRINT, max(start, along) + FOOTPRINT
            self.is_clean |= (self.segments >= low) & (self.segments <= high)
        self._last_along = along if wipes else None
        return bool(self.is_clean.all())

    def _score(self) -> dict[str, float | bool | int]:
        residue = 1.0 - int(self.is_clean.sum()) / SEGMENTS
        tier = 1.0 if residue <= FEW else 0.5 if residue < THIRD else 0.0
        return {"residue": residue, "score": 0.0 if self._stopped else tier}

    def _info(self) -> dict[str, Any]:
        return {"gap": self._place[2]}

    def _show(self) -> None:
        for index in np.flatnonzero(self.is_clean):
            self.model.geom(f"mark{index}").rgba[3] = 0.0


def tool_axis(r6: np.ndarray) -> tuple[float, float, float]:
    """Third column of `poses.rotation_from_ortho6d` in plain floats, as the loop asks at every frame."""
    a, b, c, d, e, f = r6.tolist()
    x, y, z = b * f - c * e, c * d - a * f, a * e - b * d
    size = max(math.sqrt(x * x + y * y + z * z), 1e-16)
    return x / size, y / size, z / size
