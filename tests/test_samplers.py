"""The samplers against trajectories of the released ones, and against distributions whose solution is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.samplers import ddim, ddim_sigma, ddim_timesteps, dpm_solver_pp, euler, plms
from tests.golden import load
from tests.golden.fill import array

SCHEDULE = NoiseSchedule()
GOLDEN = "difffoley/schedule_samplers.npz"
TOLERANCE = 1e-4


class Tenth:
    """eps(x, t) = 0.1 x, which remembers what it was given."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.states.append(x)
        self.times.append(t)
        return 0.1 * x


def start() -> Tensor:
    return torch.from_numpy(array("sampler_xT", (1, 4, 16, 64)))


def crop(x: Tensor) -> np.ndarray:
    return x[:, :, ::4, ::8].numpy()


@pytest.mark.parametrize("steps", [10, 25])
def test_ddim_golden(steps: int):
    golden, denoise, told = load(GOLDEN), Tenth(), []
    final = ddim(denoise, start(), steps, SCHEDULE, progress=lambda *done: told.append(done))
    states = np.stack([crop(x) for x in [*denoise.states[1:], final]])
    np.testing.assert_allclose(states, golden[f"ddim_S{steps}_x_seq"], atol=TOLERANCE)
    clean = [crop(SCHEDULE.x0_from_eps(0.1 * x, x, t)) for x, t in zip(denoise.states, denoise.times, strict=True)]
    np.testing.assert_allclose(np.stack(clean), golden[f"ddim_S{steps}_predx0_seq"], atol=TOLERANCE)
    assert told == [(i + 1, steps) for i in range(steps)]


@pytest.mark.parametrize("steps", [5, 10, 25, 50, 250])
def test_ddim_timesteps_golden(steps: int):
    np.testing.assert_array_equal(ddim_timesteps(steps, SCHEDULE), load(GOLDEN)[f"ddim_timesteps_S{steps}"])


def test_ddim_eta_golden():
    golden, times = load(GOLDEN), ddim_timesteps(10, SCHEDULE)
    sigmas = [ddim_sigma(t, previous, 1.0, SCHEDULE) for t, previous in zip(times, [0, *times], strict=False)]
    np.testing.assert_allclose(sigmas, golden["ddim_S10_eta1_sigmas"], rtol=1e-5)
    np.testing.assert_allclose(
        [SCHEDULE.alpha(t) ** 2 for t in [0, *times[:-1]]], golden["ddim_S10_alphas_prev"], rtol=1e-5
    )


@pytest.mark.parametrize("steps", [10, 25])
def test_dpm_solver_golden(steps: int):
    golden, denoise = load(GOLDEN), Tenth()
    final = dpm_solver_pp(denoise, start(), steps, SCHEDULE)
    np.testing.assert_allclose(crop(final), golden[f"dpmpp2m_S{steps}_final"], atol=TOLERANCE)
    np.testing.assert_allclose(denoise.times, golden[f"dpmpp2m_S{steps}_model_times"], atol=TOLERANCE)


def test_plms_golden():
    golden, denoise = load(GOLDEN), Tenth()
    np.testing.assert_allclose(crop(plms(denoise, start(), 10, SCHEDULE)), golden["plms_S10_final"], atol=TOLERANCE)
    assert denoise.times == golden["plms_S10_model_times"].tolist()


def gaussian(deviation: float):
    """The best denoiser of data that are normal with a given standard deviation."""

    def denoise(x: Tensor, t: float) -> Tensor:
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        return sigma * x / (alpha**2 * deviation**2 + sigma**2)

    return denoise


def spread(t: float, deviation: float) -> float:
    return math.hypot(SCHEDULE.alpha(t) * deviation, SCHEDULE.sigma(t))


def test_dpm_solver_is_of_second_order():
    """On normal data the deterministic solution is x scaled by the ratio of the spreads at end and start."""
    x, deviation = torch.ones(1, dtype=torch.float64), 0.5
    exact = spread(0, deviation) / spread(999, deviation)
    errors = [abs(dpm_solver_pp(gaussian(deviation), x, n, SCHEDULE).item() - exact) for n in (200, 400, 800)]
    assert errors[2] < 3e-4 and errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3
    first = [abs(ddim(gaussian(deviation), x, n, SCHEDULE).item() - exact) for n in (125, 250, 500)]
    assert first[0] / first[1] < 2.2 and first[1] / first[2] < 2.2


def test_ancestral_sampling_gives_the_data_distribution():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    clean = ddim(gaussian(0.5), x, 100, SCHEDULE, eta=1.0, generator=draw)
    assert clean.std().item() == pytest.approx(0.5, abs=0.03)
    again = ddim(gaussian(0.5), x, 100, SCHEDULE, eta=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(clean, again)


def test_euler_follows_a_straight_flow_exactly():
    noise, data = start(), start().flip(-1)
    seen = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        torch.testing.assert_close(x, (1 - t) * noise + t * data)
        return data - noise

    torch.testing.assert_close(euler(velocity, noise, 4), data)
    torch.testing.assert_close(euler(velocity, noise, 2, times=(0.0, 0.3, 1.0)), data)
    assert seen == [0.0, 0.25, 0.5, 0.75, 0.0, 0.3]


def test_wrong_steps_are_refused():
    x = torch.zeros(1)
    for sampler, steps in ((ddim, 0), (ddim, 501), (plms, 501), (dpm_solver_pp, 1001)):
        with pytest.raises(UserError, match=f"sampler.steps: {steps}, must be 1 to"):
            sampler(Tenth(), x, steps, SCHEDULE)
    for times in ((0.0, 1.0), (0.0, 0.6, 0.9), (0.0, 1.0, 1.0)):
        with pytest.raises(UserError, match=r"times: .* must be steps \+ 1 = 3 ascending"):
            euler(Tenth(), x, 2, times)
