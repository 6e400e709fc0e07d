"""Networks of the Reactive Diffusion Policy: the asymmetric tokenizer and the UNet that denoises (spec sections 2, 3).

B batch, T time, A action numbers, F touch numbers, C encoder channels, L latent steps, Z latent channels, G condition.
Parameter names are those of the released checkpoints.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.rdp.vq import ResidualVQ

REDUCTION = 4  # two convolutions of stride 2
LOGVAR_RANGE = (-30.0, 20.0)
VQ_STAGES, VQ_CODES = 4, 16
# Up to this many channels a UNet keeps activations channels-last: convolution and GroupNorm are then faster on a CPU (a
# fifth less time for a training step of widths 32-64-128). Beyond, reordering the kernels at every call eats that up.
CHANNELS_LAST_UP_TO = 256


class ActionEncoder(nn.Module):
    """Two convolutions over time: [B, inputs, T] -> [B, channels, T / 4]."""

    def __init__(self, inputs: int, width: int, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(inputs, width, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv1d(width, channels, 5, stride=2, padding=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class ReactiveDecoder(nn.Module):
    """A GRU over frames that sees the same condition at every frame and that frame's touch, then a linear layer."""

    def __init__(self, condition_dim: int, touch_dim: int, width: int, action_dim: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(condition_dim + touch_dim, width, batch_first=True)
        self.fc = nn.Linear(width, action_dim)
        nn.init.orthogonal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, condition: Tensor, touch: Tensor) -> Tensor:
        """Actions [B, T, A] of a condition [B, D] and touch [B, T, F], from a zero state."""
        repeated = condition[:, None].expand(-1, touch.shape[1], -1)
        hidden, _ = self.rnn(torch.cat([repeated, touch], dim=-1))
        return self.fc(hidden)


class TokenizerNetwork(nn.Module):
    """The asymmetric tokenizer: a plan is encoded without touch and decoded with it (RDP section on the fast policy).

    Everything is normalised. Use: `mean, logvar = moments(encode(action))`, a latent from them,
    `decode(condition(latent), touch)`. With `quantizer="vq"`: `latent, loss = quantize(encode(action))`.

    Args:
        action_dim: A.
        touch_dim: F, all decoder inputs together; may be 0.
        encoder_channels: C.
        latent_dim: Z; the latent of "vq" has C channels instead.
        horizon: frames of a window, a multiple of 4.
        width: channels inside the encoder and of the GRU.
        quantizer: "kl" a Gaussian posterior; "vq" residual vector quantisation, 4 stages of 16 codes.
        symmetric: the encoder sees touch too (Table VI's ablation; not in the released code).

    Raises:
        UserError: a horizon that is no multiple of 4, an unknown quantizer, or `symmetric` without touch.
    """

    def __init__(
        self,
        action_dim: int,
        touch_dim: int,
        encoder_channels: int = 8,
        latent_dim: int = 16,
        horizon: int = 32,
        width: int = 32,
        quantizer: Literal["kl", "vq"] = "kl",
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if horizon % REDUCTION:
            raise UserError(
                f"horizon: {horizon} is not a multiple of {REDUCTION}, by which the tokenizer shortens time"
            )
        if quantizer not in ("kl", "vq"):
            raise UserError(f"quantizer: {quantizer} is not known ['kl', 'vq']")
        if symmetric and not touch_dim:
            raise UserError("symmetric: true needs touch for the encoder to see, but this tokenizer has none")
        # int(): PyTorch refuses NumPy integers as sizes of a GRU
        self.action_dim, self.touch_dim, self.horizon = int(action_dim), int(touch_dim), int(horizon)
        self.quantizer, self.symmetric = quantizer, symmetric
        self.latent_steps = self.horizon // REDUCTION  # L
        self.latent_dim = int(latent_dim if quantizer == "kl" else encoder_channels)  # Z
        self.condition_dim = int(encoder_channels) * self.latent_steps
        self.encoder = ActionEncoder(self.action_dim + self.touch_dim * symmetric, int(width), int(encoder_channels))
        self.decoder = ReactiveDecoder(self.condition_dim, self.touch_dim, int(width), self.action_dim)
        if quantizer == "kl":
            self.quant = nn.Conv1d(int(encoder_channels), 2 * self.latent_dim, 1)
            self.post_quant = nn.Conv1d(self.latent_dim, int(encoder_channels), 1)
        else:
            self.vq_embedding = ResidualVQ(self.latent_dim, VQ_CODES, VQ_STAGES)

    def encode(self, action: Tensor, touch: Tensor | None = None) -> Tensor:
        """What `moments` takes, [B, 2Z, L], of actions [B, T, A]; with "vq" what `quantize` takes, [B, C, L].

        Args:
            touch: [B, T, F], read only if `symmetric`.
        """
        seen = torch.cat([action, touch], dim=-1) if self.symmetric else action
        features = self.encoder(seen.transpose(1, 2))
        return self.quant(features) if self.quantizer == "kl" else features

    def moments(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each [B, Z, L]; the log-variance is kept in [-30, 20]."""
        mean, logvar = encoded.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Only "vq": the nearest sums of codes [B, C, L] and the commitment loss."""
        quantized, _, loss = self.vq_embedding(features.transpose(1, 2))
        return quantized.transpose(1, 2), loss

    def condition(self, latent: Tensor) -> Tensor:
        """What the decoder is told of the plan: [B, L * C], step by step, of a latent [B, Z, L]."""
        features = self.post_quant(latent) if self.quantizer == "kl" else latent
        return features.transpose(1, 2).flatten(1)

    def decode(self, condition: Tensor, touch: Tensor) -> Tensor:
        """Actions [B, T, A] for T frames of touch [B, T, F] (F may be 0), oldest first, from a zero state.

        The last one is what the fast policy sends after it has seen T frames.
        """
        return self.decoder(condition, touch)


class TimeConv(nn.Conv1d):
    """A convolution over time of [B, C, 1, T], a picture of height 1, so that it can be channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None], self.bias, (1, self.stride[0]), (0, self.padding[0]))


class TimeConvTranspose(nn.ConvTranspose1d):
    """A transposed convolution over time of [B, C, 1, T]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight[:, :, None], self.bias, (1, self.stride[0]), (0, self.padding[0]))


class ConvBlock(nn.Module):
    """Convolution over time, GroupNorm, Mish."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            TimeConv(inputs, outputs, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(num_groups, outputs),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class FilmBlock(nn.Module):
    """Two `ConvBlock`s; between them each channel is scaled and shifted by what step and condition say (FiLM)."""

    def __init__(self, inputs: int, outputs: int, film_dim: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                ConvBlock(inputs, outputs, kernel_size, num_groups),
                ConvBlock(outputs, outputs, kernel_size, num_groups),
            ]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(film_dim, 2 * outputs))
        self.residual_conv = TimeConv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def modulation(self, activated: Tensor) -> Tensor:
        """Scale and shift [B, 2 * outputs, 1, 1] of Mish([step, condition]), which all blocks share."""
        return self.cond_encoder[1](activated)[..., None, None]

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.chunk(2, dim=1)
        hidden = torch.addcmul(shift, scale, self.blocks[0](x))
        return self.blocks[1](hidden) + self.residual_conv(x)


class Downsample(nn.Module):
    """Half the time steps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = TimeConv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the time steps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = TimeConvTranspose(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class StepEmbedding(nn.Module):
    """Sines and cosines of a diffusion step: [B] -> [B, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) * (-math.log(10_000) / (half - 1))
        angles = timestep[:, None].float() * exponents.exp()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConditionalUnet1D(nn.Module):
    """The UNet over time of Diffusion Policy, conditioned by FiLM, as RDP's slow policy uses it.

    As released, what the first level puts out is never used as a skip. The time axis must halve evenly at every level
    but the last.

    Args:
        input_dim: channels C of what is denoised.
        global_cond_dim: G, numbers of the condition.
        step_embed_dim: numbers that tell the diffusion step, even and at least 4.
        down_dims: channels of each level; multiples of `num_groups`.
        kernel_size: of the FiLM blocks and the last block, odd.
        num_groups: of every GroupNorm.

    Raises:
        UserError: sizes that do not go together.
    """

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int,
        step_embed_dim: int = 128,
        down_dims: tuple[int, ...] = (512, 1024, 2048),
        kernel_size: int = 5,
        num_groups: int = 8,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise UserError(f"kernel_size: {kernel_size} is even; an odd one keeps the number of time steps")
        if uneven := [dim for dim in down_dims if dim % num_groups]:
            raise UserError(f"down_dims: {uneven} cannot be split into num_groups = {num_groups} equal groups")
        if step_embed_dim % 2 or step_embed_dim < 4:
            raise UserError(f"step_embed_dim: {step_embed_dim}, expected an even number of at least 4")
        film = step_embed_dim + global_cond_dim
        block = lambda inputs, outputs: FilmBlock(inputs, outputs, film, kernel_size, num_groups)  # noqa: E731
        self.diffusion_step_encoder = nn.Sequential(
            StepEmbedding(step_embed_dim),
            nn.Linear(step_embed_dim, 4 * step_embed_dim),
            nn.Mish(),
            nn.Linear(4 * step_embed_dim, step_embed_dim),
        )
        widths = list(zip((input_dim, *down_dims[:-1]), down_dims, strict=True))
        last = len(widths) - 1
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [block(inputs, outputs), block(outputs, outputs), Downsample(outputs) if i < last else nn.Identity()]
            )
            for i, (inputs, outputs) in enumerate(widths)
        )
        self.mid_modules = nn.ModuleList([block(down_dims[-1], down_dims[-1]) for _ in range(2)])
        self.up_modules = nn.ModuleList(
            nn.ModuleList([block(2 * outputs, inputs), block(inputs, inputs), Upsample(inputs)])
            for inputs, outputs in reversed(widths[1:])
        )
        self.final_conv = nn.Sequential(
            ConvBlock(down_dims[0], down_dims[0], kernel_size, num_groups), TimeConv(down_dims[0], input_dim, 1)
        )
        self.is_channels_last = max(down_dims) <= CHANNELS_LAST_UP_TO
        # in the order of use, which is that of the attributes above
        self._film_blocks = [module for module in self.modules() if isinstance(module, FilmBlock)]

    def forward(self, sample: Tensor, timestep: Tensor | int, global_cond: Tensor) -> Tensor:
        """The noise in a sample.

        Args:
            sample: [B, T, C].
            timestep: diffusion step, [B] or one for all.
            global_cond: [B, G].

        Returns:
            [B, T, C].
        """
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        return self.denoise(sample, self.modulations(timestep, global_cond))

    def modulations(self, timestep: Tensor, global_cond: Tensor) -> list[Tensor]:
        """Scale and shift of every FiLM block, [N, 2 * channels, 1, 1] each, for steps [N] and conditions [N, G]."""
        waves, *layers = self.diffusion_step_encoder
        embedded = waves(timestep).to(global_cond.dtype)
        for layer in layers:
            embedded = layer(embedded)
        activated = F.mish(torch.cat([embedded, global_cond], dim=-1))
        return [block.modulation(activated) for block in self._film_blocks]

    def denoise(self, sample: Tensor, modulations: list[Tensor]) -> Tensor:
        """As `forward`, with `modulations` computed before: of each sample, or [1, ...] for all."""
        films = iter(modulations)
        hidden = sample.transpose(1, 2).unsqueeze(2)  # channels-last, as [B, T, C] is; the layers keep the layout
        if not self.is_channels_last:
            hidden = hidden.contiguous()
        skips = []
        for first, second, downsample in self.down_modules:
            hidden = second(first(hidden, next(films)), next(films))
            skips.append(hidden)
            hidden = downsample(hidden)
        for block in self.mid_modules:
            hidden = block(hidden, next(films))
        for first, second, upsample in self.up_modules:
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = upsample(second(first(hidden, next(films)), next(films)))
        return self.final_conv(hidden).squeeze(2).transpose(1, 2)

    def blocks(self) -> list[nn.Module]:
        """The repeated parts, each of which is used by calling it; that of the modulations runs before its block."""
        return [part for block in self._film_blocks for part in (block.cond_encoder[1], block)]

    def arrange_for_cpu_inference(self) -> None:
        """Store the kernels channels-last, which spares reordering them at every call; names and values stay.

        On a CPU, denoising one sample with the released sizes then takes about a third of the time; training at those
        sizes gets slower.
        """
        for module in self.modules():
            if isinstance(module, TimeConv | TimeConvTranspose):
                kernel = module.weight.data[:, :, None]
                module.weight.data = kernel.contiguous(memory_format=torch.channels_last)[:, :, 0]

    def denoiser(self, global_cond: Tensor, timesteps: Iterable[int]) -> Callable[[Tensor, int], Tensor]:
        """A function (sample [B, T, C], step) -> noise, for the steps named, with one condition [B, G].

        What depends on step and condition alone is computed for all steps at once, so that its weights, a sixth of
        the released model, are read once per sampling instead of once per step. Results are those of `forward` but
        for rounding.
        """
        steps, batch = [int(step) for step in timesteps], len(global_cond)
        timestep = torch.tensor(steps, device=global_cond.device)
        rows = self.modulations(timestep.repeat_interleave(batch), global_cond.repeat(len(steps), 1))
        by_step = dict(zip(steps, zip(*(row.split(batch) for row in rows), strict=True), strict=True))
        return lambda sample, step: self.denoise(sample, by_step[int(step)])
