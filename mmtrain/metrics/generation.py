"""Scores of generated sounds on the features of a network, as SpecVQGAN counts them (arXiv 2110.08791).

Inception score, Frechet distance, paired KL and kernel distance of its released code, and the accuracy of alignment of
Diff-Foley (arXiv 2306.17203). All sums are float64. A generated sound is told by its clip's id and its sample number
and counts once over all processes; rows stand in the order of (id, sample), so values do not depend on the processes.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtrain.metrics.intervals import NOTHING, Interval, bootstrap, wilson
from mmtrain.metrics.ranking import RowMetric, in_order_of_ids

SEED = 2020  # of the released code, for the order of rows and for the subsets
SPLITS = 10
KL_EPSILON = 1e-6
MAX_SAMPLES = 2**16


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int | None = SEED) -> tuple[float, float]:
    """Inception score: exp of the mean KL of each row's distribution from its split's average.

    Args:
        logits: [N, K] of generated sounds; the released code takes those without the bias of the last layer.
        splits: equal parts of the rows, each scored by itself.
        seed: of the order in which rows fall into parts (NumPy's legacy generator); None keeps the given order.

    Returns:
        Mean and standard deviation over the splits, in [1, K].

    Raises:
        ValueError: fewer rows than splits.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be in [1, {len(logits)}], the number of rows, got {splits}")
    num = len(logits)
    logits = logits.detach().cpu().double()
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(num))]
    logs = logits.log_softmax(dim=1)
    scores = []
    for split in range(splits):
        part = logs[split * num // splits : (split + 1) * num // splits]
        average = part.exp().mean(dim=0, keepdim=True).log()
        scores.append(float((part.exp() * (part - average)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance of the Gaussians of two sets of features: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    S are unbiased covariances. With centred rows X, Y over the roots of their counts the trace of the matrix root is
    the nuclear norm of X Y^T: no root of an almost singular matrix is needed, and fewer rows than features, where the
    released code adds 1e-6 to the diagonals when its root fails, are counted exactly.

    Args:
        first, second: [N, D] and [M, D], at least two rows each; anything not finite gives NaN.

    Raises:
        ValueError: widths differ, or fewer than two rows.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"expected [N, D] and [M, D] with N, M >= 2, got {list(first.shape)}, {list(second.shape)}")
    if not (first.isfinite().all() and second.isfinite().all()):
        return math.nan
    means, roots, traces = [], [], []
    for features in (first, second):
        features = features.detach().cpu().double()
        mean = features.mean(dim=0)
        centred = (features - mean) / math.sqrt(len(features) - 1)
        means.append(mean)
        traces.append(centred.square().sum())
        roots.append(torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred)
    nuclear = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((means[0] - means[1]).square().sum() + traces[0] + traces[1] - 2 * nuclear)


def paired_kl(real_logits: Tensor, generated_logits: Tensor) -> Tensor:
    """KL(real || generated) of each pair, float64 [N] on the CPU; the released metric is the mean over pairs.

    Softmax on both sides, and 1e-6 is added to the generated probabilities only, so that a pair of equals is slightly
    below 0. A softmax although a clip can hold several sounds is what the released code does.

    Args:
        real_logits, generated_logits: [N, K], row i of one belongs to row i of the other.

    Raises:
        ValueError: shapes differ.
    """
    if real_logits.shape != generated_logits.shape:
        raise ValueError(f"shapes must be equal, got {list(real_logits.shape)}, {list(generated_logits.shape)}")
    real = real_logits.detach().cpu().double().log_softmax(dim=1)
    generated = generated_logits.detach().cpu().double().softmax(dim=1)
    return (real.exp() * (real - (generated + KL_EPSILON).log())).sum(dim=1)


def kernel_distance(
    generated: Tensor, real: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """Kernel distance (KID): unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3.

    Args:
        generated, real: [N, D], [M, D].
        subsets: random pairs of subsets without replacement.
        subset_size: rows of each.
        seed: of their choice (NumPy's legacy generator).

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: a set is smaller than a subset, or a subset below 2.
    """
    if not 2 <= subset_size <= min(len(generated), len(real)):
        raise ValueError(
            f"subset_size must be in [2, {min(len(generated), len(real))}], the smaller set, got {subset_size}"
        )
    generated, real = (rows.detach().cpu().double().numpy() for rows in (generated, real))
    random, width, size = np.random.RandomState(seed), generated.shape[1], subset_size
    distances = []
    for _ in range(subsets):
        x = generated[random.choice(len(generated), size, replace=False)]
        y = real[random.choice(len(real), size, replace=False)]
        xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        distances.append(within - 2 * xy.sum() / size**2)
    return float(np.mean(distances)), float(np.std(distances))


class SampleMetric(RowMetric):
    """Values of generated sounds, each (id, sample) once.

    Args:
        columns: names of the values of a sound, each a row of any one width.
        seed: of the bootstrap.
        kwargs: of `torchmetrics.Metric`.
    """

    def __init__(self, columns: tuple[str, ...], seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns, self.seed = columns, seed
        self.counted: dict[str, Tensor] = {}
        self.add_rows("keys", torch.int64)
        for name in columns:
            self.add_rows(name, torch.float32)

    def add(self, ids: Tensor, sample: Tensor | int, **values: Tensor) -> None:
        """Keep a batch.

        Args:
            ids: int64 [B] of the clips; below 0 for padding, which is left out.
            sample: number of the sample of these clips, one for all or int64 [B], in [0, 65536).
            values: [B] or [B, D] for each column.

        Raises:
            ValueError: lengths differ, or a sample is out of range.
        """
        ids = torch.as_tensor(ids, device=self.device).long()
        sample = torch.as_tensor(sample, device=self.device).long().expand_as(ids)
        if lengths := {name: len(value) for name, value in values.items() if len(value) != len(ids)}:
            raise ValueError(f"expected {len(ids)} rows, as ids, got {lengths}")
        if sample.numel() and not 0 <= int(sample.min()) <= int(sample.max()) < MAX_SAMPLES:
            raise ValueError(f"sample must be in [0, {MAX_SAMPLES}), got {sample.tolist()}")
        kept = ids >= 0
        self.keys.append((ids * MAX_SAMPLES + sample)[kept])
        for name in self.columns:
            getattr(self, name).append(values[name].detach().to(self.device).float()[kept].flatten())

    def table(self) -> dict[str, Tensor]:
        """Columns [S, D] float32 on the CPU, and `ids` int64 [S], ordered by (id, sample), each once.

        After `compute` they are kept as `counted`, of all processes, for figures.
        """
        keys = self.rows("keys").cpu()
        chosen = in_order_of_ids(keys)
        found = {"ids": keys[chosen] // MAX_SAMPLES}
        for name in self.columns:
            values = self.rows(name).cpu()
            found[name] = values.view(len(keys), -1)[chosen] if len(keys) else values.view(0, 1)
        self.counted = found
        return found


def clip_means(values: Tensor, ids: Tensor) -> np.ndarray:
    """Mean of the samples of each clip, float64, by ascending id: clips are independent, samples of one clip are not.

    Args:
        values: [S]; a NaN takes its clip's mean with it.
        ids: int64 [S].
    """
    _, place, counts = ids.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, place, values.double())
    return (sums / counts).numpy()


def with_bounds(name: str, interval: Interval) -> dict[str, Tensor]:
    """`name`, `name_low`, `name_high`, float64."""
    return {
        name + suffix: torch.tensor(value, dtype=torch.float64)
        for suffix, value in zip(("", "_low", "_high"), interval, strict=True)
    }


class GeneratedSounds(SampleMetric):
    """Inception score, Frechet distance, paired KL and kernel distance on the outputs of one feature network.

    Args:
        seed, kwargs: see `SampleMetric`.

    Example:
        >>> logits = torch.eye(12) * 20
        >>> outputs = {"2048": torch.eye(12), "logits": logits, "logits_unbiased": logits}
        >>> metric = GeneratedSounds()
        >>> metric.update(outputs, outputs, torch.arange(12))
        >>> round(float(metric.compute()["kl"]), 4)
        -0.0
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("features", "logits", "unbiased", "real_features", "real_logits"), seed, **kwargs)

    def update(
        self, generated: dict[str, Tensor], real: dict[str, Tensor], ids: Tensor, sample: Tensor | int = 0
    ) -> None:
        """Add generated sounds and the real sounds of their clips.

        Args:
            generated, real: outputs of the feature network: "2048" [B, D], "logits" and "logits_unbiased" [B, K].
            ids, sample: see `SampleMetric.add`.
        """
        self.add(
            ids,
            sample,
            features=generated["2048"],
            logits=generated["logits"],
            unbiased=generated["logits_unbiased"],
            real_features=real["2048"],
            real_logits=real["logits"],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return the values, float64; NaN with a warning where there are too few sounds.

        `inception_score` and `inception_score_std` over 10 splits; `fid`, `kid` (subsets of at most 1000) between all
        generated sounds and each real one once; `kl` with its bootstrap interval over clips.
        """
        table = self.table()
        num, (real_rows, _) = len(table["ids"]), _first_of_each(table["ids"])
        real = table["real_features"][real_rows]
        score = fid = kid = (math.nan, math.nan)
        if num >= SPLITS:
            score = inception_score(table["unbiased"])
        else:
            warnings.warn(f"inception_score needs at least {SPLITS} sounds, got {num}: NaN", stacklevel=2)
        if len(real) >= 2:
            fid = (frechet_distance(table["features"], real),)
            kid = kernel_distance(table["features"], real, subset_size=min(1000, len(real)))
        else:
            warnings.warn(f"fid and kid need at least 2 clips, got {len(real)}: NaN", stacklevel=2)
        kl = NOTHING
        if num:
            pairs = paired_kl(table["real_logits"], table["logits"])
            kl = bootstrap(clip_means(pairs, table["ids"]), self.seed)
        values = {"inception_score": score[0], "inception_score_std": score[1], "fid": fid[0], "kid": kid[0]}
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()} | with_bounds("kl", kl)


def _first_of_each(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions at which each of the sorted ids stands first, and the ids."""
    unique, counts = ids.unique_consecutive(return_counts=True)
    return counts.cumsum(0) - counts, unique


class AlignmentAccuracy(SampleMetric):
    """Share of generated sounds that an alignment classifier takes for matching, and what that share is worth.

    The published number measures matching pairs only, so a classifier that always says yes scores 1. Beside it stand
    the classifier's accuracy on real sound with shifted and with another clip's features, and its verdict on real
    pairs: generated sound can pass more often than real sound.

    Args:
        seed, kwargs: see `SampleMetric`.

    Example:
        >>> metric = AlignmentAccuracy()
        >>> metric.update(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 2.0]), torch.tensor([-1.0, 1.0]),
        ...               torch.tensor([-1.0, -2.0]), torch.tensor([0, 1]))
        >>> {key: float(value) for key, value in metric.compute().items() if key[-4:] not in ("_low", "high")}
        {'align_acc': 0.5, 'align_acc_shifted': 0.5, 'align_acc_wrong': 1.0, 'align_acc_real': 1.0}
    """

    def __init__(self, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(("generated", "real", "shifted", "wrong"), seed, **kwargs)

    def update(
        self,
        generated: Tensor,
        real: Tensor,
        shifted: Tensor | None,
        wrong: Tensor | None,
        ids: Tensor,
        sample: Tensor | int = 0,
    ) -> None:
        """Add sounds.

        Args:
            generated: logits [B] of generated sound with its own video's features.
            real: of real sound with its own video's features.
            shifted, wrong: of real sound with features shifted in time, of another video; None if not measured.
            ids, sample: see `SampleMetric.add`.
        """
        missing = torch.full_like(generated, math.nan)
        shifted, wrong = (missing if value is None else value for value in (shifted, wrong))
        self.add(ids, sample, generated=generated, real=real, shifted=shifted, wrong=wrong)

    def compute(self) -> dict[str, Tensor]:
        """Return the four accuracies (a probability of exactly 0.5 is no match), that of generated sound with Wilson's
        interval over clips; NaN for what was not measured."""
        table = self.table()
        first, _ = _first_of_each(table["ids"])
        logits = table["generated"].flatten()
        shares = clip_means(_passes(logits), table["ids"])
        broken = not np.isfinite(shares).all()
        found = with_bounds("align_acc", NOTHING if broken else wilson(float(shares.sum()), len(shares)))
        for name, matches in (("shifted", False), ("wrong", False), ("real", True)):
            passes = _passes(table[name].flatten()[first])
            found[f"align_acc_{name}"] = (passes if matches else 1 - passes).mean()
        return found


def _passes(logits: Tensor) -> Tensor:
    """1 where the classifier says "matching", 0 elsewhere, NaN where the logit is; float64."""
    return torch.where(logits.isnan(), math.nan, (logits > 0).double())


class HitRate(SampleMetric):
    """Share of right answers with Wilson's interval, each id once.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = HitRate()
        >>> metric.update(torch.tensor([True, False, False]), torch.tensor([0, 1, 1]))
        >>> float(metric.compute()["rate"])
        0.5
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("right",), **kwargs)

    def update(self, right: Tensor, ids: Tensor) -> None:
        """Add answers, bool [B], of ids int64 [B]."""
        self.add(ids, 0, right=right)

    def compute(self) -> dict[str, Tensor]:
        """Return `rate`, `rate_low`, `rate_high`; NaN if there is nothing."""
        right = self.table()["right"]
        return with_bounds("rate", wilson(float(right.sum()), right.numel()) if len(right) else NOTHING)
