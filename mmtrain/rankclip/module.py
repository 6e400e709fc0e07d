"""LightningModules for contrastive image-text pretraining. CyCLIP and ALIP stand in files of their own."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mmtrain.checkpoint import plain, settings
from mmtrain.config_errors import UserError
from mmtrain.feature_cache import FeatureCache, fingerprint
from mmtrain.metrics.linear_probe import ProbeSettings
from mmtrain.optim import AdamWSettings
from mmtrain.rankclip.evaluate import ImageTextEvaluation, feature_rows, probe_average
from mmtrain.rankclip.gallery import PAIRS_SHOWN, draw
from mmtrain.rankclip.losses import RowObjective, clip_objective, rankclip_objective, ranking_ramp, row_chunked_loss
from mmtrain.rankclip.networks import BLOCKS, backbone_name, build_clip, encode
from mmtrain.rankclip.pretrained import load_pretrained


@dataclass
class LossSettings:
    """How an objective is computed; the sound values are the defaults and change nothing but speed and memory.

    Args:
        chunk: rows of the global similarity matrices computed at a time.
        gradient_scale: "exact", or "reference": encoder gradients divided by the number of processes, as released.
        half_precision: round similarities to float16 like the released loss under autocast (ties, coarse logits).
        max_logit_scale: the logit scale is kept in [0, this] after each step; ln(100) as in CLIP.
    """

    chunk: int = 128
    gradient_scale: Literal["exact", "reference"] = "exact"
    half_precision: bool = False
    max_logit_scale: float = 4.6052

    def __post_init__(self) -> None:
        if not 0 < self.max_logit_scale <= 5.5:
            raise UserError(
                f"max_logit_scale: {self.max_logit_scale} is not in (0, 5.5], beyond which exponentials overflow"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype to which similarities are rounded."""
        return torch.float16 if self.half_precision else None


@dataclass
class TestSettings:
    """What `test` measures beside zero-shot classification and retrieval.

    Args:
        probe: how linear probes are fitted.
        keep_features: keep features in `<run folder>/features`, so that a `test` that was cut short, or one with other
            settings of the probe, computes none of them again. They may be deleted at any time.
        figures: draw the modality gap, activation maps and sample pictures.
        projection: plane of the modality gap's figure: "svd" is deterministic; "umap" needs the extra of that name.
    """

    __test__ = False  # the name misleads pytest
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    keep_features: bool = True
    figures: bool = True
    projection: Literal["svd", "umap"] = "svd"

    def __post_init__(self) -> None:
        self.probe = settings(ProbeSettings, self.probe)
        if self.projection == "umap" and importlib.util.find_spec("umap") is None:  # said now, not after the evaluation
            raise UserError("test.projection: umap needs umap-learn: pip install 'mmtrain[umap]'; or take svd")


class ImageTextModule(pl.LightningModule):
    """Dual encoder trained with a row objective; a method is a subclass that says which (`objective`).

    Batches: image uint8 [B, 3, H, W], text int64 [B, context]; in evaluation also id, text_id, label.

    Args:
        architecture: open_clip name or JSON file, see `build_clip`.
        optim: optimizer and schedule.
        loss: how the loss is computed.
        micro_batch: pictures a process encodes at a time; None takes the whole local batch. Gradients are the same but
            for BatchNorm (RN50), which then normalises each micro-batch by itself.
        pretrained: file with weights to start from, in any layout of `mmtrain.rankclip.pretrained`.
        test: what `test` does beside what training's evaluations do.
    """

    paper = "rankclip"
    method = ""  # as the paper's tables spell it

    def __init__(
        self,
        architecture: str = "ViT-B-32-quickgelu",
        optim: AdamWSettings | None = None,
        loss: LossSettings | None = None,
        micro_batch: int | None = None,
        pretrained: str | None = None,
        test: TestSettings | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # of the subclass too
        self.hparams.update(plain(dict(self.hparams)))  # so that checkpoints hold plain types only
        self.architecture, self.micro_batch = architecture, micro_batch
        self.optim, self.loss_settings = settings(AdamWSettings, optim), settings(LossSettings, loss)
        self.network = build_clip(architecture)
        if pretrained:
            try:
                load_pretrained(self.network, pretrained, architecture)
            except (ValueError, OSError) as error:
                raise UserError(f"pretrained: {error}") from error
        self.test_settings = settings(TestSettings, test)
        self.set_names: list[str] = []  # of the evaluation sets; a list, for modules may not have every name
        self.evaluations = nn.ModuleList()
        self.caches: dict[str, FeatureCache] = {}  # by loader, in `test`
        self.figures: list[dict[str, str]] = []  # drawn by `test`: file in the run folder, title, kind
        self.trained: dict[str, Any] = {}  # what a loaded checkpoint says of its training

    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        """The objective of this step, given this process's unit features."""
        raise NotImplementedError

    def texts(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The blocks of token ids that are encoded."""
        return (batch["text"],)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        features = encode(self.network, batch["image"], self.texts(batch), self.micro_batch)
        settings = self.loss_settings
        scale = self.network.logit_scale.reshape(())  # sharded, it is a vector of one number
        loss, parts = row_chunked_loss(
            self.objective(features), features, scale, settings.chunk, settings.gradient_scale
        )
        self.log("train/loss", parts.pop("loss"), prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in self.readable(parts).items()})
        self.log("train/tau", self.network.logit_scale.detach().exp())
        return loss

    def readable(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the loss as they are logged."""
        return parts

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():  # here and not at the batch's end, where a checkpoint would hold the value before
            self.network.logit_scale.clamp_(0, self.loss_settings.max_logit_scale)

    def configure_optimizers(self) -> dict[str, Any]:
        return self.optim.configure(self)

    def blocks(self) -> list[nn.Module]:
        """What is sharded and compiled one by one, see `mmtrain.parallel`."""
        return [module for module in self.network.modules() if isinstance(module, BLOCKS)]

    # Evaluation: one ImageTextEvaluation for each set of the data module; `test` also fits probes, which have a second
    # loader named SET/train, and keeps features on disk.

    def begin_evaluations(self, thorough: bool) -> None:
        """Make the evaluations of the data module's sets anew, empty."""
        sets = getattr(self.trainer.datamodule, "evaluation_sets", {})
        self.set_names = list(sets)
        probe = self.test_settings.probe
        made = (ImageTextEvaluation(**about, probe=probe, thorough=thorough) for about in sets.values())
        self.evaluations = nn.ModuleList(made).to(self.device)
        known: dict[int, Tensor] = {}
        for evaluation in self.evaluations:
            evaluation.begin(self.network, self.device, known)

    def evaluation_of(self, dataloader_idx: int) -> tuple[str, ImageTextEvaluation, str]:
        """Name of the loader, its set's evaluation, and "test" or, for what a probe is fitted on, "train"."""
        name = self.trainer.datamodule.loader_names[dataloader_idx]
        set_name, _, split = name.partition("/")
        return name, self.evaluations[self.set_names.index(set_name)], split or "test"

    def log_evaluations(self, prefix: str) -> dict[str, float]:
        """Log `prefix/SET/METRIC` of all sets and return the values."""
        values = {}
        for set_name, evaluation in zip(self.set_names, self.evaluations, strict=True):
            values |= {f"{prefix}/{set_name}/{name}": value for name, value in evaluation.compute().items()}
        values |= probe_average(values, prefix)
        self.log_dict(values)
        return values

    def on_validation_epoch_start(self) -> None:
        self.begin_evaluations(thorough=False)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        _, evaluation, split = self.evaluation_of(dataloader_idx)
        evaluation.add(feature_rows(self.network, batch), split)

    def on_validation_epoch_end(self) -> None:
        self.log_evaluations("val")

    def on_test_epoch_start(self) -> None:
        self.begin_evaluations(thorough=True)
        self.caches = {}
        if not self.test_settings.keep_features:
            return
        about = {"precision": self.trainer.precision, "processes": self.trainer.world_size}
        weights = fingerprint(self.network, **about)
        for index, loader in enumerate(self.trainer.test_dataloaders):
            name, evaluation, split = self.evaluation_of(index)
            tag = f"{weights}-{loader.fingerprint()}"
            folder = Path(self.trainer.default_root_dir) / "features" / name.replace("/", "-") / tag
            cache = self.caches[name] = FeatureCache(folder, self.global_rank)
            for rows in cache.load():
                evaluation.add({key: value.to(self.device) for key, value in rows.items()}, split)
            loader.skip = cache.batches
            if cache.batches and self.trainer.is_global_zero:
                print(f"{name}: features of {cache.batches} of {len(loader)} batches are in {folder}")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        name, evaluation, split = self.evaluation_of(dataloader_idx)
        if name in self.caches and batch_idx < self.trainer.test_dataloaders[dataloader_idx].skip:
            return
        rows = feature_rows(self.network, batch)
        evaluation.add(rows, split)
        if name in self.caches:
            self.caches[name].add(rows)

    def on_test_epoch_end(self) -> None:
        for cache in self.caches.values():
            cache.flush()
        self.log_evaluations("test")
        self.figures = self.draw_figures() if self.test_settings.figures else []

    def draw_figures(self) -> list[dict[str, str]]:
        """Draw what the sets allow, on the first process. One that cannot be drawn costs a warning, not the results."""
        sets = zip(self.set_names, self.evaluations, strict=True)
        pairs = {name: evaluation.pairs(PAIRS_SHOWN) for name, evaluation in sets}  # gathers
        if not self.trainer.is_global_zero:
            return []
        try:
            return draw(self, pairs, Path(self.trainer.default_root_dir), self.test_settings.projection)
        except (OSError, ValueError, RuntimeError) as error:
            rank_zero_warn(f"not all figures could be drawn: {error}", category=UserWarning)
            return []

    def chance_levels(self) -> dict[str, float]:
        """What guessing would score, by the name under which a metric is logged; for those that it makes sense for."""
        sets = dict(zip(self.set_names, self.evaluations, strict=True))
        found = {}
        for name in self.trainer.callback_metrics:
            set_name, _, metric = name.partition("/")[2].rpartition("/")
            chance = sets[set_name].chance(metric) if set_name in sets else None
            if chance is not None:
                found[name] = chance
        return found

    @property
    def backbone(self) -> str:
        """The architecture as the paper's tables write it."""
        return backbone_name(self.architecture)

    def protocols(self) -> dict[str, str]:
        """How each set's figures are counted, in words."""
        sets = zip(self.set_names, self.evaluations, strict=True)
        return {name: words for name, evaluation in sets if (words := evaluation.protocol())}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.trained = {
            "step": checkpoint.get("global_step", 0),
            "epoch": checkpoint.get("epoch", 0),
            "seed": checkpoint.get("settings", {}).get("seed_everything"),
            "data_counts": checkpoint.get("data_counts", {}),
        }

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Unit features of a batch: image [B, D] with id [B], and text [M, D] with text_id [M] where there is text."""
        if "image" not in batch:
            return {}  # every picture of the batch was unreadable
        texts = (batch["text"],) if "text" in batch else ()
        names = ("image", "text")[: 1 + len(texts)]
        features = dict(zip(names, encode(self.network, batch["image"], texts), strict=True))
        return features | {name: batch[name] for name in ("id", "text_id", "label") if name in batch}


class Clip(ImageTextModule):
    """CLIP: symmetric InfoNCE over the global batch (arXiv 2103.00020). Settings: `ImageTextModule`."""

    method = "CLIP"

    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        return clip_objective(self.loss_settings.dtype)


@dataclass
class Ramp:
    """Weight of the ranking terms, w = min(high, max(low, slope * progress)); published values are the defaults."""

    low: float = 0.0
    high: float = 2.0
    slope: float = 3.0


class RankClip(ImageTextModule):
    """RankCLIP: CLIP plus list-wise Plackett-Luce terms across and within the modalities (arXiv 2404.09387).

    loss = L_clip + w / N * (cross * L_cross + inmodal * L_inmodal), see `rankclip_objective`.

    Args:
        cross: weight of the cross-modal term; 1/16 is what the released code has built in. It really scales: the
            released switches lambda1 (in-modal) and lambda2 (cross) only turn terms on and off.
        inmodal: weight of the in-modal term.
        ramp: growth of w over the run. Progress is (e - 1) / (E - 1) with epoch e from 1 to E as published, 0 for a
            single epoch; of a run given in steps, the share of steps done; given both, the larger. Without a limit
            it stays 0.
        eps: 0 is the Plackett-Luce likelihood; 1e-10 the published code, which differs once tau is large.
        kwargs: settings of `ImageTextModule`.
    """

    method = "RankCLIP"

    def __init__(
        self,
        cross: float = 1 / 16,
        inmodal: float = 1 / 16,
        ramp: Ramp | None = None,
        eps: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(cross, inmodal, eps) < 0:
            raise UserError(f"cross, inmodal and eps must not be negative, got {cross}, {inmodal} and {eps}")
        self.cross, self.inmodal, self.ramp, self.eps = cross, inmodal, settings(Ramp, ramp), eps

    @property
    def ranking_weight(self) -> float:
        """w of the present epoch or step."""
        trainer = self.trainer
        epochs = trainer.max_epochs or -1
        shares = [trainer.current_epoch / max(1, epochs - 1)] if epochs > 0 else []
        shares += [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
        progress = max(shares, default=0.0)  # of the limit that ends the run
        return ranking_ramp(progress, self.ramp.low, self.ramp.high, self.ramp.slope)

    def objective(self, features: tuple[Tensor, ...]) -> RowObjective:
        return rankclip_objective(self.ranking_weight, self.cross, self.inmodal, self.eps, self.loss_settings.dtype)

    def readable(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        logged = {name: value for name, value in parts.items() if "_saturated_" not in name}
        saturated = [value for name, value in parts.items() if "_saturated_" in name]
        if saturated:
            logged["saturated"] = torch.stack(saturated).mean()
        return logged | {"ranking_weight": torch.tensor(self.ranking_weight)}
