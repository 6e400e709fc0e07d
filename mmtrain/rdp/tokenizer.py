"""The fast policy as a LightningModule: an asymmetric tokenizer of action chunks."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmtrain import distributed
from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.normaliser import Normaliser
from mmtrain.optim import AdamWSettings
from mmtrain.rdp.checkpoints import check_class, check_data, check_identity, is_released, read_checkpoint
from mmtrain.rdp.losses import tokenizer_loss
from mmtrain.rdp.networks import TokenizerNetwork
from mmtrain.rdp.normalising import fit_normaliser
from mmtrain.rdp.presets import PRESETS, PresetName, encoder_channels
from mmtrain.rdp.pretrained import fit_into, load_tokenizer_state
from mmtrain.robot_tasks import PolicySpec, Task, Touch, Vision, policy_spec

AS_TRAINED = "give the config that it was trained with"
RELEASED_OPTIM = {"lr": 1e-3, "weight_decay": 1e-4, "decay": "all", "warmup_steps": 100}


@dataclass
class TokenizerSettings:
    """What a tokenizer may do otherwise than its preset.

    Args:
        latent_dim, kl_weight: None takes the preset's.
        quantizer: "kl", or "vq" (residual, 4 stages of 16 codes; released but used in no configuration).
        symmetric: the encoder sees touch too (row "symmetric tokenizer" of Table VI, not in the released code).
        decoder_touch: False takes touch away from the decoder; an ablation of ours.
    """

    latent_dim: int | None = None
    kl_weight: float | None = None
    quantizer: Literal["kl", "vq"] = "kl"
    symmetric: bool = False
    decoder_touch: bool = True


class Tokenizer(pl.LightningModule):
    """Asymmetric tokenizer (AT): a CNN encodes 32 actions, a GRU decodes them given the touch of each frame.

    Loss: mean |a - a_hat| + kl_weight * KL (RDP, section on the fast policy). Batches: `datamodules.robot`.

    Args:
        task, touch, vision, relative: see `mmtrain.robot_tasks.policy_spec`; the data module has the same.
        preset: sizes.
        tokenizer: what differs from the preset.
        pretrained: a released tokenizer, or one of ours, to start from.
        optim: optimizer and schedule; the defaults are the released ones.
    """

    paper = "rdp"
    method = "asymmetric tokenizer"

    def __init__(
        self,
        task: Task,
        touch: Touch = "force",
        vision: Vision = "camera",
        relative: bool | None = None,
        preset: PresetName = "reference",
        tokenizer: TokenizerSettings | None = None,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        # not the saved ones: inside a policy that the command line makes, those are the policy's
        self.identity = identity(task, touch, relative, preset, tokenizer)
        self.settings = settings(TokenizerSettings, tokenizer)
        self.optim = settings(AdamWSettings, optim or RELEASED_OPTIM)
        self.spec = tokenizer_spec(policy_spec(task, touch, "rdp", vision, relative), self.settings)
        sizes = PRESETS[preset]
        self.kl_weight = sizes.kl_weight if self.settings.kl_weight is None else self.settings.kl_weight
        self.network = TokenizerNetwork(
            self.spec.action_dim,
            self.spec.touch_dim,
            encoder_channels(task),
            self.settings.latent_dim or sizes.latent_dim,
            self.spec.horizon,
            quantizer=self.settings.quantizer,
            symmetric=self.settings.symmetric,
        )
        self.normalizer = Normaliser({"action": self.spec.action_dim, **self.spec.touch_inputs})
        if pretrained:
            load_tokenizer(self, pretrained)
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    def normalised(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Actions [B, H, A] and touch [B, H, F] of a batch as the network takes them."""
        action = self.normalizer.normalise("action", batch["action"])
        parts = [self.normalizer.normalise(key, batch["touch"][key]) for key in self.spec.touch_inputs]
        return action, torch.cat(parts, -1) if parts else action.new_zeros(*action.shape[:2], 0)

    def latent(
        self,
        action: Tensor,
        touch: Tensor,
        target: Literal["mean", "sample"],
        normal: Callable[[Tensor], Tensor] = distributed.normal_like,
    ) -> Tensor:
        """Latent [B, latent_dim, L] of normalised actions [B, H, A]; "vq" has no other than its quantized form.

        `normal` draws for "sample": by default for this process's part of a batch.
        """
        moments = self.network.encode(action, touch)
        if self.settings.quantizer == "vq":
            return self.network.quantize(moments)[0]
        mean, logvar = self.network.moments(moments)
        return mean if target == "mean" else mean + (0.5 * logvar).exp() * normal(mean)

    def losses(self, batch: dict[str, Any], sampled: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss, its parts, and the decoded normalised actions; `sampled` draws the latent, as training does."""
        action, touch = self.normalised(batch)
        moments = self.network.encode(action, touch)
        if self.settings.quantizer == "vq":
            latent, vq_loss = self.network.quantize(moments)
            decoded = self.network.decode(self.network.condition(latent), touch)
            loss = (decoded - action).abs().mean()
            return loss + 5.0 * vq_loss, {"l1": loss.detach(), "vq": vq_loss.detach()}, decoded  # weight: released code
        mean, logvar = self.network.moments(moments)
        latent = mean + (0.5 * logvar).exp() * distributed.normal_like(mean) if sampled else mean
        decoded = self.network.decode(self.network.condition(latent), touch)
        loss, parts = tokenizer_loss(decoded, action, mean, logvar, self.kl_weight)
        return loss, parts, decoded

    def setup(self, stage: str) -> None:
        check_data(self.spec, self.trainer.datamodule, ("task", "touch", "method", "relative"))

    def on_fit_start(self) -> None:
        fit_normaliser(self.normalizer, self.trainer.datamodule.normaliser_affines())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, parts, _ = self.losses(batch, sampled=True)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"val/{self.spec.task}")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, f"test/{self.spec.task}")

    def _evaluate(self, batch: dict[str, Any], prefix: str) -> None:
        loss, parts, decoded = self.losses(batch, sampled=False)
        size = len(batch["action"])
        error = position_error_mm(self.normalizer.unnormalise("action", decoded), batch["action"], self.spec)
        values = {"loss": loss, "position_error_mm": error, **parts}
        named = {f"{prefix}/{name}": value for name, value in values.items()}
        self.log_dict(named, batch_size=size, sync_dist=True, on_epoch=True, on_step=False)

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"AT {self.network.latent_dim} channels"

    def chance_levels(self) -> dict[str, float]:
        """Nothing here is guessed at."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {self.spec.task: "reconstruction of validation windows from the latent's mean"}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, task, touch or size before its weights are loaded."""
        check_class(checkpoint, type(self))
        if "task" in (theirs := checkpoint.get("hyper_parameters", {})):
            check_identity(identity(**theirs), self.identity, "ckpt_path: the checkpoint", "this model", AS_TRAINED)
        self.trained = training_record(checkpoint)


def position_error_mm(predicted: Tensor, action: Tensor, spec: PolicySpec) -> Tensor:
    """Mean distance along an axis, in mm, between actions [..., A] of one layout."""
    numbers = 3 if spec.pose_dim == 9 else 3 * len(spec.arms)
    return 1000 * (predicted - action)[..., :numbers].abs().mean()


def tokenizer_spec(spec: PolicySpec, settings: TokenizerSettings) -> PolicySpec:
    """The specification as the decoder sees it: without touch if that was taken away."""
    return spec if settings.decoder_touch else replace(spec, touch_inputs={})


def identity(task: str, touch: str, relative: bool | None, preset: str, tokenizer: Any, **_: Any) -> dict[str, Any]:
    """What two tokenizers must share so that one's weights mean the same in the other; from their arguments."""
    relative = policy_spec(task, touch, "rdp", relative=relative).relative  # None stands for what was released
    return {"task": task, "touch": touch, "relative": relative, "preset": preset} | {
        f"tokenizer.{name}": value for name, value in asdict(settings(TokenizerSettings, tokenizer)).items()
    }


def load_tokenizer(module: Tokenizer, path: str | Path) -> None:
    """Load the weights and normalisers of a trained tokenizer, ours or a released one, into one of the same kind.

    A released file may lack normalisers; those stay unfitted.

    Raises:
        UserError: no such file, no tokenizer, or one of another task, touch or size: says which setting differs.
    """
    if is_released(path):
        fit_into(module, load_tokenizer_state(path), path)
        return
    checkpoint = read_checkpoint(path, Tokenizer)
    remedy = "give the policy's own tokenizer, or the same settings to both"
    check_identity(
        identity(**checkpoint["hyper_parameters"]), module.identity, f"tokenizer: {path}", "this policy", remedy
    )
    module.load_state_dict(checkpoint["state_dict"])
