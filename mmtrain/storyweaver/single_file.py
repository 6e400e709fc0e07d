"""Models in one file with the names of the latent diffusion code: `model.diffusion_model.*`, `first_stage_model.*` and
`cond_stage_model.transformer.*`. Stable Diffusion 1.x is spread so; its sizes are told from the weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmtrain.config_errors import UserError, say_once
from mmtrain.storyweaver.parts import empty_model, empty_text_encoder, fill_text_encoder, naming
from mmtrain.storyweaver.tokenizer import CLIP_SIZE, clip_tokenizer, read_tokenizer
from mmtrain.storyweaver.weight_files import fill
from mmtrain.weight_files import read_weights

if TYPE_CHECKING:
    from mmtrain.storyweaver.pipeline import Components

State = dict[str, Tensor]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
AVERAGED = "model_ema."
HEADS = 8  # of the UNet of Stable Diffusion 1.x
HEAD_WIDTH = 64  # of CLIP's text encoder
SCALE = 0.18215


def read_single_file(
    path: str | Path,
    heads: int = HEADS,
    text_heads: int | None = None,
    tokenizer: str | Path | None = None,
    objective: str = "eps",
    norm_groups: int = 32,
) -> "Components":
    """Read a model from a single file, with averaged weights of the UNet where the file has them.

    Args:
        path: .safetensors, or .ckpt that is read as weights only.
        heads: of the UNet's attention, which weights do not tell.
        text_heads: of the text encoder; one per 64 channels.
        tokenizer: folder of the tokenizer; CLIP's own for a vocabulary of 49,408.
        objective: what the UNet predicts, "eps" or "v".
        norm_groups: of every group norm.

    Raises:
        UserError: no such file, or it holds no model of this kind.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    from mmtrain.storyweaver.pipeline import Components

    if objective not in ("eps", "v"):
        raise UserError(f"objective: {objective!r}, expected eps or v")
    state = read_weights(path)
    check_names(state, path)
    with naming(path):
        unet_sizes = unet_config(state, heads, norm_groups)
        vae_sizes = vae_config(state, norm_groups)
    unet = empty_model(UNet2DConditionModel, unet_sizes, path)
    fill(unet, convert_ldm_unet_checkpoint(with_averages(state, path), unet_sizes), path)
    vae = empty_model(AutoencoderKL, vae_sizes, path)
    fill(vae, convert_ldm_vae_checkpoint(part(state, VAE), vae_sizes), path)
    text_encoder, words = _text(part(state, TEXT), text_heads, tokenizer, path)
    return Components(unet, vae, text_encoder, words, objective)


def check_names(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Refuse a file of something else.

    Raises:
        UserError: a part is not there.
    """
    for prefix, what in ((UNET, "UNet"), (VAE, "autoencoder"), (TEXT, "text encoder of CLIP")):
        if not part(state, prefix):
            if prefix == TEXT and part(state, "cond_stage_model.model."):
                what += " (that of Stable Diffusion 2.x, which it has, has other names: give a folder of diffusers)"
            first = next(iter(state))
            raise UserError(f"{path}: has no {prefix}*, so no {what}; its first name is {first}")


def part(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries whose names begin so, under these names."""
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def with_averages(state: Mapping[str, Tensor], path: str | Path) -> State:
    """The UNet's weights, averaged where the file has an average of them, as released folders of diffusers do."""
    weights = part(state, UNET)
    averages = {name: AVERAGED + name.removeprefix("model.").replace(".", "") for name in weights}
    found = {name: state[averaged] for name, averaged in averages.items() if averaged in state}
    if found:
        say_once(f"{path}: has averaged weights of the UNet ({len(found)} of {len(weights)}), which are taken")
    return weights | found


def unet_config(state: Mapping[str, Tensor], heads: int, norm_groups: int) -> dict[str, Any]:
    """Sizes of a UNet, as of UNet2DConditionModel, from weights with the names of latent diffusion.

    Raises:
        UserError: levels of attention that differ in depth, or heads that do not divide the channels.
    """
    own = {name.removeprefix(UNET): value for name, value in part(state, UNET).items()}
    count = 1 + max(int(found[1]) for name in own if (found := re.match(r"input_blocks\.(\d+)\.", name)))
    downs = [place for place in range(count) if f"input_blocks.{place}.0.op.weight" in own]
    layers = downs[0] - 1 if downs else count - 1
    firsts = range(1, count, layers + 1)  # of each level: `layers` blocks, then one that halves
    channels = [len(own[f"input_blocks.{first}.0.out_layers.3.weight"]) for first in firsts]
    attends = [f"input_blocks.{first}.1.proj_in.weight" in own for first in firsts]
    if wrong := [width for width in channels if width % heads]:
        raise UserError(f"heads: {heads} do not divide the {wrong[0]} channels of the UNet")
    projection = own["middle_block.1.proj_in.weight"]
    depths = {int(found[1]) for name in own if (found := re.search(r"\.transformer_blocks\.(\d+)\.", name))}
    if depths != {0}:
        raise UserError(f"the UNet's attention has blocks of {len(depths)} layers, expected 1, as Stable Diffusion 1.x")
    return {
        "in_channels": own["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(own["out.2.weight"]),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(attends)],
        "cross_attention_dim": own["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": heads,  # diffusers means the number of heads by it
        "use_linear_projection": projection.ndim == 2,
        "norm_num_groups": norm_groups,
    }


def vae_config(state: Mapping[str, Tensor], norm_groups: int) -> dict[str, Any]:
    """Sizes of an autoencoder, as of AutoencoderKL, from weights with the names of latent diffusion."""
    own = {name.removeprefix(VAE): value for name, value in part(state, VAE).items()}
    places = {
        (int(found[1]), int(found[2]))
        for name in own
        if (found := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name))
    }
    levels, layers = (1 + max(numbers) for numbers in zip(*places, strict=True))
    scale = float(state["scale_factor"]) if "scale_factor" in state else SCALE
    return {
        "in_channels": own["encoder.conv_in.weight"].shape[1],
        "out_channels": len(own["decoder.conv_out.weight"]),
        "block_out_channels": [len(own[f"encoder.down.{level}.block.0.conv2.weight"]) for level in range(levels)],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": norm_groups,
        "scaling_factor": round(scale, 5),  # stored in float32
    }


def text_config(own: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """Sizes of a text encoder, as of CLIPTextConfig, from its weights; heads of 64 channels unless given."""
    vocabulary, width = own["text_model.embeddings.token_embedding.weight"].shape
    layers = {int(found[1]) for name in own if (found := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": len(own["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads or max(1, width // HEAD_WIDTH),
        "max_position_embeddings": len(own["text_model.embeddings.position_embedding.weight"]),
    }


def _text(state: State, heads: int | None, tokenizer: str | Path | None, path: str | Path) -> tuple[Any, Any]:
    """The text encoder and its tokenizer."""
    from transformers import CLIPTextConfig

    own = {name.removeprefix(TEXT): value for name, value in state.items()}
    with naming(path):
        sizes = text_config(own, heads)
    if tokenizer is not None:
        words = read_tokenizer(tokenizer)
    elif sizes["vocab_size"] == CLIP_SIZE:
        words = clip_tokenizer(model_max_length=sizes["max_position_embeddings"])
    else:
        raise UserError(
            f"{path}: has a vocabulary of {sizes['vocab_size']}, not CLIP's of {CLIP_SIZE}: name the folder of its "
            "tokenizer"
        )
    with naming(path):
        config = CLIPTextConfig(**sizes, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
        model = empty_text_encoder(config)
    fill_text_encoder(model, own, path)
    return model, words
