"""The whole latent policy against the reference: loss, sampled actions, what the fast policy sends."""

import numpy as np
import pytest
import torch

from mmtrain.normaliser import action_limits, limits
from mmtrain.rdp.fast_step import NumpyDecoder
from mmtrain.rdp.module import LatentDiffusionPolicy
from mmtrain.rdp.tokenizer import TokenizerSettings
from tests.golden import load
from tests.golden.fill import array, fill

GOLDEN = load("rdp/ldp_lowdim.npz")
TOKENIZER = load("rdp/at_peel_force.npz")
POSE, WIDTH, WRENCH = "left_robot_tcp_pose", "left_robot_gripper_width", "left_robot_tcp_wrench"


@pytest.fixture(scope="module")
def policy() -> LatentDiffusionPolicy:
    """The reference's small policy: observations are pose, width and wrench; the posterior's mean."""
    policy = LatentDiffusionPolicy(
        "peel", "force", vision="none", preset="sim", tokenizer_settings=TokenizerSettings(latent_dim=16)
    ).eval()
    for prefix, network in (("model.", policy.model), ("", policy.tokenizer.network)):
        state = network.state_dict()
        network.load_state_dict({k: torch.from_numpy(fill(prefix + k, tuple(v.shape))) for k, v in state.items()})
    policy.normalizer.set("action", action_limits(array("ldp.fit.action", (200, 4))))
    policy.normalizer.set(POSE, action_limits(array("ldp.fit.pose", (200, 3))))
    policy.normalizer.set(WIDTH, limits(array("ldp.fit.width", (200, 1))))
    policy.normalizer.set(WRENCH, limits(array("ldp.fit.wrench", (200, 6))))
    policy.normalizer.set("latent", limits(array("ldp.fit.latent", (200, 16))))
    policy.tokenizer.normalizer.set("action", action_limits(array("ldp.fit.action", (200, 4))))
    policy.tokenizer.normalizer.set(WRENCH, limits(array("ldp.fit.wrench", (200, 6))))
    return policy


@pytest.fixture(scope="module")
def batch() -> dict:
    named = {POSE: ("ldp.pose", 3), WIDTH: ("ldp.width", 1), WRENCH: ("ldp.wrench", 6)}
    return {
        "action": torch.from_numpy(array("ldp.action", (2, 32, 4))),
        "observation": {key: torch.from_numpy(array(name, (2, 2, dim))) for key, (name, dim) in named.items()},
        "touch": {WRENCH: torch.from_numpy(array("ldp.ext_wrench", (2, 32, 6)))},
    }


def test_loss_is_the_references(policy, batch) -> None:
    noise = torch.from_numpy(array("ldp.noise", (2, 8, 16)))
    loss = policy.noise_loss(batch, noise, torch.tensor([11, 73]))
    assert float(loss) == pytest.approx(float(GOLDEN["loss"]), abs=1e-4)


def test_sampled_actions_are_the_references(policy, batch) -> None:
    sampled = policy.sampled(batch["observation"], torch.from_numpy(array("ldp.x_init", (2, 8, 16))))
    with torch.no_grad():
        predicted = policy.predicted(sampled, batch).numpy()
        rows = policy.rows(sampled).numpy()
    np.testing.assert_allclose(predicted, GOLDEN["action_pred"], atol=1e-4)
    np.testing.assert_allclose(predicted[:, policy.spec.now :], GOLDEN["action"], atol=1e-4)
    np.testing.assert_allclose(np.repeat(rows[:, None], 29, axis=1), GOLDEN["latent_rows"], atol=1e-4)


@pytest.mark.parametrize("newest", [4, 8, 20])
def test_fast_step_sends_the_references_last_action(policy, newest: int) -> None:
    touch = array("ldp.ext_wrench", (2, 32, 6))[:, -newest:]
    decoder = NumpyDecoder.from_state(policy.tokenizer.state_dict())
    for condition, frames, expected in zip(
        GOLDEN["latent_rows"][:, 0], touch, GOLDEN[f"fast_{newest}_action"], strict=True
    ):
        np.testing.assert_allclose(decoder.decode(condition, frames), expected[-1], atol=1e-4)


def test_only_the_slow_policy_is_trained(policy, batch) -> None:
    policy.train()
    assert not policy.tokenizer.training
    policy.noise_loss(batch).backward()
    assert all(p.grad is None for p in policy.tokenizer.parameters())
    assert all(p.grad is not None for p in policy.model.parameters())
    policy.zero_grad()
    policy.eval()
