"""A tiny world for the second stage: unit features of a few frames, and spectrograms that they decide."""

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmtrain.callbacks import RandomState
from mmtrain.checkpoint import AtomicCheckpointIO, LastCheckpoint, ResumeGuard
from mmtrain.ema import TrainableEma
from mmtrain.optim import AdamWSettings
from mmtrain.video_audio import ClipFormat

FORMAT = ClipFormat(
    fps=4, seconds=2, frame_size=32, contrast_frames=4, min_shift_frames=2, window_frames=4, window_mel_frames=64
)
BINS, WIDTH = 128, 16
FIRST_STAGE = {
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
}
UNET = {
    "feature_dim": WIDTH,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "heads": 4,
    "context_width": 32,
    "max_frames": 8,
}
CLASSIFIER = {**UNET, "block_out_channels": (32, 64)}
OPTIM = AdamWSettings(lr=1e-3, warmup_steps=2, schedule="constant")


def clip(number: int) -> dict[str, Any]:
    """One clip: a tone that is loud where the first entry of the feature is large."""
    generator = torch.Generator().manual_seed(number)
    features = torch.nn.functional.normalize(torch.randn(FORMAT.window_frames, WIDTH, generator=generator), dim=-1)
    loud = (features[:, 0] > 0).float().repeat_interleave(FORMAT.window_mel_frames // FORMAT.window_frames)
    mel = torch.rand(BINS, 1, generator=generator) * loud[None]
    audio = 0.1 * torch.randn(FORMAT.window_samples - 256, generator=generator)
    return {"mel": mel, "features": features, "audio": audio, "id": torch.tensor(number)}


class TinyClips(torch.utils.data.Dataset):
    """So many clips as lists of batches hold them; `pairs` adds what the alignment classifier is trained with."""

    def __init__(self, size: int, pairs: bool, start: int = 0) -> None:
        self.clips = [clip(start + number) for number in range(size)]
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        own = self.clips[index]
        if not self.pairs:
            return {key: own[key] for key in ("mel", "features", "id")}
        kind = index % 3
        given = [own["features"], own["features"].roll(1, 0), self.clips[index - 1]["features"]][kind]
        match = torch.tensor(float(kind == 0))
        return {"mel": own["mel"], "features": given, "id": own["id"], "match": match, "kind": torch.tensor(kind)}


class Loader(torch.utils.data.DataLoader):
    """Has the counters that the loaders of `datamodules` have."""

    counts: ClassVar[Counter] = Counter()


class TinyData(pl.LightningDataModule):
    """Batches of the tiny world."""

    def __init__(self, size: int = 4, batch_size: int = 4, pairs: bool = False, test_batch: int = 2) -> None:
        super().__init__()
        self.size, self.batch_size, self.pairs, self.test_batch = size, batch_size, pairs, test_batch
        self.loader_names = ["tiny"]
        self.evaluation_sets = {"tiny": {"num_samples": size}}
        self.missing: dict[str, str] = {}
        self.data_counts: dict[str, Any] = {}

    def train_dataloader(self) -> Loader:
        return Loader(TinyClips(self.size, self.pairs), self.batch_size, shuffle=True)

    def val_dataloader(self) -> list[Loader]:
        return [Loader(TinyClips(self.size, self.pairs), self.batch_size)]

    def test_dataloader(self) -> list[Loader]:
        if self.pairs:
            return self.val_dataloader()
        clips = TinyClips(self.size, False).clips
        batches = [clips[first : first + self.test_batch] for first in range(0, len(clips), self.test_batch)]
        return [Loader([test_batch(batch) for batch in batches], batch_size=None)]


def test_batch(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as the data modules make it for `test`."""
    batch: dict[str, Any] = {key: torch.stack([c[key] for c in clips]) for key in ("mel", "features", "audio", "id")}
    batch["name"] = [f"clip {int(number)}" for number in batch["id"]]
    batch["label"] = batch["id"] % 2
    batch["onsets"] = [torch.tensor([0.25, 0.75]) for _ in clips]
    batch["shifted_features"] = batch["features"].roll(1, 1)
    batch["wrong_features"] = batch["features"].flip(0)
    return batch


test_batch.__test__ = False  # the name misleads pytest


def trainer_of(folder: Path, steps: int = 1, **options: Any) -> pl.Trainer:
    """A trainer with the callbacks of every run."""
    callbacks = [RandomState(), ResumeGuard(), LastCheckpoint(every_n_train_steps=1000), TrainableEma()]
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=callbacks,
        **options,
    )


def train(folder: Path, module: pl.LightningModule, data: TinyData, steps: int) -> Path:
    """Fit for so many steps; returns the checkpoint."""
    pl.seed_everything(0, verbose=False)
    trainer_of(folder, steps).fit(module, datamodule=data)
    return folder / "checkpoints" / "last.ckpt"


def validate(module: pl.LightningModule, data: TinyData) -> dict[str, float]:
    """What a validation logs."""
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(module, data, verbose=False)[0]


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are the same."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def bare_trainer(folder: Path, steps: int) -> pl.Trainer:
    """A trainer that only keeps its last checkpoint."""
    return pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[LastCheckpoint()],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
