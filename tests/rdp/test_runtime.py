from dataclasses import replace

import numpy as np
import pytest

from mmtrain import poses
from mmtrain.config_errors import UserError
from mmtrain.rdp.chunks import Plan
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.rdp.frame_history import Counts
from mmtrain.rdp.runtime import Controller, RuntimeSettings, replay
from mmtrain.robot_observations import base_pose
from mmtrain.robot_tasks import policy_spec
from tests.rdp.runtime_pieces import SPECS, action_plan, condition_plan, decoder, frames

DP = policy_spec("peel", "none", "dp", "pose")
TOUCH = "left_robot_tcp_wrench"


def run(controller: Controller, readings: list[dict], plans: list[tuple[Plan, int]] = ()) -> list[np.ndarray | None]:
    """Lock-step: commands of all frames; plans come in the frame they were made at."""
    commands = []
    for step, frame in enumerate(readings):
        controller.observe(frame, step)
        for plan, available_at in plans:
            if plan.made == step:
                controller.accept(plan, available_at)
        commands.append(controller.command(step))
    return commands


def rdp(tag: str = "peel_force", **settings: object) -> Controller:
    return Controller(RuntimeSettings(**settings), decoder(tag), SPECS[tag])


def expected(controller: Controller, plan: Plan, readings: list[dict], step: int, ahead: int = 0) -> np.ndarray:
    """The prefix form, spelled out: frames made - 3 ... step, the last repeated for what is ahead."""
    keys = list(controller.spec.touch_inputs)
    touch = [
        np.concatenate([readings[min(max(frame, 0), step)][key] for key in keys])
        for frame in range(plan.made - 3, step + ahead + 1)
    ]
    action = controller.decoder.decode(plan.rows, np.stack(touch))
    dim = controller.spec.pose_dim
    return poses.absolute_action(action, plan.base, dim) if controller.spec.relative else action


@pytest.mark.parametrize("tag", SPECS)
@pytest.mark.parametrize("stateful", [True, False])
def test_rdp_decodes_row_by_row_over_the_window_of_training(tag: str, stateful: bool) -> None:
    controller = rdp(tag, stateful=stateful)
    readings = frames(controller.spec, 40)
    dims = controller.decoder.condition_dim
    first, second = condition_plan(0, dims, controller.spec), condition_plan(16, dims, controller.spec)
    commands = run(controller, readings, [(first, 4), (second, 20)])
    assert commands[:4] == [None] * 4
    for step in range(4, 40):
        plan = first if step < 20 else second
        np.testing.assert_allclose(commands[step], expected(controller, plan, readings, step), atol=1e-12)
    assert controller.counts == Counts()


def test_relative_actions_go_onto_the_pose_that_the_plan_was_made_at() -> None:
    """With an observation of its own a policy gives the base; the arm's motion since does not matter."""
    controller = rdp("wipe_gelsight")
    readings = frames(controller.spec, 8)
    controller.observe(readings[0], 0)
    base = base_pose(controller.spec, controller.observation())
    np.testing.assert_allclose(base, readings[0]["left_robot_tcp_pose"])
    plan = condition_plan(0, 64, controller.spec, base=base)
    controller.accept(plan, 4)
    for step in range(1, 8):
        controller.observe(readings[step], step)
        command = controller.command(step)
    np.testing.assert_allclose(
        poses.relative_action(command, base, 9)[:3],
        controller.decoder.decode(
            plan.rows,
            np.stack([readings[max(f, 0)]["left_gripper1_marker_offset_emb"] for f in range(-3, 8)]),
        )[:3],
        atol=1e-12,
    )


def test_a_later_gripper_takes_its_width_from_a_later_row() -> None:
    controller = rdp("lift_two", gripper_latency=8)
    readings = frames(controller.spec, 29)
    plan = condition_plan(0, 64, controller.spec)
    commands = run(controller, readings, [(plan, 4)])
    for step in (4, 10, 24, 26):
        arm = expected(controller, plan, readings, step)
        gripper = expected(controller, plan, readings, step, ahead=min(4, 28 - step))
        np.testing.assert_allclose(commands[step], [*arm[:6], *gripper[6:]], atol=1e-12)
    assert not np.allclose(commands[10][6:], expected(controller, plan, readings, 10)[6:])


def test_a_late_plan_is_waited_for_on_the_old_rows_then_held() -> None:
    controller = rdp()
    readings = frames(controller.spec, 40)
    first, late = condition_plan(0, 32, controller.spec), condition_plan(16, 32, controller.spec)
    commands = run(controller, readings, [(first, 4), (late, 35)])
    np.testing.assert_allclose(commands[28], expected(controller, first, readings, 28), atol=1e-12)
    for step in range(29, 35):
        np.testing.assert_array_equal(commands[step], commands[28])
    np.testing.assert_allclose(commands[35], expected(controller, late, readings, 35), atol=1e-12)
    assert controller.counts == Counts(late_plans=1, held_commands=6)


def test_a_plan_that_is_over_when_it_comes_is_counted() -> None:
    controller = rdp()
    controller.observe(frames(controller.spec, 1)[0], 0)
    assert not controller.accept(condition_plan(0, 32, controller.spec), 29)
    assert controller.counts == Counts(late_plans=1, expired_plans=1)
    assert controller.wants_plan(0)


@pytest.mark.parametrize("bad", ["absent", "none", "nan", "frame"])
@pytest.mark.parametrize("policy", ["hold", "last_valid"])
@pytest.mark.parametrize("stateful", [True, False])
def test_missing_touch(bad: str, policy: str, stateful: bool) -> None:
    controller = rdp(on_missing_touch=policy, stateful=stateful)
    readings = frames(controller.spec, 20)
    filled = [dict(frame) for frame in readings]
    gaps = (2, 8, 9, 15)
    for step in gaps:  # what the decoder is to see
        filled[step] = filled[step - 1] if bad == "frame" else filled[step] | {TOUCH: filled[step - 1][TOUCH]}
    broken = [dict(frame) for frame in readings]
    for step in gaps:
        value = np.where(np.arange(6) == 4, np.nan, readings[step][TOUCH]) if bad == "nan" else None
        broken[step][TOUCH] = value
        if bad == "absent":
            del broken[step][TOUCH]
    plan, commands = condition_plan(0, 32, controller.spec), []
    for step, frame in enumerate(broken):
        if not (bad == "frame" and step in gaps):
            controller.observe(frame, step)
        if step == 0:
            controller.accept(plan, 4)
        commands.append(controller.command(step))
    assert commands[:4] == [None] * 4
    for step in range(4, 20):
        held = policy == "hold" and step in gaps
        want = commands[step - 1] if held else expected(controller, plan, filled, step)
        np.testing.assert_allclose(commands[step], want, atol=1e-12)
    counts = controller.counts
    assert (counts.missing_touch, counts.nan_touch) == ((0, 4) if bad == "nan" else (4, 0))
    assert counts.held_commands == (3 if policy == "hold" else 0)
    assert counts.missing_observation == (4 if bad == "frame" else 0)


@pytest.mark.parametrize("policy", ["hold", "last_valid"])
def test_touch_that_was_never_there_holds_the_arm_where_it_is(policy: str) -> None:
    controller = rdp(on_missing_touch=policy)
    readings = frames(controller.spec, 12)
    broken = [frame | ({TOUCH: None} if step < 8 else {}) for step, frame in enumerate(readings)]
    plan = condition_plan(0, 32, controller.spec)
    commands = run(controller, broken, [(plan, 4)])
    measured = [*readings[4]["left_robot_tcp_pose"][:3], *readings[4]["left_robot_gripper_width"]]
    for step in range(4, 8):
        np.testing.assert_allclose(commands[step], measured)
    first_valid = [frame | {TOUCH: readings[max(step, 8)][TOUCH]} for step, frame in enumerate(readings)]
    for step in range(8, 12):
        np.testing.assert_allclose(commands[step], expected(controller, plan, first_valid, step), atol=1e-12)
    assert controller.counts.held_commands == 4


def test_a_frame_that_comes_after_its_command_is_not_used() -> None:
    controller = rdp(on_missing_touch="last_valid")
    readings = frames(controller.spec, 10)
    plan = condition_plan(0, 32, controller.spec)
    for step in range(10):
        if step != 6:
            controller.observe(readings[step], step)
        if step == 0:
            controller.accept(plan, 4)
        command = controller.command(step)
        if step == 6:
            controller.observe(readings[6], 6)
    readings[6] = readings[5]
    np.testing.assert_allclose(command, expected(controller, plan, readings, 9), atol=1e-12)
    assert controller.counts.late_frames == 1


@pytest.mark.parametrize("where", ["rows", "base"])
def test_a_plan_with_nan_is_rejected(where: str) -> None:
    controller = rdp()
    readings = frames(controller.spec, 24)
    good = condition_plan(0, 32, controller.spec)
    changes = {where: np.full(32 if where == "rows" else 9, np.nan)}
    bad = condition_plan(16, 32, controller.spec, **changes)
    commands = run(controller, readings, [(good, 4), (bad, 20)])
    np.testing.assert_allclose(commands[23], expected(controller, good, readings, 23), atol=1e-12)
    assert controller.counts == Counts(rejected_plans=1)
    assert controller.wants_plan(17)  # it is asked for again


def test_commands_are_finite_whatever_comes() -> None:
    """Random gaps, NaN, infinities, late and broken plans."""
    generator = np.random.default_rng(0)
    for seed in range(6):
        mode = ("newest", "avg", "hato", "act", "oldest", "act_new_first")[seed]
        controller = rdp(ensembling=mode, on_missing_touch=("hold", "last_valid")[seed % 2], gripper_latency=6)
        started = False
        for step, frame in enumerate(frames(controller.spec, 150, seed)):
            for key in frame:
                if step and generator.random() < 0.2:
                    frame[key] = (None, np.full_like(frame[key], (np.nan, np.inf)[step % 2]))[
                        int(generator.integers(2))
                    ]
            if step == 0 or generator.random() < 0.8:
                controller.observe(frame, step)
            if generator.random() < 0.15:
                broken = generator.random() < 0.3
                changes = {"rows": np.full(32, np.nan)} if broken else {}
                plan = condition_plan(step, 32, controller.spec, **changes)
                controller.accept(plan, step + int(generator.integers(0, 35)))
            command = controller.command(step)
            started |= command is not None
            assert (command is not None) == started
            assert command is None or np.isfinite(command).all()
        assert started and controller.counts.held_commands and controller.counts.missing_touch


def test_dp_goes_straight_between_rows_at_24_a_second() -> None:
    controller = Controller(RuntimeSettings(), None, DP)
    commands = run(controller, frames(DP, 60), [(action_plan(made), made + 4) for made in (0, 16, 32)])
    measured = frames(DP, 5)[4]["left_robot_tcp_pose"][:3]
    np.testing.assert_allclose(commands[4][:3], (measured + 6) / 2)  # half way to the first row that is still due
    for step in range(5, 60):
        np.testing.assert_allclose(commands[step], np.full(4, step + 1.0), atol=1e-12)


def test_dp_starts_a_new_plan_from_the_last_command() -> None:
    controller = Controller(RuntimeSettings(), None, DP)
    plans = [(action_plan(0), 4), (action_plan(16, offset=10), 20)]
    commands = np.stack(run(controller, frames(DP, 40), plans)[4:])
    np.testing.assert_allclose(commands[[14, 15, 16, 17, 18], 0], [19, 20, 26, 32, 33])


def test_dp_of_unequal_beats() -> None:
    """Plans made in odd and even frames still speak for the same moments."""
    controller = Controller(RuntimeSettings(ensembling="avg"), None, DP)
    plans = [(action_plan(made), made + 4) for made in (0, 5, 10, 15)]
    for step, command in enumerate(run(controller, frames(DP, 40), plans)[5:], 5):
        np.testing.assert_allclose(command, np.full(4, step + 1.0), atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [("newest", [0, 1]), ("oldest", [1, 0]), ("avg", [0.5, 0.5]), ("hato", [0.2, 0.8]), ("act", [0.525, 0.475])],
)
def test_dp_ensembling_counts_steps_of_the_policy(mode: str, weights: list[float]) -> None:
    """Two plans four frames, so two steps, apart: tau 0.5 gives 0.25 to 1."""
    controller = Controller(RuntimeSettings(ensembling=mode, chunk_every=4, act_k=0.1), None, DP)
    commands = run(controller, frames(DP, 14), [(action_plan(0), 4), (action_plan(4, offset=100), 8)])
    np.testing.assert_allclose(commands[11], np.full(4, 12 + 100 * weights[1]), atol=2e-2)
    np.testing.assert_allclose(commands[13], np.full(4, 14 + 100 * weights[1]), atol=2e-2)


def test_a_plan_used_from_its_first_row() -> None:
    """The ablation: what was meant for frame 1 is sent for frame 5, decoded over the newest frames."""
    controller = rdp(match_latency=False)
    readings = frames(controller.spec, 30)
    plan = condition_plan(0, 32, controller.spec)
    commands = run(controller, readings, [(plan, 4)])
    shifted = Plan(4, plan.rows, plan.base)
    for step in (4, 12, 29):
        np.testing.assert_allclose(commands[step], expected(controller, shifted, readings, step), atol=1e-12)
    assert controller.counts == Counts()
    assert not controller.wants_plan(15) and controller.wants_plan(16)


def test_observation_is_the_newest_frame_and_the_one_two_before() -> None:
    for spec in (SPECS["wipe_gelsight"], DP):
        controller = Controller(RuntimeSettings(), None, spec)
        assert not controller.wants_plan(0)
        readings = frames(spec, 6)
        for step, frame in enumerate(readings):
            controller.observe(frame, step)
            observation = controller.observation()
            assert set(observation) == set(spec.low_dim)
            for key, value in observation.items():
                np.testing.assert_array_equal(value, [readings[max(step - 2, 0)][key], frame[key]])
        assert observation["left_robot_tcp_pose"].shape == (2, 9)


def test_normal_force_is_the_third_number_of_the_wrench() -> None:
    spec = policy_spec("peel", "normal_force", "rdp", "pose")
    full = decoder("peel_force").weights
    third = slice(2, 3)
    narrow = replace(
        full,
        weight_ih=np.delete(full.weight_ih, [32, 33, 35, 36, 37], 1),
        touch_scale=full.touch_scale[third],
        touch_offset=full.touch_offset[third],
    )
    controller = Controller(RuntimeSettings(), NumpyDecoder(narrow, np.float64), spec)
    readings = [frame | {TOUCH: np.arange(6.0) + i} for i, frame in enumerate(frames(spec, 6))]
    plan = condition_plan(0, 32, spec)
    command = run(controller, readings, [(plan, 4)])[5]
    touch = np.maximum(np.arange(-3.0, 6), 0)[:, None] + 2
    decoded = controller.decoder.decode(plan.rows, touch)
    np.testing.assert_allclose(command, poses.absolute_action(decoded, plan.base, 3))
    assert controller.observation()[TOUCH].shape == (2, 6)  # the slow policy cuts for itself


def test_a_decoder_without_touch_needs_none() -> None:
    state = {"decoder.rnn.weight_ih_l0": np.ones((6, 3)), "decoder.rnn.weight_hh_l0": np.ones((6, 2))}
    state |= {"decoder.rnn.bias_ih_l0": np.ones(6), "decoder.rnn.bias_hh_l0": np.ones(6)}
    state |= {"decoder.fc.weight": np.ones((4, 2)), "decoder.fc.bias": np.ones(4)}
    state |= {"normalizer.params_dict.action.scale": np.ones(4), "normalizer.params_dict.action.offset": np.ones(4)}
    fast = decoder("peel_force").from_state(state)
    controller = Controller(RuntimeSettings(), fast, SPECS["peel_force"])
    readings = [frame | {TOUCH: None} for frame in frames(controller.spec, 8)]
    commands = run(controller, readings, [(condition_plan(0, 3, controller.spec), 4)])
    assert commands[7] is not None and controller.counts.held_commands == 0


def test_long_episodes() -> None:
    controller = rdp()
    readings = frames(controller.spec, 700)
    plans = [condition_plan(made, 32, controller.spec) for made in range(0, 700, 16)]
    commands = run(controller, readings, [(plan, plan.made + 4) for plan in plans])
    for step in (300, 511, 512, 513, 530, 699):
        plan = plans[(step - 4) // 16]
        np.testing.assert_allclose(commands[step], expected(controller, plan, readings, step), atol=1e-12)


def test_replay_is_the_loop() -> None:
    readings = frames(SPECS["peel_force"], 24)
    plan = condition_plan(0, 32, SPECS["peel_force"])
    table = {key: np.stack([frame[key] for frame in readings]) for key in readings[0]}
    sent = replay(rdp(), table, [plan])
    commands = run(rdp(), readings, [(plan, 4)])
    assert np.isnan(sent[:4]).all()
    np.testing.assert_array_equal(sent[4:], np.stack(commands[4:]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latency": -1}, "latency: -1"),
        ({"chunk_every": 0}, "chunk_every: 0"),
        ({"gripper_latency": 2}, "gripper_latency: 2"),
        ({"on_missing_touch": "stop"}, "on_missing_touch: stop"),
        ({"ensembling": "newst"}, "did you mean newest"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        RuntimeSettings(**settings)


def test_bad_input() -> None:
    spec = SPECS["peel_force"]
    with pytest.raises(UserError, match=r"15 numbers of touch .* gives 6"):
        Controller(RuntimeSettings(), decoder("wipe_gelsight"), policy_spec("wipe", "force", "rdp", "pose"))
    with pytest.raises(UserError, match="gives 10 numbers, an action of peel has 4"):
        Controller(RuntimeSettings(), decoder("wipe_gelsight"), spec)
    controller = rdp()
    with pytest.raises(UserError, match="no valid left_robot_gripper_width"):
        controller.observe({}, 0)
        controller.observation()
    with pytest.raises(UserError, match="left_robot_tcp_wrench: 3 numbers"):
        controller.observe({TOUCH: np.zeros(3)}, 1)
    with pytest.raises(UserError, match=r"shape \(31,\), expected \(32,\)"):
        controller.accept(condition_plan(0, 31, spec), 4)
    with pytest.raises(UserError, match="needs the pose of 1 arm"):
        controller.accept(condition_plan(0, 32, spec, base=None), 4)
    with pytest.raises(UserError, match="there is none"):
        Controller(RuntimeSettings(), None, DP).accept(condition_plan(0, 32, DP), 4)
    with pytest.raises(UserError, match=r"shape \(14, 4\), expected \(15, 4\)"):
        Controller(RuntimeSettings(), None, DP).accept(Plan(0, np.zeros((14, 4)), period=2, num_rows=15), 4)
