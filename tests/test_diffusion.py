"""Sampling and noising against a plain diffusers loop and against their equations."""

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.diffusion import ddim_scheduler, noised, sample, timesteps


@pytest.mark.parametrize("steps", [1, 8, 100])
def test_equals_the_plain_loop(steps: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(6, 6) / 3, torch.randn(4, 8, 6)
    denoise = lambda y, t: (y @ weight).tanh() + float(t) / 100  # noqa: E731
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(steps)
    expected = x
    for step in scheduler.timesteps:
        expected = scheduler.step(denoise(expected, step), step, expected).prev_sample
    for _ in range(2):  # the second run must not see what the first left behind
        assert torch.equal(sample(denoise, x, steps), expected)
    assert torch.equal(sample(denoise, x, steps, ddim_scheduler()), expected)
    assert timesteps(steps) == scheduler.timesteps.tolist()


def test_a_perfect_denoiser_finds_the_clean_sample() -> None:
    torch.manual_seed(0)
    clean = torch.rand(3, 8, 2) * 2 - 1
    alphas = ddim_scheduler().alphas_cumprod
    denoise = lambda y, t: (y - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt()  # noqa: E731
    torch.testing.assert_close(sample(denoise, torch.randn(3, 8, 2), 8), clean, atol=1e-4, rtol=0)


def test_noised_mixes_each_sample_by_its_own_step() -> None:
    torch.manual_seed(0)
    x, noise, step = torch.randn(3, 5, 2), torch.randn(3, 5, 2), torch.tensor([0, 40, 99])
    a = ddim_scheduler().alphas_cumprod[step].view(3, 1, 1)
    torch.testing.assert_close(noised(x, noise, step), a.sqrt() * x + (1 - a).sqrt() * noise)
    assert a[0].item() > 0.999 and a[2].item() < 0.01


@pytest.mark.parametrize("steps", [0, 101])
def test_impossible_number_of_steps(steps: int) -> None:
    with pytest.raises(UserError, match=f"denoising steps: {steps}, expected 1 to 100"):
        sample(lambda y, t: y, torch.zeros(1, 2, 2), steps)
