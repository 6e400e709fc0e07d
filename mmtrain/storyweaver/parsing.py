"""Captions to scene graphs by rules, for their plain grammar: who is there, what they do, where, and what they wear.

A sentence is cut into noun phrases, verbs and prepositions (`chunking.py`) and read from left to right.
"""

from collections.abc import Sequence
from itertools import combinations

from mmtrain.storyweaver.chunking import Chunk, Chunker, sentences
from mmtrain.storyweaver.scene import Attribute, Kind, Relation, SceneGraph, Scope
from mmtrain.storyweaver.words import (
    ACCESSORIES,
    CLOTHING,
    COLORS,
    HAVING,
    NO_THINGS,
    NUMBERS,
    PARTS,
    PLACING,
    POSSESSIVES,
    SCENES,
    SEEMING,
    STATES,
    WEARING,
    fold,
    is_in,
)

KINDS: dict[Kind, frozenset[str]] = {"clothing": CLOTHING, "accessory": ACCESSORIES, "part": PARTS}
PLURAL_PRONOUNS = ("they", "them")


class RuleParser:
    """Scene graphs by rules.

    Attributes come from "has X, Y and Z", "with X", "wearing X", "in X" where X is clothing, and words before a class.
    Relations come from verbs and prepositions; "A and B are skiing on a mountain" gives (A, skiing, mountain),
    (B, skiing, mountain) and (A, skiing with, B).

    Args:
        classes: coarse classes of the world's characters, "polar bear". Of other nouns short lists are known.

    >>> RuleParser(["fox"]).parse("A fox in a red coat runs through a forest.").relations
    (Relation(subject='fox', predicate='runs through', object='forest', scope='char-scene'),)
    """

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.chunker = Chunker(classes)

    def parse(self, text: str) -> SceneGraph:
        """The scene graph of one or several sentences."""
        reader = Reader()
        for sentence in sentences(text):
            reader.read(self.chunker.chunks(sentence))
        return SceneGraph(*(tuple(found) for found in (reader.objects, reader.attributes, reader.relations)))


def kind_of(noun: str) -> Kind | None:
    """Of an attribute, by its noun: "part", "clothing", "accessory", or None if no list has it."""
    return next((kind for kind, known in KINDS.items() if is_in(noun, known)), None)


def scope_of(noun: str, is_animate: bool) -> Scope:
    """Of a relation, by its object."""
    return "char-char" if is_animate else "char-scene" if is_in(noun, SCENES) else "char-object"


def attributes_before(subject: str, before: Sequence[str]) -> list[Attribute]:
    """The words before a class: its colour, and what narrows the kind.

    >>> [a.phrase for a in attributes_before("fox", ["brown", "fennec"])]
    ['brown fox', 'fennec fox']
    """
    colors = [word for word in before if fold(word) in COLORS or word == "and"]
    others = [word for word in before if word not in colors]
    found = [Attribute(subject, "color", " ".join(colors))] if colors else []
    return found + [Attribute(subject, "species", " ".join(others))] * bool(others)


class Reader:
    """Reads chunks of one sentence after the other; `objects`, `attributes` and `relations` are what it found.

    It keeps who is spoken of (`subjects`), the verb and preposition that the next noun phrase belongs to, and its role:
    a "subject", an "object", something that the subjects "have", what they are ("is"), or "aside", told of an object.
    """

    def __init__(self) -> None:
        self.objects: dict[str, None] = {}
        self.attributes: dict[Attribute, None] = {}
        self.relations: dict[Relation, None] = {}
        self.subjects: list[Chunk] = []
        self.spoken_of: list[Chunk] = []  # the subjects of the clause before, for pronouns
        self._start()

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Read one sentence."""
        self._start()
        self.nouns: list[Chunk] = []
        for k, chunk in enumerate(chunks):
            before = chunks[k - 1] if k else None
            if chunk.kind in ("noun", "pronoun"):
                self._noun(chunk, chunks, k)
                self.nouns += [chunk] * (chunk.kind == "noun")
            elif chunk.kind == "be":
                self.role, self.prep, self.has_verb = "is", "", True
            elif chunk.kind == "prep":
                self._preposition(chunk, before)
            elif chunk.kind == "verb":
                self._verb(chunk, before)
            elif chunk.text in ("which", "who") and self.nouns:
                self._start(self.nouns[-1:])
            elif before and before.kind == "prep":  # "yellow feathers around, blue shirt"
                self.prep = ""
        self._start()

    def _start(self, subjects: Sequence[Chunk] = ()) -> None:
        """End a clause, with what its subjects do together, and begin the next."""
        animate = [subject for subject in self.subjects if subject.is_animate]
        if len(animate) > 1 and self.is_joined:
            predicate = f"{self.first_verb} with".strip()
            for a, b in combinations(animate, 2):
                self._add(Relation(a.text, predicate, b.text, "char-char"))
        self.spoken_of = animate or self.spoken_of
        self.subjects = list(subjects)
        self.role, self.verb, self.first_verb, self.prep, self.has_verb = "subject", "", "", "", False
        self.places: list[tuple[str, Chunk]] = []  # what stood before the subject: "In the forest, a fox ..."
        self.last: list[Attribute] = []
        self.is_joined = True  # subjects are named together, not by a pronoun

    def _verb(self, chunk: Chunk, before: Chunk | None) -> None:
        word = fold(chunk.text)
        if self.prep == "with" and before and before.kind == "noun" and self.role == "object":
            self._start([before])  # "with a bird flying"
        self.role = "have" if word in HAVING or word in WEARING else "object"
        self.verb, self.prep, self.has_verb, self.last = chunk.text, "", True, []
        if self.role == "object":
            self.first_verb = self.first_verb or chunk.text
            places, self.places = self.places, []
            for prep, noun in places:
                self._relate(noun, prep)

    def _preposition(self, chunk: Chunk, before: Chunk | None) -> None:
        is_of_noun = self.prep == "with" and before is not None and before.kind == "noun" and self.role == "object"
        if is_of_noun and before.is_animate:  # "with a reindeer next to him"
            self._start([before])
        elif is_of_noun:  # "with posters on the wall"
            self.role = "aside"
        self.prep = fold(chunk.text)
        if self.prep in STATES and before and before.kind == "noun":
            self.role = "aside"
        if self.role == "aside":
            return
        if self.prep == "surrounded by":
            self.verb = ""
        is_more = self.prep not in ("with", "in") or (self.prep == "with" and before and before.kind == "noun")
        if self.role != "have" or not is_more:  # more of what they have: "a helmet with the letter P"
            self.role = "object"

    def _noun(self, chunk: Chunk, chunks: Sequence[Chunk], k: int) -> None:
        after = chunks[k + 1].kind if k + 1 < len(chunks) else ""
        if self._opens_clause(chunks, k):
            self._start()
        if chunk.kind == "pronoun":
            self._pronoun(fold(chunk.text))
        elif self.role == "subject":
            self._note(chunk)
            self.subjects.append(chunk)
        elif self.role == "is":
            if after != "verb":  # "are ice fishing"
                self._is(chunk)
        elif self.role == "aside":
            self._note(chunk)
        elif self.role == "have":
            self._has(chunk)
        elif self.prep in ("with", "in") and self._is_property(chunk):
            self._has(chunk)
            self.role = "have"
        elif not self.prep and fold(self.verb) in SEEMING and not chunk.determiner:
            self._attribute(chunk, "other", chunk.text)
        else:
            self._note(chunk)
            self._relate(chunk, self.prep)

    def _opens_clause(self, chunks: Sequence[Chunk], k: int) -> bool:
        """Whether a noun phrase behind a comma or "and" begins a new clause: its own verb follows."""
        if not k or chunks[k - 1].kind != "join" or not (self.has_verb or not self.subjects):
            return False
        if self.role == "subject":
            return False
        while k + 2 < len(chunks) and chunks[k + 1].kind == "join" and chunks[k + 2].kind == "noun":
            k += 2
        k += k + 1 < len(chunks) and chunks[k + 1].text == ","
        after = chunks[k + 1] if k + 1 < len(chunks) else None
        if not self.subjects and after and after.kind in ("be", "verb"):
            places = self.places
            self._start()
            self.places = places
            return False
        is_finite = after is not None and after.kind == "verb" and not after.text.endswith("ing")
        return after is not None and (after.kind == "be" or is_finite)

    def _is_property(self, chunk: Chunk) -> bool:
        """Whether "with X" or "in X" tells of the subject and not of where it is."""
        kind = kind_of(chunk.noun)
        return bool(self.subjects) and (kind == "clothing" or (self.prep == "with" and kind is not None))

    def _pronoun(self, word: str) -> None:
        others = [chunk for chunk in self.spoken_of if chunk not in self.subjects]
        meant = self.spoken_of if word in PLURAL_PRONOUNS else (others or self.spoken_of)[-1:]
        if self.role == "subject":
            self.subjects += [chunk for chunk in meant if chunk not in self.subjects]
            self.is_joined = False
        elif self.role == "object" and others:
            for chunk in meant:
                self._relate(chunk, self.prep)

    def _is(self, chunk: Chunk) -> None:
        """What the subjects are: a kind, with the words before it, or something else that is told of them."""
        words = [*chunk.before, *chunk.text.split()] if not chunk.is_class else [*chunk.before]
        if chunk.is_animate:
            before = words if chunk.is_class else words[:-1]
            for subject in self.subjects:
                self._keep(Attribute(subject.text, "species", chunk.text if chunk.is_class else chunk.text.split()[-1]))
                for attribute in attributes_before(subject.text, before):
                    self._keep(attribute)
        elif all(fold(word) in COLORS for word in words):
            self._attribute(chunk, "color", chunk.text)
        elif not chunk.determiner:
            self._attribute(chunk, "other", chunk.text)

    def _has(self, chunk: Chunk) -> None:
        kind = kind_of(chunk.noun)
        if kind is None and (chunk.is_animate or is_in(chunk.noun, SCENES)):  # "wearing a dress, the sea behind her"
            self.role = "object"
            self._note(chunk)
            if self.prep:
                self._relate(chunk, self.prep)
        elif self.prep and self.prep not in ("with", "in") and self.last:
            if chunk.determiner not in POSSESSIVES:  # "white feather around black nose"; not "on her head"
                for attribute in self.last:
                    self.attributes.pop(attribute, None)
                longer = [Attribute(a.subject, a.kind, f"{a.text} {self.prep} {chunk.text}") for a in self.last]
                self.last = []
                for attribute in longer:
                    self._keep(attribute)
            self.prep = ""
        else:
            self._attribute(chunk, kind or "other", chunk.text)

    def _attribute(self, chunk: Chunk, kind: Kind, text: str) -> None:
        """An attribute of the subjects; before the verb of the last of them only."""
        self.last = []
        text = " ".join([*[chunk.determiner] * (chunk.determiner in NUMBERS), *chunk.before, text])
        for subject in self.subjects if self.has_verb else self.subjects[-1:]:
            self._keep(Attribute(subject.text, kind, text))

    def _keep(self, attribute: Attribute) -> None:
        self.attributes[attribute] = None
        self.last.append(attribute)

    def _relate(self, chunk: Chunk, prep: str) -> None:
        """What the subjects have to do with a thing."""
        if is_in(chunk.noun, NO_THINGS):
            return
        if not self.subjects:
            self.places.append((prep, chunk))
            return
        verb = "" if prep == "with" and not chunk.is_animate else self.verb
        shown = "" if verb and prep in PLACING else prep  # "skiing on a mountain" is skiing
        for subject in self.subjects if self.has_verb else self.subjects[-1:]:
            if subject.is_animate and subject != chunk and (verb or shown):
                predicate = f"{verb} {shown}".strip()
                self._add(Relation(subject.text, predicate, chunk.text, scope_of(chunk.noun, chunk.is_animate)))

    def _add(self, relation: Relation) -> None:
        self.relations[relation] = None

    def _note(self, chunk: Chunk) -> None:
        """Something that is there, with what stands before its class."""
        if not is_in(chunk.noun, NO_THINGS):
            self.objects[chunk.text] = None
            for attribute in attributes_before(chunk.text, chunk.before):
                self.attributes[attribute] = None
