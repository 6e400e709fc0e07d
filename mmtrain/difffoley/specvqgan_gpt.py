"""The transformer of SpecVQGAN: codes of a spectrogram one after the other, after video features as a prefix.

Parameters have the names of the released checkpoints (`transformer.*`).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.config_errors import UserError

Cache = list[tuple[Tensor, Tensor] | None]  # keys and values [B, heads, L, width / heads] of each layer


class CausalAttention(nn.Module):
    """Attention of a token to itself and those before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.resid_drop = nn.Dropout(dropout)
        # released checkpoints hold the triangular mask, which nothing here needs
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(f"{prefix}mask", None))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Result [B, L, W], and keys and values of all tokens so far; with a past x is one token."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past is None)
        return self.resid_drop(self.proj(mixed.transpose(1, 2).flatten(2))), (k, v)


class Block(nn.Module):
    """Attention and a two-layer network, each after normalisation and added to the tokens."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, past = self.attn(self.ln1(x), past)
        x = x + mixed
        return x + self.mlp(self.ln2(x)), past


class FeatureGpt(nn.Module):
    """A causal transformer over [features, codes]. The defaults are SpecVQGAN's: 212 features and 265 codes.

    Args:
        feature_dim: width of a feature, D.
        feature_frames: features in the prefix, T.
        num_codes: K.
        sequence: codes of a spectrogram, L.
        layers, heads, width: of the transformer.
        dropout: after the embedding, in the attention, and on each branch.

    Raises:
        UserError: width that the heads do not divide.
    """

    def __init__(
        self,
        feature_dim: int = 2048,
        feature_frames: int = 212,
        num_codes: int = 1024,
        sequence: int = 265,
        layers: int = 24,
        heads: int = 16,
        width: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"transformer.width: {width} is not divisible by heads {heads}")
        self.feature_frames, self.sequence = feature_frames, sequence
        self.pos_emb = nn.Parameter(torch.zeros(1, feature_frames + sequence, width))
        self.tok_emb = nn.Embedding(num_codes, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_codes, bias=False)
        self.embedder = nn.Conv1d(feature_dim, width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def prefix(self, features: Tensor) -> Tensor:
        """Tokens [B, T, W] of features [B, T, D].

        Raises:
            UserError: another number of features than the positions were made for.
        """
        if features.shape[1] != self.feature_frames:
            raise UserError(f"features: {features.shape[1]} a clip, the transformer has {self.feature_frames}")
        return self.embedder(features.transpose(1, 2)).transpose(1, 2)

    def _run(self, tokens: Tensor, begin: int, cache: Cache) -> Tensor:
        """Logits [B, L, K] of tokens whose first has the position `begin`; the cache is brought up to date."""
        x = self.drop(tokens + self.pos_emb[:, begin : begin + tokens.shape[1]])
        for index, block in enumerate(self.blocks):
            x, cache[index] = block(x, cache[index])
        return self.head(self.ln_f(x))

    def forward(self, features: Tensor, codes: Tensor) -> Tensor:
        """Logits [B, T + n, K]; those at position T - 1 + i are of code i.

        Args:
            features: [B, T, D].
            codes: int64 [B, n], n < L: those that are known.
        """
        tokens = torch.cat((self.prefix(features), self.tok_emb(codes)), 1)
        return self._run(tokens, 0, [None] * len(self.blocks))

    def loss(self, features: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy [B, L] of each code after those before it, and whether the likeliest was right, bool [B, L].

        Args:
            features: [B, T, D].
            codes: int64 [B, L].
        """
        logits = self(features, codes[:, :-1])[:, self.feature_frames - 1 :]
        return functional.cross_entropy(logits.transpose(1, 2).float(), codes, reduction="none"), logits.argmax(
            -1
        ) == codes

    @torch.no_grad()
    def sample(self, features: Tensor, draws: Tensor, top_k: int | None = 100, temperature: float = 1.0) -> Tensor:
        """Codes int64 [B, L], each drawn after those before it; keys and values of the past are kept.

        Args:
            features: [B, T, D].
            draws: [B, L] uniform in [0, 1): the chance in it. One row a clip, so that no clip depends on its batch.
            top_k: see `draw_codes`.
            temperature: see `draw_codes`.
        """
        cache: Cache = [None] * len(self.blocks)
        tokens, begin, codes = self.prefix(features), 0, []
        for column in draws.unbind(1):
            logits = self._run(tokens, begin, cache)[:, -1]
            codes.append(draw_codes(logits, column, top_k, temperature))
            begin += tokens.shape[1]
            tokens = self.tok_emb(codes[-1])[:, None]
        return torch.stack(codes, 1)


def draw_codes(logits: Tensor, draws: Tensor, top_k: int | None = 100, temperature: float = 1.0) -> Tensor:
    """One code a row, multinomially, by inverting the cumulated probabilities.

    >>> draw_codes(torch.tensor([[2.0, 0.0, 1.9]]).repeat(3, 1), torch.tensor([0.0, 0.5, 0.9]), top_k=2)
    tensor([0, 0, 2])

    Args:
        logits: [B, K].
        draws: [B] uniform in [0, 1).
        top_k: only so many of the likeliest codes are drawn from; None: all.
        temperature: logits are divided by it.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    cumulated = logits.double().softmax(-1).cumsum(-1)
    # the last sum may fall short of 1 by rounding; the code must be one with a probability above 0
    target = (draws.double()[:, None] * cumulated[:, -1:]).contiguous()
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1)


def evenly_spaced(features: Tensor, frames: int) -> Tensor:
    """So many features [B, frames, D] of [B, T, D], evenly spaced and centred, as SpecVQGAN takes 5 or 1 of 212.

    >>> evenly_spaced(torch.arange(10.0).reshape(1, 10, 1), 2).flatten()
    tensor([3., 8.])

    Raises:
        UserError: fewer than that.
    """
    given = features.shape[1]
    if given < frames:
        raise UserError(f"feature_frames: {frames}, but a clip has {given} features")
    places = torch.arange(frames, device=features.device) * given // frames + given // (frames + 1)
    return features[:, places]
