"""Bimanual lifting: two pads clamp a cup whose sides give way, lift it along one of two arcs and hold it (8.4).

The soft and the hard cup look the same. Only what the pads feel tells how far to close: the soft one is compressed too
far by more than 2.4 N, and any cup slips from a grip that is too weak for its mass and friction.
"""

from typing import Any, ClassVar, NamedTuple

import numpy as np

from mmtrain.rdp.sim import world
from mmtrain.rdp.sim.base import MAX_SPEED, ContactEnv
from mmtrain.robot_tasks import FRAME_RATE, Task

CUP_HALF = 0.04  # m from the cup's middle to either side
CUP_MIDDLE = 0.05  # m above the table
SIDE_MASS = 0.008  # kg of each of the cup's sides, part of its mass
SIDE_TRAVEL = 0.018  # m
TABLE_FRICTION = 0.4
ARM_START = 0.11, 0.075  # m: distance of a pad from the middle, height
LIFT_HEIGHT, ARC_SHIFT, ARC_TOLERANCE = 0.15, 0.05, 0.025  # m
CLAMP_FORCE, CLAMP_FRAMES = 1.0, round(0.3 * FRAME_RATE)  # N on both sides, frames in a row
HOLD_FRAMES = FRAME_RATE  # 1 s
# Friction far stiffer than contact: at MuJoCo's default of 1 a held cup creeps down by 6 mm a second.
FRICTION = 'impratio="50"'
VIEW = 'pos="0 -0.45 0.26" xyaxes="1 0 0 0 0.33 0.94"'  # of the external camera
LIFTED_OFF, FALLEN = 0.03, 0.01  # m: a cup that was above the first and is below the second was dropped
# Axes of the pads: z points away from the cup, y up, so that a press reads as positive z.
PAD_AXES = {"left": "0 -1 0 0 0 1", "right": "0 1 0 0 0 1"}
OUTWARD = {"left": -1.0, "right": 1.0}


class Cup(NamedTuple):
    """Stiffness of one side (N/m) and the compression in metres up to which a lift scores 1 and 0.5."""

    stiffness: float
    full: float
    half: float


# Limits as proposed in 8.4 for the soft cup. The hard one's (3 and 6 mm there) are tightened so that the grips measured
# in 8.1 score as they did: 2.2 N full, 4 N half, from 5.25 N on nothing.
CUPS = {"soft": Cup(300.0, 0.008, 0.014), "hard": Cup(1500.0, 0.0025, 0.0035)}


def arc_shift(height: float) -> float:
    """Sideways distance (m) from the start at a height (m) of the cup: half a sine wave of 50 mm over the 150 mm.

    The demonstrated paths are this to the left (-x) and to the right (+x); straight up is neither.
    """
    return ARC_SHIFT * float(np.sin(np.pi * min(max(height / LIFT_HEIGHT, 0.0), 1.0)))


class LiftEnv(ContactEnv):
    """Clamp a cup between two tools, lift it by 150 mm along the left or the right arc and hold it for 1 s.

    Action [8]: position of the left and of the right TCP (m), widths of both grippers (held, not simulated). Score of a
    lifted cup: 1 if no side was ever pressed in by 8 mm (soft) or 2.5 mm (hard), 0.5 below 14 or 3.5 mm, else 0; 0 too
    if it was dropped or went up along neither arc (more than 25 mm off both). `outcome` adds `clamped` (both forces
    above 1 N for 0.3 s), `lifted`, `dropped`, `compression_mm`, `height_mm` and `path_error_mm`.
    """

    task: ClassVar[Task] = "lift"
    variations: ClassVar[tuple[str, ...]] = ("soft", "hard")
    object_body: ClassVar[str] = "cup"
    stop_force: ClassVar[float] = 20.0

    def _build(self, rng: np.random.Generator) -> str:
        self.cup = CUPS[self.variation]
        self.stable_band = (CLAMP_FORCE, self.cup.full * self.cup.stiffness)
        mass, friction = rng.uniform(0.09, 0.15), rng.uniform(0.4, 0.5)
        place = np.array([*rng.uniform(-0.01, 0.01, 2), CUP_MIDDLE])
        self._home = {}
        tools = ""
        for side in self.arms:
            start = np.array([OUTWARD[side] * ARM_START[0], 0.0, ARM_START[1]]) + rng.uniform(-0.01, 0.01, 3)
            self._home[side] = start
            tools += _tool(side, start, rng.uniform(-0.003, 0.003, 3), friction, self.shows)
        bodies = (
            f'<geom name="table" type="plane" size="0.4 0.4 0.1" rgba="0.6 0.5 0.4 1" friction="{TABLE_FRICTION}"/>'
            + tools
            + _cup(place, mass, friction, self.cup.stiffness)
        )
        servos = "".join(world.servos(side, "xyz") for side in self.arms)
        self._held = self._clamping = 0
        self._clamped = self._lifted = self._dropped = False
        self._compression = self._height = self._tallest = 0.0
        self._off_arc = np.zeros(2)
        self._cup_place = place
        sensors = "".join(world.sensors(side) for side in self.arms)
        return world.document(bodies, servos, sensors, option=FRICTION, view=VIEW)

    def _start(self, rng: np.random.Generator) -> np.ndarray:
        self._sides = [self.model.joint(f"cup_{side}").qposadr[0] for side in self.arms]
        self._cup_body = self.model.body("cup").id
        self._shift = float(self._cup_place[0])
        self._origin = np.concatenate([self._home[side] for side in self.arms])
        return np.zeros(6)

    def _controls(self, action: np.ndarray) -> np.ndarray:
        return action[:6] - self._origin

    def _speed_limits(self) -> np.ndarray:
        return np.full(6, MAX_SPEED[0])

    def _advance(self, force: np.ndarray) -> bool:
        x, _, z = self.data.xpos[self._cup_body]
        self._height = float(z) - CUP_MIDDLE
        self._tallest = max(self._tallest, self._height)
        self._compression = max(self._compression, *(float(self.data.qpos[side]) for side in self._sides))
        self._clamping = self._clamping + 1 if force.min() > CLAMP_FORCE else 0
        self._clamped = self._clamped or self._clamping >= CLAMP_FRAMES
        if self._height < 0.005 and not self._lifted:
            self._shift = float(x)  # it may have been pushed along the table
        elif self._tallest <= LIFT_HEIGHT:
            way = float(x) - self._shift
            arc = arc_shift(self._height)
            self._off_arc = np.maximum(self._off_arc, np.abs([way + arc, way - arc]))
        self._held = self._held + 1 if self._height > LIFT_HEIGHT else 0
        self._lifted = self._lifted or self._held >= HOLD_FRAMES
        self._dropped = self._tallest > LIFTED_OFF and self._height < FALLEN
        return self._lifted or self._dropped

    def _score(self) -> dict[str, float | bool | int]:
        path_error = float(self._off_arc.min())
        lifted = self._lifted and not self._dropped and not self._stopped and path_error <= ARC_TOLERANCE
        tier = 1.0 if self._compression < self.cup.full else 0.5 if self._compression < self.cup.half else 0.0
        return {
            "clamped": self._clamped,
            "lifted": lifted,
            "dropped": self._dropped,
            "compression_mm": 1000 * self._compression,
            "height_mm": 1000 * self._height,
            "path_error_mm": 1000 * path_error,
            "score": tier if lifted else 0.0,
        }

    def _info(self) -> dict[str, Any]:
        return {"height": self._height}


def _tool(side: str, start: np.ndarray, offset: np.ndarray, friction: float, shows: bool) -> str:
    """One arm: three slides under servos and a 20 x 20 mm pad whose face is at the TCP, but for the grasp's offset."""
    joints = "".join(f'<joint name="{side}_{name}" type="slide" axis="{axis}"/>' for name, axis in world.SLIDES.items())
    camera = (
        f'<camera name="{side}_wrist" pos="{OUTWARD[side] * 0.04} -0.16 0.12" xyaxes="1 0 0 0 0.6 0.8" fovy="50"/>'
        f'<geom type="capsule" fromto="{OUTWARD[side] * 0.01} 0 0 {OUTWARD[side] * 0.08} 0 0.03" size="0.008" '
        f'rgba="0.3 0.3 0.3 1" {world.SHOW_ONLY}/>'
        if shows
        else ""
    )
    return f"""<body name="{side}_tool" pos="{world.numbers(start)}" gravcomp="1">{joints}
<inertial pos="0 0 0" mass="{world.TOOL_MASS}" diaginertia="0.01 0.01 0.01"/>
<site name="{side}_tcp" xyaxes="{PAD_AXES[side]}"/>{camera}
<body name="{side}_pad" pos="{world.numbers(offset)}" xyaxes="{PAD_AXES[side]}">
<joint name="{side}_give" type="slide" axis="0 0 1" stiffness="{world.PAD_STIFFNESS}" damping="{world.PAD_DAMPING}"/>
<inertial pos="0 0 0.004" mass="{world.PAD_MASS}" diaginertia="1e-5 1e-5 1e-5"/>
<site name="{side}_sensor"/><site name="{side}_feel" type="sphere" size="0.2" rgba="0 0 0 0"/>
<geom name="{side}_face" type="box" size="0.01 0.01 0.004" pos="0 0 0.004" condim="4" contype="2" conaffinity="3"
 friction="{friction!r} 0.005 0.0001" rgba="0.2 0.5 0.7 1"/></body></body>"""


def _cup(place: np.ndarray, mass: float, friction: float, stiffness: float) -> str:
    """The cup: a free core that stands on the table, and two sides on springs that the pads press in."""
    sides = ""
    for side in ("left", "right"):
        x = OUTWARD[side] * (CUP_HALF - 0.002)
        sides += f"""<body name="cup_{side}" pos="{x!r} 0 0">
<joint name="cup_{side}" type="slide" axis="{-OUTWARD[side]} 0 0" stiffness="{stiffness}" damping="2"
 range="0 {SIDE_TRAVEL}"/><inertial pos="0 0 0" mass="{SIDE_MASS}" diaginertia="3e-6 3e-6 3e-6"/>
<geom name="cup_{side}" type="box" size="0.002 0.025 0.04" condim="4" contype="2" conaffinity="2"
 friction="{friction!r} 0.005 0.0001" rgba="0.9 0.9 0.85 1"/></body>"""
    core = mass - 2 * SIDE_MASS
    inertia = core / 3 * np.array([0.03**2 + CUP_MIDDLE**2, 0.02**2 + CUP_MIDDLE**2, 0.02**2 + 0.03**2])
    return f"""<body name="cup" pos="{world.numbers(place)}"><freejoint/>
<inertial pos="0 0 0" mass="{core!r}" diaginertia="{world.numbers(inertia)}"/>
<geom name="cup" type="box" size="0.02 0.03 {CUP_MIDDLE}" contype="1" conaffinity="0" friction="{TABLE_FRICTION}"
 rgba="0.85 0.8 0.7 1"/>{sides}</body>"""
