"""A classifier that says which characters a picture shows: F-Acc and C-F1 of generated pictures rest on it.

With a dozen pictures a character it must be tested on pictures that it never saw: K networks are trained at once, each
without one fold, and each picture is scored by the network that never saw it. What comes out is kept in the checkpoint
and printed beside every number that is measured with the classifier. B batch, K folds, C characters.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mmtrain import distributed
from mmtrain.checkpoint import plain, settings, training_record
from mmtrain.config_errors import UserError
from mmtrain.metrics.characters import CharacterF1, FrameAccuracy
from mmtrain.optim import AdamWSettings
from mmtrain.story import World, describe_world, world_from
from mmtrain.storyweaver.classifier_networks import (
    Architecture,
    CharacterHead,
    KeptMaps,
    make_backbone,
    pooling_of,
)

CLASS, HELD_OUT, ABOUT = "model_class", "held_out", "recogniser"  # keys in a checkpoint
AUXILIARY = 0.4  # weight of Inception's second head
DEFAULT_OPTIM = {"lr": 1e-3, "weight_decay": 1e-2, "warmup_steps": 20}
LOWEST = -3.0  # bias that answers begin with: most characters are absent from most pictures


class CharacterClassifier(pl.LightningModule):
    """Binary cross-entropy on each character of a picture, K networks in one fit, network k without fold k.

    Batches: picture uint8 [B, 3, h, w], present float32 [B, C] of 0 and 1, fold int64 [B], id int64 [B]. A fold below 0
    marks pictures that are in no network's training; in evaluation the mean of all scores them.

    Args:
        architecture: "small", four strided convolutions; "efficientnet_lite0", whose ImageNet weights come in a Python
            package; "inception_v3" of torchvision (299 px in the literature), ImageNet weights from a file.
        weights: of Inception, a file of torchvision's layout; None starts from nothing. The others need none.
        frozen_backbone: train K heads on one backbone that stays as it is, batch statistics included.
        keep_statistics: of a backbone that is trained: batch statistics stay those of ImageNet, since a batch of a few
            pictures has poor ones.
        views: of a frozen backbone: how many fixed variants of each picture to train on, whose maps stay in memory
            (6 of 151 pictures of 224 x 392 take 0.2 GB); the data must then not augment. 0 takes the data's pictures.
        mirror: score a picture by the mean over it and its mirror image; for worlds where that is the same character.
        width: channels of the first convolution of the small one.
        optim: optimizer and schedule.

    Raises:
        UserError: settings that contradict each other, or weights that are not there.
    """

    paper = "storyweaver"
    method = "character classifier"

    def __init__(
        self,
        architecture: Architecture = "small",
        weights: str | None = None,
        frozen_backbone: bool = False,
        keep_statistics: bool = True,
        views: int = 0,
        mirror: bool = False,
        width: int = 32,
        optim: AdamWSettings | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update(plain(dict(self.hparams)))
        if frozen_backbone and architecture == "small":
            raise UserError("frozen_backbone: the small architecture has no weights to keep, it would know nothing")
        if weights is not None and architecture != "inception_v3":
            raise UserError(f"weights: {architecture} takes no file of weights; they are for inception_v3")
        if frozen_backbone and architecture == "inception_v3" and weights is None:
            raise UserError("frozen_backbone: needs the weights of inception_v3, or it would know nothing")
        if views < 0 or (views and not frozen_backbone):
            raise UserError(f"views: {views}: must be 0 or more, and 0 unless the backbone is frozen")
        self.kept = KeptMaps(views) if views else None
        self.architecture, self.weights, self.width = architecture, weights, width
        self.frozen_backbone, self.mirror = frozen_backbone, mirror
        self.keep_statistics = keep_statistics and (architecture == "efficientnet_lite0" or weights is not None)
        self.optim = settings(AdamWSettings, optim or DEFAULT_OPTIM)
        self.backbones, self.heads = nn.ModuleList(), nn.ModuleList()  # one or K, and K
        self.world: World | None = None
        self.picture_size: tuple[int, int] | None = None  # h, w
        self.held_out: dict[str, dict[str, float]] = {}  # by evaluation set
        self.set_names: list[str] = []
        self.metrics = nn.ModuleList()
        self.trained: dict[str, Any] = {}
        self.figures: list[dict[str, str]] = []

    def build(self, characters: int, folds: int, pretrained: bool = True) -> None:
        """Make the networks.

        Args:
            characters, folds: how many.
            pretrained: False for weights that a checkpoint fills at once.

        Raises:
            UserError: fewer than two folds, or weights that are not there.
        """
        if folds < 2:
            raise UserError(f"data.folds: {folds}: must be at least 2, or no picture is left that a network never saw")
        count = 1 if self.frozen_backbone else folds
        make = lambda: make_backbone(self.architecture, self.width, self.weights if pretrained else None, pretrained)  # noqa: E731
        self.backbones = nn.ModuleList(make() for _ in range(count))
        if self.frozen_backbone:
            self.backbones.requires_grad_(False)
        first, pooling = self.backbones[0], pooling_of(self.architecture)
        second = None if self.frozen_backbone else first.second_channels
        self.heads = nn.ModuleList(
            CharacterHead(first.channels, characters, pooling, LOWEST, second) for _ in range(folds)
        )
        self.train(self.training)

    def train(self, mode: bool = True) -> "CharacterClassifier":
        """What is frozen, and batch statistics that are to be kept, stay in evaluation mode."""
        super().train(mode)
        if self.frozen_backbone:
            self.backbones.eval()
        elif self.keep_statistics:
            for part in self.backbones.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eval()
        return self

    def setup(self, stage: str) -> None:
        """Make the networks for the data's characters and folds.

        Raises:
            UserError: data without a world or folds, or of another world than the networks are of.
        """
        data = self.trainer.datamodule
        if getattr(data, "world", None) is None or not hasattr(data, "folds"):
            raise UserError("data: gives no characters in folds; take datamodules.story.CharacterDataModule")
        if self.kept is not None and (getattr(data, "augment", False) or getattr(data, "pairs", 0)):
            raise UserError("views: makes variants of the pictures itself: set data.augment false and data.pairs 0")
        if self.heads and self.world is not None and self.world.names != data.world.names:
            raise UserError(f"data: has other characters than the classifier ({', '.join(self.world.names)})")
        self.world, self.picture_size = data.world, tuple(data.picture_size)
        if not self.heads:
            self.build(len(data.world.names), data.folds)

    # B, K, C

    def own_logits(self, network: int, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C] of one of the networks, and those of Inception's second head while it is trained."""
        maps, auxiliary = self.backbones[0 if self.frozen_backbone else network](pictures)
        return self.heads[network](maps, auxiliary)

    def logits(self, pictures: Tensor) -> Tensor:
        """Logits [K, B, C] of all networks; pictures uint8 [B, 3, h, w] of any size."""
        if self.mirror:
            return (self._logits(pictures) + self._logits(pictures.flip(-1))) / 2
        return self._logits(pictures)

    def _logits(self, pictures: Tensor) -> Tensor:
        if not self.training and self.kept is not None:
            numbers = torch.zeros(len(pictures), dtype=torch.int64)
            return self._of_maps(self.kept.of(self.backbones[0], pictures, numbers))
        if not self.frozen_backbone:
            return torch.stack([self.own_logits(k, pictures)[0] for k in range(len(self.heads))])
        return self._of_maps(self.backbones[0](pictures)[0])

    def _of_maps(self, maps: Tensor) -> Tensor:
        return torch.stack([head(maps)[0] for head in self.heads])

    def held_out_probabilities(self, pictures: Tensor, fold: Tensor) -> Tensor:
        """Probabilities [B, C], each picture's of the network that never saw it; fold int64 [B]."""
        probabilities = self.logits(pictures).sigmoid()
        own = probabilities[fold.clamp(min=0), torch.arange(len(fold), device=fold.device)]
        return torch.where(fold[:, None] < 0, probabilities.mean(dim=0), own)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean over the networks of the mean over the pictures that a network may see; it never gets the others, so
        that not even its batch statistics know them."""
        picture, present, fold = batch["picture"], batch["present"], batch["fold"]
        if present.shape[1] != self.heads[0].characters or fold.max() >= len(self.heads):
            raise UserError(
                f"data: {present.shape[1]} characters, folds up to {int(fold.max())}; the classifier has "
                f"{self.heads[0].characters} and {len(self.heads)} folds"
            )
        shared = None
        if self.kept is not None:
            views = distributed.rows_of_all(lambda rows: torch.randint(self.kept.views, (rows,)), len(picture))
            shared = self.kept.of(self.backbones[0], picture, views)
        elif self.frozen_backbone:
            shared = self.backbones[0](picture)[0]
        losses = []
        for k, head in enumerate(self.heads):
            seen = fold != k
            if not seen.any():  # keeps its gradients defined, which several processes need
                losses.append(sum(p.sum() for p in self._parameters_of(k)) * 0.0)
                continue
            logits, auxiliary = self.own_logits(k, picture[seen]) if shared is None else head(shared[seen])
            loss = binary_cross_entropy_with_logits(logits, present[seen])
            if auxiliary is not None:
                loss = loss + AUXILIARY * binary_cross_entropy_with_logits(auxiliary, present[seen])
            losses.append(loss)
        loss = torch.stack(losses).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(picture))
        return loss

    def _parameters_of(self, network: int) -> list[nn.Parameter]:
        parts = [self.heads[network]] + ([] if self.frozen_backbone else [self.backbones[network]])
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    # evaluation

    def _begin(self) -> None:
        self.set_names = list(self.trainer.datamodule.loader_names)
        one = lambda: nn.ModuleDict({"frames": FrameAccuracy(), "micro": CharacterF1(), "macro": CharacterF1("macro")})  # noqa: E731
        self.metrics = nn.ModuleList(one() for _ in self.set_names).to(self.device)

    def _add(self, batch: dict[str, Any], dataloader_idx: int) -> None:
        if not batch:
            return
        probabilities = self.held_out_probabilities(batch["picture"], batch["fold"])
        for metric in self.metrics[dataloader_idx].values():
            metric.update(probabilities, batch["present"], batch["id"])

    def _finish(self, prefix: str) -> dict[str, dict[str, float]]:
        found = {}
        for name, metrics in zip(self.set_names, self.metrics, strict=True):
            values = {key: float(value) for key, value in metrics["frames"].compute().items()}
            values["c_f1"] = float(metrics["micro"].compute()["f1"])
            values["c_f1_macro"] = float(metrics["macro"].compute()["f1"])
            self.log_dict({f"{prefix}/{name}/{key}": value for key, value in values.items()})
            found[name] = values | {"step": self.trainer.global_step}
        return found

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        found = self._finish("val")
        if not self.trainer.sanity_checking:
            self.held_out = found

    def on_test_epoch_start(self) -> None:
        self._begin()

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._add(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    # what the results say, and checkpoints

    @property
    def backbone(self) -> str:
        """What the results call the network."""
        size = f", width {self.width}" if self.architecture == "small" else ""
        return f"{self.architecture}{size}{', frozen' if self.frozen_backbone else ''}, {len(self.heads)} folds"

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        words = (
            f"{len(self.heads)}-fold cross-validation: each picture scored by the network that never saw it; threshold "
            "0.5; 95 % Wilson intervals. Frames of one episode can be in several folds"
        )
        return {name: words for name in self.set_names}

    def chance_levels(self) -> dict[str, float]:
        """What chance scores depends on the data."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CLASS] = f"{type(self).__module__}.{type(self).__qualname__}"
        checkpoint[HELD_OUT] = self.held_out
        checkpoint[ABOUT] = {
            "world": plain(describe_world(self.world)),
            "folds": len(self.heads),
            "picture_size": list(self.picture_size),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or world; make the networks if there are none yet."""
        about = check_is_classifier(checkpoint, "ckpt_path: the checkpoint")
        world = world_from(about["world"])
        if self.world is not None and self.world.names != world.names:
            raise UserError(f"ckpt_path: the checkpoint is of the characters {', '.join(world.names)}")
        if self.heads and len(self.heads) != about["folds"]:
            raise UserError(f"data.folds: {len(self.heads)}, the checkpoint has {about['folds']}: give it as many")
        self.world = self.world or world
        self.picture_size = tuple(about["picture_size"])
        if not self.heads:
            self.build(len(world.names), about["folds"], pretrained=False)
        self.held_out, self.trained = dict(checkpoint[HELD_OUT]), training_record(checkpoint)


def check_is_classifier(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a checkpoint tells of its classifier.

    Raises:
        UserError: it is of another model.
    """
    if ABOUT not in content or HELD_OUT not in content:
        raise UserError(f"{where}: is of {content.get(CLASS, 'another model')}, expected one of CharacterClassifier")
    return content[ABOUT]
