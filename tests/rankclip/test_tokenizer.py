"""Captions to ids against the official tokenisation (golden) and open_clip's tokenizer."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from datamodules.text import END, tokenize

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rankclip" / "tokenizer.json").read_text())
TEXTS = [entry["text"] for entry in GOLDEN]


def padded(ids: list[int]) -> list[int]:
    return ids + [0] * (77 - len(ids))


def test_official_ids_with_the_official_truncation() -> None:
    tokens = tokenize(TEXTS, faithful_truncation=True)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [padded(entry["ids"]) for entry in GOLDEN]
    assert END not in tokens[-1], "the last golden caption is longer than 77 tokens and must lose its end token"


def test_end_token_is_kept_by_default() -> None:
    tokens = tokenize(TEXTS)
    torch.testing.assert_close(tokens, open_clip.get_tokenizer("ViT-B-32-quickgelu")(TEXTS))
    assert tokens[-1, 76] == END
    assert tokens[-1, :76].tolist() == GOLDEN[-1]["ids"][:76]
    assert tokens[:-1].tolist() == [padded(entry["ids"]) for entry in GOLDEN[:-1]]


@pytest.mark.parametrize("context_length", [2, 7, 8, 9])
def test_shorter_contexts_at_the_edge(context_length: int) -> None:
    full = GOLDEN[0]["ids"]
    assert len(full) == 8
    kept, faithful = tokenize(TEXTS[0], context_length), tokenize(TEXTS[0], context_length, faithful_truncation=True)
    assert kept.shape == (1, context_length)
    assert faithful[0].tolist() == [*full, 0][:context_length]
    assert kept[0].tolist() == ([*full[: context_length - 1], END] if context_length < 8 else faithful[0].tolist())


def test_no_captions_and_no_room() -> None:
    assert tokenize([]).shape == (0, 77)
    with pytest.raises(ValueError, match="at least 2"):
        tokenize("a cat", context_length=1)
