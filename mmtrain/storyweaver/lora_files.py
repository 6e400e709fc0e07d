"""LoRA files of any spelling, and adapters taken into the weights that they change.

Here an update of a linear layer W [o, i] is W + B A with A [r, i] and B [o, r], under peft's names without the adapter:
`<module>.lora_A.weight`, `<module>.lora_B.weight`. Other files spell it otherwise and may scale it:
  diffusers     `unet.<module>.lora.down.weight`, `text_encoder.<module>.lora_linear_layer.down.weight`: not scaled
  kohya         `lora_unet_<module with _ for .>.lora_down.weight`, scaled by `.alpha` / r
  Mix-of-Show   {"unet": {"<module>.lora_down.weight"}, "text_encoder": ...}: one alpha for all, which multiplies
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmtrain.config_errors import UserError, nearest
from mmtrain.storyweaver.parts import TEXT_PREFIX
from mmtrain.weight_files import read_checkpoint

State = dict[str, Tensor]
Parts = dict[str, State]  # "unet" and perhaps "text_encoder" -> its updates

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
A, B = ".lora_A.weight", ".lora_B.weight"
SPELLINGS = {  # ending in a file -> ours
    ".lora.down.weight": A,
    ".lora.up.weight": B,
    ".lora_linear_layer.down.weight": A,
    ".lora_linear_layer.up.weight": B,
    ".lora_down.weight": A,
    ".lora_up.weight": B,
    "_lora.down.weight": A,  # diffusers before 2023: <module>.processor.to_q_lora
    "_lora.up.weight": B,
    A: A,
    B: B,
}
ALPHA = ".alpha"
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def adapter_state(state: Mapping[str, Tensor], name: str = "default", scale: float = 1.0) -> State:
    """One adapter out of the state of a network with peft's layers, or of a checkpoint of it.

    Args:
        state: `<module>.lora_A.<adapter>.weight` and others, which are left out.
        name: of the adapter.
        scale: alpha / rank, which goes into B.
    """
    found = {}
    for key, value in state.items():
        for ending, factor in ((A, 1.0), (B, scale)):
            theirs = ending.replace(".weight", f".{name}.weight")
            if key.endswith(theirs):
                found[key.removesuffix(theirs) + ending] = value if factor == 1 else value * factor
    return found


def to_diffusers(parts: Mapping[str, State]) -> State:
    """Updates under the names of diffusers' LoRA files, one state of all parts."""
    state = {}
    for part, updates in parts.items():
        kind, prefix = ("lora", "") if part == "unet" else ("lora_linear_layer", TEXT_PREFIX)
        for name, value in updates.items():
            module, way = (name.removesuffix(A), "down") if name.endswith(A) else (name.removesuffix(B), "up")
            state[f"{part}.{prefix}{module.removeprefix(prefix)}.{kind}.{way}.weight"] = value
    return state


def to_kohya(parts: Mapping[str, State]) -> State:
    """Updates under the names of kohya's files; alpha is the rank, so the scale 1."""
    state = {}
    for part, updates in parts.items():
        prefix = "" if part == "unet" else TEXT_PREFIX
        for name, value in updates.items():
            module = name.removesuffix(A).removesuffix(B)
            flat = KOHYA[part] + (prefix + module.removeprefix(prefix)).replace(".", "_")
            state[f"{flat}.{'lora_down' if name.endswith(A) else 'lora_up'}.weight"] = value
            if name.endswith(A):
                state[flat + ALPHA] = torch.tensor(float(len(value)))
    return state


def to_mix_of_show(parts: Mapping[str, State]) -> dict[str, State]:
    """Updates as Mix-of-Show nests them, for an alpha of 1."""
    endings = {A: ".lora_down.weight", B: ".lora_up.weight"}
    nested: dict[str, State] = {}
    for part, updates in parts.items():
        prefix = "" if part == "unet" else TEXT_PREFIX
        nested[part] = {
            prefix + name.removeprefix(prefix).removesuffix(ending) + theirs: value
            for ending, theirs in endings.items()
            for name, value in updates.items()
            if name.endswith(ending)
        }
    return nested


def from_any(content: Mapping[str, Any], modules: Mapping[str, Iterable[str]], where: str, alpha: float = 1.0) -> Parts:
    """Updates of a file of any spelling, with its scale in B.

    Args:
        content: names -> tensors; may be nested as Mix-of-Show does it, also under "params".
        modules: "unet" and "text_encoder" -> names of the network's modules, see `module_names`.
        where: the file, for messages.
        alpha: Mix-of-Show's, which is in no file.

    Raises:
        UserError: a name of no known spelling, of no such module, an update without its other half, or two shapes
            that do not belong together.
    """
    content = content.get("params", content)
    nested = [part for part in modules if isinstance(content.get(part), Mapping)]
    if nested:
        flat = {f"{part}.{name}": value for part in nested for name, value in content[part].items()}
    else:
        flat, alpha = {name: value for name, value in content.items() if isinstance(value, Tensor)}, 1.0
    places = {part: _places(part, names) for part, names in modules.items()}
    parts: Parts = {}
    scales: dict[tuple[str, str], float] = {}
    for name, value in flat.items():
        part, module, ending = _understood(name, places, where)
        if ending == ALPHA:
            scales[part, module] = float(value)
        else:
            parts.setdefault(part, {})[module + ending] = value
    for part, updates in parts.items():
        for module in {name.removesuffix(A).removesuffix(B) for name in updates}:
            down, up = updates.get(module + A), updates.get(module + B)
            if down is None or up is None:
                raise UserError(f"{where}: {part}.{module} has one half of an update only")
            if down.shape[0] != up.shape[1]:
                raise UserError(f"{where}: {part}.{module}: ranks {down.shape[0]} and {up.shape[1]} differ")
            scale = scales[part, module] / down.shape[0] if (part, module) in scales else alpha
            updates[module + B] = up if scale == 1 else up * scale
    if not parts:
        raise UserError(f"{where}: holds no LoRA")
    return parts


def _places(part: str, names: Iterable[str]) -> dict[str, str]:
    """What files call a module -> its name."""
    places = {}
    for name in names:
        plain = name.removeprefix(TEXT_PREFIX) if part != "unet" else name
        for prefix in ("", TEXT_PREFIX) if part != "unet" else ("",):
            places[prefix + plain] = places[KOHYA[part] + (prefix + plain).replace(".", "_")] = name
    return places


def _understood(name: str, places: Mapping[str, Mapping[str, str]], where: str) -> tuple[str, str, str]:
    """Part, module and ending of a name in a file."""
    ending = next((ending for ending in (*SPELLINGS, ALPHA) if name.endswith(ending)), None)
    if ending is None:
        raise UserError(f"{where}: {name} is no name of a LoRA that is known here")
    rest = name.removesuffix(ending).replace(".processor.", ".")
    if ending.startswith("_lora") and rest.endswith("to_out"):
        rest += ".0"
    for part, known in places.items():
        if (module := known.get(rest.removeprefix(part + "."))) is not None and _is_of(rest, part, places):
            return part, module, SPELLINGS.get(ending, ALPHA)
    near = nearest(rest, [f"{part}.{module}" for part, known in places.items() for module in known])
    raise UserError(f"{where}: {name} is of no module of {', '.join(places)}" + (f"; is it {near}?" if near else ""))


def _is_of(name: str, part: str, places: Iterable[str]) -> bool:
    """Whether a name with the prefix of a part is of this one; one without may be of any."""
    named = next((other for other in places if name.startswith(other + ".")), None)
    return named in (None, part)


def module_names(networks: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Names of the linear layers and convolutions of each network, adapters left out."""
    return {
        part: [
            name.removesuffix(".base_layer")
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and not re.search(r"\.lora_[AB]\.", name)
        ]
        for part, network in networks.items()
    }


def read_lora(path: str | Path, networks: Mapping[str, nn.Module], alpha: float = 1.0) -> Parts:
    """Updates of a LoRA file of any spelling, see `from_any`.

    Args:
        networks: "unet" and perhaps "text_encoder" -> what it is for.

    Raises:
        UserError: no such file, or it is not for these networks.
    """
    return from_any(read_checkpoint(path), module_names(networks), str(path), alpha)


def write_lora(path: str | Path, parts: Mapping[str, State]) -> Path:
    """Write a file that `pipe.load_lora_weights` of diffusers reads."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous().clone() for name, value in to_diffusers(parts).items()}
    save_file(state, path, metadata={"format": "pt"})
    return path


def add_lora(network: nn.Module, updates: Mapping[str, Tensor], name: str = "default", where: str = "lora") -> None:
    """Add an adapter with these updates to a UNet or a text encoder.

    Raises:
        UserError: updates of different ranks, of other shapes than the network's, or the name is taken.
    """
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {len(value) for key, value in updates.items() if key.endswith(A)}
    if len(ranks) != 1:
        raise UserError(f"{where}: has updates of ranks {sorted(ranks)}, expected one rank")
    targets = [key.removesuffix(A) for key in updates if key.endswith(A)]
    config = LoraConfig(r=min(ranks), lora_alpha=min(ranks), target_modules=targets)
    try:
        inject_adapter_in_model(config, network, name)  # transformers' own way refuses releases of peft that can do it
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: no adapter {name!r} can be added: {error}") from error
    own = dict(network.named_parameters())
    for key, value in updates.items():
        parameter = own[key.removesuffix(".weight") + f".{name}.weight"]
        if parameter.shape != value.shape:
            raise UserError(f"{where}: {key} has shape {list(value.shape)}, the network's is {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(value)


@torch.no_grad()
def merge_into(network: nn.Module, updates: Mapping[str, Tensor], where: str = "lora") -> None:
    """Add updates to the weights that they change: W + B A.

    Raises:
        UserError: an update of no such module, or of another shape.
    """
    for key, down in updates.items():
        if not key.endswith(A):
            continue
        name = key.removesuffix(A)
        try:
            weight = network.get_submodule(name).weight
        except AttributeError:
            raise UserError(f"{where}: {name} is no module of the network") from None
        change = updates[name + B].flatten(1).float() @ down.flatten(1).float()
        if change.numel() != weight.numel() or len(change) != len(weight):
            raise UserError(f"{where}: {name} has shape {list(weight.shape)}, its update {list(change.shape)}")
        weight += change.view_as(weight).to(weight)
