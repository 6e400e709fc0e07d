"""What goes into SpecVQGAN: spectrograms and features of the right length, and weights from files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from mmtrain.audio import preset
from mmtrain.checkpoint import flatten
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import check_class, is_ours, read_file
from mmtrain.difffoley.specvqgan import Vqgan
from mmtrain.difffoley.specvqgan_gpt import FeatureGpt, evenly_spaced
from mmtrain.weight_files import check_fits

MEL = preset("mel_specvqgan")
PARTS_OF_VQGAN = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def picture(mel: Tensor, frames: int) -> Tensor:
    """The middle `frames` of spectrograms [B, 80, F] in [0, 1] as pictures [B, 1, 80, frames] in [-1, 1].

    Raises:
        UserError: other bins, or fewer frames.
    """
    if mel.ndim != 3 or mel.shape[1] != MEL.n_mels or mel.shape[2] < frames:
        raise UserError(
            f"data: spectrograms are {list(mel.shape[1:])}, the model takes [{MEL.n_mels}, {frames}] of {MEL.name} or "
            "longer: give such data, or fewer model.frames"
        )
    begin = (mel.shape[2] - frames) // 2
    return 2 * mel[:, None, :, begin : begin + frames] - 1


def matching_features(features: Tensor, share: float, frames: int) -> Tensor:
    """So many features [B, frames, D] of the middle `share` of the clip, of those [B, T, D] of all of it."""
    kept = max(1, round(features.shape[1] * share))
    begin = (features.shape[1] - kept) // 2
    return evenly_spaced(features[:, begin : begin + kept], frames)


def check_frames(frames: int, network: Vqgan) -> None:
    """Refuse lengths that the network cannot halve often enough.

    Raises:
        UserError: names the setting.
    """
    if frames <= 0 or frames % network.factor or MEL.n_mels % network.factor:
        raise UserError(
            f"frames: {frames}, must be a positive multiple of the network's factor {network.factor}, which must "
            f"divide {MEL.n_mels} bins too"
        )


def read_codebook(path: str | Path, where: str, kind: type) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes {"frames", "network"} and weights of a codebook: ours, a released one, or that in a released transformer.

    Args:
        where: the setting that named the file, for messages.
        kind: the class of our own codebooks.

    Raises:
        UserError: no such file, or no codebook in it.
    """
    content = read_file(path, where)
    sizes, prefix = {"frames": 848, "network": {}}, ""
    if is_ours(content):
        check_class(content, kind, f"{where}: {path}")
        sizes, prefix = {name: content["hyper_parameters"][name] for name in sizes}, "network."
    state = content.get("state_dict", content)
    if any(name.startswith("first_stage_model.") for name in state):
        prefix = "first_stage_model."
    bare = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    weights = {name: value for name, value in bare.items() if name.startswith(PARTS_OF_VQGAN)}
    if not weights:
        raise UserError(f"{where}: {path}: holds no codebook (encoder.*, decoder.*, quantize.*)")
    return sizes, weights


def start_from(transformer: FeatureGpt, path: str | Path) -> None:
    """Load the `transformer.*` of a released checkpoint or of ours.

    Raises:
        UserError: no such file, or other sizes.
    """
    content = read_file(path, "pretrained")
    state = content.get("state_dict", content)
    own = {name.removeprefix("transformer."): value for name, value in state.items() if name.startswith("transformer.")}
    own = {name: value for name, value in own.items() if not name.endswith("attn.mask")}
    check_fits(transformer.state_dict(), own, f"pretrained: {path}")
    transformer.load_state_dict(own)


def check_sizes(checkpoint: Mapping[str, Any], module: pl.LightningModule, names: Sequence[str]) -> None:
    """Refuse a checkpoint of another class, or one that was trained with other values of these settings.

    Raises:
        UserError: names both.
    """
    check_class(checkpoint, type(module))
    theirs = checkpoint.get("hyper_parameters", {})
    for name in names:
        if name in theirs and flatten(theirs[name], name) != flatten(module.hparams[name], name):
            raise UserError(
                f"ckpt_path: the checkpoint was trained with {name} {theirs[name]}, this model has "
                f"{module.hparams[name]}: give the config that it was trained with"
            )
