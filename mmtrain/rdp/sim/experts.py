"""The scripted person of each task, who makes the demonstrations (specification section 8.4)."""

from typing import Any, Literal, get_args

import numpy as np

from mmtrain.config_errors import UserError, nearest
from mmtrain.robot_tasks import Task

Mode = Literal["tactar", "vr_only"]


class Expert:
    """One episode's demonstrator of a task; make a new one for each episode.

    Args:
        mode: "tactar" feels the contact force, as TactAR's operator does; "vr_only" only watches, with a person's error
            and delay.
        rng: draws this episode's habits and errors.

    Raises:
        UserError: an unknown task or mode.
    """

    def __init__(self, task: Task, mode: Mode = "tactar", rng: np.random.Generator | None = None) -> None:
        if mode not in get_args(Mode):
            guess = nearest(str(mode), get_args(Mode))
            raise UserError(f"mode: {mode} is not known{f', did you mean {guess}?' if guess else ''} {get_args(Mode)}")
        self._person = _expert_class(task)(mode, np.random.default_rng() if rng is None else rng)

    def act(self, frame: dict[str, np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """The next command [A] after a frame and the `info` that came with it."""
        return self._person.act(frame, info)


def _expert_class(task: Task) -> type:
    if task == "wipe":
        from mmtrain.rdp.sim.wipe_expert import WipeExpert

        return WipeExpert
    if task == "peel":
        from mmtrain.rdp.sim.peel_expert import PeelExpert

        return PeelExpert
    if task == "lift":
        from mmtrain.rdp.sim.lift_expert import LiftExpert

        return LiftExpert
    guess = nearest(str(task), get_args(Task))
    raise UserError(
        f"task: {task} is not simulated{f', did you mean {guess}?' if guess else ''} {list(get_args(Task))}"
    )
