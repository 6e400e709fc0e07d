"""A fixed picture code behind the interface of diffusers' AutoencoderKL, for worlds that a laptop can learn.

Each patch of the picture is written in its principal components: latents with factor 8 as Stable Diffusion's, without a
network to train.
"""

from collections.abc import Iterable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor
from torch.nn.functional import fold, unfold

from mmtrain.config_errors import UserError

VARIANCE = -30.0  # log variance of the posterior: none, up to rounding


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Pictures [B, 3, H, W] in [-1, 1] to latents [B, latent_channels, H/patch, W/patch] and back.

    Args:
        latent_channels: principal components that are kept, at most 3 patch^2.
        block_out_channels: as of AutoencoderKL, from which pipelines tell the factor; only their number counts: patches
            are 2^(number - 1) pixels high and wide.
        scaling_factor: as of AutoencoderKL; latents have variance 1, so 1.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self, latent_channels: int = 32, block_out_channels: tuple[int, ...] = (1, 1, 1, 1), scaling_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.patch = 2 ** (len(block_out_channels) - 1)
        width = 3 * self.patch**2
        if not 0 < latent_channels <= width:
            raise UserError(f"latent_channels: {latent_channels}, a patch of {self.patch} has 1 to {width} components")
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.eye(latent_channels, width))  # orthonormal rows
        self.register_buffer("deviation", torch.ones(latent_channels))

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], whitening: float = 0.5) -> float:
        """Set the components to those of these pictures; returns the share of the variance that they keep.

        Args:
            batches: float [B, 3, H, W] in [-1, 1].
            whitening: 0 keeps how far components spread relative to each other, 1 makes them equal. Between, what is
                seen most weighs most in a squared error, yet fine detail is not lost. The mean variance is 1.

        Raises:
            UserError: fewer patches than numbers in a patch.
        """
        width = self.mean.numel()
        total, count = torch.zeros(width, dtype=torch.float64), 0
        products = torch.zeros(width, width, dtype=torch.float64)
        for batch in batches:
            rows = self._patches(batch.double()).movedim(1, -1).reshape(-1, width)
            total += rows.sum(0)
            products += rows.T @ rows
            count += len(rows)
        if count < width:
            raise UserError(f"{count} patches are too few to find {width} components: give more pictures")
        mean = total / count
        values, vectors = torch.linalg.eigh(products / count - mean.outer(mean))  # rising
        values, vectors = values.flip(0).clamp(min=1e-12), vectors.flip(1).T
        kept = self.config.latent_channels
        self.mean.copy_(mean)
        self.basis.copy_(vectors[:kept])
        deviation = values[:kept].sqrt()
        divisor = deviation**whitening
        self.deviation.copy_(divisor * (deviation / divisor).square().mean().sqrt())
        return float(values[:kept].sum() / values.sum())

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Posterior of the latents of `x`; its deviation is practically 0."""
        patch = self.patch
        patches = self._patches(x)
        codes = torch.einsum("cd,bdn->bcn", self.basis, patches - self.mean[:, None]) / self.deviation[:, None]
        codes = codes.unflatten(2, (x.shape[-2] // patch, x.shape[-1] // patch))
        posterior = DiagonalGaussianDistribution(torch.cat([codes, torch.full_like(codes, VARIANCE)], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None):
        """Pictures of latents [B, latent_channels, h, w]."""
        patch, (h, w) = self.patch, z.shape[-2:]
        codes = z.flatten(2) * self.deviation[:, None]
        patches = torch.einsum("cd,bcn->bdn", self.basis, codes) + self.mean[:, None]
        picture = fold(patches, (h * patch, w * patch), patch, stride=patch)
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def forward(self, sample: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(sample).latent_dist.mode()).sample

    def _patches(self, x: Tensor) -> Tensor:
        patch = self.patch
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise UserError(f"a picture of {x.shape[-2]} x {x.shape[-1]} has no whole patches of {patch} pixels")
        return unfold(x, patch, stride=patch)
