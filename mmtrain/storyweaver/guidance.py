"""Knowledge-enhanced spatial guidance (StoryWeaver, arXiv 2412.07375, eq. 11 to 15), as released.

Each character has a normal distribution over the picture. Where it is dense the scores of the character's words are
raised before the softmax of the cross-attentions, elsewhere lowered, by a strength that grows with the noise. The paper
prints the edit on the softmax's output (eq. 14); the released code makes it before, and so do we.

Coordinates are (vertical, horizontal), from -1 (top, left) to 1 (bottom, right) over the pixels of the picture.
B samples, J characters, S slots for characters, h x w a layer's grid of N tokens, P width of pooled text features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mmtrain.attention import FORMS, HEADS, AttentionBias, Form, Heads, grid_table
from mmtrain.config_errors import UserError
from mmtrain.distributed import count_a_process
from mmtrain.storyweaver.networks import KnowledgeEncoder
from mmtrain.storyweaver.spans import SPAN_RULES, SpanRule, usage

if TYPE_CHECKING:
    from mmtrain.storyweaver.text import EncodedFrames

Encoder = Literal["frozen_prior", "soft", "released"]
ENCODERS = ("frozen_prior", "soft", "released")
Size = tuple[int, int]  # rows, columns
OFFSET_WEIGHT, COVARIANCE_WEIGHT, DIFFERENCE_WEIGHT = 0.01, 0.001, 0.001  # released code
RELEASED_SIZE = (512, 896)


@dataclass
class GuidanceSettings:
    """How words are tied to places.

    Args:
        heads: of each sample that are guided. "first": what the released code amounts to with one sample, which the
            printed numbers and `sampling_alpha` belong to. "all": the paper's wording. "released": the released
            indexing with its defect, see `mmtrain.attention.biased_attention`.
        encoder: "frozen_prior": characters side by side, nothing learned. "released": the knowledge encoder moves the
            regions, but a threshold cuts its gradient: only the regulariser trains it, back to the prior (measured on
            the released code). "soft": a smooth threshold that pictures can train it through.
        alpha: factor of the strength in training.
        sampling_alpha: the same in sampling; the released script raises it to 2.5.
        beta: part of the highest density at which a region ends, in (0, 1).
        max_characters: M of the prior's spacing; frames with more characters use their number.
        parity: fill slots up to `max_characters` as released: the last character once more, in the middle. A lone
            character then counts twice.
        form: how the bias reaches the kernels, see `mmtrain.attention.AttentionBias`; the result is the same.
        temperature: of the "soft" threshold, in units of log density.
        span_rule: how words are found in prompts, see `mmtrain.storyweaver.spans`.

    Raises:
        UserError: a value that is none of these or out of range.
    """

    heads: Heads = "first"
    encoder: Encoder = "frozen_prior"
    alpha: float = 1.0
    sampling_alpha: float = 2.5
    beta: float = 0.85
    max_characters: int = 2
    parity: bool = False
    form: Form = "bias"
    temperature: float = 0.1
    span_rule: SpanRule = "robust"

    def __post_init__(self) -> None:
        choices = {"heads": HEADS, "encoder": ENCODERS, "form": FORMS, "span_rule": SPAN_RULES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"guidance.{name}: {getattr(self, name)!r}, must be one of {', '.join(known)}")
        for name in ("alpha", "sampling_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"guidance.{name}: {getattr(self, name)}, must be 0 or more")
        if not 0 < self.beta < 1:
            raise UserError(f"guidance.beta: {self.beta}, must lie between 0 and 1")
        if self.max_characters < 1:
            raise UserError(f"guidance.max_characters: {self.max_characters}, must be 1 or more")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"guidance.temperature: {self.temperature}, must be more than 0")


def centres(count: int, max_characters: int, padded: bool = False) -> Tensor:
    """Centres of characters side by side (released code for eq. 11).

    A lone character stands in the middle; several at J even steps from -1 + 1/M to 1 - 1/M, vertically in the middle.

    Args:
        count: J.
        max_characters: M; J where that is more.
        padded: go on to M rows with the picture's middle, as released.

    Returns:
        [J or max(M, J), 2], float32.

    >>> centres(2, 2).tolist()
    [[0.0, -0.5], [0.0, 0.5]]
    """
    most = max(max_characters, count)
    places = torch.zeros(most if padded else count, 2)
    if count > 1:
        places[:count, 1] = torch.linspace(-1 + 1 / most, 1 - 1 / most, count)
    return places


def strength(t: Tensor, alpha: float) -> Tensor:
    """s(t) = alpha (ln(t + 1) + 1) (eq. 15): 1 without noise, 7.9 at t = 999, times alpha.

    Args:
        t: network's times [B]; fractions, which samplers make, are cut off.

    Returns:
        [B], float32.
    """
    return alpha * (torch.log1p(t.to(torch.float32).floor()) + 1)


def log_ratio(mean: Tensor, covariance: Tensor, size: Size, grid: Size, beta: float) -> Tensor:
    """ln(p / (beta max p)) of a normal density: positive inside the region of a character.

    The density is taken at the pixels that nearest down-sampling of the whole picture would keep, and only there. Its
    maximum is that over all pixels, which is a sum over the two axes, so no picture-sized array is made.

    Args:
        mean, covariance: [..., 2]; the covariance is diagonal.
        size: H, W of the picture. grid: h, w.
        beta: part of the maximum.

    Returns:
        [..., h, w], float32.
    """
    # Half the squared distance is -ln p up to a constant, which the maximum has as well.
    near, at = [], []
    for axis in (0, 1):
        pixels = torch.arange(size[axis], device=mean.device)
        places = -1 + 2 * pixels.float() / max(size[axis] - 1, 1)
        distance = (places - mean[..., axis, None]).square() / covariance[..., axis, None]
        kept = torch.arange(grid[axis], device=mean.device) * size[axis] // grid[axis]
        near.append(distance.amin(-1))
        at.append(distance[..., kept])
    distance = at[0][..., :, None] + at[1][..., None, :]
    return ((near[0] + near[1])[..., None, None] - distance) / 2 - math.log(beta)


def inside_map(mean: Tensor, covariance: Tensor, size: Size, grid: Size, beta: float) -> Tensor:
    """Whether p >= beta max p (eq. 13 and 14): a boolean map [..., h, w]; arguments as in `log_ratio`."""
    return log_ratio(mean, covariance, size, grid, beta) >= 0


def signed_map(mean: Tensor, covariance: Tensor, size: Size, grid: Size, beta: float) -> Tensor:
    """1 inside and -1 outside, [..., h, w], without a gradient: constants, as released."""
    return inside_map(mean.detach(), covariance.detach(), size, grid, beta).float() * 2 - 1


def soft_map(mean: Tensor, covariance: Tensor, size: Size, grid: Size, beta: float, temperature: float) -> Tensor:
    """tanh(ln(p / (beta max p)) / temperature), [..., h, w]: `signed_map` with a slope at the border."""
    return torch.tanh(log_ratio(mean, covariance, size, grid, beta) / temperature)


def regulariser_offsets(offset: Tensor, spread: Tensor, weight: Tensor | None = None) -> Tensor:
    """Pulls the encoder to the prior: 0.01 mean |offset| + 0.001 mean |change of covariance| (released code).

    Args:
        offset, spread: [..., 2], of the encoder.
        weight: [...], 1 where there is a character, 0 where not; None is 1 everywhere.

    Returns:
        Scalar; on several processes such that their average is that of all characters.
    """
    weight = offset.new_ones(offset.shape[:-1]) if weight is None else weight.to(offset.dtype)
    size = (OFFSET_WEIGHT * offset.abs() + COVARIANCE_WEIGHT * spread.abs()).mean(-1)
    return (size * weight).sum() / count_a_process(weight.sum())


def regulariser_difference(maps: Tensor, weight: Tensor | None = None) -> Tensor:
    """0.001 x mean cosine, row by row, of the first character's map with each of the others (released code).

    Rows of the maps before the last that equal the last map's row are taken as zeros.

    Args:
        maps: [..., J, h, w].
        weight: [..., J], 1 where there is a character, 0 where not; characters come first. None is 1 everywhere.

    Returns:
        Scalar, zero if there are no two characters.
    """
    if maps.shape[-3] < 2:
        count_a_process(maps.new_zeros(()))  # for the other processes, which may have two
        return maps.new_zeros(())
    weight = maps.new_ones(maps.shape[:-2]) if weight is None else weight.to(maps.dtype)
    number = torch.arange(maps.shape[-3], device=maps.device)
    is_last = (number == weight.sum(-1, keepdim=True) - 1)[..., None, None]
    last = (maps * is_last).sum(-3, keepdim=True)
    maps = maps.masked_fill((maps == last).all(-1, keepdim=True) & ~is_last, 0.0)
    cosine = cosine_similarity(maps[..., :1, :, :], maps[..., 1:, :, :], dim=-1).mean(-1)
    pairs = weight[..., 1:]
    return DIFFERENCE_WEIGHT * (cosine * pairs).sum() / count_a_process(pairs.sum())


@dataclass
class GuidanceMaps:
    """The part of the guidance that does not change with t.

    Args:
        signs: by number of tokens N, [B, S, N] in [-1, 1], float32.
        usage: [B, S, L], see `mmtrain.storyweaver.spans.usage`.
        heads, form: see `mmtrain.attention.AttentionBias`.
    """

    signs: dict[int, Tensor]
    usage: Tensor
    heads: Heads = "first"
    form: Form = "bias"

    def at(self, t: Tensor | float, alpha: float) -> AttentionBias:
        """Guidance at network's times t, [B] or one for all, at strength `alpha`."""
        scale = strength(torch.as_tensor(t, device=self.usage.device), alpha).reshape(-1, 1, 1)
        maps = {tokens: signs * scale for tokens, signs in self.signs.items()}
        return AttentionBias(maps, self.usage, self.heads, self.form)

    def to(self, device: torch.device | str) -> GuidanceMaps:
        """The same on another device."""
        signs = {tokens: values.to(device) for tokens, values in self.signs.items()}
        return replace(self, signs=signs, usage=self.usage.to(device))

    def select(self, rows: slice | list[int] | Tensor) -> GuidanceMaps:
        """For a part of the samples."""
        signs = {tokens: values[rows] for tokens, values in self.signs.items()}
        return replace(self, signs=signs, usage=self.usage[rows])


class SpatialGuidance(nn.Module):
    """Makes the guidance of frames from their encoded prompts.

    Args:
        settings: all that can be chosen.
        feature_width: P, of pooled text features.
    """

    def __init__(self, settings: GuidanceSettings, feature_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = None if settings.encoder == "frozen_prior" else KnowledgeEncoder(feature_width)
        if settings.heads == "all" and max(settings.alpha, settings.sampling_alpha) > 1:
            warnings.warn(
                f"guidance.heads: all with alpha {settings.alpha:g} in training and {settings.sampling_alpha:g} in "
                "sampling: above 1 it has destroyed pictures; the released 2.5 belongs to heads: first",
                stacklevel=2,
            )

    def prepare(self, encoded: EncodedFrames, size: Size, latent: Size, levels: int | None = None) -> GuidanceMaps:
        """Maps of all grids of a UNet.

        Args:
            encoded: prompts, their spans and the features of the descriptions.
            size: H, W of the picture, pixels.
            latent: h, w of the latents.
            levels: grids of the UNet, see `mmtrain.attention.grid_table`.

        Returns:
            With a gradient to the encoder if that is "soft", without otherwise.
        """
        slots = self._slots(encoded)
        mean, covariance = self._distribution(encoded, slots)
        signs = {}
        for tokens, grid in grid_table(*latent, levels).items():
            signs[tokens] = self._map(mean, covariance, size, grid).flatten(2)
        counts = usage(encoded.spans, encoded.context.shape[1], max(encoded.counts, default=0))
        counts = _take(counts.to(slots.index.device), slots.index) * slots.present[..., None]
        return GuidanceMaps(signs, counts, self.settings.heads, self.settings.form)

    def regulariser(self, encoded: EncodedFrames, size: Size = RELEASED_SIZE) -> Tensor:
        """What the released training adds to the loss: `regulariser_offsets` + `regulariser_difference`.

        Under "released" the second is a constant, since its maps are. With `parity` it is taken at every pixel, as
        released; otherwise at every eighth, which is all that guidance itself sees.

        Returns:
            Scalar; zero without an encoder.
        """
        slots = self._slots(encoded)
        if self.encoder is None:
            return torch.zeros((), device=slots.index.device)
        offset, spread = self._corrections(encoded, slots)
        mean, covariance = slots.centres + offset, 1 + spread
        grid = size if self.settings.parity else (-(-size[0] // 8), -(-size[1] // 8))
        maps = self._map(mean, covariance, size, grid)
        near_prior = regulariser_offsets(offset, spread, slots.present)
        return near_prior + regulariser_difference(maps, slots.present)

    def _map(self, mean: Tensor, covariance: Tensor, size: Size, grid: Size) -> Tensor:
        if self.settings.encoder == "soft":
            return soft_map(mean, covariance, size, grid, self.settings.beta, self.settings.temperature)
        return signed_map(mean, covariance, size, grid, self.settings.beta)

    def _slots(self, encoded: EncodedFrames) -> _Slots:
        settings = self.settings
        return _slots(encoded.counts, settings.max_characters, settings.parity).to(encoded.context.device)

    def _corrections(self, encoded: EncodedFrames, slots: _Slots) -> tuple[Tensor, Tensor]:
        if self.encoder is None:  # and the features of the descriptions need not be computed
            return torch.zeros_like(slots.centres), torch.zeros_like(slots.centres)
        features = _take(encoded.descriptions, slots.index)
        # Two layers of width 64: float32 costs nothing, and half precision would move borders.
        with torch.autocast(features.device.type, enabled=False):
            # whose weights are half only where a whole run is ("bf16-true")
            return tuple(part.float() for part in self.encoder(features.to(next(self.encoder.parameters()).dtype)))

    def _distribution(self, encoded: EncodedFrames, slots: _Slots) -> tuple[Tensor, Tensor]:
        """Mean and diagonal covariance [B, S, 2] (eq. 12, with one factor for each axis as released)."""
        offset, spread = self._corrections(encoded, slots)
        return slots.centres + offset, 1 + spread


@dataclass
class _Slots:
    """Which character stands where: index [B, S] of a character, its centre [B, S, 2], whether there is one [B, S]."""

    index: Tensor
    centres: Tensor
    present: Tensor

    def to(self, device: torch.device | str) -> _Slots:
        return _Slots(self.index.to(device), self.centres.to(device), self.present.to(device))


def _slots(counts: Sequence[int], max_characters: int, parity: bool) -> _Slots:
    most = max(counts, default=0)
    width = max(most, max_characters) if parity and most else most
    index = torch.zeros(len(counts), width, dtype=torch.long)
    places, present = torch.zeros(len(counts), width, 2), torch.zeros(len(counts), width)
    for row, count in enumerate(counts):
        # Never more than that many slots, so that a frame's guidance does not depend on the others of its batch.
        filled = max(count, max_characters) if parity and count else count
        index[row, :filled] = torch.arange(filled).clamp(max=max(count - 1, 0))
        places[row, :filled] = centres(count, max_characters, padded=parity)[:filled]
        present[row, :filled] = 1
    return _Slots(index, places, present)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """[B, J, X] by an index [B, S] -> [B, S, X]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
