"""Video clips with sound for the stages of Diff-Foley: contrast, diffusion, pairs that match or not, sound classes."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.clip_batches import ClipBatches, ContrastBatches, PairBatches, SoundClassBatches, WindowBatches
from datamodules.clip_reader import ClipReader, PartOfSource
from datamodules.feature_store import (
    FeatureExtractor,
    FeatureStore,
    WithFeatures,
    extract_features,
    find_store,
    store_folder,
)
from datamodules.loading import Draw, EvaluationLoader, TrainLoader, place
from datamodules.subset import nested_positions
from datamodules.video_audio_shards import SOURCE_FILE, ClipMaker, describe_maker, make_shards
from datamodules.video_audio_sources import VideoAudioSource, layouts, open_source, read_source_file
from datamodules.video_audio_windows import contrast_starts
from mmtrain.config_errors import UserError
from mmtrain.video_audio import ClipFormat

TRAIN, VALIDATION, TEST = "train", "val", "test"
SPLIT_SEED = 0  # of the part of the training clips that is kept for validation: the same for all stages and seeds


class ClipDataModule(pl.LightningDataModule):
    """What the data modules below share: shards made where there are none, splits, loaders with an exact order.

    Args:
        path: see `datamodules.video_audio_sources.open_source`; made by `maker` if it does not exist.
        format: how clips are cut; None takes that of `maker`, else the paper's.
        name: of the evaluation set, as metrics and pages name it.
        maker: makes the clips, such as `datamodules.impacts.Impacts`.
        batch_size: GLOBAL batch in clips, divided among the processes.
        eval_batch_size: clips a process takes at a time in evaluation.
        num_workers: loader processes for each training process. Does not change the data order.
        seed: of the data order and of the windows.
        cache: keep decoded clips in memory; each loader process keeps its own. For sets of a few thousand clips.
        max_lost: share of clips that may be unreadable before training stops, in [0, 1].
        train_split, val_split, test_split: names of the splits. Without a validation split `val_fraction` of the
            training clips are kept for it; without a test split the validation clips are tested on.
        val_fraction: in (0, 1).
        subset: train on so many clips only; smaller ones are parts of larger ones.

    Raises:
        UserError: nothing there and no maker, or what is there was made by others or does not fit `format`.
    """

    def __init__(
        self,
        path: str,
        format: ClipFormat | None = None,
        name: str = "vggsound",
        maker: ClipMaker | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        cache: bool = False,
        max_lost: float = 0.01,
        train_split: str = TRAIN,
        val_split: str = VALIDATION,
        test_split: str = TEST,
        val_fraction: float = 0.02,
        subset: int | None = None,
    ) -> None:
        super().__init__()
        self.path, self.name, self.maker = Path(path), name, maker
        self.format = format or (maker.format if maker is not None else ClipFormat())
        self.made_by = None if maker is None else describe_maker(maker)
        self.save_hyperparameters(ignore=["maker", "format", "features"])
        self.save_hyperparameters({"maker": self.made_by, "format": asdict(self.format)})
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed, self.cache, self.max_lost, self.subset = seed, cache, max_lost, subset
        self.splits = {TRAIN: train_split, VALIDATION: val_split, TEST: test_split}
        self.val_fraction = val_fraction
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.loader_names: list[str] = []  # of the present stage's evaluation loaders
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self._datasets: dict[str, ClipBatches] = {}
        self._evaluated = VALIDATION

    # --- what a stage needs ---

    @abstractmethod
    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        """The batches of a stage."""

    def _with_features(self, source: VideoAudioSource, split: str) -> VideoAudioSource:
        return source

    def _make_features(self, split: str) -> None:
        """Compute what clips need beside what is stored; on one process of a machine."""

    # --- making and opening ---

    def prepare_data(self) -> None:
        """Write the shards where there are none, index them, and compute features."""
        if not self.path.exists():
            if self.maker is None:
                raise UserError(f"data.path: {self.path} does not exist and no data.maker is given that could make it")
            make_shards(self.path, self.maker)
        self._check_maker()  # before features are computed of other clips
        stage = "fit" if self.trainer is None else self.trainer.state.fn
        for split in self._present(stage):
            self._make_features(split)

    def _present(self, stage: str) -> list[str]:
        """Names of the splits that a stage reads; of all of them without a trainer."""
        if self.trainer is None:
            return [self.splits[role] for role in self.splits if self._open(role) is not None]
        roles = [TRAIN, VALIDATION] if stage == "fit" else [VALIDATION if stage == "validate" else TEST]
        if TEST in roles and self._open(TEST) is None:
            roles = [VALIDATION]
        if VALIDATION in roles and self._open(VALIDATION) is None:
            roles = [TRAIN]
        return [self.splits[role] for role in roles]

    def _open(self, role: str) -> VideoAudioSource | None:
        return open_source(self.path, self.splits[role], self.format)

    def setup(self, stage: str) -> None:
        self._check_maker()
        self._evaluated = TEST if stage in ("test", "predict") else VALIDATION
        for role in ([TRAIN] if stage == "fit" else []) + [self._evaluated]:
            if role not in self._datasets:
                source = self._source(role)
                self._datasets[role] = self._dataset(source, training=role == TRAIN)
                self._report(TRAIN if role == TRAIN else self.name, source)
        evaluated = self._datasets[self._evaluated]
        self.loader_names = [self.name]
        self.evaluation_sets = {
            self.name: {"num_samples": len(evaluated), "class_names": list(evaluated.reader.source.class_names)}
        }

    def _check_maker(self) -> None:
        if self.made_by is None:
            return
        found = read_source_file(self.path)
        if _clips_of(found) != _clips_of(self.made_by):
            raise UserError(
                f"{self.path / SOURCE_FILE}: the clips were made from {found.get('source')}, data.maker says "
                f"{self.made_by['source']}: delete the folder, or give another data.path"
            )

    def _source(self, role: str) -> VideoAudioSource:
        source = self._open(role)
        if source is not None:
            source = self._with_features(source, self.splits[role])
        if role == TRAIN:
            if source is None:
                where = layouts(self.path, self.splits[TRAIN])
                raise UserError(f"data.path: {self.path}: no clips of split {self.splits[TRAIN]}; looked for:{where}")
            source = self._part(source, training=True)
            if self.subset is not None:
                source = PartOfSource(source, nested_positions(len(source), self.subset, SPLIT_SEED))
            return source
        if source is not None:
            return source
        if role == TEST:
            rank_zero_warn(f"data.path: {self.path} has no split {self.splits[TEST]}: tested on validation clips")
            return self._source(VALIDATION)
        source = self._open(TRAIN)
        if source is None:
            raise UserError(
                f"data.path: {self.path}: no clips; looked for:{layouts(self.path, self.splits[self._evaluated])}"
            )
        return self._part(self._with_features(source, self.splits[TRAIN]), training=False)

    def _part(self, source: VideoAudioSource, training: bool) -> VideoAudioSource:
        """The training clips without, or only, those kept for validation, if there is no split for that."""
        if training and self._open(VALIDATION) is not None:
            return source
        order = np.random.default_rng(SPLIT_SEED).permutation(len(source))
        kept = max(1, round(self.val_fraction * len(source)))
        return PartOfSource(source, np.sort(order[kept:] if training else order[:kept]))

    def _report(self, name: str, source: VideoAudioSource) -> None:
        self.data_counts[name] = dict(source.counts)
        rank_zero_info(f"{name}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in source.counts.items()))
        for warning in source.warnings[:5]:
            rank_zero_warn(f"{name}: {warning}")

    @property
    def class_names(self) -> list[str]:
        """Names of the sound classes, where the data know them."""
        return next((list(d.reader.source.class_names) for d in self._datasets.values()), [])

    def _reader(self, source: VideoAudioSource, fields: set[str], mel: str) -> ClipReader:
        return ClipReader(source, self.format, fields, mel, self.cache)

    # --- loaders ---

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(
            self._datasets[TRAIN],
            self.batch_size,
            self.seed,
            num_workers=self.num_workers,
            max_lost=self.max_lost,
            **place(self.trainer),
        )

    def val_dataloader(self) -> list[EvaluationLoader]:
        identity = json.dumps([str(self.path), self.splits, type(self).__name__, asdict(self.format)])
        return [
            EvaluationLoader(
                self._datasets[self._evaluated],
                self.eval_batch_size,
                num_workers=self.num_workers,
                identity=identity,
                **place(self.trainer),
            )
        ]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

    def peek(self, name: str, count: int) -> dict[str, Any]:
        """One batch of clips spread evenly over the evaluation set, for pictures of results."""
        dataset = self._datasets[self._evaluated]
        count = min(count, len(dataset))
        return dataset[[Draw(i * len(dataset) // count, 0, 0, i * len(dataset) // count) for i in range(count)]]


class ContrastiveDataModule(ClipDataModule):
    """Frames and sound for contrastive training; batches as of `datamodules.clip_batches.ContrastBatches`.

    Args:
        path: see `ClipDataModule`, as for the rest.
        clips: items cut from every training clip, 1 to 3 in the paper.
    """

    def __init__(self, path: str, format: ClipFormat | None = None, clips: int = 3, **common: Any) -> None:
        super().__init__(path, format, **common)
        self.clips = clips
        contrast_starts(self.format, clips, np.random.default_rng(0))  # do they fit?

    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        return ContrastBatches(self._reader(source, {"frames"}, "mel_cavp"), training, self.clips)


class LatentDataModule(ClipDataModule):
    """Spectrograms and video features for the diffusion model; batches as of `datamodules.clip_batches.WindowBatches`.

    Args:
        path: see `ClipDataModule`, as for the rest.
        features: an extractor, whose features are computed once and kept in `<path>/features`; or a folder of such
            features; or None, which takes those stored with the clips.
        with_features: False leaves them out, for the autoencoder.
        split_merge: share of the items that are made of parts of two clips; the paper's 0.5.
        aligned: features and spectrogram of a window begin at the same instant; False is the released code.
        min_shift_seconds: least distance in time of shifted features.
    """

    def __init__(
        self,
        path: str,
        format: ClipFormat | None = None,
        features: FeatureExtractor | str | None = None,
        with_features: bool = True,
        split_merge: float = 0.5,
        aligned: bool = True,
        min_shift_seconds: float = 0.5,
        **common: Any,
    ) -> None:
        super().__init__(path, format, **common)
        self.features, self.with_features = features, with_features
        made_by = features if features is None or isinstance(features, str) else plain_description(features)
        self.save_hyperparameters({"features": made_by})
        self.window_options = {"split_merge": split_merge, "aligned": aligned, "min_shift_seconds": min_shift_seconds}
        if not 0 <= split_merge <= 1:
            raise UserError(f"split_merge: {split_merge}, must be from 0 to 1")
        if self.format.window_samples > self.format.samples:
            raise UserError(
                f"format.window_mel_frames: {self.format.window_mel_frames} are {self.format.window_seconds:g} s, "
                f"clips have format.seconds {self.format.seconds}"
            )

    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        fields = {"features"} if self.with_features else set()
        if not training and "audio" in source.fields:
            fields.add("audio")
        return WindowBatches(self._reader(source, fields, "mel_ldm"), training, **self.window_options)

    def _with_features(self, source: VideoAudioSource, split: str) -> VideoAudioSource:
        if not self.with_features or self.features is None:
            return source
        if isinstance(self.features, str):
            folder = find_store(Path(self.features), split)
        else:
            folder = store_folder(self.path / "features", split, source, plain_description(self.features))
        return WithFeatures(source, FeatureStore(folder, source, self.format))

    def _make_features(self, split: str) -> None:
        if not self.with_features or self.features is None or isinstance(self.features, str):
            return
        source = open_source(self.path, split, self.format)
        if source is not None:
            folder = store_folder(self.path / "features", split, source, plain_description(self.features))
            extract_features(folder, source, self.features, self.format)


class AlignmentDataModule(LatentDataModule):
    """Pairs that match or not, for the alignment classifiers; batches as of `datamodules.clip_batches.PairBatches`.

    How the authors made theirs is not published.

    Args:
        path: see `LatentDataModule`, as for the rest.
        proportions: of true, shifted and wrong pairs in training.
        split_merge: as in `LatentDataModule`, of the true pairs.
    """

    def __init__(
        self,
        path: str,
        format: ClipFormat | None = None,
        proportions: Sequence[float] = (0.5, 0.25, 0.25),
        split_merge: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(path, format, split_merge=split_merge, **common)
        if len(proportions) != 3 or min(proportions) < 0 or not sum(proportions):
            raise UserError(f"proportions: {list(proportions)}; three shares, of true, shifted and wrong pairs")
        self.proportions = [float(p) for p in proportions]

    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        reader = self._reader(source, {"features"}, "mel_ldm")
        return PairBatches(reader, training, self.proportions, **self.window_options)


class SoundClassDataModule(ClipDataModule):
    """Spectrograms of preset `mel_specvqgan` and the class, for the network whose features the metrics use."""

    def __init__(self, path: str, format: ClipFormat | None = None, **common: Any) -> None:
        super().__init__(path, format, **common)

    def _dataset(self, source: VideoAudioSource, training: bool) -> ClipBatches:
        return SoundClassBatches(self._reader(source, set(), "mel_specvqgan"), training)


def _clips_of(about: dict[str, Any]) -> dict[str, Any]:
    """What decides how made clips come out: of a format only what `describe_maker` picks, windows are cut later."""
    source = {name: value for name, value in about.get("source", {}).items() if name != "format"}
    return {**about, "source": source}


def plain_description(extractor: FeatureExtractor) -> dict[str, Any]:
    """What an extractor says of itself, as it reads back from JSON."""
    return json.loads(json.dumps(extractor.describe()))
