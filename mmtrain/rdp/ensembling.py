"""Folding the predictions that several plans make for one moment into one action (temporal ensembling), in NumPy.

Sources: RDP's released runner (its modes), VISK (`hato`), ACT and LeRobot (weights that favour old predictions).
Two things are corrected against the released code, each with its old behaviour as a named option: `act` favours the old
predictions as ACT does (`act_new_first` is the released form), and a rotation is folded in with its own share of the
weight (`reference_rotation` is the released form, which gives the share of all the others).
"""

from typing import Literal, get_args

import numpy as np

from mmtrain import poses
from mmtrain.config_errors import UserError, nearest

Array = np.ndarray

Ensembling = Literal["newest", "oldest", "avg", "hato", "act", "act_new_first"]


def ensemble_weights(made: Array, mode: Ensembling, tau: float = 0.5, act_k: float = 0.01) -> Array:
    """Weights of predictions for one moment, by when they were made.

    | mode | weight before normalising |
    |---|---|
    | newest, oldest | 1 for that one, 0 for the rest |
    | avg | 1 |
    | hato | tau ** age |
    | act | exp(-act_k * i), i = 0 for the oldest: ACT and LeRobot |
    | act_new_first | exp(-act_k * age): released RDP code under the name "act" |

    Args:
        made: [n], when each was made, not descending, counted in control steps of the policy (24 or 12 a second), since
            `tau` and `act_k` are meant per step. Equal times are allowed; of these the last given is the newest.
        tau: in (0, 1]. RDP uses 0.5, and 0.2, 0.5, 0.8 in Table V.
        act_k: at least 0; the released configuration has 0.01.

    Returns:
        float64 [n], sum 1.

    Raises:
        UserError: no prediction, times that descend, or an unknown mode or value.
    """
    made = np.asarray(made, dtype=np.float64)
    if made.ndim != 1 or not len(made) or (np.diff(made) < 0).any():
        raise UserError(f"ensembling needs the times of at least one prediction, oldest first, not {made.tolist()}")
    check_ensembling(mode, tau, act_k)
    age = made[-1] - made  # against the newest instead of now: the same weights once they are normalised
    if mode in ("newest", "oldest"):
        weights = np.zeros(len(made))
        weights[-1 if mode == "newest" else 0] = 1.0
    elif mode == "avg":
        weights = np.ones(len(made))
    elif mode == "hato":
        weights = tau**age
    else:
        weights = np.exp(-act_k * (np.arange(len(made)) if mode == "act" else age))
    return weights / weights.sum()


def check_ensembling(mode: str, tau: float, act_k: float) -> None:
    """Refuse settings that `ensemble_weights` cannot use.

    Raises:
        UserError: names the setting, its value and what would be right.
    """
    if mode not in get_args(Ensembling):
        guess = nearest(str(mode), get_args(Ensembling))
        hint = f", did you mean {guess}?" if guess else ""
        raise UserError(f"ensembling: {mode} is not known{hint} {list(get_args(Ensembling))}")
    if not 0 < tau <= 1:
        raise UserError(f"tau: {tau} is not in (0, 1]; the released configuration has 0.5")
    if not 0 <= act_k < np.inf:
        raise UserError(f"act_k: {act_k} is not a number of at least 0; the released configuration has 0.01")


def fold(actions: Array, weights: Array, pose_dim: int, reference_rotation: bool = False) -> Array:
    """One action of several for the same moment.

    Positions and widths are weighted means. Rotations are folded from the first to the last on the shortest arc: with W
    the weight so far, entry i is moved towards by the share w_i / (W + w_i), so that two rotations end up where their
    weights say.

    Args:
        actions: [n, D], poses (3 or 9 numbers) of all arms, then widths if any; oldest first.
        weights: [n], at least 0, not all 0.
        pose_dim: 3 or 9.
        reference_rotation: the share is W / (W + w_i), as released. Its fault: weights 1/3 (0 degrees) and 2/3 (90
            degrees) give 30 degrees instead of 60.

    Returns:
        float64 [D]; rotations orthonormal if more than one entry has weight.
    """
    actions, weights = np.asarray(actions, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    kept = weights > 0
    actions, weights = actions[kept], weights[kept] / weights.sum()
    if len(actions) == 1:
        return actions[0].copy()
    result = weights @ actions
    if pose_dim == 9:
        turned, total = actions[0], weights[0]
        for action, weight in zip(actions[1:], weights[1:], strict=True):
            share = (total if reference_rotation else weight) / (total + weight)
            turned = poses.interpolate_action(turned, action, share, pose_dim)
            total += weight
        rotations = _rotation_numbers(len(result))
        result[rotations] = turned[rotations]
    return result


def _rotation_numbers(width: int) -> list[int]:
    """Where the rotations are in an action of 9-number poses.

    >>> _rotation_numbers(10)
    [3, 4, 5, 6, 7, 8]
    """
    return [arm * 9 + number for arm in range(poses.num_arms(width, 9)) for number in range(3, 9)]
