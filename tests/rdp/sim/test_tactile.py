"""The synthetic marker fields behave as section 8.4 says and carry what touch must carry."""

import numpy as np
import pytest

pytest.importorskip("mujoco")  # the package registers its worlds when it is imported

from mmtrain import marker_pca
from mmtrain.rdp.sim.tactile import (
    NOISE,
    contact_centre,
    marker_grid,
    marker_offsets,
    press_pca,
    tactile_image,
    wrench_offsets,
)

SENSORS = ("gelsight", "mctac")
MIDDLE = (0.5, 0.5)


def test_grids_have_the_released_sizes_and_places():
    assert marker_grid("gelsight").shape == (63, 2) and marker_grid("mctac").shape == (25, 2)
    first, second, below = marker_grid("gelsight")[[0, 1, 9]]
    np.testing.assert_allclose(first, (143 / 640, 108 / 480))
    np.testing.assert_allclose(second - first, (42 / 640, 0), atol=1e-7)
    np.testing.assert_allclose(below - first, (0, 46 / 480), atol=1e-7)


@pytest.mark.parametrize("sensor", SENSORS)
def test_offsets_follow_the_formula(sensor):
    force, torque, centre = np.array([1.5, -0.7, 4.0]), 0.03, np.array([0.45, 0.6])
    expected = []
    for place in marker_grid(sensor).astype(np.float64):
        arm = place - centre
        weight = np.exp(-(arm @ arm) / (2 * 0.22**2))
        turned = np.array([-arm[1], arm[0]])
        expected.append(weight * (0.004 * force[:2] + 0.02 * np.tanh(4.0 / 6) * arm + 0.6 * torque * turned))
    np.testing.assert_allclose(marker_offsets(sensor, force, torque, centre, None), expected, atol=2e-7)


@pytest.mark.parametrize("sensor", SENSORS)
def test_many_presses_at_once_are_the_presses_one_by_one(sensor):
    wrench = np.random.default_rng(0).normal(size=(3, 4, 6)) * [2, 2, 5, 0.02, 0.02, 0.02]
    together = wrench_offsets(sensor, wrench, None)
    assert together.dtype == np.float32 and together.shape == (3, 4, len(marker_grid(sensor)), 2)
    np.testing.assert_allclose(together[1, 2], wrench_offsets(sensor, wrench[1, 2], None), atol=1e-7)


def test_noise_is_white_and_seeded():
    still = [marker_offsets("gelsight", np.zeros(3), 0.0, MIDDLE, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(still[0], still[1])
    assert not np.array_equal(still[0], still[2])
    assert abs(np.std(still) / NOISE - 1) < 0.15


@pytest.mark.parametrize("normal", [5.0, -5.0])
def test_centre_of_pressure_comes_from_the_moments(normal):
    place = np.array([0.004, -0.003])  # m from the middle
    moment = np.cross([*place, 0.0], [0.0, 0.0, normal])
    np.testing.assert_allclose(contact_centre(np.array([0, 0, normal, *moment])), 0.5 + place / 0.02)
    weak = contact_centre(np.array([0, 0, 0.0, 0.0003, 0.0003, 0]))
    assert np.isfinite(weak).all() and (np.abs(weak - 0.5) < 0.05).all()
    assert (contact_centre(np.array([0, 0, 1.0, 9, -9, 0])) <= 0.9).all()


@pytest.mark.parametrize("sensor", SENSORS)
def test_the_embedding_explains_presses_and_carries_shear_torsion_and_some_normal_force(sensor):
    pca = press_pca(sensor)
    assert pca is press_pca(sensor) and pca.components.shape == (2 * len(marker_grid(sensor)), 15)
    rng = np.random.default_rng(5)
    normal = rng.uniform(1, 12, 1500)
    wrench = np.stack([*rng.uniform(-2, 2, (2, 1500)), normal, *(rng.uniform(-2e-3, 2e-3, (2, 1500)) * normal)], -1)
    wrench = np.concatenate([wrench, rng.uniform(-0.05, 0.05, (1500, 1))], axis=1)
    fields = wrench_offsets(sensor, wrench, rng)
    assert marker_pca.explained_ratio(pca, fields).sum() > 0.9  # the rest is noise
    inputs = np.c_[marker_pca.embed(pca, fields), np.ones(1500)]
    fitted = inputs @ np.linalg.lstsq(inputs, wrench, rcond=None)[0]
    explained = 1 - ((wrench - fitted) ** 2).sum(0) / ((wrench - wrench.mean(0)) ** 2).sum(0)
    assert (explained[[0, 1]] > 0.95).all() and explained[5] > 0.85 and 0.2 < explained[2] < 0.999


@pytest.mark.parametrize("sensor", SENSORS)
def test_picture_shows_moved_markers_and_the_press(sensor):
    none = np.zeros_like(marker_grid(sensor))
    rest = tactile_image(sensor, none, 0.0)
    assert rest.shape == (64, 64, 3) and rest.dtype == np.uint8
    column, row = (marker_grid(sensor)[len(none) // 2] * 64).astype(int)
    assert rest[row, column].mean() < 0.5 * rest[0, 32].mean()
    moved = tactile_image(sensor, none + 3 / 64, 0.0).astype(float)
    np.testing.assert_allclose(moved[10:50, 10:50].mean(), rest[7:47, 7:47].mean(), atol=4)
    assert np.abs(moved - rest).max() > 40
    pressed = tactile_image(sensor, none, -6.0)
    assert pressed.mean() > rest.mean() + 5
