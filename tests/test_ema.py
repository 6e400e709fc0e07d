"""The average of trainable weights: its schedule, who sees it, what checkpoints hold, and resume bit for bit."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmtrain.callbacks import NonFiniteGuard
from mmtrain.checkpoint import AtomicCheckpointIO, LastCheckpoint, ResumeGuard
from mmtrain.config_errors import UserError
from mmtrain.ema import TrainableEma, decay_at, ema_weights
from mmtrain.preemption import Preemption


class Net(pl.LightningModule):
    """A frozen layer, a trained one and a tied name of it; notes its trained weights where the tests ask for them."""

    def __init__(self, width: int = 2, thaw: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        generator = torch.Generator().manual_seed(0)
        self.frozen, self.trained = nn.Linear(3, width), nn.Linear(width, 1)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)
        self.tied = self.trained
        self.frozen.requires_grad_(thaw)
        self.after_step: list[Tensor] = []
        self.evaluated: list[Tensor] = []

    @property
    def weight(self) -> Tensor:
        return self.trained.weight.detach().clone()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.trained(self.frozen(batch).relu()).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_step.append(self.weight)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.evaluated.append(self.weight)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


class Stop(Exception):
    pass


class SaveInValidation(pl.Callback):
    """Before the averaging callback in the list: writes a checkpoint in the midst of the validation, then raises."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise Stop


class StopAfter(pl.Callback):
    """First in the list: writes a checkpoint at the end of the batch of a step, as a preempted run does."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Stop


def data() -> DataLoader:
    return DataLoader(torch.arange(24.0).view(8, 3) / 24, 1)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    usual = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return pl.Trainer(**(quiet | usual | {"callbacks": list(callbacks), "plugins": [AtomicCheckpointIO()]} | options))


def expected(raw: list[Tensor]) -> Tensor:
    """The average after each of `raw`, by the formula."""
    average = raw[0]
    for step, weight in enumerate(raw):
        decay = 1 - (1 + step) ** -0.75
        average = decay * average + (1 - decay) * weight
    return average


def test_schedule() -> None:
    assert [decay_at(0), decay_at(15)] == [0, 1 - 16**-0.75] and decay_at(10**7) == 0.9999
    with pytest.raises(UserError, match=r"max_decay 1\.5"):
        TrainableEma(max_decay=1.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_validation_sees_the_average_and_training_the_raw_weights(tmp_path: Path, accumulate: int) -> None:
    plain, net, ema = Net(), Net(), TrainableEma()
    options = {"accumulate_grad_batches": accumulate, "num_sanity_val_steps": 2, "val_check_interval": 4}
    trainer(tmp_path, **options).fit(plain, data(), data())
    trainer(tmp_path, ema, **options).fit(net, data(), data())
    raw = net.after_step[accumulate - 1 :: accumulate]
    assert ema.updates == len(raw) == 16 // accumulate
    assert all(map(torch.equal, net.after_step, plain.after_step)) and not torch.equal(raw[0], raw[-1])
    assert set(ema.weights) == {"trained.weight", "trained.bias"}  # nothing of the frozen part, tied weights once
    torch.testing.assert_close(ema.weights["trained.weight"], expected(raw))
    # the sanity check comes before any average; then 8 batches each after every 4 training batches
    seen = net.evaluated[2::8]
    assert len(seen) == 4 and not torch.equal(seen[-1], raw[-1])
    for steps, weight in zip((4, 8, 12, 16), seen, strict=True):
        torch.testing.assert_close(weight, expected(raw[: steps // accumulate]))


def test_until_the_start_it_is_the_raw_weights_and_half_precision_is_averaged_in_full(tmp_path: Path) -> None:
    net, ema = Net(), TrainableEma(update_after_step=14)
    trainer(tmp_path, ema).fit(net, data())
    start, end = net.after_step[-2:]
    decay = 1 - 2**-0.75
    torch.testing.assert_close(ema.weights["trained.weight"], decay * start + (1 - decay) * end)
    net, ema = Net().bfloat16(), TrainableEma()
    trainer(tmp_path, ema, precision="bf16-true").fit(net, data())
    assert ema.weights["trained.weight"].dtype == torch.float32
    torch.testing.assert_close(ema.weights["trained.weight"], expected([w.float() for w in net.after_step]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact(tmp_path: Path, accumulate: int) -> None:
    calm, net = TrainableEma(), Net()
    options = {"accumulate_grad_batches": accumulate}
    trainer(tmp_path, calm, **options).fit(net, data(), data())
    path = tmp_path / "stopped.ckpt"
    with pytest.raises(Stop):
        trainer(tmp_path, StopAfter(path, 8 // accumulate), TrainableEma(), ResumeGuard(), **options).fit(
            Net(), data(), data()
        )
    saved = torch.load(path, weights_only=True)
    assert saved["ema_updates"] == saved["global_step"] == 8 // accumulate
    resumed, again = TrainableEma(), Net()
    trainer(tmp_path, ResumeGuard(), resumed, **options).fit(again, data(), data(), ckpt_path=path)
    assert len(again.after_step) == 8 and torch.equal(again.weight, net.weight)
    assert resumed.updates == calm.updates and resumed.weights.keys() == calm.weights.keys()
    assert all(torch.equal(calm.weights[name], resumed.weights[name]) for name in calm.weights)


def test_a_checkpoint_in_the_midst_of_validation_holds_the_raw_weights(tmp_path: Path) -> None:
    path, ema, net = tmp_path / "inside.ckpt", TrainableEma(), Net()
    with pytest.raises(Stop):
        trainer(tmp_path, SaveInValidation(path), ema).fit(net, data(), data())
    assert torch.equal(net.weight, net.after_step[-1])  # given back, though the validation never ended
    saved = torch.load(path, weights_only=True)
    for name in ("trained.weight", "tied.weight"):
        assert torch.equal(saved["state_dict"][name], net.after_step[-1])
        assert torch.equal(saved["ema"][name], net.evaluated[-1]) and torch.equal(
            ema_weights(saved)[name], net.evaluated[-1]
        )
    assert not torch.equal(net.evaluated[-1], net.after_step[-1])
    assert torch.equal(ema_weights(saved)["frozen.weight"], Net().frozen.weight)


def test_a_checkpoint_is_evaluated_with_its_average(tmp_path: Path) -> None:
    ema, net, last = TrainableEma(), Net(), LastCheckpoint()
    trainer(tmp_path, Preemption(), NonFiniteGuard(), ema, last, enable_checkpointing=True).fit(net, data(), data())
    average = ema.weights["trained.weight"].clone()
    for verb in ("validate", "test", "predict"):
        fresh = Net()
        run = trainer(tmp_path, TrainableEma())
        options = {} if verb == "predict" else {"verbose": False}
        getattr(run, verb)(fresh, data(), ckpt_path=last.path, **options)
        assert len(fresh.evaluated) == 8 and all(torch.equal(weight, average) for weight in fresh.evaluated)
        assert torch.equal(fresh.weight, net.after_step[-1])  # and the raw ones are back
    net.load_state_dict(ema_weights(torch.load(last.path, weights_only=True)))
    assert torch.equal(net.weight, average)


@pytest.mark.parametrize("weights_only", [False, True])  # such a file has no callbacks at all, like an imported one
def test_a_file_without_an_average_is_evaluated_as_it_is(tmp_path: Path, weights_only: bool) -> None:
    old, path = trainer(tmp_path, max_epochs=1), tmp_path / "old.ckpt"
    old.fit(Net(), data())
    old.save_checkpoint(path, weights_only=weights_only)
    ema, net = TrainableEma(), Net()
    run = trainer(tmp_path, ema)
    run.fit(net, data())
    run.optimizers[0].step()
    assert ema.updates == 16  # the training is over
    run.test(net, data(), verbose=False)
    assert torch.equal(net.evaluated[-1], ema.weights["trained.weight"])
    run.test(net, data(), ckpt_path=path, verbose=False)
    assert torch.equal(net.evaluated[-1], old.lightning_module.weight)
    if not weights_only:
        with pytest.warns(UserWarning, match="no averaged weights"):
            trainer(tmp_path, TrainableEma()).test(net, data(), ckpt_path=path, verbose=False)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, TrainableEma(), max_epochs=1)
    run.fit(Net(), data())
    path = tmp_path / "small.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(UserError, match=r"frozen.bias \(2 in all\) is trained, but the checkpoint has no average"):
        thawed = Net(thaw=True)
        thawed.configure_optimizers = lambda: torch.optim.AdamW(thawed.trained.parameters())
        trainer(tmp_path, TrainableEma()).fit(thawed, data(), ckpt_path=path)
    checkpoint = copy.deepcopy(torch.load(path, weights_only=True))
    with pytest.raises(UserError, match=r"trained.weight has shape \(1, 2\), the model's is \(1, 5\)"):
        TrainableEma().on_load_checkpoint(run, Net(width=5), checkpoint)
