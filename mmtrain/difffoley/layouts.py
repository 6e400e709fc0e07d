"""Names of weights: diffusers' (ours) and those of the latent diffusion code that Diff-Foley was released in.

Each function takes our names and gives theirs, so one map reads and writes. Where shapes differ (the attention of the
autoencoder is a 1x1 convolution there) the two converters at the end change them.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

State = dict[str, Tensor]

RESIDUAL = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
AUTOENCODER = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
OLD_DIFFUSERS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
PROJECTION = re.compile(r"\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, without prefix, of the weights of a UNet or of its encoder half with a classifier."""
    names = list(names)
    layers = 1 + max(int(match[1]) for name in names if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name)))
    return {name: _unet_name(name, layers, names) for name in names}


def _unet_name(name: str, layers: int, names: list[str]) -> str:
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            return theirs + (_residual(rest) if ".resnets." in ours else rest)
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if match is None:
        return name  # classifier.*
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    start = block * (layers + 1)  # up blocks have one layer more, down blocks one downsampler
    if kind == "downsamplers":
        return f"input_blocks.{1 + start + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        has_attention = any(other.startswith(f"up_blocks.{block}.attentions.") for other in names)
        return f"output_blocks.{start + layers}.{2 if has_attention else 1}.{rest}"
    place = f"input_blocks.{1 + start + layer}" if way == "down" else f"output_blocks.{start + layer}"
    return f"{place}.0.{_residual(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _residual(rest: str) -> str:
    for ours, theirs in RESIDUAL.items():
        if rest.startswith(ours):
            return theirs + rest.removeprefix(ours)
    return rest


def autoencoder_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> theirs, without prefix, of the weights of an autoencoder."""
    names = list(names)
    levels = 1 + max(int(m[1]) for name in names if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", name)))
    return {name: _autoencoder_name(name, levels) for name in names}


def _autoencoder_name(name: str, levels: int) -> str:
    for pattern, theirs in AUTOENCODER:
        name = re.sub(pattern, theirs, name)
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)


def to_released(state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str = "") -> State:
    """Our state under their names, each with `prefix`, in their shapes."""
    return {
        prefix + names[name]: value[:, :, None, None] if PROJECTION.search(name) and value.ndim == 2 else value
        for name, value in state.items()
    }


def from_released(state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str = "") -> State:
    """Their state, of which every name has `prefix`, under our names in our shapes; unknown names keep theirs."""
    ours = {prefix + theirs: name for name, theirs in names.items()}
    renamed = {ours.get(theirs, theirs): value for theirs, value in state.items() if theirs.startswith(prefix)}
    return {
        name: value[..., 0, 0] if PROJECTION.search(name) and value.ndim == 4 else value
        for name, value in renamed.items()
    }


def modern_names(state: Mapping[str, Tensor]) -> State:
    """An autoencoder's state of diffusers as of 2022 under the present names of its attention."""
    renamed = {}
    for name, value in state.items():
        for old, new in OLD_DIFFUSERS.items():
            name = name.replace(old, new) if ".attentions." in name else name
        renamed[name] = value
    return renamed
