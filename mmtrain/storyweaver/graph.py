"""The Character-Graph (C-CG, StoryWeaver eq. 1 to 8): a world's characters with their attributes, and its pictures with
who stands in them and what happens, as data that prompts come from.

Captions make it: `CharacterGraph.build` has portraits and pictures described, the sentences parsed and each mention
("a polar bear") looked up among the characters. Kept as JSON; `graph.text(key).prompt()` is a picture's prompt.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mmtrain.config_errors import nearest
from mmtrain.story import TAG, Character, Frame, StoryFault, World, characters_of, parse_caption
from mmtrain.storyweaver.plain_data import check_keys, dataclass_from
from mmtrain.storyweaver.scene import (
    DESCRIBE_CHARACTER,
    DESCRIBE_FRAME,
    AmbiguousMention,
    Attribute,
    Captioner,
    NoMatch,
    Parser,
    Relation,
    description_of,
    event_of,
)
from mmtrain.storyweaver.words import fold

FORMAT = 1
Texts = Literal["captions", "graph"]


@dataclass(frozen=True)
class CharacterEntry:
    """A character of the vocabulary.

    Args:
        coarse_class: the words that event sentences call it by.
        attributes: what its portraits' captions tell of it, eq. (2).
        description: its line in prompts, W_c of eq. (7).
        portraits: pictures of it alone, relative to the world's folder if they lie in it.
    """

    name: str
    world: str
    coarse_class: str
    attributes: tuple[Attribute, ...]
    description: str
    portraits: tuple[str, ...] = ()

    @property
    def phrases(self) -> list[str]:
        """Attributes in words of their own, as the paper's figure lists them."""
        return [attribute.phrase for attribute in self.attributes]


@dataclass(frozen=True)
class Vocabulary:
    """The characters by name, in a fixed order."""

    entries: dict[str, CharacterEntry]

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def character(self, name: str) -> Character:
        """The character as prompts need it."""
        entry = self.entries[name]
        return Character(entry.name, entry.coarse_class, entry.description)


class Retriever(Protocol):
    """Sim of eq. (6): the name of the character that a mention means. Raises AmbiguousMention or NoMatch.

    `is_mention` tells whether a phrase may mean a character at all; "snow" and "wooden table" do not.
    """

    def match(self, mention: str, vocabulary: Vocabulary) -> str: ...

    def is_mention(self, phrase: str, vocabulary: Vocabulary) -> bool: ...


@dataclass(frozen=True)
class Mention:
    """A phrase of an event sentence that may mean a character: the one it means, or the `candidates` if it is open
    between several; neither for one who is no character of this world."""

    text: str
    character: str | None = None
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrameText:
    """The boxes of the paper's figure, Style, Event, Char 1, Char 2, ...; characters from left to right."""

    style: str
    event: str
    characters: tuple[Character, ...]
    separator: str = " "

    @property
    def frame(self) -> Frame:
        """The same, as models take it."""
        return Frame(self.event, self.characters, self.style, self.separator)

    def prompt(self) -> str:
        """T_g: style (+) W_e (+) W_c^1 (+) ... (+) W_c^J."""
        return self.frame.prompt


@dataclass(frozen=True)
class PictureEntry:
    """A picture of the graph.

    Args:
        key: unique; `<group>/<number>` in the benchmark's layout.
        event: W_e of eq. (8), the sentence.
        characters: names, from left to right.
        mentions: who the sentence speaks of, in its order, eq. (5) and (6).
        relations: with the words of the sentence; see `CharacterGraph.relations` for names.
        has_style, separator: how the caption begins: without the style, or with no space after it.
    """

    key: str
    event: str
    characters: tuple[str, ...]
    mentions: tuple[Mention, ...] = ()
    relations: tuple[Relation, ...] = ()
    has_style: bool = True
    separator: str = " "

    @property
    def agrees(self) -> bool:
        """Whether the mentions mean just the characters that the picture shows."""
        return {mention.character for mention in self.mentions if mention.character} == set(self.characters)


@dataclass(frozen=True)
class Portraits:
    """Pictures of one character alone. Without a `coarse_class` it is taken from what the captions say it is."""

    name: str
    pictures: tuple[Path, ...]
    coarse_class: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture to describe; `characters` from left to right, None if the caption is to tell who is there."""

    key: str
    path: Path
    characters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CharacterGraph:
    """G(O, E): style, characters, pictures. `relations` joins those of all pictures."""

    world: str
    style: str
    vocabulary: Vocabulary
    pictures: dict[str, PictureEntry] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        portraits: Sequence[Portraits],
        captioner: Captioner,
        parser: Parser,
        retriever: Retriever,
        pictures: Iterable[Picture] = (),
        world: str = "",
        style: str = "",
        texts: Texts = "captions",
        root: Path | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "CharacterGraph":
        """Eq. (1) to (8).

        Args:
            texts: what descriptions and events are: "captions" as they were written, for captions that are prompts
                already (the released texts); "graph" composed by eq. (7) and (8), for captions of many sentences.
            root: portraits are kept relative to this folder.
            progress: called with the number of pictures done.

        Raises:
            StoryFault: two portraits of one name, a character whose coarse class nobody tells, or a caption that cannot
                be read; names the character or the picture.
        """
        entries: dict[str, CharacterEntry] = {}
        for portrait in portraits:
            if portrait.name in entries:
                raise StoryFault(f"the character {portrait.name} has portraits twice")
            entry = describe_character(portrait, captioner, parser, world, texts)
            shown = [
                path.relative_to(root) if root and path.is_relative_to(root) else path for path in portrait.pictures
            ]
            entries[portrait.name] = replace(entry, portraits=tuple(path.as_posix() for path in shown))
        graph = cls(world, style, Vocabulary(entries))
        for number, picture in enumerate(pictures, start=1):
            if picture.key in graph.pictures:
                raise StoryFault(f"{picture.path}: there is a picture {picture.key} already")
            raw = captioner.caption(picture.path, DESCRIBE_FRAME)
            entry = graph.read(raw, parser, retriever, picture.key, picture.characters, str(picture.path))
            event = event_of(entry.relations) if texts == "graph" else ""
            graph.pictures[picture.key] = replace(entry, event=event or entry.event)
            if progress:
                progress(number)
        return graph

    def read(
        self,
        raw: str,
        parser: Parser,
        retriever: Retriever,
        key: str = "",
        characters: Sequence[str] | None = None,
        where: str = "caption",
    ) -> PictureEntry:
        """Eq. (3), (5), (6) for a caption, of this world's pictures or of a new one.

        Args:
            raw: with or without style and tags; a text without any tag is a plain sentence and gets the style.
            characters: from left to right; None: the tags', and without tags those mentioned, in order of mention.

        Raises:
            StoryFault: see `mmtrain.story.parse_caption`; or a name that is no character.
        """
        is_plain = not TAG.search(raw)
        raw = " ".join(raw.split()) if is_plain else raw
        frame = parse_caption(raw, self.as_world(), where)
        scene = parser.parse(frame.event)
        mentions = tuple(
            resolve(phrase, self.vocabulary, retriever)
            for phrase in scene.objects
            if retriever.is_mention(phrase, self.vocabulary)
        )
        if characters is None:
            characters = frame.names or dict.fromkeys(m.character for m in mentions if m.character)
        names = tuple(c.name for c in characters_of(characters, self.as_world(), where))
        return PictureEntry(
            key,
            frame.event,
            names,
            mentions,
            scene.relations,
            has_style=bool(frame.style) or is_plain,
            separator=" " if is_plain and not frame.style else frame.separator,
        )

    def text(self, picture: str | PictureEntry) -> FrameText:
        """The boxes of a picture of the graph (its key) or of one that `read` returned.

        Raises:
            StoryFault: no such key; names the nearest.
        """
        if isinstance(picture, str):
            if picture not in self.pictures:
                guess = nearest(picture, self.pictures)
                raise StoryFault(
                    f"the graph of {self.world} has no picture {picture}{f'; nearest: {guess}' * bool(guess)}"
                )
            picture = self.pictures[picture]
        characters = tuple(self.vocabulary.character(name) for name in picture.characters)
        return FrameText(self.style if picture.has_style else "", picture.event, characters, picture.separator)

    @property
    def relations(self) -> tuple[Relation, ...]:
        """Eq. (4): those of all pictures, each once, with characters by their names where mentions tell them."""
        found: dict[Relation, None] = {}
        for picture in self.pictures.values():
            names = {mention.text: mention.character for mention in picture.mentions if mention.character}
            for r in picture.relations:
                found[
                    Relation(names.get(r.subject, r.subject), r.predicate, names.get(r.object, r.object), r.scope)
                ] = None
        return tuple(found)

    def as_world(self) -> World:
        """The story world, as models and data modules know it."""
        characters = {name: self.vocabulary.character(name) for name in self.vocabulary.names}
        return World(self.world, self.style, characters)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; see `from_dict`."""
        characters = {name: asdict(entry) for name, entry in self.vocabulary.entries.items()}
        pictures = {key: asdict(entry) for key, entry in self.pictures.items()}
        for entry in (*characters.values(), *pictures.values()):
            entry.pop("name", None) or entry.pop("key")
        for entry in characters.values():
            entry.pop("world")
        head = {"format": FORMAT, "world": self.world, "style": self.style}
        return json.loads(json.dumps(head | {"characters": characters, "pictures": pictures}))  # tuples become lists

    @classmethod
    def from_dict(cls, content: Any, where: str = "graph") -> "CharacterGraph":
        """The graph that `to_dict` wrote.

        Raises:
            StoryFault: another format, a key that lacks, is unknown or of another type, or a picture that shows nobody
                of the graph; names `where` and the key.
        """
        check_keys(where, content, {"format": int, "world": str, "style": str, "characters": dict, "pictures": dict})
        if content["format"] != FORMAT:
            raise StoryFault(f"{where}: format is {content['format']}, this version reads {FORMAT}: build it again")
        about = {"world": content["world"]}
        entries = {
            name: dataclass_from(CharacterEntry, {"name": name} | about, value, f"{where}: characters.{name}")
            for name, value in content["characters"].items()
        }
        pictures = {
            key: dataclass_from(PictureEntry, {"key": key}, value, f"{where}: pictures.{key}")
            for key, value in content["pictures"].items()
        }
        graph = cls(content["world"], content["style"], Vocabulary(entries), pictures)
        for key, picture in pictures.items():
            characters_of(picture.characters, graph.as_world(), f"{where}: pictures.{key}.characters")
        return graph

    def save(self, path: Path) -> None:
        """Write the graph as JSON.

        Raises:
            StoryFault: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StoryFault(f"{path}: cannot be written ({error.strerror}); --out names another file") from error

    @classmethod
    def load(cls, path: Path) -> "CharacterGraph":
        """Read a graph of `save`.

        Raises:
            StoryFault: no such file, not JSON, or no graph; see `from_dict`.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoryFault(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise StoryFault(f"{path}: not JSON: {error}") from error
        return cls.from_dict(content, str(path))


def describe_character(
    portraits: Portraits, captioner: Captioner, parser: Parser, world: str = "", texts: Texts = "captions"
) -> CharacterEntry:
    """Eq. (1), (2), (7): captions of a character's portraits, and what they tell of the character itself.

    Raises:
        StoryFault: no portraits, or none of the captions says what the character is.
    """
    name = portraits.name
    captions = list(dict.fromkeys(captioner.caption(path, DESCRIBE_CHARACTER) for path in portraits.pictures))
    if not captions:
        raise StoryFault(f"the character {name} has no portrait")
    scenes = [parser.parse(caption) for caption in captions]
    coarse = portraits.coarse_class or _class_told(name, [a for s in scenes for a in s.attributes], scenes[0].objects)
    if not coarse:
        raise StoryFault(f"{portraits.pictures[0]}: {captions[0]!r} does not say what {name} is: give its coarse class")
    meant = {fold(name), fold(coarse), fold(coarse).split()[-1]}
    found = [
        a for scene in scenes for a in scene.attributes if fold(a.subject) in meant and fold(a.text) != fold(coarse)
    ]
    attributes = tuple(dict.fromkeys(Attribute(coarse, a.kind, a.text) for a in found))
    description = captions[0] if texts == "captions" else description_of(coarse, attributes)
    return CharacterEntry(name, world, coarse, attributes, description)


def _class_told(name: str, attributes: Sequence[Attribute], objects: Sequence[str]) -> str | None:
    """ "Tongtong is a dragon", or a text whose first object has no other name."""
    is_a = (a.text for a in attributes if a.kind == "species" and fold(a.subject) == fold(name))
    return next(is_a, None) or next((thing for thing in objects[:1] if fold(thing) != fold(name)), None)


def resolve(phrase: str, vocabulary: Vocabulary, retriever: Retriever) -> Mention:
    """A phrase as a mention, of whom it may be."""
    try:
        return Mention(phrase, retriever.match(phrase, vocabulary))
    except AmbiguousMention as error:
        return Mention(phrase, candidates=error.candidates)
    except NoMatch:
        return Mention(phrase)
