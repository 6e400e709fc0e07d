"""Labelled pictures of the nine creatures and of their doubles, for a classifier that is to tell who is there.

A double has the species and colours of a character but another mark or none, or its mark and other colours: it counts
as absent. So a classifier of these pictures measures identity with the mark, which no description tells.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import interpolate

from datamodules.creature_base import check_size, drawn, generator_of
from datamodules.creature_captions import CHARACTERS, STYLE, character, pick, random_look, random_mark, random_scene
from datamodules.creature_drawing import COLOURS, SPECIES, Look, Scene, draw
from datamodules.loading import Draw, EvaluationLoader, TrainLoader, place
from mmtrain.config_errors import UserError
from mmtrain.story import World

VERSION = 1  # raise when the same arguments would give other pictures
NAME = "creatures"
PAIRS = 0.65  # share of pictures with two creatures
KINDS = {"character": 0.55, "wrong mark": 0.15, "no mark": 0.05, "wrong colours": 0.17, "anyone": 0.08}
GAP = (0.28, 0.5)  # creatures that a model draws stand nearer than in the training pictures


def double(look: Look, kind: str, rng: np.random.Generator) -> Look:
    """A creature that is easily taken for a character; `kind` is a key of KINDS."""
    if kind == "character":
        return look
    if kind == "anyone":
        return random_look(look.species, rng)
    if kind == "no mark":
        return replace(look, mark=None)
    if kind == "wrong mark":
        while True:
            mark = random_mark(look.clothes, rng)
            if mark.shape != look.mark.shape:
                return replace(look, mark=mark)
    part = pick(rng, ("body", "clothes"))
    other = "clothes" if part == "body" else "body"
    taken = (getattr(look, part), getattr(look, other))
    return replace(look, **{part: pick(rng, [colour for colour in COLOURS if colour not in taken])})


def labelled_scene(rng: np.random.Generator) -> tuple[Scene, tuple[str, ...], tuple[str, ...]]:
    """A scene of characters and doubles, the names of those who are there, and the kind of each creature."""
    names = list(CHARACTERS)
    count = 2 if rng.random() < PAIRS else 1
    chosen = [names[i] for i in rng.permutation(len(SPECIES))[:count]]
    kinds = tuple(str(k) for k in rng.choice(list(KINDS), count, p=list(KINDS.values())))
    looks = tuple(double(CHARACTERS[name], kind, rng) for name, kind in zip(chosen, kinds, strict=True))
    present = tuple(name for name, look in zip(chosen, looks, strict=True) if look == CHARACTERS[name])
    return random_scene(looks, rng, GAP), present, kinds


def labelled_picture(seed: int, index: int, size: tuple[int, int] = (64, 112)) -> np.ndarray:
    """One picture, uint8 [H, W, 3]."""
    rng = generator_of(seed, "characters", index)
    return draw(labelled_scene(rng)[0], rng, size)


def labels(seed: int, count: int) -> np.ndarray:
    """Who is there, float32 [count, 9] of 0 and 1, in the order of CHARACTERS."""
    present = np.zeros((count, len(CHARACTERS)), np.float32)
    for i in range(count):
        for name in labelled_scene(generator_of(seed, "characters", i))[1]:
            present[i, list(CHARACTERS).index(name)] = 1
    return present


class CharacterPictures(torch.utils.data.Dataset):
    """{"picture": uint8 [B, 3, H, W], "present": float32 [B, 9], "fold": int64 [B], "id": int64 [B]}.

    Args:
        pictures: uint8 [N, 3, H, W].
        present: float32 [N, 9].
        folds: a picture's fold is its number modulo this.
        degrade: share of pictures that are blurred, made noisy and changed in brightness, as drawn pictures of a model
            are; of the draw's own random numbers. Never mirrored: marks would change.
    """

    def __init__(self, pictures: np.ndarray, present: np.ndarray, folds: int, degrade: float = 0.0) -> None:
        self.pictures, self.present, self.folds, self.degrade = pictures, present, folds, degrade

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        ids = [draw.sample for draw in draws]
        pictures = torch.from_numpy(self.pictures[ids])
        if self.degrade:
            for i, place_drawn in enumerate(draws):
                rng = place_drawn.generator()
                if rng.random() < self.degrade:
                    pictures[i] = degraded(pictures[i], rng)
        return {
            "picture": pictures,
            "present": torch.from_numpy(self.present[ids]),
            "fold": torch.tensor(ids) % self.folds,
            "id": torch.tensor(ids),
            "skipped": {},
        }


def degraded(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """A picture uint8 [3, H, W] with less detail, some noise and another brightness."""
    values, size = picture[None].float(), picture.shape[-2:]
    scale = rng.uniform(0.55, 1.0)
    small = [max(1, round(side * scale)) for side in size]
    values = interpolate(values, small, mode="bilinear", antialias=True, align_corners=False)
    values = interpolate(values, size, mode="bilinear", align_corners=False)[0]
    values = (
        values * rng.uniform(0.85, 1.15) + torch.from_numpy(rng.normal(0, rng.uniform(0, 8), picture.shape)).float()
    )
    return values.round().clamp(0, 255).to(torch.uint8)


class CreatureCharacterDataModule(pl.LightningDataModule):
    """Labelled pictures in folds, for classifiers of characters.

    All stages evaluate "creatures_frames": every picture once, as it was drawn.

    Args:
        count: number of pictures.
        size: height and width.
        folds: a picture's fold is its number modulo this.
        degrade: share of the training pictures that come with less detail and noise, in [0, 1].
        batch_size: GLOBAL batch, divided among the processes.
        eval_batch_size: pictures a process takes at a time in evaluation.
        seed: of the pictures and of the order.
        path: folder that keeps the pictures for the next run; None draws them again, about 500 a second.
        num_workers: loader processes.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(
        self,
        count: int = 2500,
        size: tuple[int, int] = (64, 112),
        folds: int = 4,
        degrade: float = 0.5,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        path: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not 1 <= folds <= count:
            raise UserError(f"data.folds: {folds}: must be in [1, count = {count}]")
        if not 0 <= degrade <= 1:
            raise UserError(f"data.degrade: {degrade}: must be from 0 to 1")
        self.count, self.size, self.folds, self.degrade = count, check_size(size), folds, degrade
        self.picture_size, self.path = self.size, None if path is None else Path(path).expanduser()
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = seed
        self.world = World(NAME, STYLE, {name: character(look, name) for name, look in CHARACTERS.items()})
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.loader_names: list[str] = []
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self._made: tuple[np.ndarray, np.ndarray] | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the pictures depend on, in plain types."""
        about = {"maker": "creature_characters", "version": VERSION, "seed": self.seed}
        return about | {"count": self.count, "size": list(self.size)}

    @property
    def made(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [N, 3, H, W] and labels float32 [N, 9]."""
        if self._made is None:
            name = f"characters_{hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:12]}.npy"
            file = None if self.path is None else self.path / name
            make = lambda i: labelled_picture(self.seed, i, self.size)  # noqa: E731
            pictures = drawn(make, self.count, self.size, "creatures and doubles", file)
            self._made = pictures, labels(self.seed, self.count)
        return self._made

    def prepare_data(self) -> None:
        """Draw the pictures once for each machine if they are kept."""
        if self.path is not None:
            _ = self.made

    def setup(self, stage: str) -> None:
        number = self.made[1].sum(axis=1)
        counts = {f"with_{who}": int((number == k).sum()) for k, who in enumerate(("none", "one", "two"))}
        self.data_counts = {"train": {"pictures": self.count, **counts}}
        self.loader_names = [f"{NAME}_frames"]
        self.evaluation_sets = {f"{NAME}_frames": {"num_samples": self.count, "class_names": self.world.names}}
        rank_zero_info(
            "train: " + ", ".join(f"{n:,} {w.replace('_', ' ')}" for w, n in self.data_counts["train"].items())
        )

    def train_dataloader(self) -> TrainLoader:
        dataset = CharacterPictures(*self.made, self.folds, self.degrade)
        return TrainLoader(dataset, self.batch_size, self.seed, num_workers=self.num_workers, **place(self.trainer))

    def val_dataloader(self) -> list[EvaluationLoader]:
        return [
            EvaluationLoader(
                CharacterPictures(*self.made, self.folds),
                self.eval_batch_size,
                num_workers=self.num_workers,
                identity=json.dumps(self.describe()),
                **place(self.trainer),
            )
        ]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
