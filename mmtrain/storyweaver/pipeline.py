"""The parts of a model like Stable Diffusion, read from and written to folders in diffusers' layout.

Nothing is fetched and no code of a file is run: weights are safetensors, or .bin files read as weights only.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.parts import (
    OBJECTIVES,
    SCHEDULE,
    read_objective,
    read_text_encoder,
    read_unet,
    read_vae,
    save_model,
    save_text_encoder,
    save_tokenizer,
    write_json,
)
from mmtrain.storyweaver.tokenizer import read_tokenizer

if TYPE_CHECKING:  # importing these takes seconds
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclass
class Components:
    """What draws a picture of a text, each part in evaluation mode.

    Args:
        unet: predicts on latents [B, C, h, w] at a time with text features [B, L, text_width].
        vae: pictures [B, 3, H, W] in [-1, 1] to latents and back, with the interface of AutoencoderKL.
        text_encoder: token ids [B, L] to features.
        tokenizer: of the text encoder.
        objective: what the UNet predicts: "eps" the noise, "v" the velocity.
    """

    unet: "UNet2DConditionModel"
    vae: "AutoencoderKL | PatchAutoencoder"
    text_encoder: "CLIPTextModel"
    tokenizer: "CLIPTokenizer"
    objective: str = "eps"

    @property
    def factor(self) -> int:
        """Pixels of a picture per latent, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def text_width(self) -> int:
        """Width of the text features."""
        return self.text_encoder.config.hidden_size


def load_components(
    path: str | Path, where: str = "pipeline", dtype: str | torch.dtype | None = None, **single_file: Any
) -> Components:
    """Read a model from a folder in diffusers' layout, or from a single file with the names of latent diffusion.

    Args:
        path: a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/, or a .safetensors or .ckpt file.
        where: the setting that named it, for messages.
        dtype: of all weights, such as "bfloat16"; float32 if None, whatever the files have.
        single_file: what a single file does not tell, see `mmtrain.storyweaver.single_file.read_single_file`.

    Raises:
        UserError: no such folder or file, a part is missing, damaged or of another kind, parts do not fit together,
            or the noise schedule is not Stable Diffusion's.
    """
    path = Path(path)
    try:
        if path.is_dir():
            components = _read_folder(path)
        elif path.is_file():
            from mmtrain.storyweaver.single_file import read_single_file

            components = read_single_file(path, **single_file)
        else:
            raise UserError(f"{path}: no such folder or file; expected a folder in diffusers' layout or a single file")
        check_sizes(components.unet, components.vae, components.text_encoder, components.tokenizer, path)
        chosen = as_dtype(dtype)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for part in (components.unet, components.vae, components.text_encoder):
        nn.Module.to(part, chosen).eval()  # diffusers' own `to` warns of what does not concern these models
    return components


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A floating-point type by its name in torch; float32 for None.

    Raises:
        UserError: no such type.

    >>> as_dtype("bfloat16"), as_dtype(None)
    (torch.bfloat16, torch.float32)
    """
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    chosen = known.get(dtype or "float32") if not isinstance(dtype, torch.dtype) else dtype
    if chosen not in known.values():
        raise UserError(f"dtype: {dtype!r}, expected one of {', '.join(known)}")
    return chosen


def _read_folder(folder: Path) -> Components:
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        inside = folder / "pipeline"
        hint = f"; did you mean {inside}?" if inside.is_dir() else f", expected {', '.join(PARTS)}"
        raise UserError(f"{folder}: has no folder {' and no '.join(missing)}{hint}")
    for extra in ("text_encoder_2", "transformer"):
        if (folder / extra).is_dir():
            raise UserError(f"{folder}: has a {extra}, expected a model like Stable Diffusion 1.x")
    return Components(
        read_unet(folder / "unet"),
        read_vae(folder / "vae"),
        read_text_encoder(folder / "text_encoder"),
        read_tokenizer(folder / "tokenizer"),
        read_objective(folder / "scheduler"),
    )


def check_sizes(unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, where: str | Path) -> None:
    """Refuse parts that do not fit together.

    Raises:
        UserError: names both parts and their sizes.
    """
    text, latents = text_encoder.config, vae.config.latent_channels
    for key, other, theirs in (
        ("cross_attention_dim", "text_encoder.hidden_size", text.hidden_size),
        ("in_channels", "vae.latent_channels", latents),
        ("out_channels", "vae.latent_channels", latents),
    ):
        own = unet.config[key]
        if set(own if isinstance(own, list | tuple) else [own]) != {theirs}:
            raise UserError(f"{where}: unet.{key} is {own}, but {other} is {theirs}: they do not fit together")
    if len(tokenizer) > text.vocab_size:
        raise UserError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows {text.vocab_size}")
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{where}: the tokenizer's model_max_length is {tokenizer.model_max_length}, the text encoder takes "
            f"{text.max_position_embeddings} tokens"
        )
    # the text encoder pools at this token; at 2, as old files have it, at the highest one
    end, pools = tokenizer.eos_token_id, text.eos_token_id
    if pools != end and (pools != 2 or end != len(tokenizer) - 1):
        raise UserError(f"{where}: text_encoder.eos_token_id is {pools}, but the tokenizer's end token is {end}")


def save_pipeline(components: Components, folder: str | Path) -> Path:
    """Write a folder that `diffusers.DiffusionPipeline.from_pretrained` opens as a StableDiffusionPipeline.

    With a `PatchAutoencoder` it opens after `import mmtrain.storyweaver.patch_autoencoder`: diffusers takes classes
    from modules that are imported, it does not import a module because a file names it.

    Args:
        folder: new, or one whose parts are replaced, each at once; other files in it stay.

    Returns:
        The folder.

    Raises:
        UserError: a network has adapters; see `mmtrain.storyweaver.lora_files.merge_into`.
    """
    from diffusers import DDIMScheduler

    folder = Path(folder)
    for part in ("unet", "text_encoder"):
        if any(".lora_" in name for name in getattr(components, part).state_dict()):
            raise UserError(f"{folder}: the {part} has adapters (LoRA): take them into a copy without them first")
    predicts = {ours: theirs for theirs, ours in OBJECTIVES.items()}[components.objective]
    schedule = SCHEDULE | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name in ("unet", "vae"):
            save_model(getattr(components, name), part / name)
        save_text_encoder(components.text_encoder, part / "text_encoder")
        save_tokenizer(components.tokenizer, part / "tokenizer")
        DDIMScheduler(**schedule, prediction_type=predicts).save_pretrained(str(part / "scheduler"))
        write_json(part / "model_index.json", _index(components.vae))
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(part / name, folder / name)
        os.replace(part / "model_index.json", folder / "model_index.json")
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _index(vae: nn.Module) -> dict[str, Any]:
    """model_index.json of a StableDiffusionPipeline without safety checker."""
    import diffusers

    library = "diffusers" if type(vae).__module__.startswith("diffusers.") else type(vae).__module__
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": [library, type(vae).__name__],
    }
