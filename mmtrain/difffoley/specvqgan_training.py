"""SpecVQGAN (Iashin and Rahtu, BMVC 2021) as two LightningModules: its codebook, and the transformer over the codes.

The baseline of Diff-Foley (arXiv 2306.17203). Spectrograms are of preset `mel_specvqgan`, features of any extractor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from mmtrain import distributed
from mmtrain.audio import clip_spectrogram, preset, resample
from mmtrain.audio_inversion import invert
from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import CLASS, class_path
from mmtrain.difffoley.evaluate import FoleyEvaluation, FoleyTestSettings
from mmtrain.difffoley.specvqgan import PatchDiscriminator, Vqgan, hinge_loss, perplexity, to_grid, to_sequence
from mmtrain.difffoley.specvqgan_gpt import FeatureGpt
from mmtrain.difffoley.specvqgan_inputs import (
    MEL,
    check_frames,
    check_sizes,
    matching_features,
    picture,
    read_codebook,
    start_from,
)
from mmtrain.difffoley.testing import Stopwatch
from mmtrain.optim import AdamWSettings
from mmtrain.seeding import clip_generator, clip_noise
from mmtrain.video_audio import ClipFormat
from mmtrain.weight_files import check_fits

# released: 4.5e-6 * batch * GPUs without warm-up; the batch is 3 a GPU, and this is the rate of 8 GPUs
CODEBOOK_OPTIM = {"lr": 1.08e-4, "betas": (0.5, 0.9), "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 1}
# released: 5e-6 * batch * GPUs; the batch is 2 a GPU, and this is the rate of 8 GPUs
GPT_OPTIM = {"lr": 8e-5, "betas": (0.9, 0.95), "weight_decay": 0.01, "schedule": "constant", "warmup_steps": 1}


def set_names(module: pl.LightningModule) -> list[str]:
    """Names of the evaluation sets, in the order of their loaders."""
    return list(getattr(module.trainer.datamodule, "evaluation_sets", None) or ["clips"])


def log_set(
    module: pl.LightningModule, stage: str, dataloader_idx: int, values: Mapping[str, Tensor], size: int
) -> None:
    """Log means over an evaluation set."""
    prefix = f"{stage}/{set_names(module)[dataloader_idx]}"
    named = {f"{prefix}/{key}": value for key, value in values.items()}
    module.log_dict(named, batch_size=size, sync_dist=True, on_epoch=True, on_step=False, add_dataloader_idx=False)


class SpecVqganCodebook(pl.LightningModule):
    """Trains the codebook: L1 + perceptual distance + codebook loss + hinge GAN, on pictures in [-1, 1].

    Two things differ from the released training. Generator and discriminator take their steps at once, from the same
    reconstruction, and not one after the other. And the perceptual distance (LPAPS) is left out unless a network is
    given, because its weights, of a VGG16 trained on spectrograms of VGGSound, do not come with this code.

    Batches: {"mel": float32 [B, 80, F] in [0, 1]}; the middle `frames` are taken.

    Args:
        frames: mel frames; 848 are 9.85 s.
        network: arguments of `Vqgan`.
        perceptual: takes real and decoded pictures [B, 1, 80, frames] in [-1, 1], gives a distance, averaged here. It
            is frozen, and not part of the checkpoint.
        perceptual_weight, codebook_weight: of these terms; L1 has 1.
        gan_weight: of the adversarial term; 0 leaves the discriminator out.
        gan_start: step from which discriminator and adversarial term are on.
        gan_limits: the weight is multiplied by |gradient of L1 and perceptual| / |gradient of the adversarial term| at
            the decoder's last layer, clamped to these limits. The released config for VGGSound has 1 and 1, so that
            the weight is constant and no gradient is computed here.
        discriminator: arguments of `PatchDiscriminator`.
        optim: optimizer of both networks; the released rule is lr = 4.5e-6 * batch * GPUs.
        pretrained: a codebook of the same sizes, ours or a released one, to start from.
    """

    paper = "difffoley"
    method = "SpecVQGAN"

    def __init__(
        self,
        frames: int = 848,
        network: dict[str, Any] | None = None,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        codebook_weight: float = 1.0,
        gan_weight: float = 0.8,
        gan_start: int = 30_001,
        gan_limits: tuple[float, float] = (1.0, 1.0),
        discriminator: dict[str, Any] | None = None,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []
        network, discriminator = network or {}, discriminator or {}
        self.save_hyperparameters(ignore=["perceptual"])
        self.hparams.update(plain(dict(self.hparams)))
        if not 0 <= gan_limits[0] <= gan_limits[1]:
            raise UserError(f"gan_limits: {list(gan_limits)}, must be two numbers, 0 or more, the lower first")
        self.frames, self.perceptual_weight, self.codebook_weight = frames, perceptual_weight, codebook_weight
        self.gan_weight, self.gan_start, self.gan_limits = gan_weight, gan_start, tuple(gan_limits)
        self.optim = settings(AdamWSettings, optim or CODEBOOK_OPTIM)
        self.network = Vqgan(**network)
        check_frames(frames, self.network)
        self.discriminator = PatchDiscriminator(**discriminator) if gan_weight else None
        # in a dict: it must not become part of the checkpoint
        self.lent = {"perceptual": perceptual.requires_grad_(False).eval()} if perceptual is not None else {}
        if pretrained:
            _, weights = read_codebook(pretrained, "pretrained", SpecVqganCodebook)
            check_fits(self.network.state_dict(), weights, f"pretrained: {pretrained}")
            self.network.load_state_dict(weights)

    def losses(self, real: Tensor, decoded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L1 plus weighted perceptual distance, and the parts."""
        l1 = (decoded - real).abs().mean()
        if "perceptual" not in self.lent:
            return l1, {"l1": l1.detach() / 2}  # a picture has twice the range of a mel
        distance = self.lent["perceptual"].to(real.device)(real, decoded).mean()
        return l1 + self.perceptual_weight * distance, {"l1": l1.detach() / 2, "lpaps": distance.detach()}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        real = picture(batch["mel"], self.frames)
        decoded, codebook_loss, indices = self.network(real)
        reconstruction, parts = self.losses(real, decoded)
        loss = reconstruction + self.codebook_weight * codebook_loss
        if self.discriminator is not None:
            adversarial, its_parts = self.adversarial_loss(real, decoded, reconstruction)
            loss, parts = loss + adversarial, parts | its_parts
        parts |= {
            "codebook": codebook_loss.detach(),
            "perplexity": perplexity(indices, self.network.quantize.num_codes),
        }
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        return loss

    def adversarial_loss(
        self, real: Tensor, decoded: Tensor, reconstruction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of both networks' adversarial losses, each with a gradient to its own parameters only, and the parts."""
        if self.global_step < self.gan_start:
            # gradients of zero rather than none: processes of a distributed run wait for every parameter's
            return sum(parameter.sum() * 0 for parameter in self.discriminator.parameters()), {}
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        generator_loss = -functional_call(self.discriminator, frozen, (decoded,)).mean()
        weight = self.gan_weight * self.gan_balance(reconstruction, generator_loss)
        discriminator_loss = hinge_loss(self.discriminator(real), self.discriminator(decoded.detach()))
        parts = {"generator": generator_loss.detach(), "discriminator": discriminator_loss.detach()}
        return weight * generator_loss + discriminator_loss, parts

    def gan_balance(self, reconstruction: Tensor, generator_loss: Tensor) -> Tensor | float:
        """The factor of `gan_limits`."""
        low, high = self.gan_limits
        if low == high:
            return low
        last = self.network.decoder.conv_out.weight
        pull, push = (
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, generator_loss)
        )
        return (pull / (push + 1e-4)).clamp(low, high).detach()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: dict[str, Any], stage: str, dataloader_idx: int) -> None:
        real = picture(batch["mel"], self.frames)
        decoded, codebook_loss, indices = self.network(real)
        values = self.losses(real, decoded)[1] | {
            "codebook": codebook_loss,
            "perplexity": perplexity(indices, self.network.quantize.num_codes),
        }
        log_set(self, stage, dataloader_idx, values, len(real))

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def chance_levels(self) -> dict[str, float]:
        """Nothing here is guessed at."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or other sizes before its weights are loaded."""
        check_sizes(checkpoint, self, ("frames", "network", "discriminator"))
        self.trained = training_record(checkpoint)

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"VQGAN codebook, {self.network.quantize.num_codes} codes, {self.network.quantize.order} term order"

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        words = "with LPAPS" if self.lent else "trained without LPAPS (no weights given)"
        return {name: f"reconstruction of mels in [0, 1] from their codes, {words}" for name in set_names(self)}


class SpecVqganTransformer(pl.LightningModule):
    """Models the codes of a spectrogram after video features; the codebook is frozen and part of the checkpoint.

    Batches: {"mel": float32 [B, 80, F] in [0, 1], "features": [B, T, D]}, both of the same whole clip; of evaluation
    also "id" int64 [B]. `test` also generates and scores sounds where "audio" [B, N] of `format` is there; its parts of
    the time are called as the diffusion model's: "diffusion" is the drawing of codes.

    Args:
        codebook: checkpoint of `SpecVqganCodebook` or a released one; or {"frames", "network"} for fresh weights that
            a checkpoint then fills.
        transformer: arguments of `FeatureGpt` but `num_codes` and `sequence`, which the codebook decides.
        condition: "features", or "random" vectors in their place, the row without features of SpecVQGAN.
        format: how the clips of `test` are cut.
        top_k, temperature: of sampling.
        optim: optimizer and schedule; the released rule is lr = 5e-6 * batch * GPUs. Embeddings do not decay.
        pretrained: a released transformer or one of ours to start from; the sizes must be the same.
        test: what `test` measures.
    """

    paper = "difffoley"
    method = "SpecVQGAN"

    def __init__(
        self,
        codebook: str | dict[str, Any],
        transformer: dict[str, Any] | None = None,
        condition: Literal["features", "random"] = "features",
        format: ClipFormat | None = None,
        top_k: int | None = 100,
        temperature: float = 1.0,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
        test: FoleyTestSettings | None = None,
    ) -> None:
        super().__init__()
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []
        transformer = transformer or {}
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        if condition not in ("features", "random"):
            raise UserError(f"condition: {condition!r}, must be features or random")
        if temperature <= 0 or (top_k is not None and top_k < 1):
            raise UserError(f"temperature: {temperature}, must be above 0; top_k: {top_k}, must be 1 or more, or null")
        self.condition, self.top_k, self.temperature = condition, top_k, temperature
        self.format, self.test_settings = settings(ClipFormat, format), settings(FoleyTestSettings, test)
        if self.test_settings.audio != "generated" or self.test_settings.spec_conversion != "waveform":
            raise UserError("test: SpecVQGAN has audio: generated and spec_conversion: waveform only")
        self.optim = settings(AdamWSettings, optim or GPT_OPTIM)
        self.codebook_sizes, weights = codebook, None
        if not isinstance(codebook, Mapping):
            self.codebook_sizes, weights = read_codebook(codebook, "codebook", SpecVqganCodebook)
        self.frames = self.codebook_sizes["frames"]
        self.codebook = Vqgan(**(self.codebook_sizes.get("network") or {}))
        check_frames(self.frames, self.codebook)
        if weights is not None:
            check_fits(self.codebook.state_dict(), weights, f"codebook: {codebook}")
            self.codebook.load_state_dict(weights)
        self.codebook.requires_grad_(False).eval()
        self.rows, columns = (side // self.codebook.factor for side in (MEL.n_mels, self.frames))
        self.transformer = FeatureGpt(
            num_codes=self.codebook.quantize.num_codes, sequence=self.rows * columns, **transformer
        )
        if pretrained:
            start_from(self.transformer, pretrained)
        self.tests: list[FoleyEvaluation] = []
        self.protocol_words: dict[str, str] = {}

    def train(self, mode: bool = True) -> "SpecVqganTransformer":
        """The codebook stays in evaluation mode."""
        super().train(mode)
        self.codebook.eval()
        return self

    def prefix(self, batch: dict[str, Any], frames: int) -> Tensor:
        """Features [B, T, D] of the frames that the model takes, of those of clips with `frames` mel frames."""
        features = matching_features(batch["features"], self.frames / frames, self.transformer.feature_frames)
        if self.condition == "features":
            return features
        if self.training or "id" not in batch:
            return distributed.normal_like(features)
        return clip_noise(batch["id"], features.shape[1:], device=features.device)

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What `FeatureGpt.loss` gives for a batch."""
        with torch.no_grad():
            indices = self.codebook.encode(picture(batch["mel"], self.frames))[2]
        return self.transformer.loss(self.prefix(batch, batch["mel"].shape[-1]), to_sequence(indices))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, right = self.loss(batch)
        self.log("train/loss", losses.detach().mean(), prog_bar=True)
        self.log("train/code_accuracy", right.float().mean())
        return losses.mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", dataloader_idx)

    def _evaluate(self, batch: dict[str, Any], stage: str, dataloader_idx: int) -> None:
        losses, right = self.loss(batch)
        values = {"loss": losses.mean(), "code_accuracy": right.float().mean()}
        log_set(self, stage, dataloader_idx, values, len(losses))

    def generate(self, features: Tensor, draws: Tensor) -> Tensor:
        """Spectrograms [B, 80, frames] in [0, 1] of features [B, T, D] and uniform draws [B, codes]."""
        return self.decode(self.transformer.sample(features, draws, self.top_k, self.temperature))

    def decode(self, codes: Tensor) -> Tensor:
        """Spectrograms [B, 80, frames] in [0, 1] of codes [B, L] in their order."""
        return ((self.codebook.decode_codes(to_grid(codes, self.rows))[:, 0] + 1) / 2).clamp(0, 1).float()

    def on_test_epoch_start(self) -> None:
        inverter = f"{MEL.name}, non-negative least squares, Griffin-Lim 32 iterations"
        self.tests = [
            FoleyEvaluation(self.test_settings, self.format, inverter=inverter).to(self.device) for _ in set_names(self)
        ]

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch.get("mel") is not None:
            self._evaluate(batch, "test", dataloader_idx)
        if batch.get("audio") is None:
            return
        # the alignment classifier takes spectrograms of its own preset
        ldm, seconds = preset("mel_ldm"), self.format.window_seconds
        features = batch["features"][:, : self.format.window_frames]
        own = {**batch, "mel": clip_spectrogram(batch["audio"], ldm, seconds), "features": features}
        for sample in range(self.test_settings.samples):
            sound, times = self.sounds(batch, sample)
            mel = clip_spectrogram(sound, ldm, seconds)
            self.tests[dataloader_idx].add(own, sound, mel, times, sample)

    def sounds(self, batch: dict[str, Any], sample: int = 0) -> tuple[Tensor, dict[str, float]]:
        """Sounds [B, N] of the format's rate, drawn from the clips' ids, and the seconds of each part."""
        seed, watch = self.test_settings.sampling_seed, Stopwatch(self.device)
        phases = [clip_generator(seed, clip, sample) for clip in batch["id"].tolist()]
        draws = torch.stack([torch.rand(self.transformer.sequence, generator=phase) for phase in phases])
        features = self.prefix(batch, batch["mel"].shape[-1])
        codes = watch(
            "diffusion",
            lambda: self.transformer.sample(features, draws.to(self.device), self.top_k, self.temperature),
        )
        # the model makes the middle of the clip; silence around it keeps sound and pictures together
        missing = batch["mel"].shape[-1] - self.frames
        around = (missing // 2, missing - missing // 2)
        mel = watch("decode", lambda: pad(self.decode(codes), around))
        sound = watch("inversion", lambda: invert(mel, MEL, generator=phases))
        return resample(sound, MEL.sample_rate, self.format.sample_rate), watch.seconds

    def on_test_epoch_end(self) -> None:
        sampling = f"top-k {self.top_k}, temperature {self.temperature:g}, condition {self.condition}"
        for name, test in zip(set_names(self), self.tests, strict=True):
            if not self.trainer.strategy.reduce_boolean_decision(bool(test.names), all=False):
                continue  # no clip had its sound
            self.log_dict({f"test/{name}/{key}": value for key, value in test.compute().items()})
            self.protocol_words[name] = f"{test.protocol()}; {sampling}; scored through sound, released without"
            if self.trainer.is_global_zero:
                test.write_ids(Path(self.trainer.default_root_dir))

    def configure_optimizers(self) -> dict[str, Any]:
        configured = self.optim.configure(self)
        decayed, *rest = configured["optimizer"].param_groups
        if self.optim.decay == "matrices":  # as minGPT: the weights of linear maps only
            embeddings = {id(self.transformer.pos_emb), id(self.transformer.tok_emb.weight)}
            rest[0]["params"] += [entry for entry in decayed["params"] if id(entry) in embeddings]
            decayed["params"] = [entry for entry in decayed["params"] if id(entry) not in embeddings]
        return configured

    def chance_levels(self) -> dict[str, float]:
        """Nothing here is guessed at."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or other sizes before its weights are loaded."""
        check_sizes(checkpoint, self, ("transformer", "condition"))
        self.trained = training_record(checkpoint)

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"transformer {len(self.transformer.blocks)} layers, width {self.transformer.head.in_features}"

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return dict(self.protocol_words)
