"""A story model's settings: what is refused before anything is loaded, and how they are described in results."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.checkpoint import plain
from mmtrain.config_errors import UserError

if TYPE_CHECKING:
    from mmtrain.storyweaver.guidance import GuidanceSettings
    from mmtrain.storyweaver.module import StoryDiffusion

WHAT_A_PIPELINE_IS = (
    "name a folder in diffusers' layout (unet/, vae/, text_encoder/, tokenizer/, scheduler/) or a single-file "
    "checkpoint of a model like Stable Diffusion 1.5. Its weights are not shipped"
)


def check_settings(
    pipeline: str, trains: str, caption_dropout: float, snr_gamma: float | None, noise_offset: float
) -> None:
    """Raises UserError: no pipeline, or a value out of range."""
    if not pipeline:
        raise UserError(f"pipeline: none is given; {WHAT_A_PIPELINE_IS}")
    if not Path(pipeline).exists():
        raise UserError(f"pipeline: {pipeline}: no such folder or file; {WHAT_A_PIPELINE_IS}")
    if trains not in ("lora", "full"):
        raise UserError(f"trains: {trains!r}, must be lora or full")
    if not 0 <= caption_dropout <= 1:
        raise UserError(f"caption_dropout: {caption_dropout}, must be in [0, 1]")
    if snr_gamma is not None and snr_gamma <= 0:
        raise UserError(f"snr_gamma: {snr_gamma}, must be above 0, or null for no weights")
    if noise_offset < 0:
        raise UserError(f"noise_offset: {noise_offset}, must be 0 or more")


def backbone(module: "StoryDiffusion") -> str:
    """What the results call the network."""
    levels = "-".join(map(str, module.unet.config.block_out_channels))
    text = " and text encoder" if module.trains == "lora" and module.lora.text_encoder else ""
    trained = "all weights" if module.trains == "full" else f"LoRA of rank {module.lora.rank}{text}"
    return f"UNet {levels}, {module.components.objective}, {trained}"


def guidance_words(own: "GuidanceSettings | None") -> str:
    """How the spatial guidance is set, in words."""
    if own is None:
        return "none"
    return f"{own.encoder}, {own.heads} heads, alpha {own.alpha:g} in training, {own.sampling_alpha:g} in sampling"


def sampling_words(module: "StoryDiffusion") -> str:
    """How pictures are drawn, in words."""
    own, guidance = module.sampler, module.guidance
    spatial = guidance_words(None if guidance is None else guidance.settings)
    return f"sampler {own.name}, {own.steps} steps, scale {own.scale:g}; spatial guidance: {spatial}"


def sampling_about(module: "StoryDiffusion") -> dict[str, Any]:
    """All that a drawn picture depends on besides weights, frame and seed, as plain types."""
    return plain(
        {
            "method": module.method,
            "model": backbone(module),
            "base": module.base,
            "sampler": module.sampler,
            "guidance": None if module.guidance is None else module.guidance.settings,
            "text": module.prompts.settings,
            "picture_size": list(module.picture_size or ()),
        }
    )


def world_parameters(module: "StoryDiffusion") -> int:
    """Parameters that the stories of a world need: UNets, adapters, text encoder, encoders of latents and of guidance.

    Like the paper's "# Params/DB" without the autoencoder's decoder (see `mmtrain.storyweaver.parameters`). Where each
    character has a UNet of its own, the base model's is not needed and what they share counts once.
    """
    copies = list(getattr(module, "networks", {}).values())
    encoders = [getattr(module.vae, name, None) for name in ("encoder", "quant_conv")]
    parts = [*(copies or [module.unet]), module.text_encoder, module.guidance, *encoders]
    return sum(p.numel() for p in {p for part in parts if part is not None for p in part.parameters()})
