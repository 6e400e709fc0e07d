"""What our own checkpoints of this room tell: which model they are of, how it was trained, on whose latents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from mmtrain.checkpoint import training_record
from mmtrain.config_errors import UserError
from mmtrain.difffoley.first_stage import FirstStage, load_first_stage, read_config
from mmtrain.video_audio import ClipFormat, check_same
from mmtrain.weight_files import check_fits, naming, read_checkpoint

CLASS = "model_class"  # key under which our modules of this room name themselves
FEATURES = "features_from"  # key under which they keep the description of the extractor of their features


def read_file(path: str | Path, where: str) -> dict[str, Any]:
    """Content of a checkpoint file of any layout, tensors and plain types only, on the CPU.

    Args:
        where: the setting that named the file, for messages.

    Raises:
        UserError: no such file, not readable, or one that holds code.
    """
    with naming(where):
        return read_checkpoint(path)


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a file was written by a training of ours, and so tells its settings."""
    return (
        "hyper_parameters" in content and "pytorch-lightning_version" in content and trained_class(content) is not None
    )


def class_path(kind: type) -> str:
    """The class as a config names it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def trained_class(checkpoint: Mapping[str, Any]) -> str | None:
    """The class path of the model that a checkpoint was made of; None if it does not tell."""
    return checkpoint.get(CLASS) or checkpoint.get("settings", {}).get("model.class")


def check_class(checkpoint: Mapping[str, Any], kind: type, where: str = "ckpt_path: the checkpoint") -> None:
    """Refuse a checkpoint of another model; one that does not tell passes.

    Raises:
        UserError: names both.
    """
    stored = trained_class(checkpoint)
    if stored is not None and stored not in map(class_path, kind.__mro__):
        raise UserError(f"{where}: is of {stored}, expected one of {class_path(kind)}")


def accept(module: pl.LightningModule, checkpoint: Mapping[str, Any], setting: str) -> None:
    """Take over what a checkpoint tells of its training, before its weights are loaded.

    Args:
        module: has `format`, `data_features`, and gets `trained` and `features_from`.
        setting: an attribute of the module that must be as in training.

    Raises:
        UserError: it is of another model, of clips that were cut otherwise, of another `setting` or another CAVP.
    """
    check_class(checkpoint, type(module))
    theirs, own = checkpoint.get("hyper_parameters", {}), getattr(module, setting)
    if theirs.get("format"):
        check_same(module.format, theirs["format"], "ckpt_path")
    if theirs.get(setting, own) != own:
        raise UserError(
            f"ckpt_path: the checkpoint was trained with {setting} {theirs[setting]}, this model has {own}; give the "
            "config that it was trained with"
        )
    check_features(module.data_features, checkpoint.get(FEATURES), "data.features")
    module.trained, module.features_from = training_record(checkpoint), checkpoint.get(FEATURES)


def check_has_first_stage(first_stage: Any, stage: str, resumed: bool) -> None:
    """Refuse to train on the latents of a first stage whose weights came from nowhere.

    Args:
        first_stage: the setting, or what was given in its place.
        stage: of the trainer.
        resumed: whether a checkpoint, which holds one, is still to be loaded.

    Raises:
        UserError: none was given.
    """
    if stage == "fit" and first_stage is None and not resumed:
        raise UserError("first_stage: none is given, so the latents would be those of random weights: name its file")


def frozen_first_stage(given: str | Path | Mapping[str, Any] | None) -> FirstStage:
    """The first stage inside a model of the second: frozen, in evaluation mode.

    Args:
        given: its checkpoint in any layout of `load_first_stage`; arguments of `autoencoder_config`'s result, for
            fresh weights that a checkpoint then fills; or None for Stable Diffusion's sizes.
    """
    with naming("first_stage"):
        made = FirstStage(given) if given is None or isinstance(given, Mapping) else load_first_stage(given)
    return made.requires_grad_(False).eval()


def first_stage_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of the first stage that a model's state of ours carries as `first_stage.*`."""
    prefix = "first_stage.autoencoder."
    return read_config({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})


def check_first_stage(theirs: FirstStage, own: FirstStage | None, where: str) -> None:
    """Refuse a model that was trained on the latents of another first stage.

    Raises:
        UserError: the fingerprints differ.
    """
    if own is not None and (found := theirs.fingerprint()) != (expected := own.fingerprint()):
        raise UserError(
            f"{where}: was trained on the latents of another first_stage (weights {found}, this model's {expected}): "
            "give both the same first_stage"
        )


def data_features(data: Any, format: ClipFormat) -> dict[str, Any] | None:
    """Description of the extractor of a data module's features; None if it does not tell.

    Raises:
        UserError: its clips were cut otherwise, or its features are of a CAVP for other frames.
    """
    if isinstance(theirs := getattr(data, "format", None), ClipFormat):
        check_same(format, theirs, "data")
    extractor = dict(getattr(data, "hparams", {})).get("features")
    if not isinstance(extractor, dict):
        return None
    for name in ("fps", "frame_size"):
        theirs, ours = extractor.get(name), getattr(format, name)
        if theirs is not None and theirs != ours:
            raise UserError(
                f"data.features: are of a CAVP that was trained with format.{name} {theirs}, this stage has {ours}: "
                "give both the same"
            )
    return extractor


def check_features(given: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, where: str) -> None:
    """Refuse features of another CAVP than a model was trained with; what is not known passes.

    Args:
        given, expected: descriptions of extractors, see `CavpFeatures.describe`.
        where: what brings the given ones.

    Raises:
        UserError: names what differs.
    """
    for name in ("sha", "fps", "frame_size", "width"):
        theirs, ours = (given or {}).get(name), (expected or {}).get(name)
        if theirs is not None and ours is not None and theirs != ours:
            raise UserError(
                f"{where}: has features of another CAVP ({name} {theirs}) than the model was trained with ({ours}): "
                "give the same to all stages"
            )


def own_network(state: Mapping[str, Tensor], network: nn.Module, where: str) -> dict[str, Tensor]:
    """What a model of ours holds as `network.*`.

    Raises:
        UserError: it does not fit the network.
    """
    own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
    check_fits(network.state_dict(), own, where)
    return own
