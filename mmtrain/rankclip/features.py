"""The two towers of a CLIP of ours as features for CLIP-I and CLIP-T, chosen by class path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.metrics.similarity import RESIZES, Resize, fit_pictures
from mmtrain.rankclip.networks import build_clip, encode_texts, project_images
from mmtrain.rankclip.pretrained import guess_architecture, load_pretrained, read_state_dict

CHUNK = 64  # pictures or texts at a time


@dataclass
class ClipFeatures:
    """Features of a CLIP checkpoint in any layout of `mmtrain.rankclip.pretrained`; plain settings until it is used.

    Args:
        checkpoint: of a training of ours, or another CLIP's.
        architecture: open_clip name or JSON file; None takes the one stored in the checkpoint, else guesses it from the
            shapes.
        image_size: height and width that pictures must have for it; None takes the architecture's, and another one is
            refused.
        resize: how pictures are fitted to it, see `fit_pictures`.

    Raises:
        UserError: no such file, or, once it is used, one that does not fit the architecture.
    """

    checkpoint: str
    architecture: str | None = None
    image_size: int | None = None
    resize: Resize = "crop"

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_file():
            raise UserError(f"ClipFeatures.checkpoint: {self.checkpoint}: no such file")
        if self.resize not in RESIZES:
            raise UserError(f"ClipFeatures.resize: {self.resize!r}, must be one of {', '.join(RESIZES)}")
        self.lent: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        path = Path(self.checkpoint)
        run = path.parent.parent.name if path.parent.name == "checkpoints" else ""
        return f"CLIP of ours ({f'{run}/' if run else ''}{path.name}), {self.resize}"

    @torch.no_grad()
    def image_features(self, pictures: Tensor) -> Tensor:
        """Projected image features, float32 [B, D], of uint8 [B, 3, H, W]."""
        network, _ = self._loaded()
        network.to(pictures.device)
        found = []
        with torch.autocast(pictures.device.type, enabled=False):
            for part in pictures.split(CHUNK):
                fitted = fit_pictures(part, self._size(network), self.resize)
                found.append(project_images(network, (fitted * 255).round().to(torch.uint8)).float())
        return torch.cat(found)

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """Unit text features, float32 [B, D]; of a text longer than the context only the beginning counts.

        Raises:
            UserError: the checkpoint's vocabulary is not CLIP's.
        """
        network, tokenizer = self._loaded()
        if network.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"ClipFeatures.checkpoint: {self.checkpoint}: has a vocabulary of {network.vocab_size} tokens, CLIP's "
                f"has {tokenizer.vocab_size}"
            )
        device = network.logit_scale.device
        with torch.autocast(device.type, enabled=False):
            parts = tokenizer(list(texts), context_length=network.context_length).split(CHUNK)
            return torch.cat([encode_texts(network, part.to(device)).float() for part in parts])

    def _loaded(self) -> tuple[open_clip.CLIP, open_clip.SimpleTokenizer]:
        if not self.lent:
            try:
                state, about = read_state_dict(self.checkpoint)
                architecture = self.architecture or about["architecture"] or guess_architecture(state)
                with torch.random.fork_rng(devices=[]):  # fresh weights, replaced at once, must not move the noise
                    network = build_clip(architecture)
                load_pretrained(network, self.checkpoint, architecture)
            except (ValueError, OSError) as error:
                raise UserError(f"ClipFeatures.checkpoint: {error}") from error
            own = self._size(network)
            if self.image_size not in (None, own):
                raise UserError(f"ClipFeatures.image_size: {self.image_size}, the checkpoint takes {own}")
            self.lent |= {"network": network.eval().requires_grad_(False), "tokenizer": open_clip.SimpleTokenizer()}
        return self.lent["network"], self.lent["tokenizer"]

    @staticmethod
    def _size(network: open_clip.CLIP) -> int:
        size = network.visual.image_size
        return size if isinstance(size, int) else size[0]
