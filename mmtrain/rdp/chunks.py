"""Plans with absolute due times, and the buffer that says which of them speak for a moment. No clock, no torch.

Time is counted in frames of 24 a second. A plan made at frame S aims its row i at S + period * (i + 1): the label of a
row is the state one step later. An entry keeps its base pose, so that a relative plan does not drift when the arm
moves on (spec 4.2; LeRobot PR 4580 shows what happens without).
"""

from bisect import insort
from dataclasses import dataclass, field

import numpy as np

from mmtrain import poses

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """One answer of a slow policy.

    Args:
        made: frame of the observation that it was made from.
        rows: [num_rows, A], actions in physical units (Diffusion Policy); or [C * L], the one condition that a fast
            decoder gets for every row (RDP).
        base: TCP poses of all arms at `made`, absolute, [arms * 9]; needed if the actions are relative.
        period: frames from row to row: 1 (24 Hz) or 2 (12 Hz).
        num_rows: how far the plan reaches: 29 (RDP) or 15 (Diffusion Policy) as released.
        first_prefix: frames of touch that the decoder sees for row 0; they end with frame `made`.
    """

    made: int
    rows: Array
    base: Array | None = None
    period: int = 1
    num_rows: int = 29
    first_prefix: int = 4

    @property
    def is_condition(self) -> bool:
        """Whether its rows must be decoded with touch."""
        return np.ndim(self.rows) == 1

    @property
    def last_target(self) -> int:
        """Frame at which the last row aims."""
        return self.made + self.period * self.num_rows

    def target(self, row: int) -> int:
        """Frame at which a row aims."""
        return self.made + self.period * (row + 1)

    def next_target(self, time: int) -> int:
        """First frame from `time` on at which a row aims; at most that of the last row."""
        row = -(-(time - self.made) // self.period) - 1  # rounded up
        return self.target(min(max(row, 0), self.num_rows - 1))

    def action_at(self, time: float, pose_dim: int) -> Array:
        """The action [A] meant for a frame, between two rows if none aims there; before the first and after the last
        row these two. Only for plans that hold actions.
        """
        place = min(max((time - self.made) / self.period - 1, 0.0), self.num_rows - 1.0)
        before = int(place)
        if place == before:
            return np.asarray(self.rows[before], dtype=np.float64)
        return poses.interpolate_action(self.rows[before], self.rows[before + 1], place - before, pose_dim)

    def is_finite(self) -> bool:
        """Whether no number of it is NaN or infinite."""
        return bool(np.isfinite(self.rows).all() and (self.base is None or np.isfinite(self.base).all()))


@dataclass(order=True)
class Entry:
    """A plan in the buffer, ordered by age. `memory` is the user's: it goes when the plan goes.

    Args:
        available_at: first frame during which it may be used; what it aims at until then is never sent.
    """

    made: int
    order: int
    plan: Plan = field(compare=False)
    available_at: int = field(compare=False)
    memory: object = field(default=None, compare=False)


class ChunkBuffer:
    """The plans that are still good for something. Later ones win: they stand last."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._order = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, plan: Plan, available_at: int) -> Entry | None:
        """Take a plan; None if all that it aims at is over. Of two made at one frame the later added wins."""
        if plan.last_target <= available_at:
            return None
        entry = Entry(plan.made, self._order, plan, available_at)
        self._order += 1
        insort(self._entries, entry)
        return entry

    def active(self, step: int) -> list[Entry]:
        """Entries that may be used during frame `step`, when targets from step + 1 on are due; oldest first."""
        return [entry for entry in self._entries if entry.available_at <= step < entry.plan.last_target]

    def forget(self, step: int, only_newest: bool) -> None:
        """Drop what no later step can use.

        Args:
            only_newest: older entries than the newest active one are of no use either.
        """
        active = self.active(step)
        floor = active[-1] if only_newest and active else None
        self._entries = [
            entry for entry in self._entries if entry.plan.last_target > step and (floor is None or entry >= floor)
        ]
