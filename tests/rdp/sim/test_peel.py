"""Peel-v0: what a strip is, repeatable, solved by feel, taken up after a break, failed by plans without feel."""

import ctypes.util
import math

import numpy as np
import pytest

from mmtrain.poses import rotation_from_ortho6d
from mmtrain.rdp import sim

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from mmtrain.rdp.sim.experts import Expert  # noqa: E402
from mmtrain.rdp.sim.peel import BLADE_RADIUS, LENGTH, STUCK_FRAMES, Strip  # noqa: E402

STEP = 0.002


@pytest.fixture(scope="module")
def env():
    return sim.make("peel", markers=())


def rollout(env, seed, variation, policy=None):
    """Frames, infos and the outcome of an episode of the expert or of a policy(frame, info)."""
    policy = policy or Expert("peel", "tactar", np.random.default_rng([seed, 1])).act
    frame, info = env.reset(seed=seed, options={"variation": variation})
    frames, infos, over = [frame], [info], False
    while not over:
        frame, _, terminated, truncated, info = env.step(policy(frame, info))
        frames.append(frame)
        infos.append(info)
        over = terminated or truncated
    return frames, infos, env.unwrapped.outcome()


def watch_only(frame):
    """A policy that sees the cucumber at every frame and feels nothing: it rides 5 mm deep where the surface seems."""
    state = {
        "seen": frame["object_pose"].astype(float),
        "step": 0,
        "at": frame["left_robot_tcp_pose"][:3].astype(float),
    }

    def act(frame, info):
        state["seen"] = state["seen"] + 0.35 * (frame["object_pose"] - state["seen"])
        state["step"] += 1
        along = min(max(0, state["step"] - 35) * 0.0016, 0.198)
        above = 0.05 if along == 0.198 else 0.03 * max(0.0, 1 - max(0, state["step"] - 25) / 10)
        rotation = rotation_from_ortho6d(state["seen"][3:])
        to_go = state["seen"][:3] + rotation @ [along - 0.099, 0, 0.0215 - 0.005 + above] - state["at"]
        state["at"] = state["at"] + to_go * min(1, 0.006 / np.linalg.norm(to_go))
        return np.append(state["at"], 0.03)

    return act


def ride(strip, start, forces):
    """Pass over the ground from `start` on, 2 mm a frame, with these forces; where it ends."""
    for force in forces:
        strip.pass_over(start, force)
        start += STEP
    return start


def test_a_strip_grows_by_new_ground_inside_the_band():
    strip = Strip()
    ride(strip, -0.12, [7.0] * 130)
    assert strip.longest == pytest.approx(LENGTH)  # what is beyond either end does not count
    strip = Strip()
    ride(strip, 0, [7, 7, 7, 2.0, 2.0, 2.0, 13, 7, 7])  # two steps, four of the wrong force, two steps
    assert strip.longest == pytest.approx(4 * STEP)
    ride(strip, 0, [7] * 9)
    assert strip.longest == pytest.approx(4 * STEP)  # ground that was passed before is not new
    jumping = Strip()
    jumping.pass_over(-0.08, 7)
    jumping.pass_over(0.08, 7)
    assert jumping.longest == 0


@pytest.mark.parametrize(("weak", "breaks"), [(2, False), (3, True)])
def test_a_strip_breaks_after_three_weak_frames(weak, breaks):
    strip = Strip()
    at = ride(strip, 0, [7] * 6 + [1.0] * weak)
    ride(strip, at + 0.01, [7] * 4)  # too far ahead to be taken up
    assert strip.longest == pytest.approx((5 if breaks else 8) * STEP)


@pytest.mark.parametrize(("where", "longest"), [(0.002, 10), (0.014, 8), (0.016, 5), (-0.004, 5)])
def test_a_broken_strip_is_taken_up_only_where_it_broke(where, longest):
    strip = Strip()
    ride(strip, 0, [7] * 6 + [0.0] * 3)  # 10 mm long
    count = 9 + 1 if where == 0.002 else 4
    ride(strip, where, [7] * count)
    assert strip.longest == pytest.approx(longest * STEP)


def test_a_blade_that_digs_in_is_stuck_for_two_seconds():
    strip = Strip()
    at = ride(strip, 0, [7] * 6 + [18.1])
    assert strip.stuck == STUCK_FRAMES
    ride(strip, 0.006, [7] * STUCK_FRAMES)
    assert strip.stuck == 0 and strip.longest == pytest.approx(5 * STEP)
    ride(strip, at - 0.004, [7] * 3)
    assert strip.longest == pytest.approx(7 * STEP)


def test_the_place_of_the_blade_is_that_of_a_search_along_blade_and_axis(env):
    for seed in range(5):
        env.reset(seed=seed)
        world = env.unwrapped
        rng = np.random.default_rng(seed)
        rotation = world.data.xmat[world._object].reshape(3, 3)
        target = rng.uniform(-0.09, 0.09)
        above = world._on_arc(target, 0.03)
        above[1] = rng.uniform(-0.01, 0.01)
        middle = world.data.xpos[world._object] + rotation @ above
        world.data.qpos[:3] = middle - world._pad_position
        mujoco.mj_kinematics(world.model, world.data)
        place = world._where()
        axis = np.array([world._on_arc(along) for along in np.linspace(-0.12, 0.12, 1201)])
        blade = (
            middle + np.linspace(-0.03, 0.03, 601)[:, None] * [0, 1, 0] - world.data.xpos[world._object]
        ) @ rotation
        apart = np.linalg.norm(axis[:, None] - blade, axis=-1)
        nearest, beside = np.unravel_index(apart.argmin(), apart.shape)
        assert place.gap == pytest.approx(apart.min() - world.radius - BLADE_RADIUS, abs=1e-4)
        assert place.along == pytest.approx(-0.12 + nearest * 0.0002, abs=0.001)  # a flat minimum
        assert place.beside == pytest.approx(-0.03 + beside * 0.0001, abs=0.002)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it():
    check_env(sim.make("peel").unwrapped, skip_render_check=True)


def test_an_episode_repeats_bit_for_bit(env):
    first, _, outcome = rollout(env, 7, "after")
    second, _, again = rollout(sim.make("peel", markers=()), 7, "after")
    assert outcome == again and len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)
    other, _ = env.reset(seed=8)
    assert not np.array_equal(first[0]["object_pose"], other["object_pose"])


@pytest.mark.parametrize("variation", ["none", "before", "after"])
def test_the_expert_peels_the_whole_length_with_a_steady_force(env, variation):
    for seed in (11, 12, 13, 14):
        _, infos, outcome = rollout(env, seed, variation)
        assert outcome["score"] == outcome["length_ratio"] > 0.95
        assert outcome["peak_force"] < 15 and not outcome["stopped_for_force"]
        assert 6 < outcome["mean_contact_force"] < 8
        assert outcome["stable_force_share"] > 0.9
        assert outcome["frames"] == infos[-1]["frame"] < 220  # time is left to make up for a loss
        start = outcome["perturbed_at"]
        if variation == "before":
            assert not any(info["contact"] for info in infos[: start + 1])
            assert infos[start]["gap"] < 0.045 < infos[0]["gap"]
        elif variation == "after":
            assert 12 <= sum(info["contact"] for info in infos[: start + 1]) <= 60
            assert min(info["force"] for info in infos[start : start + 15]) < 1.5  # it did lose the contact


def test_one_who_does_not_follow_loses_the_strip(env):
    for seed in (41, 42, 43):
        expert, held = Expert("peel", "tactar", np.random.default_rng(seed)), []

        def hold(frame, info, expert=expert, held=held):
            if not info["perturbed"]:
                held[:] = [expert.act(frame, info)]
            return held[0]

        _, infos, outcome = rollout(env, seed, "after", hold)
        assert infos[outcome["perturbed_at"]]["contact"]
        assert not any(info["contact"] for info in infos[outcome["perturbed_at"] + 10 :])
        assert outcome["length_ratio"] < 0.6


@pytest.mark.parametrize("variation", ["none", "after"])
def test_a_policy_that_feels_nothing_fails(env, variation):
    scores = []
    for seed in range(60, 66):
        frame, _ = env.reset(seed=seed, options={"variation": variation})
        scores.append(rollout(env, seed, variation, watch_only(frame))[2]["score"])
    assert np.mean(scores) < 0.7


def test_watching_peels_less_and_less_steadily_than_feeling(env):
    results = {}
    for mode in ("tactar", "vr_only"):
        outcomes = [
            rollout(env, seed, "after", Expert("peel", mode, np.random.default_rng(seed)).act)[2] for seed in range(6)
        ]
        results[mode] = [np.mean([outcome[key] for outcome in outcomes]) for key in ("score", "stable_force_share")]
    assert results["vr_only"][0] < results["tactar"][0] - 0.1
    assert results["vr_only"][1] < results["tactar"][1] - 0.05


def test_the_measured_next_state_is_a_valid_command(env):
    """Section 1.4 takes it for the label, so sending it must do the same work."""
    frames, infos, _ = rollout(env, 14, "none")
    states = [np.append(frame["left_robot_tcp_pose"][:3], 0.03) for frame in frames[1:]]
    actions = iter(states)
    _, replayed, outcome = rollout(env, 14, "none", lambda frame, info: next(actions, states[-1]))
    assert outcome["length_ratio"] > 0.95
    peeled = [(a["force"], b["force"]) for a, b in zip(infos, replayed, strict=False) if a["force"] > 4]
    assert np.abs(np.diff(peeled, axis=1)).mean() < 1.5


def test_a_stuck_blade_moves_up_and_down_only_then_the_arm_stops(env):
    expert = Expert("peel", "tactar", np.random.default_rng(3))
    frame, info = env.reset(seed=3)
    for _ in range(60):
        action = expert.act(frame, info)
        frame, *_, info = env.step(action)
    assert 4 < info["force"] < 11
    while not info["stuck"]:
        action[2] -= 0.002
        frame, *_, info = env.step(action)
    stuck_at = frame["left_robot_tcp_pose"][:3]
    peeled = env.unwrapped.outcome()["length_ratio"]
    for _ in range(10):
        action[0] += 0.003
        frame, *_ = env.step(action)
    np.testing.assert_allclose(frame["left_robot_tcp_pose"][:2], stuck_at[:2], atol=0.001)
    terminated, rewards = False, 0.0
    while not terminated:
        action[2] -= 0.002
        _, reward, terminated, *_ = env.step(action)
        rewards += reward
    outcome = env.unwrapped.outcome()
    assert outcome["stopped_for_force"] and 30 < outcome["peak_force"] < 40
    assert rewards == 0 and outcome["score"] == peeled > 0  # what was peeled before counts


def test_worlds_differ_as_they_should(env):
    drawn = []
    for seed in range(40):
        env.reset(seed=seed)
        world = env.unwrapped
        drawn.append([world.radius, world.bend, *world.tool_offset, *world.data.mocap_pos[0]])
        assert np.linalg.norm(world._on_arc(0.09) - world._on_arc(-0.09)) == pytest.approx(
            2 / world.bend * math.sin(0.09 * world.bend)
        )
    low, high = np.min(drawn, 0), np.max(drawn, 0)
    limits = np.array([[0.018, 0.025], [-2, 2], *[[-0.006, 0.006]] * 3, *[[-0.03, 0.03]] * 3])
    assert (low >= limits[:, 0]).all() and (high <= limits[:, 1]).all()
    assert (high - low > 0.8 * (limits[:, 1] - limits[:, 0])).all()


@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="no EGL")
def test_pictures_show_what_is_peeled_and_change_nothing():
    env = sim.make("peel", images=("left_wrist_img",), size=64, markers=(), render_mode="rgb_array")
    plain = sim.make("peel", markers=())
    expert = Expert("peel", "tactar", np.random.default_rng(2))
    frame, info = env.reset(seed=2)
    plain.reset(seed=2)
    for _ in range(70):
        action = expert.act(frame, info)
        frame, *_, info = env.step(action)
        for key, value in plain.step(action)[0].items():
            np.testing.assert_array_equal(value, frame[key], err_msg=key)
    picture = env.render()
    assert picture.shape == (360, 480, 3) and picture.std() > 5
    env.unwrapped.model.geom_rgba[:, 3] *= [not geom.startswith("mark") for geom in _geoms(env.unwrapped.model)]
    env.unwrapped.strip.cuts.clear()
    assert (np.abs(picture.astype(int) - env.render()).max(-1) > 20).sum() > 20
    env.close()


def _geoms(model):
    return [model.geom(index).name for index in range(model.ngeom)]
