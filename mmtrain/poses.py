"""Rigid-body poses and relative end-effector trajectories (RDP, "relative end-effector trajectory"), in NumPy.

A pose is 3 numbers, a position in metres (its rotation is the identity), or 9: position, first and second COLUMN of the
rotation matrix (the "ortho6d" form of Zhou et al., "On the Continuity of Rotation Representations", 2019).
An action holds the poses of all arms, then one gripper width per arm. All functions work on the last axis, for any
leading shape, in float64; `relative_...`, `absolute_...`, `interpolate_action` and `densify` give the input's own type.
"""

from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

Array = np.ndarray

NORM_FLOOR = 1e-8


def rotation_from_ortho6d(r6: Array) -> Array:
    """Rotation matrices [..., 3, 3] of two vectors [..., 6] that need not be orthonormal.

    x = a / |a|, z = (x cross b) / |.|, y = z cross x; the columns are x, y, z. Norms are floored at 1e-8.
    """
    r6 = np.asarray(r6, dtype=np.float64)
    x, y, z = _frame(r6[..., :3], r6[..., 3:6])
    return np.stack([x, y, z], axis=-1)


def ortho6d_from_rotation(rotation: Array) -> Array:
    """First, then second column of rotation matrices [..., 3, 3], as [..., 6]."""
    columns = np.swapaxes(np.asarray(rotation, dtype=np.float64)[..., :2], -1, -2)
    return columns.reshape(*columns.shape[:-2], 6)


def pose_matrix(pose: Array) -> Array:
    """Homogeneous matrices [..., 4, 4] of poses [..., 3 or 9].

    Raises:
        ValueError: another width.
    """
    pose = np.asarray(pose, dtype=np.float64)
    _check_pose_dim(pose.shape[-1])
    matrix = np.zeros((*pose.shape[:-1], 4, 4))
    matrix[..., :3, :3] = np.eye(3) if pose.shape[-1] == 3 else rotation_from_ortho6d(pose[..., 3:])
    matrix[..., :3, 3] = pose[..., :3]
    matrix[..., 3, 3] = 1.0
    return matrix


def pose_from_matrix(matrix: Array, dim: int = 9) -> Array:
    """Poses [..., dim] of homogeneous matrices [..., 4, 4]; dim is 3 (the rotation is dropped) or 9."""
    _check_pose_dim(dim)
    matrix = np.asarray(matrix, dtype=np.float64)
    position = matrix[..., :3, 3]
    return position.copy() if dim == 3 else np.concatenate([position, ortho6d_from_rotation(matrix[..., :3, :3])], -1)


def pose_from_euler(pose: Array) -> Array:
    """Poses [..., 9] of position and static x-y-z Euler angles in radians, [..., 6]."""
    pose = np.asarray(pose, dtype=np.float64)
    rotation = Rotation.from_euler("xyz", pose[..., 3:6].reshape(-1, 3)).as_matrix()
    return np.concatenate([pose[..., :3], ortho6d_from_rotation(rotation).reshape(*pose.shape[:-1], 6)], axis=-1)


def euler_from_pose(pose: Array) -> Array:
    """Position and static x-y-z Euler angles in radians, [..., 6], of poses [..., 9]."""
    pose = np.asarray(pose, dtype=np.float64)
    angles = _rotations(pose[..., 3:]).as_euler("xyz").reshape(*pose.shape[:-1], 3)
    return np.concatenate([pose[..., :3], angles], axis=-1)


def pose_from_quaternion(pose: Array) -> Array:
    """Poses [..., 9] of position and quaternion, w first, [..., 7]; the quaternion's length does not matter."""
    pose = np.asarray(pose, dtype=np.float64)
    rotation = Rotation.from_quat(pose[..., [4, 5, 6, 3]].reshape(-1, 4)).as_matrix()
    return np.concatenate([pose[..., :3], ortho6d_from_rotation(rotation).reshape(*pose.shape[:-1], 6)], axis=-1)


def quaternion_from_pose(pose: Array) -> Array:
    """Position and unit quaternion, w first and not negative, [..., 7], of poses [..., 9]."""
    pose = np.asarray(pose, dtype=np.float64)
    quaternion = _rotations(pose[..., 3:]).as_quat(canonical=True)[:, [3, 0, 1, 2]]
    return np.concatenate([pose[..., :3], quaternion.reshape(*pose.shape[:-1], 4)], axis=-1)


def relative_pose(pose: Array, base: Array) -> Array:
    """Poses [..., 3 or 9] seen from `base`: M(base)^-1 M(pose); see `relative_action` for the shape of `base`."""
    return relative_action(pose, base, np.shape(pose)[-1])


def absolute_pose(relative: Array, base: Array) -> Array:
    """Inverse of `relative_pose`: M(base) M(relative)."""
    return absolute_action(relative, base, np.shape(relative)[-1])


def relative_action(action: Array, base: Array, pose_dim: int) -> Array:
    """Actions whose poses are seen from a base pose per arm: M(base)^-1 M(pose); widths are left as they are.

    Args:
        action: [..., arms * (pose_dim + 1)], poses of all arms, then widths; or [..., arms * pose_dim] without widths,
            for one or two arms. One window or many: [T, D], [N, T, D].
        base: one pose per arm, [..., arms * pose_dim] or [..., arms * 9]. Its leading axes are the FIRST ones of the
            action: [W] serves all, [N, W] gives each of N windows its own, [N, T, W] each frame.
        pose_dim: 3 or 9. With 3 a rotation of the base is not used: the axes stay those of the robot's base.

    Returns:
        like `action`; the rotation's two columns are orthonormal.

    Raises:
        ValueError: widths that do not fit each other.
    """
    action, base, layout = _checked(action, base, pose_dim)
    result = action.astype(np.float64)
    for pose, at in layout.pairs():
        offset = result[..., pose : pose + 3] - base[..., at : at + 3]
        if pose_dim == 3:
            result[..., pose : pose + 3] = offset
        else:
            vectors = np.stack([offset, result[..., pose + 3 : pose + 6], result[..., pose + 6 : pose + 9]], axis=-2)
            # rows v^T R are (R^T v)^T: all three vectors into the base's axes at once
            _put(result, pose, vectors @ rotation_from_ortho6d(base[..., at + 3 : at + 9]))
    return result.astype(_float_type(action), copy=False)


def absolute_action(relative: Array, base: Array, pose_dim: int) -> Array:
    """Inverse of `relative_action`: M(base) M(pose), with the same arguments."""
    relative, base, layout = _checked(relative, base, pose_dim)
    result = relative.astype(np.float64)
    for pose, at in layout.pairs():
        if pose_dim == 9:
            vectors = result[..., pose : pose + 9].reshape(*result.shape[:-1], 3, 3)
            rotation = rotation_from_ortho6d(base[..., at + 3 : at + 9])
            _put(result, pose, vectors @ np.swapaxes(rotation, -1, -2))
        result[..., pose : pose + 3] += base[..., at : at + 3]
    return result.astype(_float_type(relative), copy=False)


def interpolate_action(a: Array, b: Array, share: Array | float, pose_dim: int) -> Array:
    """Actions between `a` (share 0) and `b` (share 1): positions and widths linear, rotations on the shortest arc.

    Args:
        a, b: [..., D], layouts of `relative_action`.
        share: a number, or an array whose shape broadcasts with the leading shape of `a` and `b`.
        pose_dim: 3 or 9.
    """
    a, b, share = np.asarray(a), np.asarray(b), np.asarray(share, dtype=np.float64)
    kind = np.result_type(_float_type(a), _float_type(b))
    arms = num_arms(a.shape[-1], pose_dim)
    a, b, share = a.astype(np.float64), b.astype(np.float64), share[..., None]
    result = a + share * (b - a)
    if pose_dim == 9:
        leading = result.shape[:-1]
        for pose in range(3, 3 + 9 * arms, 9):
            start = rotation_from_ortho6d(a[..., pose : pose + 6])
            end = rotation_from_ortho6d(b[..., pose : pose + 6])
            turn = Rotation.from_matrix((np.swapaxes(start, -1, -2) @ end).reshape(-1, 3, 3)).as_rotvec()
            turn = np.broadcast_to(turn.reshape(*np.broadcast_shapes(a.shape, b.shape)[:-1], 3), (*leading, 3)) * share
            turned = start @ Rotation.from_rotvec(turn.reshape(-1, 3)).as_matrix().reshape(*leading, 3, 3)
            result[..., pose : pose + 6] = ortho6d_from_rotation(turned)
    return result.astype(kind, copy=False)


def densify(actions: Array, factor: int, pose_dim: int) -> Array:
    """A trajectory [T, D] with `factor` times as many frames, [T * factor, D]: frame i * factor is the old frame i.

    After the last old frame nothing is known, so it is repeated.
    """
    actions = np.asarray(actions)
    place = np.minimum(np.arange(len(actions) * factor) / factor, len(actions) - 1)
    before = np.minimum(place.astype(int), max(len(actions) - 2, 0))
    after = np.minimum(before + 1, len(actions) - 1)
    return interpolate_action(actions[before], actions[after], place - before, pose_dim)


def num_arms(width: int, pose_dim: int) -> int:
    """Number of arms, 1 or 2, of an action of `width` numbers, with or without gripper widths.

    >>> num_arms(20, 9), num_arms(8, 3), num_arms(9, 9)
    (2, 2, 1)
    """
    _check_pose_dim(pose_dim)
    for arms in (1, 2):
        if width in (arms * pose_dim, arms * (pose_dim + 1)):
            return arms
    fits = [arms * (pose_dim + grip) for arms in (1, 2) for grip in (0, 1)]
    raise ValueError(f"an action of {width} numbers does not hold poses of {pose_dim}; {fits} would")


class _Layout(NamedTuple):
    """Where the poses of an action and of its base begin."""

    arms: int
    pose_dim: int
    base_dim: int

    def pairs(self) -> list[tuple[int, int]]:
        return [(arm * self.pose_dim, arm * self.base_dim) for arm in range(self.arms)]


def _checked(action: Array, base: Array, pose_dim: int) -> tuple[Array, Array, _Layout]:
    """The inputs as arrays, the base with axes of length 1 put in before its last so that it lines up from the left."""
    action, base = np.asarray(action), np.asarray(base, dtype=np.float64)
    arms = num_arms(action.shape[-1], pose_dim)
    if base.shape[-1] not in (arms * pose_dim, arms * 9):
        allowed = sorted({arms * pose_dim, arms * 9})
        raise ValueError(
            f"a base of {base.shape[-1]} numbers does not fit {arms} arm(s) with poses of {pose_dim}; {allowed} would"
        )
    missing = action.ndim - base.ndim
    if missing < 0:
        raise ValueError(f"the base {base.shape} has more axes than the action {action.shape}")
    base = base.reshape(*base.shape[:-1], *(1,) * missing, base.shape[-1])
    return action, base, _Layout(arms, pose_dim, base.shape[-1] // arms)


def _put(result: Array, start: int, vectors: Array) -> None:
    """Write position and the orthonormal form of two columns, given as rows [..., 3, 3]."""
    result[..., start : start + 3] = vectors[..., 0, :]
    x, y, _ = _frame(vectors[..., 1, :], vectors[..., 2, :])
    result[..., start + 3 : start + 6] = x
    result[..., start + 6 : start + 9] = y


def _frame(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """x, y, z [..., 3] of `rotation_from_ortho6d`."""
    x = _unit(a)
    z = _unit(_cross(x, b))
    return x, _cross(z, x), z


def _unit(v: Array) -> Array:
    norm = np.sqrt(np.einsum("...i,...i->...", v, v))
    return v / np.maximum(norm, NORM_FLOOR)[..., None]


def _cross(a: Array, b: Array) -> Array:
    # `np.cross` costs about twice as much on small arrays
    result = np.empty(np.broadcast_shapes(a.shape, b.shape))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        result[..., i] = a[..., j] * b[..., k] - a[..., k] * b[..., j]
    return result


def _rotations(r6: Array) -> Rotation:
    return Rotation.from_matrix(rotation_from_ortho6d(r6).reshape(-1, 3, 3))


def _float_type(array: Array) -> np.dtype:
    return array.dtype if np.issubdtype(array.dtype, np.floating) else np.dtype(np.float64)


def _check_pose_dim(dim: int) -> None:
    if dim not in (3, 9):
        raise ValueError(f"a pose has 3 or 9 numbers, not {dim}")
