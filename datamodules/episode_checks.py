"""What can be wrong with a store of episodes: checks of numbers already in memory, and one function that runs them all.

Threads about policies that do not learn often end in a fault of the data: a label at the wrong frame, a sensor that
froze, one absurd wrench. Low-dimensional arrays are read one at a time; of pictures the shape, the type and one chunk.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import zarr

from datamodules.episodes import ENDS, EpisodeStore, check_embedding, frame_name, store_path
from mmtrain.config_errors import UserError
from mmtrain.robot_tasks import EMBEDDING, FRAME_RATE, MARKERS

Severity = Literal["error", "warning", "note"]
SEVERITIES = ("error", "warning", "note")
GAP = 1.5  # periods between frames from which on one is missing
LONG_GAP = 0.5  # seconds without a frame that spoil every window over them
OUTLIER = 10.0  # robust z; of a normal distribution the largest of a million frames has 5
DEAD = 1e-7  # range below which a number counts as constant
SHIFTS = range(-2, 7)  # frames by which an action may be ahead of the state it is compared with
EXPECTED_SHIFT = 1  # RDP: the action is the measured state one frame later
WINDOW = 32  # stored frames of the longest window
EMBEDDINGS = 256  # frames whose embedding is made anew
NOISY = ("_tcp_wrench", "_marker_offset", "_marker_offset_emb")  # streams that are never still for a second
OUTLIER_STREAMS = ("_tcp_wrench", "_gripper_force", "_marker_offset_emb")


class Finding(NamedTuple):
    """One thing about an array. An error stops training or spoils it, a warning may, a note is for information."""

    severity: Severity
    array: str
    check: str
    message: str


def check_store(path: str | Path) -> list[Finding]:
    """All checks of a store, errors first.

    Raises:
        UserError: there is no store at all.
    """
    try:
        store = EpisodeStore(path)
    except UserError as error:
        if not (store_path(path) / ".zgroup").exists():
            raise
        return [Finding("error", ENDS, "episodes", str(error))]
    findings = list(check_lengths(store.episode_ends))
    for key in store.keys:
        findings += _check_array(store, key)
    findings += _check_labels(store)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def check_lengths(episode_ends: np.ndarray, window: int = WINDOW) -> Iterator[Finding]:
    """Episodes [E] that are shorter than a window, or far from the median length."""
    lengths = np.diff(episode_ends, prepend=0)
    median = np.median(lengths)
    if (short := np.flatnonzero(lengths < window)).size:
        text = f"{_count(short, 'episode')} shorter than a window of {window} frames, first: {short[0]}"
        yield Finding("error", ENDS, "length", f"{text} with {lengths[short[0]]}")
    odd = np.flatnonzero((lengths >= window) & ((lengths > 4 * median) | (lengths < median / 4)))
    if odd.size:
        text = f"{_count(odd, 'episode')} over four times longer or shorter than the median of {median:g} frames"
        yield Finding("warning", ENDS, "length", f"{text}, first: {odd[0]} with {lengths[odd[0]]}")
    yield Finding(
        "note",
        ENDS,
        "length",
        f"{len(lengths)} episodes of {lengths.min()} to {lengths.max()} frames, {lengths.sum():,} in all",
    )


def check_timestamps(times: np.ndarray, episode_ends: np.ndarray, rate: float = FRAME_RATE) -> Iterator[Finding]:
    """Time [N] in seconds: type, order, rate and gaps, within episodes."""
    name, check = "data/timestamp", "time"
    if not np.isfinite(times).all():
        frame = int(np.argmin(np.isfinite(times)))
        yield Finding("error", name, check, f"{times[frame]} at {frame_name(frame, episode_ends)}")
        return
    resolution = float(np.spacing(np.abs(times).max()))
    if resolution > 0.5 / rate:
        yield Finding(
            "warning",
            name,
            check,
            f"{times.dtype} tells seconds {resolution:g} apart at {float(np.abs(times).max()):.0f}, a frame takes "
            f"{1 / rate:.3f}: gaps cannot be seen; `data convert` rebuilds the time from {rate:g} frames a second",
        )
        return
    steps, frames = _steps(times.astype(np.float64), episode_ends)
    if not len(steps):
        return
    if (back := steps <= 0).any():
        where = frame_name(int(frames[back][0]) + 1, episode_ends)
        yield Finding("error", name, check, f"does not increase at {back.sum()} frames, first: {where}")
        return
    median = float(np.median(steps))
    if abs(median * rate - 1) > 0.05:
        yield Finding("warning", name, check, f"{1 / median:.2f} frames a second, expected {rate:g}")
    if (gap := steps > GAP * median).any():
        worst = int(np.argmax(steps))
        lost = int(np.round(steps[gap] / median - 1).sum())
        severity: Severity = "error" if steps[worst] > LONG_GAP else "warning"
        where = frame_name(int(frames[worst]), episode_ends)
        text = f"{_count(frames[gap], 'gap')}, {lost} frames lost; the longest is {steps[worst]:.3f} s after {where}"
        yield Finding(severity, name, "gaps", text)


def check_finite(name: str, values: np.ndarray, episode_ends: np.ndarray) -> Iterator[Finding]:
    """NaN and infinity in values [N, ...]."""
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        frame = int(np.argmin(finite))
        text = f"{_count(np.flatnonzero(~finite), 'frame')} with NaN or infinity, first: "
        yield Finding("error", name, "finite", text + frame_name(frame, episode_ends))


def check_outliers(name: str, values: np.ndarray, episode_ends: np.ndarray) -> Iterator[Finding]:
    """Numbers [N, D] far outside what nearly all frames have, which squeeze a channel normalised by its limits.

    z = |x - median| / s, where s is the span from the 1 % to the 99 % quantile over that of a normal distribution. The
    usual median of deviations is 0 for a force that is mostly 0.
    """
    low, middle, high = np.quantile(values, [0.01, 0.5, 0.99], axis=0)
    z = np.abs(values - middle) / np.maximum((high - low) / 4.652695, 1e-9)
    for channel in np.flatnonzero(z.max(0) > OUTLIER):
        frame, column = int(z[:, channel].argmax()), values[:, channel]
        span, place = max(float(np.ptp(column)), 1e-12), frame_name(int(z[:, channel].argmax()), episode_ends)
        yield Finding(
            "warning",
            name,
            "outlier",
            f"number {channel} is {column[frame]:.4g} at {place} (robust z {z[frame, channel]:.0f}; "
            f"{(z[:, channel] > OUTLIER).sum()} frames above {OUTLIER:g}); 98 % of the frames fill "
            f"{(high[channel] - low[channel]) / span:.1%} of its range: mend it, or normalise by `quantile`",
        )


def check_motion(name: str, values: np.ndarray, episode_ends: np.ndarray) -> Iterator[Finding]:
    """Streams [N, ...] that are constant in the whole store, in an episode, or (noisy ones) for a second."""
    flat = values.reshape(len(values), -1)
    constant = np.ptp(flat, axis=0) < DEAD
    is_label = name in ("data/action", "data/target")
    if constant.all():
        text = "constant in the whole store"
        yield Finding("error" if is_label else "warning", name, "dead", text + ": nothing can be learned from it")
        return
    if constant.any():
        text = f"numbers {np.flatnonzero(constant).tolist()[:10]} are constant in the whole store"
        yield Finding("note", name, "dead", text)
    starts = np.concatenate([[0], episode_ends[:-1]])
    spans = np.maximum.reduceat(flat, starts) - np.minimum.reduceat(flat, starts)
    if (still := np.flatnonzero((spans < DEAD).all(1))).size and not name.endswith("_gripper_width"):
        yield Finding("warning", name, "dead", f"{_count(still, 'episode')} in which it is constant, first: {still[0]}")
    elif name.endswith(NOISY):
        start, length = _longest_run(flat, episode_ends)
        if length >= FRAME_RATE:
            text = f"the same for {length} frames from {frame_name(start, episode_ends)}: did the sensor freeze?"
            yield Finding("warning", name, "frozen", text)


def check_rotation(name: str, poses: np.ndarray, episode_ends: np.ndarray) -> Iterator[Finding]:
    """Poses [N, 9]: the six rotation numbers must be two orthonormal columns, to 1e-3."""
    first, second = poses[:, 3:6].astype(np.float64), poses[:, 6:9].astype(np.float64)
    products = np.stack([(first**2).sum(1) - 1, (second**2).sum(1) - 1, (first * second).sum(1)])
    bad = np.flatnonzero(np.abs(products).max(0) > 1e-3)
    if bad.size:
        text = f"{_count(bad, 'frame')} whose rotation columns are not orthonormal, first: "
        yield Finding("warning", name, "rotation", text + frame_name(int(bad[0]), episode_ends))


def action_shift(action: np.ndarray, state: np.ndarray, episode_ends: np.ndarray) -> tuple[int | None, float]:
    """By how many frames actions [N, D] are ahead of states [N, D], and how well they agree there.

    Each number is taken in units of its standard deviation, and of `SHIFTS` the one with the least mean square
    difference wins. Frames near an episode's ends are left out at all shifts alike.

    Returns:
        The shift, None if nothing moves enough to tell; and that difference, 0 if equal and 2 if unrelated.
    """
    lengths = np.diff(episode_ends, prepend=0)
    episode = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(action)) - np.repeat(episode_ends - lengths, lengths)
    inner = np.flatnonzero((place >= -SHIFTS[0]) & (place < lengths[episode] - SHIFTS[-1]))
    if not len(inner):
        return None, float("nan")
    scale = state[inner].astype(np.float64).std(0)
    moving = scale > 1e-5
    if not moving.any():
        return None, float("nan")
    errors = [
        np.mean(((action[inner][:, moving] - state[inner + shift][:, moving]).astype(np.float64) / scale[moving]) ** 2)
        for shift in SHIFTS
    ]
    best = int(np.argmin(errors))
    if max(errors) - min(errors) < 1e-12:
        return None, errors[best]
    return SHIFTS[best], errors[best]


def check_labels(action: np.ndarray, state: np.ndarray, episode_ends: np.ndarray) -> Iterator[Finding]:
    """Actions [N, D] against the states [N, D] they stand for: expected is the state one frame later."""
    name = "data/action"
    shift, error = action_shift(action, state, episode_ends)
    if shift is None:
        yield Finding("warning", name, "lag", "the arm hardly moves: the lag of the action cannot be told")
        return
    text = f"the action is the state {shift:+d} frames on (mean square difference {error:.2g} of its variance)"
    if shift == EXPECTED_SHIFT:
        yield Finding("note", name, "lag", text.replace("frames", "frame") + ", as expected")
    elif shift <= 0:
        yield Finding("error", name, "lag", text + ": expected +1; a policy trained on this learns to stand still")
    else:
        yield Finding("warning", name, "lag", text + ": expected +1; are these commands, or labels of another rate?")
    last = episode_ends[:-1] - 1
    jump = np.abs(action[last] - state[last]).max(1)
    into_next = np.flatnonzero((np.abs(action[last] - state[last + 1]).max(1) < 1e-6) & (jump > 1e-3))
    if into_next.size:
        text = f"{_count(into_next, 'episode')} whose last action is the first state of the next one"
        yield Finding(
            "error", name, "lag", f"{text}, first: {into_next[0]}; the last action should repeat the one before"
        )


def state_of_action(width: int, low_dim: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """The measured poses that stand in an action of 4, 8, 10 or 20 numbers: state [N, D] and its columns in the action.

    `low_dim` holds `SIDE_robot_tcp_pose` [N, 9]. None for another width or where a pose is missing.
    """
    layouts = {4: (("left",), 3), 10: (("left",), 9), 8: (("left", "right"), 3), 20: (("left", "right"), 9)}
    if width not in layouts:
        return None
    sides, dim = layouts[width]
    poses = [low_dim.get(f"{side}_robot_tcp_pose") for side in sides]
    if any(pose is None or pose.ndim != 2 or pose.shape[1] < dim for pose in poses):
        return None
    return np.concatenate([pose[:, :dim] for pose in poses], axis=1), np.arange(dim * len(sides))


def _check_array(store: EpisodeStore, key: str) -> list[Finding]:
    """Everything about one array of a store; an array of wrong length or type gets that finding alone."""
    name, ends = f"data/{key}", store.episode_ends
    try:
        array = store.array(key)
        if array.dtype == object or (array.dtype == np.uint8 and array.ndim == 4):
            return list(_check_pictures(store, key, array))
    except UserError as error:
        return [Finding("error", name, "read", str(error))]
    if array.dtype.kind != "f":
        return [Finding("error", name, "type", f"{array.dtype} {list(array.shape)}, expected float32")]
    values = array[: store.num_frames]
    if key == "timestamp":
        return list(check_timestamps(values, ends))
    findings = []
    if array.dtype != np.float32:
        findings.append(Finding("note", name, "type", f"{array.dtype}, the layout has float32"))
    is_embedding = key.endswith("_marker_offset_emb")
    if is_embedding and values.shape[1:] != (EMBEDDING,):
        findings.append(_embedding_width(name, values.shape[1:]))
    if bad := list(check_finite(name, values, ends)):
        return findings + bad
    if is_embedding and values.shape[1:] == (EMBEDDING,):
        try:
            check_embedding(store, key, EMBEDDINGS)
        except UserError as error:
            findings.append(Finding("error", name, "embedding", str(error)))
    if not key.endswith("_initial_marker"):
        findings += check_motion(name, values, ends)
    if key.endswith(OUTLIER_STREAMS) and values.ndim == 2:
        findings += check_outliers(name, values, ends)
    if key.endswith("_tcp_pose") and values.shape[1:] == (9,):
        findings += check_rotation(name, values, ends)
    return findings


def _embedding_width(name: str, tail: tuple[int, ...]) -> Finding:
    text = f"{list(tail)} numbers a frame, expected [{EMBEDDING}]"
    if tail in [(2 * rows * columns,) for rows, columns in MARKERS.values()]:
        text += ": the raw marker field, as its PCA did not fit; `data convert --pca FILE` embeds it anew"
    return Finding("error", name, "embedding", text)


def _check_pictures(store: EpisodeStore, key: str, array: zarr.Array) -> Iterator[Finding]:
    """Shape, type and chunks of pictures, and one of them."""
    name, pictures = f"data/{key}", store.pictures(key)
    kind = "JPEG files" if pictures.is_jpeg else f"uint8 {list(array.shape[1:])}"
    if not pictures.is_jpeg and array.chunks[0] > 1:
        text = (
            f"{kind} in chunks of {array.chunks[0]} frames, all of which are read for one; `data convert` splits them"
        )
        yield Finding("warning", name, "pictures", text)
    if store.is_blue_first(key):
        text = "the store does not say the order of its channels; RDP's recorder left cameras blue first: "
        yield Finding("note", name, "pictures", text + "`data.bgr: true`, or `data convert`")
    frame = store.num_frames // 2
    picture = pictures.read(np.array([frame]))
    if np.ptp(picture) == 0:
        text = f"one colour ({picture.flat[0]}) at {store.where(frame)}, the only frame that was looked at"
        yield Finding("warning", name, "pictures", text)
    yield Finding("note", name, "pictures", f"{kind}, {pictures.size[0]} x {pictures.size[1]} pixels")


def _check_labels(store: EpisodeStore) -> list[Finding]:
    """The action against the poses, where both can be read."""
    if "action" not in store.keys:
        return [Finding("error", "data/action", "lag", "there is no such array")]
    action = store.group["data/action"]
    keys = [key for key in store.keys if key.endswith("_robot_tcp_pose")]
    arrays = {key: store.group[f"data/{key}"] for key in keys}
    if any(a.dtype.kind != "f" or a.ndim != 2 or a.shape[0] < store.num_frames for a in (action, *arrays.values())):
        return []  # said already
    poses = {key: array[: store.num_frames] for key, array in arrays.items()}
    found = state_of_action(action.shape[1], poses)
    if found is None:
        text = f"{action.shape[1]} numbers: not a layout of 4, 8, 10 or 20 with its arms' poses; its lag is not checked"
        return [Finding("warning", "data/action", "lag", text)]
    state, columns = found
    labels = action[: store.num_frames][:, columns]
    if not (np.isfinite(labels).all() and np.isfinite(state).all()):
        return []
    return list(check_labels(labels, state, store.episode_ends))


def _count(items: np.ndarray, what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


def _steps(values: np.ndarray, episode_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences from frame to frame within episodes, and the frame each starts at."""
    frames = np.setdiff1d(np.arange(len(values) - 1), episode_ends - 1)
    return values[frames + 1] - values[frames], frames


def _longest_run(flat: np.ndarray, episode_ends: np.ndarray) -> tuple[int, int]:
    """First frame and length of the longest run of equal frames [N, D] within an episode."""
    breaks = np.concatenate([[0], np.flatnonzero((flat[1:] != flat[:-1]).any(1)) + 1, episode_ends])
    breaks = np.unique(breaks)
    lengths = np.diff(breaks)
    longest = int(np.argmax(lengths))
    return int(breaks[longest]), int(lengths[longest])
