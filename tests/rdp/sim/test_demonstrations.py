"""Demonstrations have the layout of the released stores, and their actions are commands that work."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

from mmtrain.config_errors import UserError
from mmtrain.rdp import sim
from mmtrain.rdp.sim.demonstrations import EVALUATION_SEEDS, Demonstrations, next_states
from mmtrain.robot_tasks import ARMS, MARKERS, POSE_DIM, policy_spec

TASKS = ("peel", "wipe", "lift")
TOUCHES = {"lift": ("force", "gelsight_mctac")}


@pytest.fixture(scope="module")
def lifts():
    demonstrations = Demonstrations("lift", episodes=2)
    return demonstrations, list(demonstrations.episodes())


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_has_every_stream_that_policies_read(task):
    episode = next(Demonstrations(task, episodes=1).episodes())
    length = len(episode["action"])
    assert length > 60
    for name, array in episode.items():
        if name != "variation":
            assert len(array) == length and np.isfinite(array).all(), name
            assert array.dtype == (np.float64 if name == "timestamp" else np.float32), name
    for touch in TOUCHES.get(task, ("force", "gelsight", "mctac")):
        spec = policy_spec(task, touch, "rdp", vision="pose")
        assert episode["action"].shape == episode["target"].shape == (length, spec.action_dim)
        for key, width in (spec.low_dim | spec.touch_inputs).items():
            assert episode[key].shape[1:] >= (width,), key
    for side in ARMS[task]:
        for number, sensor in ((1, "gelsight"), (2, "mctac")):
            shape = (length, MARKERS[sensor][0] * MARKERS[sensor][1], 2)
            assert episode[f"{side}_gripper{number}_marker_offset"].shape == shape
            assert episode[f"{side}_gripper{number}_initial_marker"].shape == shape


def test_actions_are_the_measured_states_one_frame_later(lifts):
    for episode in lifts[1]:
        poses = [episode[f"{side}_robot_tcp_pose"][:, : POSE_DIM["lift"]] for side in ("left", "right")]
        widths = [episode[f"{side}_robot_gripper_width"] for side in ("left", "right")]
        np.testing.assert_array_equal(episode["target"], np.concatenate(poses + widths, axis=1))
        np.testing.assert_array_equal(episode["action"][:-1], episode["target"][1:])
        np.testing.assert_array_equal(episode["action"][-1], episode["action"][-2])
    np.testing.assert_array_equal(next_states(np.array([[1.0], [2.0], [4.0]])), [[2.0], [4.0], [4.0]])


def test_recorded_actions_sent_again_lift_the_cup(lifts):
    demonstrations, episodes = lifts
    env = sim.make("lift", markers=())
    for index, episode in enumerate(episodes):
        env.reset(seed=demonstrations.world_seed(index), options={"variation": demonstrations.variation(index)})
        for action in [*episode["action"], *[episode["action"][-1]] * 10]:
            _, _, ended, cut, _ = env.step(action)
            if ended or cut:
                break
        assert env.unwrapped.outcome()["score"] == 1


def test_the_same_arguments_give_the_same_numbers_and_others_do_not(lifts):
    again = list(Demonstrations("lift", episodes=2).episodes())
    for before, after in zip(lifts[1], again, strict=True):
        assert before.keys() == after.keys()
        for key in before:
            np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    other = next(Demonstrations("lift", episodes=1, seed=1).episodes())
    assert not np.array_equal(other["object_pose"][0], again[0]["object_pose"][0])
    watched = next(Demonstrations("lift", episodes=1, mode="vr_only").episodes())
    np.testing.assert_array_equal(watched["object_pose"][0], again[0]["object_pose"][0])  # the same world
    assert not np.array_equal(watched["action"][:60], again[0]["action"][:60])


def test_order_time_and_score_of_episodes(lifts):
    demonstrations, episodes = lifts
    assert len(demonstrations) == 2 == len(demonstrations.outcomes) and demonstrations.mean_score() == 1
    assert [bytes(episode["variation"]).rstrip(b"\0") for episode in episodes] == [b"soft", b"hard"]
    time = np.concatenate([episode["timestamp"] for episode in episodes])
    assert (np.diff(time) > 0).all()
    np.testing.assert_allclose(np.diff(episodes[1]["timestamp"]), 1 / 24)
    assert np.isnan(Demonstrations("wipe").mean_score())


def test_variations_are_mixed_and_seeds_stay_clear_of_evaluation():
    for task in ("peel", "wipe"):
        names = [Demonstrations(task).variation(index) for index in range(60)]
        assert {name: names.count(name) for name in names} == {"none": 15, "before": 15, "after": 30}
    seeds = [Demonstrations("peel", 1000, seed=seed).world_seed(index) for seed in (0, 1, 99) for index in (0, 999)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < EVALUATION_SEEDS


def test_description_tells_stores_apart():
    descriptions = [
        Demonstrations("peel"),
        Demonstrations("wipe"),
        Demonstrations("peel", episodes=2),
        Demonstrations("peel", mode="vr_only"),
        Demonstrations("peel", seed=1),
        Demonstrations("peel", images=True),
    ]
    assert len({str(one.describe()) for one in descriptions}) == len(descriptions)
    assert Demonstrations("peel").describe() == descriptions[0].describe()
    assert {type(value) for value in descriptions[0].describe().values()} <= {str, int, bool}


def test_pictures_only_when_asked_for(lifts):
    assert not any(name.endswith("_img") for name in lifts[1][0])
    pictures = next(Demonstrations("lift", episodes=1, images=True).episodes())["left_gripper1_img"]
    assert pictures.shape[1:] == (64, 64, 3) and pictures.dtype == np.uint8
    assert np.abs(pictures[-1].astype(int) - pictures[0]).mean() > 1  # the grip at the end shows


def test_pca_fits_the_sensors():
    pca = Demonstrations("lift").pca()
    assert {name: matrix.components.shape for name, matrix in pca.items()} == {"gelsight": (126, 15), "mctac": (50, 15)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "wip"}, r"demonstrations\.task: wip is not known, did you mean wipe"),
        ({"task": "wipe", "mode": "vr"}, r"demonstrations\.mode: vr is not known"),
        ({"task": "wipe", "episodes": 0}, r"demonstrations\.episodes: 0, must be 1 to 1000"),
        ({"task": "wipe", "seed": 100}, r"demonstrations\.seed: 100, must be 0 to 99"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Demonstrations(**arguments)


def test_making_demonstrations_needs_no_torch():
    code = "import sys; from mmtrain.rdp.sim.demonstrations import Demonstrations as D; next(D('lift', 1).episodes()); "
    done = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
