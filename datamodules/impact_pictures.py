"""Pictures of a scene of impacts: bodies of one look per class, before a random background, smooth at their edges.

The time of a contact between two frames can be read: a ring spreads from it at a fixed speed, the body and the struck
surface glow, and the surface swings, all of them fading with `GLOW_DECAY`.
"""

from dataclasses import dataclass

import numpy as np

from datamodules.impact_physics import FLOOR, LEFT, RIGHT, Scene

GLOW_DECAY = 0.3  # seconds
RING_SPEED = 0.45  # picture heights a second
SWING = 0.03  # picture heights by which a struck surface gives way
GLOW_SECONDS = 0.9  # after which nothing of a contact is left


@dataclass(frozen=True)
class Look:
    """How a class is drawn: hue in [0, 1), saturation, value, corners (0: a disc), pattern."""

    hue: float
    saturation: float
    value: float
    corners: int
    pattern: str


LOOKS = {
    "glass": Look(0.52, 0.30, 0.95, 0, "rim"),
    "metal": Look(0.62, 0.12, 0.65, 6, "gradient"),
    "wood": Look(0.08, 0.70, 0.55, 4, "stripes"),
    "rubber": Look(0.98, 0.85, 0.75, 0, "plain"),
    "plastic": Look(0.16, 0.90, 0.95, 3, "plain"),
    "ceramic": Look(0.60, 0.75, 0.80, 0, "ring"),
    "drum": Look(0.80, 0.60, 0.70, 8, "cross"),
    "gravel": Look(0.30, 0.30, 0.50, 5, "speckles"),
}


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Colour float32 [3] in [0, 1]; the hue wraps around."""
    shift = np.abs(((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0) * 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(shift, 0, 1)))).astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dim gradient between two colours with blotches and grain, float32 [3, H, W]."""
    ends = [_rgb(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.4)) for _ in range(2)]
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    ramp = np.clip(0.5 + np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None], 0, 1)
    coarse = rng.normal(0, 0.05, (3, 5, 5)).astype(np.float32)
    place = np.linspace(0, 3.999, size)
    low, part = place.astype(int), (place % 1).astype(np.float32)
    rows = coarse[:, low] * (1 - part[:, None]) + coarse[:, low + 1] * part[:, None]
    blotches = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    grain = rng.normal(0, 0.012, (3, size, size)).astype(np.float32)
    return ends[0][:, None, None] * (1 - ramp) + ends[1][:, None, None] * ramp + blotches + grain


def _texture(look: Look, dx: np.ndarray, dy: np.ndarray, phase: float) -> np.ndarray:
    """Brightness of a body relative to its colour, at offsets in radii from its centre."""
    if look.pattern == "stripes":
        return 1 + 0.35 * np.sin(9 * dy + 2 * np.sin(3 * dx + phase))
    if look.pattern == "gradient":
        return 1.0 - 0.35 * dy - 0.2 * dx
    if look.pattern == "speckles":
        return 1 + 0.45 * np.sin(7.1 * dx + 3 * dy + phase) * np.sin(6.3 * dy - 2 * dx + 2 * phase)
    if look.pattern == "cross":
        return np.where(np.minimum(np.abs(dx), np.abs(dy)) < 0.2, 1.5, 0.9).astype(np.float32)
    if look.pattern == "rim":
        return 0.55 + 0.45 * np.minimum(dx * dx + dy * dy, 1.0)
    return 1 - 0.15 * (dx + dy)


def _distance(look: Look, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Distance in radii from the edge of the body, negative inside; polygons stand on a side."""
    if look.corners == 0:
        away = np.sqrt(dx * dx + dy * dy)
        return np.abs(away - 0.75) - 0.25 if look.pattern == "ring" else away - 1
    angles = np.pi / 2 + 2 * np.pi * np.arange(look.corners) / look.corners
    inner = 0.7 if look.corners == 3 else 0.95  # so that shapes of few corners are not larger than the others
    away = np.full_like(dx, -np.inf)
    for angle in angles:
        np.maximum(away, dx * np.float32(np.cos(angle)) + dy * np.float32(np.sin(angle)), out=away)
    return away - inner


class _Canvas:
    """Frames float32 [T, 3, H, W] in [0, 1] and the instants [T] they show."""

    def __init__(self, frames: np.ndarray, times: np.ndarray) -> None:
        self.frames, self.times = frames, times
        self.size = frames.shape[-1]
        self.grid = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size

    def surfaces(self, scene: Scene, colour: np.ndarray) -> None:
        """Floor and walls, which swing and glow where they were struck."""
        for surface, edge, sign in (("floor", FLOOR, 1), ("left", LEFT, -1), ("right", RIGHT, 1)):
            swing = np.zeros((len(self.times), self.size), np.float32)
            glow = np.zeros_like(swing)
            for contact in scene.contacts:
                if contact.surface != surface:
                    continue
                chosen, dt = self.since(contact.time)
                where = contact.x if surface == "floor" else contact.y
                bump = np.exp(-(((self.grid - where) / 0.12) ** 2))[None] * np.exp(-dt / GLOW_DECAY)[:, None]
                glow[chosen] += bump
                swing[chosen] += SWING * bump * np.cos(2 * np.pi * 2.5 * dt)[:, None]
            band = np.flatnonzero(sign * (self.grid - edge) > -SWING * 3)  # the rows or columns that it can reach
            across = sign * (self.grid[band] - edge - swing[:, :, None]) * self.size  # [T, along, across]
            cover = np.clip(across + 0.5, 0, 1)[:, None]
            light = np.clip(0.8 + 0.9 * glow, 0, 2)[:, None, :, None]
            part = self.frames[..., band[0] : band[-1] + 1]
            if surface == "floor":
                cover, light = cover.swapaxes(2, 3), light.swapaxes(2, 3)
                part = self.frames[..., band[0] : band[-1] + 1, :]
            part += cover * (light * colour[:, None, None] - part)

    def body(self, scene: Scene, body: int, look: Look, colour: np.ndarray, phase: float) -> None:
        """One body, drawn in a square around it; it glows after its contacts."""
        radius = scene.radii[body]
        places = scene.positions(body, self.times)
        glow = np.zeros(len(self.times), np.float32)
        for contact in scene.contacts:
            if body in contact.bodies:
                chosen, dt = self.since(contact.time)
                glow[chosen] = np.maximum(glow[chosen], np.exp(-dt / GLOW_DECAY))
        half = int(np.ceil(radius * 1.7 * self.size)) + 1
        for frame, (x, y) in enumerate(places):
            rows = slice(max(int(y * self.size) - half, 0), max(int(y * self.size) + half, 0))
            columns = slice(max(int(x * self.size) - half, 0), max(int(x * self.size) + half, 0))
            dx, dy = np.meshgrid((self.grid[columns] - x) / radius, (self.grid[rows] - y) / radius)
            if not dx.size:
                continue
            dx, dy = dx.astype(np.float32), dy.astype(np.float32)
            cover = np.clip(0.5 - _distance(look, dx, dy) * radius * self.size, 0, 1)
            light = _texture(look, dx, dy, phase)[None] * colour[:, None, None]
            light = light + 0.6 * glow[frame] * (1 - light)
            part = self.frames[frame, :, rows, columns]
            part += cover * (light - part)

    def rings(self, scene: Scene) -> None:
        """A ring around each contact, its radius the time since then."""
        for contact in scene.contacts:
            chosen, dt = self.since(contact.time)
            away = np.hypot(self.grid[None, :] - contact.x, self.grid[:, None] - contact.y).astype(np.float32)
            width = 1.5 / 64
            near = np.exp(-(((away[None] - RING_SPEED * dt[:, None, None]) / width) ** 2))
            self.frames[chosen] += 0.8 * (near * np.exp(-dt / GLOW_DECAY)[:, None, None])[:, None]

    def since(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the frames that show something of a contact, and the seconds since then, float32."""
        chosen = np.flatnonzero((self.times >= time) & (self.times < time + GLOW_SECONDS))
        return chosen, (self.times[chosen] - time).astype(np.float32)


def frames_of(
    scene: Scene, class_name: str, rng: np.random.Generator, num_frames: int, fps: float, size: int
) -> np.ndarray:
    """Return the video of a scene, uint8 [T, 3, size, size]; frame k shows the instant k / fps."""
    look = LOOKS[class_name]
    times = np.arange(num_frames) / fps
    background = _background(rng, size)
    canvas = _Canvas(np.repeat(background[None], num_frames, axis=0).astype(np.float32), times)
    canvas.surfaces(scene, _rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.35, 0.6)))
    for body in range(len(scene.radii)):
        hue, value = look.hue + rng.normal(0, 0.015), np.clip(look.value * rng.uniform(0.85, 1.1), 0, 1)
        canvas.body(scene, body, look, _rgb(hue, look.saturation, float(value)), rng.uniform(0, 6))
    canvas.rings(scene)
    return (np.clip(canvas.frames, 0, 1) * 255 + 0.5).astype(np.uint8)
