"""Streams of (time, value) that run at their own rates, made into one table with a row a record.

RDP's recorder matches messages by approximate time (slop 0.1 s; its inference 0.4 s): a record exists only where every
stream has a partner, so the slowest camera sets the rate, and a record bears the newest stamp in it. Released data has
no compensation of a sensor's latency and no interpolation; both are options here. Stamps are float64 seconds: epoch
seconds in float32 are 128 s apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from mmtrain.config_errors import UserError, nearest
from mmtrain.poses import ortho6d_from_rotation, rotation_from_ortho6d

SLOP = 0.1  # seconds; RDP's recorder
GAP = 1.5  # periods from record to record, by the pivot's stamps, above which a frame is missing
Interpolation = Literal["linear", "pose"]


class Stream(NamedTuple):
    """One sensor: `times` [N] float64 seconds, strictly increasing; `values` [N, ...]."""

    times: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Gap:
    """A hole between two records.

    Args:
        start, stop: stamps of the records around it, in seconds.
        missing: frames that would have fitted.
        without: streams that had no partner there; empty if their samples were there but too far apart.
    """

    start: float
    stop: float
    missing: int
    without: tuple[str, ...]


@dataclass(frozen=True)
class AlignedTable:
    """R records.

    Args:
        times: [R] float64, the newest stamp of each record (latencies subtracted).
        values: stream -> [R, ...].
        indices: stream -> [R] int64, the sample each value comes from; interpolated streams are not in it.
        spread: [R] seconds from the oldest to the newest stamp of a record.
        gaps: holes, in order.
        unused: stream -> samples that are in no record; of a stream that is faster than the table most are.
    """

    times: np.ndarray
    values: dict[str, np.ndarray]
    indices: dict[str, np.ndarray]
    spread: np.ndarray
    gaps: list[Gap]
    unused: dict[str, int]

    def __len__(self) -> int:
        return len(self.times)


def align(
    streams: Mapping[str, Stream],
    slop: float = SLOP,
    pivot: str | None = None,
    once: bool = True,
    latency: Mapping[str, float] | None = None,
    interpolate: Mapping[str, Interpolation] | None = None,
) -> AlignedTable:
    """Match the streams by time.

    Each sample of the pivot takes the nearest sample of every other stream. A record is kept if its stamps lie within
    `slop` of each other.

    Args:
        streams: name -> stream.
        slop: seconds, > 0.
        pivot: the stream that sets the rate; None: the one with the fewest samples a second.
        once: each sample in at most one record. Where two want the same, the partners with the least sum of distances
            are taken, a missing one counting as `slop`. False repeats samples, as a hold does.
        latency: stream -> seconds from the event to its stamp, known beforehand; subtracted from the stamps.
        interpolate: stream -> "linear", or "pose" for rows of x y z and two columns of the rotation (9 numbers):
            linear positions, slerp of rotations. Evaluated at the record's stamp, which such a stream does not
            determine, between two samples that are at most `slop` apart; no sample of it is ever used up.

    Raises:
        UserError: no stream, stamps that do not increase or are not finite or not as many as values, a name that is
            not known, a slop that is not positive, an interpolated pivot, or values that cannot be interpolated.
    """
    latency, interpolate = dict(latency or {}), dict(interpolate or {})
    times = _checked_times(streams, latency, interpolate, slop)
    pivot = _pivot(times, interpolate) if pivot is None else pivot
    for name in (pivot, *interpolate):
        _check_known(name, streams, "pivot" if name == pivot else "interpolate")
    if pivot in interpolate:
        raise UserError(f"pivot: {pivot} is interpolated; the pivot's own samples make the records")
    matched = {name: _match(times[pivot], times[name], slop, once) for name in times if name not in interpolate}
    stamps = np.stack([np.where(index < 0, np.nan, times[name][index]) for name, index in matched.items()])
    spread = stamps.max(axis=0) - stamps.min(axis=0)  # NaN where a partner is missing
    newest = stamps.max(axis=0)
    brackets = {name: _bracket(newest, times[name], slop) for name in interpolate}
    partners = {name: index >= 0 for name, index in matched.items()} | {n: b >= 0 for n, b in brackets.items()}
    keep = np.logical_and.reduce([*partners.values(), spread <= slop])
    indices = {name: index[keep] for name, index in matched.items()}
    values = {
        name: _interpolated(streams[name].values, times[name], brackets[name][keep], newest[keep], interpolate[name])
        if name in interpolate
        else np.asarray(streams[name].values)[indices[name]]
        for name in streams
    }
    unused = {name: len(times[name]) - len(np.unique(index)) for name, index in indices.items()}
    gaps = _gaps(newest[keep], np.flatnonzero(keep), pivot, times[pivot], partners)
    return AlignedTable(newest[keep], values, indices, spread[keep], gaps, unused)


def _checked_times(
    streams: Mapping[str, Stream], latency: dict[str, float], interpolate: dict[str, Interpolation], slop: float
) -> dict[str, np.ndarray]:
    """Stamps of all streams, float64, latencies subtracted."""
    if not streams:
        raise UserError("streams: there is none to align")
    if not slop > 0:
        raise UserError(f"slop: {slop}, expected seconds above 0")
    for name in latency:
        _check_known(name, streams, "latency")
    for name, way in interpolate.items():
        _check_known(name, streams, "interpolate")
        _check_interpolation(name, streams[name], way)
    times = {}
    for name, stream in streams.items():
        stamps = np.asarray(stream.times, np.float64)
        if stamps.ndim != 1 or len(stamps) != len(stream.values) or not len(stamps):
            raise UserError(
                f"stream {name}: {stamps.shape} stamps for {len(stream.values)} values, expected as many, at least one"
            )
        faulty = np.flatnonzero(~np.isfinite(stamps))
        if len(faulty):
            raise UserError(f"stream {name}: stamp {faulty[0]} is {stamps[faulty[0]]}, expected finite seconds")
        back = np.flatnonzero(np.diff(stamps) <= 0)
        if len(back):
            i = int(back[0])
            raise UserError(
                f"stream {name}: stamp {i + 1} is {stamps[i + 1]:.6f} after {stamps[i]:.6f}, expected increasing "
                f"seconds ({len(back)} such places); sort the samples, or drop the repeated ones"
            )
        times[name] = stamps - latency.get(name, 0.0)
    return times


def _check_known(name: str, streams: Mapping[str, Stream], where: str) -> None:
    if name not in streams:
        guess = nearest(name, streams)
        raise UserError(f"{where}: no stream {name}{f'; did you mean {guess}?' if guess else ''} {list(streams)}")


def _check_interpolation(name: str, stream: Stream, way: str) -> None:
    if way not in ("linear", "pose"):
        raise UserError(f"interpolate: {name}: {way} is not known, expected linear or pose")
    values = np.asarray(stream.values)
    if values.dtype.kind != "f":
        raise UserError(f"interpolate: {name} holds {values.dtype}, expected floating-point numbers, no pictures")
    if way == "pose" and values.shape[1:] != (9,):
        raise UserError(f"interpolate: {name} has rows of shape {values.shape[1:]}, expected poses of 9 numbers")


def _pivot(times: dict[str, np.ndarray], interpolate: Mapping[str, str]) -> str:
    """The slowest stream: the longest median time from sample to sample, so that drop-outs do not count."""
    own = [name for name in times if name not in interpolate]
    if not own:
        raise UserError("interpolate: all streams are interpolated; at least one must set the rate")
    return max(own, key=lambda name: np.median(np.diff(times[name])) if len(times[name]) > 1 else np.inf)


def _match(pivot: np.ndarray, times: np.ndarray, slop: float, once: bool) -> np.ndarray:
    """Index of the partner in `times` [N] for each stamp of `pivot` [P], -1 where there is none: [P] int64.

    Partners never go backwards, as the nearest of rising stamps do not.
    """
    if times is pivot:
        return np.arange(len(pivot))
    right = np.clip(np.searchsorted(times, pivot), 1, max(len(times) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    index = np.where(pivot - times[left] <= times[right] - pivot, left, right)
    distance = np.abs(times[index] - pivot)
    index[distance > slop] = -1
    found = index[index >= 0]
    if once and len(np.unique(found)) < len(found):
        return _match_once(pivot, times, slop)
    return index


def _match_once(pivot: np.ndarray, times: np.ndarray, slop: float) -> np.ndarray:
    """`_match` where no sample serves twice: in order, with the least sum of distances, no partner counting as `slop`.

    Dynamic programming over the stamps of the pivot; a window is the samples within `slop` of one.
    """
    low, high = np.searchsorted(times, pivot - slop), np.searchsorted(times, pivot + slop, side="right")
    best = np.zeros(1)  # best[k]: the most that is saved with samples up to low - 1 + k
    choices, start = [], 0
    for i, stamp in enumerate(pivot):
        samples = np.arange(low[i] - 1, high[i])
        best = best[np.minimum(samples - start + 1, len(best) - 1)]
        saved = best[:-1] + slop - np.abs(times[samples[1:]] - stamp) + 1e-9  # a partner at `slop` is one too
        most = np.maximum.accumulate(saved)
        taken = np.maximum.accumulate(np.where(saved >= most, samples[1:], -1))
        choices.append(np.append(-1, np.where(most > best[1:], taken, -1)))
        best[1:] = np.maximum(best[1:], most)
        start = low[i]
    index, last = np.full(len(pivot), -1), len(times) - 1
    for i in range(len(pivot) - 1, -1, -1):
        index[i] = choices[i][min(last - low[i] + 1, len(choices[i]) - 1)]
        last = index[i] - 1 if index[i] >= 0 else last
    return index


def _bracket(when: np.ndarray, times: np.ndarray, slop: float) -> np.ndarray:
    """Index of the last sample at or before each time of `when`, -1 unless the next one is within `slop` of it."""
    index = np.searchsorted(times, when, side="right") - 1
    inside = (index >= 0) & (index < len(times)) & np.isfinite(when)
    exact = inside & (times[np.clip(index, 0, None)] == when)
    following = np.minimum(index + 1, len(times) - 1)
    near = inside & (following > index) & (times[following] - times[np.clip(index, 0, None)] <= slop)
    return np.where(near | exact, index, -1)


def _interpolated(
    values: np.ndarray, times: np.ndarray, index: np.ndarray, when: np.ndarray, way: Interpolation
) -> np.ndarray:
    """Values [R, ...] at the times `when` [R], each between samples `index` and `index + 1`; dtype of the values."""
    values = np.asarray(values)
    following = np.minimum(index + 1, len(times) - 1)
    length = np.where(following > index, times[following] - times[index], 1.0)
    share = ((when - times[index]) / length).reshape(-1, *[1] * (values.ndim - 1))
    start, stop = values[index].astype(np.float64), values[following].astype(np.float64)
    result = start + share * (stop - start)
    if way == "pose" and len(when):
        used = np.unique(np.concatenate([index, following]))
        if len(used) > 1:
            rotations = Rotation.from_matrix(rotation_from_ortho6d(values[used, 3:].astype(np.float64)))
            result[:, 3:] = ortho6d_from_rotation(Slerp(times[used], rotations)(when).as_matrix())
    return result.astype(values.dtype)


def _gaps(
    stamps: np.ndarray, kept: np.ndarray, pivot: str, times: np.ndarray, partners: dict[str, np.ndarray]
) -> list[Gap]:
    """Holes between records: longer than GAP periods of the pivot, whose samples `kept` [R] made the records."""
    if len(stamps) < 2:
        return []
    period, steps = float(np.median(np.diff(times))), np.diff(times[kept])
    gaps = []
    for i in np.flatnonzero(steps > GAP * period):
        missing = max(round(float(steps[i]) / period) - 1, 1)
        inside = slice(kept[i] + 1, kept[i + 1])
        without = [name for name, found in partners.items() if not found[inside].all()]
        if inside.stop - inside.start < missing:
            without.append(pivot)
        gaps.append(Gap(float(stamps[i]), float(stamps[i + 1]), missing, tuple(sorted(without))))
    return gaps
