"""Reading our own checkpoints of this room, weights only."""

import pickle
from pathlib import Path
from typing import Any

import torch

from mmtrain.config_errors import UserError


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
    stored = checkpoint.get("settings", {}).get("model.class", "unknown") if isinstance(checkpoint, dict) else "unknown"
    if stored != f"{kind.__module__}.{kind.__qualname__}":
        raise UserError(f"{path}: is a checkpoint of {stored}, expected one of {kind.__module__}.{kind.__qualname__}")
    return checkpoint
