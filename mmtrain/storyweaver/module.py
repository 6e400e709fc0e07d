"""Customising a text-to-image diffusion model to the characters of a story world as a LightningModule: StoryWeaver.

Training, validation, test and prediction; the parts of the model, guidance, samplers and metrics are in files of their
own. B batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.attention import install
from mmtrain.checkpoint import plain, settings
from mmtrain.metrics.similarity import ImageFeatures, ImageTextFeatures
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.optim import AdamWSettings
from mmtrain.parallel import unet_blocks
from mmtrain.samplers import Progress
from mmtrain.seeding import clip_noise, spread_times
from mmtrain.story import Frame, World
from mmtrain.storyweaver import about
from mmtrain.storyweaver.adapters import LoraSettings, add_adapters
from mmtrain.storyweaver.checkpoints import accept, describe_base, describe_training, start_from, trained_state
from mmtrain.storyweaver.evaluate import StoryTestSettings
from mmtrain.storyweaver.guidance import GuidanceSettings, SpatialGuidance
from mmtrain.storyweaver.latents import LatentCache, posterior
from mmtrain.storyweaver.losses import denoising_errors, snr_weights, with_offset
from mmtrain.storyweaver.outputs import PredictSettings, StoryWriter
from mmtrain.storyweaver.pipeline import load_components
from mmtrain.storyweaver.previews import Preview, draw_frames
from mmtrain.storyweaver.sampling import SamplerSettings, latent_size
from mmtrain.storyweaver.testing import StoryTest
from mmtrain.storyweaver.text import PromptEncoder, TextSettings

Trains = Literal["lora", "full"]
Network = tuple[str, ...]  # the characters whose frames a network draws
CONSTANT = {"weight_decay": 0.01, "decay": "all", "schedule": "constant", "warmup_steps": 0}


class StoryDiffusion(pl.LightningModule):
    """Fine-tunes the UNet of a latent diffusion model on the frames of a story world (StoryWeaver, arXiv 2412.07375).

    Loss: mean squared error of what the model's objective names, plus the regularisers of the knowledge encoder where
    guidance has one. Batches of training and of `<world>_frames`: picture uint8 [B, 3, H, W], frames FrameBatch, id
    int64 [B]; of `<world>_prompts`, `test` and `predict` without pictures. Autoencoder and text encoder stay frozen.

    Args:
        pipeline: folder in diffusers' layout or single-file checkpoint of the model to start from.
        trains: "lora" low-rank updates of the attention; "full" all of the UNet, as released.
        lora: their sizes.
        guidance: spatial guidance of training and sampling; None for neither.
        text: how prompts are read.
        optim: optimizer and schedule; AdamW at a constant 1e-4 for "lora", at 7e-6 (released) for "full".
        caption_dropout: share of pictures whose prompt is empty, in [0, 1]; the released training has 0, and then the
            unconditional half of sampling drifts.
        snr_gamma: of min-SNR weights; None for none, as released.
        noise_offset: see `losses.with_offset`.
        cache: keep latents' posteriors and text features in memory.
        gradient_checkpointing: computes the UNet twice instead of keeping what it computed.
        sampler: how pictures are drawn.
        image_features: network of DINO-I, or another of pictures alone.
        image_text_features: network of CLIP-I and CLIP-T.
        test: what `test` measures.
        predict: what `predict` writes.
        method: the row's name in tables.
        pretrained: a checkpoint of ours to take the trained part from.
        draws_per_validation: pictures on the sheet of a validation.
        draw_steps: their sampling steps.

    Raises:
        UserError: no pipeline, or a setting out of range.
    """

    paper = "storyweaver"
    rates: ClassVar[dict[str, float]] = {"lora": 1e-4, "full": 7e-6}

    def __init__(
        self,
        pipeline: str = "",
        trains: Trains = "lora",
        lora: LoraSettings | None = None,
        guidance: GuidanceSettings | None = None,
        text: TextSettings | None = None,
        optim: AdamWSettings | None = None,
        caption_dropout: float = 0.1,
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        cache: bool = True,
        gradient_checkpointing: bool = False,
        sampler: SamplerSettings | None = None,
        image_features: ImageFeatures | None = None,
        image_text_features: ImageTextFeatures | None = None,
        test: StoryTestSettings | None = None,
        predict: PredictSettings | None = None,
        method: str = "StoryWeaver",
        pretrained: str | None = None,
        draws_per_validation: int = 9,
        draw_steps: int = 25,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_features", "image_text_features"])
        given = {"image_features": image_features, "image_text_features": image_text_features}
        self.hparams.update(plain(dict(self.hparams)))  # so that checkpoints hold plain types only
        self.hparams.update({key: getattr(network, "name", network) for key, network in given.items()})
        self.hparams["lora"] = plain(settings(LoraSettings, lora))
        about.check_settings(pipeline, trains, caption_dropout, snr_gamma, noise_offset)
        self.strict_loading = False  # a checkpoint holds the trained part only; `accept` compares it
        self.trains, self.lora = trains, settings(LoraSettings, lora)
        self.optim = settings(AdamWSettings, optim or {"lr": self.rates[trains], **CONSTANT})
        self.caption_dropout, self.snr_gamma, self.noise_offset = caption_dropout, snr_gamma, noise_offset
        self.sampler, self.schedule = settings(SamplerSettings, sampler), NoiseSchedule()
        self.test_settings = settings(StoryTestSettings, test)
        self.predict_settings = settings(PredictSettings, predict)
        self.method, self.pretrained = method, pretrained
        self.draws_per_validation, self.draw_steps = draws_per_validation, draw_steps
        # a plain dict: their weights must not become part of this one's
        self.lent: dict[str, Any] = {key: None if isinstance(n, str) else n for key, n in given.items()}

        self.components = load_components(pipeline)
        self.base = describe_base(self.components)
        self.unet, self.vae = self.components.unet, self.components.vae
        self.text_encoder = self.components.text_encoder
        for part in (self.unet, self.vae, self.text_encoder):
            part.requires_grad_(False)
        install(self.unet)
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        text, self.guidance = settings(TextSettings, text), None
        if guidance is not None:
            guidance = settings(GuidanceSettings, guidance)
            self.guidance = SpatialGuidance(guidance, self.components.text_width)
            self.hparams["guidance"] = plain(guidance)
            if guidance.span_rule == "released":
                text = replace(text, span_rule="released")
        text_is_frozen = trains == "full" or not self.lora.text_encoder
        self.prompts = PromptEncoder(self.components.tokenizer, self.text_encoder, text, cache and text_is_frozen)
        self.latents = LatentCache(self.vae, cache)
        self.prepare_training()
        self.is_started = False

        self.world: World | None = None
        self.picture_size: tuple[int, int] | None = None  # H, W
        self.preview: Preview | None = None
        self.tests: list[StoryTest] = []
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    # what is trained

    def prepare_training(self) -> None:
        """Add what is trained, or set it free."""
        if self.trains == "lora":
            add_adapters(self.adapted, self.lora)
        else:
            self.unet.requires_grad_(True)

    def add_characters(self, names: Sequence[str]) -> None:
        """For methods with weights for each character: add them."""

    @property
    def adapted(self) -> dict[str, nn.Module]:
        """The networks with adapters."""
        return {"unet": self.unet} | ({"text_encoder": self.text_encoder} if self.lora.text_encoder else {})

    def unet_for(self, names: Network) -> nn.Module:
        """The UNet that draws frames of these characters, ready to be called; here one draws all."""
        return self.unet

    def by_network(self, frames: Sequence[Frame]) -> dict[Network, list[int]]:
        """What `unet_for` is to be asked for -> which of the frames it draws; here one draws all."""
        return {(): list(range(len(frames)))}

    def wording(self, frame: Frame) -> Frame:
        """The frame as the text encoder gets it; here as it is."""
        return frame

    def train(self, mode: bool = True) -> "StoryDiffusion":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        for part in (self.unet, self.vae, self.text_encoder):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    # loss

    def encode(self, frames: Sequence[Frame], dropped: Tensor | None = None) -> Any:
        """Condition of frames, see `PromptEncoder.encode`; those marked in bool `dropped` [B] get the empty prompt."""
        encoded = self.prompts.encode([self.wording(frame) for frame in frames])
        if dropped is None or not dropped.any():
            return encoded
        return encoded.with_dropped(dropped, self.prompts.null(len(frames), encoded.context.shape[1]))

    def predict_target(
        self,
        unet: nn.Module,
        noised: Tensor,
        t: Tensor,
        frames: Sequence[Frame],
        dropped: Tensor | None = None,
        guided: bool = True,
    ) -> Tensor:
        """What a UNet makes of noised latents [B, C, h, w] of frames at times [B].

        Args:
            unet: of `unet_for`.
            dropped: bool [B], whose captions are left out; they get no guidance either.
            guided: False leaves guidance out.
        """
        encoded = self.encode(frames, dropped)
        options = {}
        if guided and self.guidance is not None:
            latent = tuple(noised.shape[-2:])
            size = tuple(side * self.components.factor for side in latent)
            maps = self.guidance.prepare(encoded, size, latent, len(unet.config.block_out_channels))
            options["cross_attention_kwargs"] = {"attention_bias": maps.at(t, self.guidance.settings.alpha)}
        context = encoded.context.to(unet.dtype)
        return unet(noised.to(unet.dtype), t, encoder_hidden_states=context, **options).sample

    def errors(
        self,
        frames: Sequence[Frame],
        latents: Tensor,
        noise: Tensor,
        t: Tensor,
        dropped: Tensor | None = None,
        guided: bool = True,
        network: Network | None = None,
    ) -> Tensor:
        """Squared error [B] of each frame, see `predict_target`.

        Args:
            latents, noise: [B, C, h, w].
            t: integer times [B].
            network: what `unet_for` is asked for, for all frames; None asks for what draws each.
        """
        objective = self.components.objective
        noised = self.schedule.noised(latents, noise, t, objective)
        target = self.schedule.training_target(latents, noise, t, objective)
        groups = self.by_network(frames) if network is None else {network: list(range(len(frames)))}
        parts = []
        for names, rows in groups.items():
            unet, own = self.unet_for(names), [frames[i] for i in rows]
            gone = None if dropped is None else dropped[rows]
            predicted = self.predict_target(unet, noised[rows], t[rows], own, gone, guided)
            parts.append(denoising_errors(predicted, target[rows]))
        order = torch.tensor([i for rows in groups.values() for i in rows])
        return torch.cat(parts)[order.argsort().to(latents.device)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        frames = list(batch["frames"])
        errors = self.training_errors(frames, self.training_latents(batch))
        loss = errors.mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(frames))
        if self.guidance is not None and self.guidance.encoder is not None:
            extra = self.guidance.regulariser(self.encode(frames), tuple(batch["picture"].shape[-2:]))
            self.log("train/regulariser", extra.detach(), batch_size=len(frames))
            loss = loss + extra
        return loss

    def training_latents(self, batch: dict[str, Any]) -> Tensor:
        """Latents [B, C, h, w] of the pictures of a batch, drawn anew from their posteriors."""
        return self.latents.sample(batch["id"].tolist(), lambda rows: batch["picture"][rows])

    def training_errors(self, frames: Sequence[Frame], latents: Tensor, network: Network | None = None) -> Tensor:
        """Errors [B] at fresh noise and times, with captions dropped and weighted as the settings say."""
        objective = self.components.objective
        noise = with_offset(distributed.normal_like(latents), self.noise_offset)
        t = self.schedule.draw_times(len(latents), objective, latents.device)
        dropped = distributed.uniform(len(latents)) < self.caption_dropout
        errors = self.errors(frames, latents, noise, t, dropped if self.caption_dropout else None, network=network)
        if self.snr_gamma is None:
            return errors
        return errors * snr_weights(self.schedule, t, objective, self.snr_gamma)

    # validation

    def on_validation_epoch_start(self) -> None:
        most = 0 if self.trainer.sanity_checking else self.draws_per_validation
        self.preview = Preview(self, most, self.draw_steps)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss at noise and times that belong to the picture; pictures of the prompts."""
        if not batch or not len(batch["frames"]):
            return
        name = self.trainer.datamodule.loader_names[dataloader_idx]
        frames, ids = list(batch["frames"]), batch["id"]
        if "picture" not in batch:
            self.preview.add(ids.tolist(), frames)
            return
        latents = posterior(self.vae, batch["picture"])[0] * self.vae.config.scaling_factor
        noise = clip_noise(ids, latents.shape[1:], device=latents.device)
        t = (spread_times(ids) * self.schedule.train_steps).long().to(latents.device)
        self._log_mean(f"val/{name}/loss", self.errors(frames, latents, noise, t))
        if self.guidance is not None:
            self._log_mean(f"val/{name}/loss_unguided", self.errors(frames, latents, noise, t, guided=False))

    def on_validation_epoch_end(self) -> None:
        self.preview.write(Path(self.trainer.default_root_dir) / "samples" / f"step_{self.trainer.global_step:06d}.png")

    def _log_mean(self, name: str, values: Tensor) -> None:
        self.log(name, values.mean(), batch_size=len(values), sync_dist=True, on_epoch=True, add_dataloader_idx=False)

    # a run

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        self.world, self.picture_size = data.world, tuple(data.picture_size)
        latent_size(self.picture_size, self.unet, self.vae)  # refuses sizes that the networks cannot halve
        self.add_characters(self.world.names)
        if self.pretrained and not self.is_started:
            start_from(self, self.pretrained)
        self.is_started = True  # a later `test` of the same module must not go back to where training began
        if stage == "fit":
            self.train()  # Lightning leaves the mode as it is, and what was loaded is in evaluation mode
            rank_zero_info(f"{self.backbone}; {about.sampling_words(self)}")

    def draw(
        self,
        frames: Sequence[Frame],
        seeds: Sequence[int],
        progress: Progress | None = None,
        sampler: SamplerSettings | None = None,
    ) -> Tensor:
        """Draw frames with their seeds, see `previews.draw_frames`: uint8 [B, 3, H, W] on the CPU."""
        return draw_frames(self, frames, seeds, sampler or self.sampler, progress)

    def on_test_epoch_start(self) -> None:
        self.tests = [StoryTest(self, name) for name in self.trainer.datamodule.loader_names]

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tests[dataloader_idx].run(batch)

    def on_test_epoch_end(self) -> None:
        for test in self.tests:
            self.log_dict({f"test/{test.name}/{name}": value for name, value in test.finish().items()})
        self.log("test/parameters/per_world", about.world_parameters(self) / 1e6)
        self.figures = [figure for test in self.tests for figure in test.figures]
        not_measured = {f"{test.name}: {name}": why for test in self.tests for name, why in test.missing.items()}
        self.trainer.datamodule.missing |= not_measured  # results.json and results.md tell what the data lack, too

    def on_predict_start(self) -> None:
        self.lent["writer"] = StoryWriter(self)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        self.lent["writer"].write(batch)
        return {}  # nothing for callbacks to write

    def on_predict_epoch_end(self) -> None:
        self.lent["writer"].finish()

    def on_predict_end(self) -> None:
        rank_zero_info(f"stories are in {self.lent['writer'].folder}")

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def blocks(self) -> list[nn.Module]:
        """What is sharded and compiled one by one, see `mmtrain.parallel`."""
        return unet_blocks(self.unet)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = trained_state(self, checkpoint["state_dict"])
        checkpoint.update(describe_training(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, pipeline or world before its weights are loaded."""
        if self.world is None and checkpoint.get("world"):  # loaded without a trainer
            self.add_characters(list(checkpoint["world"]["characters"]))
        is_resumed = self._trainer is not None and self._trainer.state.fn == "fit"
        accept(self, checkpoint, is_resumed)
        self.is_started = True

    # what the results say

    @property
    def image_features(self) -> ImageFeatures | None:
        """Network of pictures alone."""
        return self.lent["image_features"]

    @property
    def image_text_features(self) -> ImageTextFeatures | None:
        """Network of pictures and texts."""
        return self.lent["image_text_features"]

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return about.backbone(self)

    def sampling_about(self) -> dict[str, Any]:
        """All that a drawn picture depends on besides weights, frame and seed, as plain types."""
        return about.sampling_about(self)

    def chance_levels(self) -> dict[str, float]:
        """What chance scores depends on the data and on the recogniser."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {"sampling": about.sampling_words(self)} | {test.name: test.protocol() for test in self.tests}
