"""Sounds of struck bodies by modal synthesis: decaying sines at the ratios of the material, and a click of noise."""

from dataclasses import dataclass

import numpy as np
import scipy.fft

from datamodules.impact_physics import Scene, loudness

LEVEL = 0.4  # peak of the loudest contact
MEAN_RADIUS = 0.095  # body whose lowest mode has `Material.frequency`
NOISE_LEVELS = 2e-5, 6e-5  # root mean square of the background, 84 to 94 dB below full scale


@dataclass(frozen=True)
class Material:
    """What a body of this class sounds like.

    Args:
        name: of the class.
        frequency: of the lowest mode of a body of mean size, Hz; smaller bodies sound higher.
        ratios: of the modes to the lowest one.
        decay: seconds in which the lowest mode falls to 1/e; higher modes fall faster.
        click: share of the noise at the start, in [0, 1].
        click_frequency: centre of that noise, Hz.
        click_decay: seconds.
    """

    name: str
    frequency: float
    ratios: tuple[float, ...]
    decay: float
    click: float
    click_frequency: float
    click_decay: float


MATERIALS = (  # ratios of a free bar, a membrane, a plate and a bell, after Fletcher & Rossing
    Material("glass", 2200.0, (1.0, 2.32, 3.1), 0.25, 0.15, 6000.0, 0.004),
    Material("metal", 620.0, (1.0, 2.76, 5.40, 8.93), 0.45, 0.15, 5000.0, 0.006),
    Material("wood", 430.0, (1.0, 2.57, 4.97), 0.06, 0.25, 1500.0, 0.006),
    Material("rubber", 170.0, (1.0, 1.6), 0.07, 0.20, 350.0, 0.020),
    Material("plastic", 880.0, (1.0, 1.45, 2.1), 0.03, 0.40, 3000.0, 0.012),
    Material("ceramic", 1350.0, (1.0, 1.66, 2.9, 4.3), 0.12, 0.25, 4000.0, 0.004),
    Material("drum", 240.0, (1.0, 1.59, 2.14, 2.65), 0.22, 0.30, 700.0, 0.030),
    Material("gravel", 800.0, (1.0,), 0.02, 0.90, 4500.0, 0.060),
)


def _noise(rng: np.random.Generator, num: int, rate: int, centre: float, octaves: float) -> np.ndarray:
    """Noise [num] of unit standard deviation whose spectrum is a bell around `centre` (Hz) on a scale of octaves."""
    frequencies = np.fft.rfftfreq(num, 1 / rate).astype(np.float32)
    weight = np.exp(-0.5 * (np.log2(np.maximum(frequencies, 1.0) / centre) / octaves) ** 2)
    noise = scipy.fft.irfft(scipy.fft.rfft(rng.standard_normal(num, dtype=np.float32)) * weight, num)
    return noise / (noise.std() + 1e-12)


def strike(rng: np.random.Generator, material: Material, radius: float, rate: int) -> np.ndarray:
    """Return the sound [N] of one contact, peak 1, from the instant of the contact on.

    Args:
        rng: draws where the body is struck, which weights the modes, and the noise.
        material: what it is made of.
        radius: of the body; the frequencies go with 1 / radius.
        rate: samples a second.
    """
    time = np.arange(int(6 * max(material.decay, material.click_decay) * rate), dtype=np.float32) / rate
    sound = np.zeros_like(time)
    for number, ratio in enumerate(material.ratios):
        frequency = material.frequency * MEAN_RADIUS / radius * ratio
        if frequency < 0.48 * rate:
            weight, decay = rng.uniform(0.6, 1.0) / (1 + 0.5 * number), material.decay / ratio**0.6
            short = time[: int(6 * decay * rate)]
            sound[: len(short)] += weight * np.exp(short / -decay) * np.sin(2 * np.pi * frequency * short)
    sound *= (1 - material.click) / (np.abs(sound).max() + 1e-12)
    num = min(len(time), int(6 * material.click_decay * rate))
    click = _noise(rng, num, rate, material.click_frequency, 0.7) * np.exp(-time[:num] / material.click_decay)
    sound[:num] += material.click * click / np.abs(click).max()
    sound[: rate // 1000] *= np.linspace(0.0, 1.0, rate // 1000)  # 1 ms of attack
    return sound / np.abs(sound).max()


def sound_of(scene: Scene, material: Material, rng: np.random.Generator, seconds: float, rate: int) -> np.ndarray:
    """Return the sound of a scene, float32 [seconds * rate] in [-1, 1], with faint noise behind it.

    Where two bodies meet, both sound.
    """
    num = round(seconds * rate)
    level = np.exp(rng.uniform(*np.log(NOISE_LEVELS)))
    sound = level * _noise(rng, num, rate, rng.uniform(200, 2000), 2.0)
    for contact in scene.contacts:
        start = int(np.ceil(contact.time * rate))
        for body in contact.bodies:
            gain = LEVEL * 10 ** (loudness(contact.speed) / 20) / len(contact.bodies) ** 0.5
            part = gain * strike(rng, material, scene.radii[body], rate)[: num - start]
            sound[start : start + len(part)] += part
    return np.clip(sound, -1.0, 1.0).astype(np.float32)
