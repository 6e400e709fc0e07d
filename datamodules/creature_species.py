"""The nine species of creatures: their parts, drawn in units of one creature.

Its ground is y = 0, its shoulders lie near y = 1, the top of its head near y = 2; x = 0 is its middle.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import ImageDraw

from datamodules.creature_scenes import Rgb, mixed

INK = (38, 34, 46)
BEAK = (250, 160, 30)
Points = Sequence[tuple[float, float]]


@dataclass
class Pen:
    """Draws in units of one creature whose feet stand at pixel (x, y)."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    unit: float
    flip: int = 1
    line: int = 2
    body: Rgb = (0, 0, 0)
    clothes: Rgb = (0, 0, 0)
    dark: Rgb = field(init=False)
    light: Rgb = field(init=False)

    def __post_init__(self) -> None:
        self.dark, self.light = mixed(self.body, INK, 0.35), mixed(self.body, (255, 255, 255), 0.65)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x + self.flip * x * self.unit, self.y - y * self.unit

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
        px, py = self.at(x, y)
        box = (px - rx * self.unit, py - ry * self.unit, px + rx * self.unit, py + ry * self.unit)
        self.draw.ellipse(box, fill=fill)

    def poly(self, points: Points, fill: Rgb) -> None:
        self.draw.polygon([self.at(x, y) for x, y in points], fill=fill)

    def pair(self, points: Points, fill: Rgb) -> None:
        """A polygon and its mirror image."""
        self.poly(points, fill)
        self.poly([(-x, y) for x, y in points], fill)

    def twins(self, x: float, y: float, rx: float, ry: float, fill: Rgb) -> None:
        """An oval and its mirror image."""
        self.oval(x, y, rx, ry, fill)
        self.oval(-x, y, rx, ry, fill)

    def limb(self, start: tuple[float, float], end: tuple[float, float], width: float, fill: Rgb) -> None:
        """A thick line with round ends."""
        places, half = [self.at(*start), self.at(*end)], width * self.unit / 2
        self.draw.line(places, fill=fill, width=max(1, round(2 * half)))
        for px, py in places:
            self.draw.ellipse((px - half, py - half, px + half, py + half), fill=fill)

    def eyes(self, x: float = 0.18, y: float = 1.65, size: float = 0.1) -> None:
        self.twins(x, y, size, size * 1.25, (255, 255, 255))
        self.twins(x * 0.92, y, size * 0.62, size * 0.85, INK)


def _dinosaur(pen: Pen, front: bool) -> None:
    if not front:  # a thick tail, and plates down the back
        pen.poly([(0.2, 0.75), (0.75, 0.35), (1.2, 0.42), (0.8, 0.08), (0.0, 0.1)], pen.body)
        for x, y in ((0.62, 0.62), (0.88, 0.5)):
            pen.poly([(x - 0.14, y - 0.1), (x + 0.1, y + 0.22), (x + 0.14, y - 0.16)], pen.dark)
        return
    for angle in (-40, -5, 30, 65):
        turn = math.radians(angle)
        x, y = math.sin(turn), math.cos(turn)
        base = [(0.46 * x + s * 0.17 * y, 1.58 + 0.46 * y - s * 0.17 * x) for s in (-1, 1)]
        pen.poly([base[0], (0.78 * x, 1.58 + 0.78 * y), base[1]], pen.dark)
    pen.oval(0, 1.58, 0.48, 0.48, pen.body)
    pen.oval(-0.2, 1.38, 0.42, 0.25, pen.light)  # a long snout
    pen.oval(-0.42, 1.45, 0.04, 0.05, INK)
    pen.oval(-0.22, 1.47, 0.04, 0.05, INK)
    pen.eyes(y=1.75)


def _fox(pen: Pen, front: bool) -> None:
    if not front:  # a bushy tail with a white tip
        pen.oval(0.82, 0.62, 0.36, 0.5, pen.body)
        pen.oval(0.95, 1.0, 0.22, 0.24, (250, 250, 250))
        return
    pen.pair([(0.08, 1.9), (0.5, 2.55), (0.56, 1.62)], pen.body)
    pen.pair([(0.24, 1.98), (0.44, 2.3), (0.47, 1.82)], INK)
    pen.poly([(-0.62, 1.62), (-0.4, 1.95), (0.4, 1.95), (0.62, 1.62), (0.0, 1.05)], pen.body)
    pen.pair([(0.62, 1.62), (0.0, 1.05), (0.1, 1.45)], (250, 250, 250))
    pen.oval(0, 1.12, 0.1, 0.09, INK)
    pen.eyes(0.2, 1.68, 0.085)


def _bird(pen: Pen, front: bool) -> None:
    if not front:  # tail feathers
        for dx in (0.0, 0.18, 0.36):
            pen.poly([(0.3, 0.6), (0.62 + dx, 0.05 + dx), (0.85 + dx, 0.25 + dx), (0.4, 0.85)], pen.dark)
        return
    for x, top in ((-0.2, 2.35), (0.02, 2.5), (0.24, 2.35)):
        pen.oval(x, top - 0.22, 0.1, 0.26, pen.dark)
    pen.oval(0, 1.55, 0.44, 0.46, pen.body)
    pen.eyes(0.2, 1.68, 0.12)
    pen.poly([(-0.2, 1.5), (0.2, 1.5), (0.0, 1.1)], BEAK)


def _beaver(pen: Pen, front: bool) -> None:
    if not front:  # a flat tail
        pen.oval(0.85, 0.5, 0.3, 0.5, (92, 62, 48))
        for y in (0.3, 0.5, 0.7):
            pen.draw.line([pen.at(0.6, y), pen.at(1.1, y)], fill=INK, width=pen.line)
        return
    pen.twins(0.42, 1.95, 0.15, 0.15, pen.dark)
    pen.oval(0, 1.55, 0.55, 0.46, pen.body)
    pen.twins(0.2, 1.38, 0.24, 0.18, pen.light)
    pen.poly([(-0.15, 1.28), (0.15, 1.28), (0.15, 0.98), (-0.15, 0.98)], (255, 255, 255))
    pen.draw.line([pen.at(0, 1.28), pen.at(0, 0.98)], fill=INK, width=pen.line)
    pen.oval(0, 1.5, 0.12, 0.09, INK)
    pen.eyes(0.22, 1.72, 0.08)


def _penguin(pen: Pen, front: bool) -> None:
    if not front:
        pen.oval(0, 0.85, 0.66, 0.85, pen.body)
        return
    pen.oval(0, 1.58, 0.52, 0.5, pen.body)
    pen.twins(0.18, 1.55, 0.22, 0.28, (252, 252, 252))
    pen.oval(0, 1.42, 0.32, 0.22, (252, 252, 252))
    pen.eyes(0.18, 1.62, 0.09)
    pen.oval(0, 1.42, 0.2, 0.1, BEAK)


def _bear(pen: Pen, front: bool) -> None:
    if not front:
        return
    pen.twins(0.42, 1.98, 0.25, 0.25, pen.body)
    pen.twins(0.42, 1.98, 0.12, 0.12, pen.light)
    pen.oval(0, 1.58, 0.6, 0.5, pen.body)
    pen.oval(0, 1.4, 0.27, 0.22, pen.light)
    pen.oval(0, 1.48, 0.13, 0.09, INK)
    pen.eyes(0.25, 1.7, 0.075)


def _robot(pen: Pen, front: bool) -> None:
    if not front:
        return
    pen.limb((0, 2.0), (0, 2.35), 0.05, (150, 150, 160))
    pen.oval(0, 2.42, 0.13, 0.13, (240, 60, 60))
    pen.pair([(0.5, 1.45), (0.68, 1.45), (0.68, 1.75), (0.5, 1.75)], pen.dark)
    pen.poly([(-0.54, 1.18), (0.54, 1.18), (0.54, 2.02), (-0.54, 2.02)], pen.body)
    pen.pair([(0.1, 1.65), (0.38, 1.65), (0.38, 1.88), (0.1, 1.88)], (120, 240, 255))
    pen.poly([(-0.32, 1.3), (0.32, 1.3), (0.32, 1.46), (-0.32, 1.46)], (240, 240, 240))
    for x in (-0.16, 0.0, 0.16):
        pen.draw.line([pen.at(x, 1.3), pen.at(x, 1.46)], fill=INK, width=pen.line)


def _dragon(pen: Pen, front: bool) -> None:
    if not front:  # wings and a tail with an arrow's head
        pen.pair([(0.2, 0.95), (0.75, 1.75), (1.25, 1.65), (1.05, 1.3), (1.2, 0.95), (0.8, 0.85)], pen.dark)
        pen.limb((0.3, 0.25), (0.95, 0.2), 0.16, pen.body)
        pen.poly([(0.85, 0.0), (0.9, 0.45), (1.3, 0.22)], pen.dark)
        return
    pen.pair([(0.12, 1.9), (0.42, 2.5), (0.46, 1.8)], (250, 238, 200))
    pen.oval(0, 1.58, 0.46, 0.46, pen.body)
    pen.oval(0, 1.33, 0.36, 0.24, pen.body)
    pen.twins(0.13, 1.38, 0.05, 0.07, INK)
    pen.poly([(-0.22, 1.17), (-0.1, 1.17), (-0.16, 1.04)], (255, 255, 255))
    pen.poly([(0.22, 1.17), (0.1, 1.17), (0.16, 1.04)], (255, 255, 255))
    pen.eyes(0.18, 1.75, 0.11)


def _snowman(pen: Pen, front: bool) -> None:
    if not front:
        pen.oval(0, 0.38, 0.62, 0.42, pen.body)
        return
    pen.oval(0, 1.6, 0.4, 0.38, pen.body)
    pen.poly([(-0.5, 1.84), (0.5, 1.84), (0.5, 1.94), (-0.5, 1.94)], INK)
    pen.poly([(-0.3, 1.9), (0.3, 1.9), (0.3, 2.4), (-0.3, 2.4)], INK)
    pen.twins(0.15, 1.7, 0.06, 0.07, INK)
    pen.poly([(0.05, 1.64), (0.05, 1.48), (-0.5, 1.5)], (246, 122, 24))
    for x in (-0.1, 0.06, 0.2):
        pen.oval(x, 1.36 + abs(x - 0.05) * 0.3, 0.035, 0.035, INK)


SPECIES: dict[str, Callable[[Pen, bool], None]] = {
    "dinosaur": _dinosaur,
    "fox": _fox,
    "bird": _bird,
    "beaver": _beaver,
    "penguin": _penguin,
    "bear": _bear,
    "robot": _robot,
    "dragon": _dragon,
    "snowman": _snowman,
}


def legs(pen: Pen, species: str, jumps: bool) -> None:
    spread = 0.42 if jumps else 0.26
    if species in ("bird", "penguin"):
        if species == "bird":
            pen.limb((0.2, 0.3), (spread, 0.06), 0.07, BEAK)
            pen.limb((-0.2, 0.3), (-spread, 0.06), 0.07, BEAK)
        pen.twins(spread, 0.05, 0.2, 0.09, BEAK)
    elif species == "robot":
        pen.pair([(0.12, 0.4), (0.34, 0.4), (spread + 0.14, 0.0), (spread - 0.16, 0.0)], pen.dark)
    elif species != "snowman":
        pen.limb((0.25, 0.35), (spread, 0.1), 0.26, pen.body)
        pen.limb((-0.25, 0.35), (-spread, 0.1), 0.26, pen.body)


def torso(pen: Pen, species: str) -> float:
    """Draw the clothes and return the height of their middle."""
    if species == "robot":
        pen.poly([(-0.56, 0.25), (0.56, 0.25), (0.56, 1.15), (-0.56, 1.15)], pen.clothes)
        return 0.7
    if species == "snowman":
        pen.oval(0, 0.92, 0.52, 0.46, pen.clothes)
        return 0.88
    width = {"bear": 0.64, "bird": 0.6, "penguin": 0.56}.get(species, 0.55)
    pen.oval(0, 0.7, width, 0.52, pen.clothes)
    return 0.66


def arm(pen: Pen, species: str, shoulder: tuple[float, float], hand: tuple[float, float]) -> None:
    (x0, y0), (x1, y1) = shoulder, hand
    if species in ("bird", "penguin"):  # a wing, a flipper
        wide = 0.34 if species == "bird" else 0.2
        length = math.hypot(x1 - x0, y1 - y0)
        nx, ny = -(y1 - y0) / length * wide, (x1 - x0) / length * wide
        middle = (0.5 * (x0 + x1), 0.5 * (y0 + y1))
        low, high = (middle[0] - nx * 0.7, middle[1] - ny * 0.7), (middle[0] + nx * 0.7, middle[1] + ny * 0.7)
        pen.poly([(x0, y0), high, hand, low], pen.dark if species == "bird" else pen.body)
    elif species == "snowman":
        pen.limb(shoulder, hand, 0.06, (110, 72, 40))
    elif species == "robot":
        pen.limb(shoulder, hand, 0.1, (150, 152, 162))
        pen.oval(*hand, 0.15, 0.15, pen.dark)
    else:
        pen.limb(shoulder, hand, 0.22, pen.body)
