"""Image-text retrieval recall (RankCLIP, spec section 5.3): captions an image, tie rule and protocol are settings.

The standard protocol keeps all captions of an image; `captions="first"` is the one-caption protocol (as many texts as
images) behind figures that are multiples of 1 / number of images; "both" reports the two side by side.
"""

import itertools
import warnings
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.metrics.ranking import MISS, RowMetric, Ties, check_options, first_occurrence, row_similarity, similarity

Captions = Literal["all", "first", "both"]
PROTOCOLS = {"all": {"": False}, "first": {"": True}, "both": {"": False, "one_caption_": True}}
"""For each setting of `captions`: prefix of the keys -> whether only the first caption of an image is kept."""


def _ranks(images: Tensor, texts: Tensor, text_image: Tensor, ties: Ties, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the rank of each image's best caption [I] and of each text's image [T], as `rank_of_best` counts.

    The score of each correct pair is known beforehand, so one pass over blocks of scores counts what stands in front
    of it in both directions, and no row or column has to be held whole.
    """
    parts = zip(texts.split(chunk), text_image.split(chunk), strict=True)
    own = torch.cat([row_similarity(images[owner], rows) for rows, owner in parts])
    best = own.new_full((len(images),), -torch.inf).scatter_reduce(0, text_image, own, "amax")
    behind = torch.le if ties == "optimistic" else torch.lt
    i2t, t2i = torch.ones_like(best, dtype=torch.int64), torch.ones_like(own, dtype=torch.int64)
    for i, j in itertools.product(range(0, len(images), chunk), range(0, len(texts), chunk)):
        rows, columns = slice(i, i + chunk), slice(j, j + chunk)
        scores = similarity(images[rows], texts[columns])
        owner = text_image[columns] - i
        inside = ((owner >= 0) & (owner < len(scores))).nonzero().squeeze(1)
        scores[owner[inside], inside] = -torch.inf  # correct candidates don't stand in each other's way
        i2t[rows] += (~behind(scores, best[rows, None])).sum(dim=1)  # the negation catches NaN
        t2i[columns] += (~behind(scores, own[columns])).sum(dim=0)
    return torch.where(best.isfinite(), i2t, MISS), torch.where(own.isfinite(), t2i, MISS)


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    ks: tuple[int, ...] = (1, 5, 10),
    ties: Ties = "optimistic",
    chunk: int = 2048,
) -> dict[str, Tensor]:
    """Return recall at k in both directions, fractions in [0, 1] (section 5.3).

        i2t R@k = mean_i [ min over captions j of i: rank_j(s_i.) <= k ],   t2i R@k = mean_j [ rank_img(j)(s_.j) <= k ]

    with s_ij = image_i . text_j and rank = 1 + number of strictly larger scores ("optimistic"), or of others not
    smaller ("pessimistic"; other captions of the same image are correct too and do not count). Under "optimistic"
    a model whose features are all equal scores 1: ask for "pessimistic" where that can happen.

    Args:
        image_features: unit rows [I, D].
        text_features: unit rows [T, D].
        text_image: int64 [T], the row of `image_features` each text belongs to. Images without a text are left out
            of the i2t mean, for they have no correct answer, and stay candidates for t2i.
        ks: ranks to report.
        ties: how an exactly equal score of a wrong candidate counts.
        chunk: rows at a time; at most a chunk x chunk block of scores is held, so that memory does not grow with I and
            T: about 75 MB at 2048 and width 512.

    Returns:
        `i2t_r{k}` and `t2i_r{k}` for each k; NaN if there is nothing to average.

    Raises:
        ValueError: if `text_image` does not fit the features, or an option is not allowed.

    Example:
        >>> images, texts = torch.eye(2), torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.8, 0.6]])
        >>> recall_at_k(images, texts, torch.tensor([0, 1, 1]), ks=(1,))
        {'i2t_r1': tensor(1.), 't2i_r1': tensor(0.6667)}
    """
    ks = check_options(tuple(ks), ties)
    num_images = len(image_features)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if len(text_image) != len(text_features):
        raise ValueError(f"text_image must have one entry a text, got {len(text_image)} for {len(text_features)}")
    if text_image.numel() and (text_image.min() < 0 or text_image.max() >= num_images):
        span = f"{int(text_image.min())} to {int(text_image.max())}"
        raise ValueError(f"text_image must be rows in [0, {num_images}) of image_features, got {span}")
    if image_features.device.type == "mps":  # has no float64
        image_features, text_features, text_image = image_features.cpu(), text_features.cpu(), text_image.cpu()
    i2t, t2i = _ranks(image_features, text_features, text_image, ties, chunk)
    i2t = i2t[text_image.unique()]
    recalls = {f"i2t_r{k}": (i2t <= k).float().mean() for k in ks}
    return recalls | {f"t2i_r{k}": (t2i <= k).float().mean() for k in ks}


class RetrievalRecall(RowMetric):
    """Recall at k of image-text retrieval over a whole set, exact over processes: each image id counts once.

    Args:
        ks: ranks to report.
        ties: see `recall_at_k`.
        captions: "all" is the standard protocol; "first" keeps the first caption of each image; "both" returns the
            standard values and those of the first captions under `one_caption_...`, from the same rows.
        chunk: see `recall_at_k`.
        kwargs: of `torchmetrics.Metric`; `compute_on_cpu=True` keeps the features off the device between updates.

    Example:
        >>> metric = RetrievalRecall(ks=(1,))
        >>> texts = torch.tensor([[4.0, 3.0], [3.0, 4.0], [4.0, 3.0]])
        >>> metric.update(torch.eye(2), torch.tensor([5, 9]), texts, torch.tensor([5, 9, 9]))
        >>> metric.compute()
        {'i2t_r1': tensor(1.), 't2i_r1': tensor(0.6667)}
    """

    def __init__(
        self,
        ks: tuple[int, ...] = (1, 5, 10),
        ties: Ties = "optimistic",
        captions: Captions = "all",
        chunk: int = 2048,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if captions not in PROTOCOLS:
            raise ValueError(f"captions must be one of {tuple(PROTOCOLS)}, got {captions!r}")
        self.ks, self.ties, self.captions, self.chunk = check_options(tuple(ks), ties), ties, captions, chunk
        self.add_rows("image_features", torch.float32)
        self.add_rows("image_ids", torch.int64)
        self.add_rows("text_counts", torch.int64)  # captions of each image row: ties texts to images after the gather
        self.add_rows("text_features", torch.float32)

    def update(self, image_features: Tensor, image_ids: Tensor, text_features: Tensor, text_image_ids: Tensor) -> None:
        """Add images together with all their captions; features of any length and float type.

        Args:
            image_features: [B, D].
            image_ids: int64 [B], unique in the evaluated set; below 0 is padding. An image may come again, in this
                or another update or process, with its captions: it counts once.
            text_features: [M, D].
            text_image_ids: int64 [M], ids of images of this batch; below 0 is padding.

        Raises:
            ValueError: if lengths differ, or a caption belongs to no image of the batch.
        """
        if len(image_features) != len(image_ids) or len(text_features) != len(text_image_ids):
            got = f"{len(image_features)}/{len(image_ids)} images, {len(text_features)}/{len(text_image_ids)} texts"
            raise ValueError(f"features and ids must have the same number of rows, got {got}")
        image_order, text_order, text_counts = _align(image_ids.long(), text_image_ids.long())
        self.image_features.append(F.normalize(image_features[image_order].float(), dim=-1).flatten())
        self.image_ids.append(image_ids[image_order].long())
        self.text_counts.append(text_counts)
        self.text_features.append(F.normalize(text_features[text_order].float(), dim=-1).flatten())

    def compute(self) -> dict[str, Tensor]:
        """Return `i2t_r{k}` and `t2i_r{k}` as fractions in [0, 1]; NaN with a warning if no caption was seen.

        With captions="both" also `one_caption_i2t_r{k}` and `one_caption_t2i_r{k}`.
        """
        protocols = PROTOCOLS[self.captions]
        ids, counts = self.rows("image_ids"), self.rows("text_counts")
        num_texts = int(counts.sum())
        if not num_texts:
            warnings.warn("RetrievalRecall saw no image with a caption: its values are NaN", stacklevel=2)
            nan = torch.tensor(torch.nan, device=ids.device)
            return {f"{prefix}{way}_r{k}": nan for prefix in protocols for way in ("i2t", "t2i") for k in self.ks}
        images = self.rows("image_features").view(len(ids), -1)
        texts = self.rows("text_features").view(num_texts, -1)
        kept = first_occurrence(ids)
        owner = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        _warn_if_copies_differ(ids, counts, texts, kept)
        new_row = torch.full_like(ids, -1)
        new_row[kept] = torch.arange(len(kept), device=ids.device)
        is_used = new_row[owner] >= 0
        is_first = torch.ones_like(is_used)
        is_first[1:] = owner[1:] != owner[:-1]
        values = {}
        for prefix, first_only in protocols.items():
            chosen = is_used & is_first if first_only else is_used
            owners = new_row[owner[chosen]]
            recalls = recall_at_k(images[kept], texts[chosen], owners, self.ks, self.ties, self.chunk)
            values |= {prefix + name: value for name, value in recalls.items()}
        return values


def _align(image_ids: Tensor, text_image_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bring images and texts of a batch into the same order of ids, without padding.

    If an image is in the batch n times with m captions in all, each copy gets m / n of them, in their order.

    Returns:
        rows of the images, rows of the texts, and how many of those texts belong to each of those images in turn.
    """
    image_order = image_ids.argsort(stable=True)[(image_ids < 0).sum() :]
    text_order = text_image_ids.argsort(stable=True)[(text_image_ids < 0).sum() :]
    unique, which, copies = image_ids[image_order].unique(return_inverse=True, return_counts=True)
    texts = text_image_ids[text_order]
    if strangers := sorted(set(texts.tolist()) - set(unique.tolist())):
        raise ValueError(f"text_image_ids name images that are not in the batch: {strangers[:5]}")
    totals = torch.bincount(torch.searchsorted(unique, texts), minlength=len(unique))
    if (totals % copies).any():
        image = int(unique[(totals % copies).nonzero()[0]])
        raise ValueError(f"image {image} is in the batch more than once, with different numbers of captions")
    return image_order, text_order, (totals // copies)[which]


def _warn_if_copies_differ(ids: Tensor, counts: Tensor, texts: Tensor, kept: Tensor) -> None:
    """Warn if an image came again with other captions than the first time, for only the first time counts.

    The likely cause is a data set with one row a caption instead of one row an image. Copies are compared by the
    number of captions and the first of them; 0.999 leaves room for half precision in another batch.
    """
    starts = counts.cumsum(0) - counts
    by_id = kept[ids[kept].argsort()]
    first = by_id[torch.searchsorted(ids[by_id], ids)]
    differs = counts != counts[first]
    both = ~differs & (counts > 0)
    cosine = (texts[starts[both]] * texts[starts[first[both]]]).sum(dim=1)
    num_different = int(differs.sum() + (cosine < 0.999).sum())
    if num_different:
        warnings.warn(
            f"RetrievalRecall: {num_different} repeated images came with other captions than the first time and are "
            "left out. All captions of an image must come in the same update.",
            stacklevel=3,
        )
