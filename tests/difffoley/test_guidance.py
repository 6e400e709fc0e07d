"""Double guidance against the released steps, and its behaviour where nothing was released."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.difffoley.guidance import GuidanceSettings, GuidedDenoiser, guided_noise, log_probability_gradient
from mmtrain.difffoley.layouts import unet_names
from mmtrain.difffoley.networks import AlignmentNetwork, FoleyUNet
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.samplers import ddim_step, ddim_timesteps, dpm_solver_pp
from tests.difffoley import filling
from tests.golden import load
from tests.golden.fill import array, fill

SCHEDULE = NoiseSchedule()
GOLDEN = "difffoley/schedule_samplers.npz"
# Values reach 66: there, the reference's own float32 rounding is 1.2e-4, which is how far a float64 run of ours is off.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}
SMALL = filling.SMALL | {"feature_dim": 24}


def given(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(array(name, shape))


def fill_as_released(module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
    state = {k: v for k, v in module.state_dict().items() if not k.startswith(skip)}
    names = unet_names(state)
    filled = {k: torch.from_numpy(fill(prefix + names[k], tuple(v.shape))) for k, v in state.items()}
    missing, unexpected = module.load_state_dict(filled, strict=False)
    assert not unexpected and all(name.startswith(skip) for name in missing)


@pytest.fixture(scope="module")
def networks() -> tuple[FoleyUNet, AlignmentNetwork]:
    unet, classifier = FoleyUNet(**SMALL).eval(), AlignmentNetwork(**SMALL).eval()
    fill_as_released(unet.unet, "model.diffusion_model.")
    fill_as_released(classifier, "model.", skip=("embedder.",))
    unet.context = lambda features: features  # the golden condition is made of tokens
    return unet, classifier


def released(classifier_scale: float) -> GuidanceSettings:
    return GuidanceSettings(4.5, classifier_scale, "embedded_zeros", "raw_full")


def denoiser(networks, classifier_scale: float) -> GuidedDenoiser:
    unet, classifier = networks
    condition, raw = given("guide_cond", 2, 10, 24), given("guide_raw_feat", 2, 10, 24)
    return GuidedDenoiser(unet, condition, SCHEDULE, "eps", released(classifier_scale), classifier, raw)


@pytest.mark.parametrize("index", [24, 12, 0])
@pytest.mark.parametrize(("name", "gamma"), [("double_guidance", 50.0), ("cfg", 0.0)])
def test_guided_ddim_step_golden(networks, index: int, name: str, gamma: float):
    golden, times = load(GOLDEN), ddim_timesteps(25, SCHEDULE)
    x, t, previous = given("guide_x", 2, 4, 8, 16), times[index], times[index - 1] if index else 0
    eps = denoiser(networks, gamma)(x, float(t))
    stepped = ddim_step(eps, x, t, previous, SCHEDULE)
    np.testing.assert_allclose(stepped, golden[f"{name}_ddim_idx{index}_xprev"], **TOLERANCE)
    if gamma:
        # the clean sample magnifies the rounding of the noise by sigma / alpha, up to 13 at the noisiest step
        magnified = TOLERANCE | {"atol": 2e-5 * max(5.0, SCHEDULE.sigma(t) / SCHEDULE.alpha(t))}
        clean = SCHEDULE.x0_from_eps(eps, x, t)
        np.testing.assert_allclose(clean, golden[f"{name}_ddim_idx{index}_predx0"], **magnified)


@pytest.mark.parametrize(("name", "gamma"), [("double_guidance", 50.0), ("cfg", 0.0)])
def test_guided_dpm_solver_golden(networks, name: str, gamma: float):
    final = dpm_solver_pp(denoiser(networks, gamma), given("guide_x", 2, 4, 8, 16), 5, SCHEDULE)
    # the first of five steps starts where rounding is magnified most
    np.testing.assert_allclose(final, load(GOLDEN)[f"{name}_dpmpp2m_S5_final"], **TOLERANCE | {"atol": 2e-4})


def test_gradient_golden(networks):
    golden = load("difffoley/alignment_classifier_small.npz")
    x, context = given("classifier_x", 3, 4, 8, 16), given("classifier_context", 3, 10, 24)
    times = torch.tensor([0, 250, 999])
    gradients = [
        log_probability_gradient(networks[1], x[i : i + 1], times[i].item(), context[i : i + 1]) for i in range(3)
    ]
    np.testing.assert_allclose(torch.cat(gradients), golden["grad_logprob_x"], atol=2e-5)


class FakeNetwork(nn.Module):
    """Predicts x times the mean of the tokens; the null condition has a mean of 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.times: list[float] = []

    def context(self, features: Tensor) -> Tensor:
        return 2 * features

    def null_context(self, kind: str, batch: int, frames: int) -> Tensor:
        assert kind == "learned"
        return torch.full((batch, frames, 1), 0.5)

    def forward(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        self.batches.append(len(x))
        self.times.append(t)
        return x * context.mean((1, 2)).view(-1, 1, 1, 1)


class FakeClassifier(FakeNetwork):
    def forward(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        super().forward(x, t, context)
        return self.slope * x.sum((1, 2, 3)) + self.offset

    slope, offset = 0.01, 0.0


FEATURES = torch.tensor([1.0, 3.0]).view(2, 1, 1).expand(2, 5, 1)


def test_one_call_for_both_conditions_and_one_half_without_guidance():
    unet, x = FakeNetwork(), given("x", 2, 4, 2, 3)
    both = GuidedDenoiser(unet, FEATURES, SCHEDULE, "eps", GuidanceSettings(4.5))(x, 7.0)
    torch.testing.assert_close(both, x * (0.5 + 4.5 * (torch.tensor([2.0, 6.0]) - 0.5)).view(2, 1, 1, 1))
    plain = GuidedDenoiser(unet, FEATURES, SCHEDULE, "eps", GuidanceSettings(1.0))
    torch.testing.assert_close(plain(x[1:], 7.0, slice(1, 2)), 6 * x[1:])
    assert unet.batches == [4, 1]


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_classifier_push_is_scaled_by_sigma(objective: str):
    unet, classifier, x = FakeNetwork(), FakeClassifier(), given("x", 2, 4, 2, 3)
    settings = {"scale": 4.5}
    without = GuidedDenoiser(unet, FEATURES, SCHEDULE, objective, GuidanceSettings(**settings))(x, 600.5)
    guidance = GuidanceSettings(classifier_scale=50.0, **settings)
    with torch.inference_mode():  # as Lightning tests and predicts
        pushed = GuidedDenoiser(unet, FEATURES.clone(), SCHEDULE, objective, guidance, classifier)(x.clone(), 600.5)
    slope = 0.01 * torch.sigmoid(-0.01 * x.sum((1, 2, 3))).view(2, 1, 1, 1)
    torch.testing.assert_close(pushed, without - 50 * SCHEDULE.sigma(600.5) * slope.expand_as(x))
    assert classifier.times == [600.5]


@pytest.mark.parametrize("t", [0.3, 0.9])
def test_flow_is_guided_like_the_schedule_at_the_same_noise(t: float):
    """A velocity says the same as noise: what the push changes in that noise is gamma sigma gradient, as for "eps"."""
    unet, classifier, x = FakeNetwork(), FakeClassifier(), given("x", 2, 4, 2, 3)
    without = GuidedDenoiser(unet, FEATURES, SCHEDULE, "flow", GuidanceSettings(4.5))(x, t)
    pushed = GuidedDenoiser(unet, FEATURES, SCHEDULE, "flow", GuidanceSettings(4.5, 50.0), classifier)(x, t)
    change = SCHEDULE.eps_from(pushed, x, t, "flow") - SCHEDULE.eps_from(without, x, t, "flow")
    length = math.hypot(t, 1 - t)
    time = SCHEDULE.time_of_alpha(t / length)
    gradient = log_probability_gradient(classifier, x / length, time, FEATURES)
    torch.testing.assert_close(change, -50 * (1 - t) / length * gradient, atol=1e-5, rtol=1e-4)
    assert SCHEDULE.sigma(classifier.times[0]) == pytest.approx((1 - t) / length)
    assert unet.times == [1000 * (1 - t)] * 2


def test_flow_push_stays_finite_at_pure_noise():
    unet, classifier, x = FakeNetwork(), FakeClassifier(), given("x", 2, 4, 2, 3)
    without = GuidedDenoiser(unet, FEATURES, SCHEDULE, "flow", GuidanceSettings(1.0))(x, 0.0)
    pushed = GuidedDenoiser(unet, FEATURES, SCHEDULE, "flow", GuidanceSettings(1.0, 50.0), classifier)(x, 0.0)
    assert 0 < (pushed - without).abs().max() < 50 / 0.05 * 0.01
    assert classifier.times == [999.0]


def test_gradient_is_finite_where_the_probability_is_zero():
    classifier = FakeClassifier()
    classifier.offset = -500.0
    gradient = log_probability_gradient(classifier, torch.zeros(1, 4, 2, 3), 5.0, FEATURES[:1])
    torch.testing.assert_close(gradient, torch.full((1, 4, 2, 3), 0.01))


def test_classifier_context_is_the_window_embedded_or_the_whole_clip_raw():
    whole = given("whole", 1, 40, 1)
    for kind, expected in (("embedded_window", 2 * FEATURES), ("raw_full", whole.expand(2, -1, -1))):
        guidance = GuidanceSettings(4.5, 50.0, classifier_context=kind)
        denoise = GuidedDenoiser(FakeNetwork(), FEATURES, SCHEDULE, "eps", guidance, FakeClassifier(), whole)
        torch.testing.assert_close(denoise.classifier_context, expected)


def test_wrong_settings_are_refused():
    for given_value, message in (
        ({"scale": -1.0}, "guidance.scale: -1.0, must be 0 or more"),
        ({"scale": float("nan")}, "guidance.scale: nan"),
        ({"null_condition": "zeros"}, "guidance.null_condition: 'zeros', must be one of embedded_zeros"),
        ({"classifier_context": "raw"}, "guidance.classifier_context: 'raw', must be one of embedded_window"),
    ):
        with pytest.raises(UserError, match=message):
            GuidanceSettings(**given_value)
    with pytest.raises(UserError, match=r"guidance\.classifier_scale: 50, needs an alignment classifier"):
        GuidedDenoiser(FakeNetwork(), FEATURES, SCHEDULE, "eps", GuidanceSettings(4.5, 50.0))


def test_guided_noise_without_anything_is_the_prediction():
    eps = given("eps", 2, 3)
    assert guided_noise(eps, None, 1.0) is eps
