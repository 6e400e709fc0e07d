"""Robot episodes in the zarr layout that RDP released (v2 format): opened lazily, checked, cut into padded windows."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from datamodules.episode_pictures import PictureArray
from mmtrain import marker_pca
from mmtrain.config_errors import UserError, nearest
from mmtrain.marker_pca import MarkerPca
from mmtrain.robot_tasks import EMBEDDING, FRAME_RATE, MARKERS, sensor_of

LabelLookahead = Literal["corrected", "reference"]
SPLIT_SEED = 42  # of the released code; all training seeds share the split
ENDS = "meta/episode_ends"
UNFINISHED = "unfinished_from"  # store attribute: frames of finished episodes, while an episode is being appended
CHANNEL_ORDER = "channel_order"  # store attribute: "rgb" where pictures are known to be; released stores have none
EMBEDDING_TOLERANCE = 1e-4  # in normalised image units; embeddings are of order 0.1


# --- windows and split (specification 1.8): pure functions over episode boundaries ---


def window_rows(
    episode_ends: np.ndarray, horizon: int, pad_before: int, pad_after: int, episodes: np.ndarray | None = None
) -> np.ndarray:
    """All windows as rows (first buffer index, end buffer index, first index in the window, end index in the window).

    A window may stick out of its episode by `pad_before` frames at the beginning and `pad_after` at the end; there its
    frames repeat the first or the last one.

    Args:
        episode_ends: [E], exclusive ends, strictly increasing.
        episodes: numbers of the episodes to take, or a mask [E]; None takes all.

    Returns:
        int64 [W, 4], by episode, then by start.
    """
    starts, ends, episode = window_starts(episode_ends, horizon, pad_before, pad_after, episodes)
    first, last = _bounds(episode_ends)
    begin, end = np.maximum(starts, first[episode]), np.minimum(ends, last[episode])
    return np.stack([begin, end, begin - starts, end - starts], axis=1)


def window_starts(
    episode_ends: np.ndarray, horizon: int, pad_before: int, pad_after: int, episodes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begin and end of every window, padding included (they may lie outside the episode), and its episode: [W] each."""
    first, last = _bounds(episode_ends)
    chosen = np.arange(len(first)) if episodes is None else np.asarray(episodes)
    chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
    counts = np.maximum(last[chosen] - first[chosen] - horizon + pad_after + pad_before + 1, 0)
    episode = np.repeat(chosen, counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first[episode] - pad_before + within
    return starts, starts + horizon, episode


def window_indices(
    episode_ends: np.ndarray, horizon: int, pad_before: int, pad_after: int, episodes: np.ndarray | None = None
) -> np.ndarray:
    """The buffer index of every frame of every window, int64 [W, horizon]; padding repeats the episode's ends."""
    starts, _, episode = window_starts(episode_ends, horizon, pad_before, pad_after, episodes)
    first, last = _bounds(episode_ends)
    frames = starts[:, None] + np.arange(horizon)
    return np.clip(frames, first[episode, None], last[episode, None] - 1)


def _bounds(episode_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ends = np.asarray(episode_ends, dtype=np.int64)
    return np.concatenate([[0], ends[:-1]]), ends


def split_episodes(
    num_episodes: int, val_ratio: float, max_train_episodes: int | None = None, seed: int = SPLIT_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """Masks [E] of the training and the validation episodes, disjoint.

    n_val = clip(round(E * ratio), 1, E - 1), none with ratio 0; at most `max_train_episodes` of the rest train.

    Raises:
        UserError: a ratio outside [0, 1), or a number of episodes below 1.
    """
    if not 0 <= val_ratio < 1:
        raise UserError(f"val_ratio: {val_ratio} is not in [0, 1)")
    if max_train_episodes is not None and max_train_episodes < 1:
        raise UserError(f"max_train_episodes: {max_train_episodes} leaves nothing to train on; give 1 or more, or null")
    validation = np.zeros(num_episodes, dtype=bool)
    if val_ratio > 0:
        count = min(max(1, round(num_episodes * val_ratio)), num_episodes - 1)
        validation[np.random.default_rng(seed).choice(num_episodes, size=count, replace=False)] = True
    train = ~validation
    if max_train_episodes is not None and train.sum() > max_train_episodes:
        rest = np.flatnonzero(train)
        train[:] = False
        train[rest[np.random.default_rng(seed).choice(len(rest), size=max_train_episodes, replace=False)]] = True
    return train, validation


def downsample(
    episode_ends: np.ndarray, frames_per_step: int, label_lookahead: LabelLookahead = "corrected"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames of a lower rate: stored frame of each kept one [M], stored frame of its label [M], episode ends in M.

    The stored `action[t]` is the state one stored frame later. `corrected` keeps frames 0, k, 2k, ... and takes the
    label of frame t from `action[t + k - 1]`: the state one step of the LOW rate later. `reference` (k = 2) does what
    the released code does: it keeps the first frame, frames 1, 3, 5, ... of the middle and the last one, and leaves the
    label at `action[t]`, half a step ahead (fault: such a policy is trained to move half a step a step).
    """
    first, last = _bounds(episode_ends)
    if frames_per_step == 1:
        every = np.arange(last[-1] if len(last) else 0)
        return every, every, last
    if label_lookahead == "reference":
        kept = [
            np.unique(np.concatenate([[a], np.arange(a + 1, b - 1, frames_per_step), [b - 1]]))
            for a, b in zip(first, last, strict=True)
        ]
    else:
        kept = [np.arange(a, b, frames_per_step) for a, b in zip(first, last, strict=True)]
    frames = np.concatenate(kept)
    counts = np.array([len(own) for own in kept])
    if label_lookahead == "reference":
        labels = frames
    else:
        labels = np.minimum(frames + frames_per_step - 1, np.repeat(last, counts) - 1)
    return frames, labels, np.cumsum(counts)


# --- the store ---


class EpisodeStore:
    """A replay buffer on disk: groups `data` (arrays of N frames) and `meta` (`episode_ends`, facts of each episode).

    Opening reads `episode_ends` only. Low-dimensional arrays come into memory when they are asked for; pictures are
    read frame by frame (see `PictureArray`).

    Args:
        path: the zarr folder, or a folder that holds `replay_buffer.zarr`.

    Raises:
        UserError: nothing is there, another zarr format than 2, no `meta/episode_ends`, or ends that are not strictly
            increasing whole numbers.
    """

    rate = FRAME_RATE

    def __init__(self, path: str | Path) -> None:
        self.path = store_path(path)
        try:
            self.group = zarr.open_group(self.path, mode="r")
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise UserError(f"{self.path} is not a zarr store: it has no readable .zgroup") from error
        if (found := self.group.metadata.zarr_format) != 2:
            raise UserError(f"{self.path} is a zarr store of format {found}, expected format 2, as RDP's are")
        self.attributes: dict[str, Any] = dict(self.group.attrs)
        self.episode_ends = self._read_ends()

    def _read_ends(self) -> np.ndarray:
        name = ENDS
        if name not in self.group:
            raise UserError(f"{self.path}: no array {name}, so it is not known where episodes end")
        ends = finished_ends(self.group)
        if ends.ndim != 1 or not np.issubdtype(ends.dtype, np.integer):
            raise UserError(
                f"{self.path}: {name} is {ends.dtype} {list(ends.shape)}, expected whole numbers [episodes]"
            )
        if not len(ends):
            raise UserError(f"{self.path}: {name} is empty: the store holds no finished episode")
        steps = np.diff(ends.astype(np.int64), prepend=0)
        if (steps <= 0).any():
            bad = int(np.argmax(steps <= 0))
            before = int(ends[bad - 1]) if bad else 0
            raise UserError(
                f"{self.path}: {name} must increase, but episode {bad} ends at {int(ends[bad])} after {before}"
            )
        return ends.astype(np.int64)

    @property
    def num_frames(self) -> int:
        """Frames of all finished episodes."""
        return int(self.episode_ends[-1])

    @property
    def num_episodes(self) -> int:
        """Finished episodes."""
        return len(self.episode_ends)

    @cached_property
    def keys(self) -> list[str]:
        """Names of the arrays under `data`, without opening them."""
        folder = self.path / "data"
        return (
            sorted(entry.name for entry in folder.iterdir() if (entry / ".zarray").exists()) if folder.is_dir() else []
        )

    def where(self, frame: int) -> str:
        """ "episode E, frame F" of a frame of the buffer."""
        return frame_name(frame, self.episode_ends)

    def array(self, key: str) -> zarr.Array:
        """The array `data/key`, not read, of at least as many frames as the episodes have.

        Raises:
            UserError: it is missing, or its length is not that of `episode_ends`.
        """
        if key not in self.keys:
            guess = nearest(key, self.keys)
            raise UserError(f"{self.path}: no array data/{key}{f', the nearest is data/{guess}' if guess else ''}")
        array = self.group[f"data/{key}"]
        unfinished = self.attributes.get(UNFINISHED) == self.num_frames and array.shape[0] > self.num_frames
        if array.shape[0] != self.num_frames and not unfinished:
            raise UserError(
                f"{self.path}: data/{key} has {array.shape[0]} frames, but meta/episode_ends ends at {self.num_frames}"
            )
        return array

    def low_dim(self, key: str, width: int | tuple[int, ...]) -> np.ndarray:
        """All frames of a low-dimensional array in memory, float32 [N, *width].

        Raises:
            UserError: it is missing, of another type or width, or has a number that is not finite.
        """
        array = self.array(key)
        width = (width,) if isinstance(width, int) else tuple(width)
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"{self.path}: data/{key} is {array.dtype}, expected float32")
        if array.shape[1:] != width:
            raise UserError(
                f"{self.path}: data/{key} has {list(array.shape[1:])} numbers a frame, expected {list(width)}"
            )
        values = np.asarray(array[: self.num_frames], dtype=np.float32)
        self._check_finite(key, values)
        return values

    def _check_finite(self, key: str, values: np.ndarray) -> None:
        finite = np.isfinite(values).reshape(len(values), -1)
        if finite.all():
            return
        bad = np.flatnonzero(~finite.all(axis=1))
        frame, channel = int(bad[0]), int(np.argmin(finite[bad[0]]))
        raise UserError(
            f"{self.path}: data/{key} is {values.reshape(len(values), -1)[frame, channel]} at {self.where(frame)}, "
            f"number {channel} ({len(bad)} such frames): mend the data or take the episode out"
        )

    def facts(self, key: str) -> np.ndarray | None:
        """`meta/key` [E], a fact of each episode such as `variation`, or None."""
        name = f"meta/{key}"
        return np.asarray(self.group[name][: self.num_episodes]) if name in self.group else None

    def pictures(self, key: str, bgr: bool = False) -> PictureArray:
        """The pictures `data/key`, none of them read.

        Args:
            bgr: see `is_blue_first`.

        Raises:
            UserError: the array is missing, or does not hold uint8 [N, H, W, 3] or JPEG files.
        """
        return PictureArray(self.array(key), self.path / "data" / key, self.is_blue_first(key, bgr))

    def is_blue_first(self, key: str, bgr: bool = True) -> bool:
        """Whether to turn the pictures `data/key` round to have RGB.

        Args:
            bgr: cameras are blue first where the store does not say its order. That is so in the released stores; all
                that `EpisodeWriter` writes say that they are RGB. Tactile pictures never are blue first.
        """
        return bgr and sensor_of(key) is None and self.attributes.get(CHANNEL_ORDER) != "rgb"

    def pca(self, sensor: str) -> MarkerPca | None:
        """The matrix that made a sensor's marker embedding, its sizes not checked; None where the store has none."""
        names = [f"pca/{sensor}/{part}" for part in ("components", "mean")]
        if any(name not in self.group for name in names):
            return None
        return MarkerPca(*(np.asarray(self.group[name][...]) for name in names))

    def check_lengths(self, shortest: int) -> None:
        """Every episode must have at least `shortest` stored frames.

        Raises:
            UserError: naming the first that is shorter.
        """
        lengths = np.diff(self.episode_ends, prepend=0)
        if (short := np.flatnonzero(lengths < shortest)).size:
            raise UserError(
                f"{self.path}: episode {short[0]} has {lengths[short[0]]} frames, a window takes {shortest} "
                f"({len(short)} of {len(lengths)} episodes are too short): padding may repeat one end of an episode, "
                "not stand for a whole one; take such episodes out"
            )


def finished_ends(group: zarr.Group) -> np.ndarray:
    """`meta/episode_ends`, without the 0 of a writer that was killed between making a place and filling it."""
    ends = np.asarray(group[ENDS][:])
    return ends[:-1] if UNFINISHED in group.attrs and len(ends) and ends[-1] == 0 else ends


def frame_name(frame: int, episode_ends: np.ndarray) -> str:
    """ "episode E, frame F" of a frame of the buffer."""
    episode = int(np.searchsorted(episode_ends, frame, side="right"))
    return f"episode {episode}, frame {frame - (int(episode_ends[episode - 1]) if episode else 0)}"


def store_path(path: str | Path) -> Path:
    """The zarr folder that `path` names: itself, or `replay_buffer.zarr` in it.

    Raises:
        UserError: there is nothing.
    """
    path = Path(path)
    inner = path / "replay_buffer.zarr"
    if inner.is_dir() and not (path / ".zgroup").exists():
        return inner
    if not path.is_dir():
        raise UserError(f"{path}: no such store of episodes (a zarr folder, or one that holds replay_buffer.zarr)")
    return path


def missing_streams(store: EpisodeStore, widths: Mapping[str, int], pictures: Iterable[str]) -> list[str]:
    """What of {stream: stored width} and of pictures a store lacks or has at another width, in words; opens no data."""
    lacking = [f"data/{key} is missing" for key in [*widths, *pictures] if key not in store.keys]
    for key, width in widths.items():
        if key in store.keys and (found := tuple(store.group[f"data/{key}"].shape[1:])) != (width,):
            lacking.append(f"data/{key} has {list(found)} numbers a frame, not [{width}]")
    return lacking


def check_embedding(store: EpisodeStore, key: str, count: int) -> None:
    """Embeddings of `count` frames, spread evenly, must be what the store's own PCA makes; a store without one passes.

    Raises:
        UserError: they differ, or the matrix does not fit the sensor or the embedding.
    """
    sensor, fields = sensor_of(key), key.removesuffix("_emb")
    if sensor is None or fields not in store.keys or (matrix := store.pca(sensor)) is None:
        return
    markers = int(np.prod(MARKERS[sensor]))
    matrix = marker_pca.check(matrix, markers, EMBEDDING, f"{store.path}: pca/{sensor}")
    offsets, embeddings = store.array(fields), store.array(key)
    if offsets.shape[1:] != (markers, 2):
        raise UserError(
            f"{store.path}: data/{fields} has {list(offsets.shape[1:])} numbers a frame, expected {[markers, 2]} for a "
            f"{sensor}"
        )
    frames = np.unique(np.linspace(0, store.num_frames - 1, count).astype(int))
    errors = np.abs(marker_pca.embed(matrix, offsets.oindex[frames]) - embeddings.oindex[frames]).max(axis=1)
    if (bad := np.flatnonzero(~(errors <= EMBEDDING_TOLERANCE))).size:  # NaN is one
        raise UserError(
            f"{store.path}: data/{key} at {store.where(int(frames[bad[0]]))} is not the embedding of data/{fields} by "
            f"pca/{sensor} (off by {errors[bad[0]]:.2g}): it was made with another matrix; embed the offsets anew"
        )
