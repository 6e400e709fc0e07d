"""The losses of fine-tuning against float64 by hand."""

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.storyweaver.losses import denoising_errors, prior_preserving_loss, snr_weights, with_offset


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_weighted_errors_are_those_of_float64_by_hand(objective) -> None:
    """Written from the betas on, so that no function of ours is in it."""
    generator = torch.Generator().manual_seed(0)
    latent, noise, predicted = torch.randn(3, 4, 4, 2, 3, generator=generator).unbind(0)
    t, schedule, gamma = torch.tensor([0, 120, 500, 999]), NoiseSchedule(), 5.0
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)[t.numpy()]
    alpha, sigma = (np.sqrt(x)[:, None, None, None] for x in (alphas, 1 - alphas))
    target = noise.double().numpy()
    if objective == "v":
        target = alpha * target - sigma * latent.double().numpy()
    expected = ((predicted.double().numpy() - target) ** 2).mean((1, 2, 3))
    snr = alphas / (1 - alphas)
    weights = np.minimum(snr, gamma) / (snr if objective == "eps" else snr + 1)

    errors = denoising_errors(predicted, schedule.training_target(latent, noise, t, objective))
    np.testing.assert_allclose(errors.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(snr_weights(schedule, t, objective, gamma).numpy(), weights, rtol=1e-6)
    assert weights[0] < 0.01 or objective == "v"
    # both weigh the error of the clean picture by min(SNR, gamma): eps errors are SNR x those, v errors (SNR + 1) x
    clean = weights * (snr if objective == "eps" else snr + 1)
    np.testing.assert_allclose(clean, np.minimum(snr, gamma))


def test_errors_are_computed_in_float32_from_half_precision() -> None:
    predicted = torch.full((1, 1, 1, 2), 300.0, dtype=torch.float16)
    assert denoising_errors(predicted, torch.zeros(1, 1, 1, 2)) == 90_000  # beyond float16


def test_offset_noise_shifts_whole_channels_and_costs_nothing_when_off() -> None:
    noise = torch.zeros(2, 4, 3, 3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert with_offset(noise, 0.0) is noise and torch.equal(state, torch.get_rng_state())
    shifted = with_offset(noise, 0.1)
    assert torch.equal(shifted, shifted[..., :1, :1].expand_as(shifted)) and len(shifted.unique()) == 8


def test_prior_preservation_weighs_the_second_half() -> None:
    errors = torch.tensor([1.0, 2.0, 10.0, 20.0], requires_grad=True)
    loss, instance, prior = prior_preserving_loss(errors, 0.5)
    assert [value.item() for value in (loss, instance, prior)] == [9.0, 1.5, 15.0]
    loss.backward()
    assert errors.grad.tolist() == [0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(("objective", "gamma"), [("flow", 5.0), ("eps", 0.0)])
def test_weights_that_are_not_defined_are_refused(objective, gamma) -> None:
    with pytest.raises(UserError, match=rf"snr_gamma: {gamma} for objective {objective}"):
        snr_weights(NoiseSchedule(), torch.tensor([0]), objective, gamma)
