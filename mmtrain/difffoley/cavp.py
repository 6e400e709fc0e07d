"""CAVP, contrastive audio-visual pretraining (Diff-Foley, arXiv 2306.17203): its network and its training."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import CLASS, check_class, class_path
from mmtrain.difffoley.clip_retrieval import KS, ClipRetrieval
from mmtrain.difffoley.cnn14 import Cnn14, ConvBlock
from mmtrain.difffoley.losses import cavp_loss
from mmtrain.difffoley.pretrained_cavp import load_cavp_weights, load_kinetics, load_panns
from mmtrain.difffoley.slowonly import Bottleneck, SlowOnly
from mmtrain.optim import AdamWSettings
from mmtrain.recompute import recomputed
from mmtrain.video_audio import ClipFormat, check_same

RELEASED_OPTIM = {"lr": 8e-4, "weight_decay": 0.2, "decay": "matrices", "warmup_steps": 200}
INITIAL_LOGIT_SCALE, MAX_LOGIT_SCALE = math.log(1 / 0.07), math.log(100)


class CavpNetwork(nn.Module):
    """Video and spectrogram encoders with a common space of features; names and sizes are the released ones.

    Args:
        width: channels of the video encoder's stem.
        audio_width: channels of the spectrogram encoder's first block.
        feature_dim: D, width of the features.
        mel_bins: bins of the spectrograms.
        gradient_checkpointing: keep activations of block borders only; the gradients are the same.
        dropout: see `Cnn14`.
    """

    def __init__(
        self,
        width: int = 64,
        audio_width: int = 64,
        feature_dim: int = 512,
        mel_bins: int = 128,
        gradient_checkpointing: bool = False,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.video_encoder = SlowOnly(width, gradient_checkpointing)
        self.video_project_head = nn.Linear(self.video_encoder.out_channels, feature_dim)
        self.spec_encoder = Cnn14(audio_width, mel_bins, feature_dim, gradient_checkpointing, dropout)

    def encode_video(self, video: Tensor, normalize: bool = True, pool: bool = False) -> Tensor:
        """Features of video.

        Args:
            video: float [B, T, 3, H, W] in [0, 1]; H and W from 32, any T. A feature sees 9 frames on either side.
            normalize: to unit length.
            pool: take the maximum over the frames, before normalising, as training does.

        Returns:
            [B, T, D], or [B, D] with `pool`.
        """
        return self._finish(self.video_project_head(self.video_encoder(video)), normalize, pool)

    def encode_spectrogram(self, mel: Tensor, normalize: bool = True, pool: bool = False) -> Tensor:
        """Features of mel spectrograms.

        Args:
            mel: float [B, C, F] in [0, 1], preset `mel_cavp` (hop 250), F at least 16.
            normalize: to unit length.
            pool: take the maximum over time, before normalising, as training does.

        Returns:
            [B, F // 16, D], or [B, D] with `pool`.
        """
        return self._finish(self.spec_encoder(mel), normalize, pool)

    @staticmethod
    def _finish(features: Tensor, normalize: bool, pool: bool) -> Tensor:
        features = features.amax(dim=1) if pool else features
        wide = torch.promote_types(features.dtype, torch.float32)  # norms of half-precision features lose digits
        return F.normalize(features.to(wide), dim=-1) if normalize else features

    def forward(self, frames: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled unit features [B, D] of clips: frames uint8 [B, T, 3, H, W] and mel [B, C, F]."""
        video = frames.to(mel.dtype) / 255
        return self.encode_video(video, pool=True), self.encode_spectrogram(mel, pool=True)


def encode_clips(
    network: CavpNetwork, frames: Tensor, mel: Tensor, micro_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pooled unit features of clips, in micro-batches if memory is short.

    With `micro_batch`, the features of all micro-batches are computed first, keeping no activations, and each
    micro-batch is run again in the backward pass (GradCache, arXiv 2101.06983). The loss still sees all clips, so no
    negatives are lost; memory is that of one micro-batch. BatchNorm then normalises each micro-batch by its own
    statistics, so that gradients are not those of the whole batch: keep a micro-batch at 8 clips or more.

    Args:
        frames: uint8 [N, T, 3, H, W].
        mel: [N, C, F].
        micro_batch: clips at a time; None takes all.

    Returns:
        video and audio features, each [N, D].
    """
    if micro_batch is None or micro_batch >= len(frames):
        return network(frames, mel)
    blocks = zip(frames.split(micro_batch), mel.split(micro_batch), strict=True)
    features = [recomputed(network, network, *block) for block in blocks]
    video, audio = zip(*features, strict=True)
    return torch.cat(video), torch.cat(audio)


class Cavp(pl.LightningModule):
    """Trains CAVP: semantic contrast over all clips of all processes, temporal contrast within each video.

    Batches: training {"video": uint8 [B, c, T, 3, H, W], "mel": [B, c, C, F]} with c clips of each video (without that
    axis c is 1); evaluation {"video": uint8 [B, T, 3, H, W], "mel": [B, C, F], "id": int64 [B]}.

    Args:
        format: how clips are cut; the data module has the same.
        width: channels of the video encoder's stem; 64 is the paper's.
        audio_width: channels of the spectrogram encoder's first block; 64 is the paper's.
        feature_dim: width of the features.
        intra_weight: weight of the temporal contrast; the release has 1.
        optim: optimizer and schedule; the defaults are the released ones, for 240 videos a step.
        pretrained: a whole CAVP to start from, released or ours.
        kinetics: mmaction's SlowOnly-R50 of Kinetics-400, to start the video encoder from.
        panns: PANNs' Cnn14_16k, to start the spectrogram encoder from.
        gradient_checkpointing: less memory, about a third more time; the same gradients.
        dropout: of the sound's encoder, see `Cnn14`.
        micro_batch: clips a process encodes at a time, see `encode_clips`; None takes all.

    Raises:
        UserError: a weight or size out of range, a file that does not fit, or `pretrained` beside one of the others.
    """

    paper = "difffoley"
    method = "CAVP"

    def __init__(
        self,
        format: ClipFormat | None = None,
        width: int = 64,
        audio_width: int = 64,
        feature_dim: int = 512,
        intra_weight: float = 1.0,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
        kinetics: str | None = None,
        panns: str | None = None,
        gradient_checkpointing: bool = False,
        dropout: float = 0.2,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        if intra_weight < 0:
            raise UserError(f"intra_weight: {intra_weight}, must not be negative")
        if micro_batch is not None and micro_batch < 2:
            raise UserError(f"micro_batch: {micro_batch}, must be at least 2: BatchNorm cannot train on a single clip")
        if pretrained and (kinetics or panns):
            raise UserError("pretrained: replaces both encoders: give it, or kinetics and panns, not both")
        self.format = settings(ClipFormat, format)
        self.hparams["format"] = plain(self.format)
        self.intra_weight, self.micro_batch = intra_weight, micro_batch
        self.optim = settings(AdamWSettings, optim or RELEASED_OPTIM)
        self.network = CavpNetwork(
            width, audio_width, feature_dim, gradient_checkpointing=gradient_checkpointing, dropout=dropout
        )
        if pretrained:
            load_cavp_weights(self.network, pretrained)
        if kinetics:
            load_kinetics(self.network.video_encoder, kinetics)
        if panns:
            fresh = load_panns(self.network.spec_encoder, panns)
            rank_zero_info(f"panns: not in the file and so freshly initialised: {', '.join(fresh)}")
        self.set_names: list[str] = []  # of the evaluation sets; a list, for modules may not have every name
        self.evaluations = nn.ModuleList()
        self.figures: list[dict[str, str]] = []
        self.trained: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Refuse data that were cut otherwise."""
        given = getattr(self.trainer.datamodule, "format", None)
        if given is not None:
            check_same(self.format, given, "data.format")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        frames, mel = batch["video"], batch["mel"]
        clips = 1
        if frames.ndim == 6:
            clips = frames.shape[1]
            frames, mel = frames.flatten(0, 1), mel.flatten(0, 1)
        video, audio = encode_clips(self.network, frames, mel, self.micro_batch)
        with torch.autocast(self.device.type, enabled=False):  # coarse logits would make ties
            scale = self.network.logit_scale.reshape(()).exp()  # sharded, it is a vector of one number
            loss, parts = cavp_loss(video.float(), audio.float(), scale, clips, self.intra_weight)
        # each process's loss is of its own rows; their mean is the loss over all
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, sync_dist=True)
        self.log("train/logit_scale", self.network.logit_scale.detach())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():  # here and not at the batch's end, where a checkpoint would hold the value before
            self.network.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def blocks(self) -> list[nn.Module]:
        """What is sharded and compiled one by one, see `mmtrain.parallel`.

        Not the spectrograms' first block: sharding passes inputs on as views, and with a single channel those do not
        look channels-last any more, so that convolutions and the draws of dropout would be others.
        """
        parts = self.network.modules()
        return [m for m in parts if isinstance(m, Bottleneck) or (isinstance(m, ConvBlock) and m.conv1.in_channels > 1)]

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def on_test_epoch_start(self) -> None:
        self._begin()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluations("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluations("test")

    def _begin(self) -> None:
        self.set_names = list(self.trainer.datamodule.evaluation_sets)
        self.evaluations = nn.ModuleList(ClipRetrieval() for _ in self.set_names).to(self.device)

    def _add(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        if "mel" not in batch:  # none of its clips could be used
            return
        video, audio = encode_clips(self.network, batch["video"], batch["mel"])
        self.evaluations[dataloader_idx].update(video, audio, batch["id"])

    def _log_evaluations(self, prefix: str) -> None:
        for name, metric in zip(self.set_names, self.evaluations, strict=True):
            self.log_dict({f"{prefix}/{name}/{key}": value for key, value in metric.compute().items()})

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"SlowOnly-R50 {self.hparams['width']} + Cnn14 {self.hparams['audio_width']}"

    def chance_levels(self) -> dict[str, float]:
        """Recall and ranks of guessing, by the name under which they are logged in `test`."""
        levels: dict[str, float] = {}
        for name, about in self.trainer.datamodule.evaluation_sets.items():
            count = about["num_samples"]
            for way in ("v2a", "a2v"):
                levels |= {f"test/{name}/{way}_r{k}": min(1.0, k / count) for k in KS}
                levels |= {f"test/{name}/{way}_{kind}_rank": (count + 1) / 2 for kind in ("median", "mean")}
        return levels

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        seconds = self.format.contrast_frames / self.format.fps
        return {
            name: f"one item of {seconds:g} s of each of {about['num_samples']} clips, max-pooled features, all clips "
            "of the set as candidates, ties against the query"
            for name, about in self.trainer.datamodule.evaluation_sets.items()
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before its weights are loaded."""
        check_class(checkpoint, type(self))
        self.trained = training_record(checkpoint)
