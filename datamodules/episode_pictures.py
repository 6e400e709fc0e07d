"""Pictures of a zarr store, frame by frame: one-frame chunks, many-frame chunks, or JPEG files."""

import threading
from collections import OrderedDict
from pathlib import Path

import numcodecs
import numpy as np
import torch
import zarr
from torchvision.io import ImageReadMode, decode_jpeg

from mmtrain.config_errors import UserError

CACHE_BYTES = 512 << 20  # of decoded many-frame chunks, for each array and process


class PictureArray:
    """Frames of one camera, read when they are asked for.

    Chunks are read by hand, not through zarr: that costs a tenth of zarr's fixed time, and does no harm in a loader
    process that was forked. Chunks of many frames (released stores: 100) are kept, as many as fit `CACHE_BYTES`.

    Args:
        array: uint8 [N, H, W, 3], or variable-length bytes [N] that are JPEG files.
        folder: of its chunks.
        bgr: stored blue first; frames come out as RGB.

    Raises:
        UserError: an array of another kind.
    """

    def __init__(self, array: zarr.Array, folder: Path, bgr: bool = False) -> None:
        self.folder, self.bgr, self.is_jpeg = folder, bgr, array.dtype == object
        whole_frames = array.ndim == 1 or array.chunks[1:] == array.shape[1:]
        if not self.is_jpeg and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3):
            raise UserError(
                f"{folder} is {array.dtype} {list(array.shape)}, expected uint8 [frames, H, W, 3] or JPEG files"
            )
        if array.metadata.zarr_format != 2 or not whole_frames or (self.is_jpeg and array.ndim != 1):
            raise UserError(
                f"{folder}: expected zarr format 2 with chunks of whole frames, found chunks {array.chunks}"
            )
        self.num_frames, self.chunk_shape, self.order = array.shape[0], array.chunks, array.metadata.order
        self.separator = array.metadata.dimension_separator
        compressor, filters = array.metadata.compressor, array.metadata.filters or ()
        self._codecs = [
            numcodecs.get_codec(codec.get_config()) for codec in (*filters, compressor) if codec is not None
        ]
        self._fill = array.metadata.fill_value
        self._size = None if self.is_jpeg else array.shape[1:3]
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lock": None, "_cache": OrderedDict()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self.num_frames

    @property
    def size(self) -> tuple[int, int]:
        """Height and width; for JPEG the first frame is read."""
        if self._size is None:
            self._frame(0)
        return self._size

    def read(self, frames: np.ndarray) -> np.ndarray:
        """RGB pictures uint8 [*frames.shape, 3, H, W] of frames of any shape; each frame is decoded once.

        Raises:
            UserError: a frame that cannot be read, named.
        """
        frames = np.asarray(frames)
        unique, place = np.unique(frames, return_inverse=True)
        decoded = np.stack([self._frame(int(frame)) for frame in unique]).transpose(0, 3, 1, 2)
        decoded = decoded[:, ::-1] if self.bgr else decoded
        return np.ascontiguousarray(decoded)[place.reshape(frames.shape)]

    def _frame(self, frame: int) -> np.ndarray:
        chunk, row = divmod(frame, self.chunk_shape[0])
        value = self._chunk(chunk)[row]
        if not self.is_jpeg:
            return value
        try:
            encoded = torch.frombuffer(bytearray(value), dtype=torch.uint8)
            pixels = decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder}: frame {frame} is not a JPEG file that can be read") from error
        self._size = self._size or pixels.shape[:2]
        if pixels.shape[:2] != self._size:
            found, expected = list(pixels.shape[:2]), list(self._size)
            raise UserError(f"{self.folder}: frame {frame} is a picture of {found} pixels, others of {expected}")
        return pixels

    def _chunk(self, chunk: int) -> np.ndarray:
        if self.chunk_shape[0] == 1:
            return self._decode(chunk)
        with self._lock:
            if chunk in self._cache:
                self._cache.move_to_end(chunk)
            else:
                self._cache[chunk] = self._decode(chunk)
                while len(self._cache) > 1 and sum(c.nbytes for c in self._cache.values()) > CACHE_BYTES:
                    self._cache.popitem(last=False)
            return self._cache[chunk]

    def _decode(self, chunk: int) -> np.ndarray:
        name = self.separator.join([str(chunk), *("0" for _ in self.chunk_shape[1:])])
        try:
            value = (self.folder / name).read_bytes()
        except FileNotFoundError:  # zarr leaves out chunks that hold only the fill value
            return np.full(self.chunk_shape, self._fill, dtype=object if self.is_jpeg else np.uint8)
        except OSError as error:
            raise UserError(f"{self.folder / name} cannot be read: {error}") from error
        try:
            for codec in reversed(self._codecs):
                value = codec.decode(value)
            if self.is_jpeg:
                return np.asarray(value, dtype=object).reshape(-1)
            return np.frombuffer(value, np.uint8).reshape(self.chunk_shape, order=self.order)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder / name} is damaged: {error}") from error
