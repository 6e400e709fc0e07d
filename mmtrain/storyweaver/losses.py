"""The losses of fine-tuning a text-to-image diffusion model: noise prediction, SNR weights, prior preservation.

B batch. The regularisers of the knowledge encoder are in `guidance`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain import distributed
from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule, Objective


def denoising_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error averaged over each latent, in float32: StoryWeaver equation (9) for "eps".

    Args:
        predicted, target: [B, C, h, w].

    Returns:
        [B].

    >>> denoising_errors(torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]], [[[0.0, 2.0]]]]))
    tensor([5., 2.])
    """
    return F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)


def snr_weights(schedule: NoiseSchedule, t: Tensor, objective: Objective, gamma: float) -> Tensor:
    """Min-SNR-gamma weights [B] of errors at integer steps [B] (arXiv 2303.09556, section 3.4).

    SNR = alpha^2 / sigma^2. "eps": min(SNR, gamma) / SNR. "v": min(SNR, gamma) / (SNR + 1).

    Raises:
        UserError: no weight is known for the objective, or gamma is not above 0.

    >>> snr_weights(NoiseSchedule(), torch.tensor([0, 999]), "eps", 5.0)
    tensor([0.0043, 1.0000])
    """
    if gamma <= 0 or objective not in ("eps", "v"):
        raise UserError(f"snr_gamma: {gamma} for objective {objective}: must be above 0, the objective eps or v")
    alphas = torch.from_numpy(schedule.alphas_cumprod).to(t.device)[t]
    snr = alphas / (1 - alphas)
    return (snr.clamp(max=gamma) / (snr if objective == "eps" else snr + 1)).float()


def with_offset(noise: Tensor, offset: float) -> Tensor:
    """Noise [B, C, h, w] plus `offset` times a normal number for each channel, so that brightness is noised too.

    Nothing is drawn for offset 0.
    """
    if not offset:
        return noise
    return noise + offset * distributed.normal_like(noise[..., :1, :1])


def prior_preserving_loss(errors: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """DreamBooth's loss: the mean of the first half of the errors plus `weight` times that of the second half.

    Args:
        errors: [2 B]: the instance pictures, then as many pictures of their classes (arXiv 2208.12242, equation 2).

    Returns:
        the loss, and its two terms before weighting.

    >>> prior_preserving_loss(torch.tensor([1.0, 3.0, 4.0, 6.0]), 0.5)
    (tensor(4.5000), tensor(2.), tensor(5.))
    """
    instance, prior = (half.mean() for half in errors.chunk(2))
    return instance + weight * prior, instance, prior
