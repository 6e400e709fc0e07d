"""What a robot is sent, frame by frame: one episode's `Controller`, without clock, threads or torch.

Time is a frame number, 24 a second. In each frame: `observe` what the sensors say, ask the slow policy if `wants_plan`,
hand its answer to `accept` with the frame from which it may be used, and send `command`. A simulation does this in
lock-step, `mmtrain.rdp.threads` in real time; both are given the same frame numbers and so send the same commands.

The command of frame s aims at frame s + 1. For RDP it is the decoding of row s - made of the newest plan, over the
touch of frames made - 3 ... s, so that frame j of the decoder is always frame j of the training window (spec 4.2). For
Diffusion Policy it lies between the last command and the next row, at 24 Hz. A relative action is put onto the pose
that its plan was made at, whatever the arm did since.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmtrain import poses
from mmtrain.config_errors import UserError
from mmtrain.rdp.chunks import ChunkBuffer, Entry, Plan
from mmtrain.rdp.ensembling import Ensembling, check_ensembling, ensemble_weights, fold
from mmtrain.rdp.fast_step import FastDecoder
from mmtrain.rdp.frame_history import Counts, FrameHistory
from mmtrain.robot_tasks import PolicySpec

Array = np.ndarray


@dataclass(frozen=True)
class RuntimeSettings:
    """How plans become commands. Times are in frames of 24 a second.

    Args:
        latency: from an observation to the frame in which its plan is first used; what the plan aims at until then is
            dropped. RDP and Diffusion Policy: 4 (the latter's "2 steps").
        gripper_latency: the same for a gripper that answers later than the arm: its width is taken from the row that is
            this much further on than `latency`, over the same touch with the last frame repeated (the released code
            shifts all its touch instead). None: as `latency`. Released: 8 for Wiping.
        chunk_every: frames between two plans; 16, "small chunk" 4. Ensembling uses 4.
        ensembling, tau, act_k, reference_rotation: see `mmtrain.rdp.ensembling`; counted in steps of the policy.
        on_missing_touch: what is sent in a frame whose touch is missing or not finite. "hold": the last command again;
            "last_valid": decoded with the last valid touch. Either way that one stands in its place for later frames.
        stateful: carry the decoder from frame to frame; False decodes all frames again each time, as released. The
            commands are the same.
        match_latency: False uses a plan's first row when it arrives, `latency` frames after what it saw: the paper's
            ablation "latency step 0".
    """

    latency: int = 4
    gripper_latency: int | None = None
    chunk_every: int = 16
    ensembling: Ensembling = "newest"
    tau: float = 0.5
    act_k: float = 0.01
    reference_rotation: bool = False
    on_missing_touch: Literal["hold", "last_valid"] = "hold"
    stateful: bool = True
    match_latency: bool = True

    def __post_init__(self) -> None:
        check_ensembling(self.ensembling, self.tau, self.act_k)
        if self.latency < 0:
            raise UserError(f"latency: {self.latency} frames, expected at least 0; 4 is usual")
        if self.chunk_every < 1:
            raise UserError(f"chunk_every: {self.chunk_every} frames, expected at least 1; 16 is usual")
        if self.gripper_latency is not None and self.gripper_latency < self.latency:
            raise UserError(
                f"gripper_latency: {self.gripper_latency} frames is less than latency {self.latency}; "
                "give the same or more, or null"
            )
        if self.on_missing_touch not in ("hold", "last_valid"):
            raise UserError(f"on_missing_touch: {self.on_missing_touch} is not known ['hold', 'last_valid']")

    @property
    def gripper_ahead(self) -> int:
        """Frames by which the gripper's row is ahead of the arm's."""
        return 0 if self.gripper_latency is None else self.gripper_latency - self.latency


@dataclass
class _Decoding:
    """A plan's decoder state, and the first frame of touch that it has not seen."""

    state: Any
    next_frame: int


class Controller:
    """One episode. Frame numbers may begin anywhere and must ascend.

    Args:
        settings: see there.
        decoder: RDP's fast policy; None for plans that hold actions.
        spec: what the policy sees and sends.

    Raises:
        UserError: a decoder that is not of this task or touch.
    """

    def __init__(self, settings: RuntimeSettings, decoder: FastDecoder | None, spec: PolicySpec) -> None:
        self.settings, self.decoder, self.spec = settings, decoder, spec
        self.counts = Counts()
        self._history = FrameHistory(spec, _decoder_inputs(decoder, spec), self.counts)
        self._buffer = ChunkBuffer()
        self._planned: int | None = None  # frame that the newest plan was made at
        self._sent: tuple[int, Array] | None = None  # frame aimed at, action
        self._is_moving = False  # a plan was used

    def observe(self, frame: Mapping[str, Any], step: int) -> None:
        """Take the synchronised readings of a frame; a stream that is absent or None is missing.

        Frames left out count as missing. A frame that is not newer than the last one is counted and not used: the
        decoder has gone on without it.

        Args:
            frame: stream -> raw value, as stored: TCP poses 9 numbers, wrench 6; pictures uint8 [H, W, 3].

        Raises:
            UserError: a stream of another width than stored episodes have.
        """
        self._history.record(frame, step)

    def wants_plan(self, step: int) -> bool:
        """Whether the slow policy should look at the newest frame: `chunk_every` frames after it last did."""
        if self._history.newest is None:
            return False
        return self._planned is None or step >= self._planned + self.settings.chunk_every

    def missing_streams(self) -> list[str]:
        """What the slow policy sees and has had no valid value so far."""
        return self._history.missing_streams()

    def observation(self) -> dict[str, Array]:
        """What the slow policy sees: each stream at two frames, [2, ...], raw and absolute, the newest last.

        Streams keep their stored widths, such as 9 numbers for a TCP pose; `robot_observations.cut` gives what the
        policy uses of them. Before there are enough frames the oldest is repeated.

        Raises:
            UserError: a stream that was never there.
        """
        return self._history.observation()

    def accept(self, plan: Plan, available_at: int) -> bool:
        """Take a plan that may be used from a frame on: normally `plan.made` + latency, later if it was late.

        Returns:
            whether it was taken; not if it holds a number that is not finite, or aims only at what is over.

        Raises:
            UserError: a plan of another shape than this policy's.
        """
        self._check(plan)
        if not plan.is_finite():
            self.counts.rejected_plans += 1
            return False
        made = plan.made
        self.counts.late_plans += available_at > made + self.settings.latency
        if not self.settings.match_latency:
            plan = replace(plan, made=available_at)
        if self._buffer.add(plan, available_at) is None:
            self.counts.expired_plans += 1
            return False
        self._planned = made if self._planned is None else max(made, self._planned)
        return True

    def command(self, step: int) -> Array | None:
        """Absolute action [A], float64, to send during frame `step`; never a NaN. None only before the first plan.

        Call it after `observe` of the same frame; if that did not come, the frame is missing.

        Raises:
            ValueError: a frame before one that a command was asked for.
        """
        if self._sent is not None and step + 1 < self._sent[0]:
            raise ValueError(f"a command for frame {step} after that of frame {self._sent[0] - 1}")
        if self._history.newest is not None and self._history.newest < step:
            self._history.record({}, step)
        self._buffer.forget(step, only_newest=self.settings.ensembling == "newest")
        active = self._buffer.active(step)
        action = None
        if active:
            self._is_moving = True
            if not active[-1].plan.is_condition or self._can_decode():
                action = self._planned_action(active, step)
        if action is None or not np.isfinite(action).all():
            if not self._is_moving:
                return None
            self.counts.held_commands += 1
            action = self._history.measured() if self._sent is None else self._sent[1]
        self._sent = (step + 1, action)
        return action.copy()

    def _check(self, plan: Plan) -> None:
        rows, arms = np.shape(plan.rows), len(self.spec.arms)
        if plan.is_condition:
            if self.decoder is None:
                raise UserError(f"rows: a plan of shape {rows} is a condition for a fast decoder, and there is none")
            if plan.period != 1:
                raise UserError(f"period: {plan.period}; a plan that is decoded has one row per frame, 1")
            expected: tuple[int, ...] = (self.decoder.condition_dim,)
        else:
            expected = (plan.num_rows, self.spec.action_dim)
        if rows != expected:
            raise UserError(f"rows: a plan of shape {rows}, expected {expected} for task {self.spec.task}")
        if self.spec.relative and np.size(plan.base) not in (9 * arms, self.spec.pose_dim * arms):
            raise UserError(
                f"base: a relative plan needs the pose of {arms} arm(s) that it was made at, [{9 * arms}]; "
                f"this one has {'none' if plan.base is None else np.shape(plan.base)}"
            )

    def _can_decode(self) -> bool:
        if not self._history.has_touch:
            return False
        return self._history.touch_is_valid or self.settings.on_missing_touch == "last_valid"

    def _planned_action(self, active: list[Entry], step: int) -> Array:
        action = self._aim(active, step, 0)
        if ahead := self.settings.gripper_ahead:
            widths = slice(-len(self.spec.arms), None)
            action[widths] = self._aim(active, step, ahead)[widths]
        return action

    def _aim(self, active: list[Entry], step: int, ahead: int) -> Array:
        """What the plans want at frame step + 1 + ahead: folded where the newest has a row, then interpolated."""
        newest, time = active[-1].plan, step + 1 + ahead
        target = newest.next_target(time)
        speaking = [entry for entry in active if entry.plan.last_target >= target]
        settings = self.settings
        if len(speaking) == 1:
            weights = np.ones(1)
        else:
            steps = np.array([entry.plan.made / newest.period for entry in speaking])
            weights = ensemble_weights(steps, settings.ensembling, settings.tau, settings.act_k)
        actions = [
            self._evaluate(entry, target, step) for entry, weight in zip(speaking, weights, strict=True) if weight > 0
        ]
        action = fold(np.stack(actions), weights[weights > 0], self.spec.pose_dim, settings.reference_rotation)
        if target <= time:
            return action
        # The last command stands where the row before this one aimed; at a plan's start, or after a hold, this is the
        # way from where the arm is.
        sent_for, sent = (step, self._history.measured()) if self._sent is None else self._sent
        share = (step + 1 - sent_for) / (target - ahead - sent_for)
        return poses.interpolate_action(sent, action, share, self.spec.pose_dim)

    def _evaluate(self, entry: Entry, target: int, step: int) -> Array:
        """Absolute action [A] that a plan wants at frame `target`."""
        plan = entry.plan
        if plan.is_condition:
            action = np.asarray(self._decode(entry, target - 1, step), dtype=np.float64)
        else:
            action = plan.action_at(target, self.spec.pose_dim)
        return poses.absolute_action(action, plan.base, self.spec.pose_dim) if self.spec.relative else action

    def _decode(self, entry: Entry, last: int, step: int) -> Array:
        """The plan's action after touch up to frame `last`; after frame `step` the touch of that frame is repeated."""
        plan, decoder = entry.plan, self.decoder
        first = plan.made - plan.first_prefix + 1
        if not self.settings.stateful:
            touch = [self._history.touch(min(frame, step)) for frame in range(first, last + 1)]
            return decoder.decode(plan.rows, np.stack(touch))
        if entry.memory is None:
            entry.memory = _Decoding(decoder.start(plan.rows), first)
        memory: _Decoding = entry.memory
        for frame in range(memory.next_frame, step + 1):
            decoder.advance(memory.state, self._history.touch(frame))
        memory.next_frame = max(memory.next_frame, step + 1)
        if last == step:
            return decoder.action(memory.state)
        state = decoder.fork(memory.state)
        for _ in range(last - step):
            decoder.advance(state, self._history.touch(step))
        return decoder.action(state)


def replay(controller: Controller, frames: Mapping[str, Array], plans: Iterable[Plan]) -> Array:
    """What would have been sent for a recorded episode, to be laid beside what was recorded.

    Args:
        controller: a fresh one.
        frames: stream -> recorded values [T, ...]; frame numbers are 0 ... T - 1.
        plans: what the slow policy said, or latents of the recorded actions; each is used `latency` frames after it was
            made.

    Returns:
        [T, A], NaN before the first plan; row t aims at frame t + 1, as the recorded action t does.
    """
    by_frame: dict[int, list[Plan]] = {}
    for plan in plans:
        by_frame.setdefault(plan.made, []).append(plan)
    sent = np.full((len(next(iter(frames.values()))), controller.spec.action_dim), np.nan)
    for step in range(len(sent)):
        controller.observe({key: values[step] for key, values in frames.items()}, step)
        for plan in by_frame.get(step, []):
            controller.accept(plan, step + controller.settings.latency)
        action = controller.command(step)
        if action is not None:
            sent[step] = action
    return sent


def _decoder_inputs(decoder: FastDecoder | None, spec: PolicySpec) -> dict[str, int]:
    """Touch streams of the decoder; none if it was trained without.

    Raises:
        UserError: the decoder is of another task or touch.
    """
    if decoder is None:
        return {}
    if decoder.action_dim != spec.action_dim:
        raise UserError(
            f"the decoder gives {decoder.action_dim} numbers, an action of {spec.task} has {spec.action_dim}"
        )
    if decoder.touch_dim == 0:
        return {}
    keys = tuple(spec.touch_inputs)
    if decoder.touch_dim != spec.touch_dim or (decoder.touch_keys and decoder.touch_keys != keys):
        raise UserError(
            f"the decoder takes {decoder.touch_dim} numbers of touch {list(decoder.touch_keys)}, "
            f"touch {spec.touch} of {spec.task} gives {spec.touch_dim} {list(keys)}"
        )
    return dict(spec.touch_inputs)
