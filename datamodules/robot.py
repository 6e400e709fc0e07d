"""Robot demonstrations in a zarr store: windows to train and validate on, closed-loop episodes to test with."""

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track

from datamodules.closed_loop import ClosedLoopLoader, closed_loop_items
from datamodules.episode_writer import EpisodeWriter
from datamodules.episodes import EpisodeStore, LabelLookahead, split_episodes
from datamodules.loading import EvaluationLoader, TrainLoader, place
from datamodules.robot_windows import RobotWindows, WindowDataset
from datamodules.synthetic_episodes import SyntheticDemonstrations
from mmtrain.config_errors import UserError
from mmtrain.normaliser import Affine
from mmtrain.robot_tasks import Method, Task, Touch, Vision, policy_spec

VARIATIONS = {"peel": ("none", "before", "after"), "wipe": ("none", "before", "after"), "lift": ("soft", "hard")}
VALIDATION = "validation"
STATISTICS_BATCH = 256
RELEASED_SIZE = (240, 320)  # height and width of the released stores' pictures


class DemonstrationSource(Protocol):
    """Makes demonstrations where a store does not exist yet, such as `mmtrain.rdp.sim.demonstrations.Demonstrations`.

    It may also have `pca()` -> {sensor: (components, mean)}, kept with the store, and `mean_score()`.
    """

    def __len__(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """What the demonstrations depend on, as plain types; the store keeps it as `source`."""

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """Episodes as `datamodules.episode_writer.EpisodeWriter.append` takes them."""


class RobotDataModule(pl.LightningDataModule):
    """Windows of robot episodes for RDP and the Diffusion Policies that it is compared with.

    Batches: `{"action": float32 [B, H, A], "observation": {key: float32 [B, 2, D] or uint8 [B, 2, 3, H, W]}, "touch":
    {key: float32 [B, H, D]}, "id": int64 [B]}`, raw physical units; the module normalises. `id` numbers the windows of
    the whole store.

    Args:
        path: the store, a zarr folder of the released layout; made from `demonstrations` if it does not exist.
        task, touch, method, vision, relative: see `mmtrain.robot_tasks.policy_spec`.
        batch_size: GLOBAL batch, divided among the processes.
        eval_batch_size: windows a process takes at a time in validation.
        num_workers: loader processes for each training process; 0 is best without pictures.
        val_ratio: share of the episodes that is kept for validation, chosen by a fixed seed; the released
            configurations have 0.
        max_train_episodes: train on at most so many of the rest.
        seed: of the order of the windows.
        label_lookahead: at 12 frames a second, "corrected" labels are one step of 1/12 s ahead, "reference" ones half a
            step, as in the released code (see `datamodules.episodes.downsample`).
        bgr: cameras of a store that does not say its order are blue first: the released ones. What `data convert` and
            simulations write says that it is RGB, and is read so with either setting.
        images: False leaves pictures out of the batches, and the store needs none (tokenizers see no pictures).
        quantile: in (0, 0.5), limits of touch and widths for the normaliser from quantiles, against single outliers.
        demonstrations: a `DemonstrationSource`; with it `test` runs closed-loop episodes in place of the validation
            windows.
        episodes: closed-loop episodes of each variation; 0 tests on the validation windows.
        variations: of the closed-loop episodes; None takes all of the task.
        evaluation_seed: of the first closed-loop episode; every variation and method has the same seeds.

    Raises:
        UserError: no store and no demonstrations, a store made by others or of another task, bad data.
    """

    @staticmethod
    def stand_in(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
        """Settings that put made-up episodes, pictures as large as the released ones, in the place of absent data.

        Args:
            folder: where they are written.
            given: the config's settings.
        """
        episodes = SyntheticDemonstrations(given["task"], images=given.get("images", True), size=RELEASED_SIZE)
        write_demonstrations(folder / "episodes.zarr", episodes)
        return {"path": str(folder / "episodes.zarr"), "demonstrations": None}

    def __init__(
        self,
        path: str,
        task: Task,
        touch: Touch = "none",
        method: Method = "rdp",
        vision: Vision = "camera",
        relative: bool | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_ratio: float = 0.1,
        max_train_episodes: int | None = None,
        seed: int = 0,
        label_lookahead: LabelLookahead = "corrected",
        bgr: bool = False,
        images: bool = True,
        quantile: float | None = None,
        demonstrations: DemonstrationSource | None = None,
        episodes: int = 50,
        variations: list[str] | None = None,
        evaluation_seed: int = 100_000,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["demonstrations"])
        self.source = None if demonstrations is None else json.loads(json.dumps(demonstrations.describe()))
        self.save_hyperparameters({"demonstrations": self.source})  # plain, and the same with and without a config
        self.spec = policy_spec(task, touch, method, vision, relative)
        self.path, self.demonstrations = Path(path), demonstrations
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.val_ratio, self.max_train_episodes, self.seed = val_ratio, max_train_episodes, seed
        self.reading = {"label_lookahead": label_lookahead, "images": images, "bgr": bgr, "quantile": quantile}
        self.episodes, self.evaluation_seed = episodes, evaluation_seed
        self.variations = list(VARIATIONS[task] if variations is None else variations)
        if bad := [name for name in self.variations if name not in VARIATIONS[task]]:
            raise UserError(f"variations: {bad[0]} is not one of task {task}, which has {list(VARIATIONS[task])}")
        if not self.variations:
            raise UserError(f"variations: there is none; null takes all of task {task}, episodes: 0 tests on windows")
        if episodes < 0:
            raise UserError(f"episodes: {episodes}, must be 1 or more, or 0 to test on the validation windows")
        if label_lookahead not in ("corrected", "reference"):
            raise UserError(f"label_lookahead: {label_lookahead} is not known: corrected or reference")
        self.evaluation_sets: dict[str, dict[str, Any]] = {}
        self.loader_names: list[str] = []  # of the present stage's evaluation loaders
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, dict[str, int]] = {}
        self.windows: RobotWindows | None = None
        self._affines: dict[str, Affine] | None = None

    # --- making and opening the store ---

    def prepare_data(self) -> None:
        """Write the store from the demonstrations where there is none."""
        if self.path.exists():
            return
        if self.demonstrations is None:
            raise UserError(
                f"data.path: {self.path} does not exist and no data.demonstrations are given that could make it"
            )
        write_demonstrations(self.path, self.demonstrations)

    def setup(self, stage: str) -> None:
        if self.windows is None:
            self._open()
        closed_loop = stage == "test" and self.has_closed_loop
        count = self.episodes * len(self.variations) if closed_loop else len(self.validation_windows)
        self.loader_names = [self.spec.task if closed_loop else VALIDATION] if count else []
        self.evaluation_sets = {name: {"num_samples": count} for name in self.loader_names}

    def _open(self) -> None:
        store = EpisodeStore(self.path)
        self._check_source(store)
        self.windows = RobotWindows(store, self.spec, **self.reading)
        self.train_episodes, self.validation_episodes = split_episodes(
            store.num_episodes, self.val_ratio, self.max_train_episodes
        )
        self.train_windows = self.windows.of_episodes(self.train_episodes)
        self.validation_windows = self.windows.of_episodes(self.validation_episodes)
        lengths = np.diff(store.episode_ends, prepend=0)
        for name, mask in (("train", self.train_episodes), (VALIDATION, self.validation_episodes)):
            if not mask.any():
                continue
            counts = {
                "episodes": int(mask.sum()),
                "frames": int(lengths[mask].sum()),
                "windows": len(self.windows.of_episodes(mask)),
            }
            self.data_counts[name] = counts
            rank_zero_info(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))

    def _check_source(self, store: EpisodeStore) -> None:
        made_from = store.attributes.get("source")
        if self.source is not None and made_from != self.source:
            raise UserError(
                f"{store.path} was made from {made_from}, data.demonstrations says {self.source}: "
                "delete the store, or give another data.path"
            )

    @property
    def has_closed_loop(self) -> bool:
        """Whether `test` runs episodes in simulation."""
        return self.demonstrations is not None and self.episodes > 0

    @property
    def demonstration_mean(self) -> float:
        """Mean score of the demonstrations that the store was made from; 1.0 where it is not known."""
        return 1.0 if self.windows is None else float(self.windows.store.attributes.get("mean_score", 1.0))

    def _opened(self) -> RobotWindows:
        if self.windows is None:
            raise UserError("the data module is not set up: call prepare_data and setup first")
        return self.windows

    # --- what training needs to know ---

    def normaliser_affines(self) -> dict[str, Affine]:
        """Normalisers of "action", every low-dimensional and every touch stream, from the training split only."""
        if self._affines is None:
            self._affines = self._opened().affines(self.train_episodes)
        return self._affines

    def training_windows(self) -> Iterator[dict[str, Any]]:
        """Batches of all training windows, once, in order, on every process alike, without pictures."""
        return WindowDataset(self._opened(), self.train_windows, pictures=False).batches(STATISTICS_BATCH)

    def closed_loop_items(self) -> list[tuple[str, int]]:
        """(variation, seed) of every closed-loop episode, in the order of their ids."""
        return closed_loop_items(self.variations, self.episodes, self.evaluation_seed)

    # --- loaders ---

    def train_dataloader(self) -> TrainLoader:
        dataset = WindowDataset(self._opened(), self.train_windows)
        return TrainLoader(dataset, self.batch_size, self.seed, num_workers=self.num_workers, **place(self.trainer))

    def val_dataloader(self) -> list[EvaluationLoader]:
        if not len(self.validation_windows):
            return []
        dataset = WindowDataset(self._opened(), self.validation_windows)
        identity = f"{self.path} {self.spec} {self.reading}"
        return [
            EvaluationLoader(
                dataset, self.eval_batch_size, num_workers=self.num_workers, identity=identity, **place(self.trainer)
            )
        ]

    def test_dataloader(self) -> list[ClosedLoopLoader] | list[EvaluationLoader]:
        if not self.has_closed_loop:
            return self.val_dataloader()
        where = {name: value for name, value in place(self.trainer).items() if name != "pin_memory"}
        return [ClosedLoopLoader(self.variations, self.episodes, self.evaluation_seed, **where)]

    predict_dataloader = val_dataloader


def write_demonstrations(path: Path, demonstrations: DemonstrationSource) -> None:
    """Write a store with all episodes, to a folder of its own first, so that `path` is never half a store.

    Of several processes that do so at a time, such as runs of other seeds, the first one's store stays.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = EpisodeWriter(part, {"source": demonstrations.describe()})
        episodes = track(demonstrations.episodes(), f"demonstrations for {path}", total=len(demonstrations))
        for episode in episodes:
            writer.append(episode)
        if hasattr(demonstrations, "pca"):
            for sensor, (components, mean) in demonstrations.pca().items():
                writer.write_pca(sensor, components, mean)
        if hasattr(demonstrations, "mean_score"):
            writer.group.attrs["mean_score"] = float(demonstrations.mean_score())
        part.rename(path)
    except OSError:
        if not path.exists():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
