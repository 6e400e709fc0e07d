"""Appends episodes to a store of the released zarr layout (v2 format): demonstrations, recorders, converters, tests."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import zarr
from torchvision.io import encode_jpeg

from datamodules.episodes import CHANNEL_ORDER, ENDS, UNFINISHED, finished_ends
from mmtrain.config_errors import UserError

ROWS_PER_CHUNK = 10_000  # of low-dimensional arrays, as released
TEXT = 16  # bytes of a fact such as `variation`


class EpisodeWriter:
    """A store that grows by whole episodes.

    An episode counts only once `meta/episode_ends` has it, and that is written last: after a kill at any moment the
    store holds the episodes before, and the next writer cuts off what was left behind them. One process writes at a
    time.

    Args:
        path: the zarr folder; made if it does not exist.
        attributes: plain values to keep with the store, such as `source`.
        jpeg_quality: keep pictures as JPEG files of this quality (1..100), smaller and lossy; None keeps the pixels,
            one compressed frame a chunk.

    Raises:
        UserError: `path` holds something that is not a store of format 2.
    """

    def __init__(
        self, path: str | Path, attributes: Mapping[str, Any] | None = None, jpeg_quality: int | None = None
    ) -> None:
        self.path, self.jpeg_quality = Path(path), jpeg_quality
        if self.path.exists() and any(self.path.iterdir()) and not (self.path / ".zgroup").exists():
            raise UserError(f"{path} exists and is not a zarr store of format 2: give another path")
        self.group = zarr.open_group(self.path, mode="a", zarr_format=2)
        for name in ("data", "meta"):
            self.group.require_group(name)
        if attributes:
            self.group.attrs.update(json.loads(json.dumps(dict(attributes))))
        if ENDS not in self.group:
            self.group.create_array(ENDS, shape=(0,), chunks=(ROWS_PER_CHUNK,), dtype="int64")
        ends = finished_ends(self.group)
        self.num_episodes, self.num_frames = len(ends), int(ends[-1]) if len(ends) else 0
        self._arrays: dict[str, zarr.Array] = {}
        for group, length in (("data", self.num_frames), ("meta", self.num_episodes)):
            for entry in sorted((self.path / group).glob("*/.zarray")):
                name = f"{group}/{entry.parent.name}"
                if self.num_episodes or name == ENDS:
                    self._arrays[name] = self._cut_off(name, length)
                else:
                    del self.group[name]  # of a first episode that was cut off: the next says what streams there are
        self._ends = self._arrays.pop(ENDS)
        if not self.num_episodes:
            self.group.attrs[CHANNEL_ORDER] = "rgb"
        if UNFINISHED in self.group.attrs:
            del self.group.attrs[UNFINISHED]

    def append(self, episode: Mapping[str, Any]) -> int:
        """Add one episode; returns its number.

        Args:
            episode: arrays [T, ...] go to `data/KEY`: numbers as float32 (`timestamp` float64), pictures uint8
                [T, H, W, 3] RGB as uint8. Scalars go to `meta/KEY`: text or bytes of at most 16 characters, or numbers.

        Raises:
            UserError: arrays of different length, a text that is too long, an action that is not finite, streams or
                shapes other than those that the store has, or pictures for a store that does not say it is RGB.
        """
        rows = self._checked(episode)
        frames = next(len(values) for name, values in rows.items() if name.startswith("data/"))
        self.group.attrs[UNFINISHED] = self.num_frames  # a reader that comes now, or after a kill, knows what to ignore
        for name, values in rows.items():
            array = self._arrays.get(name)
            if array is None:
                array = self._arrays[name] = self._create(name, values)
            array.append(self._encoded(values) if self._is_jpeg(array) else values.astype(array.dtype))
        self._ends.append(np.array([self.num_frames + frames], dtype=np.int64))
        self.num_frames += frames
        self.num_episodes += 1
        del self.group.attrs[UNFINISHED]
        return self.num_episodes - 1

    def write_pca(self, sensor: str, components: np.ndarray, mean: np.ndarray) -> None:
        """Keep the matrix [2n, 15] and the mean [2n] that made a sensor's embedding, in `pca/SENSOR`."""
        group = self.group.require_group("pca").require_group(sensor)
        for name, values in (("components", components), ("mean", mean)):
            group.create_array(name, data=np.asarray(values, dtype=np.float32), overwrite=True)

    def _checked(self, episode: Mapping[str, Any]) -> dict[str, np.ndarray]:
        rows: dict[str, np.ndarray] = {}
        for key, value in episode.items():
            values = np.asarray(value)
            if values.ndim == 0:
                rows[f"meta/{key}"] = self._fact(key, values)
            else:
                rows[f"data/{key}"] = values
        lengths = {name: len(values) for name, values in rows.items() if name.startswith("data/")}
        if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise UserError(f"an episode's arrays must have the same number of frames, 1 or more; found {lengths}")
        where = f"{self.path}, episode {self.num_episodes}"
        if "data/action" in rows and not np.isfinite(rows["data/action"]).all():
            bad = np.argmin(np.isfinite(rows["data/action"]).reshape(len(rows["data/action"]), -1).all(axis=1))
            raise UserError(f"{where}: the action of frame {bad} is not finite")
        if self.num_episodes and (different := set(rows) ^ set(self._arrays)):
            raise UserError(f"{where}: its streams are not those of the store; on one side only: {sorted(different)}")
        pictures = {name for name, values in rows.items() if values.dtype == np.uint8 and values.ndim == 4}
        if pictures and self.group.attrs.get(CHANNEL_ORDER) != "rgb":
            raise UserError(f"{self.path} does not say that its pictures are RGB: convert it first (`data convert`)")
        for name, array in self._arrays.items():
            if (name in pictures) != (self._is_jpeg(array) or array.dtype == np.uint8):
                raise UserError(f"{where}: {name} is {rows[name].dtype}, which the store's {array.dtype} cannot keep")
            if not self._is_jpeg(array) and rows[name].shape[1:] != array.shape[1:]:
                found, expected = list(rows[name].shape[1:]), list(array.shape[1:])
                raise UserError(f"{where}: {name} has {found} numbers a frame, in the store it has {expected}")
        return rows

    def _fact(self, key: str, value: np.ndarray) -> np.ndarray:
        if value.dtype.kind not in "SU":
            return value.astype(np.float64)[None]
        if np.char.str_len(value) > TEXT:
            raise UserError(f"{self.path}: {key} {value.item()!r} is longer than {TEXT} characters")
        return value.astype(f"S{TEXT}")[None]

    def _create(self, name: str, values: np.ndarray) -> zarr.Array:
        create = lambda dtype, chunks, tail, codec: self.group.create_array(  # noqa: E731
            name, shape=(0, *tail), chunks=(chunks, *tail), dtype=dtype, compressors=codec
        )
        small = numcodecs.Blosc("zstd", 3, numcodecs.Blosc.SHUFFLE)
        if name.startswith("meta/"):
            return create(values.dtype, ROWS_PER_CHUNK, (), small)
        if values.dtype == np.uint8 and values.ndim == 4:
            if self.jpeg_quality is not None:
                return create(zarr.dtype.VariableLengthBytes(), 1, (), None)
            return create(np.uint8, 1, values.shape[1:], small)
        if values.dtype.kind not in "fiu":
            raise UserError(f"{self.path}: {name} is {values.dtype}, expected numbers")
        codec = numcodecs.Blosc() if "_marker" in name and values.ndim == 3 else small  # as released
        dtype = np.float64 if name == "data/timestamp" else np.float32  # float32 cannot hold seconds since 1970
        return create(dtype, ROWS_PER_CHUNK, values.shape[1:], codec)

    def _cut_off(self, name: str, length: int) -> zarr.Array:
        array = self.group[name]
        if array.shape[0] < length:
            raise UserError(f"{self.path}: {name} has {array.shape[0]} rows, meta/episode_ends asks for {length}")
        if array.shape[0] > length:
            array.resize((length, *array.shape[1:]))
        return array

    @staticmethod
    def _is_jpeg(array: zarr.Array) -> bool:
        return array.dtype == object

    def _encoded(self, pictures: np.ndarray) -> np.ndarray:
        files = np.empty(len(pictures), dtype=object)
        for i, pixels in enumerate(pictures):
            planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
            files[i] = encode_jpeg(planes, self.jpeg_quality or 90).numpy().tobytes()
        return files
