"""Normalisers y = x * scale + offset, one per key, in the state-dict layout of the released RDP checkpoints.

`limits`, `gaussian` and `action_limits` fit one on data, in NumPy; `Normaliser` is the module that a policy keeps.
A tokenizer and the policy over it must share one: `Normaliser.differences` says where they do not.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError, nearest

Array = np.ndarray

STATISTICS = ("min", "max", "mean", "std")

# Numbers of an action or pose that are rotations, by width: they are in [-1, 1] already and stay as they are.
_NO_ROTATION = (3, 4, 6, 8)  # positions of one or two arms, with or without gripper widths
_ROTATIONS = {9: (3,), 10: (3,), 18: (3, 12), 20: (3, 12)}  # where the six rotation numbers of each arm begin


class Statistics(NamedTuple):
    """Per channel, each float32 [D]; std is the unbiased one."""

    min: Array
    max: Array
    mean: Array
    std: Array


class Affine(NamedTuple):
    """y = x * scale + offset, each float32 [D], and what it was fitted on."""

    scale: Array
    offset: Array
    stats: Statistics


def statistics(x: Array) -> Statistics:
    """Statistics over all but the last axis of [..., D].

    Raises:
        UserError: no rows, or values that are not finite.
    """
    rows = _rows(x)
    std = rows.std(0, ddof=1, dtype=np.float64) if len(rows) > 1 else np.zeros(rows.shape[1])
    return _statistics(rows.min(0), rows.max(0), rows.mean(0, dtype=np.float64), std)


def limits(data: Array, eps: float = 1e-4, offset: bool = True, quantile: float | None = None) -> Affine:
    """Each channel of [..., D] to [-1, 1] by its smallest and largest value over all other axes.

    A channel with a range below `eps` is not stretched: scale 1 and its value goes to 0.

    Args:
        offset: False keeps 0 at 0 and divides by the largest absolute value.
        quantile: in (0, 0.5); takes the quantiles q and 1 - q as the limits, so that one outlier (a wrench spike) does
            not squeeze the channel; values beyond them come out of [-1, 1]. None: smallest and largest, as released.

    Raises:
        UserError: no rows, values that are not finite, or a quantile out of range.
    """
    stats = statistics(data)
    low, high = stats.min.astype(np.float64), stats.max.astype(np.float64)
    if quantile is not None:
        if not 0 < quantile < 0.5:
            raise UserError(f"quantile: {quantile} is not between 0 and 0.5; 0.001 is usual, null for the exact limits")
        low, high = np.quantile(_rows(data), [quantile, 1 - quantile], axis=0)
    if not offset:
        largest = np.maximum(np.abs(low), np.abs(high))
        return _affine(1 / np.where(largest < eps, 1.0, largest), np.zeros_like(largest), stats)
    constant = high - low < eps
    scale = 2 / np.where(constant, 2.0, high - low)
    # a channel that is constant but for a few outliers has equal quantiles: its usual value goes to 0
    return _affine(scale, np.where(constant, -low, -1 - scale * low), stats)


def gaussian(data: Array, offset: bool = True, eps: float = 1e-4) -> Affine:
    """Each channel of [..., D] to mean 0 (unless `offset` is False) and standard deviation 1 (unless below `eps`)."""
    stats = statistics(data)
    std = stats.std.astype(np.float64)
    scale = 1 / np.where(std < eps, 1.0, std)
    return _affine(scale, -stats.mean * scale if offset else np.zeros_like(scale), stats)


def action_limits(data: Array, eps: float = 1e-7) -> Affine:
    """`limits` for positions and gripper widths, identity for the rotation numbers of actions or poses [..., D].

    D says the layout: 3, 4, 6 and 8 have no rotations; 9 and 10 are one arm's pose (position, six rotation numbers),
    18 and 20 two arms'; the even ones but 18 and 6 end with a gripper width per arm.

    Raises:
        UserError: another width, no rows, or values that are not finite.
    """
    width = np.shape(data)[-1]
    if width not in (*_NO_ROTATION, *_ROTATIONS):
        raise UserError(f"an action or pose of {width} numbers is not known; {[*_NO_ROTATION, *_ROTATIONS]} are")
    affine = limits(data, eps)
    for start in _ROTATIONS.get(width, ()):
        affine.scale[start : start + 6] = 1.0
        affine.offset[start : start + 6] = 0.0
    return affine


def image_affine() -> Affine:
    """Pixels in [0, 1] to [-1, 1]; one channel, as in the released files."""
    stats = _statistics([0.0], [1.0], [0.5], [np.sqrt(1 / 12)])
    return _affine(np.array([2.0]), np.array([-1.0]), stats)


def _rows(data: Array) -> Array:
    data = np.asarray(data)
    rows = data.reshape(-1, data.shape[-1])
    if not len(rows):
        raise UserError(f"no data to fit a normaliser on: shape {data.shape}")
    if not np.isfinite(rows).all():
        counts = {int(i): int(n) for i, n in enumerate((~np.isfinite(rows)).sum(0)) if n}
        raise UserError(f"a normaliser cannot be fitted: values are not finite, channel -> number of them {counts}")
    return rows


def _statistics(*values: Array) -> Statistics:
    return Statistics(*(np.asarray(value, dtype=np.float32) for value in values))


def _affine(scale: Array, offset: Array, stats: Statistics) -> Affine:
    return Affine(scale.astype(np.float32), offset.astype(np.float32), stats)


class _Entry(nn.Module):
    """Buffers of one key: `scale`, `offset`, `input_stats.{min,max,mean,std}`, float32 [width]; NaN until fitted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_stats = nn.Module()
        for module, names in ((self, ("scale", "offset")), (self.input_stats, STATISTICS)):
            for name in names:
                module.register_buffer(name, torch.full((width,), float("nan")))
        self.was_fitted = False  # seen to be fitted: a look costs a synchronisation with the device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.was_fitted = False


class Normaliser(nn.Module):
    """A normaliser per key, kept in the state dict as `params_dict.KEY.scale|offset|input_stats.{min,max,mean,std}`.

    Args:
        widths: key -> numbers on the last axis. A key may not hold a dot.

    Shape:
        any [..., width] tensor in and out; float32, or float64 where the input is.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.params_dict = nn.ModuleDict({key: _Entry(width) for key, width in widths.items()})

    @property
    def widths(self) -> dict[str, int]:
        """Key -> numbers on the last axis."""
        return {key: len(entry.scale) for key, entry in self.params_dict.items()}

    def set(self, key: str, affine: Affine) -> None:
        """Fit `key`; a new value replaces the old one.

        Raises:
            UserError: a key that is not known, or one of another width.
        """
        entry = self._entry(key, len(affine.scale))
        with torch.no_grad():
            entry.scale.copy_(_tensor(affine.scale))
            entry.offset.copy_(_tensor(affine.offset))
            for name in STATISTICS:
                getattr(entry.input_stats, name).copy_(_tensor(getattr(affine.stats, name)))

    def normalise(self, key: str, x: Tensor) -> Tensor:
        """x * scale + offset.

        Raises:
            UserError: `key` is not known or not fitted yet, or x has another width.
        """
        entry = self._fitted(key, x.shape[-1])
        return x * entry.scale + entry.offset

    def unnormalise(self, key: str, y: Tensor) -> Tensor:
        """Inverse of `normalise`: (y - offset) / scale."""
        entry = self._fitted(key, y.shape[-1])
        return (y - entry.offset) / entry.scale

    def is_fitted(self, key: str) -> bool:
        """Whether `set` was called for `key`, here or before the state was saved."""
        return not bool(self._entry(key).scale.isnan().any())

    def affine(self, key: str) -> Affine:
        """What `key` was fitted with, as NumPy arrays.

        Raises:
            UserError: `key` is not known or not fitted yet.
        """
        entry = self._fitted(key)
        array = lambda tensor: tensor.detach().cpu().numpy().copy()  # noqa: E731
        stats = Statistics(*(array(getattr(entry.input_stats, name)) for name in STATISTICS))
        return Affine(array(entry.scale), array(entry.offset), stats)

    def differences(self, other: "Normaliser", keys: list[str] | None = None) -> list[str]:
        """The keys (default: those of both) whose scale or offset differ by more than 1e-6, relative to the larger.

        The difference of an offset is measured against max(1, |offset|), since outputs are about 1 in size.
        """
        keys = [key for key in self.params_dict if key in other.params_dict] if keys is None else keys
        return [key for key in keys if not self._is_close(other, key)]

    def _is_close(self, other: "Normaliser", key: str) -> bool:
        a, b = self.affine(key), other.affine(key)
        if len(a.scale) != len(b.scale):
            return False
        scale = np.abs(a.scale - b.scale) <= 1e-6 * np.maximum(np.abs(a.scale), np.abs(b.scale))
        size = np.maximum(1.0, np.maximum(np.abs(a.offset), np.abs(b.offset)))
        return bool(scale.all() and (np.abs(a.offset - b.offset) <= 1e-6 * size).all())

    def _fitted(self, key: str, width: int | None = None) -> _Entry:
        entry = self._entry(key, width)
        if not entry.was_fitted:
            if not self.is_fitted(key):
                raise UserError(f"the normaliser of {key} is not fitted: train first, or load a checkpoint that has it")
            entry.was_fitted = True
        return entry

    def _entry(self, key: str, width: int | None = None) -> _Entry:
        if key not in self.params_dict:
            guess = nearest(key, self.params_dict)
            hint = f", did you mean {guess}?" if guess else ""
            raise UserError(f"the normaliser has no key {key}{hint} It has {sorted(self.params_dict)}")
        entry = self.params_dict[key]
        if width is not None and width != len(entry.scale):
            raise UserError(f"the normaliser of {key} is for {len(entry.scale)} numbers, not {width}")
        return entry


def _tensor(array: Array) -> Tensor:
    return torch.as_tensor(np.asarray(array), dtype=torch.float32)
