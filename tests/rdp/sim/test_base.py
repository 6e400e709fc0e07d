"""What all simulated tasks share: sensors' errors, options, and messages for what cannot work."""

import importlib.util

import numpy as np
import pytest

from mmtrain.config_errors import UserError
from mmtrain.rdp import sim
from mmtrain.rdp.sim import frames

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")


def test_the_wrench_is_tared_and_carries_white_noise_and_slow_drift():
    bias = np.array([0.1, -0.2, -0.785, 0.01, 0.0, 0.02])
    truth = bias + np.array([1.0, 0.0, 7.0, 0.0, 0.05, 0.0])
    sensor = frames.WrenchSensor(bias, np.random.default_rng(0))
    readings = np.array([sensor(truth) for _ in range(20_000)]) - (truth - bias)
    white = np.diff(readings, axis=0).std(0) / np.sqrt(2)  # neighbours share their drift
    np.testing.assert_allclose(white, [0.3] * 3 + [0.01] * 3, rtol=0.05)
    drift = readings.reshape(-1, 50, 6).mean(1).std(0)
    np.testing.assert_allclose(drift, [0.2] * 3 + [0.005] * 3, rtol=0.35)
    np.testing.assert_allclose(sensor._bias, bias)


def test_vision_keeps_one_error_for_the_episode():
    rotation = frames.small_rotation(np.array([0.3, -0.2, 0.1]))
    position = np.array([0.01, 0.02, 0.03])
    biases = []
    for seed in range(300):
        vision = frames.CoarseVision(np.random.default_rng(seed))
        seen = np.array([vision(position, rotation) for _ in range(10)])
        np.testing.assert_array_less(np.abs(seen - seen.mean(0))[:, :3], 5 * 0.0005)
        np.testing.assert_allclose(np.linalg.norm(seen[:, 3:6], axis=1), 1, atol=1e-12)
        biases.append(seen.mean(0)[:3] - position)
    np.testing.assert_allclose(np.std(biases, 0), 0.003, rtol=0.2)


def test_small_rotation_is_scipys():
    from scipy.spatial.transform import Rotation

    for vector in np.random.default_rng(0).normal(0, 1, (5, 3)):
        np.testing.assert_allclose(frames.small_rotation(vector), Rotation.from_rotvec(vector).as_matrix(), atol=1e-12)
    np.testing.assert_array_equal(frames.small_rotation(np.zeros(3)), np.eye(3))


def test_leaving_marker_fields_out_changes_nothing_else():
    full, lean = sim.make("wipe"), sim.make("wipe", markers=())
    first, _ = full.reset(seed=4)
    second, _ = lean.reset(seed=4)
    action = full.unwrapped.last_action
    for _ in range(10):
        action = action - 0.002 * np.eye(10)[2]
        first, second = full.step(action)[0], lean.step(action)[0]
    assert set(first) - set(second) == {f"left_gripper{n}_{m}" for n in (1, 2) for m in _MARKER_KEYS}
    for key, value in second.items():
        np.testing.assert_array_equal(value, first[key], err_msg=key)


_MARKER_KEYS = ("initial_marker", "marker_offset", "marker_offset_emb")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": ("left_wrist",)}, "did you mean left_wrist_img"),
        ({"images": ("left_gripper1_img",), "markers": ("mctac",)}, "needs gelsight among markers"),
        ({"markers": ("digit",)}, "digit is not known"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        sim.make("wipe", **options)


def test_a_wrong_task_or_variation_is_named():
    with pytest.raises(UserError, match="did you mean wipe"):
        sim.make("wype")
    with pytest.raises(UserError, match="did you mean before"):
        sim.make("wipe").reset(seed=0, options={"variation": "befor"})


def test_a_missing_simulator_names_the_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mujoco" else find(name))
    with pytest.raises(UserError, match=r"needs mujoco: pip install 'mmtrain\[sim\]'"):
        sim.make("wipe")


def test_a_missing_egl_names_the_packages(monkeypatch):
    env = sim.make("wipe", render_mode="rgb_array")
    env.reset(seed=0)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UserError, match="apt install libegl1"):
        env.render()


@pytest.mark.parametrize("action", [np.zeros(9), np.full(10, np.nan)])
def test_a_command_that_is_no_command_is_refused(action):
    env = sim.make("wipe", markers=())
    env.reset(seed=0)
    with pytest.raises(ValueError, match="10 finite numbers"):
        env.step(action)
