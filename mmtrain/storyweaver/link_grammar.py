"""Scene graphs from a grammar: the sentences are parsed by `link-parser`, a program of its own, and its links are read.

Its Python module belongs to the system's interpreter, so the program is called. Links: Sleator and Temperley, "Parsing
English with a Link Grammar"; S a subject and its verb, O verb and object, MV verb and preposition, M noun and
preposition, J preposition and noun, SJ and VJ what "and" joins, P and I an auxiliary and its verb.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.chunking import Chunk, Chunker, sentences
from mmtrain.storyweaver.parsing import attributes_before, kind_of, scope_of
from mmtrain.storyweaver.scene import Attribute, Relation, SceneGraph
from mmtrain.storyweaver.words import AUXILIARIES, HAVING, NO_THINGS, PLACING, WEARING, fold, is_in

PROGRAM, APT = "link-parser", "apt-get install link-grammar link-grammar-dictionaries-en"
OPTIONS = ("en", "-verbosity=0", "-graphics=1", "-postscript=1", "-limit=100", "-timeout=5")
BLOCK = re.compile(r"\[(\(LEFT-WALL\).*?)\]\s*\[(\[\d+ \d+ .*?\])\]\s*\[0\]", re.DOTALL)
WORD = re.compile(r"\(([^()]*)\)")
LINK = re.compile(r"\[(\d+) (\d+) -?\d+ \(([^)]*)\)\]")
SECONDS = 60  # a caption takes less than one


class LinkGrammarParser:
    """Scene graphs from grammatical links.

    For text of other kinds than captions: where the rules find 307 mentions in TBC-Bench's training captions, 302 of
    them of characters, this finds 278 and 273. Many of the rest are sentences without a finite verb. It takes about a
    quarter of a CPU second a caption.

    Args:
        classes: coarse classes of the world's characters.
        program: path of `link-parser`; None: it is looked for.

    Raises:
        UserError: the program is not installed.
    """

    def __init__(self, classes: Sequence[str] = (), program: str | None = None) -> None:
        self.chunker = Chunker(classes)
        self.program = program or shutil.which(PROGRAM)
        if not self.program:
            raise UserError(f"parser: {PROGRAM} is not installed; on Debian: {APT}; or take the parser 'rule'")

    def parse(self, text: str) -> SceneGraph:
        """The scene graph of one or several sentences; a sentence that the grammar does not know gives nothing.

        Raises:
            UserError: the program fails.
        """
        lines = "".join(f"{sentence}.\n" for sentence in sentences(text) if sentence[:1] not in "!%")  # no commands
        try:
            done = subprocess.run(
                [self.program, *OPTIONS],
                input=lines,
                capture_output=True,
                encoding="utf-8",
                timeout=SECONDS,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"parser: {self.program}: {error}") from error
        found = Found()
        for words, links in BLOCK.findall(done.stdout):
            plain = [re.sub(r"\[.\]|\.[a-z=-]+$|^\[|\]$", "", word) for word in WORD.findall(words)]
            Linkage(plain, [(int(a), int(b), name) for a, b, name in LINK.findall(links)], self.chunker).tell(found)
        return SceneGraph(tuple(found.objects), tuple(found.attributes), tuple(found.relations))


@dataclass
class Found:
    """What is known so far, each once and in order."""

    objects: dict[str, None] = field(default_factory=dict)
    attributes: dict[Attribute, None] = field(default_factory=dict)
    relations: dict[Relation, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Linkage:
    """A parsed sentence: words without the parser's marks, and links (left word, right word, name)."""

    words: list[str]
    links: list[tuple[int, int, str]]
    chunker: Chunker

    def right(self, word: int, name: str) -> list[int]:
        """Words that this one is linked to on its right, by links whose names begin with a pattern."""
        return sorted(b for a, b, link in self.links if a == word and re.match(name, link))

    def left(self, word: int, name: str) -> list[int]:
        """The same on its left."""
        return sorted(a for a, b, link in self.links if b == word and re.match(name, link))

    def tell(self, found: Found) -> None:
        """Add what the sentence says."""
        pairs = sorted((a, b) for a, b, link in self.links if re.match(r"S(?!J|I)", link))
        for noun, verb in pairs:
            subjects = self._nouns([noun])
            for chunk in subjects:
                _note(chunk, found)
            for one in self.left(verb, "VJl") + self.right(verb, "VJr") or [verb]:
                self._clause(subjects, one, found)
        for noun in sorted({a for a, _, link in self.links if re.match(r"Mp", link)}):
            for chunk in self._nouns([noun]):
                if chunk.is_animate:
                    self._places([chunk], noun, "Mp", "", found)

    def _clause(self, subjects: list[Chunk], verb: int, found: Found) -> None:
        main, is_auxiliary = verb, fold(self.words[verb]) in AUXILIARIES
        while after := self.right(main, r"P[gv]|I|PP"):
            main = after[0]
        word = fold(self.words[main])
        shown = "" if main == verb and is_auxiliary else self.words[main]
        things = self._nouns(self.right(main, r"O(?!F)"))
        for thing in things:
            if word in HAVING or word in WEARING:
                self._attribute(subjects, thing, found)
            elif not shown and thing.is_animate:
                for subject in subjects:
                    found.attributes[Attribute(subject.text, "species", thing.text)] = None
                    found.attributes.update(dict.fromkeys(attributes_before(subject.text, thing.before)))
            elif shown:
                self._relate(subjects, shown, thing, found)
        self._places(subjects, main, r"MVp|Pp", shown if word not in HAVING | WEARING else "", found)
        for a, b in combinations([subject for subject in subjects if subject.is_animate], 2):
            found.relations[Relation(a.text, f"{shown} with".strip(), b.text, "char-char")] = None

    def _places(self, subjects: list[Chunk], word: int, link: str, verb: str, found: Found) -> None:
        """What prepositions behind a verb or a noun say of the subjects."""
        for preposition in self.right(word, link):
            begin = preposition
            while before := self.left(begin, "_I"):  # "in front of" is linked as an idiom
                begin = before[0]
            name = fold(" ".join(self.words[begin : preposition + 1]))
            for thing in self._nouns(self.right(preposition, "J")):
                kind = kind_of(thing.noun)
                if (kind == "clothing" and name == "in") or (kind and name == "with"):
                    self._attribute(subjects, thing, found)
                else:
                    kept = verb and name not in PLACING
                    self._relate(subjects, f"{verb} {name}" if kept else verb or name, thing, found)

    def _nouns(self, heads: Iterable[int]) -> list[Chunk]:
        """Noun phrases of their last words; of those that "and" joins all."""
        chunks = []
        for head in heads:
            joined = self.left(head, "SJl") + self.right(head, "SJr")
            if joined:
                chunks += self._nouns(joined)
                continue
            begin = min([*self.left(head, r"AN?\b|PHc|D"), head])
            phrase = " ".join(self.words[begin : head + 1])
            chunks += [chunk for chunk in self.chunker.chunks(phrase) if chunk.kind == "noun"][-1:]
        return chunks

    def _attribute(self, subjects: Iterable[Chunk], thing: Chunk, found: Found) -> None:
        for subject in subjects:
            found.attributes[Attribute(subject.text, kind_of(thing.noun) or "other", thing.text)] = None

    def _relate(self, subjects: Iterable[Chunk], predicate: str, thing: Chunk, found: Found) -> None:
        _note(thing, found)
        for subject in subjects:
            if subject.is_animate and subject.text != thing.text and not is_in(thing.noun, NO_THINGS):
                scope = scope_of(thing.noun, thing.is_animate)
                found.relations[Relation(subject.text, predicate, thing.text, scope)] = None


def _note(chunk: Chunk, found: Found) -> None:
    if not is_in(chunk.noun, NO_THINGS):
        found.objects[chunk.text] = None
        found.attributes.update(dict.fromkeys(attributes_before(chunk.text, chunk.before)))
