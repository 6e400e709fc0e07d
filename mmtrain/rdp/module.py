"""LightningModules of the diffusion policies: what they share, and RDP's slow latent policy. DP: `dp.py`."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.checkpoint import flatten, plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.diffusion import noised, sample, timesteps
from mmtrain.normaliser import Normaliser, limits
from mmtrain.optim import AdamWSettings
from mmtrain.rdp.checkpoints import check_class, check_data, check_identity
from mmtrain.rdp.losses import denoising_loss
from mmtrain.rdp.networks import ConditionalUnet1D
from mmtrain.rdp.normalising import check_same, fit_normaliser
from mmtrain.rdp.observation_encoder import ObservationEncoder
from mmtrain.rdp.presets import PRESETS, PresetName
from mmtrain.rdp.pretrained import fit_into, load_policy_state
from mmtrain.rdp.rollout import ClosedLoop, RolloutSettings
from mmtrain.rdp.tokenizer import (
    AS_TRAINED,
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    position_error_mm,
)
from mmtrain.robot_tasks import PolicySpec, Task, Touch, Vision, policy_spec

TRAIN_STEPS = 100  # of the noise schedule
RELEASED_OPTIM = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "decay": "all", "warmup_steps": 500}
SENSORS = {
    "force": "Force",
    "gelsight": "GelSight",
    "mctac": "MCTac",
    "gelsight_mctac": "GelSight + MCTac",
    "normal_force": "normal force",
    "none": "no touch",
}


class PolicyModule(pl.LightningModule):
    """A conditional diffusion policy: observation encoder, 1-D UNet, noise prediction (arXiv 2303.04137).

    Batches: `datamodules.robot`. A subclass says what is diffused (`target`) and how actions come from it.

    Args:
        spec: what the policy sees and sends.
        channels, length: of what is diffused.
        kernel_size: of the UNet.
        latent: name and width of a latent that has a normaliser of its own.
        preset: sizes.
        optim: optimizer and schedule.
        image_norm: "corrected", or "reference": pictures are scaled to [-1, 1] and then normalised as if they were in
            [0, 1], as Diffusion Policy and RDP released it.
        image_size: height and width of the pictures, None for the preset's.
        denoising_steps: DDIM steps of a plan. 8 is what the released evaluation uses (its configurations say 100).
        pretrained: a released checkpoint to start from, see `mmtrain.rdp.pretrained`.
        rollout: how `test` runs the policy in simulation.
    """

    paper = "rdp"

    def __init__(
        self,
        spec: PolicySpec,
        channels: int,
        length: int,
        kernel_size: int,
        latent: dict[str, int] | None = None,
        preset: PresetName = "reference",
        optim: AdamWSettings | None = None,
        image_norm: Literal["corrected", "reference"] = "corrected",
        image_size: tuple[int, int] | None = None,
        denoising_steps: int = 8,
        pretrained: str | None = None,
        rollout: RolloutSettings | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=("spec", "channels", "length", "kernel_size", "latent"))  # of the subclass too
        self.hparams.update(plain(dict(self.hparams)))  # so that checkpoints hold plain types only
        if not 1 <= denoising_steps <= TRAIN_STEPS:
            raise UserError(f"denoising_steps: {denoising_steps} is not in [1, {TRAIN_STEPS}]")
        self.spec, self.channels, self.length, self.denoising_steps = spec, channels, length, denoising_steps
        self.preset = preset
        self.optim = settings(AdamWSettings, optim or RELEASED_OPTIM)
        self.rollout = settings(RolloutSettings, rollout)
        sizes = PRESETS[preset]
        size = tuple(image_size or sizes.image_size)
        self.obs_encoder = ObservationEncoder(
            {key: size for key in spec.images}, spec.low_dim, backbone=sizes.backbone, image_norm=image_norm
        )
        self.model = ConditionalUnet1D(
            channels, 2 * self.obs_encoder.feature_dim, sizes.step_embed_dim, sizes.down_dims, kernel_size
        )
        self.normalizer = Normaliser({"action": spec.action_dim, **spec.low_dim, **(latent or {})})
        if pretrained:
            fit_into(self, load_policy_state(pretrained, image_norm=image_norm), pretrained)
        self.closed_loop: ClosedLoop | None = None  # of `test`
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    def target(self, batch: dict[str, Any]) -> Tensor:
        """What is diffused, normalised, [B, length, channels]."""
        raise NotImplementedError

    def rows(self, sampled: Tensor) -> Tensor:
        """What a plan holds, from a sample [B, length, channels]: actions [B, rows, A], or a condition [B, C]."""
        raise NotImplementedError

    def predicted(self, sampled: Tensor, batch: dict[str, Any]) -> Tensor:
        """Actions [B, H, A] of the whole window, in physical units, given its touch."""
        raise NotImplementedError

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        """Global condition [B, 2 * features] of raw observations [B, 2, ...]."""
        low_dim = {key: self.normalizer.normalise(key, observation[key]) for key in self.spec.low_dim}
        return self.obs_encoder({**{key: observation[key] for key in self.spec.images}, **low_dim})

    def noise_loss(self, batch: dict[str, Any], noise: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted noise; noise and diffusion steps are drawn unless given."""
        target = self.target(batch)
        noise = distributed.normal_like(target) if noise is None else noise
        if steps is None:
            draw = lambda rows: torch.randint(TRAIN_STEPS, (rows,), device=target.device)  # noqa: E731
            steps = distributed.rows_of_all(draw, len(target))
        predicted = self.model(noised(target, noise, steps), steps, self.condition(batch["observation"]))
        return denoising_loss(predicted, noise)

    @torch.no_grad()
    def sampled(self, observation: dict[str, Tensor], noise: Tensor) -> Tensor:
        """Sample [B, length, channels] from a start of noise of the same shape."""
        denoise = self.model.denoiser(self.condition(observation), timesteps(self.denoising_steps))
        return sample(denoise, noise, self.denoising_steps)

    def setup(self, stage: str) -> None:
        check_data(self.spec, self.trainer.datamodule, ("task", "touch", "method", "vision", "relative"))

    def on_fit_start(self) -> None:
        fit_normaliser(self.normalizer, self.trainer.datamodule.normaliser_affines())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.noise_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, f"val/{self.spec.task}")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, prefix: str) -> None:
        """Error of the noise and of sampled actions, the same random numbers each time."""
        generator = torch.Generator().manual_seed(batch_idx)
        shape = (len(batch["action"]), self.length, self.channels)
        noise = torch.randn(shape, generator=generator).to(self.device)
        steps = torch.randint(TRAIN_STEPS, shape[:1], generator=generator).to(self.device)
        loss = self.noise_loss(batch, noise, steps)
        predicted, now = self.predicted(self.sampled(batch["observation"], noise), batch), self.spec.now
        error = position_error_mm(predicted[:, now:], batch["action"][:, now:], self.spec)
        values = {f"{prefix}/noise_error": loss, f"{prefix}/position_error_mm": error}
        self.log_dict(values, batch_size=len(noise), sync_dist=True, on_epoch=True, on_step=False)

    def on_test_epoch_start(self) -> None:
        self.closed_loop = None
        self.normalizer.affine("action")  # says so if nothing was trained

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if "variation" not in batch:  # no simulation of these data
            self._evaluate(batch, batch_idx, f"test/{self.spec.task}")
            return
        if self.closed_loop is None:
            self.closed_loop = ClosedLoop(self, self.rollout)
        self.closed_loop.run(batch["variation"], batch["seed"].tolist())

    def on_test_epoch_end(self) -> None:
        if self.closed_loop is not None:
            self.log_dict(self.closed_loop.finish())
            self.figures = self.closed_loop.figures

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def blocks(self) -> list[nn.Module]:
        """What is sharded and compiled one by one, see `mmtrain.parallel`."""
        return self.model.blocks()

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"UNet {'-'.join(map(str, PRESETS[self.preset].down_dims))}"

    def chance_levels(self) -> dict[str, float]:
        """Guessing scores nothing in a closed loop; there is no level to compare with."""
        return {}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        if self.closed_loop is not None:
            return {self.spec.task: self.closed_loop.protocol()}
        return {self.spec.task: f"validation windows, {self.denoising_steps} DDIM steps; no robot, no simulation"}

    def identity(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of hyper-parameters of this class, flat: what decides what the weights mean."""
        names = ("task", "touch", "vision", "preset", "image_norm", "image_size")
        found = {name: given.get(name) for name in names}
        found["relative"] = policy_spec(
            given["task"], given["touch"], self.spec.method, given["vision"], given["relative"]
        ).relative  # None stands for what was released
        if "tokenizer_settings" in given:
            found["tokenizer_settings"] = settings(TokenizerSettings, given["tokenizer_settings"])
        return flatten(found)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, task, touch or size before its weights are loaded."""
        check_class(checkpoint, type(self))
        if "task" in (theirs := checkpoint.get("hyper_parameters", {})):
            ours = self.identity(self.hparams)
            check_identity(self.identity(theirs), ours, "ckpt_path: the checkpoint", "this model", AS_TRAINED)
        self.trained = training_record(checkpoint)


class LatentDiffusionPolicy(PolicyModule):
    """RDP's slow policy: diffuses the tokenizer's latent of an action chunk. The tokenizer stays frozen inside it.

    Args:
        task, touch, vision, relative: see `mmtrain.robot_tasks.policy_spec`; the data module has the same.
        tokenizer: checkpoint of the trained `Tokenizer`, needed by `fit` and beside `pretrained`, for a released policy
            has none in its file; afterwards it is part of the policy's.
        tokenizer_settings: those it was trained with, where they differ from the preset.
        latent_target: "mean" of the tokenizer's posterior, or "sample" as released (noisier, see RDP's issue 43).
        kwargs: settings of `PolicyModule`.
    """

    def __init__(
        self,
        task: Task,
        touch: Touch = "force",
        vision: Vision = "camera",
        relative: bool | None = None,
        tokenizer: str | None = None,
        tokenizer_settings: TokenizerSettings | None = None,
        latent_target: Literal["mean", "sample"] = "mean",
        preset: PresetName = "reference",
        **kwargs: Any,
    ) -> None:
        fast = Tokenizer(task, touch, vision, relative, preset, tokenizer_settings)
        super().__init__(
            spec=policy_spec(task, touch, "rdp", vision, relative),
            channels=fast.network.latent_dim,
            length=fast.network.latent_steps,
            kernel_size=3,  # the released code takes 3 for the latent whatever the configuration says
            latent={"latent": fast.network.latent_dim},
            preset=preset,
            **kwargs,
        )
        self.latent_target, self.tokenizer_path = latent_target, tokenizer
        self.tokenizer = fast.requires_grad_(False).eval()
        if kwargs.get("pretrained") and tokenizer:
            load_tokenizer(fast, tokenizer)
            own = {key: self.normalizer.affine(key) for key in fast.normalizer.widths if self.normalizer.is_fitted(key)}
            fit_normaliser(fast.normalizer, own, "the tokenizer", "the policy")

    @property
    def method(self) -> str:
        """The row's name in the paper's tables."""
        symmetric = " symmetric" if self.tokenizer.settings.symmetric else ""
        return f"RDP ({SENSORS[self.spec.touch]}){symmetric}{self.rollout.suffix}"

    def train(self, mode: bool = True) -> "LatentDiffusionPolicy":
        """The tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def on_fit_start(self) -> None:
        """Load the tokenizer, take over the data's statistics, and fit those of the latent on all training windows."""
        if not self.tokenizer.normalizer.is_fitted("action"):  # else a resume, or loaded beside a released policy
            if self.tokenizer_path is None:
                raise UserError("tokenizer: none is given; train one with the rdp_at_... config of the same task")
            load_tokenizer(self.tokenizer, self.tokenizer_path)
        super().on_fit_start()
        fast = self.tokenizer.normalizer
        fitted = [key for key in fast.widths if fast.is_fitted(key)]
        check_same(self.normalizer, fast, fitted, "the policy", "the tokenizer")
        fit_normaliser(fast, self.trainer.datamodule.normaliser_affines())  # those that a released file lacks
        if not self.normalizer.is_fitted("latent"):
            self.normalizer.set("latent", limits(self._training_latents()))
            rank_zero_info(f"tokenizer: {self.tokenizer_path}")

    @torch.no_grad()
    def _training_latents(self) -> np.ndarray:
        """Latents [windows * steps, channels] of all training windows, the same numbers on every process."""
        devices = [self.device] if self.device.type == "cuda" else []
        convert = self.trainer.precision_plugin.convert_input
        with torch.random.fork_rng(devices):  # a resumed run does not come here, and must draw the same numbers
            torch.manual_seed(0)
            latents = [
                self._latent(convert(move_data_to_device(batch, self.device)), torch.randn_like).flatten(0, 1).cpu()
                for batch in self.trainer.datamodule.training_windows()
            ]
        return torch.cat(latents).numpy()

    def _latent(self, batch: dict[str, Any], normal: Callable[[Tensor], Tensor] = distributed.normal_like) -> Tensor:
        """Latent of a batch's actions, [B, L, channels]; `normal` draws what "sample" adds."""
        return self.tokenizer.latent(*self.tokenizer.normalised(batch), self.latent_target, normal).transpose(1, 2)

    def target(self, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return self.normalizer.normalise("latent", self._latent(batch))

    def rows(self, sampled: Tensor) -> Tensor:
        latent = self.normalizer.unnormalise("latent", sampled)
        return self.tokenizer.network.condition(latent.transpose(1, 2))

    def predicted(self, sampled: Tensor, batch: dict[str, Any]) -> Tensor:
        _, touch = self.tokenizer.normalised(batch)
        return self.normalizer.unnormalise("action", self.tokenizer.network.decode(self.rows(sampled), touch))
