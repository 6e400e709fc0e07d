"""The noise schedule against the released one, and that what a network predicts can be turned into each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.golden
from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule
from tests.golden import load
from tests.golden.fill import array

SCHEDULE = NoiseSchedule()


def given(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(array(name, shape))


def test_golden_schedule():
    golden = load("difffoley/schedule_samplers.npz")
    np.testing.assert_allclose(SCHEDULE.betas, golden["betas_f64"], rtol=1e-14)
    np.testing.assert_allclose(SCHEDULE.alphas_cumprod, golden["alphas_cumprod_f64"], rtol=1e-12)
    np.testing.assert_array_equal(SCHEDULE.released_buffers()["alphas_cumprod"], golden["alphas_cumprod_f32"])


def test_golden_noising():
    x0, noise = given("q_x0", 2, 4, 4, 8), given("q_noise", 2, 4, 4, 8)
    noisy = SCHEDULE.noised(x0, noise, torch.tensor([0, 500]), "eps")
    np.testing.assert_allclose(noisy, load("difffoley/schedule_samplers.npz")["q_sample"], atol=1e-6)


def test_released_buffers_are_those_of_the_checkpoint():
    path = Path(tests.golden.__file__).parent / "difffoley/manifest_ldm.json"
    entries = {name: entry for name, entry in json.loads(path.read_text()).items() if "." not in name}
    buffers = SCHEDULE.released_buffers()
    assert {name: (list(v.shape), str(v.dtype)) for name, v in buffers.items()} == {
        name: (entry["shape"], "torch." + entry["dtype"].removeprefix("torch.")) for name, entry in entries.items()
    }
    assert all(v.isfinite().all() for v in buffers.values())
    # the posterior's mean of a noise-free x_t = sqrt(a) x0 is sqrt(a_prev) x0
    mean = buffers["posterior_mean_coef1"] + buffers["posterior_mean_coef2"] * buffers["sqrt_alphas_cumprod"]
    torch.testing.assert_close(mean, buffers["alphas_cumprod_prev"].sqrt())


@pytest.mark.parametrize("t", [0.0, 1.0, 499.0, 741.5, 999.0])
def test_predictions_convert_into_each_other(t: float):
    x0, noise = given("a", 2, 3).double(), given("b", 2, 3).double()
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x, v = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    torch.testing.assert_close(SCHEDULE.eps_from(v, x, t, "v"), noise)
    torch.testing.assert_close(SCHEDULE.x0_from_eps(noise, x, t), x0)
    torch.testing.assert_close(SCHEDULE.v_from_eps(noise, x, t), v)
    assert SCHEDULE.time_of_alpha(alpha) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
def test_target_with_input_gives_noise_and_data(objective: str):
    x0, noise = given("a", 4, 2, 3), given("b", 4, 2, 3)
    t = SCHEDULE.draw_times(4, objective, generator=torch.Generator().manual_seed(0))
    x = SCHEDULE.noised(x0, noise, t, objective)
    target = SCHEDULE.training_target(x0, noise, t, objective)
    eps = [SCHEDULE.eps_from(target[i], x[i], t[i].item(), objective) for i in range(4)]
    torch.testing.assert_close(torch.stack(eps), noise, atol=1e-5, rtol=1e-5)


def test_drawn_times():
    generator = torch.Generator().manual_seed(0)
    steps = SCHEDULE.draw_times(20000, "v", generator=generator)
    assert steps.dtype == torch.int64 and steps.min() == 0 and steps.max() == 999
    assert steps.double().mean().item() == pytest.approx(499.5, abs=8)
    flow = SCHEDULE.draw_times(20000, "flow", generator=generator)
    assert flow.min() > 0 and flow.max() < 1
    assert torch.logit(flow).std().item() == pytest.approx(1, abs=0.03)
    # large network times mean noise, for flow as for the others
    assert SCHEDULE.network_time(0.0, "flow") == 1000 and SCHEDULE.network_time(1.0, "flow") == 0
    assert SCHEDULE.network_time(741.5, "eps") == 741.5


def test_beyond_the_schedule_is_its_end():
    assert SCHEDULE.time_of_alpha(0.0) == 999 and SCHEDULE.time_of_alpha(1.0) == 0
    with pytest.raises(UserError, match="objective: 'x0', must be one of eps, v, flow"):
        SCHEDULE.training_target(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long), "x0")


def test_tables_made_in_inference_mode_serve_training():
    schedule = NoiseSchedule(train_steps=7)
    x0, t = torch.ones(1, 2), torch.tensor([3])
    with torch.inference_mode():
        schedule.noised(x0, x0, t, "eps")
    x0.requires_grad_()
    schedule.noised(x0, torch.zeros(1, 2), t, "eps").sum().backward()
    assert x0.grad.unique().item() == pytest.approx(schedule.alpha(3))
