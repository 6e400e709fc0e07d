"""Attack animations of Battle for Wesnoth with their sounds at the authored times: a small set that people made.

Needs the game's data, e.g. Debian's `wesnoth-1.16-data` (GPL-2): `/usr/share/games/wesnoth/1.16/data/core`. A clip
shows one unit that attacks again and again with drawn pauses, before a random plain background; the class is the kind
of damage. Units, not clips, are divided among the splits. Same use as `datamodules.impacts.Impacts`.
"""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.impacts import FORMAT
from datamodules.wesnoth_units import Animation, read_animations
from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError
from mmtrain.media import read_audio
from mmtrain.video_audio import Clip, ClipFormat

VERSION = 1
KINDS = ["blade", "pierce", "impact", "fire", "cold", "arcane"]
REPEATS = {"train": 8, "val": 2, "test": 2}  # clips of each animation
SHARES = {"test": 15, "val": 10}  # per cent of the units, by a checksum of their name; the rest is for training
CANVAS = 88  # pixels of the sprites' scale that a frame shows; most sprites have 72
PAUSE = 0.3, 1.2  # seconds between two attacks
LEVEL = 0.6  # peak of a clip


def split_of(unit: str) -> str:
    """Return the split that all clips of a unit belong to."""
    place = zlib.crc32(unit.encode()) % 100
    if place < SHARES["test"]:
        return "test"
    return "val" if place < sum(SHARES.values()) else "train"


@lru_cache(maxsize=1024)
def _sprite(path: Path, size: int) -> np.ndarray:
    """Colour and cover of a sprite in the middle of a frame, float32 [4, size, size] in [0, 1], colour times cover."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS))
    with Image.open(path) as picture:
        sprite = picture.convert("RGBA")
    canvas.alpha_composite(sprite.crop(_middle(sprite.width, sprite.height)))
    values = np.asarray(canvas, dtype=np.float32) / 255
    values[..., :3] *= values[..., 3:]
    parts = [Image.fromarray(values[..., c]).resize((size, size), Image.Resampling.BILINEAR) for c in range(4)]
    return np.stack([np.asarray(part) for part in parts])


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    left, top = (width - CANVAS) // 2, (height - CANVAS) // 2
    return left, top, left + CANVAS, top + CANVAS


@lru_cache(maxsize=256)
def _sound(path: Path, rate: int) -> np.ndarray:
    """Mono sound of a file, float32 [N]."""
    return read_audio(path, rate)


class Wesnoth:
    """Maker of clips for the data modules.

    Args:
        folder: the game's `data/core`, with units, macros, images and sounds.
        seed: of pauses, backgrounds and choices of sounds.
        format: of the clips; None: 8 frames/s, 5 s, 64 px, 16 kHz.
        repeats: clips of each animation by split; None: 8 for train, 2 for val and test.

    Raises:
        UserError: there is no such folder, or no attack animation in it.
    """

    def __init__(
        self,
        folder: str | Path,
        seed: int = 0,
        format: ClipFormat | None = None,
        repeats: Mapping[str, int] | None = None,
    ) -> None:
        self.folder, self.seed = Path(folder), seed
        self.format = FORMAT if format is None else settings(ClipFormat, format)
        self.repeats = dict(REPEATS if repeats is None else repeats)
        if unknown := set(self.repeats) - set(REPEATS):
            raise UserError(f"repeats.{min(unknown)}: must be one of {', '.join(REPEATS)}")
        if not (self.folder / "units").is_dir():
            raise UserError(
                f"folder: {self.folder}: has no folder units; give data/core of the game, e.g. of Debian's "
                "wesnoth-1.16-data /usr/share/games/wesnoth/1.16/data/core"
            )
        found, self.skipped = read_animations(self.folder)
        usable = [a for a in found if a.kind in KINDS and _length(a) + 0.2 < self.format.seconds]
        self.skipped = self.skipped | {"longer than a clip or another kind": len(found) - len(usable)}
        if not usable:
            raise UserError(f"folder: {self.folder}: no attack animation with sprites and sounds was found in units")
        self.animations = {split: [a for a in usable if split_of(a.unit) == split] for split in self.repeats}
        self.class_names = list(KINDS)

    def describe(self) -> dict[str, Any]:
        """Return what the clips depend on, in plain types; the animations as a checksum of all they show and play."""
        names = repr([(split, asdict(a)) for split, all_of in self.animations.items() for a in all_of])
        return {
            "maker": "wesnoth",
            "version": VERSION,
            "seed": self.seed,
            "repeats": dict(self.repeats),
            "format": asdict(self.format),
            "class_names": list(self.class_names),
            "animations": hashlib.sha256(names.encode()).hexdigest()[:16],
            "skipped": dict(self.skipped),
        }

    def sizes(self) -> dict[str, int]:
        """Return the number of clips of each split."""
        return {split: len(self.animations[split]) * number for split, number in self.repeats.items()}

    def clip(self, split: str, index: int) -> Clip:
        """Return one clip with frames, audio, label and onsets: the authored starts of its sounds, in seconds.

        A recording may be quiet at its start, so what is heard can come later than that: measure synchrony here
        against onsets that are detected in the real sound.

        Raises:
            UserError: there is no such split, or a sound cannot be read.
            IndexError: `index` is not in [0, size of the split).
        """
        if split not in self.animations:
            raise UserError(f"split: {split}: must be one of {', '.join(self.animations)}")
        if not 0 <= index < self.sizes()[split]:
            raise IndexError(f"index: {index}: must be in [0, {self.sizes()[split]})")
        animation = self.animations[split][index % len(self.animations[split])]
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode()), index])
        starts = self._starts(rng, _length(animation))
        audio, onsets = self._audio(rng, animation, starts)
        return Clip(
            id=f"{split}-{index:06d}",
            frames=self._frames(rng, animation, starts),
            audio=audio,
            label=KINDS.index(animation.kind),
            onsets=onsets,
        )

    def _starts(self, rng: np.random.Generator, length: float) -> list[float]:
        """Times at which the animation begins; each run ends within the clip."""
        clock = rng.uniform(0.1, max(0.1, min(PAUSE[1], self.format.seconds - length)))
        starts = []
        while not starts or clock + length <= self.format.seconds:
            starts.append(float(clock))
            clock += length + rng.uniform(*PAUSE)
        return starts

    def _frames(self, rng: np.random.Generator, animation: Animation, starts: list[float]) -> np.ndarray:
        """uint8 [T, 3, H, W]; between the attacks the unit stands as in the first sprite."""
        form = self.format
        colour = rng.uniform(0.1, 0.6, 3).astype(np.float32)[:, None, None]
        ground = np.clip(colour + rng.normal(0, 0.02, (3, form.frame_size, form.frame_size)), 0, 1)
        frames = np.empty((form.frames, 3, form.frame_size, form.frame_size), np.uint8)
        for number in range(form.frames):
            name = animation.sprites[0][0]
            for start in starts:
                now = (number / form.fps - start) * 1000 + _first(animation)
                name = next((sprite for sprite, begin, end in animation.sprites if begin <= now < end), name)
            sprite = _sprite(self.folder / "images" / name.split("~")[0], form.frame_size)
            frames[number] = np.clip((sprite[:3] + ground * (1 - sprite[3:])) * 255 + 0.5, 0, 255).astype(np.uint8)
        return frames

    def _audio(
        self, rng: np.random.Generator, animation: Animation, starts: list[float]
    ) -> tuple[np.ndarray, list[float]]:
        rate = self.format.sample_rate
        audio = rng.normal(0, 3e-5, self.format.samples).astype(np.float32)
        onsets = []
        for start in starts:
            for choice, milliseconds in animation.sounds:
                time = start + (milliseconds - _first(animation)) / 1000
                if not 0 <= time < self.format.seconds:
                    continue
                place = round(time * rate)
                part = _sound(self.folder / "sounds" / choice[rng.integers(len(choice))], rate)[: len(audio) - place]
                audio[place : place + len(part)] += part
                onsets.append(float(time))
        return audio * np.float32(LEVEL / max(np.abs(audio).max(), LEVEL)), sorted(onsets)


def _first(animation: Animation) -> int:
    """Milliseconds at which an animation begins, before the hit at 0."""
    return min([begin for _, begin, _ in animation.sprites] + [time for _, time in animation.sounds])


def _length(animation: Animation) -> float:
    """Seconds from the begin of an animation to its last sprite or start of a sound."""
    last = max([end for _, _, end in animation.sprites] + [time for _, time in animation.sounds])
    return (last - _first(animation)) / 1000
