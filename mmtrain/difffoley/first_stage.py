"""The first stage of Diff-Foley (arXiv 2306.17203): mel spectrograms as latents of a KL autoencoder, and back.

Released: Stable Diffusion v1's autoencoder, frozen, as it is. It was trained on pictures in [-1, 1] and is given mels
in [0, 1], three times the same channel; checkpoints of the diffusion model fit no other convention.

Shapes: mel [B, C, F] in [0, 1] (C bins, F frames), latent [B, 4, C / 8, F / 8].
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from mmtrain import distributed
from mmtrain.config_errors import UserError
from mmtrain.difffoley.layouts import State, autoencoder_names, from_released, modern_names
from mmtrain.weight_files import check_fits, folder_weights, read_weights

SCALE_FACTOR = 0.18215  # Stable Diffusion's, which makes its latents of pictures about unit variance
GROUPS = 32


def autoencoder_config(
    channels: Sequence[int] = (128, 256, 512, 512),
    layers_per_block: int = 2,
    latent_channels: int = 4,
    in_channels: int = 3,
    has_mid_attention: bool = True,
    patch: int = 1,
) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL; the defaults are Stable Diffusion v1's.

    Args:
        channels: width of each level; each level but the last halves height and width.
        in_channels: the mel is repeated so many times.
        patch: side of squares of the mel whose pixels become channels, in place of repeated ones. Ours: 2 with one
            level less gives a latent of the same shape for a quarter of the arithmetic.

    Raises:
        UserError: widths that GroupNorm cannot divide, or both repeated and patched.
    """
    if patch > 1 and in_channels != 1:
        raise UserError(f"in_channels: {in_channels} with patch {patch}; patches take a mel once: give in_channels 1")
    in_channels *= patch**2
    if odd := [width for width in channels if width % GROUPS]:
        raise UserError(f"channels: {odd} are no multiples of {GROUPS}, the groups of GroupNorm")
    return {
        "in_channels": in_channels,
        "out_channels": in_channels,
        "block_out_channels": tuple(channels),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "layers_per_block": layers_per_block,
        "latent_channels": latent_channels,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": has_mid_attention,
    }


class FirstStage(nn.Module):
    """A KL autoencoder with the factor that gives its latents unit variance.

    Args:
        config: arguments of AutoencoderKL, see `autoencoder_config`; None for Stable Diffusion v1's.
        scale_factor: latents are multiplied by it. A buffer, so it is in every checkpoint.
    """

    def __init__(self, config: Mapping[str, Any] | None = None, scale_factor: float = SCALE_FACTOR) -> None:
        super().__init__()
        self.autoencoder = AutoencoderKL(**(autoencoder_config() if config is None else config))
        self.register_buffer("scale_factor", torch.tensor(scale_factor, dtype=torch.float32))
        # 1 and 3 channels are a repeated mel, 4 and 16 the pixels of a patch: so the weights tell it
        channels = self.autoencoder.config.in_channels
        self.patch = math.isqrt(channels) if math.isqrt(channels) ** 2 == channels else 1

    @property
    def factor(self) -> int:
        """Mel bins and frames to a row and column of the latent: 8."""
        return self.patch * 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of the latent: 4."""
        return self.autoencoder.config.latent_channels

    def picture(self, mel: Tensor) -> Tensor:
        """Mel [B, C, F] as what the autoencoder takes: the same in each channel [B, 3, C, F], or patches as channels.

        Raises:
            UserError: bins or frames that the factor does not divide.
        """
        if any(size % self.factor for size in mel.shape[-2:]):
            raise UserError(
                f"format.window_mel_frames: a mel of {mel.shape[-2]} bins and {mel.shape[-1]} frames; both must be "
                f"multiples of {self.factor}, which the first stage halves them to one by"
            )
        if self.patch > 1:
            return functional.pixel_unshuffle(mel[:, None], self.patch)
        return mel[:, None].expand(-1, self.autoencoder.config.in_channels, -1, -1)

    def mel(self, picture: Tensor) -> Tensor:
        """Mel [B, C, F] of what the autoencoder gives: the first channel, or the pixels of its patches."""
        return functional.pixel_shuffle(picture, self.patch)[:, 0]

    def encode(self, mel: Tensor, sample: bool = True) -> Tensor:
        """Scaled latent [B, 4, C / 8, F / 8] of mel [B, C, F].

        Args:
            sample: draw from the posterior, as the release does everywhere; False takes its mean.
        """
        posterior = self.autoencoder.encode(self.picture(mel)).latent_dist
        if not sample:
            return self.scale_factor * posterior.mode()
        return self.scale_factor * (posterior.mean + posterior.std * distributed.normal_like(posterior.mean))

    def decode(self, z: Tensor) -> Tensor:
        """Mel [B, C, F] of scaled latents; not clamped."""
        return self.mel(self.autoencoder.decode(z / self.scale_factor, return_dict=False)[0])

    def decode_tiled(self, z: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
        """Mel [B, C, F] of a latent of any length, decoded in tiles along time so that memory stays that of one tile.

        Neighbouring tiles are cross-faded over their overlap: the decoder normalises and attends over a whole tile, so
        the same column comes out a little differently in two of them.

        Args:
            tile: columns of a tile; a latent that is not longer is decoded at once.
            overlap: columns that neighbours share, at least; below `tile`.

        Raises:
            ValueError: an overlap that is not below the tile.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap {overlap} must be in [0, tile {tile})")
        columns = z.shape[-1]
        if columns <= tile:
            return self.decode(z)
        starts = tile_starts(columns, tile, overlap)
        mel = z.new_zeros(len(z), z.shape[-2] * self.factor, columns * self.factor)
        total = z.new_zeros(columns * self.factor)
        weight = fade_weights(tile * self.factor, overlap * self.factor).to(z)
        for start in starts:
            place = slice(start * self.factor, (start + tile) * self.factor)
            mel[..., place] += weight * self.decode(z[..., start : start + tile])
            total[place] += weight
        return mel / total

    def fingerprint(self) -> str:
        """Hash of the weights and the factor, by which two stages tell whether they share this one."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def tile_starts(columns: int, tile: int, overlap: int) -> list[int]:
    """First columns of evenly spread tiles that cover `columns` and share at least `overlap`."""
    count = -(-(columns - overlap) // (tile - overlap))
    return [round(i * (columns - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def fade_weights(length: int, overlap: int) -> Tensor:
    """Weights [length] above 0 that rise over `overlap` entries, stay 1, and fall over as many."""
    ramp = (torch.arange(1, length + 1) / (overlap + 1)).clamp(max=1.0)
    return torch.minimum(ramp, ramp.flip(0))


def read_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of AutoencoderKL that a state, ours or released, without prefix, was made with: read off its shapes."""
    widths, layers = {}, set()
    for name, value in state.items():
        if match := re.match(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:resnets|block)\.(\d+)\.conv1\.weight$", name):
            widths[int(match[1])] = value.shape[0]
            layers.add(int(match[2]))
    return autoencoder_config(
        [widths[level] for level in sorted(widths)],
        len(layers),
        state["post_quant_conv.weight"].shape[0],
        state["encoder.conv_in.weight"].shape[1],
        any(re.match(r"encoder\.(mid_block\.attentions|mid\.attn_1)", name) for name in state),
    )


def load_first_stage(path: str | Path) -> FirstStage:
    """A first stage in evaluation mode, from any file that holds one.

    Args:
        path: a checkpoint of ours (of the autoencoder, or of a diffusion model or classifier, which carry theirs), a
            released latent diffusion or alignment checkpoint, a Stable Diffusion file, a bare autoencoder of that code,
            or a diffusers folder (the autoencoder's, or one with a `vae` folder).

    Raises:
        UserError: no such file or folder, not readable, or without an autoencoder.
    """
    path = Path(path)
    scale: float | Tensor = SCALE_FACTOR
    if path.is_dir():
        state, config = folder_weights(path, "vae")
        scale = config.get("scaling_factor", SCALE_FACTOR)
        prefix = ""
    else:
        state = read_weights(path)
        prefix = _prefix(state, path)
        # the released classifiers keep it at the top, ours beside the autoencoder
        for name in ("scale_factor", re.sub(r"autoencoder\.$", "scale_factor", prefix)):
            scale = state.get(name, scale)
    return build_first_stage({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, scale, path)


def build_first_stage(state: State, scale: float | Tensor, where: str | Path) -> FirstStage:
    """A first stage from a state without prefix, of diffusers or the released code."""
    if "encoder.conv_in.weight" not in state or "post_quant_conv.weight" not in state:
        raise UserError(f"{where}: holds no autoencoder with a KL latent")
    config = read_config(state)
    stage = FirstStage(config, float(scale))
    names = autoencoder_names(stage.autoencoder.state_dict())
    if any(name.startswith("encoder.down.") for name in state):
        known = set(names.values())
        # a bare autoencoder file of that code holds its training loss too
        state = from_released({k: v for k, v in state.items() if k in known}, names)
    else:
        state = modern_names(state)
    check_fits(stage.autoencoder.state_dict(), state, where)
    stage.autoencoder.load_state_dict(state)
    return stage.eval()


def _prefix(state: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the autoencoder's own names in a checkpoint."""
    found = [k.removesuffix("encoder.conv_in.weight") for k in state if k.endswith("encoder.conv_in.weight")]
    for name in ("first_stage_model.", ""):
        if name in found:
            return name
    if ours := [prefix for prefix in found if prefix.endswith("autoencoder.")]:
        return min(ours, key=len)
    raise UserError(f"{path}: holds no autoencoder; expected a checkpoint with first_stage_model.* or *.autoencoder.*")
