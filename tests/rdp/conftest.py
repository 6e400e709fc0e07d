"""Small trainings of both stages on made-up demonstrations."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from datamodules.robot import RobotDataModule
from datamodules.synthetic_episodes import SyntheticDemonstrations
from mmtrain.callbacks import RandomState
from mmtrain.checkpoint import AtomicCheckpointIO, LastCheckpoint, ResumeGuard
from mmtrain.ema import TrainableEma
from mmtrain.optim import AdamWSettings
from mmtrain.rdp.tokenizer import Tokenizer

OPTIM = AdamWSettings(lr=1e-3, warmup_steps=2)


def data_of(folder: Path, task: str = "wipe", method: str = "rdp", touch: str = "force", **kwargs: Any):
    """A data module over 6 short episodes, of which one is for validation."""
    return RobotDataModule(
        str(folder / f"{task}.zarr"),
        task,
        touch,
        method,
        vision="pose",
        batch_size=16,
        val_ratio=0.2,
        demonstrations=SyntheticDemonstrations(task, episodes=6),
        **kwargs,
    )


class SaveAt(pl.Callback):
    """Saves `at.ckpt` inside an epoch, as a run that is killed there leaves it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "at.ckpt")


def train(
    folder: Path,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    steps: int,
    resume: Path | None = None,
    save_at: int | None = None,
) -> Path:
    """Fit for so many steps in all, with the callbacks of every run; returns the checkpoint."""
    pl.seed_everything(0, verbose=False)
    extra = [] if save_at is None else [SaveAt(save_at)]
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[RandomState(), ResumeGuard(), LastCheckpoint(every_n_train_steps=1000), TrainableEma(), *extra],
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def tokenizer_checkpoint(tmp_path_factory) -> Path:
    """A tokenizer of Wiping with force, 20 steps old; its store lies two folders up."""
    folder = tmp_path_factory.mktemp("rdp")
    module = Tokenizer("wipe", "force", "pose", preset="sim", optim=OPTIM)
    return train(folder / "at", module, data_of(folder), 20)
