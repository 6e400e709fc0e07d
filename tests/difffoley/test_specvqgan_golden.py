"""SpecVQGAN's networks against the reference's numbers; gradients of both term orders; sampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tests.golden
from mmtrain.difffoley.specvqgan import VectorQuantizer, Vqgan, codebook_loss, perplexity, to_grid, to_sequence
from mmtrain.difffoley.specvqgan_gpt import FeatureGpt, draw_codes
from tests.difffoley.filling import assert_close, filled, given, logistic, manifest


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(Path(tests.golden.__file__).parent / "difffoley/specvqgan_small.npz"))


# --- against the reference ---


def golden_quantizer(order: str = "released") -> VectorQuantizer:
    quantizer = VectorQuantizer(16, 8, order=order)
    quantizer.load_state_dict(
        {"embedding.weight": filled({"quantize.embedding.weight": [16, 8]})["quantize.embedding.weight"]}
    )
    return quantizer


def test_quantiser_has_the_reference_s_outputs_and_gradients(golden: dict[str, np.ndarray]) -> None:
    quantizer, z = golden_quantizer(), given("vq_z", 2, 8, 5, 6).requires_grad_()
    quantised, loss, indices = quantizer(z)
    assert torch.equal(indices, torch.from_numpy(golden["vq_indices"]))
    assert_close(loss, golden["vq_loss"])
    assert_close(perplexity(indices, 16), golden["vq_perplexity"])
    assert_close(quantised, golden["vq_quantised"])
    loss.backward()
    assert_close(z.grad, golden["vq_grad_z"])
    assert_close(quantizer.embedding.weight.grad, golden["vq_grad_codebook"])
    assert torch.equal(quantizer.codes(indices), quantizer.embedding.weight[indices].permute(0, 3, 1, 2))


def test_the_other_term_order_moves_codes_four_times_as_fast_and_binds_the_encoder_a_quarter() -> None:
    gradients = {}
    for order in ("released", "vqvae"):
        quantizer, z = golden_quantizer(order), given("vq_z", 2, 8, 5, 6).requires_grad_()
        _, loss, _ = quantizer(z)
        loss.backward()
        gradients[order] = (loss.detach(), z.grad, quantizer.embedding.weight.grad)
    torch.testing.assert_close(gradients["vqvae"][0], gradients["released"][0])
    torch.testing.assert_close(gradients["vqvae"][1], gradients["released"][1] / 4)
    torch.testing.assert_close(gradients["vqvae"][2], gradients["released"][2] * 4)
    assert codebook_loss(torch.zeros(2), torch.ones(2), beta=0.5) == 1.5


def test_gradient_goes_straight_through_the_quantiser() -> None:
    z, weight = torch.randn(1, 8, 2, 3, requires_grad=True), torch.randn(1, 8, 2, 3)
    (golden_quantizer()(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


def test_codes_are_ordered_column_by_column(golden: dict[str, np.ndarray]) -> None:
    places = torch.arange(30)
    assert torch.equal(to_sequence(places.view(1, 5, 6))[0], torch.from_numpy(golden["column_major_forward_idx"]))
    assert torch.equal(to_grid(places[None], 5).flatten(), torch.from_numpy(golden["column_major_backward_idx"]))
    grid = torch.randint(9, (2, 5, 7))
    assert torch.equal(to_grid(to_sequence(grid), 5), grid)


def golden_gpt() -> FeatureGpt:
    gpt = FeatureGpt(20, 4, 16, 30, layers=2, heads=2, width=16).eval()
    weights = {name.removeprefix("transformer."): value for name, value in filled(manifest("gptfeats_small")).items()}
    gpt.load_state_dict(weights)
    return gpt


def golden_codes(golden: dict[str, np.ndarray]) -> Tensor:
    return to_sequence(torch.from_numpy(golden["vq_indices"]))


def test_transformer_has_the_reference_s_logits_and_loss(golden: dict[str, np.ndarray]) -> None:
    gpt, codes, features = golden_gpt(), golden_codes(golden), given("gpt_feats", 2, 20, 4).transpose(1, 2)
    assert_close(gpt(features, codes[:, :-1]), golden["gpt_logits"])
    losses, right = gpt.loss(features, codes)
    assert_close(losses.mean(), golden["gpt_loss"])
    assert losses.shape == right.shape == (2, 30)
    masked = {name for name in manifest("gptfeats_small") if name.endswith("attn.mask")}
    assert {f"transformer.{name}" for name in gpt.state_dict()} == set(manifest("gptfeats_small")) - masked


def test_encoder_and_decoder_have_the_reference_s_outputs(golden: dict[str, np.ndarray]) -> None:
    network = Vqgan(32, (1, 1, 2), 1, num_codes=16, code_width=8).eval()
    missing, unexpected = network.load_state_dict(filled(manifest("vqgan_small")), strict=False)
    assert not unexpected
    assert {name.partition(".")[0] for name in missing} == {"quantize", "quant_conv", "post_quant_conv"}
    assert_close(network.encoder(2 * logistic("vqgan_x", 1, 1, 20, 48) - 1), golden["vqgan_encoder_out"])
    assert_close(network.decoder(given("vqgan_z", 1, 8, 5, 12)), golden["vqgan_decoder_out"])


def test_full_sizes_are_the_paper_s() -> None:
    with torch.device("meta"):
        network, gpt = Vqgan(), FeatureGpt()
        grid = network.encoder(torch.zeros(1, 1, 80, 848))
        back = network.decoder(grid)
    assert grid.shape == (1, 256, 5, 53) and back.shape == (1, 1, 80, 848)
    assert gpt.pos_emb.shape == (1, 477, 1024) and len(gpt.blocks) == 24
    assert network.quantize.embedding.weight.shape == (1024, 256)


# --- sampling ---


def test_sampling_with_kept_keys_equals_running_all_tokens_each_time(golden: dict[str, np.ndarray]) -> None:
    gpt, features = golden_gpt(), given("gpt_feats", 2, 20, 4).transpose(1, 2)
    draws = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    codes = torch.zeros(2, 0, dtype=torch.long)
    for column in draws.unbind(1):
        logits = gpt(features, codes)[:, -1]
        codes = torch.cat((codes, draw_codes(logits, column, 5, 0.8)[:, None]), 1)
    assert torch.equal(gpt.sample(features, draws, 5, 0.8), codes)
    assert torch.equal(gpt.sample(features[1:], draws[1:], 5, 0.8), codes[1:])  # no clip depends on its batch


def test_drawn_codes_have_the_probabilities_of_the_top_k() -> None:
    logits, draws = torch.randn(8, generator=torch.Generator().manual_seed(1)), (torch.arange(4000) + 0.5) / 4000
    found = torch.bincount(draw_codes(logits.expand(4000, 8), draws, 3, 2.0), minlength=8) / 4000
    kept = logits.topk(3).indices
    expected = torch.zeros(8).index_put((kept,), (logits[kept] / 2).softmax(0))
    torch.testing.assert_close(found, expected, rtol=0, atol=6e-4)
    ends = torch.tensor([0.0, 1 - 2**-24])
    for row in (torch.tensor([0.0, 1.0, -torch.inf]), torch.tensor([-torch.inf, 0.0, 1.0])):
        assert row[draw_codes(row.expand(2, 3), ends, None)].isfinite().all()  # never one without probability
