"""Image-text pairs for contrastive pretraining, and labelled or captioned sets to evaluate on."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.benchmarks import benchmark_sets
from datamodules.evaluation_sets import EvaluationSet
from datamodules.loading import Draw, EvaluationLoader, TrainLoader, place
from datamodules.pictures import Pictures
from datamodules.sources import Columns, CsvSource, Sample, ShardSource, Source, UnusableSample, is_csv, substitute
from datamodules.subset import NestedSubset
from datamodules.synthetic import write_pairs
from datamodules.transforms import UnreadablePicture, decode
from mmtrain.config_errors import UserError

SUBSTITUTES = 64  # others tried in place of a training sample that cannot be used


class ImageTextDataset(torch.utils.data.Dataset):
    """Turns draws into batches: uint8 pictures [B, 3, size, size] and token ids [B, context_length].

    In training a sample that cannot be used is replaced by the next usable one, so that batches stay equal; in
    evaluation it is left out. Either is counted by reason under "skipped".

    Args:
        caption_prompts: what an evaluation makes of the captions of one picture; None leaves them.
    """

    def __init__(
        self,
        source: Source,
        pictures: Pictures,
        training: bool,
        caption_prompts: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self.source, self.pictures, self.training = source, pictures, training
        self.caption_prompts = caption_prompts or (lambda captions: captions)

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
        number = draw.sample
        for _ in range(SUBSTITUTES + 1):
            try:
                if isinstance(sample, UnusableSample):
                    raise sample
                picture = sample.image if isinstance(sample.image, Tensor) else decode(sample.image)
                return draw, self._view(picture, draw), sample
            except (UnusableSample, UnreadablePicture) as error:
                problem = error
            skipped[problem.reason] += 1
            if not self.training:
                return None
            number = substitute(number, problem.reason, self.source.shard_starts, len(self.source))
            (sample,) = self.source.read([number])
        last = f"; the last: {detail}" if (detail := getattr(problem, "detail", "")) else ""
        raise UserError(f"{SUBSTITUTES + 1} samples in a row cannot be used: {dict(skipped)}{last}")

    def _view(self, picture: Tensor, draw: Draw) -> Tensor:
        if self.training:
            return self.pictures.training_view(picture, draw.generator())
        return self.pictures.evaluation_view(picture)

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
            captions = [self.caption_prompts(s.captions) for *_, s in rows]
            batch["caption"] = captions  # the words themselves, for pictures of results
            batch["text"] = self.pictures.tokens([c for own in captions for c in own])
            batch["text_id"] = torch.tensor([i for i, own in zip(ids, captions, strict=True) for _ in own])
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
        subset: train on so many samples only, a seeded part; smaller ones are parts of larger ones (`NestedSubset`).
        subset_seed: of that choice.
        evaluate: name -> set; null takes out a set of an earlier layer.
        benchmarks: folder with the data sets of the paper's tables; `test` evaluates on those that it finds there, see
            `datamodules.benchmarks`, besides `evaluate`.
        batch_size: GLOBAL batch, divided among the processes; contrastive losses depend on it.
        pictures: sizes and augmentation.
        num_workers: loader processes for each training process. Does not change the data order.
        seed: of the data order and of the random crops.
        shuffle_shards: mix samples among this many shards at a time (slow disks); None mixes all.
        max_lost: share of samples that may be missing or unreadable before training stops, in [0, 1].
        eval_batch_size: pictures a process takes at a time in evaluation.
    """

    @staticmethod
    def stand_in(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
        """Settings that put made-up pairs, 256 px as CC3M is stored, in the place of data that are not at hand.

        Args:
            folder: where they are written.
            given: the config's settings.
        """
        extra = {"extra_captions": "json:captions"} if given.get("extra_captions") else {}
        return {"train": write_pairs(folder, [64], size=256), "captions": "txt", "subset": None, **extra}

    def __init__(
        self,
        train: str | list[str],
        captions: str = "txt",
        extra_captions: str | None = None,
        columns: Columns | None = None,
        subset: int | None = None,
        subset_seed: int = 0,
        evaluate: dict[str, EvaluationSet | None] | None = None,
        benchmarks: str | None = None,
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
        self.columns, self.subset, self.subset_seed, self.benchmarks = columns, subset, subset_seed, benchmarks
        self.num_workers, self.eval_batch_size = num_workers, eval_batch_size
        self.pictures = pictures or Pictures()
        self.evaluate = {name: chosen for name, chosen in (evaluate or {}).items() if chosen is not None}
        if bad := [name for name in self.evaluate if "/" in name]:
            raise UserError(f"data.init_args.evaluate: the name {bad[0]!r} has a slash, which separates set and metric")
        self.evaluation_sets: dict[str, dict[str, Any]] = {}  # what `EvaluationSet.describe` says of each
        self.loader_names: list[str] = []  # of the present stage's loaders: SET, or SET/train for a probe's training
        self.missing: dict[str, str] = {}  # sets that are not there, and how to lay them out
        self.data_counts: dict[str, dict[str, int]] = {}
        self.train_source: Source | None = None
        self.sources: dict[str, Source] = {}
        self.wanted: dict[str, EvaluationSet] = {}

    def prepare_data(self) -> None:
        """Index the shards once for each machine, so that `setup` finds the index."""
        stage = "fit" if self.trainer is None else self.trainer.state.fn
        if stage == "fit":
            self._open_train()
        for evaluation in self._wanted(stage)[0].values():
            if evaluation.exists():
                evaluation.open()
                if stage == "test":
                    evaluation.open_probe_train()

    def _wanted(self, stage: str) -> tuple[dict[str, EvaluationSet], dict[str, str]]:
        """The sets of a stage, and the benchmarks that are not there."""
        if stage != "test":
            return {name: chosen for name, chosen in self.evaluate.items() if not chosen.is_probe_only}, {}
        found, missing = benchmark_sets(self.benchmarks) if self.benchmarks else ({}, {})
        return found | self.evaluate, {name: layout for name, layout in missing.items() if name not in self.evaluate}

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_source is None:
            self.train_source = self._open_train()
            self._report("train", self.train_source)
        self.wanted, self.missing = self._wanted(stage)
        self.evaluation_sets = {}
        for name, evaluation in self.wanted.items():
            if not evaluation.exists():
                self._miss(name, evaluation)
            else:
                self._open_evaluation(name, evaluation, probe=stage == "test")
        self.loader_names = [
            loader
            for loader in self.sources
            if loader in self.wanted or (stage == "test" and loader.removesuffix("/train") in self.wanted)
        ]
        if stage == "test" and self.missing:
            listed = "\n".join(f"  {name}: {layout}" for name, layout in self.missing.items())
            root = f" under {self.benchmarks}" if self.benchmarks else ""
            rank_zero_info(f"evaluation sets that are not there, and how they are looked for{root}:\n{listed}")
        if stage != "fit" and not self.loader_names and self.train_source is None:
            raise UserError(
                f"data.evaluate: none of its sets exists: {', '.join(self.evaluate) or 'none is named'}"
                + (f", and data.benchmarks: {self.benchmarks} holds none" if self.benchmarks else "")
            )

    def _miss(self, name: str, evaluation: EvaluationSet) -> None:
        paths = [p for p in (evaluation.path, evaluation.probe_train) if p is not None]
        rank_zero_warn(f"evaluation set {name!r} is skipped: {paths[0]} does not exist", category=UserWarning)
        self.missing.setdefault(name, " and ".join(map(str, paths)))

    def _open_evaluation(self, name: str, evaluation: EvaluationSet, probe: bool) -> None:
        train = f"{name}/train"
        opened = {name: evaluation.open}
        if probe and evaluation.probe_train is not None:
            opened[train] = evaluation.open_probe_train
        for key, make in opened.items():
            if key not in self.sources:
                self.sources[key] = make()
                self._report(key, self.sources[key])
        self.evaluation_sets[name] = evaluation.describe(
            self.sources[name], self.pictures, self.sources.get(train) if probe else None
        )

    def _open_train(self) -> Source:
        if is_csv(self.train):
            source = CsvSource(self.train, self.columns, self.max_lost)
        else:
            source = ShardSource(self.train, self.captions, self.extra_captions, max_lost=self.max_lost)
        return source if self.subset is None else NestedSubset(source, self.subset, self.subset_seed)

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
            **place(self.trainer),
        )

    def val_dataloader(self) -> list[EvaluationLoader]:
        return [self._evaluation_loader(name) for name in self.loader_names]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def _evaluation_loader(self, name: str) -> EvaluationLoader:
        chosen = self.wanted[name.partition("/")[0]]
        dataset = self._evaluation_dataset(name)
        identity = f"{name} {chosen} {self.pictures}"
        return EvaluationLoader(
            dataset, self.eval_batch_size, num_workers=self.num_workers, identity=identity, **place(self.trainer)
        )

    def _evaluation_dataset(self, name: str) -> ImageTextDataset:
        prompts = self.wanted[name.partition("/")[0]].caption_prompts
        return ImageTextDataset(self.sources[name], self.pictures, training=False, caption_prompts=prompts)

    def peek(self, name: str, count: int) -> dict[str, Any]:
        """One batch of samples spread evenly over an evaluation set, for pictures of results."""
        dataset = self._evaluation_dataset(name)
        count = min(count, len(dataset))
        samples = [i * len(dataset) // count for i in range(count)]
        return dataset[[Draw(sample, 0, 0, sample) for sample in samples]]
