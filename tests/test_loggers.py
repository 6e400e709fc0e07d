"""Which logger a run gets, and what an offline W&B run holds when its file is read back."""

import csv
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from datamodules.synthetic import write_pairs
from mmtrain import loggers
from mmtrain.__main__ import main
from mmtrain.loggers import SafeCSVLogger, SafeWandbLogger, default_logger
from mmtrain.reporting.wandb_files import history
from tests.offline_runs import close, read_file
from tests.wandb_server import serve

ARCHITECTURE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


@pytest.fixture(autouse=True)
def no_run_left(monkeypatch) -> Iterator[None]:
    """No process variables, no run and no service left over; W&B sends no error reports."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    close()
    yield
    close()
    os.environ.pop("WANDB_MODE", None)  # Lightning sets it for offline runs


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A run of two steps."""
    monkeypatch.chdir(tmp_path)
    shards = write_pairs(tmp_path / "shards", [7, 9], size=20)
    (tmp_path / "loggers_vit.json").write_text(json.dumps(ARCHITECTURE))
    pictures = {"size": 16, "context_length": 8}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    parts = {
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(tmp_path / "run"),
            **quiet,
        },
        "model": {
            "class_path": "mmtrain.rankclip.module.Clip",
            "init_args": {"architecture": str(tmp_path / "loggers_vit.json"), "optim": {"lr": 2e-3, "warmup_steps": 1}},
        },
        "data": {
            "class_path": "datamodules.image_text.ImageTextDataModule",
            "init_args": {"train": shards, "batch_size": 8, "pictures": pictures},
        },
    }
    path = tmp_path / "tiny_run.yaml"
    path.write_text("# Two steps\n" + yaml.safe_dump(parts))
    return path


def read_back(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Config, history and project of the one offline run in the folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    found = read_file(path)
    return found["config"], found["history"], found["project"]


def of_wandb(warned: list[warnings.WarningMessage]) -> list[str]:
    """The warnings about logging."""
    return [str(w.message) for w in warned if "W&B" in str(w.message) or "Logger" in str(w.message)]


@contextmanager
def all_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield warned


@pytest.fixture
def small_disk(monkeypatch) -> Iterator[Callable[[Path], SimpleNamespace]]:
    """A function that puts a disk of 256 KiB at a folder; its `fill()` and `free()` do that.

    Without the right to mount one, what would meet the full disk is made to fail as it would there.
    """
    mounted: list[Path] = []

    def make(folder: Path) -> SimpleNamespace:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
        if shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0:
            mounted.append(folder)
            return SimpleNamespace(fill=lambda: fill(folder / "filler"), free=(folder / "filler").unlink)
        patch = pytest.MonkeyPatch()
        usage = SimpleNamespace(total=2**18, used=2**18, free=0)

        def pretend() -> None:
            patch.setattr(csv.DictWriter, "writerows", no_space)
            patch.setattr(shutil, "disk_usage", lambda path: usage)

        return SimpleNamespace(fill=pretend, free=patch.undo)

    yield make
    for folder in mounted:
        close()
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"0" * 1024)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WANDB_MODE": "disabled", "WANDB_API_KEY": "a" * 40},
        {"WANDB_MODE": "offline", "LOCAL_RANK": "1"},
        {"WANDB_MODE": "offline", "SLURM_PROCID": "3"},
        {"WANDB_MODE": "offline", "RANK": "8", "LOCAL_RANK": "0"},
        {"WANDB_MODE": "offline", "NODE_RANK": "1"},
    ],
)
def test_csv_without_a_key_and_in_all_processes_but_the_first(variables, tmp_path, monkeypatch) -> None:
    """The last two are the first process of the second machine, under torchrun and under Lightning's launcher."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = default_logger(str(tmp_path), "name")
    assert isinstance(logger, CSVLogger) and wandb.run is None
    assert logger.log_dir == str(tmp_path / "logs" / "version_0") and not (tmp_path / "wandb").exists()


def test_offline_run_holds_config_code_data_counts_and_metrics(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "of its own")
    assert main(["fit", "-c", str(config), "--model.init_args.optim.lr", "1e-3"]) == 0
    close()
    settings, history, project = read_back(tmp_path / "run")
    assert project == "of its own"
    assert settings["model"]["class_path"] == "mmtrain.rankclip.module.Clip"
    optim = settings["model"]["init_args"]["optim"]
    assert (optim["lr"], optim["weight_decay"]) == (1e-3, 0.1), "the resolved config, defaults and options included"
    assert settings["vars"]["name"] == "tiny_run" and settings["data"]["init_args"]["batch_size"] == 8
    assert settings["data_counts"] == {"train": {"samples": 16, "shards": 2}}
    assert set(settings["code"]) >= {"mmtrain", "torch", "lightning"}
    logged = {key: row[key] for row in history for key in row}
    assert logged["data/read"] == 16 and logged["trainer/global_step"] == 2
    assert {"train/loss", "train/tau", "epoch"} <= set(logged)
    assert len([row for row in history if "train/loss" in row]) == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == settings["model"]


@pytest.fixture
def made(monkeypatch) -> list[Any]:
    """The loggers that the command line makes."""
    made: list[Any] = []

    def kept(*arguments: Any) -> Any:
        made.append(default_logger(*arguments))
        return made[-1]

    monkeypatch.setattr("mmtrain.cli.default_logger", kept)
    return made


@pytest.mark.timeout(80)  # W&B by itself waits for 90 s
@pytest.mark.parametrize("status", [None, 401])
def test_without_an_answer_or_with_a_refused_key_the_run_is_logged_offline(
    status, config, made, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(loggers, "SECONDS_TO_CONNECT", 3)
    with serve(status or 200) as server:
        url = server.url if status else f"http://127.0.0.1:{one_free_port()}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        with all_warnings() as warned:
            assert main(["fit", "-c", str(config)]) == 0
        (warning,) = of_wandb(warned)
        assert "logging offline" in warning and ("401" in warning) == (status == 401)
        assert bool(server.queries) == (status == 401)
        (logger,) = made
        assert isinstance(logger, WandbLogger)
        close()
    settings, rows, _ = read_back(tmp_path / "run")
    assert settings["data_counts"]["train"]["samples"] == 16
    assert any(row.get("data/read") == 16 for row in rows)


def test_online_without_a_key_nobody_is_asked_for_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no_settings"))
    monkeypatch.setattr("wandb.sdk.lib.wbauth.prompt.prompt_and_save_api_key", lambda *_, **__: pytest.fail("asked"))
    with pytest.warns(UserWarning, match="no API key is configured.*logging offline"):
        assert default_logger(str(tmp_path / "run"), "name").experiment.settings.mode == "offline"


def test_the_network_may_go_while_a_run_is_logged(tmp_path, monkeypatch) -> None:
    """What was not uploaded within the limit at the end is in the file for `wandb sync`."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(loggers, "SECONDS_TO_FINISH", 1)
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = default_logger(str(tmp_path), "name")
        logger.log_metrics({"train/loss": 2.0}, step=1)
        (run,) = server.runs()
        assert (run["name"], run["jobType"]) == (logger.version, "train")
    with all_warnings() as warned:
        logger.log_metrics({"train/loss": 1.0}, step=2)
        logger.finalize("success")
        path = next(Path(logger.experiment.dir).parent.glob("run-*.wandb"))
        close()
    assert of_wandb(warned) == []
    assert [row["train/loss"] for row in history(path)] == [2.0, 1.0]


KILL_AND_TRAIN = """
import sys
import psutil
from mmtrain.__main__ import main
from mmtrain.callbacks import RandomState

def kill(*_):
    for child in psutil.Process().children(recursive=True):
        if "wandb-core" in " ".join(child.cmdline()):
            child.kill()
            child.wait()
            print("killed", child.pid, file=sys.stderr)

RandomState.on_train_batch_start = kill
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_of_wandb_that_dies_ends_only_the_logging(config, tmp_path) -> None:
    command = [sys.executable, "-c", KILL_AND_TRAIN, "fit", "-c", str(config)]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("killed") == 1 and done.stderr.count("UserWarning: SafeWandbLogger") == 1, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_full_disk_while_training_costs_one_warning(config, made, small_disk, tmp_path, monkeypatch, capfd) -> None:
    """The disk of W&B's files, or of the CSV files, is full from the first step on; the rest of the folder is not."""
    for mode, folder in (("offline", "wandb"), ("disabled", "logs")):
        monkeypatch.setenv("WANDB_MODE", mode)
        root = tmp_path / mode
        disk = small_disk(root / folder)
        monkeypatch.setattr("mmtrain.callbacks.RandomState.on_train_batch_start", lambda *_, disk=disk: disk.fill())
        with all_warnings() as warned:
            assert (
                main(["fit", "-c", str(config), "--trainer.default_root_dir", str(root), "--trainer.max_steps=1"]) == 0
            )
        (warning,) = of_wandb(warned)
        assert "No space left on device" in warning
        assert (root / "checkpoints" / "last.ckpt").exists() and isinstance(made[-1], SafeWandbLogger | SafeCSVLogger)
        made[-1].log_hyperparams({"long": "y" * 10_000})  # W&B's own log writes it down
        with suppress(OSError):  # from closing that log
            wandb.finish()
        disk.free()
        close()
    assert "Logging error" not in capfd.readouterr().err, "a traceback of W&B's own log"
    made[-1].save()
    (path,) = tmp_path.glob("disabled/logs/version_0/metrics.csv")
    rows = list(csv.DictReader(path.open()))
    assert any(row["train/loss"] for row in rows), "kept in memory, and written once there is space"


@pytest.mark.parametrize("name", ["a", "new_column"])
def test_csv_file_stays_whole_on_a_full_disk(name, small_disk, tmp_path) -> None:
    """Lightning empties the file for a new column, and leaves half a row of a column it has."""
    disk = small_disk(tmp_path / "logs")
    logger = SafeCSVLogger(tmp_path, name="logs")
    for step in range(300):
        logger.log_metrics({"a": step / 7, "b": 0.5}, step=step)
    logger.save()
    path = Path(logger.log_dir) / "metrics.csv"
    before = path.read_bytes()
    disk.fill()
    with pytest.warns(UserWarning, match="SafeCSVLogger.*No space left"):
        for step in range(300, 900):
            logger.log_metrics({name: step / 7}, step=step)
        logger.save()
    assert path.read_bytes() == before and [file.name for file in path.parent.glob("metrics*")] == ["metrics.csv"]
    disk.free()
    logger.finalize("success")
    rows = list(csv.DictReader(path.open()))
    assert [int(row["step"]) for row in rows] == list(range(900))
    assert float(rows[899][name]) == 899 / 7 and float(rows[2]["a"]) == 2 / 7 and rows[899]["b"] == ""


def test_test_and_a_resumed_fit_continue_the_same_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        ids = []
        for verb, is_fresh in (("fit", True), ("fit", False), ("test", False), ("fit", True)):
            logger = default_logger(str(tmp_path), "name", verb, is_fresh)
            logger.log_hyperparams({"trainer": {"verb": verb}})
            logger.log_metrics({f"{verb}/value": 1.0}, step=1)
            ids.append(logger.version)
            assert (tmp_path / "wandb_id").read_text().strip() == logger.version
            close()
        assert [run["name"] for run in server.runs()] == ids
        assert len(set(ids[:3])) == 1 and ids[3] != ids[0]
        rows = server.streams[ids[0]]
        configs = [json.loads(v["config"]) for n, v in server.queries if n == "UpsertBucket" and v.get("config")]
    assert {key for row in rows for key in row} >= {"fit/value", "test/value"}
    tested = next(c for c in configs if "test/trainer" in c)
    assert tested["test/trainer"]["value"] == {"verb": "test"} and "trainer" not in tested, "the training's stays"
    assert isinstance(default_logger(str(tmp_path), "name", "validate"), SafeCSVLogger)


def test_a_run_moved_aside_takes_its_id_with_it(config, made, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for more in ([], ["--ckpt_path", "last"], []):
        assert main(["fit", "-c", str(config), *more]) == 0
        close()
    first, resumed, fresh = (logger.version for logger in made)
    assert first == resumed != fresh
    assert (tmp_path / "run.1" / "wandb_id").read_text().strip() == first
    assert (tmp_path / "run" / "wandb_id").read_text().strip() == fresh
