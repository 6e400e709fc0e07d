"""Attention with an additive bias on the text tokens, without a map of attention in memory.

A bias b [B, N, L] is added to the scaled scores of attention before the softmax: softmax(Q K^T / sqrt(d) + b) V. It is
a sum over characters of m(n) u(l), a map over the N queries (pixels of a layer's grid) times how often each of the L
text tokens belongs to the character, so it can be given to the fused kernels as it is ("bias", broadcast over heads) or
as a few more channels of queries and keys ("low_rank"). Both are exact.

B samples, H heads, N queries, L text tokens, d width of a head, J characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.config_errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

Heads = Literal["first", "all", "released"]
Form = Literal["bias", "low_rank"]
HEADS, FORMS = ("first", "all", "released"), ("bias", "low_rank")
ALIGNMENT = 8  # elements: fused CUDA kernels want rows of a bias, and the width of a head, to be a multiple of this


@dataclass(frozen=True, eq=False)
class AttentionBias:
    """What guides a batch in the cross-attentions of one call of a network.

    Args:
        maps: by number of queries N, m [B, J, N], float32: how much is added for each character, sign included.
        usage: u [B, J, L]: how often each token lies in the character's spans.
        heads: which heads of each sample get the bias. "first": the first. "all": every one. "released": the published
            code's indexing, see `biased_attention`.
        form: "bias" adds b [B, N, L]; "low_rank" appends J channels to queries and keys. The same result. Maps that
            carry a gradient take "low_rank" whatever this says: fused kernels give a bias no gradient, and the fallback
            would hold the scores of all heads.
        unconditional: leading samples of the network's batch that get nothing, before the B, see `with_unconditional`.
    """

    maps: dict[int, Tensor]
    usage: Tensor
    heads: Heads = "first"
    form: Form = "bias"
    unconditional: int = 0
    _kept: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def map(self, queries: int) -> Tensor:
        """m [B, J, N] for a layer of N queries.

        Raises:
            UserError: no map was made for so many.
        """
        if queries not in self.maps:
            known = ", ".join(str(n) for n in sorted(self.maps))
            raise UserError(
                f"guidance has maps for layers of {known} tokens, this one has {queries}: "
                "the latents do not have the size that the maps were made for"
            )
        return self.maps[queries]

    def bias(self, queries: int, dtype: torch.dtype | None = None) -> Tensor:
        """b [B, N, L] = sum_j m_j(n) u_j(l), after zeros for unconditional samples; made once for all layers of N.

        Args:
            dtype: of the result, which is summed in the dtype of the maps; None is that one.
        """
        maps = self.map(queries)
        key = (queries, maps.dtype if dtype is None else dtype)
        if key in self._kept:
            return self._kept[key]
        batch, characters, length = self.usage.shape
        # Rows get a stride that fused CUDA kernels take; they would copy the bias in every layer otherwise.
        usage = F.pad(self.usage.to(maps.dtype), (0, -length % ALIGNMENT))
        total = maps.new_zeros(self.unconditional + batch, queries, usage.shape[-1])
        # Products one by one, not a matrix product, which autocast or TF32 would round.
        for j in range(characters):
            total[self.unconditional :].addcmul_(maps[:, j, :, None], usage[:, j, None, :])
        total = total.to(key[1])[..., :length]
        # Not kept with a gradient: a checkpointed block would find it ready when it runs again, and autograd would miss
        # the tensors that were saved in the first run.
        if not total.requires_grad:
            self._kept[key] = total
        return total

    def factors(self, queries: int) -> tuple[Tensor, Tensor]:
        """m [B, J, N] and u [B, J, L], after zeros for unconditional samples: what `bias` is the product of."""
        maps, usage = self.map(queries), self.usage
        if self.unconditional:
            maps, usage = (torch.cat([x.new_zeros(self.unconditional, *x.shape[1:]), x]) for x in (maps, usage))
        return maps, usage

    def with_unconditional(self) -> AttentionBias:
        """For the batch [unconditional; conditional] of guided sampling: nothing is added in the first half."""
        return replace(self, unconditional=self.usage.shape[0])

    def select(self, rows: slice | list[int] | Tensor) -> AttentionBias:
        """For a part of the B samples; `with_unconditional` comes after.

        Raises:
            ValueError: it came before.
        """
        if self.unconditional:
            raise ValueError("select() before with_unconditional()")
        return replace(self, maps={n: m[rows] for n, m in self.maps.items()}, usage=self.usage[rows])


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: Heads, mask: Tensor | None = None, unconditional: int = 0
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + b) V on some heads, plain attention on the others.

    "released" is for parity only. The published code holds batch and heads in one axis and indexes it by the sample, so
    the bias of sample b lands on head b of sample 0, and samples after the first get none. One sample: its first head.

    Args:
        q: [B, H, N, d]. k, v: [B, H, L, d].
        bias: [B, N, L], of any floating dtype; cast to that of q.
        mask: [B, 1, 1, L] added to the scores of every head, or None.
        unconditional: leading samples that "released" does not count.

    Returns:
        [B, H, N, d].

    Raises:
        UserError: more samples than heads with "released".
    """
    bias = bias.to(q.dtype)[:, None]

    def guided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        added = bias[rows] if mask is None else bias[rows] + mask
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)

    return _on_heads(guided, q, k, v, heads, mask, unconditional)


def low_rank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    usage: Tensor,
    heads: Heads,
    mask: Tensor | None = None,
    unconditional: int = 0,
) -> Tensor:
    """`biased_attention` for the bias sum_j m_j(n) u_j(l), which is never made.

    sqrt(d) m_j is appended to the queries as channel d + j, u_j to the keys, and the scores scaled by 1 / sqrt(d) as
    before. Kernels that take no bias stay usable, and gradients reach the maps through the fused kernels.

    Args:
        maps: m [B, J, N]. usage: u [B, J, L]. The others as in `biased_attention`.

    Returns:
        [B, H, N, d].
    """
    width, characters = q.shape[-1], usage.shape[1]
    unused = -(width + characters) % ALIGNMENT
    of_queries = F.pad((maps * width**0.5).mT, (0, unused)).to(q.dtype)[:, None]
    of_keys = F.pad(usage.mT, (0, unused)).to(k.dtype)[:, None]

    def guided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
        q = torch.cat([q, of_queries[rows].expand(-1, q.shape[1], -1, -1)], dim=-1)
        k = torch.cat([k, of_keys[rows].expand(-1, k.shape[1], -1, -1)], dim=-1)
        v = F.pad(v, (0, characters + unused))  # the kernels want values as wide as keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)[..., :width]

    return _on_heads(guided, q, k, v, heads, mask, unconditional)


def _on_heads(
    guided: Callable[[Tensor, Tensor, Tensor, Tensor | None, slice], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Heads,
    mask: Tensor | None,
    unconditional: int,
) -> Tensor:
    """`guided(q, k, v, mask, rows of the bias)` on the heads that `heads` names, plain attention on the others."""
    batch, num_heads = q.shape[:2]
    if heads == "all" or (heads == "first" and num_heads == 1):
        return guided(q, k, v, mask, slice(None))
    if heads == "first":
        # Two calls rather than one with zeros for the other heads, which would be a bias [B, H, N, L].
        first = guided(q[:, :1], k[:, :1], v[:, :1], mask, slice(None))
        others = F.scaled_dot_product_attention(q[:, 1:], k[:, 1:], v[:, 1:], attn_mask=mask)
        # Joined in the layout [B, N, H, d], in which the heads of a pixel are one row: no further copy is needed.
        return torch.cat([first.transpose(1, 2), others.transpose(1, 2)], dim=2).transpose(1, 2)
    if heads != "released":
        raise UserError(f"heads: {heads!r}, must be one of {', '.join(HEADS)}")
    count, zero = batch - unconditional, unconditional
    if count > num_heads:
        raise UserError(f"heads: released puts sample b on head b; {count} samples are more than {num_heads} heads")
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # Head b of sample 0 becomes sample b with one head.
    q, k, v = (x[zero, :count, None] for x in (q, k, v))
    edited = guided(q, k, v, None if mask is None else mask[zero : zero + 1], slice(zero, None))
    sample = torch.cat([edited.transpose(0, 1), plain[zero : zero + 1, count:]], dim=1)
    return torch.cat([plain[:zero], sample, plain[zero + 1 :]])


class BiasProcessor:
    """Attention processor of diffusers that adds an `AttentionBias` in cross-attentions.

    Without a bias, and in self-attentions, it is diffusers' own `AttnProcessor2_0`. Adapters of peft work, since they
    replace the projections that it calls.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        attention_bias: AttentionBias | None = None,
    ) -> Tensor:
        """Attention with projections, norms and residual of `attn`.

        Args:
            hidden_states: [B, N, C], or [B, C, h, w].
            encoder_hidden_states: text [B, L, W]; None is self-attention, which gets no bias: diffusers passes the
                keyword to both kinds.
            attention_mask: added to the scores, [B, 1, L].
            attention_bias: of the batch; None adds nothing.
        """
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        mask = self._mask(attn, attention_mask, context)

        q, k, v = (self._split(attn, x) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        bias = None if encoder_hidden_states is None else attention_bias
        hidden_states = self._attend(q, k, v, mask, bias).transpose(1, 2).flatten(2).to(q.dtype)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    @staticmethod
    def _split(attn: Attention, x: Tensor) -> Tensor:
        """[B, N, H d] -> [B, H, N, d]."""
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    @staticmethod
    def _mask(attn: Attention, mask: Tensor | None, context: Tensor) -> Tensor | None:
        """[B, 1, 1, L] or, of some callers, [B, 1, N, L]; diffusers repeats it for every head, one is enough."""
        if mask is None:
            return None
        batch, length = context.shape[:2]
        mask = attn.prepare_attention_mask(mask, length, batch)
        return mask.view(batch, attn.heads, -1, mask.shape[-1])[:, :1]

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: AttentionBias | None) -> Tensor:
        if bias is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        queries, about = q.shape[2], (bias.heads, mask, bias.unconditional)
        maps = bias.map(queries)
        if bias.form == "low_rank" or (maps.requires_grad and torch.is_grad_enabled()):
            return low_rank_attention(q, k, v, *bias.factors(queries), *about)
        return biased_attention(q, k, v, bias.bias(queries, q.dtype), *about)


def install(unet: UNet2DConditionModel) -> None:
    """Let a UNet take `cross_attention_kwargs={"attention_bias": AttentionBias}`; without, it works as before."""
    unet.set_attn_processor(BiasProcessor())


def grid_table(height: int, width: int, levels: int | None = None) -> dict[int, tuple[int, int]]:
    """Grids of a UNet by their number of tokens.

    Args:
        height, width: of the latents.
        levels: number of grids, each half the one before, rounded up, as a convolution of stride 2 makes them; None
            goes on to a single token, for a UNet of any depth.

    Returns:
        tokens N -> (h, w), largest first.

    >>> grid_table(64, 112, 4)
    {7168: (64, 112), 1792: (32, 56), 448: (16, 28), 112: (8, 14)}
    """
    table = {height * width: (height, width)}
    while (levels is None or len(table) < levels) and max(height, width) > 1:
        height, width = -(-height // 2), -(-width // 2)
        table[height * width] = (height, width)
    return table
