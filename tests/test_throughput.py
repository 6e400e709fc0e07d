"""The throughput monitor: what it says of a training whose times are known, and that it leaves the training alone."""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules import loading
from datamodules.loading import Draw, TrainLoader
from mmtrain import throughput
from mmtrain.config_errors import UserError
from mmtrain.gpus import DEVICE_NAMES, GPUS, gpu_of
from mmtrain.throughput import Batch, Throughput, advice, closing_line, cores, times_of


@dataclass
class Clock:
    """Seconds that pass only when a test says so."""

    seconds: float = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    monotonic = perf_counter


class Rows(torch.utils.data.Dataset):
    """Loading a batch takes so many seconds of the clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, draws: list[Draw]) -> dict[str, Any]:
        self.clock.seconds += self.seconds
        return {"x": torch.stack([torch.full((6,), draw.sample / 1024) for draw in draws]), "skipped": {}}


class Net(pl.LightningModule):
    """A step takes so many seconds of the clock, every tenth ten times as many. Draws random numbers."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.clock.seconds += self.seconds * (10 if batch_idx % 10 == 9 else 1)
        return (self.body(batch["x"]) + torch.randn(2)).square().mean()

    def validation_step(self, *_: Any) -> None:
        self.clock.seconds += 1000.0  # must not count

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@dataclass
class Logged(DummyLogger):
    lines: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(name.startswith("throughput/") for name in metrics):
            self.lines.append((step, {name.removeprefix("throughput/"): v for name, v in metrics.items()}))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loading, "time", clock)
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr(throughput, "host_memory", lambda: 1.5)
    return clock


def train(
    clock: Clock, load: float, work: float, *callbacks: pl.Callback, module: Net | None = None, **options: Any
) -> tuple[Net, Logged]:
    """40 batches of 8."""
    module, logged = module or Net(clock, work), Logged()
    options = {"max_steps": 40, "log_every_n_steps": 10, "limit_val_batches": 0} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logged,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **options,
    )
    loader = TrainLoader(Rows(clock, load), 8)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(many workers|validation_step|val_dataloader|log_every).*")
        trainer.fit(
            module, loader, torch.utils.data.DataLoader(torch.zeros(2)) if options["limit_val_batches"] else None
        )
    return module, logged


# ------------------------------------------------------------------------------------------------------------- numbers


def test_a_training_of_known_times(clock, caplog) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    _, logged = train(clock, 0.1, 0.3, Throughput(), limit_val_batches=1, val_check_interval=5)
    # the first step warms up; steps 2 to 11 are nine of 0.4 s and one of 3.1 s
    assert [step for step, _ in logged.lines] == [11, 21, 31, 40]
    first = logged.lines[0][1]
    assert first == {
        "samples_per_second": pytest.approx(8 * 10 / 6.7),
        "step_seconds_p50": pytest.approx(0.4),
        "step_seconds_p90": pytest.approx(0.67),
        "step_seconds_p99": pytest.approx(2.857),
        "data_wait_seconds": pytest.approx(0.1),
        "data_wait_share": pytest.approx(1 / 6.7),
        "memory_gib": 1.5,
    }
    closing = [record.message for record in caplog.records if record.message.startswith("throughput:")]
    assert closing == [
        "throughput: 11.82 samples/s, a step 0.4 s (90 %: 0.94 s, 99 %: 3.1 s), 15% waiting for data, memory 1.5 GiB"
    ]


def test_steps_of_several_batches(clock) -> None:
    _, logged = train(clock, 0.1, 0.3, Throughput(), max_steps=10, accumulate_grad_batches=4, log_every_n_steps=9)
    ((step, found),) = logged.lines
    assert step == 10 and found["step_seconds_p50"] == pytest.approx(4 * 0.4)
    assert found["data_wait_seconds"] == pytest.approx(0.4)
    assert found["samples_per_second"] == pytest.approx(36 * 8 / (36 * 0.4 + 4 * 2.7))


@dataclass
class Event:
    """What `torch.cuda.Event` is to the monitor; time in seconds."""

    at: float

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.at - self.at)


@pytest.mark.parametrize(
    ("waited", "idle", "expected"),
    [
        (0.2, 0.2, 0.2),  # the GPU had nothing to do while the loader worked
        (0.2, 0.01, 0.01),  # it was still at work on the batch before
        (0.0, 30.0, 0.0),  # it stood still for an evaluation
    ],
)
def test_a_gpu_waits_for_data_only_while_it_has_nothing_else_to_do(waited, idle, expected) -> None:
    waiting, work = times_of(Batch(Event(1.0), Event(1.0 + idle), Event(1.5 + idle), waited))
    assert (waiting, work) == (pytest.approx(expected), pytest.approx(0.5))


def test_flops_are_those_that_torch_counts(clock, monkeypatch) -> None:
    module = Net(clock, 0.5)
    x = torch.rand(8, 6)
    with FlopCounterMode(display=False) as counter:
        module.training_step({"x": x}, 0).backward()
    expected = counter.get_total_flops()
    assert expected == 2 * 8 * (6 * 5 + 5 * 2) * 2 + 2 * 8 * 5 * 2  # forward, weights' gradients, one input's gradient
    module.zero_grad()
    callback = Throughput(peak_tflops=1e-9)
    _, logged = train(clock, 0.0, 0.5, callback, module=module, max_steps=9, log_every_n_steps=8)
    assert callback._flops == expected and not callback._counter.is_on
    assert logged.lines[0][1]["mfu"] == pytest.approx(expected / 0.5 / 1e3)
    _, logged = train(clock, 0.0, 0.5, Throughput(peak_tflops=1e-9, flops=100.0), max_steps=9, log_every_n_steps=8)
    assert logged.lines[0][1]["mfu"] == pytest.approx(0.2)


def test_memory_is_that_of_the_process_and_its_children() -> None:
    psutil = pytest.importorskip("psutil")
    this = psutil.Process()
    own = this.memory_info().rss / 2**30
    children = sum(child.memory_info().rss for child in this.children(recursive=True)) / 2**30  # of other tests
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("no /proc")
    ballast = torch.ones(2**26)  # 256 MiB
    found = throughput.host_memory()
    assert own * 0.3 + 0.25 < found < (own + children) * 1.1 + 0.3
    del ballast


# ------------------------------------------------------------------------------------------------ a training left alone


@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_the_same_bit_for_bit_with_and_without(clock, compiled) -> None:
    ends = []
    for callbacks in ([], [Throughput(peak_tflops=1.0)]):
        module = Net(clock, 0.1)
        if compiled:  # counting would run it uncompiled, with other random numbers
            module.body.compile(backend="aot_eager")
        train(clock, 0.1, 0.1, *callbacks, module=module, max_steps=6, log_every_n_steps=2)
        ends.append([*module.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert (callbacks[0]._flops is None) == compiled


def test_counting_ends_with_a_step_that_fails(clock) -> None:
    module, callback = Net(clock, 0.1), Throughput(peak_tflops=1.0)
    module.training_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(clock, 0.1, 0.1, callback, module=module)
    with FlopCounterMode(display=False) as counter:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.get_total_flops() == 16 and callback._counter.total == 0 and not callback._counter.is_on


# ------------------------------------------------------------------------------------------------------------- warnings


def bottlenecks(clock: Clock, load: float, work: float, callback: Throughput) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(clock, load, work, callback)
    return [str(w.message) for w in caught if "bottleneck" in str(w.message)]


def test_a_slow_loader_is_told_once_with_what_to_change(clock, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    (told,) = bottlenecks(clock, 3.8, 0.2, Throughput(warn_steps=10))
    assert told == (
        "the loader is the bottleneck: of the last 10 steps of 4.18 s, 91% was waiting for data. Ask for 11 cores for "
        "a process (8 now) with --data.num_workers 10, or make samples cheaper: smaller pictures"
    )
    assert bottlenecks(clock, 0.05, 0.3, Throughput(warn_steps=10)) == []
    assert bottlenecks(clock, 0.05, 0.3, Throughput(warn_steps=10, warn_above=0.05)) != []
    assert bottlenecks(clock, 3.8, 0.2, Throughput(warn_steps=1000)) == []


def test_advice_knows_workers_cores_and_cache() -> None:
    cached = type("Data", (), {"cache": False})()
    assert advice(0.5, 4, 16).startswith("Set --data.num_workers 8 (4 now, 16 cores for a process)")
    assert advice(0.3, 0, 2, cached).startswith("Set --data.num_workers 1 (0 now, 2 cores")
    assert "cheaper: --data.cache true, smaller pictures" in advice(0.3, 0, 2, cached)
    assert advice(0.75, 2, 8).startswith("Ask for 9 cores for a process (8 now) with --data.num_workers 8")
    assert "num_workers 99" in advice(1.0, 0, 200)


def test_cores_are_those_that_slurm_grants_or_a_share_of_the_host(monkeypatch) -> None:
    run = type("Run", (), {"num_devices": 2})()
    monkeypatch.setattr(throughput.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert cores(run) == 6
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    assert cores(run) == 5


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"warn_above 0 must be in \(0, 1\]"):
        Throughput(warn_above=0)


# ------------------------------------------------------------------------------------------------------ more processes


def test_the_process_that_waits_longest_is_the_one_that_counts(clock, monkeypatch) -> None:
    other = torch.tensor([[20.0, 1.0, 0.0]])  # it waited 20 s in 10 steps, and has less memory
    monkeypatch.setattr(throughput.distributed, "gather_rows", lambda own: torch.cat([own, other]))
    _, logged = train(clock, 0.1, 2.9, Throughput(), max_steps=9, log_every_n_steps=8)
    found = logged.lines[0][1]
    assert found["data_wait_seconds"] == pytest.approx(20 / 8) and found["memory_gib"] == 1.5
    assert found["data_wait_share"] == pytest.approx(20 / 24) and found["step_seconds_p50"] == pytest.approx(3.0)


def test_samples_are_those_of_all_processes() -> None:
    loader = TrainLoader(Rows(Clock(), 0.0), 8, rank=1, world_size=4)
    assert (loader.batch_size, len(next(iter(loader))["x"]), loader.num_workers) == (8, 2, 0)


# --------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("device", "name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165),
        ("Tesla V100-SXM2-32GB", "v100", None),
    ],
)
def test_gpus_are_known_by_what_drivers_call_them(device, name, peak) -> None:
    gpu = gpu_of(device)
    assert (gpu.name, gpu.peak("bf16-mixed")) == (name, peak)
    assert gpu.peak("32-true") == gpu.fp32 and gpu.peak("32-true", tf32=True) == (gpu.tf32 or gpu.fp32)
    assert gpu.peak("64-true") is None


def test_the_gpu_table_is_sound() -> None:
    assert {name for _, name in DEVICE_NAMES} == set(GPUS) - {"cpu"}
    for gpu in GPUS.values():
        assert gpu.fp16 >= (gpu.tf32 or 0) and gpu.fp16 >= gpu.fp32 * 0.99 and gpu.source and gpu.memory > 0
    assert [gpu_of(name) for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "AMD Radeon")] == [None] * 3


def test_the_closing_line_names_gpu_figures() -> None:
    found = {f"step_seconds_p{p}": 0.1 for p in (50, 90, 99)} | {"data_wait_share": 0.0}
    line = closing_line(found | {"gpu_memory_gib": 41.25, "mfu": 0.4321})
    assert re.search(r"0% waiting for data, GPU memory 41.2 GiB, 43.2% of the peak FLOP/s$", line)
