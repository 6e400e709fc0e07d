"""Random state, the non-finite guard, data counters, files of predictions."""

import csv
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmtrain.callbacks import (
    DataCounters,
    NonFiniteGuard,
    PredictionFiles,
    RandomState,
    random_state,
    set_random_state,
)
from mmtrain.checkpoint import AtomicCheckpointIO, ResumeGuard
from mmtrain.config_errors import UserError
from tests.processes import run_in_processes


@dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


class Net(pl.LightningModule):
    """Two layers; at the batches of `nan_at` the gradient of the second is not finite. Draws from all generators."""

    def __init__(
        self, width: int = 2, optim: Optim | None = None, nan_at: tuple[int, ...] = (), chunk: int = 1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Linear(3, width, bias=False) for _ in range(2))
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)
        self.nan_at, self.seen, self.drawn = nan_at, [], []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.drawn.append((float(torch.rand(())), float(np.random.randn()), random.gauss(0, 1)))
        factor = float("nan") if batch_idx in self.nan_at else 1.0
        return self.first(batch).square().sum() + factor * self.second(batch).square().sum()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in self.named_parameters()})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Other(Net):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 2, num_workers: int = 0, path: Path = Path("here")) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rows = torch.arange(24.0).view(8, 3) / 24

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, self.hparams.batch_size)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    usual = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "default_root_dir": folder, "log_every_n_steps": 1}
    return pl.Trainer(**(quiet | usual | {"callbacks": list(callbacks), "plugins": [AtomicCheckpointIO()]} | options))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------- the non-finite guard


def test_stop_leaves_the_weights_and_names_the_parameter(tmp_path) -> None:
    net = Net(nan_at=(2,))
    with pytest.raises(
        UserError, match=r"step 2: not finite: the loss \(nan\), the gradient of 1 parameters, first second\.weight;"
    ):
        trainer(tmp_path, NonFiniteGuard(), gradient_clip_val=1.0).fit(net, Data())
    assert len(net.seen) == 2 and equal(dict(net.named_parameters()), net.seen[-1])
    assert not equal(net.seen[0], net.seen[1])


def test_skip_is_as_if_the_batch_had_not_been(tmp_path) -> None:
    net, data = Net(nan_at=(1,)), Data()
    with pytest.warns(UserWarning, match=r"step 1: .*: the step is left out \(1 in a row\)"):
        trainer(tmp_path, NonFiniteGuard("skip"), gradient_clip_val=1.0).fit(net, data)
    without, shorter = Net(), Data()
    shorter.rows = torch.cat([data.rows[:2], data.rows[4:]])
    trainer(tmp_path, gradient_clip_val=1.0).fit(without, shorter)
    assert equal(net.seen[1], net.seen[0])
    assert equal(net.seen[-1], without.seen[-1]), "moments and steps of the optimizer were left alone too"


def test_skip_gives_up_after_several_steps_in_a_row(tmp_path) -> None:
    net = Net(nan_at=(0, 2, 3))
    with warnings.catch_warnings(), pytest.raises(UserError, match="step 3: "):
        warnings.simplefilter("ignore")
        trainer(tmp_path, NonFiniteGuard("skip", max_skipped=1)).fit(net, Data())
    assert len(net.seen) == 3


def test_overflow_in_half_precision_is_left_to_the_gradient_scaler(tmp_path) -> None:
    """float16 starts with a scale that is too large, and halves it until the gradient fits."""
    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    net = Net()
    trainer(tmp_path, NonFiniteGuard(), plugins=[half]).fit(net, Data())
    assert half.scaler.get_scale() == 2.0**36 and equal(net.seen[0], net.seen[-1])
    lasting = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    with pytest.raises(UserError, match=r"step 2: .*first second\.weight"):  # 2, 1, and then it is no overflow
        trainer(tmp_path, NonFiniteGuard(), plugins=[lasting]).fit(Net(nan_at=(0, 1, 2, 3)), Data())


class Processes(SimpleNamespace):
    """What the callbacks ask of a trainer."""

    precision_plugin = None

    @property
    def is_global_zero(self) -> bool:
        return torch.distributed.get_rank() == 0

    @property
    def loggers(self) -> list[Any]:
        return [SimpleNamespace(log_metrics=lambda metrics, step: self.logged.append((metrics, step)))]


def guard_in_processes(rank: int, world_size: int) -> dict[str, Any]:
    """Only the last process has a NaN, then none has; then each callback that gathers."""
    net, run = Net(), Processes(global_step=5, logged=[])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    result: dict[str, Any] = {}
    for case, bad in (("nan", rank == world_size - 1), ("clean", False)):
        before = net.first.weight.detach().clone()
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            NonFiniteGuard("skip").on_before_optimizer_step(run, net, optimizer)
        optimizer.step()
        result[case] = float((net.first.weight - before).abs().max())
    net.second.weight.grad[0, 0] = float("inf") if rank == world_size - 1 else 1.0
    with pytest.raises(UserError) as stopped:
        NonFiniteGuard().on_before_optimizer_step(run, net, optimizer)
    result["message"] = str(stopped.value)
    with pytest.raises(UserError) as stopped:
        ResumeGuard().on_train_start(Processes(global_step=3 * rank), net)
    result["steps"] = str(stopped.value)
    ResumeGuard().on_train_start(run, net)
    run.train_dataloader = SimpleNamespace(counts={"read": 10, f"reason{rank}": 1 + rank})
    DataCounters().on_train_epoch_end(run, net)
    result["logged"] = run.logged
    saved: dict[str, Any] = {}
    DataCounters().on_save_checkpoint(run, net, saved)
    result["saved"] = saved["data_counters"]
    run.train_dataloader = SimpleNamespace(counts={})
    restored_counters = DataCounters()
    restored_counters.on_load_checkpoint(run, net, saved)
    restored_counters.on_train_start(run, net)
    result["restored"] = dict(run.train_dataloader.counts)
    torch.manual_seed(rank)
    checkpoint: dict[str, Any] = {}
    RandomState().on_save_checkpoint(run, net, checkpoint)
    expected = float(torch.rand(()))
    torch.manual_seed(99)
    restored = RandomState()
    restored.on_load_checkpoint(run, net, checkpoint)
    restored.on_train_batch_start(run, net)
    result["random"] = (float(torch.rand(())), expected)
    return result


def test_callbacks_over_two_processes() -> None:
    first, second = run_in_processes(guard_in_processes, 2)
    assert first["nan"] == second["nan"] == 0, "both leave out the step, though only one has the NaN"
    assert first["clean"] == second["clean"] == pytest.approx(0.1)
    assert first["message"] == second["message"], "the first process speaks for the run"
    assert first["message"].startswith(
        "step 5: not finite: process 1: the gradient of 1 parameters, first second.weight;"
    )
    assert "the processes read checkpoints of different steps: [0, 3]" in first["steps"] == second["steps"]
    assert first["logged"] == [({"data/read": 20.0, "data/reason0": 1.0, "data/reason1": 2.0}, 5)]
    assert second["logged"] == []
    assert first["saved"] == second["saved"] == [{"read": 10, "reason0": 1}, {"read": 10, "reason1": 2}]
    assert [first["restored"], second["restored"]] == first["saved"]
    assert first["random"][0] == first["random"][1] != second["random"][0] == second["random"][1]


# ------------------------------------------------------------------------------------------------------- random state


def draws() -> list[float]:
    """From every generator; odd counts of normal numbers, so that one is kept back."""
    return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.randn(3).tolist(), np.random.rand()]


def test_random_state_round_trip_through_a_safe_file(tmp_path) -> None:
    random.seed(0)
    np.random.seed(0)
    draws()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert draws() == expected


class SaveAfter(pl.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_draws_what_the_undisturbed_one_drew(tmp_path) -> None:
    pl.seed_everything(0)
    calm = Net()
    trainer(tmp_path, RandomState(), SaveAfter(2, tmp_path / "a.ckpt")).fit(calm, Data())
    pl.seed_everything(1)
    resumed = Net()
    trainer(tmp_path, RandomState()).fit(resumed, Data(), ckpt_path=tmp_path / "a.ckpt")
    assert len(calm.drawn) == 4 and resumed.drawn == calm.drawn[2:]
    assert resumed.drawn[0] != calm.drawn[0]


# ------------------------------------------------------------------------------------------------------- data counters


class Counted(DataLoader):
    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows, 4)
        self.counts = {"read": 8, "undecodable_image": 1}


def test_data_counters_reach_the_logger(tmp_path) -> None:
    run = trainer(tmp_path, DataCounters(), logger=CSVLogger(tmp_path, "logs"))
    run.fit(Net(), Counted(torch.ones(8, 3)))
    with open(tmp_path / "logs" / "version_0" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("data/read")]
    assert [(r["data/read"], r["data/undecodable_image"], r["step"]) for r in rows] == [("8.0", "1.0", "2")]


def test_data_counters_of_more_processes_than_now_are_added() -> None:
    run, counters = SimpleNamespace(train_dataloader=SimpleNamespace(counts={})), DataCounters()
    counters.on_load_checkpoint(run, None, {"data_counters": [{"read": 10, "odd": 1}, {"read": 12}]})
    counters.on_train_start(run, None)
    assert dict(run.train_dataloader.counts) == {"read": 22, "odd": 1}


# ------------------------------------------------------------------------------------------------ files of predictions


class Predicting(Net):
    """Predicts rows, or nothing, as a model that writes files of its own."""

    is_silent = False

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {} if self.is_silent else {"rows": batch}


def test_predictions_are_written_and_nothing_is_said_where_there_are_none(tmp_path, capsys) -> None:
    model, loader = Predicting(), DataLoader(torch.arange(6.0).view(3, 2), 2)
    trainer(tmp_path, PredictionFiles()).predict(model, loader, return_predictions=False)
    files = sorted((tmp_path / "predictions").iterdir())
    assert [file.name for file in files] == ["0-00000-rank0.pt", "0-00001-rank0.pt"]
    assert torch.equal(torch.cat([torch.load(file)["rows"] for file in files]), loader.dataset)
    assert "predictions are in" in capsys.readouterr().out
    model.is_silent = True
    trainer(tmp_path, PredictionFiles()).predict(model, loader, return_predictions=False)
    assert not any((tmp_path / "predictions").iterdir()), "those of the run before are not this one's"
    trainer(tmp_path / "new", PredictionFiles()).predict(model, loader, return_predictions=False)
    assert not (tmp_path / "new" / "predictions").exists() and "predictions" not in capsys.readouterr().out
