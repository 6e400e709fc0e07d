"""The `Controller` in real time: sensors, slow policy and fast policy in a thread each, on one monotonic clock.

Frame s is due at origin + s / 24 s, in all threads, whatever each of them takes: no thread counts for itself. The
released code counts steps in each loop by itself, so that the loops drift apart (spec 4.2).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mmtrain.rdp.chunks import Plan
from mmtrain.rdp.frame_history import Counts
from mmtrain.rdp.runtime import Controller
from mmtrain.robot_tasks import FRAME_RATE

Array = np.ndarray


class Robot(Protocol):
    """What is driven. The two methods are called from two threads, each always from the same one."""

    def observe(self) -> Mapping[str, Any]:
        """The newest synchronised readings, stream -> raw value; called once per frame, when it is due."""

    def send(self, action: Array) -> None:
        """Aim at an absolute action [A] until the next frame; the driver interpolates (at 300 Hz or more)."""


@dataclass
class RunStatistics:
    """What happened in a run.

    Args:
        executed: frames in which the fast loop ran; skipped: frames that it missed because it was behind.
        plan_frames: of each plan, frames executed between its observation and its first use; -1 for one not taken.
        plan_seconds, step_seconds: duration of each call of the slow policy, and of each command.
        late_seconds: from when a frame was due to when its command was sent.
        counts: the controller's.
    """

    executed: int = 0
    skipped: int = 0
    plan_frames: list[int] = field(default_factory=list)
    plan_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    late_seconds: list[float] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def summary(self, warm_up_plans: int = 1, warm_up_steps: int = FRAME_RATE) -> dict[str, float]:
        """Quantiles: slow policy in ms, fast step in us, latency in executed frames; the first calls do not count."""
        taken = [frames for frames in self.plan_frames if frames >= 0]
        return {
            "executed": self.executed,
            "skipped": self.skipped,
            **_quantiles("slow", "ms", 1e3 * np.array(self.plan_seconds[warm_up_plans:])),
            **_quantiles("fast", "us", 1e6 * np.array(self.step_seconds[warm_up_steps:])),
            **_quantiles("late", "ms", 1e3 * np.array(self.late_seconds[warm_up_steps:])),
            **_quantiles("latency", "frames", np.array(taken[warm_up_plans:])),
        }


class ThreadedRunner:
    """Runs one episode. Everything that can fail in a thread ends the run and is raised by `run`.

    Args:
        robot: what is driven.
        plan: the slow policy, called in its own thread with `Controller.observation` and the frame it was made at,
            which must become the plan's `made`.
        controller: a fresh one.
        frame_seconds: 1 / 24.
        touch_wait: how long the fast loop waits for a frame's readings after it is due, in frames; then they are
            missing.
        patience: frames until every stream that the slow policy sees must have come.
        stop_seconds: how long threads may take to end.
    """

    def __init__(
        self,
        robot: Robot,
        plan: Callable[[dict[str, Array], int], Plan],
        controller: Controller,
        frame_seconds: float = 1 / FRAME_RATE,
        touch_wait: float = 0.5,
        patience: int = 2 * FRAME_RATE,
        stop_seconds: float = 5.0,
    ) -> None:
        self.statistics = RunStatistics(counts=controller.counts)
        self._robot, self._plan, self._controller = robot, plan, controller
        self._frame_seconds, self._touch_wait = frame_seconds, touch_wait
        self._patience, self._stop_seconds = patience, stop_seconds
        self._stop = threading.Event()
        self._changed = threading.Condition()  # guards all below, and the controller
        self._incoming: deque[tuple[int, Mapping[str, Any]]] = deque()
        self._next_step = 0  # frame that the fast loop will command next
        self._error: BaseException | None = None
        self._origin = 0.0

    def run(self, frames: int | None = None) -> RunStatistics:
        """Drive the robot for a number of frames, or until `stop`.

        Raises:
            RuntimeError: it ran already, or a thread did not end in time and is left behind.
            Exception: whatever the robot, the slow policy or the controller raised.
        """
        if self._stop.is_set():
            raise RuntimeError("a runner runs once: make a new one, and a new controller, for another episode")
        loops = {"sensors": self._spin, "slow policy": self._slow, "fast policy": lambda: self._fast(frames)}
        threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True) for name, loop in loops.items()
        ]
        self._origin = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            self._stop.wait()
        finally:  # also on Ctrl-C
            self.stop()
            deadline = time.monotonic() + self._stop_seconds
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        if self._error is not None:
            raise self._error
        if stuck := [thread.name for thread in threads if thread.is_alive()]:
            raise RuntimeError(f"did not end within {self._stop_seconds} s after the run: {', '.join(stuck)}")
        return self.statistics

    @property
    def is_stopping(self) -> bool:
        """Whether the run ends; a slow policy that takes long may look at it."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End the run; from any thread. No command is sent after it but one that is under way."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            self._error = self._error or error
        finally:
            self.stop()

    def _due(self, step: float) -> float:
        return self._origin + step * self._frame_seconds

    def _next_due(self, step: int) -> int | None:
        """Wait for a frame; a later one if that is over already. None when the run ends."""
        now = int((time.monotonic() - self._origin) / self._frame_seconds)
        step = max(step, now)
        if self._stop.wait(max(0.0, self._due(step) - time.monotonic())):
            return None
        return step

    def _spin(self) -> None:
        step: int | None = 0
        while (step := self._next_due(step)) is not None:
            frame = self._robot.observe()
            with self._changed:
                self._incoming.append((step, frame))
                self._changed.notify_all()
            step += 1

    def _fast(self, frames: int | None) -> None:
        step: int | None = 0
        while (frames is None or step < frames) and (step := self._next_due(step)) is not None:
            if frames is not None and step >= frames:
                break
            action = self._command(step)
            if action is not None:
                self._robot.send(action)
                self.statistics.late_seconds.append(time.monotonic() - self._due(step))
            step += 1
        if frames is not None and not self._stop.is_set():
            self.statistics.skipped += frames - self._next_step

    def _command(self, step: int) -> Array | None:
        """Give the controller what came, and ask it."""
        controller, statistics = self._controller, self.statistics
        with self._changed:
            has_come = lambda: self._stop.is_set() or any(number >= step for number, _ in self._incoming)  # noqa: E731
            self._changed.wait_for(has_come, max(0.0, self._due(step + self._touch_wait) - time.monotonic()))
            while self._incoming and self._incoming[0][0] <= step:
                number, frame = self._incoming.popleft()
                controller.observe(frame, number)
            begin = time.perf_counter()
            action = controller.command(step)
            statistics.step_seconds.append(time.perf_counter() - begin)
            statistics.executed += 1
            statistics.skipped += step - self._next_step
            self._next_step = step + 1
            self._changed.notify_all()
        return action

    def _wants_plan(self, after: int) -> bool:
        if self._stop.is_set():
            return True
        newest = self._next_step - 1
        if newest <= after or not self._controller.wants_plan(newest):
            return False
        return newest >= self._patience or not self._controller.missing_streams()

    def _slow(self) -> None:
        made = -1
        while True:
            with self._changed:
                asked = made
                self._changed.wait_for(lambda: self._wants_plan(asked))  # noqa: B023
                if self._stop.is_set():
                    return
                made, executed = self._next_step - 1, self.statistics.executed
                observation = self._controller.observation()
            begin = time.perf_counter()
            plan = self._plan(observation, made)
            seconds = time.perf_counter() - begin
            with self._changed:
                if self._stop.is_set():
                    return
                available_at = max(made + self._controller.settings.latency, self._next_step)
                taken = self._controller.accept(plan, available_at)
                waiting = available_at - self._next_step
                # the command of the frame that was observed counts as executed before it
                self.statistics.plan_frames.append(self.statistics.executed - executed + waiting + 1 if taken else -1)
                self.statistics.plan_seconds.append(seconds)


def _quantiles(name: str, unit: str, values: Array) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{name}_p{q}_{unit}": float(np.percentile(values, q)) for q in (50, 95, 99)}
