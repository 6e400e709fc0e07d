"""Story worlds for StoryWeaver and the methods beside it (arXiv 2412.07375): pictures, stories, characters."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import EvaluationLoader, TrainLoader, place
from datamodules.story_batches import (
    MARGIN,
    CharacterBatches,
    CharacterOrder,
    Fit,
    FrameBatches,
    Line,
    LineBatches,
    PictureStore,
    PromptBatches,
    capped,
    held_out,
    read_picture,
    single_frames,
    spread,
    stratified_folds,
)
from datamodules.story_files import Faults, folders, listed
from datamodules.story_folder import Story, StoryFolder, TrainingFrame, read_story, read_world
from datamodules.story_making import StoryMaker, check_maker, make_world, plain_description
from datamodules.tar_index import COLUMNS
from mmtrain.config_errors import UserError, is_first_process, nearest
from mmtrain.story import StoryFault, World

LONGEST_REFERENCE = 512  # pixels
VALIDATED = 64  # training pictures that are validated on if none are held out


class WorldDataModule(pl.LightningDataModule):
    """What the two below share: a world's folder, made where there is none, and loaders of what a stage evaluates.

    Attributes:
        world: known after `setup`.
        loader_names: of the present stage's evaluation loaders.
        missing: sets that are not there, and where they are looked for.
    """

    world: World

    def __init__(
        self,
        path: str,
        world: str | None,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        maker: StoryMaker | None,
    ) -> None:
        super().__init__()
        self.path, self.world_name, self.maker = Path(path).expanduser(), world, maker
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = seed
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.loader_names: list[str] = []
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self._folder: StoryFolder | None = None
        self._evaluated: dict[str, Dataset] = {}
        for name in ("batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}: {getattr(self, name)}: must be at least 1")

    def prepare_data(self) -> None:
        """Make the world's folder if it is not there and somebody is given who can."""
        if self.maker is not None and not self.path.exists():
            make_world(self.path, self.maker)
        check_maker(self.path, self.maker)

    @property
    def folder(self) -> StoryFolder:
        """What the world's folder holds; read once.

        Raises:
            StoryFault: see `datamodules.story_folder.read_world`.
        """
        if self._folder is None:
            check_maker(self.path, self.maker)
            self._folder = read_world(self.path, self.world_name)
            self.world = self._folder.world
            for warning in self._folder.warnings:
                rank_zero_warn(f"{self._folder.folder.name}: {warning}")
        return self._folder

    @property
    def frames(self) -> list[TrainingFrame]:
        """All pictures with captions.

        Raises:
            StoryFault: there are none.
        """
        if not self.folder.frames:
            where = self.folder.folder
            there = listed([f"image/{name}" for name in folders(where / "image")]) or "no folders in image"
            raise StoryFault(
                f"{where}: no pictures; looked for image/<{'|'.join(self.world.names[:2])}|..|Multi>/<n>.png and "
                f"caption/<the same>/<n>.txt, there is: {there}"
            )
        return self.folder.frames

    def _evaluate(self, sets: dict[str, Dataset], **about: Any) -> None:
        """Take these as the sets of the present stage."""
        self._evaluated, self.loader_names = sets, list(sets)
        self.evaluation_sets = {name: {"num_samples": len(dataset), **about} for name, dataset in sets.items()}

    def _report(self, name: str, counts: dict[str, int]) -> None:
        self.data_counts[name] = counts
        rank_zero_info(f"{name}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in counts.items()))

    def _report_training(self, chosen: Sequence[int]) -> None:
        several = sum(len(self.frames[i].frame.names) > 1 for i in chosen)
        counts = {"pictures": len(chosen), "of_one_character": len(chosen) - several, "of_several": several}
        self._report("train", counts)

    def val_dataloader(self) -> list[EvaluationLoader]:
        settings = [str(self.path), self.folder.folder.name, type(self).__name__, *map(str, self.hparams.values())]
        return [
            EvaluationLoader(
                dataset,
                self.eval_batch_size,
                num_workers=self.num_workers,
                identity=json.dumps([name, *settings]),
                **place(self.trainer),
            )
            for name, dataset in self._evaluated.items()
        ]

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class StoryDataModule(WorldDataModule):
    """Pictures with frames for training, stories for test and prediction.

    Validated are `<world>_frames` (held-out pictures, else 64 spread over the training pictures) and `<world>_prompts`;
    tested are `<world>_single` and `<world>_multi`. Predicted are the same stories, or `<world>_stories` of files.

    Args:
        path: folder in the layout of `datamodules.story_folder`; made by `maker` if it does not exist.
        world: folder name or short name of the world; None if there is only one.
        picture_size: height and width in pixels of training pictures.
        fit: how pictures come to that size, see `datamodules.story_batches.fit_picture`; never mirrored, since tags
            stand in the order of the characters.
        batch_size: GLOBAL batch, divided among the processes.
        eval_batch_size: pictures or lines a process takes at a time in evaluation.
        num_workers: loader processes for each training process. Does not change the data order.
        seed: of the data order.
        cache: decode the pictures once and keep them in memory, H * W * 3 bytes each.
        characters: train only on pictures that show one of these alone; None: on all.
        group: "character": a batch shows one character alone, for methods with a model for each; see
            `datamodules.story_batches.CharacterOrder`.
        holdout: share of the pictures that are kept from training for validation, in [0, 1).
        stories: those of "single" characters, of "multi"ple ones, or "all".
        limit_lines: test so many lines of each set only, spread evenly over the stories.
        story_files: text files to predict instead: a prompt a line; blank lines and those that begin with # do not
            count; tags may be left out.
        maker: makes the folder.

    Raises:
        UserError: an argument out of its range, or what is there was made by others.
    """

    def __init__(
        self,
        path: str,
        world: str | None = None,
        picture_size: tuple[int, int] = (512, 896),
        fit: Fit = "cover",
        batch_size: int = 4,
        eval_batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
        cache: bool = True,
        characters: list[str] | None = None,
        group: Literal["all", "character"] = "all",
        holdout: float = 0.0,
        stories: Literal["all", "single", "multi"] = "all",
        limit_lines: int | None = None,
        story_files: list[str] | str | None = None,
        maker: StoryMaker | None = None,
    ) -> None:
        super().__init__(path, world, batch_size, eval_batch_size, num_workers, seed, maker)
        self.save_hyperparameters(ignore=["maker"])
        self.save_hyperparameters({"maker": None if maker is None else plain_description(maker)})
        self.picture_size, self.fit, self.cache = _size("picture_size", picture_size), fit, cache
        self.characters, self.group, self.holdout = characters, group, holdout
        self.stories, self.limit_lines = stories, limit_lines
        self.story_files = [story_files] if isinstance(story_files, str) else list(story_files or ())
        if not 0 <= holdout < 1:
            raise UserError(f"data.holdout: {holdout}: must be from 0 to below 1")
        if limit_lines is not None and limit_lines < 1:
            raise UserError(f"data.limit_lines: {limit_lines}: must be at least 1, or null for all lines")
        self._train: FrameBatches | None = None

    def setup(self, stage: str) -> None:
        self.missing = {}
        name = self.folder.world.name
        if stage in ("fit", "validate"):
            self._set_up_pictures(stage, name)
        elif stage == "predict" and self.story_files:
            self._evaluate({f"{name}_stories": self._lines(f"{name}_stories", self._given_stories())})
        else:
            self._set_up_stories(name)

    def _set_up_pictures(self, stage: str, name: str) -> None:
        chosen = self._chosen()
        kept = held_out(self.frames, chosen, self.holdout)
        trained = sorted(set(chosen) - set(kept))
        if not trained:
            raise UserError(f"data.holdout: {self.holdout}: leaves none of {len(chosen)} pictures for training")
        store = PictureStore([frame.path for frame in self.frames], self.picture_size, self.fit)
        self._train = FrameBatches(self.frames, trained, store)
        validated = kept or [trained[i] for i in spread(len(trained), VALIDATED)]
        sets: dict[str, Dataset] = {f"{name}_frames": FrameBatches(self.frames, validated, store)}
        if self.folder.prompts:
            sets[f"{name}_prompts"] = PromptBatches(self.folder.prompts)
        else:
            self.missing[f"{name}_prompts"] = f"eval-plot/eval_train/each/{self.folder.folder.name}/<n>.txt"
        self._evaluate(sets)
        if stage == "fit":
            self._report_training(trained)
            if self.cache:
                fill(store, trained + kept)

    def _chosen(self) -> list[int]:
        """Places of the pictures that `characters` and `group` leave."""
        for name in self.characters or ():
            if name not in self.world.characters:
                guess = nearest(name, self.world.names)
                hint = f"nearest: {guess}" if guess else f"there are: {', '.join(self.world.names)}"
                raise UserError(f"data.characters: {name}: {self.world.name} has no such character; {hint}")
        if self.characters is None and self.group == "all":
            return list(range(len(self.frames)))
        wanted = self.world.names if self.characters is None else dict.fromkeys(self.characters)
        chosen = sorted(place for name in wanted for place in single_frames(self.frames, name))
        if not chosen:
            raise UserError(f"data.characters: {self.characters}: no pictures that show one of these alone")
        return chosen

    def _set_up_stories(self, name: str) -> None:
        sets: dict[str, Dataset] = {}
        for kind, where in (("single", "Single/<Name>"), ("multi", "Multi/all")):
            found = [story for story in self.folder.stories if story.kind == kind]
            if self.stories not in ("all", kind):
                continue
            if found:
                sets[f"{name}_{kind}"] = self._lines(f"{name}_{kind}", found, self.limit_lines)
            else:
                self.missing[f"{name}_{kind}"] = (
                    f"eval-plot/eval_new_story/{self.folder.folder.name}/{where}/<n>.txt, a prompt a line"
                )
        if not sets:
            raise StoryFault(f"data.path: {self.path}: no stories; looked for {' and '.join(self.missing.values())}")
        for missing, where in self.missing.items():
            rank_zero_warn(f"{missing}: not there; looked for {where}")
        self._evaluate(sets)

    def _given_stories(self) -> list[Story]:
        faults, stories = Faults(), {}
        for path in map(Path, self.story_files):
            with faults.collected():
                if path.stem in stories:
                    raise StoryFault(f"data.story_files: {path}: a story is named {path.stem} already: rename the file")
                lines = read_story(path.expanduser(), self.folder.world, tagged=False)
                stories[path.stem] = Story("file", None, path.stem, path, lines)
        faults.tell()
        return list(stories.values())

    def _lines(self, name: str, stories: Sequence[Story], limit: int | None = None) -> LineBatches:
        lines = [Line(frame, story.name, number) for story in stories for number, frame in enumerate(story.lines)]
        lines = [lines[i] for i in spread(len(lines), limit)]
        self._report(name, {"stories": len({line.story for line in lines}), "lines": len(lines)})
        return LineBatches(lines)

    def train_dataloader(self) -> TrainLoader:
        order = None
        if self.group == "character":
            groups: dict[str, list[int]] = {}
            for sample, picture in enumerate(self._train.chosen):
                groups.setdefault(self.frames[picture].group, []).append(sample)
            order = CharacterOrder(list(groups.values()), self.batch_size, self.seed)
        return TrainLoader(
            self._train,
            self.batch_size,
            self.seed,
            num_workers=self.num_workers,
            order=order,
            **place(self.trainer),
        )

    def references(self) -> dict[str, list[Tensor]]:
        """For each character its pictures alone, uint8 [3, h, w] of the original shape, 512 pixels at most."""
        return {
            name: [
                capped(read_picture(self.frames[i].path), LONGEST_REFERENCE) for i in single_frames(self.frames, name)
            ]
            for name in self.folder.world.names
        }


class CharacterDataModule(WorldDataModule):
    """Every picture of a world with the characters in it, in folds, for classifiers of characters.

    All stages evaluate `<world>_frames`: every picture once, not augmented.

    Args:
        path: see `StoryDataModule`, as for the rest.
        size: height and width in pixels.
        folds: number of folds; pictures of each character are spread over all.
        augment: random crops, mirroring and colours in training.
        pairs: share of the training pictures of one character that become half of a pair of two, since there are few
            pictures of two; in [0, 1].

    Raises:
        UserError: an argument out of its range, or what is there was made by others.
    """

    def __init__(
        self,
        path: str,
        world: str | None = None,
        size: tuple[int, int] = (112, 196),
        folds: int = 4,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        augment: bool = True,
        pairs: float = 0.0,
        num_workers: int = 0,
        seed: int = 0,
        maker: StoryMaker | None = None,
    ) -> None:
        super().__init__(path, world, batch_size, eval_batch_size, num_workers, seed, maker)
        self.save_hyperparameters(ignore=["maker"])
        self.save_hyperparameters({"maker": None if maker is None else plain_description(maker)})
        self.size, self.folds, self.augment, self.pairs = _size("size", size), folds, augment, pairs
        self.picture_size = self.size
        if folds < 1:
            raise UserError(f"data.folds: {folds}: must be at least 1")
        if not 0 <= pairs <= 1:
            raise UserError(f"data.pairs: {pairs}: must be from 0 to 1")
        self._train: CharacterBatches | None = None

    def setup(self, stage: str) -> None:
        if self._train is not None:
            return
        name, count = self.folder.world.name, len(self.frames)
        if count < self.folds:
            raise UserError(f"data.folds: {self.folds}: more than the {count} pictures of {name}")
        kept_size = (round(MARGIN * self.size[0]), round(MARGIN * self.size[1]))
        store = PictureStore([frame.path for frame in self.frames], kept_size)
        fill(store, range(count))
        folds = stratified_folds(self.frames, self.folds)
        common = (self.frames, store, self.world.names, folds, self.size)
        self._train = CharacterBatches(*common, augment=self.augment, pairs=self.pairs)
        self._report_training(range(count))
        self._evaluate({f"{name}_frames": CharacterBatches(*common)}, class_names=self.world.names)

    def train_dataloader(self) -> TrainLoader:
        return TrainLoader(self._train, self.batch_size, self.seed, num_workers=self.num_workers, **place(self.trainer))


def fill(store: PictureStore, indices: Sequence[int]) -> None:
    """Decode pictures into memory, with a progress bar on the first process."""
    with Progress(*COLUMNS, console=Console(stderr=True), transient=True, disable=not is_first_process()) as progress:
        bar = progress.add_task("reading pictures", total=len(indices))
        store.fill(indices, lambda done, total: progress.update(bar, completed=done, total=total))


def _size(key: str, size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"data.{key}: {list(size)}: must be height and width in pixels")
    return int(size[0]), int(size[1])
