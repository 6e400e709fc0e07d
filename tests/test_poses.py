"""Poses and relative trajectories against the released code's outputs (golden), and what must hold for any pose."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mmtrain import poses
from tests.golden import load
from tests.golden.fill import array

GOLDEN = load("rdp/poses.npz")
TOLERANCE = 1e-12
LAYOUTS = [(3, 3), (4, 3), (8, 3), (9, 9), (10, 9), (20, 9)]  # width, numbers of a pose


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE)


def random_actions(shape: tuple[int, ...], width: int, pose_dim: int, seed: int = 0) -> np.ndarray:
    """Actions with sound rotations, float64 [*shape, width]."""
    rng = np.random.default_rng(seed)
    action = rng.normal(size=(*shape, width))
    for arm in range(poses.num_arms(width, pose_dim) if pose_dim == 9 else 0):
        rotation = Rotation.random(int(np.prod(shape)), rng).as_matrix()
        action[..., 9 * arm + 3 : 9 * arm + 9] = poses.ortho6d_from_rotation(rotation).reshape(*shape, 6)
    return action


def test_rotations_and_conversions_are_the_golden_ones() -> None:
    close(poses.rotation_from_ortho6d(array("pose.ortho6d", (5, 6))), GOLDEN["ortho6d_matrix"])
    euler = array("pose.euler", (5, 6)).astype(np.float64)
    pose = poses.pose_from_euler(euler)
    close(pose, GOLDEN["pose6_to_pose9"])
    close(poses.quaternion_from_pose(pose), GOLDEN["pose6_to_pose7"])
    close(poses.pose_from_quaternion(-2 * GOLDEN["pose6_to_pose7"])[:, 3:], pose[:, 3:])
    close(poses.pose_from_euler(poses.euler_from_pose(pose)), pose)
    close(poses.pose_from_matrix(poses.pose_matrix(pose)), pose)
    assert poses.pose_matrix(np.zeros((2, 0, 3))).shape == (2, 0, 4, 4)


@pytest.mark.parametrize(("width", "pose_dim"), LAYOUTS)
def test_relative_actions_are_the_golden_ones(width: int, pose_dim: int) -> None:
    absolute, base = GOLDEN[f"abs_{width}"], GOLDEN[f"base_{width}"]
    relative = poses.relative_action(absolute, base, pose_dim)
    close(relative, GOLDEN[f"rel_{width}"])
    close(poses.absolute_action(relative, base, pose_dim), GOLDEN[f"back_{width}"])
    if width == pose_dim:
        close(poses.relative_pose(absolute, base), relative)
        close(poses.absolute_pose(relative, base), GOLDEN[f"back_{width}"])


def test_relative_is_the_product_of_matrices_also_of_a_rotation_that_is_not_orthonormal() -> None:
    pose, base = (np.random.default_rng(seed).normal(size=(6, 9)) for seed in (0, 1))
    expected = poses.pose_from_matrix(np.linalg.inv(poses.pose_matrix(base)) @ poses.pose_matrix(pose))
    close(poses.relative_pose(pose, base), expected)
    close(poses.relative_pose(base, base), [[0, 0, 0, 1, 0, 0, 0, 1, 0]] * 6)


def test_a_base_lines_up_with_the_first_axes_and_arms_do_not_mix() -> None:
    # as many windows as frames: lined up from the right, each frame would get another window's base
    absolute, base = random_actions((4, 4), 20, 9), random_actions((4,), 18, 9, seed=1)
    kept = absolute.copy()
    relative = poses.relative_action(absolute, base, 9)
    for window in range(4):
        close(relative[window], poses.relative_action(absolute[window], base[window], 9))
        for arm in range(2):
            part, of = slice(9 * arm, 9 * arm + 9), absolute[window, :, 9 * arm : 9 * arm + 9]
            close(relative[window, :, part], poses.relative_pose(of, base[window, part]))
    close(relative[..., 18:], absolute[..., 18:])
    close(poses.absolute_action(relative, base, 9), absolute)
    per_frame = np.broadcast_to(base[:, None], (4, 4, 18))
    close(poses.relative_action(absolute, per_frame, 9), relative)
    assert np.array_equal(absolute, kept)  # the inputs are not written to
    short = absolute.astype(np.float32)
    assert poses.relative_action(short, base, 9).dtype == np.float32
    np.testing.assert_allclose(poses.relative_action(short, base, 9), relative, atol=1e-5)


def test_a_position_alone_keeps_the_axes_of_the_robot() -> None:
    absolute, base = random_actions((2, 5), 8, 3), random_actions((2,), 18, 9)
    positions = base[:, [0, 1, 2, 9, 10, 11]]
    relative = poses.relative_action(absolute, base, 3)
    close(relative[..., :6], absolute[..., :6] - positions[:, None])
    close(poses.relative_action(absolute, positions, 3), relative)
    close(poses.absolute_action(relative, base, 3), absolute)


def test_interpolation_is_the_golden_one() -> None:
    close(poses.densify(GOLDEN["abs_4"], 2, 3), GOLDEN["interp_4_x2"])
    close(poses.densify(GOLDEN["abs_10"], 3, 9), GOLDEN["interp_10_x3"])
    close(poses.densify(GOLDEN["abs_10"][:1], 3, 9), np.repeat(GOLDEN["abs_10"][:1], 3, axis=0))


def test_interpolation_turns_evenly_on_the_shortest_arc_for_any_shape() -> None:
    a, b = random_actions((3, 1), 20, 9), random_actions((3, 1), 20, 9, seed=1)
    share = np.array([0.0, 0.25, 0.5, 1.0])
    between = poses.interpolate_action(a, b, share, 9)
    assert between.shape == (3, 4, 20)
    close(between[:, 0], a[:, 0])
    close(between[:, 3], b[:, 0])
    turned = poses.relative_pose(between[..., 9:18], a[..., 9:18])
    angle = np.linalg.norm(
        Rotation.from_matrix(poses.pose_matrix(turned)[..., :3, :3].reshape(-1, 3, 3)).as_rotvec(), 2, 1
    )
    np.testing.assert_allclose(angle.reshape(3, 4), angle.reshape(3, 4)[:, -1:] * share, atol=1e-7)
    close(poses.interpolate_action(a[0, 0], b[0, 0], 0.25, 9), between[0, 1])


@pytest.mark.parametrize(
    ("width", "base", "pose_dim", "message"),
    [
        (7, 3, 3, "an action of 7 numbers does not hold poses of 3; .3, 4, 6, 8. would"),
        (10, 18, 9, "a base of 18 numbers does not fit 1 arm"),
        (20, 6, 9, "a base of 6 numbers does not fit 2 arm"),
        (10, 9, 6, "a pose has 3 or 9 numbers, not 6"),
    ],
)
def test_widths_that_do_not_fit_are_named(width: int, base: int, pose_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poses.relative_action(np.zeros((5, width)), np.zeros(base), pose_dim)
    with pytest.raises(ValueError, match="more axes"):
        poses.relative_action(np.zeros(4), np.zeros((5, 3)), 3)
