"""Simulated contact tasks: gymnasium ids `mmtrain/Wipe-v0`, `mmtrain/Peel-v0` and `mmtrain/LiftBimanual-v0`.

They stand in for the paper's robots to show ORDERINGS of methods, never its numbers. Needs the extra `sim`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from mmtrain.config_errors import UserError, nearest

if TYPE_CHECKING:
    import gymnasium

ENVIRONMENTS = {
    "wipe": ("mmtrain/Wipe-v0", "mmtrain.rdp.sim.wipe:WipeEnv"),
    "peel": ("mmtrain/Peel-v0", "mmtrain.rdp.sim.peel:PeelEnv"),
    "lift": ("mmtrain/LiftBimanual-v0", "mmtrain.rdp.sim.lift:LiftEnv"),
}


def make(task: str, images: tuple[str, ...] = (), size: int = 84, **options: Any) -> "gymnasium.Env":
    """The environment of a task, see `mmtrain.rdp.sim.base.ContactEnv`.

    Args:
        task: "wipe", "peel" or "lift".
        images: picture keys that frames shall have; none needs no OpenGL.
        size: pixels a side of pictures.
        options: `markers`, `max_steps`, `render_mode`.

    Raises:
        UserError: an unknown task, or the simulator is not installed.
    """
    if task not in ENVIRONMENTS:
        guess = nearest(str(task), ENVIRONMENTS)
        raise UserError(
            f"task: {task} is not simulated{f', did you mean {guess}?' if guess else ''} {list(ENVIRONMENTS)}"
        )
    require_simulator()
    import gymnasium

    # The checker would look at every step; tests do that once.
    return gymnasium.make(ENVIRONMENTS[task][0], disable_env_checker=True, images=images, size=size, **options)


def require_simulator() -> None:
    """Raise a UserError that names the extra if `mujoco` or `gymnasium` is not installed."""
    missing = [name for name in ("mujoco", "gymnasium") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the simulation needs {' and '.join(missing)}: pip install 'mmtrain[sim]'")


def _register() -> None:
    if importlib.util.find_spec("gymnasium") is None:
        return
    import gymnasium

    for name, entry_point in ENVIRONMENTS.values():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=entry_point)


_register()
