"""Keeps every test away from the user's cache, keys and network; makes what a config says without running it."""

import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI

from mmtrain.__main__ import main


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def instantiate(monkeypatch, tmp_path):
    """Returns a function: words after `fit` -> (trainer, model, datamodule), nothing trained."""
    monkeypatch.chdir(tmp_path)
    found = []
    keep = lambda cli, _: found.extend((cli.trainer, cli.model, cli.datamodule))  # noqa: E731
    monkeypatch.setattr(LightningCLI, "_run_subcommand", keep)

    def run(*words: str) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
        found.clear()
        assert main(["fit", *words]) == 0
        return tuple(found)

    return run
