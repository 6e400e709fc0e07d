"""Noise schedule, adding noise, and deterministic sampling, over the schedulers of diffusers. B batch.

Functions that take a `scheduler` use the one of `ddim_scheduler()` if none is given.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mmtrain.config_errors import UserError


def ddim_scheduler(train_steps: int = 100) -> DDIMScheduler:
    """The schedule of Diffusion Policy and RDP: squared cosine, noise prediction, samples clipped to [-1, 1]."""
    return DDIMScheduler(
        num_train_timesteps=train_steps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="epsilon",
    )


@lru_cache(maxsize=32)
def _shared(device: torch.device, steps: int | None) -> DDIMScheduler:
    """A scheduler for one device and number of steps: diffusers keeps both as state, so threads must not share one."""
    scheduler = ddim_scheduler()
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def noised(x: Tensor, noise: Tensor, timestep: Tensor, scheduler: DDIMScheduler | None = None) -> Tensor:
    """sqrt(a_t) x + sqrt(1 - a_t) noise.

    Args:
        x, noise: [B, ...].
        timestep: diffusion step of each, integers [B].
    """
    return (scheduler or _shared(x.device, None)).add_noise(x, noise, timestep)


def timesteps(steps: int, scheduler: DDIMScheduler | None = None) -> list[int]:
    """The diffusion steps that sampling in `steps` steps visits, from noise to clean.

    >>> timesteps(8)
    [84, 72, 60, 48, 36, 24, 12, 0]

    Raises:
        UserError: fewer than one step, or more than the schedule has.
    """
    return _set_to(steps, torch.device("cpu"), scheduler).timesteps.tolist()


def _set_to(steps: int, device: torch.device, scheduler: DDIMScheduler | None) -> DDIMScheduler:
    most = (scheduler or _shared(device, None)).config.num_train_timesteps
    if not 1 <= steps <= most:
        raise UserError(f"denoising steps: {steps}, expected 1 to {most}, the number of steps of training")
    if scheduler is None:
        return _shared(device, steps)
    if scheduler.num_inference_steps != steps:
        scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(
    denoise: Callable[[Tensor, int], Tensor], x: Tensor, steps: int, scheduler: DDIMScheduler | None = None
) -> Tensor:
    """Deterministic DDIM (eta 0), from noise to a clean sample.

    Args:
        denoise: (noisy sample [B, ...], diffusion step) -> noise in it. The step is a plain int, so that nothing waits
            for a GPU. A network may prepare what depends on the steps alone, which `timesteps` names.
        x: noise [B, ...].
        steps: how many of the schedule's steps are visited.

    Returns:
        [B, ...].

    Raises:
        UserError: see `timesteps`.
    """
    scheduler = _set_to(steps, x.device, scheduler)
    for step in scheduler.timesteps.tolist():
        x = scheduler.step(denoise(x, step), step, x, eta=0.0, return_dict=False)[0]
    return x
