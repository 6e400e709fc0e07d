"""Reading every checkpoint layout around RankCLIP, and writing one that open_clip loads (spec section 6).

All files are read weights-only: one that needs code to be read is refused. TorchScript archives (OpenAI's release)
are the exception by nature, for they are programs; torch.jit runs those in its own interpreter, not in Python.
"""

import argparse
import hashlib
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtrain.checkpoint import AtomicCheckpointIO, first_names, state_difference
from mmtrain.config_errors import UserError
from mmtrain.rankclip.networks import register

GUESSED = ("ViT-B-32-quickgelu", "RN50-quickgelu")
# sizes in OpenAI's archives, and the constant causal mask that TorchScript keeps although it is no weight
DROPPED = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# module: DDP; model: a LightningModule of the RankCLIP users; network: ours; _orig_mod: torch.compile
WRAPPED_LOGIT_SCALE = re.compile(r"((?:(?:module|model|network|_orig_mod)\.)*)logit_scale")

State = dict[str, Tensor]


def read_state_dict(path: str | os.PathLike) -> tuple[State, dict[str, Any]]:
    """Read a checkpoint in any layout of section 6 to open_clip's names and float32.

    Layouts: "trainer" (epoch, name, state_dict, optimizer: RankCLIP, CyCLIP, open_clip), "lightning" (ours and
    others'), "export" (ours), "bare" (a plain state dict: ALIP, open_clip), "torchscript" (OpenAI), "safetensors".
    Wrapper prefixes (`module.`, `model.`, `network.`, ...) are guessed from the keys; keys outside the prefix, such
    as buffers of a loss, are left out.

    Returns:
        the tensors on the CPU, and what the file tells about itself: `layout`, `prefix`, `architecture` (name stored
        by us, or None) and `quick_gelu` (True or False where the file settles the activation, otherwise None).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the file, if it needs code to be read, cannot be read, or holds no CLIP model.
    """
    path = Path(path)
    content, layout = _read(path)
    tensors = content.get("state_dict", content)
    if not isinstance(tensors, Mapping) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path}: holds no state dict (a mapping of names to tensors)")
    prefix = _guess_prefix(tensors, path)
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    state = {k: v.float() if v.is_floating_point() else v for k, v in inside.items() if k not in DROPPED}
    architecture = _stored_architecture(content)
    quick_gelu = has_quick_gelu(architecture) if architecture else True if layout == "torchscript" else None
    return state, {"layout": layout, "prefix": prefix, "architecture": architecture, "quick_gelu": quick_gelu}


def _read(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return the content of a checkpoint file and the name of its layout."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), "safetensors"
        if _is_torchscript(path):
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # OpenAI's files stay TorchScript
                return torch.jit.load(path, map_location="cpu").state_dict(), "torchscript"
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if culprit := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path}: refused, it needs code to be read ({culprit[1]}), not only weights") from error
        raise ValueError(f"{path}: refused, it is damaged, no checkpoint, or needs code to be read") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, SafetensorError, KeyError, ValueError) as error:
        reason = str(error).split(". ")[0] or type(error).__name__
        raise ValueError(f"{path}: damaged, or no checkpoint ({reason})") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a checkpoint dictionary")
    if "pytorch-lightning_version" in content:
        return content, "lightning"
    if "mmtrain" in content:
        return content, "export"
    return content, "trainer" if "state_dict" in content else "bare"


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _guess_prefix(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Return what stands before `logit_scale`, the one name that all CLIP models have at their root."""
    prefixes = [match[1] for key in tensors if (match := WRAPPED_LOGIT_SCALE.fullmatch(key))]
    if not prefixes:
        raise ValueError(f"{path}: not a CLIP model, no logit_scale among its keys ({first_names(list(tensors))})")
    return max(prefixes, key=len)


def _stored_architecture(content: Mapping[str, Any]) -> str | None:
    """Return the architecture that we wrote into a Lightning checkpoint or an export."""
    for key in ("mmtrain", "hyper_parameters"):
        stored = content.get(key)
        if isinstance(stored, Mapping) and isinstance(stored.get("architecture"), str):
            return stored["architecture"]
    return None


def has_quick_gelu(architecture: str) -> bool:
    """Return whether an open_clip architecture uses x * sigmoid(1.702 x); by its name if open_clip does not know it."""
    architecture = register(architecture)
    config = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
    return bool(config.get("quick_gelu")) if config else "quickgelu" in architecture.lower()


@lru_cache(maxsize=8)
def _expected_shapes(architecture: str) -> dict[str, torch.Size] | None:
    """Return the names and shapes of an architecture, None if it is not one of open_clip's own CLIP class."""
    config = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
    if not config or config.get("custom_text") or "hf_model_name" in config["text_cfg"]:
        return None
    if "timm_model_name" in config["vision_cfg"]:
        return None
    with torch.device("meta"):
        return {key: value.shape for key, value in CLIP(**config).state_dict().items()}


def guess_architecture(state: State) -> str:
    """Return "ViT-B-32-quickgelu" or "RN50-quickgelu", whichever has exactly these names and shapes.

    The weights do not show the activation: ALIP's files have the same shapes and belong to the names without
    "-quickgelu".

    Raises:
        ValueError: if neither fits, with the differences from the nearer one.
    """
    name = GUESSED[0] if "visual.proj" in state else GUESSED[1]
    if difference := state_difference(_expected_shapes(name), state):
        raise ValueError(f"neither of {' and '.join(GUESSED)}; from {name} it differs by {difference}")
    return name


def load_pretrained(network: nn.Module, path: str | os.PathLike, architecture: str | None = None) -> None:
    """Load a checkpoint of any layout into an open_clip network, strictly.

    Args:
        network: is left untouched if the file does not fit.
        path: see `read_state_dict`.
        architecture: open_clip name of `network`; without it the activation is looked up in its modules.

    Raises:
        ValueError: naming the file, for keys or shapes that do not fit, or if the file is known to come from a model
            with the other activation (GELU against QuickGELU loads without an error, and silently costs accuracy).
    """
    state, about = read_state_dict(path)
    if difference := state_difference({key: value.shape for key, value in network.state_dict().items()}, state):
        raise ValueError(f"{path}: does not fit the network: {difference}")
    if architecture is None:
        is_quick = any(isinstance(module, QuickGELU) for module in network.modules())
    else:
        is_quick = has_quick_gelu(architecture)
    if about["quick_gelu"] not in (None, is_quick):
        names = ("QuickGELU", "GELU") if about["quick_gelu"] else ("GELU", "QuickGELU")
        source = about["architecture"] or f"a {about['layout']} file"
        raise ValueError(
            f"{path}: trained with {names[0]} ({source}), but the network ({architecture or 'as given'}) uses "
            f"{names[1]}; choose the architecture {'with' if about['quick_gelu'] else 'without'} -quickgelu"
        )
    network.load_state_dict(state, strict=True)


def export(checkpoint: str | os.PathLike, out: str | os.PathLike, architecture: str | None = None) -> dict[str, Any]:
    """Write a checkpoint of any layout so that `open_clip.create_model(architecture, pretrained=out)` loads it.

    Args:
        checkpoint: see `read_state_dict`.
        out: file to write, whole or not at all.
        architecture: open_clip name; without it the one stored in the file, else guessed from the shapes. A bare
            state dict with `module.` is ALIP's layout, hence guessed without "-quickgelu".

    Returns:
        `architecture`, `source`, `sha256` of the source, `layout`, `keys` and `parameters` (counts).

    Raises:
        ValueError: if the weights do not fit the architecture, or `out` is the source or a .safetensors name.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if out.suffix == ".safetensors":
        raise ValueError(f"{out}: exports are PyTorch files, choose a name ending in .pt")
    if out.exists() and checkpoint.exists() and out.samefile(checkpoint):
        raise ValueError(f"{out}: is the checkpoint itself")
    state, about = read_state_dict(checkpoint)
    stored = about["architecture"]
    if architecture and stored and has_quick_gelu(architecture) != has_quick_gelu(stored):
        raise ValueError(f"{checkpoint}: was trained as {stored}, whose activation is not that of {architecture}")
    name = register(architecture or stored or _guess_for_export(state, about, checkpoint))
    expected = _expected_shapes(name)
    if expected and (difference := state_difference(expected, state)):
        raise ValueError(f"{checkpoint}: does not fit {name}: {difference}")
    with checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"architecture": name, "source": checkpoint.name, "sha256": sha256}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "mmtrain": origin}, out)
    parameters = sum(v.numel() for k, v in state.items() if v.is_floating_point() and ".running_" not in k)
    return origin | {"layout": about["layout"], "keys": len(state), "parameters": parameters}


def _guess_for_export(state: State, about: dict[str, Any], checkpoint: Path) -> str:
    try:
        name = guess_architecture(state)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}; name the architecture") from error
    is_alip = about["layout"] == "bare" and about["prefix"] == "module."
    return name.removesuffix("-quickgelu") if is_alip else name


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str]) -> int:
    """Run `mmtrain export CHECKPOINT OUT`; return 2 after one line on stderr if the user's input is at fault."""
    parser = _OneLineParser("mmtrain export", description="Write a checkpoint that open_clip.create_model loads.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="ours, RankCLIP's, CyCLIP's, ALIP's, OpenAI's, ...")
    parser.add_argument("out", metavar="OUT", help="file to write, e.g. rankclip.pt")
    parser.add_argument("--architecture", help="open_clip name; else the stored one, else guessed from the shapes")
    try:
        options = parser.parse_args(argv)
        done = export(options.checkpoint, options.out, options.architecture)
    except (ValueError, OSError, UserError) as error:
        print(f"mmtrain export: {error}", file=sys.stderr)
        return 2
    print(f"wrote         {options.out}")
    print(f"architecture  {done['architecture']}")
    print(f"layout        {done['layout']}")
    print(f"keys          {done['keys']}")
    print(f"parameters    {done['parameters']:,}")
    print(f"source sha256 {done['sha256']}")
    print(f"load it with  open_clip.create_model({done['architecture']!r}, pretrained={str(options.out)!r})")
    return 0
