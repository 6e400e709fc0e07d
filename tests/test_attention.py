"""Attention with a bias: against the released code, both forms against each other, in a UNet, and without a map."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtrain.attention import (
    AttentionBias,
    BiasProcessor,
    biased_attention,
    grid_table,
    install,
    low_rank_attention,
)
from mmtrain.config_errors import UserError
from mmtrain.storyweaver.guidance import signed_map
from mmtrain.storyweaver.spans import CharacterSpans, usage
from tests.golden import load
from tests.golden.fill import array, fill

CASES = json.loads((Path(__file__).parent / "golden/storyweaver/kesg_attention.json").read_text())["cases"]
FORMS = ("bias", "low_rank")


def golden_bias(case: dict[str, Any], heads: str, form: str) -> AttentionBias:
    grid, places = (case["height"], case["width"]), torch.tensor(case["centres"]).float()
    signs = signed_map(places, torch.ones_like(places), (64, 112), grid, 0.85).flatten(1)
    maps = signs * torch.tensor(case["strength"])[:, None, None]
    spans = []
    for b in range(case["batch"]):
        own = [[row[b] for row in rows] for rows in case["index_desc_start_end_class_start_end"]]
        # the released code biases all that follows the class word where the description runs over the end
        own = [(start, end, first, 77 if end > 77 else last) for start, end, first, last in own]
        spans.append([CharacterSpans("", ((first, last),), ((start, end),)) for start, end, first, last in own])
    return AttentionBias({case["height"] * case["width"]: maps}, usage(spans, 77, len(places)), heads, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@torch.no_grad()
def test_golden(case: dict[str, Any], form: str) -> None:
    from diffusers.models.attention_processor import Attention

    golden, name = load("storyweaver/kesg_attention.npz"), case["name"]
    heads, width = case["heads"], case["dim_head"]
    attention = Attention(32, cross_attention_dim=24, heads=heads, dim_head=width, processor=BiasProcessor())
    attention.load_state_dict({k: torch.from_numpy(fill(f"attn2.{k}", tuple(s))) for k, s in case["weights"].items()})
    hidden = torch.from_numpy(array(f"{name}/hidden", (case["batch"], case["height"] * case["width"], 32)))
    text = torch.from_numpy(array(f"{name}/text", (case["batch"], 77, 24)))

    def output(heads: str | None) -> np.ndarray:
        return attention(hidden, text, attention_bias=heads and golden_bias(case, heads, form)).numpy()

    plain, everywhere, released = (output(heads) for heads in (None, "all", "released"))
    for ours, key in ((plain, "plain"), (everywhere, "all_heads"), (released, "released")):
        assert np.allclose(ours, golden[f"{name}/out_{key}"], rtol=0, atol=1e-5), key
    first = output("first")
    if case["batch"] == 1:
        assert np.array_equal(first, released)
    else:  # one head of every sample, where the release edits two of the first sample and none of the second
        assert all(np.abs(first[b] - plain[b]).max() > 1e-2 for b in range(2))
        assert np.allclose(released[1], plain[1], rtol=0, atol=1e-6)


def random_case(
    batch: int = 3, heads: int = 4, queries: int = 15, tokens: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q, k, v, maps, usage; the second sample has one character of two, the third none."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads, queries, 5), (batch, heads, tokens, 5), (batch, heads, tokens, 5), (batch, 2, queries))
    q, k, v, maps = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    counts = torch.randint(0, 3, (batch, 2, tokens), generator=generator).to(dtype)
    counts[1:2, 1], counts[2:3] = 0, 0
    return q, k, v, 3 * maps, counts


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The definition; bias [B, H, N, L]."""
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("heads", ["first", "all", "released"])
@pytest.mark.parametrize("masked", [False, True])
def test_both_forms_are_the_definition(heads: str, masked: bool) -> None:
    q, k, v, maps, counts = random_case()
    mask = torch.zeros(3, 1, 1, 7)
    mask[:, ..., 5:] = -10000.0 if masked else 0
    bias = torch.einsum("bjn,bjl->bnl", maps, counts)
    whole = torch.zeros(3, 4, 15, 7)
    if heads == "released":
        whole[0, :3] = bias
    else:
        whole[:, : 1 if heads == "first" else 4] = bias[:, None]
    expected = explicit(q, k, v, whole + mask)
    given = mask if masked else None
    assert torch.allclose(biased_attention(q, k, v, bias, heads, given), expected, atol=2e-6)
    assert torch.allclose(low_rank_attention(q, k, v, maps, counts, heads, given), expected, atol=2e-6)
    assert torch.equal(AttentionBias({15: maps}, counts).bias(15), bias)


@pytest.mark.parametrize("heads", ["first", "all", "released"])
def test_gradients(heads: str) -> None:
    q, k, v, maps, counts = random_case(2, 2, 3, 3, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, maps)]

    def biased(q: Tensor, k: Tensor, v: Tensor, maps: Tensor) -> Tensor:
        return biased_attention(q, k, v, AttentionBias({3: maps}, counts).bias(3), heads)

    def low_rank(q: Tensor, k: Tensor, v: Tensor, maps: Tensor) -> Tensor:
        return low_rank_attention(q, k, v, maps, counts, heads)

    for form in (biased, low_rank):
        assert torch.autograd.gradcheck(form, inputs), form


@pytest.mark.parametrize("heads", ["first", "all", "released"])
@pytest.mark.parametrize("form", FORMS)
def test_unconditional_half_is_plain(heads: str, form: str) -> None:
    q, k, v, maps, counts = random_case()
    bias = AttentionBias({15: maps}, counts, heads, form)
    attend = BiasProcessor._attend
    both = attend(*(x.repeat(2, 1, 1, 1) for x in (q, k, v)), None, bias.with_unconditional())
    assert torch.allclose(both[:3], attend(q, k, v, None, None), atol=1e-6)
    assert torch.allclose(both[3:], attend(q, k, v, None, bias), atol=1e-6)
    if heads != "released":
        part = attend(q[1:], k[1:], v[1:], None, bias.select(slice(1, None)))
        assert torch.allclose(part, both[4:], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", ["first", "all"])
def test_half_precision_at_the_largest_strength(dtype: torch.dtype, form: str, heads: str) -> None:
    q, k, v, maps, counts = random_case()
    maps = maps.sign() * 39.54  # alpha 2.5 at t = 999, a lone character counted twice
    exact = BiasProcessor._attend(q, k, v, None, AttentionBias({15: maps}, counts, heads, form))
    bias = AttentionBias({15: maps}, counts, heads, form)
    half = BiasProcessor._attend(*(x.to(dtype) for x in (q, k, v)), None, bias)
    assert half.dtype == dtype and half.isfinite().all() and bias.maps[15].dtype == torch.float32
    # a score of 80 is rounded to a part of 2^11 or 2^8: what it shifts is a factor of tokens with equal bias
    assert (half.float() - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.2)


class NoMap(TorchDispatchMode):
    """Fails on any tensor with a number for each query and token of all heads, even of one sample."""

    def __init__(self, queries: int, length: int, heads: int) -> None:
        super().__init__()
        self.queries, self.lengths, self.heads, self.seen = queries, range(length, length + 8), heads, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.seen += 1
                is_map = result.dim() > 2 and result.shape[-1] in self.lengths and result.shape[-2] == self.queries
                many = result.untyped_storage().nbytes() >= self.heads * self.queries * self.lengths[0] * 2
                assert not (is_map and many), (function, result.shape)
        return results


def sd_attention() -> tuple[nn.Module, Tensor, Tensor]:
    """The widest cross-attention of Stable Diffusion 1.5 at 256 x 448; the batch is [unconditional; conditional]."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attention = Attention(320, cross_attention_dim=768, heads=8, dim_head=40, processor=BiasProcessor())
    return attention, torch.randn(2, 1792, 320), torch.randn(2, 77, 768)


@pytest.mark.parametrize("kind", ["bias", "low_rank", "learned"])
@pytest.mark.parametrize("heads", ["first", "all"])
def test_no_map_of_attention_is_made(heads: str, kind: str) -> None:
    attention, hidden, text = sd_attention()
    maps, counts = torch.randn(1, 2, 1792), torch.randint(0, 3, (1, 2, 77)).float()
    bias = AttentionBias(
        {1792: maps.requires_grad_(kind == "learned")}, counts, heads, "low_rank" if kind == "low_rank" else "bias"
    )
    with NoMap(1792, 77, 8) as watch:
        attention(hidden, text, attention_bias=bias.with_unconditional()).square().mean().backward()
    assert watch.seen > 20 and attention.to_q.weight.grad.any()
    assert kind != "learned" or maps.grad.any()
    with pytest.raises(AssertionError), NoMap(1792, 77, 8):  # the watch does see one
        q, k = torch.randn(2, 8, 1792, 40), torch.randn(2, 8, 77, 40)
        (q @ k.mT).softmax(-1)


@contextmanager
def seed(number: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        yield


@pytest.fixture
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    with seed(0):
        return UNet2DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=8,
        )


@pytest.fixture
def inputs() -> dict[str, Any]:
    with seed(1):
        return {
            "sample": torch.randn(2, 4, 7, 10),
            "timestep": torch.tensor([10, 900]),
            "encoder_hidden_states": torch.randn(2, 9, 12),
        }


def story_bias(**options: Any) -> AttentionBias:
    """For the inputs above; odd grids."""
    with seed(2):
        counts = torch.randint(0, 3, (2, 2, 9)).float()
        return AttentionBias({n: 3 * torch.randn(2, 2, n) for n in grid_table(7, 10)}, counts, **options)


def run(unet: nn.Module, inputs: dict[str, Any], bias: AttentionBias | None = None) -> Tensor:
    return unet(**inputs, cross_attention_kwargs={"attention_bias": bias} if bias else None).sample


@torch.no_grad()
def test_unet_without_bias_is_diffusers_own(unet: nn.Module, inputs: dict[str, Any]) -> None:
    mask = torch.ones(2, 9)
    mask[:, 6:] = 0
    masked = inputs | {"encoder_attention_mask": mask}
    before, before_masked = run(unet, inputs), run(unet, masked)
    install(unet)
    assert len(unet.attn_processors) == 14 and all(isinstance(p, BiasProcessor) for p in unet.attn_processors.values())
    assert torch.allclose(run(unet, inputs), before, atol=1e-6)
    assert torch.allclose(run(unet, masked), before_masked, atol=1e-6)
    nothing = story_bias()
    nothing.usage.zero_()
    assert torch.allclose(run(unet, inputs, nothing), before, atol=1e-6)
    # an upright, odd grid goes through all levels; every choice changes the picture and agrees with its other form
    results = {
        (heads, form): run(unet, inputs, story_bias(heads=heads, form=form))
        for heads in ("first", "all")
        for form in FORMS
    }
    for heads in ("first", "all"):
        assert torch.allclose(results[heads, "bias"], results[heads, "low_rank"], atol=1e-5)
        assert (results[heads, "bias"] - before).abs().max() > 1e-3
    assert (results["first", "bias"] - results["all", "bias"]).abs().max() > 1e-3
    # masked tokens stay masked, whatever their bias
    guided = run(unet, masked, story_bias(heads="all"))
    other = story_bias(heads="all")
    other.usage[..., 6:] = 0
    assert torch.allclose(guided, run(unet, masked, other), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_and_learned_maps(unet: nn.Module, inputs: dict[str, Any], form: str) -> None:
    install(unet)
    unet.train()
    gradients: dict[str, list[Tensor]] = {}
    for kind in ("whole", "checkpointed"):
        unet.zero_grad()
        if kind == "checkpointed":
            unet.enable_gradient_checkpointing()
        bias = story_bias(form=form)
        leaves = [m.requires_grad_() for n, m in bias.maps.items() if n in grid_table(7, 10, 2)]
        run(unet, inputs, bias).square().mean().backward()
        gradients[kind] = [p.grad.clone() for p in [*unet.parameters(), *leaves]]
        run(unet, inputs, story_bias(form=form)).square().mean().backward()  # constant maps, kept between layers
        assert all(leaf.grad.any() for leaf in leaves)
    for whole, checkpointed in zip(*gradients.values(), strict=True):
        assert torch.allclose(whole, checkpointed, atol=1e-6)


def test_adapters_of_peft(unet: nn.Module, inputs: dict[str, Any]) -> None:
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.requires_grad_(False)
    with torch.no_grad():
        install(unet)
        plain, guided = run(unet, inputs), run(unet, inputs, story_bias())
    for before in (True, False):  # the processor may come first or last
        name = f"adapter_{before}"
        if not before:
            install(unet)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
        unet.set_adapter(name)
        with torch.no_grad():
            assert torch.allclose(run(unet, inputs), plain, atol=1e-6)  # B starts as zeros
            assert torch.allclose(run(unet, inputs, story_bias()), guided, atol=1e-6)
        run(unet, inputs, story_bias()).square().mean().backward()
        trained = {n: p for n, p in unet.named_parameters() if f"lora_B.{name}" in n}
        assert len(trained) == 7 * 2 * 4 and all(p.grad.any() for n, p in trained.items() if "attn2.to_v" in n)


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_bad_input(unet: nn.Module, inputs: dict[str, Any]) -> None:
    install(unet)
    bias = story_bias()
    refused(
        lambda: run(unet, inputs | {"sample": torch.randn(2, 4, 6, 6)}, bias), "70 tokens, this one has 36: the latents"
    )
    q, k, v, maps, counts = random_case(3, 2)
    refused(lambda: low_rank_attention(q, k, v, maps, counts, "released"), "3 samples are more than 2 heads")
    refused(lambda: low_rank_attention(q, k, v, maps, counts, "second"), "heads: 'second'")
    with pytest.raises(ValueError, match="before"):
        bias.with_unconditional().select(slice(0, 1))


def test_grid_table() -> None:
    assert grid_table(9, 5) == {45: (9, 5), 15: (5, 3), 6: (3, 2), 2: (2, 1), 1: (1, 1)}
    assert grid_table(1, 1) == {1: (1, 1)} and grid_table(8, 14, 1) == {112: (8, 14)}
