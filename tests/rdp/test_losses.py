"""The objectives of both stages against PyTorch's distributions, and their gradients."""

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_of

from mmtrain.rdp.losses import denoising_loss, kl_divergence, tokenizer_loss


def test_kl_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, logvar = torch.randn(5, 6, 8), torch.randn(5, 6, 8)
    expected = kl_of(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)) == 0


def test_tokenizer_loss_and_its_gradient() -> None:
    torch.manual_seed(0)
    double = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    prediction, target, mean, logvar = double(2, 8, 3), double(2, 8, 3).detach(), double(2, 4, 2), double(2, 4, 2)
    loss, parts = tokenizer_loss(prediction, target, mean, logvar, kl_weight=0.1)
    torch.testing.assert_close(loss.detach(), parts["l1"] + 0.1 * parts["kl"])
    torch.testing.assert_close(parts["mse"], (prediction.detach() - target).square().mean())
    assert not any(part.requires_grad for part in parts.values())
    assert torch.autograd.gradcheck(lambda *x: tokenizer_loss(x[0], target, *x[1:], 0.1)[0], (prediction, mean, logvar))


def test_denoising_loss_weighs_every_number_alike() -> None:
    noise = torch.zeros(2, 3, 4)
    predicted = noise.clone()
    predicted[0, 0, 0] = 2.0
    assert denoising_loss(predicted, noise).item() == pytest.approx(4 / 24)
