"""Six places in which the creatures stand, and what else may stand there."""

from collections.abc import Iterable

import numpy as np
from PIL import ImageDraw

Rgb = tuple[int, int, int]
PLACES = ("snow", "forest", "beach", "desert", "night", "room")
EXTRAS = ("house", "rainbow")
SKIES: dict[str, tuple[Rgb, Rgb]] = {  # sky or wall, ground or floor
    "snow": (((188, 216, 240)), (236, 242, 250)),
    "forest": ((168, 216, 184), (74, 120, 62)),
    "beach": ((128, 204, 246), (240, 218, 160)),
    "desert": ((250, 200, 150), (222, 160, 92)),
    "night": ((26, 30, 78), (58, 62, 92)),
    "room": ((226, 206, 188), (158, 112, 78)),
}
RAINBOW: tuple[Rgb, ...] = (
    (228, 60, 60),
    (246, 160, 50),
    (250, 226, 80),
    (90, 186, 90),
    (80, 120, 222),
    (146, 84, 190),
)


def mixed(colour: Rgb, other: Rgb, share: float) -> Rgb:
    """Return a colour with a share in [0, 1] of another one."""
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))  # type: ignore[return-value]


def shifted(colour: Rgb, shift: Iterable[float]) -> Rgb:
    """Return a colour moved by three numbers, kept in [0, 255]."""
    return tuple(min(max(int(c + d), 0), 255) for c, d in zip(colour, shift, strict=True))  # type: ignore[return-value]


class _Ground:
    """Draws in picture heights: x from 0 to the aspect ratio, y from 0 at the top to 1."""

    def __init__(self, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
        self.draw, self.height, self.wide = draw, size[0], size[1] / size[0]

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        h = self.height
        self.draw.rectangle((x0 * h, y0 * h, x1 * h, y1 * h), fill=fill)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
        h = self.height
        self.draw.ellipse(((x - rx) * h, (y - ry) * h, (x + rx) * h, (y + ry) * h), fill=fill)

    def poly(self, points: list[tuple[float, float]], fill: Rgb) -> None:
        self.draw.polygon([(x * self.height, y * self.height) for x, y in points], fill=fill)


def _snow(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    for _ in range(2):
        ground.oval(rng.uniform(0, ground.wide), horizon + 0.05, rng.uniform(0.4, 0.7), 0.16, (220, 230, 244))
    ground.box(0, horizon + 0.04, ground.wide, 1, (240, 245, 252))
    for x, y in rng.uniform((0, 0), (ground.wide, 0.9), (14, 2)):
        ground.oval(x, y, 0.014, 0.014, (255, 255, 255))


def _forest(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    for k in range(6):
        x, top = (k + rng.uniform(0.1, 0.9)) * ground.wide / 6, rng.uniform(0.02, 0.2)
        green = mixed((36, 92, 52), (70, 140, 70), rng.random())
        ground.box(x - 0.025, horizon - 0.15, x + 0.025, horizon + 0.04, (98, 66, 40))
        ground.poly([(x - 0.17, horizon - 0.1), (x + 0.17, horizon - 0.1), (x, top)], green)


def _beach(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    ground.oval(rng.uniform(0.1, ground.wide - 0.1), 0.14, 0.1, 0.1, (255, 240, 150))
    ground.box(0, horizon - 0.2, ground.wide, horizon, (36, 120, 200))
    for x in rng.uniform(0, ground.wide, 5):
        ground.box(x, horizon - rng.uniform(0.03, 0.17), x + 0.12, horizon - 0.02, (120, 190, 236))
    ground.box(0, horizon - 0.02, ground.wide, horizon + 0.015, (250, 250, 250))


def _desert(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    for _ in range(2):
        ground.oval(rng.uniform(0, ground.wide), horizon + 0.06, rng.uniform(0.35, 0.6), 0.2, (206, 138, 76))
    ground.box(0, horizon + 0.05, ground.wide, 1, SKIES["desert"][1])
    x, y, green = rng.uniform(0.05, ground.wide - 0.05), horizon + 0.06, (60, 140, 84)
    ground.box(x - 0.035, y - 0.45, x + 0.035, y, green)
    ground.box(x - 0.13, y - 0.28, x + 0.13, y - 0.22, green)
    ground.box(x - 0.13, y - 0.38, x - 0.08, y - 0.22, green)
    ground.box(x + 0.08, y - 0.36, x + 0.13, y - 0.22, green)


def _night(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    for x, y in rng.uniform((0, 0), (ground.wide, horizon), (18, 2)):
        ground.oval(x, y, 0.012, 0.012, (250, 246, 200))
    x = rng.uniform(0.15, ground.wide - 0.15)
    ground.oval(x, 0.15, 0.1, 0.1, (250, 246, 200))
    ground.oval(x + 0.05, 0.12, 0.09, 0.09, SKIES["night"][0])


def _room(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    for k in range(9):
        ground.box(k * 0.24, 0, k * 0.24 + 0.04, horizon, (214, 190, 170))
    x = rng.uniform(0.1, ground.wide - 0.6)
    ground.box(x, 0.08, x + 0.5, 0.5, (250, 246, 240))
    ground.box(x + 0.04, 0.12, x + 0.23, 0.46, (150, 206, 240))
    ground.box(x + 0.27, 0.12, x + 0.46, 0.46, (150, 206, 240))
    ground.box(0, horizon - 0.03, ground.wide, horizon + 0.01, (250, 246, 240))


def _house(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    x, y = rng.uniform(0.2, ground.wide - 0.2), horizon + 0.06
    ground.box(x - 0.24, y - 0.38, x + 0.24, y, (232, 222, 200))
    ground.poly([(x - 0.32, y - 0.36), (x + 0.32, y - 0.36), (x, y - 0.62)], (168, 60, 52))
    ground.box(x - 0.06, y - 0.22, x + 0.06, y, (112, 72, 48))
    ground.box(x - 0.19, y - 0.3, x - 0.1, y - 0.2, (255, 232, 120))
    ground.box(x + 0.1, y - 0.3, x + 0.19, y - 0.2, (255, 232, 120))


def _rainbow(ground: _Ground, rng: np.random.Generator, horizon: float) -> None:
    x, h, width = rng.uniform(0.6, ground.wide - 0.6), ground.height, 0.035
    for k, colour in enumerate(RAINBOW):
        r = 0.68 - k * width
        box = ((x - r) * h, (horizon - r) * h, (x + r) * h, (horizon + r) * h)
        ground.draw.arc(box, 180, 360, fill=colour, width=max(1, round(width * h)))


DRAWN = {"snow": _snow, "forest": _forest, "beach": _beach, "desert": _desert, "night": _night, "room": _room}


def background(
    draw: ImageDraw.ImageDraw, place: str, extra: str, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    """Draw a place, and behind the creatures a house or a rainbow.

    Args:
        place: of PLACES.
        extra: of EXTRAS, or "".
        size: height and width of the picture in pixels.
    """
    ground = _Ground(draw, size)
    horizon = rng.uniform(0.6, 0.72)
    shift = rng.normal(0, 5, 3)
    sky, floor = (shifted(part, shift) for part in SKIES[place])
    ground.box(0, 0, ground.wide, 1, sky)
    ground.box(0, horizon, ground.wide, 1, floor)
    if extra == "rainbow":
        _rainbow(ground, rng, horizon)
    DRAWN[place](ground, rng, horizon)
    if extra == "house":
        _house(ground, rng, horizon)
