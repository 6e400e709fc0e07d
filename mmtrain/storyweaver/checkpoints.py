"""Checkpoints that hold the trained part only, and what they must share with the model that takes them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmtrain.checkpoint import AtomicCheckpointIO, plain, state_difference, training_record
from mmtrain.config_errors import UserError, clip
from mmtrain.ema import ema_weights, trainable
from mmtrain.story import World, describe_world, world_from

if TYPE_CHECKING:
    from mmtrain.storyweaver.module import StoryDiffusion
    from mmtrain.storyweaver.pipeline import Components

CLASS, WORLD, BASE, SIZE = "model_class", "world", "base", "picture_size"  # keys in a checkpoint
SAMPLING_ONLY = ("sampling_alpha", "form")  # settings of guidance that training does not depend on
SAMPLES = 16  # numbers of each tensor that a fingerprint looks at


def fingerprint(network: nn.Module) -> str:
    """16 hexadecimal digits of names, shapes and a few numbers of each tensor: milliseconds at any size.

    It tells models apart, not two copies of which one was changed on purpose in a few places.
    """
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        rows = value.detach().reshape(-1)
        picked = rows[:: max(1, len(rows) // SAMPLES)].to("cpu", torch.float32)
        digest.update(f"{name} {tuple(value.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_base(components: "Components") -> dict[str, Any]:
    """What a model was made from, as plain types; to be taken before adapters are added or anything is trained."""
    config = components.unet.config
    return plain(
        {
            "unet": fingerprint(components.unet),
            "text_encoder": fingerprint(components.text_encoder),
            "vae": fingerprint(components.vae),
            "channels": list(config.block_out_channels),
            "text_width": config.cross_attention_dim,
            "objective": components.objective,
        }
    )


def trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict that training changes."""
    names = trainable(module)
    return {name: value for name, value in state.items() if name in names}


def read_checkpoint(path: str | Path, where: str) -> dict[str, Any]:
    """Content of a checkpoint of this room.

    Args:
        where: the setting that named it.

    Raises:
        UserError: no such file, one that cannot be read, or one of another kind of model.
    """
    try:
        content = AtomicCheckpointIO().load_checkpoint(path)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('ckpt_path: ')}") from error
    if CLASS not in content or BASE not in content:
        raise UserError(f"{where}: {path}: is not of a story model of ours")
    return content


def start_from(module: "StoryDiffusion", path: str | Path) -> None:
    """Load the trained part of one of our checkpoints: its average, if it has one.

    Raises:
        UserError: see `read_checkpoint` and `check_fits`.
    """
    where = f"pretrained: {path}"
    content = read_checkpoint(path, "pretrained")
    check_fits(module, content, where)
    module.load_state_dict(ema_weights(content), strict=False)


def describe_training(module: "StoryDiffusion") -> dict[str, Any]:
    """What a checkpoint tells besides weights and settings."""
    return {
        CLASS: class_path(type(module)),
        BASE: module.base,
        WORLD: None if module.world is None else plain(describe_world(module.world)),
        SIZE: None if module.picture_size is None else list(module.picture_size),
    }


def accept(module: "StoryDiffusion", checkpoint: Mapping[str, Any], is_resumed: bool) -> None:
    """Take over what a checkpoint tells of its training, before its weights are loaded.

    Args:
        is_resumed: the training goes on, so guidance must be as it was too.

    Raises:
        UserError: it does not fit the model, or is of another world.
    """
    where = "ckpt_path: the checkpoint"
    check_fits(module, checkpoint, where)
    if is_resumed:
        check_guidance(checkpoint.get("hyper_parameters", {}), module.hparams, where)
    check_world(checkpoint.get(WORLD), module.world, where)
    module.trained = training_record(checkpoint)
    if module.world is None and checkpoint.get(WORLD):
        module.world = world_from(checkpoint[WORLD])
    module.picture_size = module.picture_size or tuple(checkpoint.get(SIZE) or ()) or None


def check_fits(module: "StoryDiffusion", checkpoint: Mapping[str, Any], where: str) -> None:
    """Refuse a checkpoint of another class or base model, or with other trained tensors.

    Raises:
        UserError: names what differs.
    """
    own = class_path(type(module))
    if checkpoint.get(CLASS, own) != own:
        raise UserError(f"{where}: is of {checkpoint[CLASS]}, expected one of {own}")
    check_base(checkpoint.get(BASE), module.base, where, frozen_unet=module.trains != "full")
    expected = {name: parameter.shape for name, parameter in trainable(module).items()}
    if difference := state_difference(expected, checkpoint["state_dict"]):
        raise UserError(
            f"{where}: has other trained tensors than this model: {difference}; give the model.trains, model.lora and "
            "model.guidance.encoder that it was trained with"
        )


def check_base(stored: Mapping[str, Any] | None, own: Mapping[str, Any], where: str, frozen_unet: bool) -> None:
    """Refuse what was trained on another pipeline.

    Args:
        stored, own: of `describe_base`.
        frozen_unet: the checkpoint holds no UNet, so the pipeline's must be the same one.

    Raises:
        UserError: names the part.
    """
    if stored is None:
        raise UserError(f"{where}: does not tell which pipeline it was trained on: it is not of a story model of ours")
    for part in own:
        if part == "unet" and not frozen_unet:
            continue
        if stored.get(part) != own[part]:
            raise UserError(
                f"{where}: was trained on another pipeline ({part} {clip(stored.get(part))}, this one has "
                f"{clip(own[part])}): set model.pipeline to the one that it was trained on"
            )


def check_world(stored: Mapping[str, Any] | None, world: World | None, where: str) -> None:
    """Refuse a model that was customised to other characters than those of the data.

    Raises:
        UserError: names the first difference.
    """
    if stored is None or world is None:
        return
    own = plain(describe_world(world))
    for key in ("name", "style"):
        if stored[key] != own[key]:
            raise UserError(f"{where}: is of a world with {key} {stored[key]!r}, data has {own[key]!r}")
    theirs, ours = stored["characters"], own["characters"]
    for name in dict.fromkeys([*theirs, *ours]):
        if theirs.get(name) is None or ours.get(name) is None:
            has, lacks = ("the checkpoint", "data") if name in theirs else ("data", "the checkpoint")
            raise UserError(
                f"{where}: {has} has a character {name!r}, {lacks} does not: give the world of its training"
            )
        if list(theirs[name]) != list(ours[name]):
            raise UserError(
                f"{where}: {name} was {clip(theirs[name][1], 160)}, is {clip(ours[name][1], 160)} in data: "
                "a model knows its characters by their words, so give those of its training"
            )


def check_guidance(stored: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse to go on training with another spatial guidance; what only sampling uses may differ.

    Raises:
        UserError: names the setting.
    """
    theirs, ours = ({"guidance": None} | dict(given) for given in (stored, own))
    theirs, ours = ({"given": given["guidance"] is not None, **(given["guidance"] or {})} for given in (theirs, ours))
    for key in ours:
        if key not in SAMPLING_ONLY and theirs.get(key, ours[key]) != ours[key]:
            raise UserError(f"{where}: was trained with guidance.{key} {theirs[key]}, this model has {ours[key]}")


def class_path(kind: type) -> str:
    """The class as a config names it."""
    return f"{kind.__module__}.{kind.__qualname__}"
