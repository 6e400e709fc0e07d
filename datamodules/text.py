"""Captions to token ids, with the byte-pair vocabulary that ships inside open_clip (works offline)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

START, END = 49406, 49407


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


def tokenize(texts: str | Sequence[str], context_length: int = 77, faithful_truncation: bool = False) -> Tensor:
    """Return token ids, int64 [B, context_length]: start, the caption, end, then zeros.

    The text encoder reads its feature at the largest id of a row, which is the end token's.

    Args:
        texts: captions; a single string is a batch of one.
        context_length: ids a row; longer captions are cut.
        faithful_truncation: cut like RankCLIP's released code (spec section 1.5, item 5): a long caption loses its
            end token, so its feature is then read at its rarest word piece. Off: the end token takes the last place.

    Raises:
        ValueError: if `context_length` leaves no room for start and end.

    Example:
        >>> tokenize(["a photo of a cat.", ""], context_length=9)
        tensor([[49406,   320,  1125,   539,   320,  2368,   269, 49407,     0],
                [49406, 49407,     0,     0,     0,     0,     0,     0,     0]])
    """
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (start and end token), got {context_length}")
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = [START, *_tokenizer().encode(text), END][:context_length]
        if len(ids) == context_length and not faithful_truncation:
            ids[-1] = END
        row[: len(ids)] = torch.tensor(ids)
    return tokens
