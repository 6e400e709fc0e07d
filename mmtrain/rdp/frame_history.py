"""What the sensors said, as the slow and the fast policy see it: no gaps, no NaN, and a count of what was filled."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmtrain.config_errors import UserError
from mmtrain.robot_observations import cut, stored_width
from mmtrain.robot_tasks import PolicySpec

Array = np.ndarray

TOUCH_HISTORY = 256  # frames of touch kept; a plan reaches 32 back


@dataclass
class Counts:
    """What went wrong, in frames or plans.

    Args:
        missing_touch, nan_touch: frames whose touch was absent, or not finite.
        missing_observation: frames in which another stream was absent or not finite; its last value stands in.
        late_frames: frames that came after their command was sent; they are not used.
        late_plans: plans that came later than `latency` after their observation.
        expired_plans: plans that aimed at nothing that was still to come.
        rejected_plans: plans with a number that is not finite.
        held_commands: frames in which the last command was sent again.
    """

    missing_touch: int = 0
    nan_touch: int = 0
    missing_observation: int = 0
    late_frames: int = 0
    late_plans: int = 0
    expired_plans: int = 0
    rejected_plans: int = 0
    held_commands: int = 0


class FrameHistory:
    """The frames of one episode. A stream that is missing or not finite is filled with its last valid value.

    Args:
        spec: what the policy sees.
        touch_inputs: stream -> width of what the fast decoder sees; may be empty.
        counts: where gaps are counted.

    Attributes:
        newest: number of the last frame; None before the first.
        touch_is_valid: whether touch was there in the newest frame.
    """

    def __init__(self, spec: PolicySpec, touch_inputs: Mapping[str, int], counts: Counts) -> None:
        self.newest: int | None = None
        self.touch_is_valid = not touch_inputs
        self._spec, self._touch_inputs, self._counts = spec, dict(touch_inputs), counts
        self._low_dim = tuple(dict.fromkeys((*spec.low_dim, *self._touch_inputs)))
        self._streams: dict[str, Array] = {}  # last valid value of each
        self._frames: deque[dict[str, Array]] = deque(maxlen=spec.observation_stride + 1)
        self._touch: list[Array] = []  # from the first frame on in which all of it had been valid
        self._touch_start = 0  # number of that frame

    def record(self, frame: Mapping[str, Any], step: int) -> None:
        """Take a frame; those left out before it are missing, and one that is not newer than the last is not used.

        Raises:
            UserError: a stream of another width than stored episodes have.
        """
        if self.newest is not None:
            if step <= self.newest:
                self._counts.late_frames += 1
                return
            for skipped in range(self.newest + 1, step):
                self._append({}, skipped)
        self._append(frame, step)

    def missing_streams(self) -> list[str]:
        """What the slow policy sees and has had no valid value so far."""
        return [key for key in (*self._spec.low_dim, *self._spec.images) if key not in self._streams]

    def observation(self) -> dict[str, Array]:
        """Each stream at the two frames of the slow policy, [2, ...], the newest last; see `Controller.observation`.

        Raises:
            UserError: a stream that was never there.
        """
        if missing := self.missing_streams():
            raise UserError(
                f"the robot gave no valid {', '.join(missing)} so far, which this policy sees; "
                f"it gave {sorted(self._streams)}"
            )
        old, new = self._frames[0], self._frames[-1]
        return {key: np.stack([old.get(key, new[key]), new[key]]) for key in (*self._spec.images, *self._spec.low_dim)}

    @property
    def has_touch(self) -> bool:
        """Whether touch was valid at least once."""
        return bool(self._touch)

    def touch(self, step: int) -> Array:
        """Touch [F] of a frame up to the newest, streams in alphabetical order; before the first there is, that one."""
        return self._touch[max(step - self._touch_start, 0)]

    def measured(self) -> Array:
        """Where the arms and grippers are now, as an action [A].

        Raises:
            UserError: not known so far.
        """
        arm_keys = [f"{side}_robot_tcp_pose" for side in self._spec.arms]
        width_keys = [f"{side}_robot_gripper_width" for side in self._spec.arms]
        if missing := [key for key in (*arm_keys, *width_keys) if key not in self._streams]:
            raise UserError(f"the robot gave no valid {', '.join(missing)} so far: it is not known where the arm is")
        arms = [self._streams[key][: self._spec.pose_dim] for key in arm_keys]
        return np.concatenate([*arms, *(self._streams[key] for key in width_keys)]).astype(np.float64)

    def _append(self, frame: Mapping[str, Any], step: int) -> None:
        missing, bad = set(), set()
        for key in self._low_dim:
            value = _read(frame, key)
            if value is None:
                missing.add(key)
            elif np.isfinite(value).all():
                self._streams[key] = value
            else:
                bad.add(key)
        for key in self._spec.images:
            if frame.get(key) is None:
                missing.add(key)
            else:
                self._streams[key] = np.array(frame[key])
        touch = self._touch_inputs.keys()
        self._counts.missing_touch += bool(missing & touch)
        self._counts.nan_touch += bool(bad & touch)
        self._counts.missing_observation += bool((missing | bad) - touch)
        self.touch_is_valid = not (missing | bad) & touch
        self.newest = step
        self._frames.append(dict(self._streams))
        self._append_touch(step)

    def _append_touch(self, step: int) -> None:
        if any(key not in self._streams for key in self._touch_inputs):
            return
        if not self._touch:
            self._touch_start = step
        numbers = [cut(key, self._streams[key], width) for key, width in self._touch_inputs.items()]
        self._touch.append(np.concatenate(numbers) if numbers else np.zeros(0))
        if len(self._touch) > 2 * TOUCH_HISTORY:
            del self._touch[:TOUCH_HISTORY]
            self._touch_start += TOUCH_HISTORY


def _read(frame: Mapping[str, Any], key: str) -> Array | None:
    """One low-dimensional stream of a frame, flat; None if it is not there.

    Raises:
        UserError: another width than stored episodes have.
    """
    value = frame.get(key)
    if value is None:
        return None
    value = np.array(value).reshape(-1)  # a copy: a simulation may write into its own
    if len(value) != stored_width(key):
        raise UserError(f"{key}: {len(value)} numbers in a frame, expected {stored_width(key)} as in stored episodes")
    return value
