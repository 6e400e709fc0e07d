"""From stored streams to what a policy sees: its own numbers of each, and relative poses. Data and runtime share it."""

import numpy as np

from mmtrain import poses
from mmtrain.robot_tasks import EMBEDDING, OBJECT_POSE, WRENCH, PolicySpec

IDENTITY_ROTATION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # first and second column of a 9-number pose
STORED_WIDTHS = {  # by ending of the stream's name, RDP paper's released layout
    "robot_tcp_pose": 9,
    "robot_tcp_vel": 6,
    "robot_tcp_wrench": WRENCH,
    "robot_gripper_width": 1,
    "robot_gripper_force": 1,
    "marker_offset_emb": EMBEDDING,
    OBJECT_POSE: 9,
}


def stored_width(key: str) -> int:
    """Numbers a frame that a store holds of a low-dimensional stream.

    Raises:
        KeyError: not a stream of the layout.
    """
    for ending, width in STORED_WIDTHS.items():
        if key.endswith(ending):
            return width
    raise KeyError(key)


def cut(key: str, values: np.ndarray, width: int) -> np.ndarray:
    """The `width` numbers of a stored stream [..., stored width] that a policy sees: a view.

    A pose gives its first numbers; of a wrench of width 1 it is the normal force, the third number (Table VI).
    """
    if key.endswith("robot_tcp_wrench") and width == 1:
        return values[..., 2:3]
    return values[..., :width]


def base_pose(spec: PolicySpec, stack: dict[str, np.ndarray]) -> np.ndarray:
    """Absolute TCP poses of all arms at "now", [..., arms * pose_dim], from a stack [..., 2, >= pose_dim] of each."""
    return np.concatenate([stack[f"{side}_robot_tcp_pose"][..., -1, : spec.pose_dim] for side in spec.arms], axis=-1)


def relative_observation(spec: PolicySpec, stack: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A stack of observations {key: [..., 2, D]}, cut already, with every pose relative to the TCP pose at "now" (1.6).

    The newest TCP pose becomes the identity. The object's estimated pose, which stands for a camera on the wrist, is
    given in the frame of the first arm, or else the policy could not know where the object is.
    """
    changed = dict(stack)
    for side in spec.arms:
        key = f"{side}_robot_tcp_pose"
        changed[key] = poses.relative_pose(stack[key], stack[key][..., -1:, :])
    if OBJECT_POSE in stack:
        base = stack[f"{spec.arms[0]}_robot_tcp_pose"][..., -1:, :]
        if spec.pose_dim == 3:
            base = np.concatenate([base, np.broadcast_to(IDENTITY_ROTATION, (*base.shape[:-1], 6))], axis=-1)
        changed[OBJECT_POSE] = poses.relative_pose(stack[OBJECT_POSE], base)
    return changed
