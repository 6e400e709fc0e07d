"""The printed parameter counts, the honest ones, and the shapes that both rest on."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.storyweaver import parameters
from mmtrain.storyweaver.about import world_parameters
from mmtrain.storyweaver.parameters import describe_count, params_per_world
from tests.storyweaver.tiny import tiny_components

GOLDEN = Path(__file__).parents[1] / "golden/storyweaver/sd15_parameters.json"
PRINTED = {
    "StoryWeaver": 1017,
    "DreamBooth": 7118,
    "LoRA": 1024,
    "IP-Adapter(base)": 1038,
    "IP-Adapter(plus)": 1063,
    "StoryGEN": 1064,
    "Mix-of-Show": 1164,
}


def test_the_printed_column() -> None:
    assert {name: params_per_world(name, 7, unit="paper") for name in parameters.METHODS} == PRINTED
    honest = {
        name: round(params_per_world(name, 7)) for name in ("IP-Adapter(base)", "IP-Adapter(plus)", "Mix-of-Show")
    }
    assert list(honest.values()) == [1039, 1066, 1171]
    assert params_per_world("DreamBooth", 9, unit=1) == 9 * 1_016_745_108
    with_decoder = params_per_world("StoryWeaver", 7, count_decoder=True, unit=1)
    assert with_decoder - params_per_world("StoryWeaver", 7, unit=1) == 49_490_199
    assert describe_count("LoRA", 7).startswith("1024.4 x 10^6 (1024 as the paper counts")
    for attempt, message in (
        (lambda: params_per_world("Lora", 7), "'Lora' has no count of parameters; did you mean LoRA"),
        (lambda: params_per_world("LoRA", 0), "n_characters: 0"),
        (lambda: params_per_world("LoRA", 7, unit="Mi"), "unit: 'Mi'"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_the_counts_are_those_of_stable_diffusion() -> None:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from mmtrain.storyweaver.networks import KnowledgeEncoder

    golden = json.loads(GOLDEN.read_text())
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text_encoder, knowledge = CLIPTextModel(text), KnowledgeEncoder(768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    shapes = {name: list(value.shape) for name, value in unet.state_dict().items()}
    assert shapes == golden["unet"] and len(shapes) == 686
    sizes = {}
    for name, network in (("unet", unet), ("text", text_encoder), ("vae", vae), ("knowledge", knowledge)):
        sizes[name] = sum(math.prod(parameter.shape) for parameter in network.parameters())
    assert sizes["unet"] == golden["components"]["unet"] == parameters.UNET
    assert sizes["text"] == golden["components"]["text_encoder"] == parameters.TEXT_ENCODER == 123_060_480
    assert sizes["vae"] == golden["components"]["vae"] == parameters.VAE_ENCODER + parameters.VAE_DECODER == 83_653_863
    assert sizes["knowledge"] == golden["components"]["knowledge_encoder"] == parameters.KNOWLEDGE_ENCODER == 98_948
    assert sizes["unet"] + sizes["knowledge"] == golden["storyweaver_trainable"] == 859_619_912
    assert len(list(unet.parameters())) + len(list(knowledge.parameters())) == golden["storyweaver_trainable_tensors"]
    half = [n for n in vae.state_dict() if n.startswith(("encoder.", "quant_conv."))]
    assert sum(math.prod(vae.state_dict()[name].shape) for name in half) == parameters.VAE_ENCODER
    linears = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    lora = sum(4 * (m.in_features + m.out_features) for m in linears)
    assert (len(linears), lora) == (128, golden["lora_rank4_unet_attention"])
    assert golden["extras"] == {name: parameters.METHODS[name].once for name in golden["extras"]}
    assert parameters.METHODS["LoRA"].each == lora + golden["lora_rank4_text_attention"]


def test_a_model_counts_what_its_world_needs() -> None:
    """Its own count is that of the table where nothing is shared: UNet, text encoder, encoder of latents, guidance."""
    components = tiny_components()
    unet, text, vae = components.unet, components.text_encoder, components.vae
    encoder = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    guide = torch.nn.Linear(3, 2)
    shared = sum(p.numel() for p in (*text.parameters(), *encoder))
    own = sum(p.numel() for p in unet.parameters())
    model = SimpleNamespace(unet=unet, text_encoder=text, vae=vae, guidance=guide)
    assert world_parameters(model) == own + shared + 8
    copies = torch.nn.ModuleDict({"ada": torch.nn.Linear(9, 9), "bo": torch.nn.Linear(9, 9)})
    model = SimpleNamespace(unet=unet, text_encoder=text, vae=vae, guidance=None, networks=copies)
    assert world_parameters(model) == 2 * 90 + shared, "each has its own, and nobody needs the base model's"
