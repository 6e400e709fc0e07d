"""What is read from one picture or sentence, and who reads it: scene graphs, and the roles of the Character-Graph.

The roles are protocols; a plug-in is any object with the named method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mmtrain.story import StoryFault

DESCRIBE_CHARACTER = "Describe the main character in this picture in detail: kind, colours, face, clothes."
DESCRIBE_FRAME = "Describe this picture in detail in one sentence: who is in it, what they do, and where."
Kind = Literal["color", "part", "clothing", "accessory", "species", "other"]
Scope = Literal["char-char", "char-object", "char-scene"]
BEFORE = ("color", "species")  # kinds that stand before the noun


@dataclass(frozen=True)
class Attribute:
    """One property of an object, A_i^k of eq. (2): `Attribute("beaver", "part", "reddish round nose")`."""

    subject: str
    kind: Kind
    text: str

    @property
    def phrase(self) -> str:
        """In words of its own: colours and kinds stand before what they tell of.

        >>> Attribute("beaver", "color", "pink").phrase
        'pink beaver'
        """
        return f"{self.text} {self.subject}" if self.kind in BEFORE else self.text


@dataclass(frozen=True)
class Relation:
    """What one object has to do with another: `Relation("beaver", "skiing", "snowy mountain", "char-scene")`."""

    subject: str
    predicate: str
    object: str
    scope: Scope


@dataclass(frozen=True)
class SceneGraph:
    """What a parser finds in a text: objects in order of mention, their attributes (SG^A), their relations (SG^R)."""

    objects: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    relations: tuple[Relation, ...] = ()


class Captioner(Protocol):
    """V_cap of the paper: a picture and an instruction to words."""

    def caption(self, image: Path, instruction: str) -> str: ...


class Parser(Protocol):
    """A text to its scene graph."""

    def parse(self, text: str) -> SceneGraph: ...


class AmbiguousMention(StoryFault):
    """A mention that means several characters equally well: `candidates`."""

    def __init__(self, mention: str, candidates: Sequence[str]) -> None:
        super().__init__(f"{mention!r} may mean {', '.join(candidates)}: say more of the character")
        self.candidates = tuple(candidates)


class NoMatch(StoryFault):
    """A mention that means none of the characters."""

    def __init__(self, mention: str, known: Iterable[str]) -> None:
        super().__init__(f"{mention!r} means none of the characters; there are: {', '.join(known)}")


def description_of(coarse_class: str, attributes: Iterable[Attribute]) -> str:
    """W_c of eq. (7): class (+) attributes, as one sentence.

    >>> nose, dress = Attribute("beaver", "part", "round nose"), Attribute("beaver", "clothing", "white dress")
    >>> description_of("beaver", [Attribute("beaver", "color", "pink"), nose, dress])
    'This pink beaver has round nose, wearing white dress.'
    """
    texts: dict[str, list[str]] = {"before": [], "worn": [], "has": []}
    for attribute in attributes:
        worn = attribute.kind in ("clothing", "accessory")
        texts["before" if attribute.kind in BEFORE else "worn" if worn else "has"].append(attribute.text)
    has = f" has {_listed(texts['has'])}" if texts["has"] else ""
    worn = f"{',' * bool(has)} wearing {_listed(texts['worn'])}" if texts["worn"] else ""
    return f"This {' '.join([*texts['before'], coarse_class])}{has}{worn}."


def event_of(relations: Iterable[Relation]) -> str:
    """W_e of eq. (8): subject (+) relation (+) object over pairs, as one sentence.

    >>> event_of([Relation("beaver", "skiing with", "bear", "char-char")])
    'Beaver skiing with bear.'
    """
    text = ", ".join(f"{r.subject} {r.predicate} {r.object}" for r in relations)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
