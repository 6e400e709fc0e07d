"""FSDP2 trains what DDP trains, each goes on with the other's checkpoints; compiled blocks do what plain ones do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.parallel import Compile, FullySharded, blocks_of
from mmtrain.rdp.tokenizer import Tokenizer
from mmtrain.storyweaver.dreambooth import DreamBooth
from tests.small_trainings import write_training

ROOT = Path(__file__).parents[1]
# Adam divides by the size of gradients: with the usual eps, rounding in those that are zero becomes whole steps
USUAL = ("--trainer.max_epochs", "-1", "--model.optim.eps", "1e-4")
DDP, FSDP = ("--trainer.strategy", "ddp"), ("-c", str(ROOT / "configs" / "fsdp.yaml"))
TENSORS = ("state_dict", "optimizer_states", "ema")


class Runs:
    """Trainings of one config that are started together, by name of their folder."""

    def __init__(self, root: Path, training: str, *words: str) -> None:
        self.root, self.config, self.words = root, write_training(root, training), (*USUAL, *words)
        self.asked: list[dict[str, Any]] = []
        self.results: dict[str, dict[str, Any]] = {}

    def layer(self, class_path: str, **init_args: Any) -> tuple[str, str]:
        """Words that add a callback."""
        path = self.root / f"{class_path.rpartition('.')[2]}.yaml"
        path.write_text(
            yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": class_path, "init_args": init_args}]}})
        )
        return "-c", str(path)

    def ask(self, name: str, *words: str, processes: int = 2, into: str | None = None) -> None:
        """A run called by its name; it goes on in another's folder where one is given."""
        folder = self.root / (into or name)
        given = ["-c", str(self.config), *self.words, "--trainer.default_root_dir", str(folder), *words]
        self.asked.append({"words": given, "processes": processes, "log": str(self.root / f"{name}.log")})

    def go(self) -> "Runs":
        """Run all that was asked for."""
        (self.root / "runs.json").write_text(json.dumps(self.asked))
        command = [sys.executable, "-m", "tests.parallel_driver", str(self.root / "runs.json")]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        for one, line in zip(self.asked, done.stdout.splitlines(), strict=True):
            self.results[Path(one["log"]).stem] = json.loads(line)
        return self

    def checkpoint(self, name: str, folder: str | None = None) -> dict[str, Any]:
        """The last checkpoint of a run that came to its end."""
        assert not any(self.results[name]["codes"]), self.log(name)[-3000:]
        return torch.load(self.root / (folder or name) / "checkpoints" / "last.ckpt", weights_only=True)

    def resumed(self, first: str, second: str, folder: str | None = None) -> dict[str, Any]:
        """The last checkpoint after a run that was stopped and another that went on with it, in its folder."""
        assert sorted(self.results[first]["codes"]) == [0, 138], self.log(first)[-3000:]  # the first process speaks
        assert "Restored all states from the checkpoint" in self.log(second)
        return self.checkpoint(second, folder or first)

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    """Keys, shapes, settings; weights, averages and the optimizer's state to so much, absolute and relative."""
    assert a.keys() == b.keys() and a["settings"] == b["settings"]
    for key in TENSORS:
        compare(a.get(key), b.get(key), tolerance, key)


def compare(a: Any, b: Any, tolerance: float, where: str) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.shape == b.shape, where
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("foreach", "fused"):
                compare(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            compare(one, other, tolerance, f"{where}.{i}")
    else:
        assert a == b, where


def test_sharded_training_is_ddps_and_goes_on_either_way(tmp_path: Path) -> None:
    """RankCLIP, whose temperature has no rows to be shared, with accumulated, clipped gradients and an average."""
    words = ("--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5", "--trainer.max_steps", "5")
    runs = Runs(tmp_path, "rankclip", *words, "--trainer.gradient_clip_algorithm", "norm")
    average, stop = runs.layer("mmtrain.ema.TrainableEma"), runs.layer("tests.parallel_driver.StopAt", step=3)
    runs.ask("ddp", *DDP, *average)
    runs.ask("fsdp", *FSDP, *average)
    runs.ask("stopped", *FSDP, *average, *stop)
    runs.ask("by_ddp", *DDP, *average, "--ckpt_path", str(tmp_path / "stopped" / "checkpoints" / "last.ckpt"))
    runs.ask("by_fsdp", *FSDP, *average, "--ckpt_path", "last", into="stopped")
    runs.go()
    ddp, fsdp = runs.checkpoint("ddp"), runs.checkpoint("fsdp")
    assert ddp["ema_updates"] == 5 and ddp["ema"]["network.logit_scale"].shape == ()
    assert_same(ddp, fsdp, 1e-5)
    assert_same(ddp, runs.resumed("stopped", "by_ddp", folder="by_ddp"), 1e-5)
    assert_same(fsdp, runs.resumed("stopped", "by_fsdp"), 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("training", "words", "tolerance"),
    [
        ("rankclip", ("--model", "mmtrain.rankclip.module.Clip"), 1e-5),
        ("rankclip", ("--model.micro_batch", "3", "--trainer.gradient_clip_algorithm", "value"), 1e-5),
        ("rankclip", ("--trainer.precision", "bf16-mixed"), 1e-5),
        # so narrow, the network turns rounding into other gradients within a few steps of the usual size
        ("cavp", ("--model.optim.lr", "1e-5"), 1e-5),
        ("cavp", ("--model.optim.lr", "1e-5", "--model.gradient_checkpointing", "true"), 1e-5),
        ("ldm", (), 1e-5),
        # bfloat16 has 8 bits, and convolutions may be summed in another order
        ("ldm", ("--trainer.precision", "bf16-mixed", "--model.network.gradient_checkpointing", "true"), 5e-4),
        ("latent_policy", ("--trainer.accumulate_grad_batches", "2"), 1e-5),
        ("storyweaver", (), 1e-5),
        ("storyweaver", ("--model.trains", "full", "--model.gradient_checkpointing", "true"), 1e-5),
    ],
)
def test_every_papers_training_is_the_same_sharded(
    tmp_path: Path, training: str, words: tuple[str, ...], tolerance: float
) -> None:
    """And goes on with DDP's checkpoint; with compiled blocks too."""
    runs = Runs(tmp_path, training, "--trainer.max_steps", "5", *words)
    compiled = runs.layer("mmtrain.parallel.Compile", backend="aot_eager")
    runs.ask("ddp", *DDP)
    runs.ask("fsdp", *FSDP)
    runs.ask("stopped", *DDP, *runs.layer("tests.parallel_driver.StopAt", step=3))
    runs.ask("resumed", *FSDP, "--ckpt_path", "last", into="stopped")
    runs.ask("compiled", *FSDP, *compiled)
    runs.go()
    ddp = runs.checkpoint("ddp")
    assert_same(ddp, runs.checkpoint("fsdp"), tolerance)
    assert_same(ddp, runs.resumed("stopped", "resumed"), tolerance)
    assert_same(ddp, runs.checkpoint("compiled"), tolerance)
    assert min(runs.results["compiled"]["graphs"]) > 0


class Tower(pl.LightningModule):
    """Blocks of ten widths: more versions of one function than torch.compile makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        widths = range(4, 15)
        self.steps = nn.Sequential(*(nn.Sequential(nn.Linear(a, a + 1), nn.Tanh()) for a in widths))

    def blocks(self) -> list[nn.Module]:
        return [*self.steps, self.steps[0][0]]


def test_compiling_changes_neither_names_nor_numbers() -> None:
    torch.manual_seed(0)
    plain, compiled = Tower(), Tower()
    compiled.load_state_dict(plain.state_dict())
    callback = Compile(backend="aot_eager")
    callback.setup(None, compiled, "test")
    assert compiled.steps[0]._compiled_call_impl is None  # only what is trained
    callback.setup(None, compiled, "fit")
    assert list(compiled.state_dict()) == list(plain.state_dict()) and compiled.steps[0][0]._compiled_call_impl is None
    torch._dynamo.utils.counters.clear()
    x = torch.randn(3, 4)
    for module in (plain, compiled):
        module.steps(x).square().sum().backward()
    callback.on_validation_start()
    compiled.steps(torch.randn(7, 4))  # another size of batch: not worth another version
    callback.on_validation_end()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 11
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_refuses_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match="Tokenizer has no blocks"):
        blocks_of(Tokenizer("wipe", "force", preset="sim"), "FullySharded")
    assert DreamBooth.blocks is None
    with pytest.raises(UserError, match=r"backend: 'inductr' is not one of .*inductor"):
        Compile(backend="inductr")
    with pytest.raises(UserError, match=r"mode: 'fast', expected one of .*max-autotune"):
        Compile(mode="fast")
    with pytest.raises(ValueError, match=r"does not support .*16-mixed"):
        pl.Trainer(strategy=FullySharded(), accelerator="cpu", devices=2, precision="16-mixed")
