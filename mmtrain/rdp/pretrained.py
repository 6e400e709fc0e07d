"""Reading and writing the layout of the released RDP and Diffusion Policy checkpoints (spec sections 2, 3 and 10).

A released file is a PyTorch file {"cfg", "state_dicts": {"model", "ema_model", "optimizer"}, "pickles"}. A policy's
names are `model.*` (UNet), `obs_encoder.*` and `normalizer.params_dict.*`; those of a tokenizer, which has a file of
its own, begin with `encoder.`, `decoder.`, `quant.` and so on. Files are read weights-only.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmtrain.checkpoint import AtomicCheckpointIO, first_names, state_difference
from mmtrain.config_errors import UserError
from mmtrain.ema import ema_weights
from mmtrain.normaliser import STATISTICS, image_affine
from mmtrain.rdp.networks import ConditionalUnet1D, TokenizerNetwork
from mmtrain.rdp.observation_encoder import group_norm_resnet18, is_tactile

State = dict[str, Tensor]
# empty tensors by which the released modules tell their device
DUMMIES = ("_dummy_variable", "obs_encoder._dummy_variable", "mask_generator._dummy_variable")
NORMALISER = "normalizer.params_dict."
LATENT = (f"{NORMALISER}latent_action.", f"{NORMALISER}latent.")  # the released name and ours
STRIP = (
    "python -c \"import torch, dill; c = torch.load('{path}', pickle_module=dill, map_location='cpu', "
    "weights_only=False); torch.save({{'state_dicts': {{k: v for k, v in c['state_dicts'].items() "
    "if k != 'optimizer'}}}}, 'weights.ckpt')\""
)


def load_policy_state(path: str | PathLike, ema: bool = True, image_norm: str | None = None) -> State:
    """State of a released policy under the names of our modules: `model.`, `obs_encoder.`, `normalizer.`.

    Normalisers of pictures are left out: the observation encoder does their part.

    Args:
        ema: the averaged weights, if the file has them; they are what the paper evaluates.
        image_norm: the observation encoder's, which must be the one that the file was trained with; None does not ask.

    Raises:
        UserError: no such file, one that needs code to be read, a tokenizer's, names or shapes that are not those of a
            policy of any size, or pictures normalised in another way.
    """
    dicts = _state_dicts(path)
    state = _tensors(dicts["ema_model"] if ema and "ema_model" in dicts else dicts.get("model"), path)
    state = {key: value for key, value in state.items() if key not in DUMMIES}
    state = {key.replace(*LATENT) if key.startswith(LATENT[0]) else key: value for key, value in state.items()}
    _check_image_norm(state, image_norm, path)
    pictures = {f"{NORMALISER}{key}." for key in picture_keys(state)}
    state = {key: value for key, value in state.items() if not key.startswith(tuple(pictures))}
    _check_policy(state, path)
    return state


def load_tokenizer_state(path: str | PathLike) -> State:
    """State of a released tokenizer under the names of our module: `network.` and, if it has any, `normalizer.`.

    Raises:
        UserError: no such file, one that needs code to be read, or names or shapes that are not those of a tokenizer
            of any size.
    """
    dicts = _state_dicts(path)
    state = _tensors(dicts.get("ema_model", dicts.get("model")), path)
    network, normaliser = _split(state, NORMALISER)
    _check_tokenizer(network, path)
    return {f"network.{key}": value for key, value in network.items()} | normaliser


def fit_into(module: nn.Module, state: State, path: str | PathLike) -> None:
    """Load a state that `load_policy_state` or `load_tokenizer_state` gave into a policy or tokenizer.

    Every network weight must be there. Normalisers that the file lacks stay as they are; so does a policy's tokenizer.

    Raises:
        UserError: names or shapes differ, for instance because the file is of another task.
    """
    ours = {key: value.shape for key, value in module.state_dict().items() if not key.startswith("tokenizer.")}
    wanted = {key: shape for key, shape in ours.items() if not key.startswith("normalizer.") or key in state}
    if difference := state_difference(wanted, state):
        raise UserError(f"{path}: does not fit this model (another task, touch, vision or preset?): {difference}")
    module.load_state_dict(state, strict=False)


def picture_keys(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the pictures that a policy's observation encoder has a network for, sorted."""
    found = (re.match(r"obs_encoder\.key_model_map\.([^.]+)\.", key) for key in state)
    return sorted({match[1] for match in found if match})


def _state_dicts(path: str | PathLike) -> Mapping[str, Any]:
    """`state_dicts` of a released file; a bare state dict counts as its "model"."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if not culprit:
            raise UserError(f"{path}: refused, it is damaged, no checkpoint, or needs code to be read") from error
        raise UserError(
            f"{path}: refused, it holds {culprit[1]} besides weights, and reading that would run code. If you trust "
            "the file, write its weights alone where RDP's own environment is installed, and give that file:\n"
            + STRIP.format(path=path)
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no checkpoint ({reason})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a checkpoint dictionary")
    if "pytorch-lightning_version" in content:
        raise UserError(
            f"{path}: is a checkpoint of ours, expected a released one; `mmtrain export` writes that layout"
        )
    return content.get("state_dicts", {"model": content})


def _tensors(nested: Any, path: str | PathLike, prefix: str = "") -> State:
    """Names and tensors of a state dict, which may hold one state dict for each part."""
    if not isinstance(nested, Mapping):
        raise UserError(f"{path}: holds no state dict under state_dicts.model or state_dicts.ema_model")
    state: State = {}
    for key, value in nested.items():
        if isinstance(value, Tensor):
            state[prefix + key] = value
        elif isinstance(value, Mapping) and "optimizer" not in key:
            state |= _tensors(value, path, f"{prefix}{key}.")
    return state


def _split(state: State, prefix: str) -> tuple[State, State]:
    """What does not begin with a prefix, and what does."""
    inside = {key: value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in state.items() if key not in inside}, inside


def _check_policy(state: State, path: str | PathLike) -> None:
    """Refuse names or shapes that are not those of a policy, whatever its sizes."""
    networks, normaliser = _split(state, NORMALISER)
    try:
        step_dim = state["model.diffusion_step_encoder.1.weight"].shape[1]
        film_dim = state["model.mid_modules.0.cond_encoder.1.weight"].shape[1]
        first = "model.down_modules.{}.0.blocks.0.block.0.weight"
        levels = [state[first.format(i)] for i in range(len(state)) if first.format(i) in state]
        dims, kernel = tuple(level.shape[0] for level in levels), levels[0].shape[2]
        channels = state["model.final_conv.1.weight"].shape[0]
        with torch.device("meta"):
            expected = ConditionalUnet1D(channels, film_dim - step_dim, step_dim, dims, kernel).state_dict()
    except (KeyError, IndexError) as error:
        hint = "; it looks like a tokenizer's file" if "decoder.rnn.weight_ih_l0" in state else ""
        raise UserError(f"{path}: holds no RDP or Diffusion Policy, {error} is missing{hint}") from error
    expected = {f"model.{key}": value for key, value in expected.items()}
    for picture in picture_keys(state):
        with torch.device("meta"):
            encoder = group_norm_resnet18((0, 0)).state_dict()
        expected |= {f"obs_encoder.key_model_map.{picture}.{key}": value for key, value in encoder.items()}
    _check(expected, networks, normaliser, path)


def _check_image_norm(state: State, image_norm: str | None, path: str | PathLike) -> None:
    """The normaliser of a camera tells: the released code takes ImageNet's mean and deviation from what it gives."""
    for key in picture_keys(state):
        scale = state.get(f"{NORMALISER}{key}.scale")
        if image_norm is None or scale is None or is_tactile(key):
            continue
        trained = "reference" if bool((scale == 2).all()) else "corrected"
        if image_norm != trained:
            raise UserError(f"{path}: was trained with image_norm {trained}, this model has {image_norm}; set that one")


def _check_tokenizer(state: State, path: str | PathLike) -> None:
    try:
        action_dim, width = state["decoder.fc.weight"].shape
        encoder_channels = state["encoder.encoder.2.weight"].shape[0]
        quantizer = "vq" if "quant.weight" not in state else "kl"
        latent_dim = state["quant.weight"].shape[0] // 2 if quantizer == "kl" else encoder_channels
        # of condition + touch only the sum shows; the shapes are the same however it is split
        horizon, inputs = 4, state["decoder.rnn.weight_ih_l0"].shape[1]
        symmetric = state["encoder.encoder.0.weight"].shape[1] - action_dim
        with torch.device("meta"):
            expected = TokenizerNetwork(
                action_dim, inputs - encoder_channels, encoder_channels, latent_dim, horizon, width, quantizer
            ).state_dict()
    except KeyError as error:
        hint = "; it looks like a policy's file" if "model.final_conv.1.weight" in state else ""
        raise UserError(f"{path}: holds no RDP tokenizer, {error} is missing{hint}") from error
    if symmetric:
        raise UserError(f"{path}: its encoder takes {symmetric} numbers besides the action; no released tokenizer does")
    _check(expected, state, {}, path)


def _check(expected: Mapping[str, Tensor], networks: State, normaliser: State, path: str | PathLike) -> None:
    if difference := state_difference({key: value.shape for key, value in expected.items()}, networks):
        raise UserError(f"{path}: not the released layout: {difference}")
    known = re.compile(re.escape(NORMALISER) + rf"[^.]+\.(scale|offset|input_stats\.({'|'.join(STATISTICS)}))")
    if unknown := [key for key in normaliser if not known.fullmatch(key)]:
        raise UserError(f"{path}: not the released layout: unknown normaliser entries ({first_names(unknown)})")


def export_policy(state: State, path: str | PathLike = "the checkpoint", image_norm: str = "corrected") -> State:
    """State of one of our policies in the released layout: with the normalisers of pictures, without the tokenizer.

    Args:
        image_norm: what the policy was trained with. The released code always takes ImageNet's mean and deviation from
            a camera's normalised pictures, so that for "corrected" ones these stay in [0, 1].

    Raises:
        UserError: naming `path`, for what the released code has no place for: a small picture encoder, or a
            normaliser that was never fitted.
    """
    state = {key: value for key, value in state.items() if not key.startswith("tokenizer.")}
    _check_fitted(state, path)
    pictures = picture_keys(state)
    if small := [key for key in pictures if f"obs_encoder.key_model_map.{key}.conv1.weight" not in state]:
        raise UserError(f"{path}: {', '.join(small)} has a small encoder; the released code has ResNet-18 alone")
    _check_policy(state, path)
    state = {key.replace(*reversed(LATENT)) if key.startswith(LATENT[1]) else key: v for key, v in state.items()}
    for key in pictures:
        stays = image_norm == "corrected" and not is_tactile(key)
        affine = image_affine()
        if stays:
            affine = affine._replace(scale=np.ones(1, np.float32), offset=np.zeros(1, np.float32))
        values = {"scale": affine.scale, "offset": affine.offset}
        values |= {f"input_stats.{name}": getattr(affine.stats, name) for name in STATISTICS}
        state |= {f"{NORMALISER}{key}.{name}": torch.from_numpy(value) for name, value in values.items()}
    return state | {key: torch.zeros(0) for key in DUMMIES if pictures or not key.startswith("obs_encoder")}


def export_tokenizer(state: State, path: str | PathLike = "the checkpoint") -> State:
    """State of our `Tokenizer` module in the released layout.

    Raises:
        UserError: naming `path`, for a tokenizer that the released code cannot hold, or that was never fitted.
    """
    _check_fitted(state, path)
    network = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    _check_tokenizer(network, path)
    return network | _split(state, NORMALISER)[1]


def _check_fitted(state: State, path: str | PathLike) -> None:
    if empty := [key for key, value in state.items() if key.endswith(".scale") and value.isnan().any()]:
        raise UserError(f"{path}: {empty[0]} was never fitted; export a checkpoint of a finished or running training")


def export(checkpoint: str | PathLike, out: str | PathLike, tokenizer: str | PathLike | None = None) -> dict[str, Any]:
    """Write one of our checkpoints in the released layout: {"state_dicts": {"model", "ema_model"}, "pickles": {}}.

    The released evaluation also reads a configuration from its files (`cfg`), which only its own code can make.

    Args:
        checkpoint: of a `Tokenizer`, `LatentDiffusionPolicy` or `DiffusionPolicy`.
        out: file to write, whole or not at all.
        tokenizer: for a latent policy, file to write the tokenizer inside it to.

    Returns:
        `kind`, `source`, `sha256` of the source, `keys` and `parameters` (counts).

    Raises:
        UserError: no such checkpoint, not one of ours, nothing to export it to, or `out` is the checkpoint.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such file")
    for target in (out, tokenizer):
        if target and Path(target).exists() and Path(target).samefile(checkpoint):
            raise UserError(f"{target}: is the checkpoint itself")
    content = AtomicCheckpointIO().load_checkpoint(checkpoint)
    raw, averaged = content["state_dict"], ema_weights(content)
    is_policy = "model.final_conv.1.weight" in raw
    given = {"image_norm": content.get("hyper_parameters", {}).get("image_norm", "corrected")} if is_policy else {}
    convert = partial(export_policy if is_policy else export_tokenizer, path=checkpoint, **given)
    states = {"model": convert(raw), "ema_model": convert(averaged)}
    inside = {key.removeprefix("tokenizer."): value for key, value in raw.items() if key.startswith("tokenizer.")}
    if tokenizer and not inside:
        raise UserError(f"{checkpoint}: has no tokenizer inside; leave --tokenizer out")
    with checkpoint.open("rb") as file:
        origin = {"source": checkpoint.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if not is_policy:
        states.pop("ema_model")  # as released: a tokenizer is not averaged
    _write(states, origin, out)
    if tokenizer:
        _write({"model": export_tokenizer(inside, checkpoint)}, origin, Path(tokenizer))
    weights = {key: value for key, value in states["model"].items() if not key.startswith("normalizer.")}
    parameters = sum(value.numel() for key, value in weights.items() if "_codebook" not in key)
    kind = "tokenizer" if not is_policy else "latent policy" if inside else "diffusion policy"
    return origin | {"kind": kind, "keys": len(states["model"]), "parameters": parameters}


def _write(states: dict[str, State], origin: dict[str, str], out: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dicts": states, "pickles": {}, "mmtrain": origin}, out)
