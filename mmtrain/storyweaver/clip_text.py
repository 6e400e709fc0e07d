"""The text tower of a CLIP in open_clip's layout as the CLIPTextModel of a pipeline, with weights as they are.

Stable Diffusion's text encoder is the text tower of a CLIP too: features that already tell what a picture shows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtrain.config_errors import UserError

if TYPE_CHECKING:
    from transformers import CLIPTextModel

POSITIONS, TOKENS = "positional_embedding", "token_embedding.weight"
BLOCK = "transformer.resblocks."
PARTS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
PARTS |= {"attn.out_proj": "self_attn.out_proj"}


def text_tower(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of a text tower, without what stands before their names.

    Args:
        state: of a CLIP, of a file of ours or of open_clip's.
        where: the file, for messages.

    Raises:
        UserError: there is none.
    """
    prefix = next((name[: -len(TOKENS)] for name in state if name.endswith(TOKENS)), None)
    if prefix is None or f"{prefix}{POSITIONS}" not in state:
        raise UserError(f"{where}: holds no text tower of a CLIP: {TOKENS} and {POSITIONS} are not both there")
    kept = (TOKENS, POSITIONS, "ln_final.", BLOCK)
    return {name[len(prefix) :]: value for name, value in state.items() if name[len(prefix) :].startswith(kept)}


def text_encoder_of_clip(
    state: Mapping[str, Tensor], heads: int, where: str = "text_encoder", quick_gelu: bool = True
) -> "CLIPTextModel":
    """A CLIPTextModel with the weights of a CLIP's text tower.

    Args:
        state: see `text_tower`.
        heads: of its attention, which weights do not tell.
        where: the file, for messages.
        quick_gelu: x sigmoid(1.702 x), as OpenAI's and our CLIPs have it.

    Raises:
        UserError: no text tower, or a width that `heads` does not divide.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = text_tower(state, where)
    (vocabulary, width), (length, _) = tower[TOKENS].shape, tower[POSITIONS].shape
    layers = 1 + max(int(name.split(".")[2]) for name in tower if name.startswith(BLOCK))
    if width % heads:
        raise UserError(f"{where}: its width is {width}, which {heads} heads do not divide")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tower[f"{BLOCK}0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        projection_dim=width,
        hidden_act="quick_gelu" if quick_gelu else "gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    with torch.random.fork_rng(devices=[]):  # fresh weights, replaced at once, must not move the noise
        model = CLIPTextModel(config)
    model.load_state_dict(_renamed(tower))
    return model


def _renamed(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "embeddings.token_embedding.weight": tower[TOKENS],
        "embeddings.position_embedding.weight": tower[POSITIONS],
        "final_layer_norm.weight": tower["ln_final.weight"],
        "final_layer_norm.bias": tower["ln_final.bias"],
    }
    for name, value in tower.items():
        if not name.startswith(BLOCK):
            continue
        layer, part = name.removeprefix(BLOCK).split(".", 1)
        place = f"encoder.layers.{layer}."
        if part.startswith("attn.in_proj_"):  # query, key and value in one
            kind = part.removeprefix("attn.in_proj_")
            for key, rows in zip("qkv", value.chunk(3), strict=True):
                names[f"{place}self_attn.{key}_proj.{kind}"] = rows
        else:
            stem, _, kind = part.rpartition(".")
            names[f"{place}{PARTS[stem]}.{kind}"] = value
    return names
