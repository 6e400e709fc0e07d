"""Objectives against the released implementations' outputs, through chunks, and against autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.rankclip.losses import (
    alip_objective,
    alip_weights,
    clip_objective,
    cyclip_objective,
    descending_order,
    list_loss,
    plackett_luce,
    rankclip_objective,
    ranking_ramp,
    row_chunked_loss,
)
from tests.golden import load
from tests.golden.fill import array

EPS = 1e-10
SCALES = {"init": math.log(1 / 0.07), "max": 4.6052}
TOLERANCE = {"float64": {"rtol": 1e-9, "atol": 1e-12}, "float32": {"rtol": 2e-6, "atol": 1e-6}}
OBJECTIVES = {
    "clip": clip_objective(),
    "cyclip": cyclip_objective(0.25, 0.25),
    **{f"rankclip_epoch{e}": rankclip_objective(ranking_ramp((e - 1) / 63), eps=EPS) for e in (1, 20, 64)},
}


def pair(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = array(f"rankclip.image.B{size}", (size, 64))
    b = np.float32(0.5) * a + array(f"rankclip.text.B{size}", (size, 64))
    return tuple(F.normalize(torch.from_numpy(x).to(dtype), dim=1).requires_grad_() for x in (a, b))


@pytest.mark.parametrize("case", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [4, 33, 128])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_losses_and_gradients_through_every_chunk(dtype: str, size: int, scale: str, case: str) -> None:
    golden = load(f"rankclip/losses_{dtype}.npz")
    prefix = f"B{size}/{scale}/{case}/"
    for chunk in (1, 5, 64, size):
        image, text = pair(size, getattr(torch, dtype))
        s = torch.tensor(SCALES[scale], dtype=image.dtype, requires_grad=True)
        loss, parts = row_chunked_loss(OBJECTIVES[case], (image, text), s, chunk)
        loss.backward()
        np.testing.assert_allclose(loss.item(), golden[prefix + "loss"], **TOLERANCE[dtype])
        if prefix + "contrastive" in golden and case != "clip":
            np.testing.assert_allclose(parts["contrastive"], golden[prefix + "contrastive"], **TOLERANCE[dtype])
        if prefix + "rank" in golden:
            rank = float(parts.get("cross", 0) + parts.get("inmodal", 0))
            np.testing.assert_allclose(rank, golden[prefix + "rank"], **TOLERANCE[dtype])
        gradient_tolerance = {"rtol": 1e-7, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(s.grad, golden[prefix + "grad_logit_scale"], **gradient_tolerance)
        compared = 0
        for name, grad in (("image", image.grad), ("text", text.grad)):
            np.testing.assert_allclose(grad.norm(), golden[f"{prefix}grad_{name}_norm"], **gradient_tolerance)
            for key, part in ((f"grad_{name}", grad), (f"grad_{name}_rows0to3", grad[:4])):
                if prefix + key in golden:
                    np.testing.assert_allclose(part, golden[prefix + key], **gradient_tolerance)
                    compared += 1
        assert compared == 2


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [4, 33, 128])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_list_terms(dtype: str, size: int, scale: str) -> None:
    golden = load(f"rankclip/losses_{dtype}.npz")
    for case, rows, columns, swap_rows, swap_columns in (
        ("listmle_cross_i2t", 0, 1, 1, 0),
        ("listmle_cross_t2i", 1, 0, 0, 1),
        ("listmle_in_image", 0, 0, 1, 1),
        ("listmle_in_text", 1, 1, 0, 0),
    ):
        x = pair(size, getattr(torch, dtype))
        s = torch.tensor(SCALES[scale], dtype=x[0].dtype, requires_grad=True)
        scores = s.exp() * x[rows] @ x[columns].T
        reference = s.exp() * x[swap_rows] @ x[swap_columns].T
        loss = list_loss(scores, reference, EPS).mean()
        loss.backward()
        prefix = f"B{size}/{scale}/{case}/"
        np.testing.assert_allclose(loss.item(), golden[prefix + "loss"], **TOLERANCE[dtype])
        tolerance = {"rtol": 1e-7, "atol": 1e-10} if dtype == "float64" else {"rtol": 2e-4, "atol": 1e-4}
        np.testing.assert_allclose(s.grad, golden[prefix + "grad_logit_scale"], **tolerance)
        for name, leaf in (("image", x[0]), ("text", x[1])):
            norm = 0.0 if leaf.grad is None else leaf.grad.norm()
            np.testing.assert_allclose(norm, golden[f"{prefix}grad_{name}_norm"], **tolerance)


@pytest.mark.parametrize("chunk", [1, 5, 64, 128])
@pytest.mark.parametrize("kind", ["cold", "warm"])
@pytest.mark.parametrize("size", [4, 33, 128])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_alip_steps(dtype: str, size: int, kind: str, chunk: int) -> None:
    golden = load(f"rankclip/alip_{dtype}.npz")
    momenta = torch.tensor([1.0, 1, 1] if kind == "cold" else [0.40, 0.45, 0.60], dtype=getattr(torch, dtype))
    for step in range(3):
        v = array(f"alip.image.B{size}.step{step}", (size, 64))
        r = np.float32(0.5) * v + array(f"alip.raw.B{size}.step{step}", (size, 64))
        c = np.float32(0.8) * v + array(f"alip.caption.B{size}.step{step}", (size, 64))
        features = tuple(F.normalize(torch.from_numpy(x).to(momenta.dtype), dim=1).requires_grad_() for x in (v, r, c))
        image, text, caption = features
        pairs = [(text, caption), (image, text), (image, caption)]
        similarities = torch.stack([(a * b).sum(-1).detach() for a, b in pairs])
        momenta = momenta.lerp(similarities.mean(-1), 0.01)
        weights = alip_weights(similarities, momenta)
        s = torch.tensor(SCALES["init"], dtype=momenta.dtype, requires_grad=True)
        objective = alip_objective(weights[0] * weights[1], weights[0] * weights[2])
        loss, parts = row_chunked_loss(objective, features, s, chunk)
        loss.backward()
        prefix = f"{kind}/B{size}/step{step}/"
        got = {
            "H_text": momenta[0], "H_raw": momenta[1], "H_caption": momenta[2],
            "W_sample": weights[0], "W_raw": weights[1], "W_caption": weights[2],
            "loss_raw": parts["text"], "loss_caption": parts["caption"], "loss": loss.detach(),
        }  # fmt: skip
        for name, value in got.items():
            np.testing.assert_allclose(value, golden[prefix + name], **TOLERANCE[dtype], err_msg=name)
        tolerance = {"rtol": 1e-7, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(s.grad, golden[prefix + "grad_logit_scale"], **tolerance)
        for name, leaf in zip(("image", "raw", "caption"), features, strict=True):
            np.testing.assert_allclose(leaf.grad.norm(), golden[f"{prefix}grad_{name}_norm"], **tolerance)
            if f"{prefix}grad_{name}" in golden:
                np.testing.assert_allclose(leaf.grad, golden[f"{prefix}grad_{name}"], **tolerance)


@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("tau", [1.0, 14.3, 100.0])
def test_closed_form_gradient_is_autograds(eps: float, tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    scores, reference = torch.randn(2, 5, 40, dtype=torch.float64, generator=generator).mul(tau / 3).unbind()
    leaf = scores.clone().requires_grad_()
    order = reference.argsort(-1, descending=True)
    x = leaf.gather(-1, order)
    if eps:
        shifted = x - x.max(-1, keepdim=True).values
        tails = shifted.exp().flip(-1).cumsum(-1).flip(-1)
        expected = ((tails + eps).log() - shifted).sum(-1)
    else:
        expected = (x.flip(-1).logcumsumexp(-1).flip(-1) - x).sum(-1)
    expected.sum().backward()
    loss, gradient = plackett_luce(scores, reference, eps)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eps", [0.0, EPS])
def test_objectives_pass_gradcheck(eps: float) -> None:
    image, text = pair(4, torch.float64)
    s = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    objective = rankclip_objective(1.5, cross=0.5, inmodal=0.25, eps=eps)
    assert torch.autograd.gradcheck(lambda v, t, s: row_chunked_loss(objective, (v, t), s, 3)[0], (image, text, s))


def test_true_form_in_float32_survives_the_largest_temperature() -> None:
    image, text = pair(128, torch.float32)
    wide = pair(128, torch.float64)
    results = []
    for features in ((image, text), wide):
        s = torch.tensor(4.6052, dtype=features[0].dtype, requires_grad=True)
        loss, _ = row_chunked_loss(rankclip_objective(2.0, eps=0.0), features, s)
        loss.backward()
        results.append((loss.item(), s.grad.item(), features[0].grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    torch.testing.assert_close(results[0][2].double(), results[1][2], rtol=1e-3, atol=1e-5)
    published, _ = row_chunked_loss(rankclip_objective(2.0, eps=EPS), wide, torch.tensor(4.6052))
    assert published.item() > 1.5 * results[1][0]  # spec 1.2: another loss at tau = 100


def test_weights_really_scale_and_zero_is_not_computed() -> None:
    features, s = pair(33, torch.float64), torch.tensor(SCALES["init"], dtype=torch.float64)
    one = row_chunked_loss(rankclip_objective(1.0, 1 / 16, 1 / 16), features, s)[1]
    other = row_chunked_loss(rankclip_objective(1.0, 1 / 8, 0.0), features, s)[1]
    assert other["cross"].item() == pytest.approx(2 * one["cross"].item())
    assert "inmodal" not in other
    assert other["loss"].item() == pytest.approx(other["contrastive"].item() + other["cross"].item())


def test_watched_shares_have_their_stated_range() -> None:
    flat = F.normalize(torch.ones(16, 8), dim=1)
    parts = row_chunked_loss(rankclip_objective(1.0), (flat, flat), torch.tensor(1.0))[1]
    assert parts["cross_list_a"].item() == pytest.approx(1.0, rel=1e-5)  # uniform scores: ln(N!) exactly
    assert parts["cross_saturated_a"].item() == 0
    parts = row_chunked_loss(rankclip_objective(1.0), pair(128, torch.float32), torch.tensor(4.6052))[1]
    assert 0.5 < parts["inmodal_saturated_a"].item() < 1


def test_order_is_the_stable_descending_one() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (50, 300), generator=generator).float() / 2
    scores[0, :10] = torch.tensor([0.0, -0.0] * 5)
    scores[1, :4] = torch.tensor([math.inf, -math.inf, 1e-40, -1e-40])
    expected = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(descending_order(scores), expected)


def test_ramp_is_the_published_one() -> None:
    golden = load("rankclip/metrics.npz")["schedule/rank_weight_64_epochs"]
    np.testing.assert_allclose([ranking_ramp((e - 1) / 63) for e in range(1, 65)], golden, rtol=1e-12)


def test_reference_half_precision_is_near_but_not_equal() -> None:
    features, s = pair(33, torch.float32), torch.tensor(SCALES["max"])
    exact = row_chunked_loss(rankclip_objective(2.0, eps=EPS), features, s)[0].item()
    rounded = row_chunked_loss(rankclip_objective(2.0, eps=EPS, dtype=torch.float16), features, s)[0].item()
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)


def test_unequal_blocks_are_refused() -> None:
    image, text = pair(4, torch.float32)
    with pytest.raises(ValueError, match="equally many rows"):
        row_chunked_loss(clip_objective(), (image, text[:3]), torch.tensor(1.0))
