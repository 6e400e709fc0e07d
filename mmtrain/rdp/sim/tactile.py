"""Synthetic marker fields and pictures of the two tactile sensors (specification section 8.4; grids of section 1.1).

Offsets are in shares of the sensor's picture, as in the released data: (current - rest) / (width, height). Markers are
ordered row by row. Forces are those on the gel in its own frame: x and y along the picture, z through it.
"""

from functools import cache
from typing import Literal

import numpy as np

from mmtrain import marker_pca
from mmtrain.marker_pca import MarkerPca
from mmtrain.robot_tasks import MARKERS

Sensor = Literal["gelsight", "mctac"]

NOISE = 0.0008  # standard deviation of a marker's offset, share of the picture
REACH = 0.22  # standard deviation of the region that a press moves, share of the picture
FACE = 0.02  # width of the gel in metres: what a share of 1 of the picture is
SHEAR, BULGE, TWIST = 0.004, 0.02, 0.6  # per N, at full press, per N m
FULL_PRESS = 6.0  # N at which the bulge begins to saturate
LEAST_PRESS = 0.5  # N; below it the centre of pressure is drawn to the middle, as moments are mostly noise there
PRESSES = 4000


@cache
def marker_grid(sensor: Sensor) -> np.ndarray:
    """Rest positions [n, 2] float32 in [0, 1]^2, read-only: 7 x 9 markers of the GelSight Mini, 5 x 5 of the MCTac.

    The GelSight's are those of the released tracker (first at pixel (143, 108) of 640 x 480, pitch (42, 46)); the
    MCTac's are not given and lie evenly between 0.2 and 0.8.
    """
    rows, columns = MARKERS[sensor]
    if sensor == "gelsight":
        x, y = (143 + 42 * np.arange(columns)) / 640, (108 + 46 * np.arange(rows)) / 480
    else:
        x, y = np.linspace(0.2, 0.8, columns), np.linspace(0.2, 0.8, rows)
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    grid.flags.writeable = False
    return grid


def contact_centre(wrench: np.ndarray) -> np.ndarray:
    """Centre of pressure [..., 2] in [0.1, 0.9]^2 of a wrench [..., 6] (N, N m) about the middle of the gel.

    A force through (x, y) has the moments (y Fz, -x Fz). A weak press keeps its centre near the middle (0.5, 0.5).
    """
    wrench = np.asarray(wrench, np.float64)
    normal = wrench[..., 2:3]
    press = np.where(normal < 0, -1.0, 1.0) * np.maximum(np.abs(normal), LEAST_PRESS)
    arms = np.stack([-wrench[..., 4], wrench[..., 3]], axis=-1) / press
    return np.clip(0.5 + arms / FACE, 0.1, 0.9)


def marker_offsets(
    sensor: Sensor,
    force: np.ndarray,
    torque_z: np.ndarray | float,
    centre: np.ndarray,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Offsets [..., n, 2] float32 of the markers under a press (section 8.4): shear + bulge + twist near its centre.

    Args:
        force: [..., 3] N on the gel; the sign of z does not matter.
        torque_z: [...] N m about the gel's normal.
        centre: [..., 2] of the press in [0, 1]^2, see `contact_centre`.
        rng: source of the white noise (0.0008); None leaves it out.
    """
    force, centre = np.asarray(force, np.float32), np.asarray(centre, np.float32)
    torque = np.asarray(torque_z, np.float32)[..., None, None]
    arm = marker_grid(sensor) - centre[..., None, :]
    weight = np.exp(np.einsum("...i,...i->...", arm, arm) * np.float32(-0.5 / REACH**2))[..., None]
    bulge = np.float32(BULGE) * np.tanh(np.abs(force[..., 2, None, None]) / np.float32(FULL_PRESS))
    turned = np.empty_like(arm)
    turned[..., 0], turned[..., 1] = -arm[..., 1], arm[..., 0]
    offsets = weight * (np.float32(SHEAR) * force[..., None, :2] + bulge * arm + np.float32(TWIST) * torque * turned)
    if rng is not None:
        offsets += np.float32(NOISE) * rng.standard_normal(offsets.shape, dtype=np.float32)
    return offsets


def wrench_offsets(sensor: Sensor, wrench: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Offsets [..., n, 2] of a wrench [..., 6] (N, N m) on the middle of the gel, with the centre that it implies."""
    wrench = np.asarray(wrench)
    return marker_offsets(sensor, wrench[..., :3], wrench[..., 5], contact_centre(wrench), rng)


def tactile_image(sensor: Sensor, offsets: np.ndarray, normal_force: float, size: int = 64) -> np.ndarray:
    """Picture uint8 [size, size, 3] RGB of the gel: dark discs at the markers on grey that brightens under a press.

    Args:
        offsets: [n, 2] as `marker_offsets` gives them.
        normal_force: N; its size shades the middle of the gel.
    """
    gel, pixels, radius = _gel(sensor, size)
    marker = marker_grid(sensor) + np.asarray(offsets, np.float32)
    # A blob is a product of a row and a column profile: all discs are one matrix product.
    profile = np.exp(np.square((pixels[:, None, None] - marker) / radius) * np.float32(-0.5))
    discs = np.minimum(1.6 * (profile[..., 1] @ profile[..., 0].T), 1.0)[..., None]
    press = np.float32(np.tanh(abs(float(normal_force)) / FULL_PRESS))
    return np.clip((gel[0] + press * gel[1]) * (1 - 0.8 * discs), 0, 255).astype(np.uint8)


@cache
def _gel(sensor: Sensor, size: int) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Colour at rest and under full press [2, size, size, 3], pixel centres [size], radius of a disc."""
    pixels = ((np.arange(size) + 0.5) / size).astype(np.float32)
    x, y = np.meshgrid(pixels - 0.5, pixels - 0.5)
    lights = np.stack([x, y, -x], axis=-1) * 40  # coloured lamps at the sides
    shade = np.exp(-(x**2 + y**2) / (2 * REACH**2))[..., None] * np.array([70.0, 60.0, 80.0])
    rows = MARKERS[sensor][0]
    return np.stack([120 + lights, shade]).astype(np.float32), pixels, np.float32(0.12 / rows)


@cache
def press_pca(sensor: Sensor) -> MarkerPca:
    """The sensor's marker embedding, fitted on 4000 seeded random presses (a data set of its own, section 1.5).

    Normal force 0 to 15 N, shear up to half of it and 6 N, torque to 0.05 N m, centre within the middle of the gel.
    """
    rng = np.random.default_rng(20_000 + MARKERS[sensor][0])
    normal = rng.uniform(0, 15, PRESSES)
    direction = rng.uniform(-np.pi, np.pi, PRESSES)
    shear = np.minimum(0.5 * normal, 6.0) * np.sqrt(rng.uniform(0, 1, PRESSES))
    force = np.stack([shear * np.cos(direction), shear * np.sin(direction), normal], axis=-1)
    torque = rng.uniform(-0.05, 0.05, PRESSES) * np.minimum(normal / 5, 1)
    centre = rng.uniform(0.3, 0.7, (PRESSES, 2))
    return marker_pca.fit(marker_offsets(sensor, force, torque, centre, rng))
