"""The creatures' base world: what a small text-to-picture model and a small CLIP learn before any character is shown.

Species, colours, marks, places and actions are random, and so is who stands on the left; the nine characters never
occur. Every picture depends on (seed, split, number) alone.
"""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor

from datamodules.creature_captions import CHARACTERS, STYLE, base_sample, character, event, random_look
from datamodules.creature_drawing import ACTIONS, COLOURS, SPECIES, Actor, Look, Scene, draw
from datamodules.creature_scenes import EXTRAS, PLACES
from datamodules.loading import Draw, EvaluationLoader, TrainLoader, place
from mmtrain.config_errors import UserError, is_first_process
from mmtrain.story import Character, Frame, FrameBatch, World

VERSION = 1  # raise when the same arguments would give other pictures
NAME = "creatures_base"
BAR_FROM = 300  # pictures; fewer are made before a bar could be read


def generator_of(seed: int, split: str, index: int) -> np.random.Generator:
    """Random numbers of one picture."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index])


def base_frame(seed: int, split: str, index: int) -> Frame:
    """The words of one picture of the base world; its characters are in the order in which they are described."""
    return base_sample(generator_of(seed, split, index))[1]


def base_picture(seed: int, split: str, index: int, size: tuple[int, int] = (64, 112)) -> np.ndarray:
    """One picture of the base world, uint8 [H, W, 3]."""
    rng = generator_of(seed, split, index)
    return draw(base_sample(rng)[0], rng, size)


def drawn(
    make: Callable[[int], np.ndarray], count: int, size: tuple[int, int], what: str, path: Path | None = None
) -> np.ndarray:
    """Return pictures uint8 [count, 3, H, W], with a progress bar on stderr; a file at `path` keeps them.

    Args:
        make: number -> uint8 [H, W, 3].
        path: a .npy file; written under another name first, so that it is never half there.

    Raises:
        UserError: the file holds something else.
    """
    shape = (count, 3, *size)
    if path is not None and path.is_file():
        try:
            kept = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: cannot be read ({error}): remove it, it is made again") from error
        if kept.shape != shape or kept.dtype != np.uint8:
            raise UserError(f"{path}: holds {kept.dtype} {list(kept.shape)}, not uint8 {list(shape)}: remove it")
        return kept
    pictures = np.empty(shape, np.uint8)
    numbers = range(count)
    if count >= BAR_FROM:
        numbers = track(
            numbers, f"drawing {what}", console=Console(stderr=True), transient=True, disable=not is_first_process()
        )
    for i in numbers:
        pictures[i] = make(i).transpose(2, 0, 1)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with open(part, "wb") as file:
                np.save(file, pictures)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return pictures


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """Height and width of pictures.

    Raises:
        UserError: they are not two numbers, too small to tell the marks, or narrower than two creatures need.
    """
    if len(size) != 2 or size[0] < 32 or not 1.5 * size[0] <= size[1] <= 2 * size[0]:
        raise UserError(f"size: {list(size)}: must be [height, width], 32 or more high and 1.5 to 2 times as wide")
    return int(size[0]), int(size[1])


class FramePictures(torch.utils.data.Dataset):
    """Pictures uint8 [N, 3, H, W] and their frames, in batches {"picture", "frames", "id"}."""

    def __init__(self, pictures: np.ndarray, frames: Sequence[Frame]) -> None:
        self.pictures, self.frames = pictures, frames

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        samples = [draw.sample for draw in draws]
        return {
            "picture": torch.from_numpy(self.pictures[samples]),
            "frames": FrameBatch(self.frames[i] for i in samples),
            "id": torch.tensor(samples),
            "skipped": {},
        }


class CreatureBaseDataModule(pl.LightningDataModule):
    """Random creatures with their words, to train a text-to-picture model from scratch.

    Args:
        count: training pictures.
        val_count: pictures of the loader "creatures_base".
        size: height and width.
        batch_size: GLOBAL batch, divided among the processes.
        seed: of the pictures and of the order.
        path: folder that keeps the pictures for the next run; None draws them again, about 500 a second.
        num_workers: loader processes.

    Raises:
        UserError: a count below 1, or a size that cannot be drawn.
    """

    def __init__(
        self,
        count: int = 3000,
        val_count: int = 128,
        size: tuple[int, int] = (64, 112),
        batch_size: int = 32,
        seed: int = 0,
        path: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if bad := [(n, v) for n, v in (("count", count), ("val_count", val_count)) if v < 1]:
            raise UserError(f"{bad[0][0]}: {bad[0][1]}: must be 1 or more")
        self.counts, self.picture_size = {"train": count, "val": val_count}, check_size(size)
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.path = None if path is None else Path(path)
        self.world = World(NAME, STYLE, {s: Character(s, s, "") for s in SPECIES})
        self.loader_names: list[str] = []
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self.sets: dict[str, FramePictures] = {}

    def describe(self, split: str) -> dict[str, Any]:
        """Return what the pictures of a split depend on, in plain types."""
        size = list(self.picture_size)
        return {"maker": NAME, "version": VERSION, "seed": self.seed, "split": split, "size": size}

    def _file(self, split: str) -> Path | None:
        if self.path is None:
            return None
        about = self.describe(split) | {"count": self.counts[split]}
        return self.path / f"{split}_{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}.npy"

    def _set(self, split: str) -> FramePictures:
        if split not in self.sets:
            count, size = self.counts[split], self.picture_size
            pictures = drawn(
                lambda i: base_picture(self.seed, split, i, size), count, size, f"{NAME} {split}", self._file(split)
            )
            frames = [base_frame(self.seed, split, i) for i in range(count)]
            self.sets[split] = FramePictures(pictures, frames)
            self.data_counts[split] = {"pictures": count, "pairs": sum(len(f.characters) > 1 for f in frames)}
            about = ", ".join(f"{n:,} {what}" for what, n in self.data_counts[split].items())
            rank_zero_info(f"{NAME} {split}: {about}")
        return self.sets[split]

    def prepare_data(self) -> None:
        """Draw the pictures once for each machine if they are kept."""
        if self.path is not None:
            for split in self.counts:
                self._set(split)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._set("train")
        self._set("val")
        self.loader_names = [NAME]
        self.evaluation_sets = {NAME: {"num_samples": self.counts["val"]}}

    def texts(self, count: int = 1000) -> list[str]:
        """Prompts to make a tokenizer of: of the first training pictures, and every word that any world says."""
        return [base_frame(self.seed, "train", i).prompt for i in range(count)] + vocabulary_texts()

    def pictures(self, count: int) -> Tensor:
        """The first training pictures, uint8 [count, 3, H, W]; all there are if fewer."""
        return torch.from_numpy(self._set("train").pictures[:count])

    def references(self) -> dict[str, list[Tensor]]:
        """Four pictures of each species alone."""
        found = {}
        for species in SPECIES:
            rngs = [generator_of(self.seed, f"reference {species}", i) for i in range(4)]
            scenes = [Scene(str(rng.choice(PLACES)), (Actor(random_look(species, rng)),)) for rng in rngs]
            pictures = [draw(scene, rng, self.picture_size) for scene, rng in zip(scenes, rngs, strict=True)]
            found[species] = [torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures]
        return found

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(
            self._set("train"), self.batch_size, self.seed, num_workers=self.num_workers, **place(self.trainer)
        )

    def val_dataloader(self) -> list[EvaluationLoader]:
        return [
            EvaluationLoader(
                self._set("val"),
                self.batch_size,
                num_workers=self.num_workers,
                identity=json.dumps(self.describe("val")),
                **place(self.trainer),
            )
        ]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def vocabulary_texts() -> list[str]:
    """Sentences that together have every word of the base world and of the customisation world."""
    texts = [f"{STYLE} {character(look).description}" for look in CHARACTERS.values()]
    plain = Look("fox", "orange", "blue")
    for place_name in PLACES:
        for extra in ("", *EXTRAS):
            for action in ACTIONS:
                for actors in (
                    (Actor(plain, action),),
                    (Actor(plain, action), Actor(Look("bear", "red", "red"), action)),
                ):
                    texts.append(f"{STYLE} {event(Scene(place_name, actors, extra))}")
    for species in SPECIES:
        texts += [character(Look(species, a, b)).description for a, b in zip(COLOURS, reversed(COLOURS), strict=True)]
    return texts
