"""Retrieval between the video and the sound of clips: recall at k, median and mean rank, both ways (Diff-Foley)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.metrics.ranking import RowMetric, in_order_of_ids, rank_of_best, similarity

KS = (1, 5, 10)


def pair_ranks(queries: Tensor, candidates: Tensor, chunk: int = 1024) -> Tensor:
    """Rank, from 1, of candidate i for query i by inner product; wrong candidates of an equal score stand before it.

    Args:
        queries: unit rows [N, D].
        candidates: unit rows [N, D].
        chunk: queries at a time.

    Returns:
        int64 [N]; N for a query whose features are not finite.
    """
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = similarity(queries[start : start + chunk], candidates)
        correct = torch.zeros_like(scores, dtype=torch.bool)
        rows = torch.arange(len(scores), device=scores.device)
        correct[rows, start + rows] = True
        ranks.append(rank_of_best(scores, correct, "pessimistic"))
    return torch.cat(ranks).clamp(max=len(queries)) if ranks else torch.empty(0, dtype=torch.int64)


def retrieval_values(video: Tensor, audio: Tensor, chunk: int = 1024) -> dict[str, Tensor]:
    """Recalls as fractions, and ranks, of video to audio (`v2a_`) and audio to video (`a2v_`).

    The median is rounded down for an even number of clips, as in the released code.

    Args:
        video: unit rows [N, D].
        audio: unit rows [N, D].

    Returns:
        `v2a_r1`, `v2a_r5`, `v2a_r10`, `v2a_median_rank`, `v2a_mean_rank`, and the same for `a2v`; NaN without clips.

    Example:
        >>> values = retrieval_values(torch.eye(3), torch.eye(3)[[0, 2, 1]])
        >>> values["v2a_r1"], values["v2a_mean_rank"]
        (tensor(0.3333), tensor(2.3333))
    """
    values = {}
    for way, ranks in (("v2a", pair_ranks(video, audio, chunk)), ("a2v", pair_ranks(audio, video, chunk))):
        ranks = ranks.float()
        values |= {f"{way}_r{k}": (ranks <= k).float().mean() for k in KS}
        median = ranks.quantile(0.5).floor() if len(ranks) else ranks.mean()
        values |= {f"{way}_median_rank": median, f"{way}_mean_rank": ranks.mean()}
    return values


class ClipRetrieval(RowMetric):
    """`retrieval_values` over a whole set, exact over processes: each clip id counts once.

    Example:
        >>> metric = ClipRetrieval()
        >>> metric.update(torch.eye(2), torch.eye(2), torch.tensor([3, 7]))
        >>> metric.compute()["a2v_r1"]
        tensor(1.)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("video", torch.float32)
        self.add_rows("audio", torch.float32)
        self.add_rows("ids", torch.int64)

    def update(self, video: Tensor, audio: Tensor, ids: Tensor) -> None:
        """Add clips: features [B, D] of any length, ids int64 [B], of which those below 0 are padding.

        Raises:
            ValueError: lengths differ.
        """
        if not len(video) == len(audio) == len(ids):
            raise ValueError(f"video, audio and ids must have as many rows, got {len(video)}, {len(audio)}, {len(ids)}")
        real = ids >= 0
        self.video.append(F.normalize(video[real].float(), dim=-1).flatten())
        self.audio.append(F.normalize(audio[real].float(), dim=-1).flatten())
        self.ids.append(ids[real].long())

    def compute(self) -> dict[str, Tensor]:
        """See `retrieval_values`."""
        ids = self.rows("ids")
        kept = in_order_of_ids(ids)
        rows = [self.rows(name).view(len(ids), -1 if len(ids) else 1)[kept] for name in ("video", "audio")]
        return retrieval_values(*rows)
