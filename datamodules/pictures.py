"""Settings of what happens to a picture and its text on the way into a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from datamodules.text import tokenize
from datamodules.transforms import Interpolation, random_crop, resize_and_centre_crop

LONGEST_CAPTION = 2000  # characters handed to the tokenizer, which keeps 77 tokens


@dataclass
class Pictures:
    """What happens to a picture and its text on the way into a batch.

    Args:
        size: height and width in pixels.
        crop_scale: share of the area that a random training crop keeps; None is the evaluation crop, as published.
        crop_ratio: width / height of random crops.
        flip: probability of mirroring in training.
        context_length: token ids a caption.
        faithful_truncation: cut long captions without restoring the end token (fault of the released code).
    """

    size: int = 224
    crop_scale: tuple[float, float] | None = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: Interpolation = "bicubic"
    context_length: int = 77
    faithful_truncation: bool = False

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [len(texts), context_length]."""
        return tokenize([t[:LONGEST_CAPTION] for t in texts], self.context_length, self.faithful_truncation)

    def evaluation_view(self, picture: Tensor) -> Tensor:
        """uint8 [3, size, size] of a picture, without anything random."""
        return resize_and_centre_crop(picture, self.size, self.interpolation)

    def training_view(self, picture: Tensor, generator: np.random.Generator) -> Tensor:
        """A random crop, or the evaluation view if `crop_scale` is None."""
        if self.crop_scale is None:
            return self.evaluation_view(picture)
        return random_crop(
            picture, self.size, generator, self.crop_scale, self.crop_ratio, self.flip, self.interpolation
        )
