"""Which logger a run gets, and what an offline W&B run holds when its file is read back."""

import json
import os
import socket
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from wandb.proto.wandb_internal_pb2 import Record

from datamodules.synthetic import write_pairs
from mmtrain import loggers
from mmtrain.__main__ import main
from mmtrain.loggers import default_logger

ARCHITECTURE = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def close() -> None:
    """End the run and wait until everything is on disk; `finish` alone returns before."""
    wandb.finish()
    wandb.teardown()


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


def records(path: Path) -> Iterator[Record]:
    """Read a .wandb file: a 7-byte header, then blocks of 32 KiB with pieces of records [crc, length, type]."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if kind not in (1, 2, 3, 4):
            return
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last piece
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_back(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Config, history and project of the one offline run in the folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    settings: dict[str, Any] = {}
    history, project = [], ""
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, ())
        settings |= {item.key: json.loads(item.value_json) for item in updates}
        if kind == "run":
            project = record.run.project or project
        if kind == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return settings, history, project


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


@pytest.mark.timeout(80)  # W&B by itself waits for 90 s
def test_without_an_answer_the_run_is_logged_offline(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{one_free_port()}")
    monkeypatch.setattr(loggers, "SECONDS_TO_CONNECT", 3)
    made: list[WandbLogger] = []

    def kept(*arguments: str) -> WandbLogger:
        made.append(default_logger(*arguments))
        return made[0]

    monkeypatch.setattr("mmtrain.cli.default_logger", kept)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(["fit", "-c", str(config)]) == 0
    assert [str(w.message).count("logging offline") for w in warned if "W&B" in str(w.message)] == [1]
    (logger,) = made
    assert isinstance(logger, WandbLogger)
    close()
    settings, history, _ = read_back(tmp_path / "run")
    assert settings["data_counts"]["train"]["samples"] == 16
    assert any(row.get("data/read") == 16 for row in history)
