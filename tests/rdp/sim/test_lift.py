"""Bimanual lifting: the cup can be lifted by feel, and only by feel can both cups be."""

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

from mmtrain.config_errors import UserError
from mmtrain.rdp import sim
from mmtrain.rdp.sim import lift_expert
from mmtrain.rdp.sim.lift import ARC_SHIFT, CUPS, LiftEnv, arc_shift
from mmtrain.rdp.sim.lift_expert import LiftExpert

CELLS = ("soft", "hard")


def episode(variation: str, seed: int, mode: str = "tactar", arc: float | None = None) -> dict:
    """Outcome of one episode of the scripted expert."""
    env = LiftEnv(markers=())
    expert = LiftExpert(mode, np.random.default_rng(seed))
    expert.arc = expert.arc if arc is None else arc
    frame, info = env.reset(seed=seed, options={"variation": variation})
    over = False
    while not over:
        frame, _, ended, cut, info = env.step(expert.act(frame, info))
        over = ended or cut
    return env.outcome() | {"force": info["force"]}


@pytest.mark.parametrize("variation", CELLS)
@pytest.mark.parametrize("arc", [-1.0, 1.0])
def test_the_expert_lifts_along_either_arc(variation, arc):
    outcome = episode(variation, seed=3, arc=arc)
    assert outcome["score"] == 1 and outcome["clamped"] and outcome["lifted"] and not outcome["dropped"]
    assert outcome["compression_mm"] < 1000 * CUPS[variation].full and outcome["path_error_mm"] < 10
    assert outcome["height_mm"] > 150 and outcome["frames"] < 200 and outcome["perturbed_at"] == -1
    assert (outcome["force"] > 1).all() and outcome["stable_force_share"] > 0.8


def test_straight_up_is_neither_arc():
    outcome = episode("hard", seed=3, arc=0.0)
    assert outcome["height_mm"] > 150 and not outcome["dropped"]
    assert not outcome["lifted"] and outcome["score"] == 0
    np.testing.assert_allclose(outcome["path_error_mm"], 1000 * ARC_SHIFT, atol=5)
    assert arc_shift(0.0) == 0 and arc_shift(0.075) == ARC_SHIFT and abs(arc_shift(0.2)) < 1e-12


@pytest.mark.parametrize(
    ("variation", "grip", "score"), [("soft", 3.0, 0.5), ("soft", 0.8, 0.0), ("hard", 4.4, 0.5), ("hard", 6.5, 0.0)]
)
def test_grips_too_tight_or_too_loose_lose(monkeypatch, variation, grip, score):
    monkeypatch.setattr(lift_expert, "GRIP", grip)
    outcome = episode(variation, seed=3)
    assert outcome["score"] == score
    assert outcome["lifted"] == (grip > 2)


def test_one_squeeze_by_position_does_not_fit_both_cups(monkeypatch):
    monkeypatch.setattr(lift_expert, "BLIND_NOISE", 0.0)
    monkeypatch.setattr(lift_expert, "SEEN_SLIP", np.inf)
    for squeeze, failing in ((0.0035, "soft"), (0.0095, "hard")):
        monkeypatch.setattr(lift_expert, "BLIND_SQUEEZE", squeeze)
        scores = {cell: np.mean([episode(cell, seed, "vr_only")["score"] for seed in range(2)]) for cell in CELLS}
        assert scores[failing] < 0.4 < max(scores.values())


def test_the_cups_look_and_feel_the_same_until_they_are_touched():
    env = LiftEnv()
    first = [env.reset(seed=11, options={"variation": cell})[0] for cell in CELLS]
    for key in first[0]:
        np.testing.assert_array_equal(first[0][key], first[1][key], err_msg=key)
    assert env.observation_space.contains(first[0])
    assert (
        first[0]["left_gripper2_marker_offset_emb"].shape == (15,) == first[0]["right_gripper1_marker_offset_emb"].shape
    )


def test_a_press_reads_as_positive_normal_force_of_both_arms_and_episodes_repeat():
    last = []
    for _ in range(2):
        env = LiftEnv()
        expert = LiftExpert("tactar", np.random.default_rng(1))
        frame, info = env.reset(seed=5, options={"variation": "hard"})
        for _ in range(70):
            frame, _, _, _, info = env.step(expert.act(frame, info))
        last.append(frame)
    for key in last[0]:
        np.testing.assert_array_equal(last[0][key], last[1][key], err_msg=key)
    assert info["contact"] and (info["force"] > 1.5).all()
    for side, force, outward in zip(("left", "right"), info["force"], (-1, 1), strict=True):
        assert abs(frame[f"{side}_robot_tcp_wrench"][2] - force) < 1.5  # noise and drift
        columns = frame[f"{side}_robot_tcp_pose"][3:].reshape(2, 3)
        np.testing.assert_allclose(np.cross(*columns), [outward, 0, 0], atol=1e-6)  # the tool's z leaves the cup


def test_unknown_variation():
    with pytest.raises(UserError, match=r"variation: sof .*did you mean soft"):
        sim.make("lift").reset(seed=0, options={"variation": "sof"})


@pytest.mark.slow
@pytest.mark.parametrize("variation", CELLS)
def test_the_expert_scores_at_least_095(variation):
    assert np.mean([episode(variation, 100_000 + seed)["score"] for seed in range(50)]) >= 0.95
