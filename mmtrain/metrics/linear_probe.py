"""Linear probing of frozen features (RankCLIP, spec section 5.2), and the field's L-BFGS sweep (CLIP, appendix A.3).

Features are used as they are: projected image embeddings, neither normalised nor standardised.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mmtrain.config_errors import UserError
from mmtrain.metrics.ranking import RowMetric, check_labels, in_order_of_ids
from mmtrain.optim import parameter_groups, warmup_cosine

Split = Literal["train", "test"]
SPLITS = ("train", "test")
STEPS_A_DECADE = 8  # of C, from 1e-6 to 1e6: 96 steps


@dataclass(frozen=True)
class ProbeSettings:
    """The recipe of section 5.2, which the paper used for every set without tuning.

    Args:
        epochs: passes over the train split.
        lr: learning rate of AdamW, falling to 0 on a half cosine, step by step.
        weight_decay: of the weight; the bias has none.
        batch_size: rows a step. The paper's own code takes the batch size of training, 128 by default.
        seed: of the initial weights and the order of the rows.
        lbfgs: also fit by `sweep_lbfgs`.
    """

    epochs: int = 32
    lr: float = 0.005
    weight_decay: float = 0.01
    batch_size: int = 128
    seed: int = 0
    lbfgs: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (("epochs", 1), ("batch_size", 1), ("lr", 0), ("weight_decay", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} of the linear probe must be at least {lowest}, got {getattr(self, name)}")

    def __str__(self) -> str:
        """The protocol in one line, to be printed beside the values."""
        text = (
            f"linear probe: AdamW lr {self.lr:g}, weight decay {self.weight_decay:g} on the weight, cosine to 0, "
            f"{self.epochs} epochs, batch {self.batch_size}, seed {self.seed}; features as they are, top-1 on test"
        )
        sweep = "; L-BFGS: C from 1e-6 to 1e6 chosen on 20 % of train, refit on all of it"
        return text + sweep if self.lbfgs else text


def fit_probe(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    epochs: int = 32,
    lr: float = 0.005,
    weight_decay: float = 0.01,
    batch_size: int = 128,
    seed: int = 0,
) -> nn.Linear:
    """Return a classifier fitted by AdamW on the mean cross-entropy of shuffled batches (section 5.2).

    One generator on the CPU, seeded by `seed`, gives PyTorch's initial values of `nn.Linear`, weight then bias, and
    then a permutation of the rows an epoch: the same as after `torch.manual_seed(seed)`, but the global generator stays
    as it is. The last batch of an epoch may be smaller. It may be called under `no_grad`, `inference_mode` or autocast.

    Args:
        features: [N, D], on any device. Float64 is computed in float64, everything else in float32.
        labels: int64 [N] in [0, num_classes).
        num_classes: outputs of the classifier.
        epochs, lr, weight_decay, batch_size, seed: see `ProbeSettings`.

    Raises:
        ValueError: if there is nothing to fit, lengths differ, or a label is out of range.

    Example:
        >>> features, labels = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
        >>> top1(fit_probe(features, labels, num_classes=4, lr=0.1, batch_size=8), features, labels)
        tensor(1.)
    """
    _check_rows(features, labels, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with _fitting(features), _one_thread():
        features, labels = features.to(_working_type(features)), labels.long()
        probe = _initial_probe(features.shape[1], num_classes, generator).to(features)
        optimizer = torch.optim.AdamW(parameter_groups(probe.named_parameters(), weight_decay, "matrices"), lr=lr)
        schedule = LambdaLR(optimizer, warmup_cosine(0, epochs * math.ceil(len(features) / batch_size)))
        for _ in range(epochs):
            order = torch.randperm(len(features), generator=generator).to(features.device)
            for rows in order.split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(probe(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return probe.requires_grad_(False)


def fit_lbfgs(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    c: float = 1.0,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> nn.Linear:
    """Return multinomial logistic regression fitted by full-batch L-BFGS from zero.

    It minimises mean_i CE_i + ||W||^2 / (2 c N) with a free bias: scikit-learn's `LogisticRegression(C=c)` for three
    or more classes. For two classes scikit-learn has one weight vector, not two, and its C is 2 c. The sums are
    float64, since float32 stalls far from the optimum. The rows are centred meanwhile and the bias takes the shift up:
    the same optimum, in a fraction of the iterations, as embeddings share a large mean.

    Args:
        features, labels, num_classes: as in `fit_probe`.
        c: inverse strength of the penalty, above 0.
        max_iterations: of L-BFGS.
        tolerance: it stops when no entry of the gradient is larger.

    Example:
        >>> features, labels = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
        >>> top1(fit_lbfgs(features, labels, num_classes=4), features, labels)
        tensor(1.)
    """
    _check_rows(features, labels, num_classes)
    if not c > 0:
        raise ValueError(f"c must be above 0, got {c}")
    with _fitting(features):
        home, home_type = features.device, _working_type(features)
        rows = (features.cpu() if home.type == "mps" else features).double()  # mps has no float64
        mean = rows.mean(dim=0)
        rows, labels = rows - mean, labels.to(rows.device, torch.int64, copy=True)
        probe = nn.utils.skip_init(nn.Linear, rows.shape[1], num_classes).to(rows)
        for parameter in probe.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.LBFGS(
            probe.parameters(),
            max_iter=max_iterations,
            max_eval=20 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=1e-9 * tolerance,  # only stops where rounding allows no further progress
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(probe(rows), labels) + probe.weight.square().sum() / (2 * c * len(rows))
            value.backward()
            return value

        optimizer.step(loss)
        probe.requires_grad_(False)
        probe.bias -= probe.weight @ mean
    return probe.to(home, home_type)


def sweep_lbfgs(
    features: Tensor, labels: Tensor, num_classes: int, seed: int = 0, max_iterations: int = 1000
) -> tuple[nn.Linear, float]:
    """Return the classifier of `fit_lbfgs` with the best C, fitted on all rows, and that C.

    A fifth of the rows, drawn by `seed`, is held out to choose C among 1e-6 to 1e6 in 96 equal steps of its logarithm:
    first every two decades, then the middles beside the best so far, down to an eighth of a decade (CLIP, appendix
    A.3). Of equally good values the smallest is taken.

    Raises:
        ValueError: as `fit_probe`, and for fewer than two rows.
    """
    _check_rows(features, labels, num_classes)
    if len(features) < 2:
        raise ValueError("the sweep needs at least two rows, one to fit and one to choose C")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    held_out, fitted = order.tensor_split([max(1, len(features) // 5)])
    accuracies: dict[int, float] = {}
    candidates = list(range(0, 12 * STEPS_A_DECADE + 1, 2 * STEPS_A_DECADE))
    for step in (8, 4, 2, 1, 0):
        for index in candidates:
            probe = fit_lbfgs(features[fitted], labels[fitted], num_classes, _c(index), max_iterations)
            accuracies[index] = float(top1(probe, features[held_out], labels[held_out]))
        best = max(accuracies, key=lambda index: (accuracies[index], -index))
        candidates = [index for index in (best - step, best + step) if 0 <= index <= 12 * STEPS_A_DECADE]
    return fit_lbfgs(features, labels, num_classes, _c(best), max_iterations), _c(best)


def top1(probe: nn.Linear, features: Tensor, labels: Tensor) -> Tensor:
    """Return the fraction in [0, 1] of rows [N, D] whose largest output is the label; NaN for no rows.

    A row with a NaN counts as wrong.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        outputs = probe(features.to(probe.weight.dtype))
    return ((outputs.argmax(dim=1) == labels) & outputs.isfinite().all(dim=1)).float().mean()


def _c(index: int) -> float:
    return 10.0 ** (index / STEPS_A_DECADE - 6)


def _check_rows(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or len(features) != len(labels):
        got = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"features must be [N, D] and labels [N], got {got}")
    if not len(features):
        raise ValueError("there are no rows to fit")
    check_labels(labels, num_classes)


def _working_type(features: Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


@contextmanager
def _fitting(features: Tensor) -> Iterator[None]:
    """Gradients in full precision, whatever the evaluation loop around has set."""
    off = torch.autocast(features.device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), off:
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps this small gain nothing from more, and on busy cores threads that wait for each other cost tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _initial_probe(width: int, num_classes: int, generator: torch.Generator) -> nn.Linear:
    """`nn.Linear` with PyTorch's own initial values, drawn from `generator`."""
    probe = nn.utils.skip_init(nn.Linear, width, num_classes)
    nn.init.kaiming_uniform_(probe.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(width)
    nn.init.uniform_(probe.bias, -bound, bound, generator=generator)
    return probe


class LinearProbe(RowMetric):
    """Accuracy of a linear classifier on frozen features, over a train and a test split, each id once.

    The rows are brought into the order of their ids before fitting, so the number of processes and who had which row
    make no difference. Every process fits the classifier for itself.

    Args:
        num_classes: labels are in [0, num_classes).
        settings: the recipe; None takes that of the paper.
        kwargs: of `torchmetrics.Metric`.

    Example:
        >>> metric = LinearProbe(num_classes=2, settings=ProbeSettings(lr=0.1))
        >>> metric.update(torch.eye(2).repeat(8, 1), torch.arange(2).repeat(8), torch.arange(16), "train")
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([5, 9]), "test")
        >>> metric.compute()
        {'linear_probe': tensor(0.5000)}
    """

    def __init__(self, num_classes: int, settings: ProbeSettings | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.settings = num_classes, settings or ProbeSettings()
        for split in SPLITS:
            self.add_rows(f"{split}_features", torch.float32)
            self.add_rows(f"{split}_labels", torch.int64)
            self.add_rows(f"{split}_ids", torch.int64)

    def update(self, features: Tensor, labels: Tensor, ids: Tensor, split: Split) -> None:
        """Add a batch to a split.

        Args:
            features: [B, D], as the model gives them.
            labels: int64 [B] in [0, num_classes).
            ids: int64 [B], unique in the split; rows with an id below 0 are padding.
            split: "train" is fitted, "test" is scored.

        Raises:
            ValueError: for an unknown split, different lengths or a label out of range.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
        if not len(features) == len(labels) == len(ids):
            got = f"{len(features)}, {len(labels)} and {len(ids)}"
            raise ValueError(f"features, labels and ids must have one row a sample, got {got} rows")
        real = ids >= 0
        check_labels(labels[real], self.num_classes)
        getattr(self, f"{split}_features").append(features[real].float().flatten())
        getattr(self, f"{split}_labels").append(labels[real].long())
        getattr(self, f"{split}_ids").append(ids[real].long())

    def compute(self) -> dict[str, Tensor]:
        """Return `linear_probe`, and `linear_probe_lbfgs` if asked for, in [0, 1]; NaN with a warning if a split is
        empty.
        """
        names = ["linear_probe", "linear_probe_lbfgs"][: 1 + self.settings.lbfgs]
        for split in SPLITS:
            if not self.rows(f"{split}_ids").numel():
                warnings.warn(f"LinearProbe saw no {split} samples: its values are NaN", stacklevel=2)
                return dict.fromkeys(names, torch.tensor(torch.nan, device=self.device))
        train, test = self._split("train"), self._split("test")
        s = self.settings
        probes = [fit_probe(*train, self.num_classes, s.epochs, s.lr, s.weight_decay, s.batch_size, s.seed)]
        if s.lbfgs:
            probes.append(sweep_lbfgs(*train, self.num_classes, s.seed)[0])
        return {name: top1(probe, *test) for name, probe in zip(names, probes, strict=True)}

    def _split(self, split: Split) -> tuple[Tensor, Tensor]:
        """Features [N, D] and labels [N] of a split in the order of ids."""
        ids = self.rows(f"{split}_ids")
        order = in_order_of_ids(ids)
        return self.rows(f"{split}_features").view(len(ids), -1)[order], self.rows(f"{split}_labels")[order]
