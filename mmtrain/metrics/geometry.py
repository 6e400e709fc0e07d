"""How pairs lie on the sphere (RankCLIP, spec section 5.4): alignment, uniformity and the modality gap.

CyCLIP measures alignment and uniformity in two ways and the paper does not say which one its figure shows, so both are
here under names of their own. Which direction is better is not said either. All sums are float64.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.metrics.ranking import RowMetric, in_order_of_ids

Triangle = Literal["all", "lower"]


def alignment_cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Return mean_i x_i . y_i in [-1, 1] of unit rows [M, D] (labels form of section 5.4).

    Example:
        >>> alignment_cosine(torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
        tensor(0.8000, dtype=torch.float64)
    """
    images, texts = _pairs(images, texts)
    return (images * texts).sum(dim=1).mean()


def uniformity_cosine(images: Tensor, texts: Tensor, chunk: int = 512) -> Tensor:
    """Return ln( 1 / (M (M - 1)) sum_{i != j} exp(-x_i . y_j) ) in [-1, 1] of unit rows [M, D] (labels form).

    At most chunk x M products are held. NaN for fewer than two pairs.

    Example:
        >>> uniformity_cosine(torch.eye(2), torch.eye(2)) + 0.0
        tensor(0., dtype=torch.float64)
    """
    images, texts = _pairs(images, texts)
    return _log_mean_exp(lambda x, y: -(x @ y.T), images, texts, "all", chunk)


def alignment_distance(images: Tensor, texts: Tensor) -> Tensor:
    """Return mean_i ||x_i - y_i||^2 in [0, 4] of unit rows [M, D] (captions form of section 5.4).

    Example:
        >>> alignment_distance(torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
        tensor(0.4000, dtype=torch.float64)
    """
    images, texts = _pairs(images, texts)
    return (images - texts).square().sum(dim=1).mean()


def uniformity_distance(images: Tensor, texts: Tensor, triangle: Triangle = "all", chunk: int = 512) -> Tensor:
    """Return ln mean exp(-2 ||x_i - y_j||^2) in [-8, 0] over i != j of unit rows [M, D] (captions form).

    Args:
        images: unit rows [M, D].
        texts: unit rows [M, D], row i belonging to image i.
        triangle: "all" takes every i != j; "lower" only i > j, as CyCLIP's script does, which makes the value depend
            on the order of the pairs.
        chunk: images at a time; at most chunk x M products are held.

    Example:
        >>> uniformity_distance(torch.eye(2), torch.eye(2))
        tensor(-4., dtype=torch.float64)
    """
    images, texts = _pairs(images, texts)

    def exponent(x: Tensor, y: Tensor) -> Tensor:
        return 4 * x @ y.T - 2 * x.square().sum(dim=1, keepdim=True) - 2 * y.square().sum(dim=1)

    return _log_mean_exp(exponent, images, texts, triangle, chunk)


def modality_gap(images: Tensor, texts: Tensor) -> Tensor:
    """Return ||mean(images) - mean(texts)||_2 in [0, 2] of unit rows [M, D] and [N, D] (figure 6).

    Example:
        >>> modality_gap(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
        tensor(1., dtype=torch.float64)
    """
    return (_float64(images).mean(dim=0) - _float64(texts).mean(dim=0)).norm()


MEASURES = (alignment_cosine, uniformity_cosine, alignment_distance, uniformity_distance, modality_gap)


def _float64(rows: Tensor) -> Tensor:
    return (rows.cpu() if rows.device.type == "mps" else rows).double()  # mps has no float64


def _pairs(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 2 or images.shape != texts.shape:
        raise ValueError(f"images and texts must be pairs [M, D], got {tuple(images.shape)} and {tuple(texts.shape)}")
    return _float64(images), _float64(texts)


def _log_mean_exp(
    exponent: Callable[[Tensor, Tensor], Tensor], images: Tensor, texts: Tensor, triangle: Triangle, chunk: int
) -> Tensor:
    """Return ln mean exp(exponent(x_i, y_j)) over i != j, or over i > j for "lower"."""
    if triangle not in ("all", "lower"):
        raise ValueError(f"triangle must be 'all' or 'lower', got {triangle!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    total = images.new_zeros(())
    for first in range(0, len(images), chunk):
        values = exponent(images[first : first + chunk], texts).exp_()
        if triangle == "lower":
            values.tril_(first - 1)
        else:
            values.diagonal(first).zero_()
        total += values.sum()
    num_pairs = len(images) * (len(images) - 1) // (2 if triangle == "lower" else 1)
    return (total / num_pairs).log()


class PairGeometry(RowMetric):
    """The five measures above over a whole set of image-text pairs, each id once over all processes.

    Uniformity costs M^2 products, so of more than `max_pairs` pairs that many are drawn: with the ids in ascending
    order, the first of a permutation with a fixed seed. The draw does not depend on the number of processes.

    Args:
        max_pairs: most pairs that are compared, at least 2.
        seed: of the draw.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = PairGeometry()
        >>> metric.update(2 * torch.eye(2), torch.eye(2), torch.tensor([3, 8]))
        >>> {name: round(float(value), 3) + 0.0 for name, value in metric.compute().items()}  # doctest: +ELLIPSIS
        {'alignment_cosine': 1.0, 'uniformity_cosine': 0.0, 'alignment_distance': 0.0, 'uniformity_distance': -4.0, ...}
    """

    higher_is_better = None

    def __init__(self, max_pairs: int = 10_000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_pairs < 2:
            raise ValueError(f"max_pairs must be at least 2, got {max_pairs}")
        self.max_pairs, self.seed = max_pairs, seed
        self.add_rows("ids", torch.int64)
        self.add_rows("image_features", torch.float32)
        self.add_rows("text_features", torch.float32)

    def update(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> None:
        """Add pairs; features of any length and float type are brought to unit length.

        Args:
            image_features: [B, D].
            text_features: [B, D]: a caption of the image, or the text feature of its class.
            ids: int64 [B], unique in the evaluated set; below 0 is padding.
        """
        if not len(image_features) == len(text_features) == len(ids):
            got = f"{len(image_features)}, {len(text_features)} and {len(ids)}"
            raise ValueError(f"image_features, text_features and ids must have one row a pair, got {got} rows")
        real = ids >= 0
        self.ids.append(ids[real].long())
        self.image_features.append(F.normalize(image_features[real].float(), dim=-1).flatten())
        self.text_features.append(F.normalize(text_features[real].float(), dim=-1).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return `alignment_cosine`, `uniformity_cosine`, `alignment_distance`, `uniformity_distance`, `modality_gap`.

        NaN with a warning for fewer than two pairs.
        """
        images, texts = self._draw(self.max_pairs, self.seed)
        if len(images) < 2:
            warnings.warn("PairGeometry saw fewer than two pairs: its values are NaN", stacklevel=2)
            nan = torch.tensor(torch.nan, device=images.device)
            return {measure.__name__: nan for measure in MEASURES}
        return {measure.__name__: measure(images, texts) for measure in MEASURES}

    def pairs(self, limit: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return at most `limit` pairs of all processes as unit rows (images [M, D], texts [M, D]), for a figure.

        They come in ascending order of ids, drawn like those of `compute`. It gathers: call it on every process.
        """
        with self.sync_context(should_sync=self._to_sync):
            return self._draw(limit, seed)

    def _draw(self, limit: int, seed: int) -> tuple[Tensor, Tensor]:
        ids = self.rows("ids")
        kept = in_order_of_ids(ids)
        if len(kept) > limit:
            drawn = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
            kept = kept[drawn.to(kept.device)]
        features = (self.rows(name) for name in ("image_features", "text_features"))
        images, texts = (rows.view(len(ids), rows.numel() // max(1, len(ids)))[kept] for rows in features)
        return images, texts
