"""The weight files of a pipeline's parts: found in their folders, read, and put into networks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.weight_files import check_fits, read_weights


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
