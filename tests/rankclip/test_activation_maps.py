"""Grad-CAM against directional derivatives by finite differences in float64; no trace left on the network; nouns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.rankclip.activation_maps import activation_maps, nouns, overlay
from tests.rankclip.tiny import build, filled_state, model_config

SIZE = {"vit_tiny": 32, "rn_tiny": 64}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)  # of OpenAI's CLIP
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)


@pytest.fixture(params=["vit_tiny", "rn_tiny"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def network(name: str) -> CLIP:
    """In training mode but for one module, with running statistics that the fill gave."""
    network = build(name)
    network.load_state_dict(filled_state(name))
    network.train().visual.conv1.eval()
    return network


def batch(name: str, seed: int = 0, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (count, 3, SIZE[name], SIZE[name]), generator=generator, dtype=torch.uint8)
    return pictures, torch.randint(1, 512, (count, 16), generator=generator)


def expected_map(name: str, network: CLIP, picture: Tensor, tokens: Tensor, step: float = 1e-4) -> Tensor:
    """Grad-CAM of one picture without autograd: alpha_k is the slope of y when channel k grows everywhere at once."""
    network = copy.deepcopy(network).double().eval()
    visual, pixels = network.visual, ((picture.double() / 255 - MEAN) / DEVIATION)[None]
    text = F.normalize(network.encode_text(tokens[None]), dim=-1)
    layer = visual.layer4 if name == "rn_tiny" else visual.transformer.resblocks[-1].ln_1
    recorded = []
    handle = layer.register_forward_hook(lambda *given: recorded.append(given[-1]))
    network.encode_image(pixels)
    handle.remove()
    activation = recorded[0][0]
    channels = activation.shape[0 if name == "rn_tiny" else 1]
    moves = torch.cat([torch.eye(channels), -torch.eye(channels)]).double() * step
    if name == "rn_tiny":
        images = visual.attnpool(activation + moves[:, :, None, None])  # attnpool is all that comes after layer4
        grid = activation
    else:
        moved = activation.repeat(2 * channels, 1, 1)
        moved[:, 1:] += moves[:, None]  # the class token stays
        layer.register_forward_hook(lambda *given: moved)
        images = network.encode_image(pixels.expand(2 * channels, -1, -1, -1))
        grid = activation[1:].T.reshape(channels, 4, 4)
    up, down = (F.normalize(images, dim=-1) @ text.T).view(2, channels)
    alpha = (up - down) / (2 * step) / grid[0].numel()
    raw = torch.einsum("k,khw->hw", alpha, grid).clamp(min=0)
    full = F.interpolate(raw[None, None], size=picture.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    return (full - full.min()) / (full.max() - full.min())


@torch.no_grad()
def test_equals_finite_differences(name, network):
    pictures, tokens = batch(name)
    maps = activation_maps(network, pictures, tokens)
    assert maps.shape == (3, SIZE[name], SIZE[name]) and maps.dtype == torch.float32
    for found, picture, ids in zip(maps, pictures, tokens, strict=True):
        torch.testing.assert_close(found.double(), expected_map(name, network, picture, ids), atol=2e-4, rtol=0)


def test_each_pair_stands_for_itself(name, network):
    pictures, tokens = batch(name)
    maps = activation_maps(network, pictures, tokens)
    alone = torch.cat([activation_maps(network, pictures[i : i + 1], tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(maps, alone, atol=1e-4, rtol=0)
    same_picture = activation_maps(network, pictures[:1].repeat(3, 1, 1, 1), tokens)
    assert (same_picture[1:] - same_picture[0]).abs().amax(dim=(1, 2)).min() > 0.01  # another word, another map
    assert maps.amin() == 0 and (maps.amax(dim=(1, 2)) == 1).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_leaves_no_trace(name, network, frozen):
    pictures, tokens = batch(name)
    network.requires_grad_(not frozen)
    network.logit_scale.grad = torch.tensor(7.0)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    first = activation_maps(network, pictures, tokens)
    assert not first.requires_grad
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad != frozen for parameter in network.parameters())
    grads = {key for key, parameter in network.named_parameters() if parameter.grad is not None}
    assert grads == {"logit_scale"} and network.logit_scale.grad == 7
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(activation_maps(network, pictures, tokens), first, atol=0, rtol=0)


def test_cleans_up_after_an_error(name, network):
    pictures, tokens = batch(name)
    modes = [module.training for module in network.modules()]
    with pytest.raises(UserError, match=r"pictures are 16x16.*pictures\.size"):
        activation_maps(network, pictures[..., :16, :16], tokens)
    assert not any(module._forward_hooks for module in network.modules())
    assert [module.training for module in network.modules()] == modes


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("context", CONTEXTS)
def test_equal_within_contexts_of_a_test_loop(name, network, context):
    pictures, tokens = batch(name)
    outside = activation_maps(network, pictures, tokens)
    with CONTEXTS[context]():
        before = modes()
        maps = activation_maps(network, pictures.clone(), tokens.clone())  # in inference mode, inference tensors
        assert modes() == before
    torch.testing.assert_close(maps, outside, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing(name, network):
    pictures, tokens = batch(name)
    outside = activation_maps(network, pictures, tokens)
    network.visual.set_grad_checkpointing(True)
    torch.testing.assert_close(activation_maps(network, pictures, tokens), outside, atol=1e-6, rtol=0)


def test_a_map_that_is_zero_everywhere_stays_zero(name, network):
    pictures, tokens = batch(name)
    last = network.visual.attnpool.c_proj.weight if name == "rn_tiny" else network.visual.proj
    nn.init.zeros_(last)  # the image feature no longer depends on the picture
    assert (activation_maps(network, pictures, tokens) == 0).all()


def test_refuses_another_tower():
    config = model_config("vit_tiny")
    vision = {"timm_model_name": "test_vit", "image_size": 32, "timm_pool": "token", "timm_proj": "linear"}
    network = CLIP(**(config | {"vision_cfg": vision}))
    with pytest.raises(UserError, match=r"architecture: .*not a TimmModel"):
        activation_maps(network, *batch("vit_tiny"))


def test_overlay_is_half_jet():
    picture = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    laid = overlay(picture, torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    assert laid.dtype == torch.uint8 and laid.shape == (3, 2, 2)
    assert laid[:, 0, 0].tolist() == [50, 50, 114]  # jet(0) is (0, 0, 0.5)
    assert laid[:, 0, 1].tolist() == [114, 50, 50]  # jet(1) is (0.5, 0, 0)
    assert torch.equal(overlay(picture, torch.rand(2, 2), opacity=0), picture)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("photograph of two men on motorcycles", ["photograph", "men", "motorcycles"]),
        ("The man is wearing glasses and an orange hat", ["man", "glasses", "hat"]),
        ("A small blue plane sitting on top of a field", ["plane", "field"]),
        ("A building, a string and a wedding cake", ["building", "string", "wedding cake"]),
        ("Dog after dog, 3 dogs", ["dog", "dogs"]),
        ("The very old large wooden garden table", ["garden table"]),
        ("of the and", []),
        ("", []),
    ],
)
def test_nouns(caption, expected):
    assert nouns(caption) == expected


def test_given_nouns_replace_the_heuristic_for_their_caption_only():
    given = {"two men on motorcycles": ["man", "motorcycles"]}
    assert nouns("two men on motorcycles", given) == ["man", "motorcycles"]
    assert nouns("two men on motorcycles", {}) == ["men", "motorcycles"]
