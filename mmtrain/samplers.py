"""Samplers of diffusion models as pure functions: from noise to a clean sample.

A denoiser is called as denoise(x [B, ...], t), with t the network's time as a Python float (0 clean, 999 noise), and
gives the noise in x. `progress(done, steps)` is called after each step. Scalars are computed on the host in float64.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule

Denoise = Callable[[Tensor, float], Tensor]
Progress = Callable[[int, int], None]


def ddim_timesteps(steps: int, schedule: NoiseSchedule) -> list[int]:
    """1, 1 + c, 1 + 2c, ... with c = train_steps // steps, ascending, as the released samplers space them.

    >>> ddim_timesteps(5, NoiseSchedule())
    [1, 201, 401, 601, 801]

    Raises:
        UserError: fewer than one step, or more than half of the schedule's: those would leave out its noisy end.
    """
    _check_steps(steps, schedule.train_steps // 2)
    stride = schedule.train_steps // steps
    return [1 + stride * i for i in range(steps)]


def ddim_sigma(t: float, previous: float, eta: float, schedule: NoiseSchedule) -> float:
    """Standard deviation of the noise that DDIM adds going from t to `previous` (arXiv 2010.02502, equation 16)."""
    ratio = schedule.sigma(previous) / schedule.sigma(t)
    return eta * ratio * math.sqrt(1.0 - (schedule.alpha(t) / schedule.alpha(previous)) ** 2)


def ddim_step(eps: Tensor, x: Tensor, t: float, previous: float, schedule: NoiseSchedule, sigma: float = 0.0) -> Tensor:
    """One step of DDIM without its noise: sqrt(a_prev) x0 + sqrt(1 - a_prev - sigma^2) eps.

    Args:
        eps: predicted noise in x [B, ...].
        t, previous: times before and after the step.
        sigma: of the noise that the caller adds.
    """
    scale = schedule.alpha(previous) / schedule.alpha(t)
    direction = math.sqrt(max(schedule.sigma(previous) ** 2 - sigma**2, 0.0))
    return scale * x + (direction - scale * schedule.sigma(t)) * eps


@torch.no_grad()
def ddim(
    denoise: Denoise,
    x: Tensor,
    steps: int,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM. The last step ends at time 0, whose alpha is that of the first training step and not 1 (as released).

    Args:
        x: noise [B, ...].
        eta: 0 deterministic, 1 as noisy as ancestral sampling.
        generator: of the added noise; on the host, so that a seed means the same on every device.

    Raises:
        UserError: see `ddim_timesteps`.
    """
    times = ddim_timesteps(steps, schedule)
    for i in reversed(range(steps)):
        t, previous = times[i], times[i - 1] if i else 0
        sigma = ddim_sigma(t, previous, eta, schedule)
        x = ddim_step(denoise(x, float(t)), x, t, previous, schedule, sigma)
        if sigma > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator).to(x)
        _tell(progress, steps - i, steps)
    return x


def dpm_solver_times(steps: int, schedule: NoiseSchedule) -> list[float]:
    """steps + 1 times, evenly from the noisiest to 0; the network is evaluated at all but the last."""
    _check_steps(steps, schedule.train_steps)
    last = schedule.train_steps - 1
    return [last * (1.0 - i / steps) for i in range(steps + 1)]


@torch.no_grad()
def dpm_solver_pp(
    denoise: Denoise, x: Tensor, steps: int, schedule: NoiseSchedule, progress: Progress | None = None
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): multistep, order 2, data prediction, evenly spaced in time.

    The first step is of order 1, and the last as well if there are fewer than 15, as in the released code.

    Args:
        x: noise [B, ...].

    Raises:
        UserError: fewer than one step or more than the schedule has.
    """
    times = dpm_solver_times(steps, schedule)
    older: Tensor | None = None  # data prediction of the step before
    older_h = 0.0
    for i, (s, t) in enumerate(pairwise(times)):
        h = schedule.half_log_snr(t) - schedule.half_log_snr(s)
        x0 = schedule.x0_from_eps(denoise(x, s), x, s)
        direction = x0
        if older is not None and not (steps < 15 and i == steps - 1):
            direction = x0 + (0.5 * h / older_h) * (x0 - older)
        x = (schedule.sigma(t) / schedule.sigma(s)) * x - (schedule.alpha(t) * math.expm1(-h)) * direction
        older, older_h = x0, h
        _tell(progress, i + 1, steps)
    return x


@torch.no_grad()
def plms(denoise: Denoise, x: Tensor, steps: int, schedule: NoiseSchedule, progress: Progress | None = None) -> Tensor:
    """Pseudo linear multistep (arXiv 2202.09778): DDIM's times and steps, noise of up to four evaluations combined.

    The first step evaluates the network twice (pseudo improved Euler), so there are steps + 1 evaluations.

    Args:
        x: noise [B, ...].

    Raises:
        UserError: see `ddim_timesteps`.
    """
    times = ddim_timesteps(steps, schedule)
    old: list[Tensor] = []  # newest last
    for i in reversed(range(steps)):
        t, previous = times[i], times[i - 1] if i else 0
        eps = denoise(x, float(t))
        if not old:
            following = times[max(i - 1, 0)]
            combined = (eps + denoise(ddim_step(eps, x, t, previous, schedule), float(following))) / 2
        elif len(old) == 1:
            combined = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            combined = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            combined = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = ddim_step(combined, x, t, previous, schedule)
        old = [*old, eps][-3:]
        _tell(progress, steps - i, steps)
    return x


@torch.no_grad()
def euler(
    velocity: Denoise,
    x: Tensor,
    steps: int,
    times: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Euler steps along the velocity of a rectified flow, from noise at time 0 to data at time 1.

    Args:
        velocity: (x [B, ...], flow time in [0, 1]) -> data - noise.
        x: noise [B, ...].
        times: steps + 1 ascending times from 0 to 1; None spaces them evenly.

    Raises:
        UserError: no step, or times that are not steps + 1 ascending ones from 0 to 1.
    """
    _check_steps(steps, None)
    if times is None:
        times = [i / steps for i in range(steps + 1)]
    ascending = all(a < b for a, b in pairwise(times))
    if len(times) != steps + 1 or times[0] != 0 or times[-1] != 1 or not ascending:
        raise UserError(f"times: {list(times)}, must be steps + 1 = {steps + 1} ascending ones from 0 to 1")
    for i, (t, following) in enumerate(pairwise(times)):
        x = x + (following - t) * velocity(x, t)
        _tell(progress, i + 1, steps)
    return x


def _check_steps(steps: int, most: int | None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise UserError(f"sampler.steps: {steps}, must be 1 {f'to {most}' if most else 'or more'}")


def _tell(progress: Progress | None, done: int, steps: int) -> None:
    if progress is not None:
        progress(done, steps)
