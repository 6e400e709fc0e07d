"""A sentence in noun phrases, verbs and prepositions, by word lists and what stands before a word."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmtrain.storyweaver.words import (
    ADVERBS,
    ANIMATE,
    AUXILIARIES,
    CLAUSE_WORDS,
    COLORS,
    COMPOUND_PREPOSITIONS,
    DETERMINERS,
    HAVING,
    NOUNS,
    PREPOSITIONS,
    PRONOUNS,
    WEARING,
    fold,
    is_in,
    is_verb,
    singular,
)

ChunkKind = Literal["noun", "verb", "be", "prep", "join", "pronoun"]
CLOSED = PREPOSITIONS | AUXILIARIES | HAVING | WEARING | PRONOUNS | CLAUSE_WORDS | DETERMINERS | ADVERBS | {","}
NOT_ADVERBS = {"family", "fly", "belly", "jelly", "lily", "butterfly", "curly", "early", "friendly", "lovely"}


@dataclass(frozen=True)
class Chunk:
    """A piece of a sentence.

    Args:
        kind: "noun" a noun phrase, "verb", "be" a form of to be, "prep", "join" a comma or a word as "and", "pronoun".
        text: as written; a noun phrase without its determiner, and if it has a coarse class only that.
        before: of a noun phrase with a class, the words before it.
        determiner: of a noun phrase, folded.
        noun: its last word, folded.
        is_class: whether it has a coarse class.
    """

    kind: ChunkKind
    text: str
    before: tuple[str, ...] = ()
    determiner: str = ""
    noun: str = ""
    is_class: bool = False

    @property
    def is_animate(self) -> bool:
        return self.is_class or is_in(self.noun, ANIMATE)


def sentences(text: str) -> list[str]:
    """The sentences of a text, without what ends them.

    >>> sentences("A fox runs. It smiles .")
    ['A fox runs', 'It smiles']
    """
    return [part.strip(" .!?;") for part in re.split(r"(?<=[.!?;])\s+|\n", text) if part.strip(" .!?;")]


class Chunker:
    """Cuts sentences.

    Args:
        classes: coarse classes of the world's characters, "polar bear"; a phrase that ends in one is cut behind it.

    >>> [(chunk.kind, chunk.text) for chunk in Chunker(["fox"]).chunks("The red fox plays on a wooden floor")]
    [('noun', 'fox'), ('verb', 'plays'), ('prep', 'on'), ('noun', 'wooden floor')]
    """

    def __init__(self, classes: Sequence[str] = ()) -> None:
        phrases = [(_singular_end(fold(name).split()), name) for name in classes]
        self.classes = sorted(phrases, key=lambda phrase: -len(phrase[0]))

    def chunks(self, sentence: str) -> list[Chunk]:
        """The sentence in pieces; adverbs are left out."""
        words = re.findall(r"[\w'’-]+|,", sentence)
        folded = [fold(word) for word in words]
        found: list[Chunk] = []
        i = 0
        while i < len(words):
            kind, size = self._closed(folded, i)
            if kind is None and not self._class_at(folded, i):
                if is_adverb(folded[i]):
                    i += 1
                    continue
                kind = "verb" if self._is_verb_at(folded, i, found[-1].kind if found else "") else None
            if kind:
                found.append(Chunk(kind, " ".join(words[i : i + size])))
            else:
                chunk, size = self._noun_phrase(words, folded, i)
                found += [chunk] if chunk else []
            i += size
        return found

    def _closed(self, folded: list[str], i: int) -> tuple[ChunkKind | None, int]:
        """Kind and number of words of what one of the lists of function words tells, else None."""
        word, after = folded[i], folded[i + 1 : i + 2]
        if size := _compound(folded, i):
            return "prep", size
        if word in PRONOUNS or (word == "her" and (not after or after[0] in CLOSED)):
            return "pronoun", 1
        lists = (
            (AUXILIARIES, "be"),
            (HAVING | WEARING, "verb"),
            (CLAUSE_WORDS | {","}, "join"),
            (PREPOSITIONS, "prep"),
        )
        return next((kind for known, kind in lists if word in known), None), 1

    def _class_at(self, folded: list[str], i: int) -> tuple[int, str] | None:
        """Number of words and name of the coarse class that begins here."""
        for phrase, name in self.classes:
            if _singular_end(folded[i : i + len(phrase)]) == phrase:
                return len(phrase), name
        return None

    def _is_verb_at(self, folded: list[str], i: int, before: str) -> bool:
        """Whether a word that begins a chunk is a verb, told by the kind of the chunk before."""
        word, after = folded[i], folded[i + 1] if i + 1 < len(folded) else ""
        if before in ("prep", "verb") or word in DETERMINERS:
            return False
        if before == "noun":  # it ended here because of this word; behind a class any word is a verb
            return True
        if word.endswith("ing") and len(word) > 4 and not is_in(word, NOUNS):
            return is_verb(word) or not is_in(after, NOUNS)  # not: "racing helmet"
        return before != "" and is_verb(word) and not is_in(after, NOUNS)  # not: "fall foliage"

    def _noun_phrase(self, words: list[str], folded: list[str], start: int) -> tuple[Chunk | None, int]:
        """The noun phrase that begins here, None if it is a determiner alone; and its number of words."""
        i = start
        while i < len(words) and folded[i] in DETERMINERS:
            i += 1
        determiner = folded[i - 1] if i > start else ""
        content: list[str] = []
        while i < len(words):
            if own := self._class_at(folded, i):
                i += own[0]
                while i < len(words) and folded[i] in ANIMATE:  # "robot cat"
                    i += 1
                noun = fold(own[1]).split()[-1]
                return Chunk("noun", own[1], tuple(content), determiner, noun, True), i - start
            is_color = bool(content) and fold(content[-1]) in COLORS
            if is_color and self._goes_on(folded, i, bool(determiner)):
                content += ["and"] * (folded[i] == "and")
            elif _ends_noun(folded, i, fold(content[-1]) if content else ""):
                break
            else:
                content.append(words[i])
            i += 1
        if not content:
            return None, max(1, i - start)
        text, noun = " ".join(content), fold(content[-1])
        if folded[i : i + 1] == ["of"]:
            part, size = self._noun_phrase(words, folded, i + 1)
            if part and not part.is_class:
                noun, i = noun if is_in(noun, NOUNS) else part.noun, i + 1 + size
                text = f"{text} of {part.text}"
        return Chunk("noun", text, (), determiner, noun), i - start

    def _goes_on(self, folded: list[str], i: int, has_determiner: bool) -> bool:
        """Whether a colour before "and" or comma goes with the noun behind: "red and white hat", "a dark, old hut"."""
        after = folded[i + 1] if i + 1 < len(folded) else ","
        if folded[i] == "and":
            return after in COLORS and not self._class_at(folded, i + 1)
        return folded[i] == "," and has_determiner and after not in CLOSED and not self._class_at(folded, i + 1)


def is_adverb(word: str) -> bool:
    """Whether a folded word is one, told by a list and by its ending."""
    return word in ADVERBS or (word.endswith("ly") and len(word) > 4 and word not in NOT_ADVERBS)


def _compound(folded: list[str], i: int) -> int:
    """Number of words of the preposition of several words that begins here, else 0."""
    return next((len(c) for c in COMPOUND_PREPOSITIONS if tuple(folded[i : i + len(c)]) == c), 0)


def _ends_noun(folded: list[str], i: int, last: str) -> bool:
    """Whether the word at i ends a noun phrase; `last` is the phrase's word before it, "" if there is none."""
    word = folded[i]
    if word in CLOSED or is_adverb(word) or _compound(folded, i):
        return True
    if not last:
        return False
    if word in NOUNS:  # "in a dress smile"; not "a sad smile"
        return is_verb(word) and is_in(last, NOUNS)
    if last in COLORS:  # "in the dark looking worried"
        return word.endswith("ing") and is_verb(word)
    return is_verb(word) or (word.endswith("ing") and len(word) > 4 and not is_in(word, NOUNS))


def _singular_end(phrase: list[str]) -> list[str]:
    return [*phrase[:-1], singular(phrase[-1])] if phrase else phrase
