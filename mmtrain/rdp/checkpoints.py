"""Reading our own checkpoints of this room, weights only, and what must agree: checkpoint, model and data."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmtrain.config_errors import UserError
from mmtrain.robot_tasks import PolicySpec


def is_released(path: str | Path) -> bool:
    """Whether a file is in the layout of the released checkpoints, as far as it can be read, and not one of ours."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # theirs hold code, of which `mmtrain.rdp.pretrained` tells how to strip it
        return True
    except (RuntimeError, EOFError, OSError):
        return False
    return isinstance(content, dict) and "pytorch-lightning_version" not in content


def read_checkpoint(path: str | Path, kind: type) -> dict[str, Any]:
    """A Lightning checkpoint of a module of ours, on the CPU.

    Args:
        kind: the module's class; a checkpoint of another class is refused.

    Raises:
        UserError: no such file, not readable, or of another class.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train it first, or give its path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({str(error).split('. ')[0]})") from error
    stored = trained_class(checkpoint) if isinstance(checkpoint, dict) else None
    if stored != class_path(kind):
        raise UserError(f"{path}: is a checkpoint of {stored or 'unknown'}, expected one of {class_path(kind)}")
    return checkpoint


def class_path(kind: type) -> str:
    """The class as a config names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def trained_class(checkpoint: Mapping[str, Any]) -> str | None:
    """The class path of the model that a checkpoint was made of; None if it does not tell."""
    named = checkpoint.get("settings", {}).get("model.class")
    return named or checkpoint.get("hyper_parameters", {}).get("_class_path")


def check_class(checkpoint: Mapping[str, Any], kind: type) -> None:
    """Refuse a checkpoint of another model; one that does not tell passes.

    Raises:
        UserError: names both.
    """
    stored = trained_class(checkpoint)
    if stored is not None and stored not in map(class_path, kind.__mro__):
        raise UserError(
            f"ckpt_path: is a checkpoint of {stored}, this model is {class_path(kind)}: "
            "give the config that it was trained with"
        )


def check_identity(theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str, owner: str, remedy: str) -> None:
    """Refuse weights that were trained with other settings of those that decide what the weights mean.

    Raises:
        UserError: names the first setting that differs, and both values.
    """
    for key in ours:
        if theirs[key] != ours[key]:
            raise UserError(f"{what} was trained with {key} {theirs[key]}, {owner} has {ours[key]}; {remedy}")


def check_data(spec: PolicySpec, data: Any, names: tuple[str, ...]) -> None:
    """Refuse a data module whose windows are another policy's; one that has no `spec` passes.

    Raises:
        UserError: names the first setting that differs, and both values.
    """
    given = getattr(data, "spec", spec)
    for name in names:
        if getattr(given, name) != getattr(spec, name):
            raise UserError(
                f"data.{name}: {getattr(given, name)}, but the model has {getattr(spec, name)}; give both the same"
            )
