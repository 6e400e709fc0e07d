"""A classifier of sounds whose features IS, FID and KL are measured with: melception, or a small network like it."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.difffoley.checkpoints import (
    CLASS,
    check_class,
    class_path,
    is_ours,
    read_file,
    trained_class,
)
from mmtrain.difffoley.melception import Melception, is_released_melception, load_melception
from mmtrain.metrics.generation import HitRate
from mmtrain.optim import AdamWSettings

MEL_BINS = 80
DEFAULT_OPTIM = {"lr": 1e-3, "weight_decay": 1e-2, "warmup_steps": 50}


class SmallMelception(nn.Module):
    """Four strided convolutions with the outputs of `Melception` under its names, so that metrics take either.

    Not comparable with melception's numbers: another network gives other features.

    Args:
        num_classes: of the last layer.
        width: channels of the first convolution; "2048" has 8 times as many.
        dropout: before the last layer, while training.
    """

    def __init__(self, num_classes: int, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.standard = nn.BatchNorm1d(MEL_BINS, affine=False)  # mean and deviation of each bin, learned from the data
        widths = (1, width, 2 * width, 4 * width, 8 * width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
            )
            for before, after in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, mel: Tensor) -> dict[str, Tensor]:
        """Features of spectrograms.

        Args:
            mel: [B, 80, F] in [0, 1] of preset `mel_specvqgan`.

        Returns:
            "64", "192", "768", "2048": means over the map after each convolution (the names tell the place, not the
            width); "logits_unbiased" and "logits" [B, num_classes] without and with the bias of the last layer.

        Raises:
            ValueError: not 80 bins.
        """
        if mel.ndim != 3 or mel.shape[1] != MEL_BINS:
            raise ValueError(f"expected [B, {MEL_BINS}, F], got {list(mel.shape)}")
        x, features = self.standard(mel)[:, None], {}
        for name, block in zip(("64", "192", "768", "2048"), self.blocks, strict=True):
            x = block(x)
            features[name] = x.mean(dim=(2, 3))
        unbiased = self.dropout(features["2048"]) @ self.fc.weight.T
        return features | {"logits_unbiased": unbiased, "logits": unbiased + self.fc.bias}


class SoundClassifier(pl.LightningModule):
    """Cross entropy on the class of a sound.

    Batches: "mel" [B, 80, F] in [0, 1] of preset `mel_specvqgan`, "label" int64 [B]; in evaluation also "id" int64 [B].

    Args:
        num_classes: of the data.
        architecture: "small", or "melception" for the full network.
        width: of the small one.
        optim: optimizer and schedule.
        pretrained: released melception, or a checkpoint of this class, to start from; classes must be as many.
    """

    paper = "difffoley"
    method = "sound classifier"

    def __init__(
        self,
        num_classes: int,
        architecture: Literal["small", "melception"] = "small",
        width: int = 16,
        optim: AdamWSettings | None = None,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        if num_classes < 2:
            raise UserError(f"num_classes: {num_classes}, must be at least 2")
        self.num_classes, self.architecture = num_classes, architecture
        self.optim = settings(AdamWSettings, optim or DEFAULT_OPTIM)
        self.network = Melception(num_classes) if architecture == "melception" else SmallMelception(num_classes, width)
        if pretrained:
            state = load_feature_network(pretrained, "pretrained").state_dict()
            try:
                self.network.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(
                    f"pretrained: {pretrained}: does not fit: {str(error).splitlines()[1].strip()}"
                ) from error
        self.set_names: list[str] = []
        self.accuracies = nn.ModuleList()
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        return "melception" if self.architecture == "melception" else f"small melception, width {self.hparams.width}"

    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes."""
        names = getattr(self.trainer.datamodule, "class_names", None)
        if names and len(names) != self.num_classes:
            raise UserError(f"model.num_classes: {self.num_classes}, but the data have {len(names)} classes")

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Loss and whether each answer is right, bool [B]."""
        logits, label = self.network(batch["mel"])["logits"], batch["label"]
        if label.min() < 0 or label.max() >= self.num_classes:
            raise UserError(
                f"model.num_classes: {self.num_classes}, but a label is {int(label.max())} (lowest {int(label.min())})"
            )
        return cross_entropy(logits, label), logits.argmax(dim=1) == label

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, right = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/accuracy", right.float().mean())
        return loss

    def _begin(self) -> None:
        self.set_names = list(getattr(self.trainer.datamodule, "evaluation_sets", {})) or ["sounds"]
        self.accuracies = nn.ModuleList(HitRate() for _ in self.set_names).to(self.device)

    def _add(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        if "mel" not in batch:  # none of its clips could be used
            return
        _, right = self.loss(batch)
        self.accuracies[dataloader_idx].update(right, batch["id"])

    def _finish(self, prefix: str) -> None:
        for name, metric in zip(self.set_names, self.accuracies, strict=True):
            found = {"accuracy" + key.removeprefix("rate"): value.float() for key, value in metric.compute().items()}
            self.log_dict({f"{prefix}/{name}/{key}": value for key, value in found.items()})

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_start(self) -> None:
        self._begin()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def chance_levels(self) -> dict[str, float]:
        """Accuracy of guessing among equally frequent classes."""
        return {f"{verb}/{name}/accuracy": 1 / self.num_classes for verb in ("val", "test") for name in self.set_names}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {name: f"top-1 of {self.num_classes} classes, 95 % Wilson interval" for name in self.set_names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = class_path(type(self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before its weights are loaded."""
        check_class(checkpoint, type(self))
        self.trained = training_record(checkpoint)


def load_feature_network(path: str | Path, where: str = "feature_network") -> nn.Module:
    """The network that IS, FID and KL are measured with, frozen and in eval mode: ours, or the released melception.

    Args:
        path: checkpoint of `SoundClassifier`, or a file with melception's weights under `model`.
        where: the setting that named the file, for messages.

    Raises:
        UserError: no such file, or another model's.
    """
    content = read_file(path, where)
    if is_released_melception(content):
        return load_melception(path, where)
    if not is_ours(content) or trained_class(content) != class_path(SoundClassifier):
        stored = trained_class(content) or "unknown"
        raise UserError(
            f"{where}: {path}: is a checkpoint of {stored}, expected one of {class_path(SoundClassifier)} or the "
            "released melception"
        )
    given = content["hyper_parameters"]
    module = SoundClassifier(given["num_classes"], given["architecture"], given["width"])
    state = {k: v for k, v in content["state_dict"].items() if k.startswith("network.")}
    module.load_state_dict(state)
    return module.network.eval().requires_grad_(False)
