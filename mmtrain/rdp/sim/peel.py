"""Peel-v0: peel one long strip off a bent cucumber that a hand holds in the air (specification sections 7.1 and 8.4).

The cucumber's frame: origin in the middle of its axis, x along it, z towards the tool. The axis is an arc in the x-z
plane. The blade lies across, parallel to the world's y, and its orientation is fixed.
"""

import itertools
import math
from typing import Any, ClassVar, NamedTuple

import mujoco
import numpy as np

from mmtrain.rdp.sim import world
from mmtrain.rdp.sim.base import ContactEnv
from mmtrain.rdp.sim.frames import small_rotation
from mmtrain.rdp.sim.hand import Push
from mmtrain.robot_tasks import FRAME_RATE, Task

LENGTH = 0.18  # m along the axis that count; the cucumber goes on by `MARGIN` and a round end on either side
MARGIN = 0.015
PEEL_FORCE = (3.0, 12.0)  # N, mean of a frame: a strip grows
WEAK_FORCE, WEAK_FRAMES = 1.5, 3  # N: a strip breaks after so many frames below
DIG_FORCE, STUCK_FRAMES = 18.0, 2 * FRAME_RATE  # N: the blade digs in and is stuck for so many frames
TAKE_UP = 0.005  # m beyond its end up to which a broken strip can be taken up again
FINISHED = 0.003  # m from the end of the length: who has peeled there has finished
FASTEST = 0.01  # m a frame: a blade that jumps does not cut
HALF_WIDTH = 0.02  # m of the blade's edge to either side
BLADE_RADIUS = 0.005
HOME = (-0.05, 0.0, 0.15)  # TCP at the start, m; the middle of the cucumber's axis is at the origin
SPREAD_POSITION, SPREAD_ANGLE = 0.03, 0.2  # of the cucumber's pose: m and rad, uniform on either side
TOOL_OFFSET = 0.006  # m, uniform on either side of each axis: how the peeler was grasped
RADIUS, BEND, FRICTION = (0.018, 0.025), (-2.0, 2.0), (0.3, 0.5)  # m; 1/m, positive with its middle up; sliding
STRAIGHTEST = 0.05  # 1/m: stands for a straight axis
PIECES = 14  # capsules that the cucumber is made of: at 15 mm the arc is met within 0.06 mm
MARKS = 30  # visual only
PUSH, PUSH_ASIDE, PUSH_TURN = (0.015, 0.03), 0.01, 0.1  # m, m, rad
PUSH_SECONDS = {"before": 0.5, "after": 0.4}
VIEW = 'pos="0 -0.36 0.26" xyaxes="1 0 0 0 0.55 0.83"'  # of the external camera
AXES = ("x", "y", "z")


class Place(NamedTuple):
    """Where the blade's undeformed edge is over the cucumber.

    Attributes:
        along: m along the bent axis.
        beside: m along the blade from its middle to the point that touches.
        gap: m to the surface, negative when pressed in.
    """

    along: float
    beside: float
    gap: float


class Strip:
    """The strip that a blade cuts along `LENGTH`, from forces and places of frames; pure bookkeeping.

    - It begins where the blade first bites, that is presses with 3 to 12 N, and grows by the new ground passed in
      frames with 3 to 12 N. Ground passed with another force, or faster than 10 mm a frame, does not count.
    - It breaks after 3 frames in a row below 1.5 N, or when more than 18 N digs in: then nothing is cut for 2 s.
    - A broken strip is taken up again where the blade next bites, if that is on the strip or at most 5 mm beyond its
      end: the blade goes back into its cut. Else a new strip begins. The longest one counts.

    Attributes:
        longest: m, over all strips.
        cuts: (from, to) along the axis in m of all cut ground, in order.
        stuck: frames until a blade that dug in is free.
    """

    def __init__(self) -> None:
        self.longest, self.stuck = 0.0, 0
        self.cuts: list[tuple[float, float]] = []
        self._start = self._front = self._previous = -math.inf
        self._length, self._weak, self._bites = 0.0, 0, False

    def pass_over(self, along: float, force: float) -> None:
        """A frame that ends at `along` (m) with the mean normal force (N) of the blade; 0 where it misses."""
        previous, self._previous = self._previous, along
        if self.stuck:
            self.stuck -= 1
            return
        self._weak = self._weak + 1 if force < WEAK_FORCE else 0
        if force > DIG_FORCE:
            self.stuck = STUCK_FRAMES
        self._bites = self._bites and self._weak < WEAK_FRAMES and not self.stuck
        if not PEEL_FORCE[0] <= force <= PEEL_FORCE[1]:
            return
        if not self._bites:
            self._bite(along)
            return
        begin, end = max(self._front, previous, -LENGTH / 2), min(along, LENGTH / 2)
        if 0 < end - begin <= FASTEST:
            self._length += end - begin
            self.longest = max(self.longest, self._length)
            self.cuts.append((begin, end))
        self._front = max(self._front, along)

    def _bite(self, along: float) -> None:
        self._bites = True
        if self._start <= along <= self._front + TAKE_UP:
            self._front = max(self._front, along)
        else:
            self._start = self._front = along
            self._length = 0.0


class PeelEnv(ContactEnv):
    """One arm with a peeler: the TCP follows the action x y z width (the width is ignored).

    The score is the longest strip's share of the length, see `Strip`; what was peeled before a protective stop counts.
    While the blade is stuck, commands move it up and down only. `object_pose` is that of the axis: neither bend nor
    thickness can be seen in it. Perturbations: "before" moves the cucumber 15 to 30 mm towards the blade or away from
    it once they are closer than 45 mm; "after" moves it away by as much after 12 to 60 frames of contact, so that
    contact breaks; both also move it up to 10 mm aside and turn it up to 0.1 rad about each axis, within 0.5 and 0.4 s.
    The episode ends when the end of the length is peeled, when the true force passes 30 N, or at the time limit. `info`
    also has `gap` (m, see `Place`), for scripted operators who watch, and `stuck`.
    """

    task: ClassVar[Task] = "peel"
    stable_band: ClassVar[tuple[float, float]] = PEEL_FORCE
    object_body: ClassVar[str] = "cucumber"

    def _build(self, rng: np.random.Generator) -> str:
        position = rng.uniform(-SPREAD_POSITION, SPREAD_POSITION, 3)
        self._rotation = small_rotation(rng.uniform(-SPREAD_ANGLE, SPREAD_ANGLE, 3))
        bend = float(rng.uniform(*BEND))
        self.bend = math.copysign(max(STRAIGHTEST, abs(bend)), bend)
        self.radius, friction = float(rng.uniform(*RADIUS)), float(rng.uniform(*FRICTION))
        self.tool_offset = rng.uniform(-TOOL_OFFSET, TOOL_OFFSET, 3)
        self._pad_position = self.tool_offset + np.array([0, 0, BLADE_RADIUS])
        self._home = HOME + rng.uniform(-0.01, 0.01, 3)
        self.strip = Strip()
        quaternion = np.empty(4)
        mujoco.mju_mat2Quat(quaternion, self._rotation.ravel())
        blade = (
            f'<geom name="left_blade" type="capsule" size="{BLADE_RADIUS}" {world.COLLIDE} '
            f'fromto="0 {-HALF_WIDTH} 0 0 {HALF_WIDTH} 0" friction="{friction!r} 0 0" priority="1" condim="3" '
            f'solref="0.005 1" rgba="0.7 0.7 0.75 1"/>'
        )
        tool = world.tool("left", (0, 0, 0), AXES, blade, self._pad_position, visual=self._tool_visual())
        held = world.held_object("cucumber", position, quaternion, self._parts(), 0.3, (5e-4, 2e-3, 2e-3))
        return world.document(
            tool + held, world.servos("left", AXES), world.sensors("left"), world.grip("cucumber"), view=VIEW
        )

    def _on_arc(self, along: float, height: float = 0.0) -> np.ndarray:
        """Point [3] of the cucumber's frame at `along` (m) on the axis, `height` (m) above it."""
        angle, centre = along * self.bend, 1 / self.bend
        return np.array([(centre + height) * math.sin(angle), 0, (centre + height) * math.cos(angle) - centre])

    def _parts(self) -> str:
        half = LENGTH / 2 + MARGIN
        points = [world.numbers(self._on_arc(along)) for along in np.linspace(-half, half, PIECES + 1)]
        parts = "".join(
            f'<geom type="capsule" size="{self.radius!r}" fromto="{start} {end}" {world.COLLIDE} '
            f'rgba="0.2 0.45 0.15 1"/>'
            for start, end in itertools.pairwise(points)
        )
        if not self.shows:
            return parts
        self._marks = (np.arange(MARKS) + 0.5) * LENGTH / MARKS - LENGTH / 2
        for index, along in enumerate(self._marks):  # seen once they are peeled
            parts += (
                f'<geom name="mark{index}" type="box" size="{LENGTH / MARKS / 2} 0.006 0.001" {world.SHOW_ONLY} '
                f'pos="{world.numbers(self._on_arc(along, self.radius - 0.0004))}" '
                f'euler="{world.numbers((0, along * self.bend, 0))}" rgba="0.8 0.95 0.6 0"/>'
            )
        return parts

    def _tool_visual(self) -> str:
        if not self.shows:
            return ""
        return (
            f'<geom type="cylinder" size="0.01 0.04" pos="0 0 0.06" {world.SHOW_ONLY} rgba="0.3 0.3 0.35 1"/>'
            f'<geom type="box" size="0.006 0.02 0.003" pos="0 0 0.019" {world.SHOW_ONLY} rgba="0.5 0.2 0.2 1"/>'
        )

    def _start(self, rng: np.random.Generator) -> np.ndarray:
        return self._home

    def _controls(self, action: np.ndarray) -> np.ndarray:
        if self.strip.stuck:
            return np.array([*self._set_points[:2], action[2]])
        return action[:3]

    def _draw_push(self, rng: np.random.Generator, variation: str) -> Push:
        away = rng.uniform(*PUSH) * (-1 if variation == "after" else rng.choice((-1, 1)))
        aside = rng.uniform(-PUSH_ASIDE, PUSH_ASIDE, 2)
        shift = self._rotation @ np.array([*aside, away])
        return Push(shift, rng.uniform(-PUSH_TURN, PUSH_TURN, 3), PUSH_SECONDS[variation])

    def _where(self) -> Place:
        """The blade's place, from the truth; at first where its line crosses the plane of the bent axis."""
        rotation = self.data.xmat[self._object].reshape(3, 3)
        middle = self.data.site_xpos[self._tcp_site] + self._pad_position
        x, y, z = ((middle - self.data.xpos[self._object]) @ rotation).tolist()
        line_x, line_y, line_z = rotation[1].tolist()  # the world's y, seen from the cucumber
        beside = -y / line_y
        x, z = x + beside * line_x, z + beside * line_z
        centre, sign = 1 / self.bend, math.copysign(1.0, self.bend)
        angle = math.atan2(sign * x, sign * (z + centre))
        height = sign * math.hypot(x, z + centre) - centre
        # From there to the points where blade and axis, taken for straight lines, are nearest.
        slant = math.cos(angle) * line_x - math.sin(angle) * line_z  # cosine between the two
        back = -height * (math.sin(angle) * line_x + math.cos(angle) * line_z) / (1 - slant * slant)
        height *= line_y / math.sqrt(1 - slant * slant)
        return Place(angle * centre + back * slant, beside + back, height - self.radius - BLADE_RADIUS)

    def _prepare_sensing(self) -> None:
        super()._prepare_sensing()
        self._tcp_site = self._sensing[0].tcp
        self._place = self._where()

    def _distance(self) -> float:
        beyond = max(0.0, abs(self._place.along) - LENGTH / 2 - MARGIN)
        return math.hypot(max(0.0, self._place.gap), beyond)

    def _advance(self, force: np.ndarray) -> bool:
        self._place = place = self._where()
        self.strip.pass_over(place.along, float(force[0]) if abs(place.beside) < HALF_WIDTH else 0.0)
        return bool(self.strip.cuts) and self.strip.cuts[-1][1] > LENGTH / 2 - FINISHED

    def _score(self) -> dict[str, float | bool | int]:
        ratio = min(1.0, self.strip.longest / LENGTH)
        return {"length_ratio": ratio, "score": ratio}

    def _info(self) -> dict[str, Any]:
        return {"gap": self._place.gap, "stuck": self.strip.stuck > 0}

    def _show(self) -> None:
        for begin, end in self.strip.cuts:
            for index in np.flatnonzero((self._marks >= begin) & (self._marks <= end)):
                self.model.geom(f"mark{index}").rgba[3] = 1.0
