"""Where a prompt speaks of each character: token positions of its class words and of its description.

Positions count the tokens of a tokenised prompt, 0 is the start token; spans are half open. Two rules: "released" is
the published one with its faults, for parity; "robust" is what guidance should use (README of StoryWeaver's data: the
published rule is wrong on captions whose class words are missing and on long lines).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.story import Frame, StoryFault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
SpanRule = Literal["robust", "released"]
SPAN_RULES = ("robust", "released")
RELEASED_WINDOW = 7  # tokens of a description by which the released rule finds it


@dataclass(frozen=True)
class CharacterSpans:
    """Where a prompt speaks of one character.

    Args:
        name: of the character.
        class_spans: half-open token positions of its class words; none where the prompt lacks them.
        description_spans: of its description; several where a chunk of the prompt ends inside it.
    """

    name: str
    class_spans: tuple[Span, ...]
    description_spans: tuple[Span, ...]


def find_spans(tokenizer: PreTrainedTokenizerBase, frame: Frame, rule: SpanRule = "robust") -> list[CharacterSpans]:
    """Spans in a prompt that is cut at the tokenizer's `model_max_length`.

    "robust": the whole class phrase, wherever the event sentence has it; a description where the template puts it; each
    clipped to the tokens between start and end token, so that what was cut away is in no span.

    Returns:
        One for each character, left to right as in the frame.

    Raises:
        StoryFault: the "released" rule finds no class word, or a description never or twice.
        UserError: an unknown rule; a tokenizer that joins words over blanks.
    """
    if rule not in SPAN_RULES:
        raise UserError(f"span_rule: {rule!r}, must be one of {', '.join(SPAN_RULES)}")
    if rule == "released":
        return _released_spans(tokenizer, frame)
    room = tokenizer.model_max_length - 2

    def place(spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple((start + 1, min(end, room) + 1) for start, end in spans if start < room)

    return [
        CharacterSpans(s.name, place(s.class_spans), place(s.description_spans)) for s in _all_spans(tokenizer, frame)
    ]


def find_chunked_spans(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[CharacterSpans]:
    """Spans, by the robust rule, in a prompt that is encoded in chunks whose features follow one another.

    Each chunk has start token, `model_max_length` - 2 tokens of the prompt, end token; nothing is cut away. A span over
    a border becomes two.

    Returns:
        One for each character, left to right as in the frame.
    """
    width = tokenizer.model_max_length
    room = width - 2

    def place(spans: Sequence[Span]) -> tuple[Span, ...]:
        placed = []
        for start, end in spans:
            for chunk in range(start // room, (end - 1) // room + 1):
                first, last = max(start, chunk * room), min(end, (chunk + 1) * room)
                shift = chunk * (width - room) + 1
                placed.append((first + shift, last + shift))
        return tuple(placed)

    return [
        CharacterSpans(s.name, place(s.class_spans), place(s.description_spans)) for s in _all_spans(tokenizer, frame)
    ]


def usage(spans_per_frame: Sequence[Sequence[CharacterSpans]], length: int, num_characters: int) -> Tensor:
    """How often each token lies in the spans of each character.

    Args:
        spans_per_frame: for each of B frames.
        length: tokens L of a prompt; what lies beyond does not count.
        num_characters: J, the most of any frame; frames with fewer get rows of zeros.

    Returns:
        [B, J, L], float32: 0, 1, or 2 where a token is in class words and description both.
    """
    counts = torch.zeros(len(spans_per_frame), num_characters, length)
    for row, characters in zip(counts, spans_per_frame, strict=True):
        for index, character in enumerate(characters):
            for start, end in (*character.class_spans, *character.description_spans):
                row[index, start:end] += 1
    return counts


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text, however many, without start and end token."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _all_spans(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[CharacterSpans]:
    """Spans by the robust rule, counted without start token and as if prompts had no limit."""
    # The template joins its parts by blanks, where tokens of CLIP's kind end too: so the tokens of the parts, one after
    # the other, are the tokens of the prompt, and no search can take one text for another.
    opening = token_ids(tokenizer, frame.style + frame.separator + frame.event)
    descriptions = [token_ids(tokenizer, character.description) for character in frame.characters]
    parts = [opening, *descriptions]
    if [token for part in parts for token in part] != token_ids(tokenizer, frame.prompt):
        raise UserError(
            f"{type(tokenizer).__name__}: makes other tokens of {frame.prompt!r} than of its sentences one by one; "
            "spans need a tokenizer whose tokens end at blanks, as CLIP's do"
        )
    style = token_ids(tokenizer, frame.style)
    start = len(style) if opening[: len(style)] == style else 0  # a style may name what is also a class
    phrases = [tuple(token_ids(tokenizer, character.coarse_class)) for character in frame.characters]
    found = _phrase_spans(opening, start, phrases)
    ends = list(accumulate(len(part) for part in parts))
    return [
        CharacterSpans(character.name, tuple(found[phrase]), ((begin, end),) if end > begin else ())
        for character, phrase, begin, end in zip(frame.characters, phrases, ends[:-1], ends[1:], strict=True)
    ]


def _phrase_spans(tokens: list[int], start: int, phrases: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[Span]]:
    """Every occurrence of each phrase from `start` on.

    Longer phrases come first and keep their tokens: the last word of "gentoo penguin" is no "penguin" of its own.
    Characters of one class share its occurrences, for nothing in a sentence tells which is whose.
    """
    found: dict[tuple[int, ...], list[Span]] = {phrase: [] for phrase in phrases}
    taken = [False] * len(tokens)
    for phrase in sorted((p for p in found if p), key=len, reverse=True):
        for begin in range(start, len(tokens) - len(phrase) + 1):
            end = begin + len(phrase)
            if tuple(tokens[begin:end]) == phrase and not any(taken[begin:end]):
                taken[begin:end] = [True] * len(phrase)
                found[phrase].append((begin, end))
    return found


def _released_spans(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[CharacterSpans]:
    """Released code: what it finds, right or wrong.

    A description is found by its first seven tokens and is as long as it is alone, over the prompt's end too. A class
    phrase begins at the first token anywhere that equals its own first one, even inside a description. Where a
    description runs over the prompt's end, the class span is stretched to the end as well.
    """
    limit = tokenizer.model_max_length
    prompt = tokenizer(frame.prompt, padding="max_length", truncation=True, max_length=limit).input_ids
    found = []
    for character in frame.characters:
        where = f"{frame.prompt!r}: the released rule"
        description = token_ids(tokenizer, character.description)[: limit - 2]
        window = description[:RELEASED_WINDOW]  # whole where shorter than the window: the release has none so short
        starts = [at for at in range(limit - len(window) + 1) if prompt[at : at + len(window)] == window]
        if len(starts) != 1:
            raise StoryFault(f"{where} finds the description of {character.name} {len(starts)} times, not once")
        phrase = token_ids(tokenizer, character.coarse_class)
        if not phrase or phrase[0] not in prompt:
            raise StoryFault(f"{where} finds no {character.coarse_class!r} ({character.name})")
        description_end = starts[0] + len(description)
        class_start = prompt.index(phrase[0])
        class_end = limit if description_end > limit else class_start + len(phrase)
        spans = CharacterSpans(character.name, ((class_start, class_end),), ((starts[0], description_end),))
        found.append(spans)
    return sorted(found, key=lambda spans: spans.description_spans[0])
