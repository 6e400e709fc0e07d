"""The alignment classifier: does this sound belong to these pictures, and at these instants? Two uses of one network.

"noisy" it guides the sampler (Diff-Foley, arXiv 2306.17203, double guidance); on clean latents it is the metric Align
Acc. The data of the released training were not published, so the proportions of pairs are settings of the data module.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.checkpoint import plain, settings
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import (
    CLASS,
    FEATURES,
    accept,
    check_class,
    check_first_stage,
    check_has_first_stage,
    class_path,
    data_features,
    first_stage_config,
    frozen_first_stage,
    is_ours,
    own_network,
    read_file,
)
from mmtrain.difffoley.first_stage import FirstStage, load_first_stage
from mmtrain.difffoley.networks import AlignmentNetwork, network_settings
from mmtrain.difffoley.pretrained import FIRST_STAGE, load_alignment_network
from mmtrain.ema import ema_weights
from mmtrain.metrics.generation import SampleMetric
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.optim import AdamWSettings
from mmtrain.seeding import clip_noise, spread_times
from mmtrain.video_audio import ClipFormat, check_same
from mmtrain.weight_files import naming, read_weights

SMALLEST = {"block_out_channels": (32,)}  # a first stage that is replaced at once
KINDS = ("true", "shifted", "wrong")  # of pairs, in the order of the batches' `kind`
RELEASED_OPTIM = {"lr": 5e-5, "weight_decay": 0.01, "decay": "all", "schedule": "constant", "warmup_steps": 1}


class PairAccuracy(SampleMetric):
    """`accuracies` of pairs, exact over processes: each id counts once."""

    def __init__(self) -> None:
        super().__init__(("logits", "match", "kind"))

    def update(self, logits: Tensor, match: Tensor, kind: Tensor, ids: Tensor) -> None:
        """Add pairs, see `right_by_kind`; ids int64 [B]."""
        self.add(ids, 0, logits=logits, match=match, kind=kind)

    def compute(self) -> dict[str, float]:
        """See `accuracies`."""
        table = self.table()
        return accuracies(right_by_kind(*(table[name].flatten() for name in self.columns)))


class AlignmentClassifier(pl.LightningModule):
    """Classifies pairs of a mel latent and CAVP features as matching or anything else.

    Loss: binary cross-entropy of the logit. Batches: mel [B, C, F] in [0, 1], features [B, T, D], match [B] in {0, 1},
    kind int64 [B] (0 true, 1 shifted in time, 2 of another video), id int64 [B] in evaluation.

    Args:
        format: how the clips are cut; the data module has the same.
        network: sizes of `AlignmentNetwork`, the paper's where nothing is given.
        first_stage: checkpoint of the autoencoder (see `load_first_stage`), or its AutoencoderKL settings, or None for
            that of `pretrained` if its file holds one, else Stable Diffusion's sizes with fresh weights, which are
            not trained on. It stays frozen.
        noisy: True noises the latent, for guidance; False leaves it clean, for the metric.
        time_power: timesteps are drawn as 1000 u^time_power with u uniform. 1 is the released code. A small network
            leaves chance level only when it often sees little noise.
        optim: optimizer and schedule; the defaults are the released ones.
        pretrained: a released classifier, or one of ours, to start from.
    """

    paper = "difffoley"

    def __init__(
        self,
        format: ClipFormat | None = None,
        network: dict[str, Any] | None = None,
        first_stage: str | dict[str, Any] | None = None,
        noisy: bool = True,
        time_power: float = 1.0,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        self.format, self.noisy, self.time_power = settings(ClipFormat, format), noisy, time_power
        if time_power <= 0:
            raise UserError(f"time_power: {time_power}, must be above 0; 1 draws timesteps uniformly")
        self.optim = settings(AdamWSettings, optim or RELEASED_OPTIM)
        self.first_stage_from = first_stage
        if first_stage is None and pretrained:
            with naming("pretrained"):
                self.first_stage_from = pretrained if holds_first_stage(pretrained) else None
        self.first_stage = frozen_first_stage(self.first_stage_from)
        network = network_settings(network, self.format, self.first_stage.factor)
        self.hparams["network"] = plain(network)  # with what the network got from the format
        self.network = AlignmentNetwork(**network)
        self.schedule = NoiseSchedule()
        if pretrained:
            start_from(self, pretrained)
        self.evaluations = nn.ModuleList()  # a metric a set
        self.features_from: dict[str, Any] | None = None  # the extractor of the training's features
        self.data_features: dict[str, Any] | None = None  # the extractor of those that are given now
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    @property
    def method(self) -> str:
        """What the results call it."""
        return f"alignment classifier ({'guidance' if self.noisy else 'metric'})"

    def train(self, mode: bool = True) -> "AlignmentClassifier":
        """The first stage stays in evaluation mode."""
        super().train(mode)
        self.first_stage.eval()
        return self

    def logits(self, latent: Tensor, features: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Logits [B] of "these belong together".

        Args:
            latent: clean latent [B, 4, h, w].
            features: [B, T, D].
            t: int64 [B] timesteps; None for the clean latent, which is shown to the network as t = 0.
            noise: [B, 4, h, w], needed with `t`.
        """
        if t is None:
            return self.network(latent, torch.zeros(len(latent), device=latent.device), self.network.context(features))
        noised = self.schedule.q_sample(latent, noise, t)
        return self.network(noised, t.to(latent.dtype), self.network.context(features))

    @torch.no_grad()
    def probability(self, mel: Tensor, features: Tensor) -> Tensor:
        """Probability [B] that spectrograms [B, C, F] in [0, 1] belong to features [B, T, D]: what Align Acc rounds.

        The latent is the posterior's mean; the released code draws a sample of it.
        """
        latent = self.first_stage.encode(mel, sample=False)
        return self.logits(latent, features).sigmoid()

    def setup(self, stage: str) -> None:
        check_has_first_stage(self.first_stage_from, stage, bool(self.trainer.ckpt_path))
        self.data_features = data_features(self.trainer.datamodule, self.format)
        if stage == "fit":
            self.features_from = self.data_features

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with torch.no_grad():
            latent = self.first_stage.encode(batch["mel"], sample=True)
        t = noise = None
        if self.noisy:
            u = distributed.uniform(len(latent), latent.device) ** self.time_power
            t = (self.schedule.train_steps * u).long().clamp(max=self.schedule.train_steps - 1)
            noise = distributed.normal_like(latent)
        logits = self.logits(latent, batch["features"], t, noise)
        loss = F.binary_cross_entropy_with_logits(logits, batch["match"].to(logits.dtype))
        self.log("train/loss", loss.detach(), prog_bar=True)
        right, counted = right_by_kind(logits.detach(), batch["match"], batch["kind"]).unbind(1)
        self.log("train/accuracy", right.sum() / counted.sum().clamp(min=1), prog_bar=True)
        for name, hits, number in zip(KINDS, right, counted, strict=True):
            if number > 0:
                self.log(f"train/accuracy_{name}", hits / number)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, dataloader_idx, "test")

    def _evaluate(self, batch: dict[str, Any], dataloader_idx: int, verb: str) -> None:
        """The same noise and timesteps for a clip each time, whatever its batch."""
        if "mel" not in batch:  # none of its clips could be used
            return
        name = self.trainer.datamodule.loader_names[dataloader_idx]
        size = len(batch["mel"])
        ids = batch["id"]
        latent = self.first_stage.encode(batch["mel"], sample=False)
        t = noise = None
        if self.noisy:
            t = (spread_times(ids) * self.schedule.train_steps).long().to(latent.device)
            noise = clip_noise(ids, latent.shape[1:], device=latent.device)
        logits = self.logits(latent, batch["features"], t, noise)
        loss = F.binary_cross_entropy_with_logits(logits, batch["match"].to(logits.dtype))
        self.log(f"{verb}/{name}/loss", loss, batch_size=size, sync_dist=True, add_dataloader_idx=False)
        self.evaluations[dataloader_idx].update(logits, batch["match"], batch["kind"], ids)

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def on_test_epoch_start(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.evaluations = nn.ModuleList(PairAccuracy() for _ in self.trainer.datamodule.loader_names).to(self.device)

    def on_validation_epoch_end(self) -> None:
        self._log_accuracies("val")

    def on_test_epoch_end(self) -> None:
        self._log_accuracies("test")

    def _log_accuracies(self, verb: str) -> None:
        """Accuracy over all pairs and by kind; a kind that the set lacks is left out."""
        for name, metric in zip(self.trainer.datamodule.loader_names, self.evaluations, strict=True):
            self.log_dict({f"{verb}/{name}/{key}": value for key, value in metric.compute().items()})

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))
        checkpoint[FEATURES] = self.features_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or of other clips before its weights are loaded."""
        accept(self, checkpoint, "noisy")

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return f"UNet encoder, {sum(p.numel() for p in self.network.parameters()) / 1e6:.2f} M"

    def chance_levels(self) -> dict[str, float]:
        """A coin's accuracy of each kind; a classifier that always says "no" does better than that over all pairs."""
        names = [name for name in self.trainer.callback_metrics if "/accuracy" in name]
        return {name: 0.5 for name in names if not name.endswith("/accuracy")}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        latents = "timesteps spread over [0, 1000), noise fixed by the clip" if self.noisy else "clean latents, t = 0"
        return {
            name: f"pairs true, shifted and wrong as the data module makes them; {latents}"
            for name in self.trainer.datamodule.loader_names
        }


def right_by_kind(logits: Tensor, match: Tensor, kind: Tensor) -> Tensor:
    """Decisions that are right and their number, [3, 2], a row a kind of `KINDS`; the decision is round(p).

    Args:
        logits, match: [B], `match` in {0, 1}.
        kind: int64 [B].
    """
    right = ((logits > 0) == (match > 0.5)).float()
    member = F.one_hot(kind.long(), len(KINDS)).float()
    return torch.stack((member.T @ right, member.sum(0)), 1)


def accuracies(counts: Tensor) -> dict[str, float]:
    """`accuracy` over all pairs and `accuracy_<kind>`, from the counts of `right_by_kind`; absent kinds are left out.

    >>> accuracies(torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]]))
    {'accuracy': 0.6666666666666666, 'accuracy_true': 0.5, 'accuracy_shifted': 1.0}
    """
    found = counts.double().tolist()
    total = sum(number for _, number in found)
    named = {"accuracy": sum(right for right, _ in found) / total} if total else {}
    by_kind = zip(KINDS, found, strict=True)
    return named | {f"accuracy_{name}": right / number for name, (right, number) in by_kind if number}


def load_alignment(
    path: str | Path,
    where: str = "alignment_classifier",
    format: ClipFormat | None = None,
    first_stage: FirstStage | None = None,
    noisy: bool | None = None,
) -> AlignmentClassifier:
    """A trained classifier, ours with its averaged weights where it has any, or a released one: frozen, on the CPU.

    Args:
        where: the setting that named the file, for messages.
        format: how the caller's clips are cut; checked against the file's.
        first_stage: the caller's; ours must have been trained on the same one. The released classifier for guidance
            has none in its file and takes this one.
        noisy: the use that is wanted, None for any.

    Raises:
        UserError: no such file, no alignment classifier, made for other clips, other latents or the other use.
    """
    place = f"{where}: {path}"
    content = read_file(path, where)
    if is_ours(content):
        check_class(content, AlignmentClassifier, place)
        hparams = content["hyper_parameters"]
        classifier = AlignmentClassifier(
            hparams["format"],
            {"columns_per_feature": None, **(hparams["network"] or {})},  # a file that does not tell has none
            first_stage_config(content["state_dict"]),
            hparams["noisy"],
        )
        classifier.load_state_dict(ema_weights(content))
        classifier.features_from = content.get(FEATURES)
        if format is not None:
            check_same(format, classifier.format, place)
        check_first_stage(classifier.first_stage, first_stage, place)
    else:
        with naming(where):
            classifier = released_alignment(path, format, first_stage)
    if noisy is not None and classifier.noisy != noisy:
        needed = "guidance needs one with noisy: true" if noisy else "the metric needs one with noisy: false"
        raise UserError(f"{place}: was trained with noisy: {str(classifier.noisy).lower()}; {needed}")
    return classifier.requires_grad_(False).eval()


def holds_first_stage(path: str) -> bool:
    """Whether a released classifier, or one of ours, has its first stage in its file."""
    return any(name.startswith((FIRST_STAGE, "first_stage.")) for name in read_weights(path))


def start_from(classifier: AlignmentClassifier, path: str) -> None:
    """Load the network, without the first stage, of a released classifier or one of ours.

    Raises:
        UserError: no such file, no alignment classifier, or one of other sizes.
    """
    content = read_file(path, "pretrained")
    if not is_ours(content):
        with naming("pretrained"):
            load_alignment_network(classifier.network, path)
        return
    check_class(content, AlignmentClassifier, f"pretrained: {path}")
    classifier.network.load_state_dict(own_network(ema_weights(content), classifier.network, f"pretrained: {path}"))


def released_alignment(
    path: str | Path, format: ClipFormat | None, first_stage: FirstStage | None
) -> AlignmentClassifier:
    """A released classifier: for the metric if it has a first stage in its file, else for guidance."""
    has_first_stage = holds_first_stage(path)
    stage = load_first_stage(path) if has_first_stage else first_stage or FirstStage()
    classifier = AlignmentClassifier(format, first_stage=SMALLEST, noisy=not has_first_stage)
    classifier.first_stage = stage
    load_alignment_network(classifier.network, path)
    return classifier
