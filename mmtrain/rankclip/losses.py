"""The objectives of RankCLIP, CLIP, CyCLIP and ALIP as pure tensor functions, and the engine that chunks them by rows.

Shapes: N global batch, B rows of this process, R rows of one chunk, D embedding width.
Symbols of the papers: image features V and text features T are unit rows [N, D]; tau = exp(logit_scale);
S = tau V T^T, A = tau V V^T, C = tau T T^T. Every objective is a sum over rows of functions of these matrices, so
it is computed for a few rows at a time against all columns, on one process or on many, with the same result.
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain import distributed

# With eps = 1e-10 a score this far below its row's maximum has exp(x - max) < eps: its term saturates.
SATURATION = math.log(1e-10)

# rows_loss(rows, columns, tau, index) -> {"loss": scalar with gradient, name: further sums over these rows}
RowObjective = Callable[[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor], dict[str, Tensor]]


def descending_order(scores: Tensor) -> Tensor:
    """Indices [R, N] that sort each row in descending order; equal scores keep their column order.

    On a CPU in float32 the scores' bits are sorted as integers, first by their low and then by their high 16 bits, for
    which NumPy has a stable radix sort: a quarter of the time of `torch.sort`.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices
    bits = (scores.detach().numpy() + np.float32(0.0)).view(np.int32)  # + 0 makes -0.0 equal to 0.0
    keys = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))  # integers that descend as the floats ascend
    by_low = torch.from_numpy(np.argsort(keys.astype(np.uint16), axis=-1, kind="stable"))
    high = torch.from_numpy((keys >> 16).astype(np.int16)).gather(-1, by_low)
    return by_low.gather(-1, torch.from_numpy(np.argsort(high.numpy(), axis=-1, kind="stable")))


def plackett_luce(scores: Tensor, reference: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """List-wise Plackett-Luce loss of each row and its gradient in closed form.

    With x_k the row's scores in the descending order of the reference, m their maximum and
    c_k = sum_{j >= k} exp(x_j - m):   loss = sum_k [log(c_k + eps) - (x_k - m)].

    Args:
        scores: [R, N], differentiated.
        reference: [R, N], used for its order only.
        eps: 0 is the Plackett-Luce likelihood. 1e-10 is the published code: a different loss once scores lie more
            than 23 below their row's maximum, where it pushes the maximum down and the tail up.

    Returns:
        loss [R] and its gradient with respect to `scores` [R, N].
    """
    order = descending_order(reference)
    x = scores.gather(-1, order)
    maximum, best = x.max(dim=-1, keepdim=True)
    x = x - maximum
    # Without eps the tail sums go down to exp(-2 tau) = 1e-87, outside float32 but far inside float64.
    wide = x.double() if eps == 0 else x
    exp = wide.exp()
    tail = exp.flip(-1).cumsum_(-1).flip(-1).add_(eps)
    loss = (tail.log() - x).sum(-1).to(scores.dtype)
    inverse = tail.reciprocal_()
    if eps:
        from_maximum = eps * inverse.sum(-1, keepdim=True)
    gradient = inverse.cumsum_(-1).mul_(exp).sub_(1)
    if eps:
        gradient.scatter_add_(-1, best, from_maximum)  # derivative of m; zero when eps is
    return loss, torch.empty_like(scores).scatter_(-1, order, gradient.to(scores.dtype))


class _PlackettLuce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, reference: Tensor, eps: float) -> Tensor:
        loss, gradient = plackett_luce(scores, reference, eps)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.unsqueeze(-1), None, None


def list_loss(scores: Tensor, reference: Tensor, eps: float = 0.0) -> Tensor:
    """`plackett_luce` as a differentiable function: [R, N], [R, N] -> [R]. No gradient enters `reference`."""
    return _PlackettLuce.apply(scores, reference, eps)


def cross_entropy_rows(scores: Tensor, transposed: Tensor, index: Tensor) -> Tensor:
    """Symmetric InfoNCE of each pair [R]: scores [R, N] image to text, transposed [R, N] text to image."""
    return (F.cross_entropy(scores, index, reduction="none") + F.cross_entropy(transposed, index, reduction="none")) / 2


def clip_objective(dtype: torch.dtype | None = None) -> RowObjective:
    """CLIP: mean symmetric cross-entropy over the batch."""

    def rows_loss(rows, columns, tau, index):
        (v, t), (all_v, all_t) = rows, columns
        scores, transposed = similarity(v, all_t, tau, dtype), similarity(t, all_v, tau, dtype)
        return {"loss": cross_entropy_rows(scores, transposed, index).sum() / len(all_v)}

    return rows_loss


def cyclip_objective(inmodal: float, cross: float, dtype: torch.dtype | None = None) -> RowObjective:
    """CyCLIP: CLIP plus `inmodal` / N * sum (A - C)^2 / tau^2 plus `cross` / N * sum (S - S^T)^2 / tau^2."""

    def rows_loss(rows, columns, tau, index):
        (v, t), (all_v, all_t) = rows, columns
        scores, transposed = similarity(v, all_t, tau, dtype), similarity(t, all_v, tau, dtype)
        contrastive = cross_entropy_rows(scores, transposed, index).sum() / len(all_v)
        # Cosines instead of the released logits / tau: the temperature cancels, so it gets exactly no gradient.
        one = torch.ones_like(tau)
        images, texts = similarity(v, all_v, one, dtype), similarity(t, all_t, one, dtype)
        mixed = similarity(v, all_t, one, dtype) - similarity(t, all_v, one, dtype)
        terms = {
            "contrastive": contrastive,
            "inmodal": inmodal * (images - texts).square().sum() / len(all_v),
            "cross": cross * mixed.square().sum() / len(all_v),
        }
        return {"loss": sum(terms.values()), **terms}

    return rows_loss


def rankclip_objective(
    weight: float,
    cross: float = 1 / 16,
    inmodal: float = 1 / 16,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
) -> RowObjective:
    """RankCLIP: CLIP + weight / N * [cross (PL(S|S^T) + PL(S^T|S)) / 2 + inmodal (PL(A|C) + PL(C|A)) / 2].

    PL is the mean over rows of `plackett_luce`. With cross = inmodal = 1/16 and `weight` from `ranking_ramp` this is
    the released loss. A term with weight 0 is not computed.
    Beside the loss come the unweighted sums that are worth watching: the four PL terms as shares of ln(N!)
    (1 = the order is not informed at all) and the share of list entries below `SATURATION`.
    """

    def rows_loss(rows, columns, tau, index):
        (v, t), (all_v, all_t) = rows, columns
        n = len(all_v)
        scores, transposed = similarity(v, all_t, tau, dtype), similarity(t, all_v, tau, dtype)
        terms = {"contrastive": cross_entropy_rows(scores, transposed, index).sum() / n}
        watched = {}

        def pair(name: str, first: Tensor, second: Tensor, scale: float) -> None:
            forward, backward = list_loss(first, second, eps).sum() / n, list_loss(second, first, eps).sum() / n
            terms[name] = weight * scale / 2 * (forward + backward) / n
            full = math.lgamma(n + 1) or 1.0
            for label, value, list_scores in (("a", forward, first), ("b", backward, second)):
                watched[f"{name}_list_{label}"] = value.detach() / full
                below = list_scores.detach() - list_scores.detach().amax(-1, keepdim=True) < SATURATION
                watched[f"{name}_saturated_{label}"] = below.sum().to(value.dtype) / n**2

        if weight and cross:
            pair("cross", scores, transposed, cross)
        if weight and inmodal:
            pair("inmodal", similarity(v, all_v, tau, dtype), similarity(t, all_t, tau, dtype), inmodal)
        return {"loss": sum(terms.values()), **terms, **watched}

    return rows_loss


def alip_objective(weight_text: Tensor, weight_caption: Tensor, start: int = 0) -> RowObjective:
    """ALIP: sum of two CLIP losses, image with raw text and image with synthetic caption, weighted per pair.

    weight_text, weight_caption: [B] of this process's rows, products of the language and description gates
    (`alip_weights`); `start` is the global index of the first of them.
    """

    def rows_loss(rows, columns, tau, index):
        (v, t, c), (all_v, all_t, all_c) = rows, columns
        own = index - start
        losses = []
        for text, all_text, weight in ((t, all_t, weight_text), (c, all_c, weight_caption)):
            pairs = cross_entropy_rows(similarity(v, all_text, tau), similarity(text, all_v, tau), index)
            losses.append((weight[own] * pairs).sum() / len(all_v))
        return {"loss": losses[0] + losses[1], "text": losses[0], "caption": losses[1]}

    return rows_loss


def similarity(rows: Tensor, columns: Tensor, tau: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """tau * rows @ columns^T as [R, N]. `dtype` rounds the product as the released half-precision loss does."""
    if dtype is None:
        return tau * (rows @ columns.T)
    return (tau * (rows.to(dtype) @ columns.to(dtype).T)).to(dtype).to(rows.dtype)


def alip_weights(similarities: Tensor, momenta: Tensor, gamma: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """The gates of ALIP for each sample.

    Args:
        similarities: [3, B], rows t.c, x.t, x.c (text, image, caption).
        momenta: [3], running means of the same, already updated with this step's batch.
        gamma: exponent of both gates.

    Returns:
        W^s, W^t, W^c, each [B], without gradient.
    """
    gates = (gamma * (similarities - momenta[:, None])).exp()
    sample = gates[0].clamp(max=1)
    open_gate = gates[0] < 1
    return sample, torch.where(open_gate, gates[1], 1.0), torch.where(open_gate, gates[2], 1.0)


def ranking_ramp(progress: float, low: float = 0.0, high: float = 2.0, slope: float = 3.0) -> float:
    """w = min(high, max(low, slope * progress)), progress in [0, 1]; published: (e - 1) / (E - 1), e from 1 to E."""
    return min(high, max(low, slope * progress))


class _ChunkedRows(torch.autograd.Function):
    """Loss and gradient of a row objective, chunk by chunk, over all processes; see `row_chunked_loss`."""

    @staticmethod
    def forward(ctx, objective, chunk, reference_scale, keys, logit_scale, *features):
        own = features[0].shape[0]
        start = distributed.rank() * own
        wanted = any(ctx.needs_input_grad)
        leaves = tuple(distributed.gather_rows(f).requires_grad_(wanted) for f in features)
        scale = logit_scale.detach().to(leaves[0].dtype).requires_grad_(wanted)
        sums: dict[str, Tensor] = {}
        gradients = [torch.zeros_like(leaf) for leaf in (scale, *leaves)] if wanted else []
        for first in range(start, start + own, chunk):
            last = min(first + chunk, start + own)
            index = torch.arange(first, last, device=leaves[0].device)
            # leaves of their own: the gradient of a slice would be as large as the whole
            rows = tuple(leaf.detach()[first:last].requires_grad_(wanted) for leaf in leaves)
            with torch.set_grad_enabled(wanted):
                parts = objective(rows, leaves, scale.exp(), index)
            if wanted:
                totals = (*gradients, *(total[first:last] for total in gradients[1:]))
                grads = torch.autograd.grad(parts["loss"], (scale, *leaves, *rows), allow_unused=True)
                for total, grad in zip(totals, grads, strict=True):
                    if grad is not None:
                        total += grad
                del grads
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach()
            del parts
        keys.extend(sums)
        totals = distributed.sum_over_processes(torch.stack(list(sums.values())))
        if wanted:
            # DDP averages parameter gradients, so local ones are multiplied by n to give the single-process gradient.
            world = distributed.world_size()
            feature_scale = 1 if reference_scale else world
            ctx.save_for_backward(
                gradients[0] * world, *(distributed.sum_and_keep_own_rows(g) * feature_scale for g in gradients[1:])
            )
        loss = totals[keys.index("loss")].clone()
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        return (None, None, None, None, *(grad_loss * g for g in ctx.saved_tensors))


def row_chunked_loss(
    objective: RowObjective,
    features: tuple[Tensor, ...],
    logit_scale: Tensor,
    chunk: int = 128,
    gradient_scale: Literal["exact", "reference"] = "exact",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradient of an objective over the global batch, in O(chunk * N + N * D) memory.

    Each process computes its own rows against the features of all; column gradients are summed back to their owners.

    Args:
        objective: sum over rows, for example `rankclip_objective(...)`.
        features: unit rows of this process, each [B, D], the same B everywhere.
        logit_scale: learnable scalar, log of the temperature factor tau.
        chunk: rows computed at a time; the result does not depend on it.
        gradient_scale: "exact" gives, after DDP's averaging, the single-process gradient for encoders and
            logit scale. "reference" keeps the released scaling, where encoder gradients are 1/n of that.

    Returns:
        The global loss (the same on every process), and its parts without gradient.

    Raises:
        ValueError: feature blocks that differ in length, or chunk < 1.
    """
    lengths = [len(f) for f in features]
    if len(set(lengths)) != 1 or chunk < 1:
        raise ValueError(f"need equally many rows in every feature block and chunk >= 1, got {lengths} and {chunk}")
    keys: list[str] = []
    with torch.autocast(features[0].device.type, enabled=False):
        wide = tuple(f if f.dtype == torch.float64 else f.float() for f in features)
        loss, totals = _ChunkedRows.apply(objective, chunk, gradient_scale == "reference", keys, logit_scale, *wide)
    return loss, dict(zip(keys, totals.unbind(), strict=True))
