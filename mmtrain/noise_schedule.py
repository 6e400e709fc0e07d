"""The noise schedule of latent diffusion, adding noise, and the three things a network can be asked to predict.

B batch. Time is the network's: 0 clean to 999 pure noise, also between the steps. Rectified flow has its own time, 0
pure noise to 1 data. Scalars are Python floats computed in float64, so that no step of a sampler waits for a GPU.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.distributed import rows_of_all

Objective = Literal["eps", "v", "flow"]
OBJECTIVES = ("eps", "v", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """Variance preserving, betas "scaled linear": linspace(sqrt(beta_start), sqrt(beta_end), train_steps)^2.

    The defaults are those of Stable Diffusion v1 and of the released Diff-Foley.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @cached_property
    def betas(self) -> np.ndarray:
        """float64 [train_steps]."""
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=np.float64) ** 2

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Product of 1 - beta up to each step, float64 [train_steps]."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def log_alphas(self) -> np.ndarray:
        """log sqrt(alphas_cumprod), float64 [train_steps]."""
        return 0.5 * np.log(self.alphas_cumprod)

    def alpha(self, t: float) -> float:
        """Factor of the clean sample at a time in [0, train_steps - 1]; log alpha is linear between steps."""
        return math.exp(self.log_alpha(t))

    def sigma(self, t: float) -> float:
        """Factor of the noise at a time: sqrt(1 - alpha^2)."""
        return math.sqrt(-math.expm1(2.0 * self.log_alpha(t)))

    def log_alpha(self, t: float) -> float:
        """log alpha at a time in [0, train_steps - 1]; outside, the value at the nearer end."""
        return float(np.interp(t, np.arange(self.train_steps), self.log_alphas))

    def half_log_snr(self, t: float) -> float:
        """lambda = log(alpha / sigma), in which the steps of DPM-Solver are measured."""
        return self.log_alpha(t) - math.log(self.sigma(t))

    def time_of_alpha(self, alpha: float) -> float:
        """The time whose `alpha` is the given one; beyond the schedule, its nearer end."""
        if alpha <= 0.0:
            return float(self.train_steps - 1)
        return float(np.interp(-math.log(alpha), -self.log_alphas, np.arange(self.train_steps)))

    def released_buffers(self) -> dict[str, Tensor]:
        """The 12 float32 vectors [train_steps] that released latent-diffusion checkpoints hold, by their names."""
        betas, a = self.betas, self.alphas_cumprod
        previous = np.append(1.0, a[:-1])
        variance = betas * (1.0 - previous) / (1.0 - a)
        buffers = {
            "betas": betas,
            "alphas_cumprod": a,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": np.sqrt(a),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - a),
            "log_one_minus_alphas_cumprod": np.log(1.0 - a),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / a),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / a - 1.0),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1.0 - a),
            "posterior_mean_coef2": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - a),
        }
        return {name: torch.from_numpy(value.astype(np.float32)) for name, value in buffers.items()}

    def q_sample(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha_t x0 + sigma_t noise.

        Args:
            x0, noise: [B, ...].
            t: integer steps [B].
        """
        alpha, sigma = self._factors(t, x0)
        return alpha * x0 + sigma * noise

    def draw_times(
        self,
        batch: int,
        objective: Objective,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Times to train at, [B]: uniform integer steps, or for "flow" the sigmoid of a standard normal, in (0, 1).

        Those of this process's part of the batch, see `distributed.rows_of_all`.
        """
        check_objective(objective)
        how = {"device": device, "generator": generator}
        if objective == "flow":
            return rows_of_all(lambda rows: torch.randn(rows, **how), batch).sigmoid()
        return rows_of_all(lambda rows: torch.randint(self.train_steps, (rows,), **how), batch)

    def network_time(self, t: Tensor | float, objective: Objective) -> Tensor | float:
        """What the network is told: the step itself; for "flow" 1000 (1 - t), so that large still means noisy.

        A flow network that starts from the weights of a noise predictor then finds its time embedding in order.
        """
        return self.train_steps * (1.0 - t) if objective == "flow" else t

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor, objective: Objective) -> Tensor:
        """The network's input: `q_sample`, or for "flow" (1 - t) noise + t x0 (rectified flow, arXiv 2209.03003)."""
        check_objective(objective)
        if objective == "flow":
            t = _per_sample(t, x0)
            return (1.0 - t) * noise + t * x0
        return self.q_sample(x0, noise, t)

    def training_target(self, x0: Tensor, noise: Tensor, t: Tensor, objective: Objective) -> Tensor:
        """What the network shall predict from `noised(x0, noise, t, objective)`.

        Args:
            x0, noise: [B, ...].
            t: [B], of `draw_times`.
            objective: "eps" the noise; "v" alpha noise - sigma x0 (arXiv 2202.00512); "flow" x0 - noise.

        Returns:
            [B, ...].
        """
        check_objective(objective)
        if objective == "eps":
            return noise
        if objective == "flow":
            return x0 - noise
        alpha, sigma = self._factors(t, x0)
        return alpha * noise - sigma * x0

    def eps_from(self, output: Tensor, x: Tensor, t: float, objective: Objective) -> Tensor:
        """The noise in `x` that a network's output means; for "flow", `t` and `x` are the flow's."""
        check_objective(objective)
        if objective == "eps":
            return output
        if objective == "v":
            return self.alpha(t) * output + self.sigma(t) * x
        return x - t * output

    def x0_from_eps(self, eps: Tensor, x: Tensor, t: float) -> Tensor:
        """(x - sigma eps) / alpha."""
        return (x - self.sigma(t) * eps) / self.alpha(t)

    def v_from_eps(self, eps: Tensor, x: Tensor, t: float) -> Tensor:
        """alpha eps - sigma x0."""
        return (eps - self.sigma(t) * x) / self.alpha(t)

    def _factors(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = _tables(self, like.device)
        return _per_sample(alpha[t], like), _per_sample(sigma[t], like)


def check_objective(objective: str) -> None:
    """Raises UserError: not one of the three."""
    if objective not in OBJECTIVES:
        raise UserError(f"objective: {objective!r}, must be one of {', '.join(OBJECTIVES)}")


@lru_cache(maxsize=8)
def _tables(schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    a = schedule.alphas_cumprod
    with torch.inference_mode(False):  # cached: training reads the same tensors later
        return tuple(torch.from_numpy(np.sqrt(v).astype(np.float32)).to(device) for v in (a, 1.0 - a))


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))
