"""Nine creatures to customise a small model to: a world in TBC-Bench's layout, drawn as `creature_drawing` does it.

Each character has besides its species and colours, which words tell, a mark that they do not: a model that has learnt
the base world only can draw its colours but cannot know its mark. Characters, pairs and base pictures on one sheet:
`python -m datamodules.creatures docs/creatures.png`.
"""

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.creature_base import base_frame, base_picture, check_size
from datamodules.creature_captions import CHARACTERS, STYLE, character, event, pick
from datamodules.creature_drawing import ACTIONS, Actor, Scene, draw
from datamodules.creature_scenes import EXTRAS, PLACES
from mmtrain.config_errors import UserError
from mmtrain.story import World

VERSION = 1  # raise when the same arguments would give other pictures or texts
FOLDER, SHORT_NAME = "Creatures", "creatures"
STORIES, STORY_LINES = 5, 5  # of each character
MULTI_STORIES, MULTI_LINES, LONELY_LINES = 10, 22, 2  # lines of two characters, and of one
EVENTS = [  # (place, extra, action)
    (place, extra, action)
    for place in PLACES
    for extra in ("", *EXTRAS)
    if place != "room" or not extra
    for action in ACTIONS
]


@dataclass(frozen=True)
class Told:
    """A scene of named characters, left to right, and its caption with tags."""

    names: tuple[str, ...]
    scene: Scene
    raw: str

    @property
    def content(self) -> tuple[Any, ...]:
        """What happens, whoever stands on the left or is mentioned first."""
        actions = zip(self.names, (actor.action for actor in self.scene.actors), strict=True)
        return (self.scene.place, self.scene.extra, frozenset(actions))


def tell(names: tuple[str, ...], place: str, extra: str, actions: tuple[str, ...], order: tuple[int, ...]) -> Told:
    """A scene with its caption, in which tags stand left to right.

    Args:
        order: numbers of the characters in the order of mention.

    >>> tell(("Fenn", "Doro"), "snow", "", ("wave", "jump"), (1, 0)).raw
    '<style> a dinosaur jumps and a fox waves in the snow. <Fenn> <Doro>'
    """
    actors = tuple(Actor(CHARACTERS[name], action) for name, action in zip(names, actions, strict=True))
    scene = Scene(place, actors, extra)
    return Told(names, scene, " ".join(["<style>", event(scene, order), *(f"<{name}>" for name in names)]))


class Creatures:
    """Maker of the customisation world.

    Args:
        size: height and width of its pictures.
        seed: of the whole world.
        singles: training pictures of each character alone.
        pair_frames: training pictures of two characters.
        seen_pairs: of the 36 pairs, those which these show; stories are about all.

    Raises:
        UserError: a size that cannot be drawn, or numbers that do not go together.

    Example:
        >>> world = Creatures()
        >>> len(world.training), sum(len(lines) for lines in world.single_stories.values())
        (145, 225)
    """

    def __init__(
        self,
        size: tuple[int, int] = (64, 112),
        seed: int = 0,
        singles: int = 12,
        pair_frames: int = 37,
        seen_pairs: int = 17,
    ) -> None:
        left = len(EVENTS) - STORIES * STORY_LINES
        if not 1 <= singles <= left:
            raise UserError(f"singles: {singles}: must be in [1, {left}], so that stories tell something else")
        if not 0 <= seen_pairs <= 36 or not seen_pairs <= pair_frames <= 12 * seen_pairs:
            raise UserError(
                f"pair_frames: {pair_frames} with seen_pairs: {seen_pairs}: must be at most 36 pairs, each with 1 to 12"
                " pictures"
            )
        self.size, self.seed = check_size(size), seed
        self.singles, self.pair_frames, self.seen_pairs = singles, pair_frames, seen_pairs
        self.world = World(SHORT_NAME, STYLE, {name: character(look, name) for name, look in CHARACTERS.items()})

    def describe(self) -> dict[str, Any]:
        """Return what the world depends on, in plain types: kept beside the folder to tell it apart."""
        return {
            "maker": SHORT_NAME,
            "version": VERSION,
            "seed": self.seed,
            "size": list(self.size),
            "singles": self.singles,
            "pair_frames": self.pair_frames,
            "seen_pairs": self.seen_pairs,
        }

    def _random(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(what.encode())])

    @cached_property
    def _singles(self) -> dict[str, list[Told]]:
        """All that a character can do alone, in random order; places take turns among those of training."""
        told = {}
        for name in CHARACTERS:
            rng = self._random(f"single {name}")
            by_place = {p: [e for e in EVENTS if e[0] == p] for p in PLACES}
            for events in by_place.values():
                rng.shuffle(events)
            turns = [by_place[p].pop() for k in range(len(EVENTS)) for p in PLACES if by_place[p]]
            rest = turns[self.singles :]
            rng.shuffle(rest)
            told[name] = [
                tell((name,), str(place), str(extra), (str(action),), (0,))
                for place, extra, action in [*turns[: self.singles], *rest]
            ]
        return told

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs that training shows; each character is in one of them at least if there are so many."""
        rng, every = self._random("pairs"), list(combinations(CHARACTERS, 2))
        for _ in range(1000):
            chosen = [every[i] for i in sorted(rng.permutation(len(every))[: self.seen_pairs])]
            times = [sum(name in pair for pair in chosen) for name in CHARACTERS]
            if min(times) >= 2 * self.seen_pairs // len(CHARACTERS) - 1:
                return chosen
        return chosen

    def _pair(self, names: tuple[str, str], rng: np.random.Generator, taken: set[Any]) -> Told:
        """Something that the two have not done yet, told in a random order; `names` is left to right."""
        while True:
            place, extra, action = EVENTS[int(rng.integers(len(EVENTS)))]
            other = action if rng.random() < 0.5 else pick(rng, ACTIONS)
            told = tell(names, place, extra, (action, other), (0, 1) if rng.random() < 0.5 else (1, 0))
            if told.content not in taken:
                taken.add(told.content)
                return told

    @cached_property
    def _told_pairs(self) -> tuple[list[Told], list[Told]]:
        """Scenes of two for training and for stories; none is in both."""
        rng, taken = self._random("multi"), set[Any]()
        turned = lambda pair, k: pair if k % 2 == 0 else pair[::-1]  # noqa: E731  sides take turns
        frames = [
            self._pair(turned(self.pairs[k % len(self.pairs)], k // len(self.pairs) + k), rng, taken)
            for k in range(self.pair_frames)
        ]
        every = list(combinations(CHARACTERS, 2))
        lines = [
            self._pair(turned(every[k % len(every)], k // len(every) + k), rng, taken)
            for k in range(MULTI_STORIES * MULTI_LINES)
        ]
        rng.shuffle(lines)
        return frames, lines

    @cached_property
    def training(self) -> dict[str, Told]:
        """Path of a picture below `image`, without suffix -> what it shows; "Fenn/1" or "Multi/1"."""
        alone = {
            f"{name}/{k + 1}": t for name, told in self._singles.items() for k, t in enumerate(told[: self.singles])
        }
        return alone | {f"Multi/{k + 1}": told for k, told in enumerate(self._told_pairs[0])}

    @cached_property
    def single_stories(self) -> dict[str, list[Told]]:
        """Character -> the lines of its stories, one after another; none is a training caption."""
        number = STORIES * STORY_LINES
        return {name: told[self.singles : self.singles + number] for name, told in self._singles.items()}

    @cached_property
    def multi_stories(self) -> list[list[Told]]:
        """Stories of all characters: lines of two, of which many pairs are not in training, and some of one."""
        rng, stories = self._random("lonely"), []
        for k in range(MULTI_STORIES):
            lines = self._told_pairs[1][k * MULTI_LINES : (k + 1) * MULTI_LINES]
            for _ in range(LONELY_LINES):
                told = self.single_stories[pick(rng, tuple(CHARACTERS))]
                lines.insert(int(rng.integers(len(lines) + 1)), told[int(rng.integers(len(told)))])
            stories.append(lines)
        return stories

    def picture(self, key: str) -> np.ndarray:
        """One training picture by its key in `training`, uint8 [H, W, 3]."""
        return draw(self.training[key].scene, self._random(f"picture {key}"), self.size)

    def texts(self) -> Iterator[tuple[str, str]]:
        """All text files of the folder: path, content."""
        classes = {name: look.species for name, look in CHARACTERS.items()}
        about = {"short_name": SHORT_NAME, "style_file": f"train-folder/{FOLDER}/style.txt", "coarse_class": classes}
        yield "characters.json", json.dumps({FOLDER: about}, indent=1) + "\n"
        train, new = f"train-folder/{FOLDER}", f"eval-plot/eval_new_story/{FOLDER}"
        yield f"{train}/style.txt", STYLE + "\n"
        for name, one in self.world.characters.items():
            yield f"{train}/character/{name}.txt", one.description + "\n"
        for key, told in self.training.items():
            yield f"{train}/caption/{key}.txt", told.raw + "\n"
        for k, (name, lines) in enumerate(self.single_stories.items()):
            for i in range(STORIES):
                part = lines[i * STORY_LINES : (i + 1) * STORY_LINES]
                yield f"{new}/Single/{name}/{i + 1}.txt", _lines(part)
            yield f"eval-plot/eval_train/each/{FOLDER}/{k + 1}.txt", _lines([self._singles[name][0]])
        for i, story in enumerate(self.multi_stories):
            yield f"{new}/Multi/all/{i + 1}.txt", _lines(story)

    def make(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Write the world.

        Args:
            folder: empty, or not there yet.
            progress: told how many of how many pictures are there.

        Raises:
            UserError: the folder holds something.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder}: is not empty: a world is written into a folder of its own")
        for path, text in self.texts():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        for done, key in enumerate(self.training):
            path = folder / "train-folder" / FOLDER / "image" / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.picture(key)).save(path)
            progress(done + 1, len(self.training))


def _lines(told: list[Told]) -> str:
    return "".join(line.raw + "\n" for line in told)


def write_sheet(path: Path, columns: int = 6) -> None:
    """Characters, pairs and base pictures with their words, as the models see them but twice as large."""
    world, (height, width), note, space = Creatures(), (64, 112), 14, 6
    cells = [
        (f"{name} ({look.species})", world.picture(f"{name}/{k % world.singles + 1}"))
        for k, (name, look) in enumerate(CHARACTERS.items())
    ]
    for k in range(1, 3 * columns - len(cells) + 1):
        told = world.training[f"Multi/{4 * k}"]
        words = f"{' and '.join(told.names)}: {' '.join(word for word in told.raw.split() if word[0] != '<')}"
        cells.append((words, world.picture(f"Multi/{4 * k}")))
    cells += [("base: " + base_frame(0, "train", i).event, base_picture(0, "train", i)) for i in range(2 * columns)]
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (2 * width + space), rows * (2 * height + note + space)), "white")
    pencil = ImageDraw.Draw(sheet)
    for i, (title, picture) in enumerate(cells):
        x, y = i % columns * (2 * width + space) + 3, i // columns * (2 * height + note + space) + 3
        sheet.paste(Image.fromarray(picture).resize((2 * width, 2 * height), Image.Resampling.NEAREST), (x, y))
        pencil.text((x, y + 2 * height + 1), title if len(title) < 44 else title[:41] + "...", fill="black")
    few = sheet.quantize(256, kmeans=4, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    write_sheet(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/creatures.png"))
