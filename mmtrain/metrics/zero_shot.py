"""Zero-shot classification by prompt templates (RankCLIP, spec section 5.1)."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.metrics.ranking import (
    RowMetric,
    Ties,
    check_labels,
    check_options,
    first_occurrence,
    rank_of_best,
    similarity,
)


def class_weights(template_features: Tensor) -> Tensor:
    """Return one unit vector a class [C, D]: normalise every template, average, normalise (section 5.1).

    Args:
        template_features: text features [C, P, D] of C classes in P prompt templates each; any length.
    """
    if template_features.ndim != 3:
        raise ValueError(f"template_features must be [classes, templates, D], got {tuple(template_features.shape)}")
    return F.normalize(F.normalize(template_features, dim=-1).mean(dim=1), dim=-1)


def label_ranks(image_features: Tensor, labels: Tensor, weights: Tensor, ties: Ties = "pessimistic") -> Tensor:
    """Return the rank (from 1) of each image's own class among all classes, int64 [B].

    Args:
        image_features: [B, D]; the length of a row does not change its ranks.
        labels: int64 [B] in [0, C).
        weights: unit rows [C, D].
        ties: how another class with exactly the same score counts. "pessimistic" puts it first, so that a model
            with collapsed features scores 0 and not 1; two classes of one name then both miss at k = 1.

    Raises:
        ValueError: for a label outside [0, C).
    """
    num_classes = weights.shape[0]
    check_labels(labels, num_classes)
    correct = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return rank_of_best(similarity(image_features, weights), correct, ties)


def topk_correct(
    image_features: Tensor,
    labels: Tensor,
    weights: Tensor,
    ks: tuple[int, ...] = (1, 3, 5),
    ties: Ties = "pessimistic",
) -> Tensor:
    """Return whether the label is among the k best classes, bool [B, len(ks)], the ks ascending (section 5.1).

    A k above the number of classes acts like that number: every finite row is a hit.
    """
    ks = check_options(ks, ties)
    ranks = label_ranks(image_features, labels, weights, ties)
    return ranks[:, None] <= torch.tensor(ks, device=ranks.device)


class ZeroShotAccuracy(RowMetric):
    """Fraction of images whose label is among the k best classes, each sample id counted once over all processes.

    Args:
        ks: the k of "top k"; clipped to the number of classes.
        ties: see `label_ranks`.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = ZeroShotAccuracy(ks=(1, 2))
        >>> weights = torch.eye(3)
        >>> images = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
        >>> metric.update(images, torch.tensor([0, 1, 1]), weights, sample_ids=torch.tensor([7, 8, 8]))
        >>> metric.compute()
        {'top1': tensor(0.5000), 'top2': tensor(1.)}
    """

    def __init__(self, ks: tuple[int, ...] = (1, 3, 5), ties: Ties = "pessimistic", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = check_options(tuple(ks), ties)
        self.ties = ties
        self.add_rows("sample_ids", torch.int64)
        self.add_rows("ranks", torch.int64)

    def update(self, image_features: Tensor, labels: Tensor, class_weights: Tensor, sample_ids: Tensor) -> None:
        """Add a batch.

        Args:
            image_features: [B, D].
            labels: int64 [B] in [0, C).
            class_weights: [C, D] from the function of this name, the same in every update.
            sample_ids: int64 [B], unique in the evaluated set; rows with an id below 0 are padding.
        """
        if not len(image_features) == len(labels) == len(sample_ids):
            got = f"{len(image_features)}, {len(labels)} and {len(sample_ids)}"
            raise ValueError(f"image_features, labels and sample_ids must have one row a sample, got {got} rows")
        real = sample_ids >= 0
        self.sample_ids.append(sample_ids[real].long())
        self.ranks.append(label_ranks(image_features[real], labels[real], class_weights, self.ties))

    def compute(self) -> dict[str, Tensor]:
        """Return {"top1": ...} as fractions in [0, 1]; NaN with a warning if no sample was seen."""
        ranks = self.rows("ranks")[first_occurrence(self.rows("sample_ids"))]
        if not ranks.numel():
            warnings.warn("ZeroShotAccuracy saw no samples: its values are NaN", stacklevel=2)
        return {f"top{k}": (ranks <= k).float().mean() for k in self.ks}
