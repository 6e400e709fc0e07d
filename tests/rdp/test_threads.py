"""The threads are real here, but no test depends on how fast they run: each checks what must hold at any speed."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mmtrain.rdp.chunks import Plan
from mmtrain.rdp.runtime import Controller, RuntimeSettings
from mmtrain.rdp.threads import Robot, ThreadedRunner
from mmtrain.robot_tasks import policy_spec
from tests.rdp.runtime_pieces import SPECS, action_plan, condition_plan, decoder, frames

DP = policy_spec("peel", "none", "dp", "pose")
FRAME = 0.004
POSE = "left_robot_tcp_pose"


class FakeRobot:
    """Its readings say how often it was asked."""

    def __init__(self, spec: object = DP, on_send: Callable[[int], None] = lambda count: None) -> None:
        self._frame, self._on_send = frames(spec, 1)[0], on_send
        self.asked, self.sent = 0, []

    def observe(self) -> dict[str, np.ndarray]:
        self.asked += 1
        return self._frame | {POSE: np.full(9, float(self.asked))}

    def send(self, action: np.ndarray) -> None:
        self.sent.append(action)
        self._on_send(len(self.sent))


class Recorder(Controller):
    """Keeps what it was asked, for a repetition without threads."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.calls: list[tuple[str, tuple]] = []

    def observe(self, frame: dict, step: int) -> None:
        self.calls.append(("observe", (frame, step)))
        super().observe(frame, step)

    def accept(self, plan: Plan, available_at: int) -> bool:
        self.calls.append(("accept", (plan, available_at)))
        return super().accept(plan, available_at)

    def command(self, step: int) -> np.ndarray | None:
        self.calls.append(("command", (step,)))
        return super().command(step)


def runner(robot: Robot, plan: Callable, controller: Controller | None = None, **options: object) -> ThreadedRunner:
    controller = controller or Controller(RuntimeSettings(chunk_every=8), None, DP)
    return ThreadedRunner(robot, plan, controller, **{"frame_seconds": FRAME, **options})


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in ("sensors", "slow policy", "fast policy")]


@pytest.mark.parametrize("tag", [None, "peel_force"])
def test_threads_send_what_the_lock_step_sends(tag: str | None) -> None:
    spec = SPECS[tag] if tag else DP
    settings = RuntimeSettings(chunk_every=8, on_missing_touch="last_valid")
    make = lambda kind: kind(settings, decoder(tag) if tag else None, spec)  # noqa: E731
    plan = (lambda _, made: condition_plan(made, 32, spec)) if tag else (lambda _, made: action_plan(made))
    recorder, robot = make(Recorder), FakeRobot(spec)
    statistics = runner(robot, plan, recorder).run(frames=80)
    assert not threads_left()
    again, commands = make(Controller), []
    for name, arguments in recorder.calls:
        result = getattr(again, name)(*arguments)
        if name == "command" and result is not None:
            commands.append(result)
    np.testing.assert_array_equal(robot.sent, commands)
    assert robot.sent and np.isfinite(robot.sent).all()
    assert statistics.executed + statistics.skipped == 80
    assert statistics.counts == again.counts
    asked = [arguments[0] for name, arguments in recorder.calls if name == "command"]
    assert asked == sorted(set(asked)) and asked[-1] < 80  # one clock: every frame at most once, in order


def test_a_plan_is_made_from_the_newest_frame_and_used_no_earlier_than_its_latency() -> None:
    recorder, seen = Recorder(RuntimeSettings(chunk_every=8), None, DP), []

    def plan(observation: dict, made: int) -> Plan:
        seen.append((made, observation[POSE][1, 0]))
        return action_plan(made)

    statistics = runner(FakeRobot(), plan, recorder).run(frames=80)
    readings, newest = {}, -1
    for name, arguments in recorder.calls:
        if name == "observe" and arguments[1] > newest:  # else it came after its command
            readings[arguments[1]] = arguments[0][POSE][0]
        newest = max(newest, arguments[-1]) if name != "accept" else newest
    for made, value in seen:
        newest = max(step for step in readings if step <= made)
        assert readings[newest] == value
    for _, (accepted, available_at) in _of(recorder, "accept"):
        assert available_at >= accepted.made + 4
    taken = len(_of(recorder, "accept"))
    assert taken >= 1 and len(statistics.plan_frames) == taken
    if not statistics.skipped:
        assert min(statistics.plan_frames) >= 4


def _of(recorder: Recorder, name: str) -> list[tuple]:
    return [call for call in recorder.calls if call[0] == name]


def test_a_slow_policy_that_is_late_is_measured_in_executed_frames() -> None:
    """Each plan waits until ten more frames were commanded, however long these take."""
    robot, recorder = FakeRobot(), Recorder(RuntimeSettings(chunk_every=8), None, DP)
    commanded = lambda: len(_of(recorder, "command"))  # noqa: E731

    def plan(observation: dict, made: int) -> Plan:
        goal = commanded() + 10
        while commanded() < goal and not run.is_stopping:
            time.sleep(FRAME / 8)
        return action_plan(made)

    run = runner(robot, plan, recorder)
    statistics = run.run(frames=60)
    assert statistics.counts.late_plans == len(statistics.plan_frames) >= 1
    assert all(latency >= 10 or latency == -1 for latency in statistics.plan_frames)


@pytest.mark.parametrize("where", ["observe", "send", "plan", "controller"])
def test_what_fails_in_a_thread_ends_the_run(where: str) -> None:
    robot = FakeRobot()
    plan = lambda observation, made: action_plan(made)  # noqa: E731

    def fail(*_: object) -> None:
        raise OSError("unplugged")

    if where == "plan":
        plan = fail
    elif where == "controller":  # a plan of another shape is refused inside
        plan = lambda observation, made: replace(action_plan(made), rows=np.zeros((2, 4)))  # noqa: E731
    else:
        setattr(robot, where, fail)
    with pytest.raises(Exception, match=r"unplugged|shape \(2, 4\)"):
        runner(robot, plan).run()
    assert not threads_left()


def test_stop_ends_a_run_without_a_limit_and_nothing_is_sent_after_it() -> None:
    robot = FakeRobot(on_send=lambda count: run.stop() if count == 5 else None)
    run = runner(robot, lambda observation, made: action_plan(made))
    run.run()
    assert len(robot.sent) == 5
    assert not threads_left()
    with pytest.raises(RuntimeError, match="runs once"):
        run.run()


def test_a_thread_that_hangs_is_named() -> None:
    release = threading.Event()

    def plan(observation: dict, made: int) -> Plan:
        release.wait(30)
        return action_plan(made)

    with pytest.raises(RuntimeError, match=r"did not end within 0.05 s after the run: slow policy"):
        runner(FakeRobot(), plan, stop_seconds=0.05).run(frames=20)
    release.set()


def test_a_stream_that_never_comes_ends_the_run() -> None:
    robot = FakeRobot()
    robot.observe = lambda: {POSE: np.zeros(9)}
    with pytest.raises(Exception, match="no valid left_robot_gripper_width"):
        runner(robot, lambda observation, made: action_plan(made), patience=10).run()


def test_summary_drops_the_warm_up() -> None:
    run = runner(FakeRobot(), lambda observation, made: action_plan(made))
    statistics = run.run(frames=40)
    statistics.plan_seconds, statistics.plan_frames = [9.0, 0.001, 0.003], [4, -1, 6]
    statistics.step_seconds = [9.0] * 24 + [1e-5] * 10
    summary = statistics.summary()
    assert summary["slow_p50_ms"] == pytest.approx(2.0)
    assert summary["fast_p99_us"] == pytest.approx(10.0)
    assert summary["latency_p50_frames"] == 6
