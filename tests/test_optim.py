"""Learning-rate schedules and weight-decay groups against the released trainers' (golden), and the run's length."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from torch import nn

from mmtrain.optim import AdamWSettings, parameter_groups, training_steps, warmup_cosine
from tests.golden import load
from tests.rankclip.tiny import FOLDER, MANIFEST, build

SCHEDULE = {k.removeprefix("schedule/"): v for k, v in load("rankclip/metrics.npz").items() if k.startswith("schedule")}
FULL = json.loads((FOLDER / "manifest_full.json").read_text())
ARCHITECTURES = {"ViT-B/32": "ViT-B-32-quickgelu", "RN50": "RN50-quickgelu"}


class Data:
    """A data module whose training loader has `length` batches; counts how often one is made."""

    def __init__(self, length: int) -> None:
        self.length, self.made = length, 0

    def train_dataloader(self) -> range:
        self.made += 1
        return range(self.length)


def trainer(batches: int, epochs: int = 1, **settings: Any) -> SimpleNamespace:
    usual = {"max_epochs": epochs, "max_steps": -1, "limit_train_batches": 1.0, "accumulate_grad_batches": 1}
    return SimpleNamespace(datamodule=Data(batches), **(usual | settings))


class Module(nn.Module):
    def __init__(self, run: SimpleNamespace) -> None:
        super().__init__()
        self.weight, self.trainer = nn.Parameter(torch.ones(2, 2)), run


def course(settings: AdamWSettings, run: SimpleNamespace, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Learning rate and beta1 with which each of the steps would be made."""
    configured = settings.configure(Module(run))
    assert configured["lr_scheduler"]["interval"] == "step"
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    seen = []
    for step in range(steps):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"][0]))
        if step < steps - 1:
            optimizer.step()
            schedule.step()
    return tuple(np.array(column) for column in zip(*seen, strict=True))


# ------------------------------------------------------------------------------------------------------- schedules


def test_warm_up_and_cosine_are_the_released_ones() -> None:
    steps, expected = SCHEDULE["steps"], SCHEDULE["lr"]
    factor = warmup_cosine(1000, 6400)
    np.testing.assert_allclose([5e-4 * factor(int(s)) for s in steps], expected, rtol=1e-9, atol=1e-18)
    assert expected[-1] > expected[-3] == 0, "past its end the released schedule rises again"
    lr, _ = course(AdamWSettings(lr=5e-4, warmup_steps=1000), trainer(100, 64), 6401)
    within = steps <= 6400
    np.testing.assert_allclose(lr[steps[within]], expected[within], rtol=1e-9, atol=1e-18)


def test_schedule_of_the_released_trainer_is_one_epoch_ahead() -> None:
    """The released step counter is batches_per_epoch * e with e from 1."""
    lr, _ = course(AdamWSettings(lr=5e-4, warmup_steps=1000, schedule_offset="one_epoch"), trainer(100, 64), 6400)
    steps, expected = SCHEDULE["steps"], SCHEDULE["lr"]
    within = steps >= 100
    np.testing.assert_allclose(lr[steps[within] - 100], expected[within], rtol=1e-9, atol=1e-18)
    assert lr[-1] > 0 and lr[-1] == pytest.approx(expected[-1], rel=1e-9)
    by_number, _ = course(AdamWSettings(lr=5e-4, warmup_steps=1000, schedule_offset=100), trainer(100, 64), 50)
    np.testing.assert_array_equal(by_number, lr[:50])


def test_onecycle_moves_rate_and_beta1_like_alips() -> None:
    settings = AdamWSettings(lr=1e-3, schedule="onecycle", decay="all", betas=(0.9, 0.98), weight_decay=0.2)
    lr, beta1 = course(settings, trainer(100, 32), 3200)
    steps = SCHEDULE["alip_steps"]
    np.testing.assert_allclose(lr[steps], SCHEDULE["alip_lr"], rtol=1e-9)
    np.testing.assert_allclose(beta1[steps], SCHEDULE["alip_beta1"], rtol=1e-9)
    optimizer = settings.configure(Module(trainer(100, 32)))["optimizer"]
    assert optimizer.param_groups[0]["betas"][1] == 0.98


def test_constant_rate_has_a_warm_up() -> None:
    lr, _ = course(AdamWSettings(lr=1e-2, schedule="constant", warmup_steps=4), trainer(10), 8)
    np.testing.assert_allclose(lr, 1e-2 * np.array([0.25, 0.5, 0.75, 1, 1, 1, 1, 1]))
    lr, _ = course(AdamWSettings(lr=1e-2, schedule="constant", warmup_steps=0), trainer(10), 2)
    np.testing.assert_array_equal(lr, 1e-2)


# ------------------------------------------------------------------------------------------------ length of the run


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (trainer(100, 64), (100, 6400)),
        (trainer(100, 3, accumulate_grad_batches=8), (13, 39)),  # the last step of an epoch takes what is left
        (trainer(100, 3, limit_train_batches=7), (7, 21)),
        (trainer(100, 3, limit_train_batches=0.25), (25, 75)),
        (trainer(100, 3, limit_train_batches=500), (100, 300)),
        (trainer(100, -1, max_steps=250), (100, 250)),
        (trainer(100, None, max_steps=250), (100, 250)),
        (trainer(100, 2, max_steps=1000), (100, 200)),
    ],
)
def test_length_of_the_run(run, expected) -> None:
    assert training_steps(run) == expected
    assert run.datamodule.made == 1


def test_length_without_a_data_module() -> None:
    run = SimpleNamespace(datamodule=None, estimated_stepping_batches=30, max_epochs=3)
    assert training_steps(run) == (10, 30)


# ------------------------------------------------------------------------------------------------------ weight decay


def names(network: nn.Module, decay: str, prefix: str = "network.") -> tuple[set[str], set[str]]:
    """Names that decay, and those that do not."""
    named = [(prefix + name, p) for name, p in network.named_parameters()]
    by_id = {id(p): name.removeprefix(prefix) for name, p in named}
    groups = parameter_groups(named, 0.1, decay)
    found = {group["weight_decay"]: {by_id[id(p)] for p in group["params"]} for group in groups}
    assert sum(len(group["params"]) for group in groups) == len(named) and set(found) <= {0.1, 0.0}
    return found.get(0.1, set()), found.get(0.0, set())


@pytest.mark.parametrize("name", MANIFEST)
def test_decay_by_name_is_the_released_rule(name: str) -> None:
    decayed, kept = names(build(name), "by_name")
    assert decayed == set(MANIFEST[name]["decay"])
    assert "logit_scale" in kept and len(kept) > 10


@pytest.mark.parametrize("name", FULL)
def test_decay_of_the_full_models(name: str) -> None:
    with torch.device("meta"):
        network = CLIP(**open_clip.get_model_config(ARCHITECTURES[name]))
    by_name, _ = names(network, "by_name")
    matrices, kept = names(network, "matrices")
    assert by_name - matrices == set(FULL[name]["decay_exceptions"])  # decayed by oversight
    assert not matrices - by_name
    assert all(p.ndim >= 2 for n, p in network.named_parameters() if n in matrices)
    assert kept >= {"logit_scale", "ln_final.weight", "ln_final.bias"}


def test_decay_of_everything_and_frozen_parameters() -> None:
    network = build("vit_tiny")
    decayed, kept = names(network, "all")
    assert decayed == {name for name, _ in network.named_parameters()} and not kept
    network.visual.requires_grad_(False)
    groups = parameter_groups(network.named_parameters(), 0.1, "matrices")
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in network.parameters())


def test_adamw_gets_the_settings() -> None:
    settings = AdamWSettings(
        lr=3e-4, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.2, schedule="constant", warmup_steps=0
    )
    module = Module(trainer(10))
    module.bias = nn.Parameter(torch.ones(2))
    optimizer = settings.configure(module)["optimizer"]
    assert [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (3e-4, (0.9, 0.98), 1e-6, 0.2),
        (3e-4, (0.9, 0.98), 1e-6, 0.0),
    ]
    before = [p.detach().clone() for p in (module.weight, module.bias)]
    for parameter in (module.weight, module.bias):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient only decay moves a weight
    torch.testing.assert_close(module.weight.detach(), before[0] * (1 - 3e-4 * 0.2))
    assert torch.equal(module.bias, before[1])
