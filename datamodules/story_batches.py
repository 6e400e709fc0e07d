"""Batches of a story world: pictures with what they show, lines of stories, pictures for a classifier of characters."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from datamodules.loading import Draw
from datamodules.story_files import Faults
from datamodules.story_folder import MULTI, TrainingFrame
from datamodules.transforms import UnreadablePicture, crop_box, decode
from mmtrain.story import Frame, FrameBatch, StoryFault

Fit = Literal["cover", "released", "pad"]
BILINEAR = TF.InterpolationMode.BILINEAR
SPLIT_SEED = 0  # of folds and held-out frames: the same for every run
MARGIN = 1.25  # pictures are kept so much larger than the classifier takes them, for crops of a part
CROP_AREA = (0.7, 1.0)  # share of a picture that a random crop keeps
PAIR_WIDTH = (0.55, 0.8)  # share of a picture's width that becomes half of a pair


# --- pictures ---


def read_picture(path: Path) -> Tensor:
    """A picture file as uint8 RGB [3, h, w]; an alpha channel is dropped, as Pillow's `convert("RGB")` does.

    Raises:
        StoryFault: it cannot be decoded.
    """
    try:
        return decode(path.read_bytes())
    except UnreadablePicture as error:
        raise StoryFault(f"{path}: cannot be used as a picture ({error.reason.replace('_', ' ')})") from error
    except OSError as error:
        raise StoryFault(f"{path}: {error.strerror or error}") from error


def fit_picture(picture: Tensor, size: tuple[int, int], fit: Fit = "cover") -> Tensor:
    """uint8 [3, h, w] to [3, H, W] without distortion, bilinear with antialiasing; nothing random.

    Args:
        size: H and W.
        fit: "cover" scales until both sides cover and crops the centre; "released" brings the shorter side to H, crops
            the centre, and has black bars where the picture is narrower than W (released code); "pad" shows all of the
            picture, with bars.
    """
    height, width = picture.shape[-2:]
    if fit != "pad" and max(height, width) > 8 * min(height, width):  # a strip would first grow beyond memory
        height, width = min(height, 8 * width), min(width, 8 * height)
        picture = TF.center_crop(picture, [height, width])
    if fit == "released":
        scaled = [size[0] * height // min(height, width), size[0] * width // min(height, width)]
    elif (size[0] * width >= size[1] * height) == (fit == "cover"):  # the height decides
        scaled = [size[0], size[0] * width // height]
    else:
        scaled = [size[1] * height // width, size[1]]
    scaled = [max(1, side) for side in scaled]
    if [height, width] != scaled:
        picture = TF.resize(picture, scaled, interpolation=BILINEAR, antialias=True)
    return TF.center_crop(picture, list(size))


def capped(picture: Tensor, longest: int) -> Tensor:
    """uint8 [3, h, w] of the same shape whose longer side has at most so many pixels."""
    height, width = picture.shape[-2:]
    if max(height, width) <= longest:
        return picture
    scaled = [max(1, round(side * longest / max(height, width))) for side in (height, width)]
    return TF.resize(picture, scaled, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


class PictureStore:
    """Pictures of one size; those that `fill` was asked for are decoded once and stay in memory.

    Args:
        paths: of all pictures that may be asked for.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], fit: Fit = "cover") -> None:
        self.paths, self.size, self.fit = list(paths), tuple(size), fit
        self._rows: dict[int, int] = {}
        self._pictures = torch.empty(0, 3, *self.size, dtype=torch.uint8)

    def fill(self, indices: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Decode these pictures; before loader processes start, so that they share the memory.

        Args:
            progress: called with the pictures done and all of them.

        Raises:
            StoryFault: pictures that cannot be decoded; names up to five.
        """
        wanted, faults = sorted(set(indices)), Faults()
        pictures = torch.empty(len(wanted), 3, *self.size, dtype=torch.uint8)

        def read(row: int) -> StoryFault | None:
            try:
                pictures[row] = self._read(wanted[row])
            except StoryFault as fault:
                return fault
            return None

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for done, fault in enumerate(pool.map(read, range(len(wanted))), start=1):
                with faults.collected():  # here, in the order of the pictures
                    if fault is not None:
                        raise fault
                if progress is not None:
                    progress(done, len(wanted))
        faults.tell()
        self._rows = {index: row for row, index in enumerate(wanted)}
        self._pictures = pictures

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [len(indices), 3, H, W]."""
        rows = [self._rows.get(index) for index in indices]
        if None not in rows:
            return self._pictures[rows]
        return torch.stack(
            [self._read(i) if row is None else self._pictures[row] for i, row in zip(indices, rows, strict=True)]
        )

    def _read(self, index: int) -> Tensor:
        return fit_picture(read_picture(self.paths[index]), self.size, self.fit)


# --- what a model that draws takes ---


class FrameBatches(Dataset):
    """{"picture": uint8 [B, 3, H, W], "frames": FrameBatch, "id": int64 [B]}; the id is the place in the folder.

    Args:
        frames: of the whole folder; `store` has their pictures.
        chosen: places of those that belong to this set.
    """

    def __init__(self, frames: Sequence[TrainingFrame], chosen: Sequence[int], store: PictureStore) -> None:
        self.frames, self.chosen, self.store = frames, [int(i) for i in chosen], store

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        ids = [self.chosen[draw.sample] for draw in draws]
        frames = FrameBatch(self.frames[i].frame for i in ids)
        return {"picture": self.store.read(ids), "frames": frames, "id": torch.tensor(ids), "skipped": {}}


class Line(NamedTuple):
    """A line of a story; `number` counts from 0."""

    frame: Frame
    story: str
    number: int


class LineBatches(Dataset):
    """{"frames": FrameBatch, "id": int64 [B], "story": list[str], "line": list[int]}; ids are places in `lines`."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = list(lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        ids = [draw.sample for draw in draws]
        lines = [self.lines[i] for i in ids]
        about = {"story": [line.story for line in lines], "line": [line.number for line in lines]}
        return {"frames": FrameBatch(line.frame for line in lines), "id": torch.tensor(ids), "skipped": {}} | about


class PromptBatches(Dataset):
    """{"frames": FrameBatch, "id": int64 [B]}."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self.frames = list(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        ids = [draw.sample for draw in draws]
        return {"frames": FrameBatch(self.frames[i] for i in ids), "id": torch.tensor(ids), "skipped": {}}


# --- what a classifier of characters takes ---


class CharacterBatches(Dataset):
    """{"picture": uint8 [B, 3, h, w], "present": float32 [B, K] of 0 and 1, "fold": int64 [B], "id": int64 [B]}.

    Args:
        frames: of the whole folder.
        store: their pictures, larger than `size` by `MARGIN`.
        names: of the K characters.
        folds: int [number of frames].
        size: h and w.
        augment: random crops, mirroring, brightness, contrast and saturation, all of the draw's own random numbers.
        pairs: share of the single-character pictures that become half of a synthetic pair. The other half shows another
            character and is of the same fold, so that nothing that a fold's network is tested on is trained on.
    """

    def __init__(
        self,
        frames: Sequence[TrainingFrame],
        store: PictureStore,
        names: Sequence[str],
        folds: np.ndarray,
        size: tuple[int, int],
        augment: bool = False,
        pairs: float = 0.0,
    ) -> None:
        self.store, self.folds, self.size, self.augment, self.pairs = store, folds, tuple(size), augment, pairs
        self.present = np.array([[name in frame.frame.names for name in names] for frame in frames], np.float32)
        self.single = np.array([frame.group != MULTI for frame in frames])

    def __len__(self) -> int:
        return len(self.folds)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        ids = [draw.sample for draw in draws]
        made = [self._sample(draw) for draw in draws]
        return {
            "picture": torch.stack([picture for picture, _ in made]),
            "present": torch.from_numpy(np.stack([present for _, present in made])),
            "fold": torch.from_numpy(self.folds[ids].astype(np.int64)),
            "id": torch.tensor(ids),
            "skipped": {},
        }

    def _sample(self, draw: Draw) -> tuple[Tensor, np.ndarray]:
        """A picture uint8 [3, h, w] and who is in it, float32 [K]."""
        generator, present = draw.generator(), self.present[draw.sample]
        (picture,) = self.store.read([draw.sample])
        other = self._partner(draw.sample, generator)
        if other is not None:
            halves = [_half(half, self.size, generator) for half in (picture, *self.store.read([other]))]
            picture = torch.cat(halves if generator.random() < 0.5 else halves[::-1], dim=-1)[..., : self.size[1]]
            present = np.maximum(present, self.present[other])
        elif self.augment:
            picture = _random_part(picture, self.size, generator)
        else:
            picture = TF.resize(picture, list(self.size), interpolation=BILINEAR, antialias=True)
        if self.augment:
            picture = _recoloured(picture, generator)
            picture = TF.horizontal_flip(picture) if generator.random() < 0.5 else picture
        return picture, present

    def _partner(self, sample: int, generator: np.random.Generator) -> int | None:
        """Another character's picture of the same fold, or None if this sample is to stay as it is."""
        if not self.pairs or not self.single[sample] or generator.random() >= self.pairs:
            return None
        fits = self.single & (self.folds == self.folds[sample]) & (self.present != self.present[sample]).any(axis=1)
        return int(generator.choice(np.flatnonzero(fits))) if fits.any() else None


def _random_part(picture: Tensor, size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """A crop of nearly the picture's shape, as uint8 [3, h, w]."""
    height, width = picture.shape[-2:]
    ratio = (0.9 * width / height, width / height / 0.9)
    box = crop_box(height, width, generator, CROP_AREA, ratio)
    return TF.resized_crop(picture, *box, list(size), BILINEAR, antialias=True)


def _half(picture: Tensor, size: tuple[int, int], generator: np.random.Generator) -> Tensor:
    """Part of a picture, near its middle, as uint8 [3, h, w / 2], with w / 2 rounded up."""
    height, width = picture.shape[-2:]
    crop_width = round(generator.uniform(*PAIR_WIDTH) * width)
    crop_height = round(generator.uniform(0.85, 1) * height)
    left = round((width - crop_width) * generator.uniform(0.25, 0.75))
    top = int(generator.integers(height - crop_height + 1))
    return TF.resized_crop(
        picture, top, left, crop_height, crop_width, [size[0], -(-size[1] // 2)], BILINEAR, antialias=True
    )


def _recoloured(picture: Tensor, generator: np.random.Generator) -> Tensor:
    """Brightness, contrast, saturation by up to 30 %, each channel by up to 5 %; hues stay, as they tell who it is."""
    brightness, contrast, saturation = generator.uniform(0.7, 1.3, 3)
    gains = brightness * generator.uniform(0.95, 1.05, 3)
    mixed = contrast * (saturation * np.eye(3) + (1 - saturation) / 3) * gains  # all three are one linear map
    values = picture.float().flatten(1)
    mean = float(values.mean(dim=1) @ torch.from_numpy(gains).float()) / 3
    values = torch.from_numpy(mixed).float() @ values + (1 - contrast) * mean
    return values.round_().clamp_(0, 255).to(torch.uint8).view_as(picture)


# --- orders and parts ---


def single_frames(frames: Sequence[TrainingFrame], name: str) -> list[int]:
    """Places of the pictures that show one character alone."""
    return [place for place, frame in enumerate(frames) if frame.group == name]


def _by_content(frames: Sequence[TrainingFrame], places: Sequence[int]) -> list[int]:
    """The places, those that show the same characters in a row, within such a row in a random order for good."""
    ranks = {group: rank for rank, group in enumerate(dict.fromkeys(frame.group for frame in frames))}
    shuffled = [places[i] for i in np.random.default_rng(SPLIT_SEED).permutation(len(places))]
    return sorted(shuffled, key=lambda place: (ranks[frames[place].group], sorted(frames[place].frame.names)))


def stratified_folds(frames: Sequence[TrainingFrame], folds: int) -> np.ndarray:
    """Fold int64 [number of frames] of each; the same for the same frames.

    Dealt out character after character, then pair after pair, so that of no character a fold has more than one picture
    more than another. Frames of one episode are not kept together: their backgrounds are in several folds.
    """
    dealt = np.empty(len(frames), np.int64)
    dealt[_by_content(frames, range(len(frames)))] = np.arange(len(frames)) % folds
    return dealt


def held_out(frames: Sequence[TrainingFrame], places: Sequence[int], share: float) -> list[int]:
    """Part of the places, sorted: evenly of all characters, at least one, and none if the share is 0."""
    if not share:
        return []
    ordered, count = _by_content(frames, places), max(1, round(share * len(places)))
    return sorted(ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count))


def spread(total: int, count: int | None) -> list[int]:
    """Places of `count` things among `total` in a row: one from each of `count` equal parts, not always its first.

    >>> spread(12, 4)
    [0, 4, 6, 11]
    """
    if count is None or count >= total:
        return list(range(total))
    bounds = [i * total // count for i in range(count + 1)]
    steps = [0.6180339887 * i % 1 for i in range(count)]
    return [low + int(step * (high - low)) for low, high, step in zip(bounds, bounds[1:], steps, strict=False)]


class CharacterOrder:
    """Order of an epoch in which each global batch shows one character alone, for models of a single character.

    A character with n pictures has floor(n / batch size) batches an epoch, the pictures left over are others each time;
    one with less than a batch has one batch, with repetitions. Batches of all characters are mixed.

    Args:
        groups: for each character the places of its pictures.
        batch_size: GLOBAL.
    """

    def __init__(self, groups: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.groups, self.batch_size, self.seed = [np.asarray(g, np.int64) for g in groups if len(g)], batch_size, seed

    def __call__(self, epoch: int) -> np.ndarray:
        """Places [batches * batch size], a function of the seed and the epoch alone."""
        generator = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in self.groups:
            count = max(1, len(group) // self.batch_size)
            batches += list(np.resize(generator.permutation(group), (count, self.batch_size)))
        order = generator.permutation(len(batches))
        return np.concatenate([batches[i] for i in order])
