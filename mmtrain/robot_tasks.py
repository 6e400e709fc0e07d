"""What each policy of the RDP paper sees and sends, by task, touch and method: what data and models both need to know.

Names of streams are those of the released zarr layout: `SIDE_robot_...` an arm, `SIDE_gripper1_...` its GelSight Mini
(7 x 9 markers), `SIDE_gripper2_...` its MCTac (5 x 5 markers).
"""

from dataclasses import dataclass
from typing import Literal, get_args

from mmtrain.config_errors import UserError, nearest

Task = Literal["peel", "wipe", "lift"]
Touch = Literal["none", "force", "normal_force", "gelsight", "mctac", "gelsight_mctac", "image"]
Method = Literal["rdp", "dp"]
Vision = Literal["camera", "pose", "none"]

FRAME_RATE = 24  # frames a second of every store
MARKERS = {"gelsight": (7, 9), "mctac": (5, 5)}  # rows, columns
GRIPPER_SENSORS = {1: "gelsight", 2: "mctac"}  # number in `SIDE_gripperN_...`
EMBEDDING = 15  # principal components of a marker field
WRENCH = 6
ARMS = {"peel": ("left",), "wipe": ("left",), "lift": ("left", "right")}
POSE_DIM = {"peel": 3, "wipe": 9, "lift": 3}  # numbers of a TCP pose that a policy sees and sends
CAMERAS = {
    "peel": ("left_wrist_img",),
    "wipe": ("left_wrist_img",),
    "lift": ("external_img", "left_wrist_img", "right_wrist_img"),
}
OBJECT_POSE = "object_pose"  # of simulated stores: a coarse, late estimate that stands for the cameras, 9 numbers
TACTILE_IMAGE = "left_gripper1_img"


@dataclass(frozen=True)
class PolicySpec:
    """Streams, rates and windows of one policy (RDP paper; released configurations).

    Args:
        rate: frames a second of its data and actions.
        horizon: frames of a window.
        observation_frames: frames of the window that the slow policy sees; the last is "now", and the first whose
            action is executed.
        pad_before, pad_after: frames by which a window may stick out of its episode; there the ends are repeated.
        images: keys of pictures the policy sees, sorted.
        low_dim: key -> width of the other observations, sorted; a stored pose is cut to its first numbers.
        touch_inputs: key -> width of what the fast decoder sees at every frame, sorted; empty for `dp`.
        relative: actions and poses are relative to the TCP pose at "now".
    """

    task: Task
    touch: Touch
    method: Method
    vision: Vision
    rate: int
    horizon: int
    observation_frames: tuple[int, int]
    pad_before: int
    pad_after: int
    images: tuple[str, ...]
    low_dim: dict[str, int]
    touch_inputs: dict[str, int]
    relative: bool

    @property
    def arms(self) -> tuple[str, ...]:
        """Sides of the arms, in the order of the action's numbers."""
        return ARMS[self.task]

    @property
    def pose_dim(self) -> int:
        """Numbers of one arm's pose: 3 (position) or 9 (position, first and second column of the rotation)."""
        return POSE_DIM[self.task]

    @property
    def action_dim(self) -> int:
        """Poses of all arms, then their gripper widths: 4, 10 or 8."""
        return len(self.arms) * (self.pose_dim + 1)

    @property
    def now(self) -> int:
        """Frame of the window at which the newest observation was made."""
        return self.observation_frames[-1]

    @property
    def frames_per_step(self) -> int:
        """Stored frames between two frames of a window."""
        return FRAME_RATE // self.rate

    @property
    def observation_stride(self) -> int:
        """Stored frames between the two observations."""
        return (self.observation_frames[1] - self.observation_frames[0]) * self.frames_per_step

    @property
    def touch_dim(self) -> int:
        """Width of all decoder inputs together."""
        return sum(self.touch_inputs.values())


def sensor_of(key: str) -> str | None:
    """The tactile sensor that a stream comes from, by its name; None for a stream of none.

    >>> sensor_of("left_gripper2_marker_offset"), sensor_of("left_robot_gripper_width")
    ('mctac', None)
    """
    return next((sensor for number, sensor in GRIPPER_SENSORS.items() if f"_gripper{number}_" in key), None)


def policy_spec(
    task: Task, touch: Touch, method: Method, vision: Vision = "camera", relative: bool | None = None
) -> PolicySpec:
    """The specification of a policy.

    Args:
        touch: "normal_force" is the third number of the wrench alone (Table VI); "gelsight_mctac" is Lifting's pair of
            sensors, left MCTac and right GelSight; "image" (dp only) is the GelSight's picture.
        vision: "pose" puts `OBJECT_POSE` in the place of the cameras; "none" leaves both out.
        relative: None takes what was released: relative for RDP's Peeling and Wiping, absolute for the rest.

    Raises:
        UserError: a name that is not known, or a combination that makes no sense.
    """
    for name, value, known in (
        ("task", task, get_args(Task)),
        ("touch", touch, get_args(Touch)),
        ("method", method, get_args(Method)),
        ("vision", vision, get_args(Vision)),
    ):
        if value not in known:
            guess = nearest(str(value), known)
            raise UserError(f"{name}: {value} is not known{f', did you mean {guess}?' if guess else ''} {list(known)}")
    if touch == "image" and method == "rdp":
        raise UserError("touch: image is for method dp only; RDP's fast decoder takes numbers")
    touched = _touch_inputs(task, touch)
    low_dim = {f"{side}_robot_tcp_pose": POSE_DIM[task] for side in ARMS[task]}
    low_dim |= {f"{side}_robot_gripper_width": 1 for side in ARMS[task]} | touched
    images = CAMERAS[task] if vision == "camera" else ()
    low_dim |= {OBJECT_POSE: 9} if vision == "pose" else {}
    images += (TACTILE_IMAGE,) if touch == "image" else ()
    rdp = method == "rdp"
    return PolicySpec(
        task=task,
        touch=touch,
        method=method,
        vision=vision,
        rate=24 if rdp else 12,
        horizon=32 if rdp else 16,
        observation_frames=(1, 3) if rdp else (0, 1),
        pad_before=3 if rdp else 1,
        pad_after=28 if rdp else 14,
        images=tuple(sorted(images)),
        low_dim=dict(sorted(low_dim.items())),
        touch_inputs=dict(sorted(touched.items())) if rdp else {},
        relative=(rdp and task != "lift") if relative is None else relative,
    )


def _touch_inputs(task: Task, touch: Touch) -> dict[str, int]:
    if touch in ("none", "image"):
        return {}
    if touch in ("force", "normal_force"):
        return {f"{side}_robot_tcp_wrench": WRENCH if touch == "force" else 1 for side in ARMS[task]}
    if (touch == "gelsight_mctac") != (task == "lift"):
        raise UserError(f"touch: {touch} is not of task {task}; lift has gelsight_mctac, the others one sensor")
    if task == "lift":
        return {"left_gripper2_marker_offset_emb": EMBEDDING, "right_gripper1_marker_offset_emb": EMBEDDING}
    gripper = {"gelsight": 1, "mctac": 2}[touch]
    return {f"left_gripper{gripper}_marker_offset_emb": EMBEDDING}
