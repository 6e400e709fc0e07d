"""Token positions of characters: all rows of the benchmark against the released rule, and where that one is wrong."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import Character, Frame, StoryFault, World, parse_caption
from mmtrain.storyweaver.spans import CharacterSpans, find_chunked_spans, find_spans, token_ids, usage
from mmtrain.storyweaver.tokenizer import clip_tokenizer, small_tokenizer
from tests.golden import load

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/storyweaver/prompts.json").read_text(encoding="utf-8"))
LIMIT = 77


@pytest.fixture(scope="module")
def clip() -> Any:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    worlds = {}
    for name, about in GOLDEN["worlds"].items():
        people = {c: Character(c, about["coarse_class"][c], text) for c, text in about["description"].items()}
        worlds[name] = World(name.lower(), about["style"], people)
    return [parse_caption(row["raw"], worlds[row["world"]], f"{row['file']}:{row['line']}") for row in GOLDEN["rows"]]


def released(row: dict[str, Any]) -> list[CharacterSpans]:
    """A golden row; the release's attention, not its list, stretches class spans on lines that are too long."""
    found = []
    for name, (start, end, class_start, class_end) in zip(row["characters"], row["index"], strict=True):
        stretched = LIMIT if end > LIMIT else class_end
        found.append(CharacterSpans(name, ((class_start, stretched),), ((start, end),)))
    return found


def test_tokens_are_golden(clip: Any, frames: list[Frame]) -> None:
    assert [zlib.crc32(frame.prompt.encode()) for frame in frames] == [row["text_crc32"] for row in GOLDEN["rows"]]
    ids = clip([frame.prompt for frame in frames], padding="max_length", max_length=LIMIT, truncation=True).input_ids
    assert np.array_equal(ids, load("storyweaver/prompt_token_ids.npz")["input_ids"])
    assert [len(token_ids(clip, frame.prompt)) + 2 for frame in frames] == [row["tokens"] for row in GOLDEN["rows"]]


def test_released_rule_is_golden(clip: Any, frames: list[Frame]) -> None:
    assert len(frames) == 1064
    for frame, row in zip(frames, GOLDEN["rows"], strict=True):
        assert find_spans(clip, frame, "released") == released(row), row["raw"]
    assert sum(any(end > LIMIT for _, end, _, _ in row["index"]) for row in GOLDEN["rows"]) == 9


def test_robust_rule_differs_where_the_released_one_is_wrong(clip: Any, frames: list[Frame]) -> None:
    different = []
    for frame, row in zip(frames, GOLDEN["rows"], strict=True):
        spans = find_spans(clip, frame)
        assert [character.name for character in spans] == list(frame.names)
        if spans == released(row):
            continue
        different.append((row["file"].rpartition("caption/")[2], row["tokens"]))
        if row["tokens"] > LIMIT:  # only the cut description, never the end token; the class words alone
            for character, (start, end, class_start, class_end) in zip(spans, row["index"], strict=True):
                assert character.description_spans == ((start, min(end, LIMIT - 1)),)
                assert character.class_spans == ((class_start, class_end),)
    assert sorted(tokens > LIMIT for _, tokens in different) == [False] + [True] * 12
    assert [name for name, tokens in different if tokens <= LIMIT] == ["Multi/38.txt"]
    frame = frames[next(i for i, row in enumerate(GOLDEN["rows"]) if row["file"].endswith("caption/Multi/38.txt"))]
    crong, pororo = find_spans(clip, frame)  # "A dinosaur and a blue penguin": no "gentoo penguin" in the sentence
    assert (crong.class_spans, pororo.class_spans) == (((9, 10),), ())
    assert find_spans(clip, frame, "released")[1].class_spans == ((44, 47),)  # inside the description


FOX = Character("Eddy", "fox", "This fox has large ears and a green scarf.")
PENGUIN = Character("Pia", "penguin", "Pia is a penguin.")
GENTOO = Character("Pororo", "gentoo penguin", "This gentoo penguin wears a red helmet and gloves.")


def text_at(tokenizer: Any, frame: Frame, spans: tuple[tuple[int, int], ...]) -> list[str]:
    ids = tokenizer(frame.prompt, truncation=False, verbose=False).input_ids
    return [tokenizer.decode(ids[start:end]).strip() for start, end in spans]


@pytest.fixture(scope="module")
def small() -> Any:
    return small_tokenizer(["this fox", "this penguin has a red helmet"] * 2, size=540, model_max_length=48)


def test_phrases(clip: Any, small: Any) -> None:
    event = "A fox meets a penguin and a gentoo penguin; the fox waves."
    frame = Frame(event, (GENTOO, PENGUIN, FOX), "A fox cartoon.")
    for tokenizer in (clip, small):  # of the small one every word is several tokens
        gentoo, penguin, fox = find_chunked_spans(tokenizer, frame)
        if tokenizer is clip:
            assert [gentoo, penguin, fox] == find_spans(clip, frame)
            assert text_at(clip, frame, gentoo.class_spans) == ["gentoo penguin"]
            assert text_at(clip, frame, penguin.class_spans) == ["penguin"]
            assert text_at(clip, frame, fox.class_spans) == ["fox", "fox"]  # not the one of the style
        lengths = [
            [sum(e - s for s, e in spans) for spans in (c.class_spans, c.description_spans)] for c in (gentoo, fox)
        ]
        assert lengths[0] == [len(token_ids(tokenizer, t)) for t in (GENTOO.coarse_class, GENTOO.description)]
        assert lengths[1] == [2 * len(token_ids(tokenizer, "fox")), len(token_ids(tokenizer, FOX.description))]


def test_small_tokenizer_and_short_prompt(small: Any) -> None:
    frame = Frame("a fox and a penguin run fast.", (PENGUIN, FOX), "")
    ids = small(frame.prompt, truncation=False, verbose=False).input_ids
    assert len(ids) > 48 == small.model_max_length  # else this test shows nothing
    penguin, fox = find_spans(small, frame)
    for character, words in ((penguin, PENGUIN), (fox, FOX)):
        (start, end), expected = character.class_spans[0], token_ids(small, words.coarse_class)
        assert ids[start:end] == expected
        (start, end), expected = character.description_spans[0], token_ids(small, words.description)
        assert ids[start:end] == expected[: end - start] and end <= 47
    assert fox.description_spans[0][1] == 47
    lost = find_spans(small, Frame(frame.event, (GENTOO, PENGUIN, FOX), ""))[2]  # after 47 tokens
    assert lost.description_spans == () and lost.class_spans == fox.class_spans
    # the released rule takes the same numbers of the tokenizer
    short = Frame("a penguin.", (PENGUIN,), "")
    assert find_spans(small, short, "released") == find_spans(small, short)


def test_chunks_hold_every_token_of_a_span(small: Any, clip: Any) -> None:
    frame = Frame("a fox and a penguin and a gentoo penguin run.", (PENGUIN, FOX, GENTOO), "Cartoon style.")
    for tokenizer in (small, clip):
        content, room = token_ids(tokenizer, frame.prompt), tokenizer.model_max_length - 2
        row = []  # tokens as they lie in the joined features
        for at in range(0, len(content), room):
            chunk = content[at : at + room]
            row += [-1, *chunk, *[-1] * (room - len(chunk) + 1)]
        for character, words in zip(find_chunked_spans(tokenizer, frame), (PENGUIN, FOX, GENTOO), strict=True):
            for spans, text in ((character.class_spans, words.coarse_class), (character.description_spans, None)):
                tokens = [token for start, end in spans for token in row[start:end]]
                assert tokens == token_ids(tokenizer, text or words.description)
    assert len(find_chunked_spans(small, frame)[1].description_spans) == 2  # the border lies inside


def test_usage() -> None:
    one = CharacterSpans("a", ((1, 3),), ((2, 5), (6, 99)))
    counts = usage([[one], [], [one, CharacterSpans("b", (), ((0, 1),))]], 8, 2)
    assert counts.shape == (3, 2, 8) and counts.dtype == torch.float32
    assert counts[0, 0].tolist() == [0, 1, 2, 1, 1, 0, 1, 1] and counts[2, 1].tolist() == [1] + [0] * 7
    assert not counts[0, 1].any() and not counts[1].any() and torch.equal(counts[2, 0], counts[0, 0])
    assert usage([[]], 8, 0).shape == (1, 0, 8)


def test_bad_input(clip: Any) -> None:
    twice = Frame(f"A fox. {FOX.description}", (FOX,), "")
    with pytest.raises(StoryFault, match="description of Eddy 2 times"):
        find_spans(clip, twice, "released")
    assert len(find_spans(clip, twice)[0].description_spans) == 1
    with pytest.raises(StoryFault, match="no 'wolf' \\(Wulf\\)"):
        find_spans(
            clip, Frame("A dog.", (Character("Wulf", "wolf", "He is grey and old and has no tail."),), ""), "released"
        )
    with pytest.raises(UserError, match="span_rule: 'strict'"):
        find_spans(clip, twice, "strict")
    assert find_spans(clip, Frame("Nobody is here.", (), "")) == []
