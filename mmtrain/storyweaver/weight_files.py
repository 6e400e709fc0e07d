"""Reading weights from files of any origin, without running code from them."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtrain.checkpoint import state_difference
from mmtrain.config_errors import UserError

STRIP = (
    "python -c \"import torch; c = torch.load('{path}', map_location='cpu', weights_only=False); "
    "torch.save({{'state_dict': c.get('state_dict', c)}}, 'weights.ckpt')\""
)


def read_content(path: str | Path) -> dict[str, Any]:
    """What a .safetensors or PyTorch file holds, on the CPU, read as weights only.

    Raises:
        UserError: no such file, damaged, or one that needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
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
        raise UserError(f"{path}: damaged, or no file of weights ({reason})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected weights by name")
    return dict(content)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, of its `state_dict` where it has one.

    Raises:
        UserError: as `read_content`, or no tensor in it.
    """
    content = read_content(path)
    state = content.get("state_dict", content)
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no weights")
    return state


def find_weights(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The files with a model's weights: safetensors before .bin, full precision before a variant such as fp16.

    Args:
        stems: names of the files without extension, such as "diffusion_pytorch_model".

    Returns:
        One file, or the parts that an index file lists.

    Raises:
        UserError: none there.
    """
    for extension in ("safetensors", "bin"):
        for stem in stems:
            plain = folder / f"{stem}.{extension}"
            if plain.is_file():
                return [plain]
            index = folder / f"{stem}.{extension}.index.json"
            if index.is_file():
                return _parts(index)
            variants = sorted(path for path in folder.glob(f"{stem}.*.{extension}") if "-of-" not in path.name)
            if variants:
                halves = [path for path in variants if path.name == f"{stem}.fp16.{extension}"]
                return [(halves or variants)[0]]
    raise UserError(
        f"{folder}: has no weights, expected {' or '.join(f'{stem}.safetensors' for stem in stems)} or .bin"
    )


def _parts(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weights") from error
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: names {outside[0]}, which is in another folder")
    return [index.parent / name for name in names]


def read_weight_files(files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files together.

    Raises:
        UserError: as `read_weights`.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_weights(file)
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Give a model, which may be empty (on the meta device), its weights, in their own types; each name must be there.

    Raises:
        UserError: names or shapes differ; says how.
    """
    check_fits(model.state_dict(), state, where)
    # copies: what safetensors reads is the file itself, mapped, which may be written anew while the model is in use
    model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse a state whose names or shapes are not those of a network.

    Raises:
        UserError: says how they differ.
    """
    if difference := state_difference({name: value.shape for name, value in own.items()}, state):
        raise UserError(f"{where}: does not fit the configuration: {difference}")
