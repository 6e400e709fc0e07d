"""A first stage of our own as a LightningModule: a small KL autoencoder of mel spectrograms.

Diff-Foley (arXiv 2306.17203) takes Stable Diffusion's autoencoder as it is, 84 M parameters that were trained on
pictures. A small one that is trained on the mels at hand costs a fraction and can be had without a download.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional

from mmtrain.checkpoint import flatten, plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import CLASS, check_class, class_path
from mmtrain.difffoley.first_stage import FirstStage, autoencoder_config, load_first_stage
from mmtrain.optim import AdamWSettings
from mmtrain.weight_files import check_fits, naming

OPTIM = {"lr": 5e-4, "weight_decay": 1e-4, "warmup_steps": 100}
LONGEST_MEMORY = 100  # batches over which the spread of the latents is averaged; early on the newest fifth of them


def autoencoder_loss(
    decoded: Tensor, mel: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float, scales: int = 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + kl_weight * KL, and its parts.

    Args:
        decoded, mel: [B, C, F].
        mean, logvar: of the posterior [B, c, h, w].
        kl_weight: of the KL divergence to a unit Gaussian, averaged over the entries of the latent.
        scales: L1 is averaged over this many resolutions, each half the one before; more than 1 weighs the envelope up.
    """
    l1 = (decoded - mel).abs().mean()
    errors, pair = [l1], torch.stack([decoded, mel])
    for _ in range(scales - 1):
        pair = functional.avg_pool2d(pair, 2)
        errors.append((pair[0] - pair[1]).abs().mean())
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return torch.stack(errors).mean() + kl_weight * kl, {"l1": l1.detach(), "kl": kl.detach()}


def deviation(moments: Tensor) -> Tensor:
    """Standard deviation from mean and mean square [2]."""
    return (moments[1] - moments[0].square()).clamp(min=1e-12).sqrt()


class Autoencoder(pl.LightningModule):
    """Trains a first stage on mels; `load_first_stage` takes its checkpoints.

    While it trains, the factor of the first stage follows 1 / (standard deviation of the latents), so each checkpoint
    holds the one that gives its latents unit variance.

    Batches: {"mel": float32 [B, C, F] in [0, 1]}.

    Args:
        channels: width of each level; four levels, or three with patch 2, make the factor 8.
        layers_per_block: residual blocks of a level.
        latent_channels: channels of the latent.
        in_channels: 1, or 3 for the released layout, which repeats the mel.
        patch: see `autoencoder_config`; it needs in_channels 1.
        has_mid_attention: attention over all places at the lowest resolution.
        kl_weight, scales: see `autoencoder_loss`.
        optim: optimizer and schedule.
        pretrained: any first stage of the same sizes to start from, see `load_first_stage`.
    """

    paper = "difffoley"
    method = "first stage"

    def __init__(
        self,
        channels: Sequence[int] = (32, 64, 64, 64),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        in_channels: int = 1,
        patch: int = 1,
        has_mid_attention: bool = False,
        kl_weight: float = 1e-4,
        scales: int = 1,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        self.kl_weight, self.scales = kl_weight, scales
        self.optim = settings(AdamWSettings, optim or OPTIM)
        config = autoencoder_config(channels, layers_per_block, latent_channels, in_channels, has_mid_attention, patch)
        self.first_stage = FirstStage(config, 1.0)
        self.register_buffer("latent_moments", torch.zeros(2))  # running mean and mean square of the latents
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.long))
        if pretrained:
            with naming("pretrained"):
                start = load_first_stage(pretrained)
                check_fits(self.first_stage.state_dict(), start.state_dict(), pretrained)
            self.first_stage.load_state_dict(start.state_dict())
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    def losses(self, mel: Tensor, sampled: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, its parts, and mean and mean square [2] of unscaled latents drawn; `sampled` decodes a drawn one."""
        posterior = self.first_stage.autoencoder.encode(self.first_stage.picture(mel)).latent_dist
        latent = posterior.sample() if sampled else posterior.mode()
        decoded = self.first_stage.mel(self.first_stage.autoencoder.decode(latent, return_dict=False)[0])
        loss, parts = autoencoder_loss(decoded, mel, posterior.mean, posterior.logvar, self.kl_weight, self.scales)
        mean, variance = posterior.mean.detach().float(), posterior.var.detach().float()
        return loss, parts, torch.stack([mean.mean(), (mean.square() + variance).mean()])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, parts, moments = self.losses(batch["mel"], sampled=True)
        self.follow_spread(moments)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()})
        return loss

    def follow_spread(self, moments: Tensor) -> None:
        """Move the running moments towards those [2] of a batch of unscaled latents, and the factor with them."""
        self.batches_seen += 1
        share = 1 / min(max(1.0, int(self.batches_seen) / 5), LONGEST_MEMORY)
        self.latent_moments.lerp_(moments, share)
        self.first_stage.scale_factor.copy_(deviation(self.latent_moments).reciprocal())

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", dataloader_idx)

    def _evaluate(self, batch: dict[str, Any], stage: str, dataloader_idx: int) -> None:
        if "mel" not in batch:  # none of its clips could be used
            return
        _, parts, moments = self.losses(batch["mel"], sampled=False)
        values = {**parts, "latent_std": self.first_stage.scale_factor * deviation(moments)}
        name = self.set_names()[dataloader_idx]
        named = {f"{stage}/{name}/{key}": value for key, value in values.items()}
        self.log_dict(
            named, batch_size=len(batch["mel"]), sync_dist=True, on_epoch=True, on_step=False, add_dataloader_idx=False
        )

    def set_names(self) -> list[str]:
        """Names of the evaluation sets, in the order of their loaders."""
        return list(getattr(self.trainer.datamodule, "evaluation_sets", None) or ["clips"])

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        config = self.first_stage.autoencoder.config
        return f"KL autoencoder {'-'.join(map(str, config.block_out_channels))}"

    def chance_levels(self) -> dict[str, float]:
        """Nothing here is guessed at."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {name: "reconstruction of mels in [0, 1] from the latent's mean" for name in self.set_names()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or other sizes before its weights are loaded.

        Raises:
            UserError: names the setting.
        """
        check_class(checkpoint, type(self))
        theirs = checkpoint.get("hyper_parameters", {})
        for key in ("channels", "layers_per_block", "latent_channels", "in_channels", "patch", "has_mid_attention"):
            if key in theirs and flatten(theirs[key], key) != flatten(self.hparams[key], key):  # lists equal tuples
                raise UserError(
                    f"ckpt_path: the checkpoint was trained with {key} {theirs[key]}, this model has "
                    f"{self.hparams[key]}: give the config that it was trained with"
                )
        self.trained = training_record(checkpoint)
