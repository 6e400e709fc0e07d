"""A small text-to-picture model from scratch, for worlds where Stable Diffusion's weights cannot be had.

It has the parts of Stable Diffusion: a conditional UNet on latents, the text tower of a CLIP with CLIP's tokenizer, and
as the autoencoder a fixed patch code. When training ends they are written as a pipeline folder, which the customisation
methods start from as they would from Stable Diffusion.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.nn.functional import mse_loss

from mmtrain import distributed
from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.ema import TrainableEma
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.optim import AdamWSettings
from mmtrain.seeding import clip_noise, spread_times
from mmtrain.story import FrameBatch
from mmtrain.storyweaver.clip_text import text_encoder_of_clip
from mmtrain.storyweaver.figures import contact_sheet
from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder
from mmtrain.storyweaver.pipeline import Components, save_pipeline
from mmtrain.storyweaver.sampling import SamplerSettings, draw
from mmtrain.storyweaver.text import PromptEncoder, TextSettings
from mmtrain.storyweaver.tokenizer import clip_tokenizer
from mmtrain.weight_files import read_weights

OPTIM = {"lr": 1e-3, "weight_decay": 1e-2, "warmup_steps": 100}
PIPELINE = "pipeline"  # folder of the run that holds the model in diffusers' layout


@dataclass(frozen=True)
class BaseSizes:
    """Sizes of the UNet and of the patch code.

    Args:
        channels: of the UNet's levels, each with cross-attention.
        layers_per_block: residual blocks of a level.
        heads: of attention, in the UNet and in the text encoder.
        norm_groups: of the UNet's normalisation; divides all channels.
        latent_channels: of the patch code.
    """

    channels: tuple[int, ...] = (64, 96)
    layers_per_block: int = 1
    heads: int = 4
    norm_groups: int = 16
    latent_channels: int = 24


class TextToPicture(pl.LightningModule):
    """Trains the UNet, and if wanted the text encoder, on v-prediction; the patch code is fitted to the data.

    Batches: {"picture": uint8 [B, 3, H, W], "frames": FrameBatch, "id": int64 [B]}. The data module also has
    `pictures(count) -> uint8 [count, 3, H, W]`.

    Args:
        clip: checkpoint of a CLIP whose text tower is the text encoder, such as one of `mmtrain.rankclip.module.Clip`.
        sizes: of the other networks.
        train_text_encoder: go on training it; Stable Diffusion's stayed frozen.
        caption_dropout: share of pictures whose prompt is empty, which guidance needs.
        fit_pictures: pictures that the patch code is fitted to.
        optim: optimizer and schedule.
        sampler: how the pictures of an evaluation are drawn.
        sheet: how many of them.
    """

    paper = "storyweaver"
    method = "base"

    def __init__(
        self,
        clip: str,
        sizes: BaseSizes | None = None,
        train_text_encoder: bool = True,
        caption_dropout: float = 0.1,
        fit_pictures: int = 1000,
        optim: AdamWSettings | None = None,
        sampler: SamplerSettings | None = None,
        sheet: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        if not 0 <= caption_dropout < 1:
            raise UserError(f"caption_dropout: {caption_dropout} is not in [0, 1)")
        self.sizes, self.optim = settings(BaseSizes, sizes), settings(AdamWSettings, optim or OPTIM)
        self.sampler = settings(SamplerSettings, sampler or {"name": "ddim", "steps": 25, "scale": 3.0})
        self.caption_dropout, self.fit_pictures, self.sheet = caption_dropout, fit_pictures, sheet
        self.schedule = NoiseSchedule()
        self.text_encoder = text_encoder_of_clip(read_clip(clip), self.sizes.heads, f"clip: {clip}")
        self.text_encoder.requires_grad_(train_text_encoder)
        self.length = self.text_encoder.config.max_position_embeddings
        self.tokenizer = clip_tokenizer(model_max_length=self.length)
        self.unet = make_unet(self.sizes, self.text_encoder.config.hidden_size)
        self.vae = PatchAutoencoder(self.sizes.latent_channels).requires_grad_(False)
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"UNet {'-'.join(map(str, self.sizes.channels))}"

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.trainer.default_root_dir)

    def setup(self, stage: str) -> None:
        """Fit the patch code."""
        if stage == "fit" and not self.trainer.ckpt_path:  # else the code comes with the checkpoint
            pictures = self.trainer.datamodule.pictures(self.fit_pictures)
            kept = self.vae.fit(part.float() / 127.5 - 1 for part in pictures.split(100))
            rank_zero_info(f"the patch code keeps {kept:.1%} of the variance of {len(pictures)} pictures")

    def context(self, frames: FrameBatch, dropped: Tensor | None = None) -> Tensor:
        """Text features [B, L, W] of the prompts; those marked in `dropped` [B] are of the empty prompt."""
        prompts = [frame.prompt for frame in frames]
        if dropped is not None:
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        shape = {"padding": "max_length", "max_length": self.length, "truncation": True}
        tokens = self.tokenizer(prompts, **shape, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def latents(self, pictures: Tensor) -> Tensor:
        """Latents [B, C, h, w] of uint8 pictures."""
        with torch.no_grad():
            return self.vae.encode(pictures.to(self.device, torch.float32) / 127.5 - 1).latent_dist.mode()

    def errors(self, latents: Tensor, context: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error [B] of v."""
        noised = self.schedule.noised(latents, noise, t, "v")
        predicted = self.unet(noised, t, encoder_hidden_states=context).sample
        target = self.schedule.training_target(latents, noise, t, "v")
        return mse_loss(predicted.float(), target, reduction="none").mean((1, 2, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        latents = self.latents(batch["picture"])
        dropped = distributed.uniform(len(latents), latents.device) < self.caption_dropout
        t = self.schedule.draw_times(len(latents), "v", latents.device)
        loss = self.errors(latents, self.context(batch["frames"], dropped), distributed.normal_like(latents), t).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(latents))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss with the caption and without it, at noise and times that belong to the picture."""
        if "picture" not in batch:
            return
        name = self.trainer.datamodule.loader_names[dataloader_idx]
        latents, ids = self.latents(batch["picture"]), batch["id"]
        noise = clip_noise(ids, latents.shape[1:], device=latents.device)
        t = (spread_times(ids.cpu()) * self.schedule.train_steps).long().to(latents.device)
        loss = self.errors(latents, self.context(batch["frames"]), noise, t)
        empty = torch.ones(len(ids), dtype=torch.bool)
        without = self.errors(latents, self.context(batch["frames"], empty), noise, t)
        for key, values in (("loss", loss), ("loss_without_caption", without)):
            self.log(
                f"val/{name}/{key}", values.mean(), batch_size=len(ids), sync_dist=True, on_epoch=True,
                add_dataloader_idx=False,
            )  # fmt: skip
        if batch_idx == 0 and self.sheet and self.trainer.is_global_zero:
            self._draw_sheet(batch["frames"])

    def _draw_sheet(self, frames: FrameBatch) -> None:
        frames = list(frames)[: self.sheet]
        size = self.trainer.datamodule.picture_size
        prompts = PromptEncoder(self.tokenizer, self.text_encoder, TextSettings(), cache=False)
        pictures = draw(
            self.unet, self.vae, prompts, None, frames, [0], size, self.sampler, "v", batch_size=len(frames)
        )  # fmt: skip
        path = self.folder / "samples" / f"step_{self.trainer.global_step:06d}.png"
        contact_sheet(path, pictures, [frame.event for frame in frames], columns=4)

    @rank_zero_only
    def on_train_end(self) -> None:
        folder = self.write_pipeline(self.folder / PIPELINE)
        rank_zero_info(f"the model is in {folder}, in diffusers' layout")

    def write_pipeline(self, folder: Path) -> Path:
        """Write the model, with averaged weights where there are any, for `load_components`."""
        ema = next((c for c in self.trainer.callbacks if isinstance(c, TrainableEma)), None)
        raw = {name: p.detach().clone() for name, p in self.named_parameters()} if ema and ema.weights else {}
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if raw and name in ema.weights:
                    parameter.copy_(ema.weights[name])
            components = Components(self.unet, self.vae, self.text_encoder, self.tokenizer, "v")
            try:
                return save_pipeline(components, folder)
            finally:
                for name, parameter in self.named_parameters():
                    if name in raw:
                        parameter.copy_(raw[name])

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained = training_record(checkpoint)

    def chance_levels(self) -> dict[str, float]:
        """There is none for a loss."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {}


def make_unet(sizes: BaseSizes, text_width: int) -> torch.nn.Module:
    """A UNet2DConditionModel of Stable Diffusion's kind, with cross-attention at every level."""
    from diffusers import UNet2DConditionModel

    levels = len(sizes.channels)
    return UNet2DConditionModel(
        sample_size=None,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        block_out_channels=tuple(sizes.channels),
        layers_per_block=sizes.layers_per_block,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=text_width,
        attention_head_dim=sizes.heads,  # in this class it means the number of heads
        norm_num_groups=sizes.norm_groups,
    )


def read_clip(path: str) -> dict[str, Tensor]:
    """Weights of a CLIP.

    Raises:
        UserError: no such file, or no weights in it.
    """
    try:
        return read_weights(path)
    except UserError as error:
        raise UserError(f"clip: {error}; configs/clip_text_creatures.yaml makes one") from error
