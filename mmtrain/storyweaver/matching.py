"""Who a mention means, Sim of eq. (6), without a network: coarse classes, then words in common, then text features."""

from typing import Any, Protocol

from mmtrain.storyweaver.graph import CharacterEntry, Vocabulary
from mmtrain.storyweaver.scene import AmbiguousMention, NoMatch
from mmtrain.storyweaver.words import ANIMATE, DETERMINERS, fold, is_in, singular, tokens


class TextEncoder(Protocol):
    """Pooled text features: texts to a tensor [B, D]; any of `mmtrain.storyweaver.features` that knows texts."""

    def text_features(self, texts: list[str]) -> Any: ...


class ClassRetriever:
    """The character that a mention means.

    1. The mention, in lower case and without accents, is a coarse class or holds one as whole words, and of one
       character only (the longest class if there are several).
    2. Jaccard overlap of the mention's words and those of class and attributes. Characters whose class ends in the
       mention's noun come first, "blue penguin"; others must reach `threshold`. Candidates that share the same words
       with the mention are a tie: only the lengths of their descriptions would tell them apart.
    3. With a text encoder, among what is left: cosine of the features of mention and of "class, attributes".

    Args:
        threshold: least overlap without a common noun, 0..1.
        encoder: see TextEncoder.
        min_cosine: least cosine of step 3.
        margin: by how much the best overlap (step 2) and cosine (step 3) must exceed the second.
    """

    def __init__(
        self,
        threshold: float = 0.15,
        encoder: TextEncoder | None = None,
        min_cosine: float = 0.7,
        margin: float = 0.01,
    ) -> None:
        self.threshold, self.encoder, self.min_cosine, self.margin = threshold, encoder, min_cosine, margin

    def match(self, mention: str, vocabulary: Vocabulary) -> str:
        """The character's name.

        Raises:
            AmbiguousMention: several are as likely; lists them.
            NoMatch: none is likely.
        """
        words = _words(mention)
        exact = _by_class(words, vocabulary)
        if len(exact) == 1:
            return exact[0]
        left = exact or self._by_words(words, vocabulary)
        if self.encoder and len(left) != 1:
            left = self._by_features(mention, left or vocabulary.names, vocabulary)
        if not left:
            raise NoMatch(mention, vocabulary.names)
        if len(left) > 1:
            raise AmbiguousMention(mention, left)
        return left[0]

    def is_mention(self, phrase: str, vocabulary: Vocabulary) -> bool:
        """Whether the phrase's noun is that of a coarse class, or that of some person or animal; or a name."""
        words = _words(phrase)
        if not words:
            return False
        nouns = {_words(entry.coarse_class)[-1] for entry in vocabulary.entries.values()}
        is_named = fold(phrase) in {fold(name) for name in vocabulary.names}
        return is_named or is_in(words[-1], ANIMATE) or words[-1] in nouns or bool(_by_class(words, vocabulary))

    def _by_words(self, words: list[str], vocabulary: Vocabulary) -> list[str]:
        entries = vocabulary.entries
        known = {name: {*_words(entry.coarse_class), *_attribute_words(entry)} for name, entry in entries.items()}
        same_noun = [n for n, entry in entries.items() if words and _words(entry.coarse_class)[-1] == words[-1]]
        scores = {name: _jaccard(set(words), known[name]) for name in same_noun or known}
        if not same_noun:
            scores = {name: score for name, score in scores.items() if score >= self.threshold}
        if not scores:
            return []
        best = max(scores, key=scores.get)
        shared = {name: known[name] & set(words) for name in scores}
        return [n for n in scores if shared[n] == shared[best] or scores[n] > scores[best] - self.margin]

    def _by_features(self, mention: str, names: list[str], vocabulary: Vocabulary) -> list[str]:
        texts = [", ".join([vocabulary.entries[n].coarse_class, *vocabulary.entries[n].phrases]) for n in names]
        features = self.encoder.text_features([mention, *texts])
        features = features / features.norm(dim=-1, keepdim=True)
        cosines = dict(zip(names, (features[1:] @ features[0]).tolist(), strict=True))
        best = max(cosines.values())
        return [n for n in names if cosines[n] >= self.min_cosine and cosines[n] >= best - self.margin]


def _by_class(words: list[str], vocabulary: Vocabulary) -> list[str]:
    """Characters whose class, or name, stands in the words; of several classes the longest counts."""
    found: dict[str, int] = {}
    for name, entry in vocabulary.entries.items():
        lengths = [len(phrase) for phrase in (_words(entry.coarse_class), _words(name)) if _holds(words, phrase)]
        if lengths:
            found[name] = max(lengths)
    return [name for name, length in found.items() if length == max(found.values())]


def _holds(words: list[str], phrase: list[str]) -> bool:
    size = len(phrase)
    return bool(phrase) and any(words[i : i + size] == phrase for i in range(len(words) - size + 1))


def _words(phrase: str) -> list[str]:
    """Folded words in the singular, without determiners."""
    return [singular(word) for word in tokens(phrase) if word not in DETERMINERS]


def _attribute_words(entry: CharacterEntry) -> set[str]:
    return {word for attribute in entry.attributes for word in _words(attribute.text)}


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0
