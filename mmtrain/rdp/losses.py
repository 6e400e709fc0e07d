"""The objectives of RDP's two stages (spec sections 2 and 3).

B batch, T time, A action numbers, L latent steps, Z latent channels.
"""

import torch.nn.functional as F
from torch import Tensor


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL of N(mean, exp(logvar)) from N(0, 1), summed over channels and steps, averaged over the batch.

    Args:
        mean, logvar: [B, Z, L].

    >>> import torch
    >>> kl_divergence(torch.ones(2, 3, 4), torch.zeros(2, 3, 4)).item()
    6.0
    """
    terms = mean.square() + logvar.exp() - 1 - logvar
    return terms.flatten(1).sum(1).mean() / 2


def tokenizer_loss(
    prediction: Tensor, target: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float = 1e-6
) -> tuple[Tensor, dict[str, Tensor]]:
    """What stage 1 minimises: mean |prediction - target| + kl_weight * KL.

    Args:
        prediction, target: normalised actions [B, T, A].
        mean, logvar: posterior [B, Z, L].
        kl_weight: 1e-6 as released.

    Returns:
        the loss, and for the log `l1`, `mse`, `kl`, detached.
    """
    l1, kl = F.l1_loss(prediction, target), kl_divergence(mean, logvar)
    mse = F.mse_loss(prediction.detach(), target)
    return l1 + kl_weight * kl, {"l1": l1.detach(), "mse": mse, "kl": kl.detach()}


def denoising_loss(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """What stage 2 minimises: the mean squared error of the noise."""
    return F.mse_loss(predicted_noise, noise)
