"""Pieces of MuJoCo worlds that the simulated tasks share (specification section 8.4), as MJCF text.

Lengths in metres, angles in radians, forces in newtons. No robot is modelled: a tool is a chain of slides and hinges
under stiff position servos, so that the state it reaches one frame later is what it was told, as the released data
assume. A held object hangs softly on an invisible hand, and the hand is what perturbations move.
"""

from collections.abc import Sequence

import numpy as np

TIMESTEP = 1 / 480
SERVO_STIFFNESS, SERVO_DAMPING = 20_000.0, 400.0  # N/m and N s/m: far stiffer than the pad
HINGE_STIFFNESS, HINGE_DAMPING = 200.0, 4.0  # N m/rad and N m s/rad: the same time constant
PAD_STIFFNESS, PAD_DAMPING = 1500.0, 12.0
TOOL_MASS, PAD_MASS = 1.0, 0.08  # kg; the pad's weight is the constant bias of -0.785 N on the force sensor
SLIDES = {"x": "1 0 0", "y": "0 1 0", "z": "0 0 1"}
HINGES = {"pitch": "0 1 0", "roll": "1 0 0"}
HAND = "hand"
VIEW = 'pos="0 -0.42 0.5" xyaxes="1 0 0 0 0.6 0.8"'
COLLIDE = 'contype="1" conaffinity="1"'
SHOW_ONLY = 'contype="0" conaffinity="0"'


def numbers(values: Sequence[float] | np.ndarray) -> str:
    """Numbers as MJCF writes them, exact enough to come back bit for bit."""
    return " ".join(repr(float(value)) for value in np.ravel(values))


def document(bodies: str, actuators: str, sensors: str, equality: str = "", option: str = "", view: str = VIEW) -> str:
    """A whole model: options of section 8.4, lights without shadows, an external camera, and the given parts.

    Args:
        option: more attributes of MJCF's `option`.
        view: place of the external camera.
    """
    return f"""<mujoco>
<option timestep="{TIMESTEP!r}" integrator="implicitfast" cone="elliptic" {option}/>
<compiler angle="radian" autolimits="true" inertiafromgeom="false"/>
<visual><quality shadowsize="0" offsamples="0"/><global offwidth="640" offheight="480"/>
<headlight ambient="0.4 0.4 0.4" diffuse="0.5 0.5 0.5"/><map znear="0.005"/></visual>
<asset><texture type="skybox" builtin="gradient" rgb1="0.75 0.8 0.85" rgb2="0.5 0.55 0.6"
width="32" height="192"/></asset>
<worldbody>
<light pos="0.3 -0.3 1" dir="-0.3 0.3 -1" castshadow="false" diffuse="0.4 0.4 0.4"/>
<camera name="external" {view} fovy="45"/>
{bodies}
</worldbody>
<equality>{equality}</equality>
<actuator>{actuators}</actuator>
<sensor>{sensors}</sensor>
</mujoco>"""


def tool(
    side: str,
    position: Sequence[float],
    axes: Sequence[str],
    pad: str,
    pad_position: Sequence[float],
    pad_axis: Sequence[float] = (0, 0, 1),
    visual: str = "",
    camera: bool = True,
) -> str:
    """One arm's tool: a carriage at the TCP and a compliant pad with a force-torque sensor between the two.

    Args:
        position: where the TCP is when all joints are 0; `axes` of `SLIDES`, then of `HINGES`, move it from there.
        pad: the pad's geoms; their frame starts at the sensor.
        pad_position: of the sensor, in the TCP frame; holds the unknown offset of the grasped tool.
        pad_axis: direction in which the pad gives way, in the TCP frame.
        visual: more geoms of the carriage.
        camera: adds the wrist camera, which looks along the tool's -z.
    """
    joints = "".join(
        f'<joint name="{side}_{axis}" type="{"slide" if axis in SLIDES else "hinge"}" '
        f'axis="{SLIDES.get(axis) or HINGES[axis]}"/>'
        for axis in axes
    )
    wrist = f'<camera name="{side}_wrist" pos="0 -0.07 0.1" xyaxes="1 0 0 0 0.82 0.57" fovy="60"/>' if camera else ""
    return f"""<body name="{side}_tool" pos="{numbers(position)}" gravcomp="1">{joints}
<inertial pos="0 0 0" mass="{TOOL_MASS}" diaginertia="0.01 0.01 0.01"/>
<site name="{side}_tcp"/>{wrist}{visual}
<body name="{side}_pad" pos="{numbers(pad_position)}">
<joint name="{side}_give" type="slide" axis="{numbers(pad_axis)}" stiffness="{PAD_STIFFNESS}" damping="{PAD_DAMPING}"/>
<inertial pos="0 0 0" mass="{PAD_MASS}" diaginertia="1e-4 1e-4 1e-4"/>
<site name="{side}_sensor"/><site name="{side}_feel" type="sphere" size="0.2" rgba="0 0 0 0"/>{pad}
</body></body>"""


def servos(side: str, axes: Sequence[str]) -> str:
    """Position actuators of a tool, one per axis, in the same order."""
    text = ""
    for axis in axes:
        slide = axis in SLIDES
        stiffness, damping = (SERVO_STIFFNESS, SERVO_DAMPING) if slide else (HINGE_STIFFNESS, HINGE_DAMPING)
        text += f'<position joint="{side}_{axis}" kp="{stiffness}" kv="{damping}"/>'
    return text


def sensors(side: str) -> str:
    """A tool's sensors, in the order that `base` reads them: force 3, torque 3 (frame of the pad), true normal force 1.

    MuJoCo gives what the tool does to the pad; `base` turns the sign, so that a press along the tool's -z reads +z.
    """
    return f'<force site="{side}_sensor"/><torque site="{side}_sensor"/><touch name="{side}_touch" site="{side}_feel"/>'


def held_object(
    name: str, position: Sequence[float], quaternion: Sequence[float], parts: str, mass: float, inertia: Sequence[float]
) -> str:
    """A free body and the hand (a mocap body) that holds it; `grip` welds the two. Parts are its geoms and sites."""
    place = f'pos="{numbers(position)}" quat="{numbers(quaternion)}"'
    return f"""<body name="{HAND}" mocap="true" {place}/>
<body name="{name}" {place} gravcomp="1"><freejoint/>
<inertial pos="0 0 0" mass="{mass!r}" diaginertia="{numbers(inertia)}"/>{parts}</body>"""


def grip(name: str) -> str:
    """The soft weld between the hand and the object it holds."""
    return f'<weld body1="{HAND}" body2="{name}" solref="0.02 1"/>'
