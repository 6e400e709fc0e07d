"""Latents of training pictures: encoded once, kept in memory, sampled anew each step. B batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmtrain import distributed

Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def posterior(vae: Any, pictures: Tensor) -> Moments:
    """Mean and standard deviation [B, C, h, w], float32, of uint8 pictures [B, 3, H, W].

    Without autocast: Stable Diffusion's autoencoder loses precision in half, and this is done once.
    """
    scaled = pictures.to(vae.device, vae.dtype) / 127.5 - 1
    with torch.autocast(scaled.device.type, enabled=False):
        found = vae.encode(scaled).latent_dist
    return found.mean.float(), found.std.float()


class LatentCache:
    """The posteriors of pictures by their number, in main memory: 0.23 MB a picture of 512 x 896 with 4 channels.

    Pictures that are kept are encoded one by one, so that a latent does not depend, not even in its last bit, on the
    batch that it came in first, which is another after a resume.

    Args:
        vae: with the interface of AutoencoderKL.
        keep: False encodes each batch again.
    """

    def __init__(self, vae: Any, keep: bool = True) -> None:
        self.vae, self.keep = vae, keep
        self.known: dict[int, Moments] = {}

    def moments(self, ids: Sequence[int], read: Callable[[list[int]], Tensor]) -> Moments:
        """Mean and deviation [B, C, h, w] of pictures, on the autoencoder's device.

        Args:
            ids: B numbers.
            read: rows of the batch -> their pictures, uint8 [rows, 3, H, W]; called for what is not known yet.
        """
        if not self.keep:
            return posterior(self.vae, read(list(range(len(ids)))))
        for row, number in enumerate(ids):
            if number not in self.known:
                mean, std = posterior(self.vae, read([row]))
                self.known[number] = mean[0].cpu(), std[0].cpu()
        rows = [self.known[number] for number in ids]
        mean, std = (torch.stack(part).to(self.vae.device) for part in zip(*rows, strict=True))
        return mean, std

    def sample(self, ids: Sequence[int], read: Callable[[list[int]], Tensor]) -> Tensor:
        """Scaled latents [B, C, h, w] drawn from the posteriors, as the released training does each step."""
        mean, std = self.moments(ids, read)
        return (mean + std * distributed.normal_like(mean)) * self.vae.config.scaling_factor
