"""Reading weights from files of any origin, without running code from them."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmtrain.checkpoint import state_difference
from mmtrain.config_errors import UserError

STRIP = (
    "python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c.get('state_dict', c)}}, 'weights.ckpt')\""
)


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Begin the message of a UserError from inside with the setting that named the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Content of a .safetensors or PyTorch file, on the CPU, read as weights only.

    Raises:
        UserError: no such file, damaged, or one that needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; train it first, or give its path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if not culprit:
            raise UserError(f"{path}: refused, it is damaged, no checkpoint, or needs code to be read") from error
        raise UserError(
            f"{path}: refused, it holds {culprit[1]} besides weights, and reading that would run code. If you trust "
            f"the file, write its weights alone where its own code is installed, and give that file:\n"
            + STRIP.format(path=path)
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise UserError(f"{path}: damaged, or no checkpoint ({reason})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a checkpoint")
    return dict(content)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, of its `state_dict` where it has one.

    Raises:
        UserError: as `read_checkpoint`, or no tensor in it.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no weights")
    return state


def folder_weights(folder: Path, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and configuration of a diffusers model: of `folder` itself, or of its subfolder `part`.

    Raises:
        UserError: no such model there.
    """
    folder = folder / part if (folder / part / "config.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json there, nor in a folder {part}; expected a model of diffusers")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name), json.loads((folder / "config.json").read_text())
    raise UserError(f"{folder}: has a config.json, but no diffusion_pytorch_model.safetensors or .bin")


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse a state whose names or shapes are not those of a network.

    Raises:
        UserError: says how they differ.
    """
    if difference := state_difference({key: value.shape for key, value in own.items()}, state):
        raise UserError(f"{where}: does not fit this network: {difference}")
