"""Do sounds start when they should? Onsets found in a waveform, matched to reference times, precision, recall and F1.

Onsets are found by spectral flux (Bello et al. 2005, "A tutorial on onset detection in music signals") on logarithmic
bands; a match is one to one within a tolerance of 0.1 s. Reference times are given where the data have them (simulated
contacts), otherwise they are detected in the real sound in the same manner.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import max_pool1d

from mmtrain.metrics.intervals import NOTHING, score_interval
from mmtrain.metrics.ranking import RowMetric, in_order_of_ids

TOLERANCE = 0.1  # seconds
EDGE = 0.05  # seconds
WINDOW, HOP, LAG = 0.032, 0.004, 3  # seconds of a frame and between frames; frames over which the rise is taken
DELAY = 0.002  # seconds from the frame of the largest rise to the onset, mean over the strikes of `Impacts`
BANDS, LOWEST = 40, 100.0  # logarithmic bands and where they start, Hz
RANGE_DB = 50.0  # below the loudest band of the clip, where everything counts as silence
SILENCE = 1e-4  # peak amplitude of a waveform in which nothing is looked for
RISE_DB = 1.2  # least rise, mean over the bands, of an onset
SHARE = 0.15  # of the clip's largest rise that an onset must have
GAP = 0.12  # seconds, least between two onsets


def onset_strength(waveform: Tensor, sample_rate: int) -> Tensor:
    """Return how far the sound level rises over 12 ms, in dB, mean over `BANDS` bands, float32 [F].

    Value f is of the samples around f * hop + size / 2 (`_frame`), so about of the time 16 ms + 4 ms * f: frames that
    reach over an end of the waveform are left out, since any padding there looks like an onset.

    Args:
        waveform: float [N]; its own peak sets the range that is looked at, so that the level does not matter.
        sample_rate: Hz.
    """
    size, hop = _frame(sample_rate)
    window = torch.hann_window(size, device=waveform.device)
    magnitude = torch.stft(waveform.float(), size, hop, window=window, center=False, return_complex=True).abs()
    bands = _bands(size // 2 + 1, sample_rate).to(magnitude) @ magnitude.square()
    level = 10 * bands.clamp(min=1e-20).log10()
    level = (level - (level.max() - RANGE_DB)).clamp(min=0)
    before = torch.cat([level[:, :1].expand(-1, LAG), level[:, :-LAG]], dim=1)
    return (level - before).clamp(min=0).mean(dim=0)


def _frame(sample_rate: int) -> tuple[int, int]:
    """Samples of a frame and between frames."""
    return 2 * round(WINDOW * sample_rate / 2), round(HOP * sample_rate)


def _bands(num_bins: int, sample_rate: int) -> Tensor:
    """Which spectrum bins belong to which band, float32 [BANDS, num_bins]; bands without a bin stay empty."""
    frequencies = torch.linspace(0, sample_rate / 2, num_bins).clamp(min=1.0)
    place = (frequencies / LOWEST).log() / float(np.log(sample_rate / 2 / LOWEST)) * BANDS
    return (place.floor()[None] == torch.arange(BANDS)[:, None]).float()


def detect_onsets(waveform: Tensor, sample_rate: int) -> Tensor:
    """Return the times in seconds at which sounds start, ascending, float64 [found].

    Args:
        waveform: float [N] in [-1, 1].
        sample_rate: Hz.

    Raises:
        ValueError: not one waveform, or values that are not finite.

    Example:
        >>> click = torch.zeros(16000)
        >>> click[8000:8100] = 0.5
        >>> [round(float(time), 1) for time in detect_onsets(click, 16000)]
        [0.5]
    """
    waveform = torch.as_tensor(waveform)
    if waveform.ndim != 1:
        raise ValueError(f"waveform must be [N], got {tuple(waveform.shape)}")
    if not waveform.isfinite().all():
        raise ValueError("waveform must be finite")
    if len(waveform) < 2 * WINDOW * sample_rate or waveform.abs().max() < SILENCE:
        return torch.empty(0, dtype=torch.float64)
    rise = onset_strength(waveform, sample_rate)
    reach = round(GAP / HOP)
    highest = max_pool1d(rise[None], 2 * reach + 1, stride=1, padding=reach)[0]
    found = (rise == highest) & (rise >= max(RISE_DB, SHARE * float(rise.max())))
    size, hop = _frame(sample_rate)  # whole samples: 3.99 ms at 22,050 Hz, which 4 ms would miss by 23 ms in 10 s
    return (size / 2 + hop * found.nonzero().squeeze(1).double().cpu()) / sample_rate + DELAY


def match_onsets(found: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Pair found and reference times one to one: as many pairs as possible and, among those, the closest.

    Args:
        found, reference: seconds, [n] and [m].
        tolerance: seconds; pairs farther apart than this do not count.

    Returns:
        hits: int64 [hits, 2], positions in `found` and in `reference`.
        offsets: float64 [hits], found - reference in seconds.

    Example:
        >>> hits, offsets = match_onsets(torch.tensor([0.52, 1.9]), torch.tensor([0.5, 1.0]))
        >>> hits.tolist(), [round(float(offset), 2) for offset in offsets]
        ([[0, 0]], [0.02])
    """
    found, reference = (torch.as_tensor(times).double().cpu().reshape(-1) for times in (found, reference))
    offsets = found[:, None] - reference[None, :]
    near = offsets.abs() <= tolerance + 1e-9  # times differ by the tolerance itself up to rounding
    far = 1.0 + tolerance * (1 + min(offsets.shape))  # more than all pairs together can gain by being closer
    rows, columns = linear_sum_assignment(torch.where(near, offsets.abs(), far).numpy())
    hits = torch.tensor(np.stack([rows, columns], axis=1), dtype=torch.int64).reshape(-1, 2)
    hits = hits[near[hits[:, 0], hits[:, 1]]]
    return hits, offsets[hits[:, 0], hits[:, 1]]


class OnsetScore(NamedTuple):
    """Of one clip: precision, recall and f1 in [0, 1], the sum of |found - reference| in seconds, and the hits."""

    precision: float
    recall: float
    f1: float
    distance: float
    hits: float


def score_onsets(
    found: Tensor, reference: Tensor, duration: float, tolerance: float = TOLERANCE, edge: float = EDGE
) -> OnsetScore:
    """Compare onsets within [0, duration).

    Within `edge` of an end of the window an onset can be cut off: there a reference need not be found, and a time that
    is found there or belongs to such a reference is no false alarm.

    Args:
        found, reference: seconds, [n] and [m]; those outside the window are left out.
        duration: of the window, seconds.
        tolerance, edge: seconds.

    Returns:
        The score; all 1 where there is nothing to find and nothing was found.
    """
    found, reference = (torch.as_tensor(times).double().cpu().reshape(-1) for times in (found, reference))
    found, reference = (times[(times >= 0) & (times < duration)] for times in (found, reference))
    hits, offsets = match_onsets(found, reference, tolerance)
    certain = _inside(reference, duration, edge)[hits[:, 1]]
    counted = _inside(found, duration, edge)
    counted[hits[:, 0]] = certain
    num_hits, num_found = int(certain.sum()), int(counted.sum())
    num_reference = int(_inside(reference, duration, edge).sum())
    if num_found == num_reference == 0:
        return OnsetScore(1.0, 1.0, 1.0, 0.0, 0.0)
    precision, recall = num_hits / max(num_found, 1), num_hits / max(num_reference, 1)
    f1 = 2 * num_hits / (num_found + num_reference)
    return OnsetScore(precision, recall, f1, float(offsets[certain].abs().sum()), float(num_hits))


def _inside(times: Tensor, duration: float, edge: float) -> Tensor:
    return (times >= edge) & (times < duration - edge)


class OnsetSynchrony(RowMetric):
    """F1, precision and recall of the onsets in generated sounds, mean over clips, and how far the hits are off.

    Args:
        sample_rate: of all waveforms, Hz.
        tolerance, edge: seconds, see `score_onsets`.
        seed: of the bootstrap interval of F1.
        kwargs: passed to torchmetrics, e.g. `compute_on_cpu`.

    Example:
        >>> metric = OnsetSynchrony(16000)
        >>> click = torch.zeros(1, 16000)
        >>> click[0, 8000:8100] = 0.5
        >>> metric.update(click, [torch.tensor([0.5])], torch.tensor([0]))
        >>> metric.compute()["onset_f1"]
        tensor(1., dtype=torch.float64)
    """

    def __init__(
        self, sample_rate: int, tolerance: float = TOLERANCE, edge: float = EDGE, seed: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if sample_rate <= 0 or tolerance <= 0 or edge < 0:
            raise ValueError(f"sample_rate {sample_rate} and tolerance {tolerance} must be above 0, edge {edge} >= 0")
        self.sample_rate, self.tolerance, self.edge, self.seed = sample_rate, tolerance, edge, seed
        self.add_rows("ids", torch.int64)
        for name in OnsetScore._fields:
            self.add_rows(name, torch.float32)

    def update(
        self,
        waveforms: Tensor | Sequence[Tensor],
        references: Sequence[Tensor | Sequence[float] | None],
        ids: Tensor,
        real: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Add clips.

        Args:
            waveforms: generated sounds, float [B, N], or B of [N].
            references: seconds, B of [m]; None where they are not known and are to be detected in `real`.
            ids: int64 [B]; a clip that was seen already counts once; below 0: padding, left out.
            real: the real sounds, as `waveforms`.

        Raises:
            ValueError: numbers of clips differ, or neither reference nor real sound is there.
        """
        ids = torch.as_tensor(ids, device=self.device).long()
        if not len(waveforms) == len(references) == len(ids) or (real is not None and len(real) != len(ids)):
            raise ValueError(f"waveforms, references, ids and real must be equally many, got {len(waveforms)}, "
                             f"{len(references)}, {len(ids)}, {'none' if real is None else len(real)}")  # fmt: skip
        chosen = [place for place in range(len(ids)) if ids[place] >= 0]
        scores = []
        for place in chosen:
            reference = references[place]
            if reference is None:
                if real is None:
                    raise ValueError(f"clip {int(ids[place])}: give its reference times or the real sound")
                reference = detect_onsets(real[place], self.sample_rate)
            found = detect_onsets(waveforms[place], self.sample_rate)
            duration = len(waveforms[place]) / self.sample_rate
            scores.append(score_onsets(found, reference, duration, self.tolerance, self.edge))
        self.ids.append(ids[torch.tensor(chosen, dtype=torch.int64, device=self.device)])
        values = torch.tensor(scores, dtype=torch.float32, device=self.device).reshape(len(chosen), -1)
        for number, name in enumerate(OnsetScore._fields):
            getattr(self, name).append(values[:, number])

    def clips(self) -> dict[str, np.ndarray]:
        """Return the values of each clip by the names of `OnsetScore` and `ids`, in the order of ids, each id once."""
        ids = self.rows("ids")
        chosen = in_order_of_ids(ids)
        columns = {name: self.rows(name)[chosen].cpu().double().numpy() for name in OnsetScore._fields}
        return {"ids": ids[chosen].cpu().numpy()} | columns

    def compute(self) -> dict[str, Tensor]:
        """Return onset_f1 with its 95 % interval (onset_f1_low, onset_f1_high), onset_precision, onset_recall and
        onset_offset: the mean of |found - reference| over all hits, in seconds. NaN where there is nothing.
        """  # fmt: skip
        clips = self.clips()
        f1 = score_interval(clips["f1"], self.seed) if len(clips["f1"]) else NOTHING
        hits = clips["hits"].sum()
        values = {
            "onset_f1": f1.mean,
            "onset_f1_low": f1.low,
            "onset_f1_high": f1.high,
            "onset_precision": clips["precision"].mean() if len(clips["f1"]) else math.nan,
            "onset_recall": clips["recall"].mean() if len(clips["f1"]) else math.nan,
            "onset_offset": clips["distance"].sum() / hits if hits else math.nan,
        }
        return {key: torch.tensor(float(value), dtype=torch.float64) for key, value in values.items()}
