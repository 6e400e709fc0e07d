"""Networks of SpecVQGAN's codebook (Iashin and Rahtu, BMVC 2021; the baseline of Diff-Foley, arXiv 2306.17203).

A spectrogram is a picture [B, 1, C, F] in [-1, 1]; the encoder halves it at each level but the first, the quantiser
replaces each vector of the map by the nearest of its codes. Parameters have the names of the released checkpoints.
`specvqgan_gpt` models the codes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmtrain.config_errors import UserError

NORM_GROUPS = 32
TermOrder = Literal["released", "vqvae"]


# --- vector quantiser ---


def codebook_loss(z: Tensor, codes: Tensor, beta: float = 0.25, order: TermOrder = "released") -> Tensor:
    """Pull encoder outputs and their codes together.

    With sg for stop-gradient, the VQ-VAE has mean((codes - sg(z))^2) + beta * mean((sg(codes) - z)^2). The released
    code has beta on the other term: mean((sg(codes) - z)^2) + beta * mean((codes - sg(z))^2), so its codes move four
    times slower than meant and its encoder is bound four times harder. Values differ by nothing, gradients do.

    Args:
        z: encoder outputs, any shape.
        codes: the nearest code of each, same shape.
        beta: weight of the lighter term.
        order: "released", or "vqvae" as the VQ-VAE paper has it.
    """
    commitment = (codes.detach() - z).square().mean()
    codebook = (codes - z.detach()).square().mean()
    return commitment + beta * codebook if order == "released" else codebook + beta * commitment


def perplexity(indices: Tensor, num_codes: int) -> Tensor:
    """exp of the entropy of the codes in use: 1 for a collapsed codebook, `num_codes` if all are used alike.

    >>> perplexity(torch.tensor([0, 1, 2, 3]), 8)
    tensor(4.)
    """
    shares = torch.bincount(indices.flatten(), minlength=num_codes).float() / indices.numel()
    return (-(shares * (shares + 1e-10).log()).sum()).exp()


class VectorQuantizer(nn.Module):
    """Nearest code by squared distance, with a straight-through gradient.

    Args:
        num_codes: K.
        width: of a code, D.
        beta, order: see `codebook_loss`.
    """

    def __init__(self, num_codes: int, width: int, beta: float = 0.25, order: TermOrder = "released") -> None:
        super().__init__()
        if order not in ("released", "vqvae"):
            raise UserError(f"term_order: {order!r}, must be released or vqvae")
        self.num_codes, self.beta, self.order = num_codes, beta, order
        self.embedding = nn.Embedding(num_codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of z [B, D, h, w]: its codes in the same shape, with z's gradient; the loss; indices int64 [B, h, w]."""
        channels_last = z.movedim(1, -1)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):  # near codes need full precision
            flat, weight = channels_last.flatten(0, -2).float(), self.embedding.weight.float()
            distance = weight.square().sum(1) - 2 * flat @ weight.T  # + |z|^2, the same for all codes
            indices = distance.argmin(1).view(channels_last.shape[:-1])
        codes = self.codes(indices)
        loss = codebook_loss(z, codes, self.beta, self.order)
        return z + (codes - z).detach(), loss, indices

    def codes(self, indices: Tensor) -> Tensor:
        """Code vectors [B, D, h, w] of indices [B, h, w]."""
        return self.embedding(indices).movedim(-1, 1)


# --- order of the codes ---


def to_sequence(grid: Tensor) -> Tensor:
    """Codes [B, h, w] in column-major order [B, h * w]: all bands of one time column, then the next column.

    >>> to_sequence(torch.tensor([[[0, 1, 2], [3, 4, 5]]]))
    tensor([[0, 3, 1, 4, 2, 5]])
    """
    return grid.transpose(1, 2).flatten(1)


def to_grid(sequence: Tensor, height: int) -> Tensor:
    """The inverse of `to_sequence`: [B, h * w] to [B, h, w]."""
    return sequence.unflatten(1, (-1, height)).transpose(1, 2)


# --- encoder and decoder ---


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after normalisation and swish, added to the input [B, c, h, w]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.silu(self.norm1(x)))
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PlaceAttention(nn.Module):
    """Attention of one head over all places of a map [B, c, h, w], added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the size: a strided convolution, padded to the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: each value repeated, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where `has_attention`."""

    def __init__(self, channels: int, out_channels: int, blocks: int, has_attention: bool) -> None:
        super().__init__()
        ins = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResidualBlock(before, out_channels) for before in ins)
        self.attn = nn.ModuleList(PlaceAttention(out_channels) for _ in range(blocks if has_attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            x = self.attn[index](x) if len(self.attn) else x
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.attn_1 = PlaceAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures [B, 1, H, W] to maps [B, latent_channels, H / f, W / f] with f = 2 ^ (levels - 1); see `Vqgan`."""

    def __init__(
        self, widths: Sequence[int], blocks: int, attention_levels: Sequence[bool], latent_channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for index, (width, has_attention) in enumerate(zip(widths, attention_levels, strict=True)):
            level = Level(widths[max(0, index - 1)], width, blocks, has_attention)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The way back of `Encoder`, with one residual block more a level."""

    def __init__(
        self, widths: Sequence[int], blocks: int, attention_levels: Sequence[bool], latent_channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        levels = []
        for index, (width, has_attention) in enumerate(zip(widths, attention_levels, strict=True)):
            level = Level(widths[min(index + 1, len(widths) - 1)], width, blocks + 1, has_attention)
            if index > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)  # the finest first, as in the released checkpoints; run from the last
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(functional.silu(self.norm_out(x)))


class Vqgan(nn.Module):
    """Autoencoder of spectrograms whose latent is a grid of codes. The defaults are SpecVQGAN's: 80 x 848 to 5 x 53.

    Args:
        width: channels of the first level, a multiple of 32 (groups of the normalisation).
        multipliers: of the width, one a level; each level but the first halves both sides.
        blocks: residual blocks of a level.
        attention_levels: which levels have attention; None: the coarsest.
        num_codes: size of the codebook.
        code_width: of a code.
        beta, term_order: see `codebook_loss`.

    Raises:
        UserError: settings that do not fit each other.
    """

    def __init__(
        self,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention_levels: Sequence[bool] | None = None,
        num_codes: int = 1024,
        code_width: int = 256,
        beta: float = 0.25,
        term_order: TermOrder = "released",
    ) -> None:
        super().__init__()
        if width % NORM_GROUPS:
            raise UserError(f"network.width: {width}, must be a multiple of {NORM_GROUPS}")
        levels = attention_levels or [False] * (len(multipliers) - 1) + [True]
        if len(levels) != len(multipliers):
            raise UserError(f"network.attention_levels: {len(levels)} entries, multipliers has {len(multipliers)}")
        widths = [width * multiplier for multiplier in multipliers]
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = Encoder(widths, blocks, levels, code_width)
        self.decoder = Decoder(widths, blocks, levels, code_width)
        self.quantize = VectorQuantizer(num_codes, code_width, beta, term_order)
        self.quant_conv = nn.Conv2d(code_width, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, code_width, 1)

    def encode(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `VectorQuantizer` gives for a picture [B, 1, H, W]; both sides are multiples of `factor`."""
        return self.quantize(self.quant_conv(self.encoder(picture)))

    def decode(self, quantised: Tensor) -> Tensor:
        """Picture [B, 1, H, W] of a quantised map."""
        return self.decoder(self.post_quant_conv(quantised))

    def decode_codes(self, indices: Tensor) -> Tensor:
        """Picture [B, 1, H, W] of code indices [B, h, w]."""
        return self.decode(self.quantize.codes(indices))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoded picture, codebook loss, indices [B, h, w]."""
        quantised, loss, indices = self.encode(picture)
        return self.decode(quantised), loss, indices


# --- adversary ---


class PatchDiscriminator(nn.Module):
    """Whether each patch of a picture [B, 1, H, W] is real: logits [B, 1, h, w] (PatchGAN).

    Args:
        width: channels of the first convolution; they double at each, up to 8 times.
        layers: strided convolutions; 3 see patches of 70 x 70.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(1, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        before = width
        for index in range(1, layers + 1):
            after = width * min(2**index, 8)
            stride = 2 if index < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
            before = after
        self.main = nn.Sequential(*parts, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 0.0 if isinstance(module, nn.Conv2d) else 1.0, 0.02)

    def forward(self, picture: Tensor) -> Tensor:
        return self.main(picture)


def hinge_loss(real: Tensor, generated: Tensor) -> Tensor:
    """The discriminator's loss of its logits: 0 where real ones are above 1 and generated ones below -1.

    >>> hinge_loss(torch.tensor([2.0]), torch.tensor([0.0]))
    tensor(0.5000)
    """
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + generated).mean())
