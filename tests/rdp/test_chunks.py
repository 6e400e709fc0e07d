import numpy as np
import pytest

from mmtrain.rdp.chunks import ChunkBuffer, Plan


def _made(buffer: ChunkBuffer, step: int) -> list[int]:
    return [entry.plan.made for entry in buffer.active(step)]


def test_due_times() -> None:
    fast = Plan(100, np.zeros(8))
    assert (fast.target(0), fast.last_target, fast.next_target(101), fast.next_target(105)) == (101, 129, 101, 105)
    slow = Plan(100, np.zeros((15, 4)), period=2, num_rows=15)
    assert (slow.target(0), slow.last_target) == (102, 130)
    assert [slow.next_target(time) for time in (99, 101, 102, 103, 130, 140)] == [102, 102, 102, 104, 130, 130]


def test_actions_between_rows() -> None:
    rows = np.arange(15.0)[:, None] * np.ones(4)
    plan = Plan(100, rows, period=2, num_rows=15)
    times = (90, 102, 103, 104, 130, 150)
    assert [plan.action_at(time, 3)[0] for time in times] == [0, 0, 0.5, 1, 14, 14]


def test_later_plans_stand_last_and_old_ones_run_out() -> None:
    buffer = ChunkBuffer()
    buffer.add(Plan(16, np.zeros(8)), 20)
    buffer.add(Plan(0, np.zeros(8)), 4)  # came out of order
    assert [_made(buffer, step) for step in (3, 4, 19, 20, 28, 29, 44, 45)] == [
        [],
        [0],
        [0],
        [0, 16],
        [0, 16],
        [16],
        [16],
        [],
    ]


def test_of_two_made_at_one_frame_the_later_added_wins() -> None:
    buffer = ChunkBuffer()
    first, second = Plan(0, np.zeros(8)), Plan(0, np.ones(8))
    buffer.add(first, 4)
    buffer.add(second, 4)
    assert [entry.plan for entry in buffer.active(4)] == [first, second]


def test_a_plan_that_comes_too_late_is_not_taken() -> None:
    buffer = ChunkBuffer()
    assert buffer.add(Plan(0, np.zeros(8)), 29) is None
    assert buffer.add(Plan(0, np.zeros(8)), 28) is not None
    assert _made(buffer, 28) == [0]


@pytest.mark.parametrize(("only_newest", "left"), [(True, 2), (False, 3)])
def test_forgetting_keeps_what_is_still_needed(only_newest: bool, left: int) -> None:
    buffer = ChunkBuffer()
    for made, available in ((0, 4), (4, 8), (8, 12), (12, 40)):  # the last waits to be used
        buffer.add(Plan(made, np.zeros(8)), available)
    buffer.forget(29, only_newest)
    assert len(buffer) == left
    assert buffer.active(29)[-1].plan.made == 8
    assert buffer.active(40)[-1].plan.made == 12


def test_a_number_that_is_not_finite_is_found() -> None:
    assert Plan(0, np.zeros(8), base=np.zeros(9)).is_finite()
    assert not Plan(0, np.full(8, np.inf)).is_finite()
    assert not Plan(0, np.zeros(8), base=np.full(9, np.nan)).is_finite()
