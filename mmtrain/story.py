"""What story data and the models that draw them share: characters, worlds, and the grammar of captions.

A caption is `<style> EVENT <Name> <Name>`: the event sentence speaks of coarse classes ("a fox and a bird"), the tags
name the characters as they stand in the picture, left to right. The prompt has the style and the descriptions in their
place (StoryWeaver, arXiv 2412.07375, released data).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mmtrain.config_errors import UserError, nearest

STYLE_TAG = "<style>"
TAG = re.compile(r"<([^<>]+)>")
TAIL = re.compile(r"\s*((?:<[^<>]+>\s*)*)$")


class StoryFault(UserError):
    """A caption, a character or a picture that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Character:
    """One character of a story world.

    Args:
        name: its tag.
        coarse_class: the words that event sentences call it by, such as "gentoo penguin".
        description: one sentence or more on how it looks.
    """

    name: str
    coarse_class: str
    description: str


@dataclass(frozen=True)
class World:
    """A story world.

    Args:
        name: short, of lower-case letters, digits and underscores: part of the names of metrics.
        style: the sentence that prompts begin with, such as "2.5D cartoon style."
        characters: by name, in a fixed order.
    """

    name: str
    style: str
    characters: dict[str, Character]

    @property
    def names(self) -> list[str]:
        """Names of the characters in their order."""
        return list(self.characters)


@dataclass(frozen=True)
class Frame:
    """What one picture is to show.

    Args:
        event: the sentence without style and tags.
        characters: left to right, as tagged; none may be named twice.
        style: of the world; empty for a caption without.
        separator: between style and event, as the caption has it: " " or "".
    """

    event: str
    characters: tuple[Character, ...]
    style: str
    separator: str = " "

    @property
    def prompt(self) -> str:
        """Style, event and descriptions, joined as the released template does it.

        >>> fox = Character("Eddy", "fox", "This brown fox has large ears.")
        >>> Frame("A fox runs.", (fox,), "Cartoon style.").prompt
        'Cartoon style. A fox runs. This brown fox has large ears.'
        """
        return " ".join([self.style + self.separator + self.event, *(c.description for c in self.characters)])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the characters, left to right."""
        return tuple(character.name for character in self.characters)


def parse_caption(raw: str, world: World, where: str) -> Frame:
    """A line of the benchmark as a frame.

    The style tag may be written out already, as in the validation prompts.

    Args:
        raw: for example "<style> A fox and a bird run. <Eddy> <Harry>".
        where: file and line, for messages.

    Raises:
        StoryFault: an unknown tag, one that occurs twice, one inside the sentence, or no event.

    >>> fox = Character("Eddy", "fox", "This brown fox has large ears.")
    >>> parse_caption("<style> A fox runs. <Eddy>", World("w", "Cartoon style.", {"Eddy": fox}), "1.txt").names
    ('Eddy',)
    """
    text = raw.strip()
    start = next((s for s in (STYLE_TAG, world.style) if s and text.startswith(s)), "")
    body = text[len(start) :]
    separator = " " if body[:1].isspace() or not start else ""
    tail = TAIL.search(body)
    event, names = body[: tail.start()].strip(), TAG.findall(tail.group(1))
    if inside := TAG.search(event):
        raise StoryFault(f"{where}: the tag <{inside[1]}> stands inside the sentence; tags belong at its end")
    if not event:
        raise StoryFault(f"{where}: has no event sentence: {raw.strip()!r}")
    return Frame(event, characters_of(names, world, where), world.style if start else "", separator if start else "")


def characters_of(names: Iterable[str], world: World, where: str) -> tuple[Character, ...]:
    """The characters that tags name.

    Raises:
        StoryFault: an unknown name, or one that occurs twice.
    """
    found: dict[str, Character] = {}
    for name in names:
        if name not in world.characters:
            guess = nearest(name, world.names)
            hint = f"nearest: {guess}" if guess else f"characters of {world.name}: {', '.join(world.names)}"
            raise StoryFault(f"{where}: unknown tag <{name}>; {hint}")
        if name in found:
            raise StoryFault(f"{where}: the tag <{name}> stands twice; a character can be in a picture once")
        found[name] = world.characters[name]
    return tuple(found.values())


def describe_world(world: World) -> dict[str, Any]:
    """Plain types, for checkpoints: what a model was customised to."""
    return {
        "name": world.name,
        "style": world.style,
        "characters": {c.name: [c.coarse_class, c.description] for c in world.characters.values()},
    }


def world_from(described: dict[str, Any]) -> World:
    """The world that `describe_world` described."""
    characters = {name: Character(name, *about) for name, about in described["characters"].items()}
    return World(described["name"], described["style"], characters)


class FrameBatch:
    """The frames of a batch. Not a sequence on purpose: Lightning would take the frames apart to move tensors."""

    def __init__(self, frames: Iterable[Frame]) -> None:
        self.frames = list(frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.frames)

    def __getitem__(self, index: int) -> Frame:
        return self.frames[index]
