"""ALIP (arXiv 2308.08428): raw text and a synthetic caption, weighted by how well picture and texts agree."""

from typing import Any

import torch
from torch import Tensor

from mmtrain import distributed
from mmtrain.config_errors import UserError
from mmtrain.rankclip.losses import RowObjective, alip_objective, alip_weights
from mmtrain.rankclip.module import ImageTextModule


class Alip(ImageTextModule):
    """ALIP, see `alip_objective`. Needs `extra_captions` in the data.

    Args:
        architecture: ALIP uses exact GELU, so not a "-quickgelu" name.
        gamma: exponent of both gates; 2 as published.
        momentum: of the running mean similarities; 0.99 as published. They start at 1, so for about the first 100
            steps all weights are small, and they are kept in the checkpoint (the released code forgets them).
        kwargs: further settings of `ImageTextModule`.
    """

    method = "ALIP"

    def __init__(
        self,
        architecture: str = "ViT-B-32",
        gamma: float = 2.0,
        momentum: float = 0.99,
        **kwargs: Any,
    ) -> None:
        super().__init__(architecture, **kwargs)
        if self.loss_settings.half_precision:
            raise UserError("loss.half_precision: ALIP's released loss is in float32, so is ours")
        self.gamma, self.momentum = gamma, momentum
        self.register_buffer("momenta", torch.ones(3))  # text-caption, image-text, image-caption
        self.weight_means: dict[str, Tensor] = {}

    def texts(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if "extra_text" not in batch:
            raise UserError("ALIP needs a second text for each picture: set data.init_args.extra_captions")
        return batch["text"], batch["extra_text"]

    @torch.no_grad()
    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        image, text, caption = (f.float() if f.dtype != torch.float64 else f for f in features)
        pairs = [(text, caption), (image, text), (image, caption)]
        similarities = torch.stack([(a * b).sum(-1) for a, b in pairs])
        means = distributed.sum_over_processes(similarities.mean(-1)) / distributed.world_size()
        self.momenta.lerp_(means.to(self.momenta), 1 - self.momentum)
        sample, for_text, for_caption = alip_weights(similarities, self.momenta, self.gamma)
        self.weight_means = {
            "sample_weight": sample.mean(),
            "text_weight": for_text.mean(),
            "caption_weight": for_caption.mean(),
        }
        start = distributed.rank() * len(image)
        return alip_objective(sample * for_text, sample * for_caption, start)

    def readable(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        names = ("momentum_text_caption", "momentum_image_text", "momentum_image_caption")
        return parts | self.weight_means | dict(zip(names, self.momenta.clone(), strict=True))
