"""Image-text pairs for contrastive pretraining, and labelled or captioned sets to evaluate on."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import open_clip
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.loading import Draw, EvaluationLoader, TrainLoader
from datamodules.paths import any_exists
from datamodules.sources import (
    Columns,
    CsvSource,
    FolderSource,
    Sample,
    ShardSource,
    Source,
    UnusableSample,
    is_csv,
    is_picture_folder,
)
from datamodules.text import tokenize
from datamodules.transforms import Interpolation, UnreadablePicture, decode, random_crop, resize_and_centre_crop
from mmtrain.config_errors import UserError

SUBSTITUTES = 64  # neighbours tried in place of a training sample that cannot be used
LONGEST_CAPTION = 2000  # characters handed to the tokenizer, which keeps 77 tokens


@dataclass
class Pictures:
    """What happens to a picture and its text on the way into a batch.

    Args:
        size: height and width in pixels.
        crop_scale: share of the area that a random training crop keeps; None is the evaluation crop, as published.
        crop_ratio: width / height of random crops.
        flip: probability of mirroring in training.
        context_length: token ids a caption.
        faithful_truncation: cut long captions without restoring the end token (fault of the released code).
    """

    size: int = 224
    crop_scale: tuple[float, float] | None = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    interpolation: Interpolation = "bicubic"
    context_length: int = 77
    faithful_truncation: bool = False

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids [len(texts), context_length]."""
        return tokenize([t[:LONGEST_CAPTION] for t in texts], self.context_length, self.faithful_truncation)


@dataclass
class EvaluationSet:
    """A set of pictures to evaluate on: captioned (retrieval), labelled (zero-shot classification), or both.

    Args:
        path: shards, a csv/tsv, or a folder with one sub-folder of pictures a class. A path that does not exist is
            skipped with a warning.
        captions: where a shard's captions are ("txt", "json:KEY"), None for no retrieval.
        label: where a shard's class number is ("cls", "json:KEY"), None for no classification.
        classes: "imagenet", or a json/yaml file with a list of names or {"classes": [...]}; None takes folder names.
        templates: prompts with {} for the class name, or "openai_imagenet" for the 80 of the CLIP paper.
        columns: of a csv; rows with the same picture are its captions.
    """

    path: str | list[str]
    captions: str | None = "txt"
    label: str | None = None
    classes: str | None = None
    templates: str | list[str] = "openai_imagenet"
    columns: Columns | None = None

    def exists(self) -> bool:
        """False if nothing at all is there; object stores are not asked."""
        return any_exists(self.path)

    def open(self) -> Source:
        """The set's source."""
        if is_picture_folder(self.path):
            return FolderSource(self.path)
        if is_csv(self.path):
            return CsvSource(self.path, self.columns, group=True)
        return ShardSource(self.path, self.captions, None, self.label)

    def prompts(self, source: Source, pictures: Pictures) -> Tensor | None:
        """Token ids [classes, templates, context_length] of the zero-shot prompts, None for an unlabelled set."""
        folders = source.class_names if isinstance(source, FolderSource) else None
        if folders is None and (self.label is None or isinstance(source, CsvSource)):
            return None
        names = class_names(self.classes, folders)
        if folders is not None and len(names) != len(folders):
            raise UserError(
                f"classes: {self.classes} has {len(names)} names for the {len(folders)} folders of {self.path}"
            )
        templates = self.templates
        if templates == "openai_imagenet":
            filled = [[template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES] for name in names]
        else:
            templates = [templates] if isinstance(templates, str) else templates
            if bad := [t for t in templates if "{}" not in t]:
                raise UserError(f"templates: {bad[0]!r} has no {{}} for the class name")
            filled = [[template.replace("{}", name) for template in templates] for name in names]
        return torch.stack([pictures.tokens(prompts) for prompts in filled])


def class_names(classes: str | None, folder_names: list[str] | None) -> list[str]:
    """Names of the classes in label order; see `EvaluationSet.classes`."""
    if classes == "imagenet":
        return list(open_clip.IMAGENET_CLASSNAMES)
    if classes is None:
        if folder_names is None:
            raise UserError("classes: a labelled shard set needs a file with its class names, or 'imagenet'")
        return [name.replace("_", " ") for name in folder_names]
    path = Path(classes)
    if not path.exists():
        raise UserError(f"classes: {classes}: no such file; give 'imagenet', or a json or yaml list of names")
    listed = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    listed = listed["classes"] if isinstance(listed, dict) else listed
    return [c["name"] if isinstance(c, dict) else str(c) for c in listed]


class ImageTextDataset(torch.utils.data.Dataset):
    """Turns draws into batches: uint8 pictures [B, 3, size, size] and token ids [B, context_length].

    In training a sample that cannot be used is replaced by the next usable one, so that batches stay equal; in
    evaluation it is left out. Either is counted by reason under "skipped".
    """

    def __init__(self, source: Source, pictures: Pictures, training: bool) -> None:
        self.source, self.pictures, self.training = source, pictures, training

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        skipped: Counter[str] = Counter()
        samples = self.source.read([d.sample for d in draws])
        loaded = [self._load(draw, sample, skipped) for draw, sample in zip(draws, samples, strict=True)]
        rows = [row for row in loaded if row is not None]
        if not rows:
            return {"skipped": dict(skipped)}
        batch = self._train_batch(rows) if self.training else self._evaluation_batch(rows)
        return batch | {"skipped": dict(skipped)}

    def _load(
        self, draw: Draw, sample: Sample | UnusableSample, skipped: Counter
    ) -> tuple[Draw, Tensor, Sample] | None:
        for step in range(SUBSTITUTES + 1):
            if step:
                (sample,) = self.source.read([(draw.sample + step) % len(self.source)])
            try:
                if isinstance(sample, UnusableSample):
                    raise sample
                return draw, self._transform(decode(sample.image), draw), sample
            except (UnusableSample, UnreadablePicture) as problem:
                skipped[problem.reason] += 1
            if not self.training:
                return None
        raise UserError(f"{SUBSTITUTES + 1} samples in a row cannot be used: {dict(skipped)}")

    def _transform(self, picture: Tensor, draw: Draw) -> Tensor:
        p = self.pictures
        if not self.training or p.crop_scale is None:
            return resize_and_centre_crop(picture, p.size, p.interpolation)
        return random_crop(picture, p.size, draw.generator(), p.crop_scale, p.crop_ratio, p.flip, p.interpolation)

    def _train_batch(self, rows: list[tuple[Draw, Tensor, Sample]]) -> dict[str, Any]:
        batch = {
            "image": torch.stack([picture for _, picture, _ in rows]),
            "text": self.pictures.tokens([_choose(s.captions, d) for d, _, s in rows]),
        }
        if rows[0][2].extra_captions:
            batch["extra_text"] = self.pictures.tokens([_choose(s.extra_captions, d) for d, _, s in rows])
        return batch

    def _evaluation_batch(self, rows: list[tuple[Draw, Tensor, Sample]]) -> dict[str, Any]:
        ids = [d.sample for d, _, _ in rows]
        batch = {"image": torch.stack([picture for _, picture, _ in rows]), "id": torch.tensor(ids)}
        if rows[0][2].captions:
            batch["text"] = self.pictures.tokens([c for *_, s in rows for c in s.captions])
            batch["text_id"] = torch.tensor([i for i, (*_, s) in zip(ids, rows, strict=True) for _ in s.captions])
        if rows[0][2].label is not None:
            batch["label"] = torch.tensor([s.label for *_, s in rows])
        return batch


def _choose(captions: list[str], draw: Draw) -> str:
    if len(captions) == 1:
        return captions[0]
    return captions[int(draw.generator().integers(len(captions)))]


class ImageTextDataModule(pl.LightningDataModule):
    """Trains on image-text pairs, evaluates on any number of captioned and labelled sets.

    Args:
        train: shards (paths, folders, globs, brace ranges, URLs), or one csv/tsv with columns image and caption.
        captions: "txt", another member extension, or "json:KEY"; of a list one caption is drawn each time.
        extra_captions: a second text for ALIP in the same notation, such as "caption.txt".
        columns: of a csv.
        evaluate: name -> set; null takes out a set of an earlier layer.
        batch_size: GLOBAL batch, divided among the processes; contrastive losses depend on it.
        pictures: sizes and augmentation.
        num_workers: loader processes for each training process. Does not change the data order.
        seed: of the data order and of the random crops.
        shuffle_shards: mix samples among this many shards at a time (slow disks); None mixes all.
        max_lost: share of samples that may be missing or unreadable before training stops, in [0, 1].
        eval_batch_size: pictures a process takes at a time in evaluation.
    """

    def __init__(
        self,
        train: str | list[str],
        captions: str = "txt",
        extra_captions: str | None = None,
        columns: Columns | None = None,
        evaluate: dict[str, EvaluationSet | None] | None = None,
        batch_size: int = 512,
        pictures: Pictures | None = None,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_shards: int | None = None,
        max_lost: float = 0.01,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # Attributes, not hparams: of a subclass the hparams are the subclass's own.
        self.train, self.captions, self.extra_captions, self.max_lost = train, captions, extra_captions, max_lost
        self.loading = {
            "batch_size": batch_size, "seed": seed, "shuffle_shards": shuffle_shards, "max_lost": max_lost
        }  # fmt: skip
        self.columns = columns
        self.num_workers, self.eval_batch_size = num_workers, eval_batch_size
        self.pictures = pictures or Pictures()
        self.evaluate = {name: chosen for name, chosen in (evaluate or {}).items() if chosen is not None}
        self.evaluation_sets: dict[str, dict[str, Any]] = {}  # name -> num_samples, captioned, prompts; in loader order
        self.data_counts: dict[str, dict[str, int]] = {}
        self.train_source: Source | None = None
        self.sources: dict[str, Source] = {}

    def prepare_data(self) -> None:
        """Index the shards once for each machine, so that `setup` finds the index."""
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._open_train()
        for evaluation in self.evaluate.values():
            if evaluation.exists():
                evaluation.open()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_source is None:
            self.train_source = self._open_train()
            self._report("train", self.train_source)
        for name, evaluation in self.evaluate.items():
            if name in self.sources:
                continue
            if not evaluation.exists():
                rank_zero_warn(
                    f"evaluation set {name!r} is skipped: {evaluation.path} does not exist", category=UserWarning
                )
                continue
            self.sources[name] = evaluation.open()
            self._report(name, self.sources[name])
            self.evaluation_sets[name] = {
                "num_samples": len(self.sources[name]),
                "captioned": evaluation.captions is not None and not isinstance(self.sources[name], FolderSource),
                "prompts": evaluation.prompts(self.sources[name], self.pictures),
            }

        if stage != "fit" and not self.sources and self.train_source is None:
            raise UserError(f"data.evaluate: none of its sets exists: {', '.join(self.evaluate) or 'none is named'}")

    def _open_train(self) -> Source:
        if is_csv(self.train):
            return CsvSource(self.train, self.columns, self.max_lost)
        return ShardSource(self.train, self.captions, self.extra_captions, max_lost=self.max_lost)

    def _report(self, name: str, source: Source) -> None:
        self.data_counts[name] = dict(source.counts)
        rank_zero_info(f"{name}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in source.counts.items()))
        for warning in source.warnings[:5]:
            rank_zero_warn(f"{name}: {warning}", category=UserWarning)

    def train_dataloader(self) -> TrainLoader:
        dataset = ImageTextDataset(self.train_source, self.pictures, training=True)
        return TrainLoader(
            dataset,
            num_workers=self.num_workers,
            shard_starts=self.train_source.shard_starts,
            **self.loading,
            **self._place(),
        )

    def val_dataloader(self) -> list[EvaluationLoader]:
        datasets = [ImageTextDataset(source, self.pictures, training=False) for source in self.sources.values()]
        place = {"num_workers": self.num_workers, **self._place()}
        return [EvaluationLoader(dataset, self.eval_batch_size, **place) for dataset in datasets]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _place(self) -> dict[str, Any]:
        trainer = self.trainer
        if trainer is None:
            return {"rank": 0, "world_size": 1}
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return {"rank": trainer.global_rank, "world_size": trainer.world_size, "pin_memory": on_gpu}
