"""Latent diffusion of spectrograms under CAVP features as a LightningModule: the second stage of Diff-Foley.

Training, evaluation and prediction; networks, guidance, samplers and metrics are in files of their own.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.audio import check_rate, preset
from mmtrain.checkpoint import plain, settings
from mmtrain.config_errors import UserError
from mmtrain.difffoley.alignment import load_alignment
from mmtrain.difffoley.checkpoints import (
    CLASS,
    FEATURES,
    accept,
    check_class,
    check_features,
    check_has_first_stage,
    class_path,
    data_features,
    frozen_first_stage,
    is_ours,
    own_network,
    read_file,
)
from mmtrain.difffoley.evaluate import FoleyTestSettings
from mmtrain.difffoley.features import CavpFeatures
from mmtrain.difffoley.generation import SamplerSettings, check_sampler
from mmtrain.difffoley.guidance import GuidanceSettings
from mmtrain.difffoley.networks import FoleyUNet, NullCondition, check_raw_context, network_settings
from mmtrain.difffoley.outputs import PredictSettings, SoundWriter
from mmtrain.difffoley.pretrained import init_from_stable_diffusion, load_foley_unet
from mmtrain.difffoley.testing import SoundTest
from mmtrain.ema import ema_weights
from mmtrain.noise_schedule import NoiseSchedule, Objective, check_objective
from mmtrain.optim import AdamWSettings
from mmtrain.parallel import unet_blocks
from mmtrain.seeding import clip_noise, spread_times
from mmtrain.video_audio import ClipFormat
from mmtrain.weight_files import naming

RELEASED_OPTIM = {"lr": 1e-4, "weight_decay": 0.01, "decay": "all", "schedule": "constant", "warmup_steps": 1000}


class LatentDiffusion(pl.LightningModule):
    """Denoises mel latents under the CAVP features of the frames (Diff-Foley, arXiv 2306.17203).

    Loss: mean squared error of what `objective` names. Batches of training: mel [B, C, F] in [0, 1], features
    [B, T, D]; of evaluation also id int64 [B]; of `test` see `mmtrain.difffoley.testing`, of `predict`
    `mmtrain.difffoley.outputs`.

    Args:
        format: how the clips are cut; the data module has the same.
        network: sizes of `FoleyUNet`, the paper's where nothing is given.
        first_stage: checkpoint of the autoencoder (see `load_first_stage`), or arguments of AutoencoderKL, or None for
            Stable Diffusion's sizes with fresh weights, which only `pretrained` makes useful. It stays frozen.
        objective: "eps" the noise, as released; "v"; "flow" the velocity of a rectified flow.
        null_condition: what training puts in the place of dropped conditions. "raw_zeros" is what the released training
            does; "learned" is one definition for training and sampling. See `guidance.null_condition` for sampling.
        condition_dropout: share of samples whose condition is dropped.
        optim: optimizer and schedule; the defaults are the released ones.
        guidance, sampler: how `test` and `predict` sample.
        guidance_classifier: checkpoint of an `AlignmentClassifier` with `noisy: true`, for double guidance.
        pretrained: a released latent diffusion checkpoint, or one of ours, to start from.
        stable_diffusion: a Stable Diffusion folder or file to start the UNet from.
        cavp: checkpoint of the CAVP whose features the model was trained with; `predict` needs it.
        test: what `test` measures.
        predict: what `predict` writes.
    """

    paper = "difffoley"

    def __init__(
        self,
        format: ClipFormat | None = None,
        network: dict[str, Any] | None = None,
        first_stage: str | dict[str, Any] | None = None,
        objective: Objective = "eps",
        null_condition: NullCondition = "learned",
        condition_dropout: float = 0.2,
        optim: AdamWSettings | None = None,
        guidance: GuidanceSettings | None = None,
        sampler: SamplerSettings | None = None,
        guidance_classifier: str | None = None,
        pretrained: str | None = None,
        stable_diffusion: str | None = None,
        cavp: str | None = None,
        test: FoleyTestSettings | None = None,
        predict: PredictSettings | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))  # so that checkpoints hold plain types only
        check_objective(objective)
        if not 0 <= condition_dropout < 1:
            raise UserError(f"condition_dropout: {condition_dropout} is not in [0, 1)")
        self.format, self.objective = settings(ClipFormat, format), objective
        self.null_condition, self.condition_dropout = null_condition, condition_dropout
        self.optim = settings(AdamWSettings, optim or RELEASED_OPTIM)
        self.guidance, self.sampler = settings(GuidanceSettings, guidance), settings(SamplerSettings, sampler)
        check_sampler(self.sampler, objective, self.guidance)
        check_rate(self.format.sample_rate, preset("mel_ldm"), "format.sample_rate")
        self.schedule = NoiseSchedule()
        self.first_stage_from = first_stage or pretrained
        self.first_stage = frozen_first_stage(self.first_stage_from)
        self.network = FoleyUNet(**network_settings(network, self.format, self.first_stage.factor))
        # a parameter without a gradient would hold up training on several processes
        self.network.null_token.requires_grad_(null_condition == "learned" and condition_dropout > 0)
        if stable_diffusion:
            init_from_stable_diffusion(self.network, stable_diffusion)
        # a released network knows no null token; one that goes on training learns it
        self.is_released = bool(pretrained) and start_from(self.network, pretrained)
        self.guidance_classifier, self.cavp = guidance_classifier, cavp
        self.test_settings, self.predict_settings = (
            settings(FoleyTestSettings, test),
            settings(PredictSettings, predict),
        )
        self.has_null_token = self.network.null_token.requires_grad
        # a plain dict: networks of other files must not become part of this one's weights
        self.lent: dict[str, Any] = {}
        self.tests: list[SoundTest] = []
        self.features_from: dict[str, Any] | None = None  # the extractor of the training's features
        self.data_features: dict[str, Any] | None = None  # the extractor of those that are given now
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """The first stage stays in evaluation mode."""
        super().train(mode)
        self.first_stage.eval()
        return self

    def latent_shape(self, mel: Tensor) -> tuple[int, int, int]:
        """Shape of the latent of one of the spectrograms [B, C, F]."""
        factor = self.first_stage.factor
        return self.first_stage.latent_channels, mel.shape[-2] // factor, mel.shape[-1] // factor

    def context(self, features: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Tokens [B, T, W] of features [B, T, D]; the samples marked in `dropped` [B] get the null condition."""
        tokens = self.network.context(features)
        if dropped is None:
            return tokens
        null = self.network.null_context(self.null_condition, *features.shape[:2])
        return torch.where(dropped[:, None, None], null.to(tokens), tokens)

    def denoising_loss(self, latent: Tensor, context: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Squared error [B] of the prediction, averaged over each latent.

        Args:
            latent, noise: [B, 4, h, w].
            context: [B, T, W].
            t: [B] of `NoiseSchedule.draw_times`.
        """
        noised = self.schedule.noised(latent, noise, t, self.objective)
        predicted = self.network(noised, self.schedule.network_time(t, self.objective), context)
        target = self.schedule.training_target(latent, noise, t, self.objective)
        return F.mse_loss(predicted.float(), target.float(), reduction="none").mean((1, 2, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with torch.no_grad():
            latent = self.first_stage.encode(batch["mel"], sample=True)
        dropped = distributed.uniform(len(latent), latent.device) < self.condition_dropout
        t = self.schedule.draw_times(len(latent), self.objective, latent.device)
        context = self.context(batch["features"], dropped if self.condition_dropout else None)
        loss = self.denoising_loss(latent, context, distributed.normal_like(latent), t).mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss with the video, and how much worse it is without: the same noise and times for a clip each time."""
        if "mel" not in batch:  # none of its clips could be used
            return
        name = self.trainer.datamodule.loader_names[dataloader_idx]
        size = len(batch["mel"])
        ids = batch["id"]
        latent = self.first_stage.encode(batch["mel"], sample=False)
        noise = clip_noise(ids, latent.shape[1:], device=latent.device)
        t = fixed_times(ids, self.objective, self.schedule).to(latent.device)
        loss = self.denoising_loss(latent, self.context(batch["features"]), noise, t)
        self._log_mean(f"val/{name}/loss", loss)
        if self.condition_dropout:
            everywhere = torch.ones(size, dtype=torch.bool, device=latent.device)
            null_loss = self.denoising_loss(latent, self.context(batch["features"], everywhere), noise, t)
            self._log_mean(f"val/{name}/condition_gain", (null_loss - loss) / null_loss.mean().clamp(min=1e-12))

    def _log_mean(self, name: str, values: Tensor) -> None:
        self.log(name, values.mean(), batch_size=len(values), sync_dist=True, on_epoch=True, add_dataloader_idx=False)

    def setup(self, stage: str) -> None:
        check_has_first_stage(self.first_stage_from, stage, bool(self.trainer.ckpt_path))
        self.data_features = data_features(self.trainer.datamodule, self.format)
        if stage == "fit":
            self.features_from = self.data_features

    def _check_null(self) -> None:
        """A null condition that training never saw would be guidance away from noise."""
        fresh = not self.has_null_token or (self.is_released and not self.trained)
        if self.guidance.scale != 1 and self.guidance.null_condition == "learned" and fresh:
            raise UserError(
                "guidance.null_condition: learned, but the network was not trained with it: give raw_zeros (trained) "
                "or embedded_zeros (sampled) for a released network, else the null_condition of its training"
            )

    @property
    def guide(self) -> nn.Module | None:
        """Network of the alignment classifier that guides sampling; None where its scale is 0 or no file is named."""
        if not self.guidance.classifier_scale or self.guidance_classifier is None:
            return None
        if "guide" not in self.lent:
            path, where = self.guidance_classifier, "guidance_classifier"
            with torch.inference_mode(False):  # weights made in that mode give no gradients
                guide = load_alignment(path, where, self.format, self.first_stage, noisy=True)
                self.lent["guide"] = guide.network.to(self.device)
            check_features(guide.features_from, self.features_from, f"{where}: {path}")
            if self.guidance.classifier_context == "raw_full":
                check_raw_context(guide.network, self.network, f"{where}: {path}")
        return self.lent["guide"]

    def cavp_features(self) -> CavpFeatures:
        """The extractor of the features that the model takes.

        Raises:
            UserError: no checkpoint is named, or it is not the one of the training.
        """
        if self.cavp is None:
            raise UserError("cavp: none is given; name the checkpoint of the CAVP that the model was trained with")
        if "cavp" not in self.lent:
            extractor = CavpFeatures(self.cavp, format=self.format, device=str(self.device))
            check_features(extractor.describe(), self.features_from, f"cavp: {self.cavp}")
            self.lent["cavp"] = extractor
        return self.lent["cavp"]

    def on_test_epoch_start(self) -> None:
        if self.test_settings.audio == "generated":
            self._check_null()
        self.tests = [SoundTest(self, name) for name in self.trainer.datamodule.loader_names]

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tests[dataloader_idx].run(batch)

    def on_test_epoch_end(self) -> None:
        for test in self.tests:
            self.log_dict({f"test/{test.name}/{name}": value for name, value in test.finish().items()})
        self.figures = [figure for test in self.tests for figure in test.figures]

    def on_predict_start(self) -> None:
        self._check_null()
        self.cavp_features()  # said now and not after the first video was read
        self.lent["writer"] = SoundWriter(self)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        self.lent["writer"].write(batch)
        return {}  # nothing for callbacks to write

    def on_predict_end(self) -> None:
        rank_zero_info(f"sounds are in {self.lent['writer'].folder}")

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def blocks(self) -> list[nn.Module]:
        """What is sharded and compiled one by one, see `mmtrain.parallel`."""
        return unet_blocks(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))
        checkpoint[FEATURES] = self.features_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or of other clips before its weights are loaded."""
        accept(self, checkpoint, "objective")

    @property
    def method(self) -> str:
        """The row's name in the paper's table, or what proves the evaluators."""
        if self.test_settings.audio != "generated":
            return {"ground_truth": "Ground truth", "random": "Random audio"}[self.test_settings.audio]
        free, guided = self.guidance.scale != 1, bool(self.guidance.classifier_scale)
        kind = {(False, False): "no guidance", (True, False): "CFG", (True, True): "double guidance"}
        flow = f", flow {self.sampler.steps} steps" if self.objective == "flow" else ""
        return f"Diff-Foley ({kind.get((free, guided), 'classifier guidance')}{flow})"

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"UNet {'-'.join(map(str, self.network.unet.config.block_out_channels))}, {self.objective}"

    def sampling_words(self) -> str:
        """How sounds are sampled, in words."""
        guidance, sampler = self.guidance, self.sampler
        null = f", null condition {guidance.null_condition}" if guidance.scale != 1 else ""
        context = f" ({guidance.classifier_context})" if guidance.classifier_scale else ""
        eta = f", eta {sampler.eta:g}" if sampler.name == "ddim" else ""
        return (
            f"sampler {sampler.name}, {sampler.steps} steps{eta}; guidance {guidance.scale:g}{null}, "
            f"classifier {guidance.classifier_scale:g}{context}"
        )

    def chance_levels(self) -> dict[str, float]:
        """What chance scores depends on the data: it is measured with `test.audio: random`."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {test.name: test.protocol() for test in self.tests}


def fixed_times(ids: Tensor, objective: Objective, schedule: NoiseSchedule) -> Tensor:
    """Times [B] of an evaluation, one a clip, spread as training draws them: evenly, or for "flow" logit-normally."""
    spread = spread_times(ids)
    if objective == "flow":
        return torch.special.ndtri(spread.double().clamp(1e-3, 1 - 1e-3)).sigmoid().float()
    return (spread * schedule.train_steps).long()


def start_from(network: FoleyUNet, path: str) -> bool:
    """Load the UNet and embedder of a released diffusion checkpoint, or of one of ours (its average, if it has one).

    Returns:
        whether it is a released one.

    Raises:
        UserError: no such file, no such model, or one of other sizes.
    """
    content = read_file(path, "pretrained")
    if not is_ours(content):
        with naming("pretrained"):
            load_foley_unet(network, path)
        return True
    check_class(content, LatentDiffusion, f"pretrained: {path}")
    network.load_state_dict(own_network(ema_weights(content), network, f"pretrained: {path}"))
    return False
