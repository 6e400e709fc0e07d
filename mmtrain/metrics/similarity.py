"""Likeness of generated pictures to reference pictures and to texts, on the features of a network that is given.

DINO-I, CLIP-I and CLIP-T of the customisation literature (DreamBooth, arXiv 2208.12242): cosines, here not times 100.
What a network sees of a picture changes these numbers, so that is part of this file too (`fit_pictures`).
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad

from mmtrain.metrics.generation import SampleMetric, clip_means, with_bounds
from mmtrain.metrics.intervals import NOTHING, Interval, bootstrap, mean_of

Resize = Literal["crop", "pad", "squash"]
RESIZES = get_args(Resize)


class ImageFeatures(Protocol):
    """A network that turns pictures into features.

    `name` says in a few words what it is and how pictures reach it, for the protocol of a result.
    """

    name: str

    def image_features(self, pictures: Tensor) -> Tensor:
        """Features, float32 [B, D], on the device of `pictures`, uint8 [B, 3, H, W] of any size."""
        ...


class ImageTextFeatures(Protocol):
    """A network that puts pictures and texts into one space."""

    name: str

    def image_features(self, pictures: Tensor) -> Tensor:
        """Features, float32 [B, D], on the device of `pictures`, uint8 [B, 3, H, W] of any size."""
        ...

    def text_features(self, texts: list[str]) -> Tensor:
        """Features, float32 [B, D]."""
        ...


def fit_pictures(
    pictures: Tensor, size: int, resize: Resize = "crop", shorter: int | None = None, mode: str = "bicubic"
) -> Tensor:
    """Pictures as a square network sees them.

    Args:
        pictures: uint8 [B, 3, H, W].
        size: height and width of the result.
        resize: "crop" scales the shorter side to `shorter` and keeps the centre, as the published transforms do: a
            16:9 picture loses its sides, and a character that stands there. "pad" scales the longer side and fills with
            black; "squash" scales both sides.
        shorter: of "crop", pixels; None is `size`.
        mode: "bicubic" or "bilinear", both with antialiasing.

    Returns:
        float32 [B, 3, size, size] in [0, 1].

    Raises:
        ValueError: not pictures, an unknown way, or `shorter` below `size`.

    Example:
        >>> wide = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
        >>> wide[..., 40:] = 255
        >>> [round(float(fit_pictures(wide, 20, way)[..., 14:].mean()), 2) for way in RESIZES]
        [1.0, 0.5, 1.0]
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != torch.uint8:
        raise ValueError(f"expected uint8 [B, 3, H, W], got {pictures.dtype} {list(pictures.shape)}")
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
    shorter = shorter or size
    if shorter < size:
        raise ValueError(f"shorter must be at least size {size}, got {shorter}")
    height, width = pictures.shape[-2:]
    least, most = min(height, width), max(height, width)
    target = {  # rounded down as torchvision does it
        "crop": (shorter * height // least, shorter * width // least),
        "pad": (max(1, size * height // most), max(1, size * width // most)),
        "squash": (size, size),
    }[resize]
    scaled = pictures.float() / 255
    if target != (height, width):  # bicubic goes beyond the range at sharp edges
        scaled = interpolate(scaled, target, mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    top, left = (-round((side - size) / 2) for side in target)  # negative ones crop
    return pad(scaled, (left, size - target[1] - left, top, size - target[0] - top))


def mean_reference(features: Tensor) -> Tensor:
    """Mean of the unit features, float64 [D], of reference features [R, D].

    Raises:
        ValueError: none.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected at least one reference, [R, D], got {list(features.shape)}")
    return normalize(features.double(), dim=-1).mean(dim=0)


def similarity_to_references(features: Tensor, references: Tensor) -> Tensor:
    """Mean cosine of each picture with all references, float64 [B]: (1/R) sum_r cos(f_b, g_r) = unit(f_b) . mean_r
    unit(g_r), so that no pair is formed.

    Args:
        features: [B, D].
        references: [D], see `mean_reference`, or [B, D], one for each picture.

    Example:
        >>> references = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> similarity_to_references(torch.tensor([[3.0, 0.0]]), mean_reference(references))
        tensor([0.5000], dtype=torch.float64)
    """
    return (normalize(features.double(), dim=-1) * references.double()).sum(dim=-1)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each row of [B, D] with the same row of the other, float64 [B]."""
    return (normalize(first.double(), dim=-1) * normalize(second.double(), dim=-1)).sum(dim=-1)


def text_key(*parts: Any) -> int:
    """A number below 2^46 for texts and numbers, the same on every machine: an id for what has only a name.

    Example:
        >>> text_key("Crong/1", 3) == text_key("Crong/1", 3) != text_key("Crong/1", 4)
        True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 18


class ReferenceSimilarity(SampleMetric):
    """Cosine of every pair of a generated and a real picture of the same character, mean over pairs, then characters.

    With DINO's features this is DINO-I, with CLIP's CLIP-I. A picture that shows two characters counts for both.

    Args:
        references: features of the real pictures of each character, [R, D] by name.
        seed: of the bootstrap intervals.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ReferenceSimilarity({"Crong": torch.eye(2), "Eddy": torch.eye(2)[:1]})
        >>> present = torch.tensor([[1, 0], [0, 1]])
        >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), present, torch.arange(2))
        >>> float(metric.compute()["similarity"])
        0.75
    """

    def __init__(self, references: Mapping[str, Tensor], seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("cosine", "present"), seed, **kwargs)
        if not references:
            raise ValueError("references must hold at least one character")
        self.characters = list(references)
        means = torch.stack([mean_reference(features.detach().cpu()) for features in references.values()])
        self.register_buffer("references", means.float(), persistent=False)

    def update(self, features: Tensor, present: Tensor, ids: Tensor, sample: Tensor | int = 0) -> None:
        """Add generated pictures.

        Args:
            features: [B, D].
            present: 0 or 1, [B, K]: which characters the picture is to show, in the order of `references`.
            ids, sample: of the prompt and of the seed, see `SampleMetric.add`; a (prompt, seed) counts once.

        Raises:
            ValueError: another number of characters than there are references.
        """
        if present.shape[1:] != (len(self.characters),):
            raise ValueError(f"present must be [B, {len(self.characters)}], got {list(present.shape)}")
        self.add(ids, sample, cosine=self.of(features), present=present)

    def of(self, features: Tensor) -> Tensor:
        """Mean cosine of pictures [B, D] with each character's references, float64 [B, K]."""
        return normalize(features.double(), dim=-1) @ self.references.to(features.device).double().T

    def by_character(self) -> dict[str, Interval]:
        """Of each character that was asked for: the mean, and its 95 % bootstrap interval over prompts if they are two
        or more. Features that are not finite make it NaN: what diverged must not look good.
        """
        table, found = self.table(), {}
        for place, name in enumerate(self.characters if len(table["ids"]) else ()):
            rows = table["present"][:, place] > 0
            if rows.any():
                means = clip_means(table["cosine"][rows, place], table["ids"][rows])
                found[name] = mean_interval(means, self.seed)
        return found

    def compute(self) -> dict[str, Tensor]:
        """Return `similarity`, `similarity_low`, `similarity_high`; NaN if there is nothing.

        A character without any picture is left out of the mean.
        """
        return with_bounds("similarity", mean_of(list(self.by_character().values())))


class TextSimilarity(SampleMetric):
    """Cosine of a generated picture and its text, mean over prompts: CLIP-T with CLIP's features.

    Args:
        seed: of the bootstrap interval.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = TextSimilarity()
        >>> metric.update(torch.eye(2), torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.arange(2))
        >>> float(metric.compute()["similarity"])
        0.5
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("cosine",), seed, **kwargs)

    def update(self, pictures: Tensor, texts: Tensor, ids: Tensor, sample: Tensor | int = 0) -> None:
        """Add features of pictures and of their texts, [B, D] each; `ids` and `sample` as `ReferenceSimilarity`."""
        self.add(ids, sample, cosine=cosines(pictures, texts))

    def compute(self) -> dict[str, Tensor]:
        """Return `similarity`, `similarity_low`, `similarity_high`; NaN if there is nothing."""
        table = self.table()
        means = clip_means(table["cosine"].flatten(), table["ids"])
        return with_bounds("similarity", mean_interval(means, self.seed) if len(means) else NOTHING)


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean of values [N] and its bootstrap interval; a single one tells no interval.

    >>> mean_interval(np.array([0.5]))
    Interval(mean=0.5, low=nan, high=nan)
    """
    return bootstrap(values, seed) if len(values) > 1 else Interval(float(values.mean()), math.nan, math.nan)
