"""Spatial guidance: regions against the released encoder and maps; and ours: any size and number, soft borders."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.guidance import (
    GuidanceMaps,
    GuidanceSettings,
    SpatialGuidance,
    centres,
    inside_map,
    log_ratio,
    regulariser_difference,
    regulariser_offsets,
    signed_map,
    soft_map,
    strength,
)
from mmtrain.storyweaver.networks import KnowledgeEncoder
from mmtrain.storyweaver.spans import CharacterSpans
from mmtrain.storyweaver.text import EncodedFrames
from tests.golden import load
from tests.golden.fill import array, fill

GOLDEN = Path(__file__).parents[1] / "golden/storyweaver"
MASKS = json.loads((GOLDEN / "kesg_masks.json").read_text())
CASES = {case["name"]: case for case in MASKS["cases"]}
BETA, WIDTH, LENGTH = 0.85, 16, 12
SPANS = [CharacterSpans("a", ((1, 2),), ((4, 7),)), CharacterSpans("b", ((2, 3),), ((7, 9),))]
SPANS.append(CharacterSpans("c", (), ((9, 11),)))


def filled_encoder(gain: float) -> KnowledgeEncoder:
    """The encoder of the golden cases."""
    encoder = KnowledgeEncoder(768)
    assert sum(p.numel() for p in encoder.parameters()) == 98_948 and len(encoder.state_dict()) == 12
    for name, value in encoder.named_parameters():
        factor = 1.0
        if ".3." in name:  # the golden cases leave the bias as it is, unless all is zero
            factor = gain if name.endswith("weight") else float(gain > 0)
        value.data = factor * torch.from_numpy(fill(f"k_encoder.{name}", tuple(value.shape)))
    return encoder


def golden_distribution(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and covariance [J, B, 2] as our encoder gives them."""
    features = torch.stack([torch.from_numpy(array(f"pooled_{j}", (768,))) for j in range(case["n_chars"])])
    with torch.no_grad():
        offset, spread = filled_encoder(case["gain"])(features[:, None].expand(-1, len(case["t"]), -1))
    return torch.tensor(case["means"]).float()[:, None] + offset, 1 + spread


def encoded(*counts: int, seed: int = 0) -> EncodedFrames:
    """Frames with some of three characters."""
    generator = torch.Generator().manual_seed(seed)
    descriptions = torch.randn(len(counts), max(counts), WIDTH, generator=generator)
    for row, count in zip(descriptions, counts, strict=True):
        row[count:] = 0
    context = torch.zeros(len(counts), LENGTH, 4)
    return EncodedFrames(context, [SPANS[:count] for count in counts], descriptions, list(counts))


@pytest.mark.parametrize("name", CASES)
def test_regions_are_golden(name: str) -> None:
    case, arrays = CASES[name], load("storyweaver/kesg_masks.npz")
    size = case["H"], case["W"]
    mean, covariance = golden_distribution(case)
    for ours, key in ((mean, "mu_hat"), (covariance, "cov_diag")):
        assert torch.allclose(ours, torch.tensor(case[key]), atol=1e-5)
    inside = np.unpackbits(arrays[f"{name}/inside_packed"], axis=-1)[..., : size[0] * size[1]]
    ours = inside_map(mean, covariance, size, size, BETA)
    assert np.array_equal(ours.flatten(2).numpy(), inside.astype(bool))
    scale = strength(torch.tensor(case["t"]), case["scale"])
    assert torch.allclose(scale, torch.tensor(case["strength"]), rtol=1e-6, atol=0)
    for key in [key for key in arrays if key.startswith(f"{name}/down_")]:
        grid = tuple(int(side) for side in key.rpartition("_")[2].split("x"))
        ours = signed_map(mean, covariance, size, grid, BETA)
        assert np.array_equal(ours.numpy(), np.sign(arrays[key])), key
        assert np.allclose((ours * scale[:, None, None]).numpy(), arrays[key], rtol=1e-6, atol=0)


def test_regularisers_are_golden() -> None:
    features = torch.stack([torch.from_numpy(array(f"pooled_{j}", (768,))) for j in range(2)])
    offset, spread = filled_encoder(1.0)(features)
    near, apart = MASKS["loss_reg_example"]["value"], MASKS["loss_dif_example"]["value"]
    assert regulariser_offsets(offset, spread).item() == pytest.approx(near, rel=1e-5)
    size = 64, 112  # of the golden example
    maps = signed_map(centres(2, 2) + offset, 1 + spread, size, size, BETA)
    assert regulariser_difference(maps).item() == pytest.approx(apart, rel=1e-5)
    guidance = SpatialGuidance(GuidanceSettings(encoder="released", parity=True), 768)
    guidance.encoder.load_state_dict(filled_encoder(1.0).state_dict())
    frames = EncodedFrames(torch.zeros(1, LENGTH, 4), [SPANS[:2]], features[None], [2])
    assert guidance.regulariser(frames, size).item() == pytest.approx(near + apart, rel=1e-5)
    whole = guidance.regulariser(frames).item()
    guidance.settings.parity = False
    assert guidance.regulariser(frames).item() == pytest.approx(whole, rel=1e-2)  # every eighth pixel
    lone = EncodedFrames(torch.zeros(2, LENGTH, 4), [SPANS[:2], SPANS[:1]], features.expand(2, 2, -1).clone(), [2, 1])
    lone_offsets = (2 * near + regulariser_offsets(offset[:1], spread[:1]).item()) / 3  # each character once
    assert guidance.regulariser(lone, (512, 896)).item() == pytest.approx(lone_offsets + whole - near, rel=1e-2)


def test_centres_are_golden() -> None:
    for key, expected in json.loads((GOLDEN / "prior_means.json").read_text()).items():
        most, count = (int(part.rpartition("=")[2]) for part in key.split(","))
        assert centres(count, most, padded=True).tolist() == expected, key
        assert centres(count, most).tolist() == expected[:count]
    assert centres(4, 2)[:, 1].tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])  # more than were foreseen
    assert centres(0, 2).shape == (0, 2)


@pytest.mark.parametrize(
    "size, grid", [((512, 896), (64, 112)), ((500, 333), (63, 42)), ((96, 96), (7, 5)), ((1, 8), (1, 3))]
)
def test_sampling_pixels_equals_sampling_the_whole_map(size: tuple[int, int], grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    mean = torch.rand(5, 2, generator=generator) * 3 - 1.5  # outside the picture too: there its border is densest
    covariance = torch.rand(5, 2, generator=generator) * 2 + 1e-3
    whole = log_ratio(mean, covariance, size, size, BETA)
    rows, columns = (torch.arange(g) * s // g for g, s in zip(grid, size, strict=True))
    assert torch.equal(log_ratio(mean, covariance, size, grid, BETA), whole[:, rows][:, :, columns])
    assert whole.amax((-2, -1)) == pytest.approx(torch.full((5,), -np.log(BETA)), rel=1e-4)  # p_max is on the grid


def test_strength_takes_fractions_and_one_time_for_each_sample() -> None:
    whole = strength(torch.tensor([0, 988, 999]), 2.5)
    assert torch.equal(whole, strength(torch.tensor([0.9, 988.909, 999.0], dtype=torch.float64), 2.5))
    maps = SpatialGuidance(GuidanceSettings(), WIDTH).prepare(encoded(2, 1), (64, 112), (8, 14))
    both = maps.at(torch.tensor([3.0, 988.9]), 2.5).maps[112]
    assert torch.equal(both[0].abs(), torch.full((2, 112), strength(torch.tensor(3), 2.5).item()))
    assert torch.equal(both[1], maps.at(988, 2.5).maps[112][1]) and torch.equal(
        maps.at(torch.tensor(988), 1.0).usage, maps.usage
    )


def test_released_encoder_gets_no_gradient_from_maps_and_soft_does() -> None:
    frames, gradients = encoded(2, 1, 3), {}
    for kind in ("released", "soft"):
        torch.manual_seed(0)
        guidance = SpatialGuidance(GuidanceSettings(encoder=kind), WIDTH)
        bias = guidance.prepare(frames, (64, 112), (8, 14)).at(torch.tensor([3, 500, 999]), 1.0)
        loss = sum(bias.bias(n).square().sum() + bias.bias(n).sum() for n in (112, 28))
        if loss.requires_grad:
            loss.backward()
        gradients[kind] = [p.grad for p in guidance.parameters()]
        guidance.regulariser(frames).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in guidance.parameters()), kind
    assert gradients["released"] == [None] * 12
    assert all(g.isfinite().all() and g.any() for g in gradients["soft"])
    assert SpatialGuidance(GuidanceSettings(), WIDTH).regulariser(frames) == 0


def test_soft_map_turns_into_the_signed_one_and_pulls_the_border() -> None:
    mean, covariance = torch.tensor([[0.1, -0.3]]).requires_grad_(), torch.tensor([[0.7, 1.3]])
    size, grid = (64, 112), (64, 112)
    assert torch.equal(
        soft_map(mean, covariance, size, grid, BETA, 1e-7).sign(), signed_map(mean, covariance, size, grid, BETA)
    )
    soft_map(mean, covariance, size, grid, BETA, 0.1)[:, :, 56:].sum().backward()
    assert mean.grad[0, 1] > 0  # to have more on the right, move right


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("kind", ["frozen_prior", "soft"])
def test_a_frame_is_guided_the_same_in_any_batch(kind: str, parity: bool) -> None:
    torch.manual_seed(0)
    guidance = SpatialGuidance(GuidanceSettings(encoder=kind, parity=parity, max_characters=2), WIDTH)
    size, latent = (72, 40), (9, 5)  # upright, odd
    frames, t = encoded(1, 3, 0, 2), torch.tensor([10, 999, 5, 500])
    with torch.no_grad():
        together = guidance.prepare(frames, size, latent).at(t, 1.5)
        assert list(together.maps) == [45, 15, 6, 2, 1]
        for b in range(4):
            alone = guidance.prepare(frames.select([b]), size, latent).at(t[b : b + 1], 1.5)
            for tokens in together.maps:
                assert torch.allclose(alone.bias(tokens)[0], together.bias(tokens)[b], atol=1e-6)
        assert not together.bias(45)[2].any() and together.bias(45)[:2].any()
        chosen = guidance.prepare(frames, size, latent).select([3, 0]).to("cpu").at(t[[3, 0]], 1.5)
    assert torch.equal(chosen.bias(45), together.bias(45)[[3, 0]])


def test_parity_enters_the_last_character_again_in_the_middle() -> None:
    size, latent = (64, 112), (8, 14)
    plain, padded = (
        SpatialGuidance(GuidanceSettings(parity=parity, max_characters=3), WIDTH)
        .prepare(encoded(1, 2), size, latent)
        .at(7, 1.0)
        for parity in (False, True)
    )
    assert torch.equal(padded.bias(112)[0], 3 * plain.bias(112)[0])
    middle = signed_map(torch.zeros(2), torch.ones(2), size, latent, BETA).flatten() * strength(torch.tensor(7), 1.0)
    expected = plain.bias(112)[1] + middle[:, None] * plain.usage[1, 1]
    assert torch.allclose(padded.bias(112)[1], expected)
    left, right = plain.maps[112][1].view(2, 8, 14)[:, 4, [3, 10]].sign().unbind(-1)
    assert left.tolist() == [1, -1] and right.tolist() == [-1, 1]  # first tag on the left


def test_batched_guidance_and_no_characters() -> None:
    maps = SpatialGuidance(GuidanceSettings(), WIDTH).prepare(encoded(2, 1), (64, 112), (8, 14))
    assert isinstance(maps, GuidanceMaps)
    bias, both = maps.at(999, 2.5), maps.at(999, 2.5).with_unconditional()
    assert torch.equal(both.bias(112)[2:], bias.bias(112)) and not both.bias(112)[:2].any()
    for kind in ("frozen_prior", "soft"):
        guidance = SpatialGuidance(GuidanceSettings(encoder=kind), WIDTH)
        nothing = guidance.prepare(encoded(0, 0), (64, 112), (8, 14)).at(999, 2.5)
        assert nothing.bias(112).shape == (2, 112, LENGTH) and not nothing.bias(112).any()
        assert guidance.regulariser(encoded(0, 0)) == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"heads": "second"}, "guidance.heads: 'second', must be one of first, all, released"),
        ({"encoder": "learned"}, "guidance.encoder: 'learned'"),
        ({"form": "mask"}, "guidance.form: 'mask'"),
        ({"span_rule": "none"}, "guidance.span_rule: 'none'"),
        ({"alpha": -1.0}, "guidance.alpha: -1.0, must be 0 or more"),
        ({"sampling_alpha": float("nan")}, "guidance.sampling_alpha: nan"),
        ({"beta": 1.0}, "guidance.beta: 1.0, must lie between 0 and 1"),
        ({"max_characters": 0}, "guidance.max_characters: 0"),
        ({"temperature": 0.0}, "guidance.temperature: 0.0"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceSettings(**wrong)


def test_strong_guidance_of_all_heads_warns() -> None:
    with pytest.warns(UserWarning, match="above 1"):
        SpatialGuidance(GuidanceSettings(heads="all"), WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpatialGuidance(GuidanceSettings(heads="all", sampling_alpha=1.0), WIDTH)
        SpatialGuidance(GuidanceSettings(), WIDTH)
