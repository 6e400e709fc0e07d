"""From frames to what networks are conditioned on: text features, tokens of characters, features of descriptions.

As in Stable Diffusion 1.5 the condition is CLIP's last hidden state after the final layer norm, without attention mask.
B frames, J most characters of a frame, L tokens (77, or 77 a chunk), W width.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError, say_once
from mmtrain.story import Frame
from mmtrain.storyweaver.spans import CharacterSpans, find_chunked_spans, find_spans

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

AT_ONCE = 32  # token rows that go through the text encoder together
CHOICES = {"long_prompts": ("warn", "chunk"), "span_rule": ("robust", "released")}


@dataclass
class TextSettings:
    """How prompts are read.

    Args:
        long_prompts: of more tokens than the text encoder takes (75 and the two special ones). "warn": cut, as
            released, and say once what is lost. "chunk": pieces of 75 tokens are encoded each for itself and their
            features joined.
        span_rule: how tokens of characters are found, see `mmtrain.storyweaver.spans`.

    Raises:
        UserError: none of these; "released" with "chunk": that rule is defined for one piece only.
    """

    long_prompts: Literal["warn", "chunk"] = "warn"
    span_rule: Literal["robust", "released"] = "robust"

    def __post_init__(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise UserError(f"text.{field}: {getattr(self, field)!r}, must be one of {', '.join(known)}")
        if self.long_prompts == "chunk" and self.span_rule == "released":
            raise UserError("text.span_rule: released, does not work on chunks: give robust, or long_prompts warn")


class EncodedFrames:
    """The condition of a batch of frames.

    Args:
        context: [B, L, W].
        spans: for each frame those of its characters, left to right.
        descriptions: [B, J, W], pooled features of the descriptions, zeros where a frame has fewer characters; or what
            computes them, called when they are first asked for: only a knowledge encoder needs them.
        counts: characters of each frame.
    """

    def __init__(
        self,
        context: Tensor,
        spans: list[list[CharacterSpans]],
        descriptions: Tensor | Callable[[], Tensor],
        counts: list[int],
    ) -> None:
        self.context, self.spans, self.counts = context, spans, counts
        self._descriptions = descriptions

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def descriptions(self) -> Tensor:
        """[B, J, W], see the class."""
        if not isinstance(self._descriptions, Tensor):
            self._descriptions = self._descriptions()
        return self._descriptions

    def to(self, device: torch.device | str) -> "EncodedFrames":
        """On another device."""
        return EncodedFrames(
            self.context.to(device), self.spans, self._later(lambda features: features.to(device)), self.counts
        )

    def select(self, indices: Sequence[int]) -> "EncodedFrames":
        """Some of the frames, in this order; one may be named several times."""
        rows = [int(i) for i in indices]
        counts = [self.counts[i] for i in rows]
        most = max(counts, default=0)  # as a batch of just these frames has it
        return EncodedFrames(
            self.context[rows],
            [self.spans[i] for i in rows],
            self._later(lambda features: features[rows, :most]),
            counts,
        )

    def repeat(self, times: int) -> "EncodedFrames":
        """The whole batch several times, one after the other."""
        return self.select([*range(len(self))] * times)

    def with_dropped(self, mask: Tensor, null: Tensor) -> "EncodedFrames":
        """Captions taken away: there the context is that of the empty prompt, and no token belongs to a character.

        Args:
            mask: bool [B], true where the caption is dropped.
            null: [B, L, W] or [1, L, W], of `PromptEncoder.null`.
        """
        dropped = mask.to(self.context.device)
        context = torch.where(dropped[:, None, None], null.to(self.context), self.context)
        spans = [
            [replace(s, class_spans=(), description_spans=()) for s in own] if gone else own
            for own, gone in zip(self.spans, mask.tolist(), strict=True)
        ]
        return EncodedFrames(context, spans, self._descriptions, self.counts)

    def _later(self, change: Callable[[Tensor], Tensor]) -> Tensor | Callable[[], Tensor]:
        if isinstance(self._descriptions, Tensor):
            return change(self._descriptions)
        return lambda: change(self.descriptions)


class PromptEncoder:
    """Encodes frames with a CLIP text encoder, each prompt once.

    Args:
        tokenizer: in CLIP's format.
        text_encoder: its module, on the device where it works; the caller puts it into evaluation mode if frozen.
        settings: how prompts are read.
        cache: keep the features of each prompt on the host; they are computed prompt by prompt, without gradient and
            autocast, so that they do not depend, not in a bit, on who asked for them first. False for a text encoder
            that is trained or whose adapters are exchanged: nothing is kept, gradients flow.
        cache_bytes: of the features kept; beyond, those used least recently go.

    Raises:
        UserError: the tokenizer makes more tokens than the text encoder takes.
    """

    def __init__(
        self,
        tokenizer: "CLIPTokenizer",
        text_encoder: nn.Module,
        settings: TextSettings | None = None,
        cache: bool = True,
        cache_bytes: int = 2**28,
    ) -> None:
        self.tokenizer, self.text_encoder, self.cache = tokenizer, text_encoder, cache
        self.settings = settings or TextSettings()
        self.length = int(tokenizer.model_max_length)
        positions = text_encoder.config.max_position_embeddings
        if self.length > positions:
            raise UserError(
                f"tokenizer: cuts at {self.length} tokens, the text encoder takes {positions}: set the tokenizer's "
                f"model_max_length to {positions}"
            )
        self._features, self._pooled = Kept(cache_bytes), Kept(cache_bytes // 16)
        self._spans: dict[Frame, list[CharacterSpans]] = {}
        self._reported: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the text encoder is."""
        return next(self.text_encoder.parameters()).device

    def clear(self) -> None:
        """Forget all features: needed after the weights of a cached text encoder changed."""
        self._features.clear()
        self._pooled.clear()

    def encode(self, frames: Iterable[Frame]) -> EncodedFrames:
        """The condition of frames, on the text encoder's device."""
        frames = list(frames)
        for frame in frames:
            self._report(frame.prompt, frame)
        context = self.encode_texts([frame.prompt for frame in frames])
        counts = [len(frame.characters) for frame in frames]
        return EncodedFrames(context, [self.spans(f) for f in frames], lambda: self._descriptions_of(frames), counts)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features [n, L, W] of any texts; in chunks, L is that of the longest, the others are filled up with nothing.

        Raises:
            UserError: no text.
        """
        if not texts:
            raise UserError("text: nothing to encode, give at least one text")
        for text in texts:
            self._report(text)
        rows = self._all(list(texts), self._features, self._hidden)
        longest = max(len(row) for row in rows)
        if any(len(row) < longest for row in rows):
            empty = self._all([""], self._features, self._hidden)[0]
            rows = [torch.cat([row] + [empty] * ((longest - len(row)) // self.length)) for row in rows]
        return torch.stack(rows).to(self.device)

    def null(self, count: int, length: int, text: str = "") -> Tensor:
        """Features [count, length, W] of the empty prompt, for guidance and dropped captions.

        Args:
            count: rows.
            length: L of the prompts that it stands beside.
            text: a negative prompt instead; of more than one chunk only the first is used.

        Raises:
            UserError: a length that is no multiple of the text encoder's.
        """
        if length % self.length:
            raise UserError(f"null prompt: {length} tokens, must be a multiple of {self.length}")
        first, empty = (row[: self.length] for row in self._all([text, ""], self._features, self._hidden))
        row = torch.cat([first] + [empty] * (length // self.length - 1)).to(self.device)
        return row.expand(count, -1, -1)

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """Final-layer-norm state at the first end token, [n, W], of texts that are cut at the maximum."""
        return torch.stack(self._all(list(texts), self._pooled, self._end_states)).to(self.device)

    def spans(self, frame: Frame) -> list[CharacterSpans]:
        """Token positions of the frame's characters in the rows of `encode`."""
        if frame not in self._spans:
            if len(self._spans) >= 2**14:
                self._spans.clear()
            if self.settings.long_prompts == "chunk":
                self._spans[frame] = find_chunked_spans(self.tokenizer, frame)
            else:
                self._spans[frame] = find_spans(self.tokenizer, frame, self.settings.span_rule)
        return self._spans[frame]

    def chunks(self, text: str) -> int:
        """Pieces that a text is encoded in: 1 unless `long_prompts` is "chunk"."""
        return len(self._pieces(text))

    def _descriptions_of(self, frames: list[Frame]) -> Tensor:
        texts = list(dict.fromkeys(c.description for frame in frames for c in frame.characters))
        most = max((len(frame.characters) for frame in frames), default=0)
        if not texts:
            width = self.null(1, self.length).shape[-1]
            return torch.zeros(len(frames), 0, width, device=self.device)
        features = self.pooled(texts)
        nothing = features.new_zeros(1, features.shape[1])
        rows = torch.cat([features, nothing])
        places = [[texts.index(c.description) for c in f.characters] for f in frames]
        return rows[torch.tensor([own + [len(texts)] * (most - len(own)) for own in places], device=rows.device)]

    def _all(self, texts: list[str], kept: "Kept", compute: Callable[[list[str]], list[Tensor]]) -> list[Tensor]:
        """Rows of texts, each computed once; from the cache on the host, or with gradient on the device."""
        different = list(dict.fromkeys(texts))
        if not self.cache:
            rows = dict(zip(different, compute(different), strict=True))
            return [rows[text] for text in texts]
        rows = {text: kept.get(text) for text in different}
        missing = [text for text in different if rows[text] is None]
        if missing:
            with frozen(self.device):
                fresh = [row.cpu().clone() for text in missing for row in compute([text])]
            rows |= dict(zip(missing, fresh, strict=True))
            for text, row in zip(missing, fresh, strict=True):
                kept.put(text, row)
        return [rows[text] for text in texts]

    def _hidden(self, texts: list[str]) -> list[Tensor]:
        """[L, W] of each text."""
        pieces = [self._pieces(text) for text in texts]
        states = self._run([piece for own in pieces for piece in own])
        return [own.flatten(0, 1) for own in states.split([len(own) for own in pieces])]

    def _end_states(self, texts: list[str]) -> list[Tensor]:
        """[W] of each text."""
        ids = [self._pieces(text)[0] for text in texts]
        # not the encoder's own pooled state: with the `eos_token_id` 2 of old configurations it takes the largest id,
        # and with one that the tokenizer does not use, the start token
        ends = [row.index(self.tokenizer.eos_token_id) for row in ids]
        return list(self._run(ids)[torch.arange(len(ids)), ends])

    def _run(self, ids: list[list[int]]) -> Tensor:
        rows = torch.tensor(ids, device=self.device)
        return torch.cat([self.text_encoder(part).last_hidden_state for part in rows.split(AT_ONCE)])

    def _pieces(self, text: str) -> list[list[int]]:
        """Token ids of each piece, with start, end and padding."""
        ids, room = content_ids(self.tokenizer, text), self.length - 2
        firsts = range(0, max(len(ids), 1), room) if self.settings.long_prompts == "chunk" else (0,)
        tokenizer = self.tokenizer
        pieces = ([tokenizer.bos_token_id, *ids[i : i + room], tokenizer.eos_token_id] for i in firsts)
        return [piece + [tokenizer.pad_token_id] * (self.length - len(piece)) for piece in pieces]

    def _report(self, text: str, frame: Frame | None = None) -> None:
        """Say once what of a text is lost."""
        if self.settings.long_prompts == "chunk" or text in self._reported:
            return
        ids = content_ids(self.tokenizer, text)
        room = self.length - 2
        if len(ids) <= room:
            return
        self._reported.add(text)
        cut = cut_descriptions(self.tokenizer, frame, room) if frame else []
        whose = f", of the description of {' and '.join(cut)}" if cut else ""
        say_once(
            f"{shortened(text)}: {len(ids) + 2} tokens, the text encoder takes {self.length}; lost{whose}: "
            f"{self.tokenizer.decode(ids[room:])!r}. text.long_prompts: chunk keeps them"
        )


class Kept:
    """Tensors by text, up to a size; those used least recently go first."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, text: str) -> Tensor | None:
        """The tensor, or None."""
        if text in self._rows:
            self._rows.move_to_end(text)
        return self._rows.get(text)

    def put(self, text: str, row: Tensor) -> None:
        """Keep one more."""
        self._rows[text] = row
        self.bytes += row.nbytes
        while self.bytes > self.most_bytes:
            self.bytes -= self._rows.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all."""
        self._rows.clear()
        self.bytes = 0


@contextmanager
def frozen(device: torch.device) -> Iterator[None]:
    """No gradient, and no autocast: features must not depend on who asked first.

    Not inference mode either: a training step may use what a validation computed.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def content_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without the special ones, however many."""
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]


def shortened(text: str, length: int = 60) -> str:
    """A text in quotes, of a long one the beginning."""
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")


def cut_descriptions(tokenizer: Any, frame: Frame, room: int) -> list[str]:
    """Names of the characters whose descriptions reach beyond the first `room` tokens of the prompt.

    CLIP's tokens never cross white space, so those of the prompt are those of its parts.
    """
    end = len(content_ids(tokenizer, replace(frame, characters=()).prompt))
    names = []
    for character in frame.characters:
        end += len(content_ids(tokenizer, character.description))
        if end > room:
            names.append(character.name)
    return names
