"""Our checkpoints as folders that diffusers opens, whoever has it installed.

  StoryDiffusion, LoRA   the pipeline with the LoRA in its UNet; pytorch_lora_weights.safetensors is for the base model
  StoryDiffusion, full   the pipeline with the trained UNet
  a LoRA for each        the base pipeline, and lora/NAME.safetensors
  DreamBooth, full       the base pipeline, and unets/NAME; of one character alone, the pipeline with its UNet
and guidance.json, k_encoder.safetensors where there is guidance; characters.json where each has weights of its own.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError
from mmtrain.ema import ema_weights
from mmtrain.storyweaver.adapters import DEFAULT, LoraSettings, adapter_name
from mmtrain.storyweaver.checkpoints import BASE, CLASS, WORLD, check_base, describe_base, read_checkpoint
from mmtrain.storyweaver.guidance import GuidanceSettings
from mmtrain.storyweaver.lora_files import FILE, Parts, adapter_state, merge_into, write_lora
from mmtrain.storyweaver.parts import save_model, write_json
from mmtrain.storyweaver.pipeline import Components, load_components, save_pipeline
from mmtrain.storyweaver.weight_files import fill

State = dict[str, Tensor]

KINDS = {
    "mmtrain.storyweaver.module.StoryDiffusion": False,  # model_class -> has weights for each character
    "mmtrain.storyweaver.lora.LoraPerCharacter": True,
    "mmtrain.storyweaver.dreambooth.DreamBooth": True,
}
COPIES = "networks."  # DreamBooth's UNets, by character
ENCODER = "guidance.encoder."


def export(
    checkpoint: str | Path, out: str | Path, pipeline: str | Path | None = None, merge: bool = True
) -> dict[str, Any]:
    """Write one of our checkpoints, with its averaged weights where it has any, as a folder for diffusers.

    Args:
        checkpoint: of a `StoryDiffusion`, a `LoraPerCharacter` or a `DreamBooth`.
        out: folder to write, new or empty.
        pipeline: where the model is that it was trained on; where it was then if None.
        merge: take a LoRA into the UNet; else the pipeline is the base model's.

    Returns:
        `kind`, `keys` and `parameters` (counts of what was trained), `sha256` of the checkpoint.

    Raises:
        UserError: no such file, another model, there is something at `out`, or the pipeline is not the one.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    content = read_checkpoint(checkpoint, "export")
    kind = content[CLASS]
    if kind not in KINDS:
        raise UserError(f"{checkpoint}: is of {kind}, which has no layout for export; expected {', '.join(KINDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; a new folder is expected")
    hparams, state = content["hyper_parameters"], ema_weights(content)
    where = f"{checkpoint}: pipeline" if pipeline is None else "--pipeline"
    components = load_components(pipeline or hparams["pipeline"], where)
    is_full = hparams["trains"] == "full"
    check_base(content[BASE], describe_base(components), f"export: {checkpoint}", frozen_unet=not is_full)
    if not KINDS[kind]:
        _write_one(state, components, hparams, out, merge, checkpoint)
    else:
        names = list((content.get(WORLD) or {}).get("characters", {}))
        _write_each(state, components, hparams, out, names, checkpoint)
    _write_guidance(state, hparams, out)
    with checkpoint.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256").hexdigest()
    parameters = sum(value.numel() for value in state.values())
    return {"kind": kind.rpartition(".")[2], "keys": len(state), "parameters": parameters, "sha256": sha}


def updates_of(state: Mapping[str, Tensor], hparams: Mapping[str, Any], name: str = DEFAULT) -> Parts:
    """The updates of one adapter in a checkpoint: "unet" and, where it was trained too, "text_encoder"."""
    lora = settings(LoraSettings, hparams.get("lora"))
    scale = 1.0 if lora.alpha is None else lora.alpha / lora.rank
    parts = {}
    for part in ("unet", "text_encoder"):
        if found := adapter_state(without_prefix(state, part + "."), name, scale):
            parts[part] = found
    return parts


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> State:
    """The entries whose names begin so, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _write_one(
    state: State, components: Components, hparams: Mapping[str, Any], out: Path, merge: bool, checkpoint: Path
) -> None:
    """A model that draws all characters."""
    if hparams["trains"] == "full":
        fill(components.unet, without_prefix(state, "unet."), checkpoint)
        save_pipeline(components, out)
        return
    parts = updates_of(state, hparams)
    if not parts:
        raise UserError(f"{checkpoint}: holds no LoRA")
    for part, updates in parts.items() if merge else ():
        merge_into(getattr(components, part), updates, str(checkpoint))
    save_pipeline(components, out)
    write_lora(out / FILE, parts)


def _write_each(
    state: State, components: Components, hparams: Mapping[str, Any], out: Path, names: list[str], checkpoint: Path
) -> None:
    """A model with weights for each character."""
    copies = {name: found for name in names if (found := without_prefix(state, f"{COPIES}{adapter_name(name)}."))}
    loras = {name: found for name in names if (found := updates_of(state, hparams, adapter_name(name)))}
    if not copies and not loras:
        raise UserError(f"{checkpoint}: holds weights of no character of its world ({', '.join(names) or 'none'})")
    if len(copies) == 1:
        fill(components.unet, next(iter(copies.values())), checkpoint)
    save_pipeline(components, out)
    files = {}
    for name, parts in loras.items():
        files[name] = f"lora/{file_name(name)}.safetensors"
        write_lora(out / files[name], parts)
    for name, own in copies.items():
        files[name] = f"unets/{file_name(name)}" if len(copies) > 1 else "unet"
        if len(copies) > 1:
            fill(components.unet, own, checkpoint)
            save_model(components.unet, out / files[name])
    wording = {key: hparams[key] for key in ("prompt", "rare_token") if key in hparams}
    write_json(out / "characters.json", wording | {"characters": files})


def file_name(character: str) -> str:
    """A character's name as part of a path.

    >>> file_name("Mr. Bean/Teddy")
    'Mr_ Bean_Teddy'
    """
    return adapter_name(character).replace("/", "_").replace("\\", "_")


def _write_guidance(state: State, hparams: Mapping[str, Any], out: Path) -> None:
    if not hparams.get("guidance"):
        return
    write_json(out / "guidance.json", asdict(settings(GuidanceSettings, hparams["guidance"])))
    if encoder := without_prefix(state, ENCODER):
        tensors = {name: value.to("cpu", torch.float32).contiguous() for name, value in encoder.items()}
        save_file(tensors, out / "k_encoder.safetensors", metadata={"format": "pt"})
