"""Tokenizers in CLIP's format: CLIP's own, from the file that open_clip ships, and small ones learned from few texts.

A tokenizer is a folder that `CLIPTokenizer.from_pretrained` reads. Texts are lower-cased; the last piece of a word ends
in `</w>`; the start token is the last but one of the vocabulary, the end token, which also pads, the last.
"""

import gzip
import importlib.util
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.config_errors import UserError

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_SIZE, CLIP_LENGTH = 49408, 77
SMALLEST = 2 * 256 + 2  # each byte inside and at the end of a word, start, end


def clip_tokenizer(folder: str | Path | None = None, model_max_length: int = CLIP_LENGTH) -> "CLIPTokenizer":
    """CLIP's tokenizer of 49,408 tokens, without a download: the one of Stable Diffusion 1.x.

    Args:
        folder: where to write it too.
        model_max_length: tokens of a prompt, start and end counted.
    """
    package = importlib.util.find_spec("open_clip")  # not imported, which takes seconds
    path = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    return _made(lines[1 : CLIP_SIZE - SMALLEST + 1], folder, model_max_length)


def small_tokenizer(
    texts: Iterable[str],
    folder: str | Path | None = None,
    size: int = 1024,
    model_max_length: int = CLIP_LENGTH,
) -> "CLIPTokenizer":
    """A tokenizer in CLIP's format whose merges are learned from `texts`; it writes any text, the same from run to run.

    Args:
        texts: what to learn from, such as captions and descriptions.
        folder: where to write it too.
        size: most tokens; texts of few words give fewer.
        model_max_length: tokens of a prompt, start and end counted.

    Raises:
        UserError: `size` below 514, which every byte inside and at the end of a word, start and end take.
    """
    if size < SMALLEST:
        raise UserError(f"tokenizer size: {size}, the bytes, start and end alone are {SMALLEST} tokens")
    return _made(learn_merges(texts, size - SMALLEST), folder, model_max_length)


def learn_merges(texts: Iterable[str], count: int) -> list[str]:
    """At most `count` byte-pair merges, "left right" each: the pair that occurs most often, again and again.

    Words are split as CLIP splits them. Pairs that occur equally often come in the order of their characters: the
    learner of the `tokenizers` library takes another one from run to run. It is made for some thousand words.

    >>> learn_merges(["a fox, a box, a fox"], 2)
    ['o x</w>', 'f ox</w>']
    """
    base = _made([], None, CLIP_LENGTH).backend_tokenizer
    counts: Counter[str] = Counter()
    for text in texts:
        for word, _ in base.pre_tokenizer.pre_tokenize_str(base.normalizer.normalize_str(text)):
            counts[word] += 1
    words = [[*word[:-1], word[-1] + WORD_END] for word in counts]
    numbers = list(counts.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # words that have had a pair
    for place, pieces in enumerate(words):
        for pair in pairwise(pieces):
            pairs[pair] += numbers[place]
            places[pair].add(place)
    merges: list[str] = []
    while len(merges) < count and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(" ".join(best))
        for place in places[best]:
            old, words[place] = words[place], _joined(words[place], best)
            for pair in pairwise(old):
                pairs[pair] -= numbers[place]
            for pair in pairwise(words[place]):
                pairs[pair] += numbers[place]
                places[pair].add(place)
    return merges


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces of a word with a pair made one wherever it stands."""
    joined, place = [], 0
    while place < len(pieces):
        is_pair = tuple(pieces[place : place + 2]) == pair
        joined.append("".join(pair) if is_pair else pieces[place])
        place += 2 if is_pair else 1
    return joined


def write_tokenizer(merges: Sequence[str], folder: str | Path, model_max_length: int = CLIP_LENGTH) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json, which any version of transformers reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = _bytes()
    pieces += [piece + WORD_END for piece in pieces]
    pieces += ["".join(merge.split()) for merge in merges] + [START, END]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}  # two merges may give one piece
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
        "bos_token": START,
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), END),
    }
    for name, content in (("vocab.json", vocabulary), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return folder


def read_tokenizer(folder: str | Path) -> "CLIPTokenizer":
    """The CLIP tokenizer of a folder.

    Raises:
        UserError: no such folder, or no tokenizer of CLIP's format in it.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a tokenizer (vocab.json, merges.txt)")
    has_pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_pair and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: has neither vocab.json with merges.txt nor tokenizer.json")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises many kinds, its native half bare Exception
        raise UserError(f"{folder}: no tokenizer of CLIP's format ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None or tokenizer.bos_token_id is None:
        raise UserError(f"{folder}: the tokenizer's start or end token is not in its vocabulary")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _made(merges: Sequence[str], folder: str | Path | None, length: int) -> "CLIPTokenizer":
    if folder is not None:
        return read_tokenizer(write_tokenizer(merges, folder, length))
    with tempfile.TemporaryDirectory() as place:
        tokenizer = read_tokenizer(write_tokenizer(merges, place, length))
    tokenizer.name_or_path = ""  # the folder is gone
    return tokenizer


def _bytes() -> list[str]:
    """One printable character for each byte, in CLIP's order: printable bytes as they are, then the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
