"""Are the right characters in a picture? F-Acc, C-F1 and left-to-right order, on the probabilities of a recogniser.

As the story visualisation literature counts them (StoryDALL-E, arXiv 2209.06192): a character is in the picture where
its probability is above 0.5; F-Acc is the share of frames with exactly the characters asked for, C-F1 is F1 over
(frame, character) decisions.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmtrain.metrics.generation import SampleMetric, clip_means, with_bounds
from mmtrain.metrics.intervals import NOTHING, wilson

THRESHOLD = 0.5
Average = Literal["micro", "macro"]


def decisions(probabilities: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Whether each character is in each picture, bool [B, K]: above the threshold. NaN is a no."""
    return probabilities > threshold


def frames_right(probabilities: Tensor, present: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Whether each picture shows exactly the characters asked for, bool [B].

    Args:
        probabilities: [B, K].
        present: 0 or 1, [B, K].

    Example:
        >>> frames_right(torch.tensor([[0.9, 0.2], [0.9, 0.6]]), torch.tensor([[1, 0], [1, 0]]))
        tensor([ True, False])
    """
    return (decisions(probabilities, threshold) == present.bool()).all(dim=1) & probabilities.isfinite().all(dim=1)


def character_f1(
    probabilities: Tensor, present: Tensor, average: Average = "micro", threshold: float = THRESHOLD
) -> float:
    """F1 = 2 tp / (2 tp + fp + fn) of the (frame, character) decisions.

    Args:
        probabilities: [N, K].
        present: 0 or 1, [N, K].
        average: "micro" counts all decisions together; "macro" is the mean of each character's F1, over those that are
            asked for or seen somewhere.

    Returns:
        In [0, 1]; NaN where there is nothing to count.

    Raises:
        ValueError: shapes differ, or an unknown average.

    Example:
        >>> seen = torch.tensor([[0.9, 0.2], [0.9, 0.6]])
        >>> asked = torch.tensor([[1, 0], [1, 0]])
        >>> round(character_f1(seen, asked), 3), character_f1(seen, asked, "macro")
        (0.8, 0.5)
    """
    if probabilities.shape != present.shape or probabilities.ndim != 2:
        raise ValueError(f"expected two [N, K], got {list(probabilities.shape)} and {list(present.shape)}")
    if average not in get_args(Average):
        raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}")
    seen, asked = decisions(probabilities, threshold), present.bool()
    hits = (seen & asked).sum(dim=0).double()
    total = (seen.sum(dim=0) + asked.sum(dim=0)).double()
    if average == "micro":
        hits, total = hits.sum(), total.sum()
    counted = total > 0
    return float((2 * hits[counted] / total[counted]).mean()) if counted.any() else math.nan


def order_kept(left: Tensor, right: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Whether the first character stands on the left and the second on the right, bool [B]; ours, not the paper's.

    Kept is the order where the left half of the picture looks more like the first character than the right half does,
    and the right half more like the second.

    Args:
        left, right: probabilities of the halves, [B, K].
        first, second: which characters are asked for, left to right, int64 [B].

    Example:
        >>> left, right = torch.tensor([[0.9, 0.2], [0.3, 0.9]]), torch.tensor([[0.1, 0.8], [0.8, 0.1]])
        >>> order_kept(left, right, torch.tensor([0, 0]), torch.tensor([1, 1]))
        tensor([ True, False])
    """
    place = torch.arange(len(left), device=left.device)
    return (left[place, first] > right[place, first]) & (right[place, second] > left[place, second])


class CharacterMetric(SampleMetric):
    """Keeps what was seen and what was asked for of every picture, each (prompt, seed) once.

    Args:
        threshold: of a probability.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, threshold: float = THRESHOLD, **kwargs: Any) -> None:
        super().__init__(("probability", "present"), **kwargs)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        self.threshold = threshold

    def update(self, probabilities: Tensor, present: Tensor, ids: Tensor, sample: Tensor | int = 0) -> None:
        """Add pictures.

        Args:
            probabilities: of the recogniser, [B, K].
            present: 0 or 1, [B, K]: the characters asked for.
            ids, sample: of the prompt and of the seed, see `SampleMetric.add`.

        Raises:
            ValueError: shapes differ.
        """
        if probabilities.shape != present.shape or probabilities.ndim != 2:
            raise ValueError(f"expected two [B, K], got {list(probabilities.shape)} and {list(present.shape)}")
        self.add(ids, sample, probability=probabilities, present=present)


class FrameAccuracy(CharacterMetric):
    """F-Acc: share of pictures that show exactly the characters asked for, with Wilson's interval over prompts.

    Several seeds of a prompt are no independent trials: the interval counts prompts.

    Args:
        threshold, kwargs: see `CharacterMetric`.

    Example:
        >>> metric = FrameAccuracy()
        >>> metric.update(torch.tensor([[0.9, 0.2], [0.9, 0.6]]), torch.tensor([[1, 0], [1, 0]]), torch.arange(2))
        >>> float(metric.compute()["f_acc"])
        0.5
    """

    def compute(self) -> dict[str, Tensor]:
        """Return `f_acc` of all pictures, `f_acc_single` and `f_acc_two` of those that ask for one and for at least two
        characters, each with `_low` and `_high`; NaN where there are none.
        """  # fmt: skip
        table = self.table()
        right = frames_right(table["probability"], table["present"], self.threshold).double()
        asked = table["present"].sum(dim=1)
        found = {}
        for name, rows in (("f_acc", asked >= 0), ("f_acc_single", asked == 1), ("f_acc_two", asked >= 2)):
            shares = clip_means(right[rows], table["ids"][rows])
            found |= with_bounds(name, wilson(float(shares.sum()), len(shares)) if len(shares) else NOTHING)
        return found


class CharacterF1(CharacterMetric):
    """C-F1: F1 over (picture, character) decisions, see `character_f1`.

    Args:
        average: "micro", which the literature reports, or "macro".
        threshold, kwargs: see `CharacterMetric`.

    Example:
        >>> metric = CharacterF1("macro")
        >>> metric.update(torch.tensor([[0.9, 0.2], [0.9, 0.6]]), torch.tensor([[1, 0], [1, 0]]), torch.arange(2))
        >>> float(metric.compute()["f1"])
        0.5
    """

    def __init__(self, average: Average = "micro", threshold: float = THRESHOLD, **kwargs: Any) -> None:
        super().__init__(threshold, **kwargs)
        if average not in get_args(Average):
            raise ValueError(f"average must be one of {', '.join(get_args(Average))}, got {average!r}")
        self.average = average

    def compute(self) -> dict[str, Tensor]:
        """Return `f1` in [0, 1]; NaN if there is nothing."""
        table = self.table()
        value = character_f1(table["probability"], table["present"], self.average, self.threshold)
        return {"f1": torch.tensor(value, dtype=torch.float64)}


class OrderKept(SampleMetric):
    """Share of pictures of two characters that stand left to right as asked, with Wilson's interval over prompts.

    Ours, not the paper's; see `order_kept`.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = OrderKept()
        >>> left, right = torch.tensor([[0.9, 0.2], [0.3, 0.9]]), torch.tensor([[0.1, 0.8], [0.8, 0.1]])
        >>> metric.update(left, right, torch.tensor([0, 0]), torch.tensor([1, 1]), torch.arange(2))
        >>> float(metric.compute()["order_kept"])
        0.5
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("kept",), **kwargs)

    def update(
        self, left: Tensor, right: Tensor, first: Tensor, second: Tensor, ids: Tensor, sample: Tensor | int = 0
    ) -> None:
        """Add pictures; the first four as `order_kept` has them, `ids` and `sample` as `SampleMetric.add`."""
        self.add(ids, sample, kept=order_kept(left, right, first, second))

    def compute(self) -> dict[str, Tensor]:
        """Return `order_kept`, `order_kept_low`, `order_kept_high`; NaN if there is nothing."""
        table = self.table()
        shares = clip_means(table["kept"].flatten(), table["ids"])
        return with_bounds("order_kept", wilson(float(shares.sum()), len(shares)) if len(shares) else NOTHING)
