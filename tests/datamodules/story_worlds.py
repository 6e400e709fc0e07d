"""A tiny story world in TBC-Bench's tree, with drawn pictures, and loaders of it: for tests of story data and rooms."""

import json
from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.loading import TrainLoader
from datamodules.story import StoryDataModule, WorldDataModule
from mmtrain.story import FrameBatch

FOLDER, SHORT = "Tiny_World", "tiny"
STYLE = "Flat cartoon style."
CAST = {  # coarse class, description, RGB
    "Ada": ("fox", "This red fox wears a green hat.", (210, 50, 40)),
    "Bo": ("snow owl", "This blue owl has large eyes.", (40, 80, 210)),
    "Cy": ("robot", "This yellow robot has a square head.", (220, 200, 30)),
    "Dee": ("dinosaur", "This green dinosaur wears white shoes.", (40, 170, 60)),
    "Eli": ("polar bear", "This white bear wears a pink scarf.", (240, 235, 230)),
}
SIZE = (32, 56)  # of batches
PLACES = ("in the snow", "on a beach", "in a kitchen", "under a tree")


def write_world(
    folder: Path,
    characters: int = 3,
    frames: int = 4,
    pairs: int = 3,
    stories: int = 2,
    lines: int = 3,
    size: tuple[int, int] = (64, 112),
) -> Path:
    """Write a world named `Tiny_World`, short name `tiny`, and return `folder`.

    Args:
        folder: becomes the root of the tree.
        characters: 1 to 5, of `CAST` in its order.
        frames: pictures of each character alone; a character is a block of its colour.
        pairs: pictures of two.
        stories: of each character, and as many of two.
        lines: of each story.
        size: height and width of the pictures in pixels.
    """
    names = list(CAST)[:characters]
    world = folder / "train-folder" / FOLDER
    classes = {name: CAST[name][0] for name in names}
    write(folder / "characters.json", json.dumps({FOLDER: {"short_name": SHORT.title(), "coarse_class": classes}}))
    write(world / "style.txt", STYLE)
    for name in names:
        write(world / "character" / f"{name}.txt", CAST[name][1])
        for number in range(frames):
            write_frame(world, name, number, (name,), size)
    couples = [couple if i % 2 else couple[::-1] for i, couple in enumerate(combinations(names, 2))]
    for number in range(pairs if couples else 0):
        write_frame(world, "Multi", number, couples[number % len(couples)], size)
    plot = folder / "eval-plot"
    told = plot / "eval_new_story" / FOLDER
    for story in range(1, stories + 1):
        for name in names:
            write(told / "Single" / name / f"{story}.txt", "\n".join(caption((name,), i) for i in range(lines)))
        if couples:
            text = "\n".join(caption(couples[(story + i) % len(couples)], i) for i in range(lines))
            write(told / "Multi" / "all" / f"{story}.txt", text)
    for number, name in enumerate(names[:2], start=1):
        write(plot / "eval_train" / "each" / FOLDER / f"{number}.txt", caption((name,), number, STYLE))
    return folder


def caption(names: tuple[str, ...], number: int, style: str = "<style>") -> str:
    """A line in the benchmark's grammar."""
    who = " and ".join(f"a {CAST[name][0]}" for name in names)
    return f"{style} {who.capitalize()} stand {PLACES[number % 4]}. " + " ".join(f"<{name}>" for name in names)


def write_frame(world: Path, group: str, number: int, names: tuple[str, ...], size: tuple[int, int]) -> None:
    """A picture with its caption: blocks from left to right before a background that tells the number."""
    height, width = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[..., 0], picture[..., 1], picture[..., 2] = 60 + 10 * number, 90, 150 - 10 * number
    for place, name in enumerate(names):
        middle = (2 * place + 1) * width // (2 * len(names))
        half = height // 4
        picture[height // 3 : height, middle - half : middle + half] = CAST[name][2]
    path = world / "image" / group / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    write(world / "caption" / group / f"{number}.txt", caption(names, number))


def write(path: Path, text: str) -> None:
    """A text file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def opened(
    kind: type[WorldDataModule], path: Path, stage: str = "fit", rank: int = 0, world_size: int = 1, **settings: Any
) -> Any:
    """A data module of this process among others, set up for a stage."""
    sizes = {"picture_size": SIZE} if kind is StoryDataModule else {"size": SIZE}
    data = kind(str(path), **{"batch_size": 4} | sizes | settings)
    data.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=stage),
        global_rank=rank,
        world_size=world_size,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.prepare_data()
    data.setup(stage)
    return data


def epochs(loader: TrainLoader, count: int = 2) -> list[dict[str, Any]]:
    """All batches of the first epochs."""
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


def ids(batches: list[dict[str, Any]]) -> list[list[int]]:
    """Places in the folder, or in the set."""
    return [batch["id"].tolist() for batch in batches]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    """Pixels and all other tensors bit for bit, and the same frames."""
    return len(a) == len(b) and all(
        x.keys() == y.keys()
        and all(torch.equal(x[k], y[k]) for k in x if isinstance(x[k], Tensor))
        and list(x.get("frames", ())) == list(y.get("frames", ()))
        for x, y in zip(a, b, strict=True)
    )


def joined(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Global batches of several processes."""
    return [
        {
            key: FrameBatch(chain(*(part[key] for part in parts)))
            if key == "frames"
            else torch.cat([part[key] for part in parts])
            for key in parts[0]
        }
        for parts in zip(*ranks, strict=True)
    ]
