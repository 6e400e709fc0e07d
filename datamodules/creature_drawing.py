"""Pictures of the creatures' world: one or two cartoon creatures in a place, with marks on their clothes.

Everything is drawn at double size with portable polygons and ovals, then reduced, so edges are smooth.
"""

import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datamodules.creature_scenes import Rgb, background, mixed, shifted
from datamodules.creature_species import INK, SPECIES, Pen, arm, legs, torso

COLOURS: dict[str, Rgb] = {
    "red": (212, 44, 40),
    "orange": (243, 137, 28),
    "yellow": (248, 216, 58),
    "green": (66, 168, 70),
    "blue": (46, 98, 222),
    "purple": (134, 66, 186),
    "pink": (247, 152, 194),
    "brown": (132, 84, 46),
    "grey": (140, 145, 152),
    "white": (243, 243, 240),
}
MARK_COLOURS: dict[str, Rgb] = {
    "white": (255, 255, 255),
    "black": (20, 18, 26),
    "yellow": (255, 222, 40),
    "red": (214, 24, 36),
    "blue": (28, 60, 214),
}
MARK_SHAPES = ("star", "heart", "cross", "stripes", "spots", "bolt", "ring", "triangle", "letter", "moon")
ACTIONS = ("stand", "jump", "wave", "hold a ball", "hold a balloon")
BALL, BALLOON = (20, 190, 178), (232, 52, 150)
BOLT = ((0.12, 0.38), (-0.28, -0.06), (-0.04, -0.06), (-0.14, -0.38), (0.28, 0.08), (0.04, 0.08))
STAR = [(k * math.sin(math.pi * i / 5), k * math.cos(math.pi * i / 5)) for i in range(10) for k in [1 - 0.58 * (i % 2)]]
SMALL, LARGE = 0.29, 0.36  # a creature's unit in picture heights


@dataclass(frozen=True)
class Mark:
    """What stands on the clothes; words of the world never speak of it.

    Args:
        shape: of MARK_SHAPES.
        colour: of MARK_COLOURS.
    """

    shape: str
    colour: str


@dataclass(frozen=True)
class Look:
    """How a creature looks: species, colour of the body and of the clothes (of COLOURS), and its mark if it has one."""

    species: str
    body: str
    clothes: str
    mark: Mark | None = None


@dataclass(frozen=True)
class Actor:
    """A creature that does something, one of ACTIONS."""

    look: Look
    action: str = "stand"


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Args:
        place: of `creature_scenes.PLACES`.
        actors: one or two, left to right.
        extra: "house", "rainbow" or "": what else stands there.
        gap: smallest and largest distance of two actors in picture widths; 0.25 overlaps arms and heads.
    """

    place: str
    actors: tuple[Actor, ...]
    extra: str = ""
    gap: tuple[float, float] = (0.38, 0.5)


def _box(pen: Pen, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
    pen.poly([(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)], fill)


def _mark(pen: Pen, mark: Mark, y: float) -> None:
    """The mark in the middle of the clothes, near 0.68 units across."""
    fill, r = MARK_COLOURS[mark.colour], 0.34
    if mark.shape == "star":
        pen.poly([(r * x, y + r * d) for x, d in STAR], fill)
    elif mark.shape == "heart":
        pen.twins(0.15, y + 0.12, 0.18, 0.18, fill)
        pen.poly([(-0.32, y + 0.06), (0.32, y + 0.06), (0, y - r)], fill)
    elif mark.shape == "cross":
        _box(pen, 0, y, 0.1, r, fill)
        _box(pen, 0, y, r, 0.1, fill)
    elif mark.shape == "stripes":
        for d in (-0.26, 0.0, 0.26):
            _box(pen, 0, y + d, 0.42, 0.07, fill)
    elif mark.shape == "spots":
        for d in (-0.2, 0.2):
            pen.twins(0.2, y + d, 0.13, 0.13, fill)
    elif mark.shape == "bolt":
        pen.poly([(x, y + d) for x, d in BOLT], fill)
    elif mark.shape == "ring":
        pen.oval(0, y, r, r, fill)
        pen.oval(0, y, 0.17, 0.17, pen.clothes)
    elif mark.shape == "triangle":
        pen.poly([(-0.36, y - 0.27), (0.36, y - 0.27), (0, y + 0.35)], fill)
    elif mark.shape == "letter":  # a T
        _box(pen, 0, y + 0.24, r, 0.1, fill)
        _box(pen, 0, y - 0.07, 0.1, 0.27, fill)
    else:  # moon
        pen.oval(0, y, r, r, fill)
        pen.oval(0.17, y + 0.08, 0.27, 0.27, pen.clothes)


def _actor(pen: Pen, actor: Actor) -> None:
    species, jumps, holds = actor.look.species, actor.action == "jump", actor.action.startswith("hold")
    shadow = 0.5 if jumps else 0.65
    pen.oval(0, 0.02, shadow, 0.09, mixed(INK, (120, 120, 120), 0.4))
    if jumps:
        pen.y -= 0.3 * pen.unit
    SPECIES[species](pen, False)
    legs(pen, species, jumps)
    middle = torso(pen, species)
    if actor.look.mark is not None:
        flip, pen.flip = pen.flip, 1  # marks are never mirrored
        _mark(pen, actor.look.mark, middle)
        pen.flip = flip
    high, rest, held = (0.98, 1.42), (0.8, 0.42), (0.88, 0.78)
    left = high if jumps or actor.action == "wave" else held if holds else rest
    arm(pen, species, (-0.5, middle + 0.22), (-left[0], left[1]))
    arm(pen, species, (0.5, middle + 0.22), high if jumps else rest)
    SPECIES[species](pen, True)
    if actor.action == "hold a ball":
        pen.oval(-0.95, 0.72, 0.3, 0.3, BALL)
        pen.oval(-0.95, 0.72, 0.11, 0.3, (250, 250, 250))
    elif actor.action == "hold a balloon":
        pen.draw.line([pen.at(-0.88, 0.78), pen.at(-1.0, 1.8)], fill=INK, width=pen.line)
        pen.oval(-1.0, 2.05, 0.3, 0.36, BALLOON)
        pen.oval(-1.06, 2.15, 0.07, 0.1, (255, 190, 225))


def draw(scene: Scene, rng: np.random.Generator, size: tuple[int, int] = (64, 112)) -> np.ndarray:
    """Return the picture, uint8 [H, W, 3]; `rng` sets what the scene leaves open: sizes, places, which side is lifted.

    Args:
        size: height and width; the width should be 1.5 to 2 heights.
    """
    height, width = 2 * size[0], 2 * size[1]
    image = Image.new("RGB", (width, height))
    pencil = ImageDraw.Draw(image)
    # the same each time: what a small model has to learn is the creatures
    always = np.random.default_rng(zlib.crc32(scene.place.encode()))
    background(pencil, scene.place, scene.extra, always, (height, width))
    count = len(scene.actors)
    gap = rng.uniform(*scene.gap) if count == 2 else 0.0
    middle = 0.5 + rng.uniform(-1, 1) * (0.05 if count == 2 else 0.18)
    units = rng.uniform(SMALL, LARGE, count) * height
    grounds = rng.uniform(0.88, 0.95, count) * height
    flips = 2 * rng.integers(2, size=count) - 1
    line = max(1, round(height / 64))
    for i in np.argsort(grounds):  # the nearest last
        actor = scene.actors[i]
        x = (middle + gap * (i - (count - 1) / 2)) * width
        body, clothes = (shifted(COLOURS[name], rng.normal(0, 5, 3)) for name in (actor.look.body, actor.look.clothes))
        _actor(Pen(pencil, x, grounds[i], units[i], int(flips[i]), line, body, clothes), actor)
    # flat and a little soft: a small model spends its capacity on outlines otherwise
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.6 * height / 64)).reduce(2))
