"""Reading and writing the released layouts of Diff-Foley's second stage (arXiv 2306.17203), and Stable Diffusion's.

A released diffusion checkpoint holds `model.diffusion_model.*`, `cond_stage_model.*`, `first_stage_model.*` and 12
vectors of the schedule, 949 tensors; a released classifier `model.*`, `cond_model.*`, `scale_factor`, the vectors and,
where it serves as a metric, `first_stage_model.*`. The first stage is read by `mmtrain.difffoley.first_stage`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.checkpoint import AtomicCheckpointIO, first_names, settings
from mmtrain.config_errors import UserError, say_once
from mmtrain.difffoley.checkpoints import first_stage_config, own_network, read_file, trained_class
from mmtrain.difffoley.first_stage import FirstStage
from mmtrain.difffoley.layouts import State, autoencoder_names, from_released, to_released, unet_names
from mmtrain.difffoley.networks import AlignmentNetwork, FoleyUNet, network_settings
from mmtrain.difffoley.pretrained_cavp import export_cavp, read_cavp
from mmtrain.ema import ema_weights
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.video_audio import ClipFormat
from mmtrain.weight_files import check_fits, folder_weights, naming, read_weights

UNET, UNET_CONDITION = "model.diffusion_model.", "cond_stage_model."
CLASSIFIER, CLASSIFIER_CONDITION = "model.", "cond_model."
FIRST_STAGE = "first_stage_model."


def load_foley_unet(network: FoleyUNet, path: str | Path) -> None:
    """Load UNet and embedder of a released diffusion checkpoint; `null_token` stays as it is.

    Raises:
        UserError: no such file, no such checkpoint, or another size.
    """
    state = read_weights(path)
    check_has(state, UNET, path, "Diff-Foley's diffusion model")
    check_has(state, UNET_CONDITION, path, "Diff-Foley's diffusion model (is it Stable Diffusion's own?)")
    check_plain(network, path)
    load_unet_weights(network.unet, state, UNET, path)
    load_embedder(network.embedder, state, UNET_CONDITION, path)


def load_alignment_network(network: AlignmentNetwork, path: str | Path) -> None:
    """Load a released alignment classifier, of guidance or of the metric.

    Raises:
        UserError: no such file, no such checkpoint, or another size.
    """
    state = read_weights(path)
    check_has(state, CLASSIFIER_CONDITION, path, "a released alignment classifier")
    check_has(state, CLASSIFIER + "classifier.", path, "a released alignment classifier")
    check_plain(network, path)
    released = from_released(state, unet_names(classifier_weights(network)), CLASSIFIER)
    check_fits(classifier_weights(network), released, path)
    network.load_state_dict(released, strict=False)
    load_embedder(network.embedder, state, CLASSIFIER_CONDITION, path)


def export_ldm(
    network: FoleyUNet, first_stage: FirstStage, schedule: Mapping[str, Tensor], where: str | Path = "export"
) -> State:
    """State in the layout of the released diffusion checkpoint.

    It has no place for `null_token`: with a network that was trained with that null condition, the released code can
    sample without guidance only.

    Args:
        schedule: the 12 vectors, see `mmtrain.noise_schedule`.
        where: the file, for messages.

    Raises:
        UserError: the network has condition channels or scaled features, which the released one does not know.
    """
    check_plain(network, where)
    unet = network.unet.state_dict()
    return {
        **schedule,
        **to_released(unet, unet_names(unet), UNET),
        **export_first_stage(first_stage),
        **{UNET_CONDITION + name: value for name, value in network.embedder.state_dict().items()},
    }


def export_alignment(
    network: AlignmentNetwork,
    first_stage: FirstStage,
    schedule: Mapping[str, Tensor],
    has_first_stage: bool,
    where: str | Path = "export",
) -> State:
    """State in the layout of a released classifier.

    Args:
        schedule, where: as in `export_ldm`.
        has_first_stage: the metric's file holds the first stage, that of guidance only its factor.

    Raises:
        UserError: the network has condition channels or scaled features, which the released one does not know.
    """
    check_plain(network, where)
    own = classifier_weights(network)
    return {
        "scale_factor": first_stage.scale_factor,
        **schedule,
        **(export_first_stage(first_stage) if has_first_stage else {}),
        **to_released(own, unet_names(own), CLASSIFIER),
        **{CLASSIFIER_CONDITION + name: value for name, value in network.embedder.state_dict().items()},
    }


def export_first_stage(first_stage: FirstStage) -> State:
    """State of the autoencoder in the released layout, `first_stage_model.*`."""
    state = first_stage.autoencoder.state_dict()
    return to_released(state, autoencoder_names(state), FIRST_STAGE)


def export(checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write one of our checkpoints, with its averaged weights where it has any, in the layout of the released ones.

    Args:
        checkpoint: of a `Cavp`, a `LatentDiffusion` or an `AlignmentClassifier`.
        out: file to write, whole or not at all.

    Returns:
        `kind`, `keys` and `parameters` (counts), and `sha256` of the source.

    Raises:
        UserError: no such file, another model, what the released networks do not have, or `out` is the checkpoint.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise UserError(f"{out}: is the checkpoint itself")
    content = read_file(checkpoint, "export")
    kind = (trained_class(content) or "").rpartition(".")[2]
    if kind == "Cavp":
        state, _ = read_cavp(checkpoint, "export")
        export_cavp(state, out)
    elif kind == "LatentDiffusion":
        state = _released_ldm(content, checkpoint)
        write_released(state, out)
    elif kind == "AlignmentClassifier":
        state = _released_alignment(content, checkpoint)
        write_released(state, out)
        kind += f" ({'guidance' if content['hyper_parameters']['noisy'] else 'metric'})"
    else:
        raise UserError(f"{checkpoint}: is of {kind or 'unknown kind'}, which was not released: there is no layout")
    with checkpoint.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    parameters = sum(value.numel() for value in state.values() if value.is_floating_point())
    return {"kind": kind, "keys": len(state), "parameters": parameters, "sha256": sha}


def _released_ldm(content: Mapping[str, Any], path: Path) -> State:
    state, hparams = ema_weights(content), content["hyper_parameters"]
    stage = _first_stage_of(state, path)
    network = FoleyUNet(**network_settings(hparams["network"], settings(ClipFormat, hparams["format"]), stage.factor))
    network.load_state_dict(own_network(state, network, path))
    if hparams["objective"] != "eps":
        raise UserError(
            f"{path}: was trained with objective {hparams['objective']}, the released code samples eps alone"
        )
    if hparams["null_condition"] == "learned" and hparams["condition_dropout"]:
        say_once(
            f"{path}: has a learned null token, for which the released layout has no place: the released code can "
            "sample it without guidance only"
        )
    return export_ldm(network, stage, NoiseSchedule().released_buffers(), path)


def _released_alignment(content: Mapping[str, Any], path: Path) -> State:
    state, hparams = ema_weights(content), content["hyper_parameters"]
    network, stage = AlignmentNetwork(**(hparams["network"] or {})), _first_stage_of(state, path)
    network.load_state_dict(own_network(state, network, path))
    return export_alignment(network, stage, NoiseSchedule().released_buffers(), not hparams["noisy"], path)


def _first_stage_of(state: Mapping[str, Tensor], path: Path) -> FirstStage:
    stage = FirstStage(first_stage_config(state))
    if (channels := stage.autoencoder.config.in_channels) != 3:
        raise UserError(f"{path}: the first stage has {channels} input channel(s), the released code gives it 3")
    prefix = "first_stage."
    stage.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return stage


def write_released(state: State, path: str | Path) -> None:
    """Write a state so that the released code can read it."""
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "global_step": 0}, path)


def init_from_stable_diffusion(network: FoleyUNet, path: str | Path) -> list[str]:
    """Start a network from Stable Diffusion v1, as the release does; returns and says what stays fresh.

    The text encoder is not read, and of a file with averaged weights those that are not averaged are taken. Weights of
    `conv_in` for condition channels become 0, so the network begins as if it had none.

    Args:
        path: a diffusers folder (the UNet's, or one with a `unet` folder) or a single file, such as
            sd-v1-4-full-ema.ckpt.

    Raises:
        UserError: no such file or folder, or a UNet of another size.
    """
    path = Path(path)
    own = network.unet.state_dict()
    with naming("stable_diffusion"):
        if path.is_dir():
            state, _ = folder_weights(path, "unet")
        else:
            state = read_weights(path)
            check_has(state, UNET, path, "Stable Diffusion")
            state = from_released(state, unet_names(own), UNET)
        pad_conv_in(state, own)
        check_fits(own, state, path)
    network.unet.load_state_dict(state)
    fresh = [name for name in network.state_dict() if not name.startswith("unet.")]
    say_once(f"UNet from {path}; not in it, so fresh: {first_names(fresh)}")
    return fresh


def pad_conv_in(state: State, own: Mapping[str, Tensor]) -> None:
    """Widen a `conv_in` to the input channels that a network has beside the latent's, with zeros."""
    name = "conv_in.weight"
    if name in state and (missing := own[name].shape[1] - state[name].shape[1]) > 0:
        rest = state[name].new_zeros(len(state[name]), missing, *state[name].shape[2:])
        state[name] = torch.cat([state[name], rest], 1)


def load_unet_weights(unet: nn.Module, state: Mapping[str, Tensor], prefix: str, path: str | Path) -> None:
    """Load a UNet of diffusers from released names with a prefix, each weight."""
    own = unet.state_dict()
    released = from_released(state, unet_names(own), prefix)
    check_fits(own, released, path)
    unet.load_state_dict(released)


def load_embedder(embedder: nn.Module, state: Mapping[str, Tensor], prefix: str, path: str | Path) -> None:
    """Load a condition embedder, whose names are the released ones."""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    check_fits(embedder.state_dict(), own, path)
    embedder.load_state_dict(own)


def classifier_weights(network: AlignmentNetwork) -> State:
    """What a released classifier has under `model.`."""
    return {name: value for name, value in network.state_dict().items() if not name.startswith("embedder.")}


def check_has(state: Mapping[str, Tensor], prefix: str, path: str | Path, what: str) -> None:
    """Refuse a file of something else.

    Raises:
        UserError: no name begins so.
    """
    if not any(name.startswith(prefix) for name in state):
        raise UserError(f"{path}: is no checkpoint of {what}: it has no {prefix}*, but {first_names(list(state))}")


def check_plain(network: FoleyUNet | AlignmentNetwork, where: str | Path) -> None:
    """Refuse what the released networks do not have.

    Raises:
        UserError: condition channels or scaled features.
    """
    if network.frame_condition is not None:
        raise UserError(f"{where}: network.condition_channels must be 0, the released networks have none")
    if network.embedder.feature_scale != 1.0:
        raise UserError(f"{where}: network.feature_scale must be 1, the released networks take features as they are")
