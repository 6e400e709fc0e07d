"""Weights for CAVP: the released file, ours, and the Kinetics and PANNs networks that its encoders start from."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor, nn

from mmtrain.checkpoint import AtomicCheckpointIO, first_names, state_difference
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import read_file
from mmtrain.ema import ema_weights

State = dict[str, Tensor]
STEM = "video_encoder.conv1.conv.weight"  # what stands before it is the prefix of all keys
PANNS_UNUSED = ("spectrogram_extractor.", "logmel_extractor.", "bn0.", "fc_audioset.")
PANNS_FRESH = ("bn.", "final_project.")  # CAVP's own layers: they stay as initialised


@dataclass(frozen=True)
class CavpSizes:
    """What the weights tell of the network's size; arguments of `CavpNetwork`."""

    width: int
    audio_width: int
    feature_dim: int
    mel_bins: int


def read_cavp(path: str | PathLike, where: str = "pretrained") -> tuple[State, dict[str, Any]]:
    """State of a CAVP network and the settings that the file was trained with.

    Layouts: ours (Lightning; averaged weights where it has any), the released one ({"state_dict": {"module. ..."}}), or
    a bare state dict.

    Args:
        where: the setting that named the file, for messages.

    Returns:
        the weights under the names of `CavpNetwork`, and the stored hyper-parameters, empty for a released file.

    Raises:
        UserError: no such file, not readable without code, or no CAVP.
    """
    content = read_file(path, where)
    tensors = ema_weights(content) if "state_dict" in content else content
    prefixes = [key.removesuffix(STEM) for key in tensors if key.endswith(STEM)]
    if not prefixes:
        raise UserError(f"{where}: {path}: holds no CAVP, no {STEM} among its keys ({first_names(list(tensors))})")
    prefix = min(prefixes, key=len)
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return state, dict(content.get("hyper_parameters", {}))


def cavp_sizes(state: State, path: str | PathLike = "") -> CavpSizes:
    """Sizes of the network that a state is of.

    Raises:
        UserError: a tensor that tells a size is missing.
    """
    try:
        return CavpSizes(
            width=len(state[STEM]),
            audio_width=len(state["spec_encoder.conv_block1.conv1.weight"]),
            feature_dim=len(state["video_project_head.weight"]),
            mel_bins=len(state["spec_encoder.bn.weight"]),
        )
    except KeyError as error:
        raise UserError(f"{path}: is not a whole CAVP, {error.args[0]} is missing") from error


def fit(network: nn.Module, state: State, path: str | PathLike, where: str, fresh: tuple[str, ...] = ()) -> None:
    """Load a state strictly, but for keys that begin with one of `fresh`, which keep their values.

    Raises:
        UserError: keys or shapes that do not fit; the network is untouched then.
    """
    own = network.state_dict()
    kept = {key: value for key, value in own.items() if key.startswith(fresh)} if fresh else {}
    state = {key: value for key, value in state.items() if key not in kept} | kept
    if difference := state_difference({key: value.shape for key, value in own.items()}, state):
        raise UserError(f"{where}: {path}: does not fit the network: {difference}; width, audio_width: as in the file?")
    network.load_state_dict(state)


def load_cavp_weights(network: nn.Module, path: str | PathLike, where: str = "pretrained") -> None:
    """Load a whole CAVP, the released file or one of ours, into a `CavpNetwork` of its sizes.

    Raises:
        UserError: see `read_cavp` and `fit`.
    """
    fit(network, read_cavp(path, where)[0], path, where)


def load_kinetics(video_encoder: nn.Module, path: str | PathLike, where: str = "kinetics") -> None:
    """Start the video encoder from mmaction's SlowOnly-R50 4x16x1 of Kinetics-400; its classifier is dropped.

    Args:
        video_encoder: a `SlowOnly` of width 64.
        path: mmaction's file, {"state_dict": {"backbone. ..."}}.

    Raises:
        UserError: no such file, not readable without code, or another network.
    """
    content = read_file(path, where)
    tensors = content.get("state_dict", content)
    state = {key.removeprefix("backbone."): v for key, v in tensors.items() if not key.startswith("cls_head.")}
    fit(video_encoder, state, path, where)


def load_panns(spec_encoder: nn.Module, path: str | PathLike, where: str = "panns") -> list[str]:
    """Start the spectrogram encoder from PANNs' Cnn14_16k.

    Its spectrogram, its norm bn0 of 64 mel bins and its classifier have no place here; `bn` and `final_project` are
    CAVP's own and keep their values.

    Args:
        spec_encoder: a `Cnn14` of width 64.
        path: PANNs' file, {"model": state}, or the state alone.

    Returns:
        the keys that stay as initialised.

    Raises:
        UserError: no such file, not readable without code, or another network.
    """
    content = read_file(path, where)
    tensors = content.get("model", content)
    state = {key: value for key, value in tensors.items() if not key.startswith(PANNS_UNUSED)}
    fit(spec_encoder, state, path, where, fresh=PANNS_FRESH)
    return [key for key in spec_encoder.state_dict() if key.startswith(PANNS_FRESH)]


def export_cavp(state: State, path: str | PathLike) -> None:
    """Write weights of a `CavpNetwork` in the released layout, {"state_dict": {"module. ..."}}, whole or not at all."""
    state = {f"module.{key}": value.detach().cpu() for key, value in state.items()}
    AtomicCheckpointIO().save_checkpoint({"epoch": 0, "name": "CAVP", "state_dict": state}, path)
