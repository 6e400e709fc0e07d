"""Runs a small training undisturbed, then again and again with kill -9 at random moments and a resume; prints JSON.

One warm process imports everything and forks a child for each run, which makes a start cost a moment.
Usage: python -m tests.resume_driver FOLDER --kills 20 --workers 2 --processes 2 --seed 0
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

import mmtrain.cli
import mmtrain.rankclip.module  # noqa: F401
from datamodules.synthetic import write_pairs
from mmtrain.__main__ import main

ARCHITECTURE = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_config(folder: Path, workers: int, processes: int, accumulate: int) -> Path:
    """A RankCLIP run of 3 epochs of 12 batches with random crops and patch dropout, saved every 3 steps."""
    shards = write_pairs(folder / "shards", [60, 37], size=40)
    (folder / "resume_vit.json").write_text(json.dumps(ARCHITECTURE))
    config = {
        "trainer": {
            "max_epochs": 3,
            "accumulate_grad_batches": accumulate,
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "mmtrain.rankclip.module.RankClip",
            "init_args": {"architecture": str(folder / "resume_vit.json"), "optim": {"lr": 1e-3, "warmup_steps": 5}},
        },
        "data": {
            "class_path": "datamodules.image_text.ImageTextDataModule",
            "init_args": {
                "train": shards,
                "batch_size": 8,
                "num_workers": workers,
                "pictures": {"size": 32, "crop_scale": [0.5, 1.0], "flip": 0.5, "context_length": 8},
                "evaluate": {"self": {"path": shards, "captions": "txt"}},
            },
        },
    }
    path = folder / "resume.yaml"
    path.write_text("# Small run to be killed\n" + yaml.safe_dump(config))
    return path


def start(config: Path, folder: Path, resume: bool, processes: int, log: Path) -> list[int]:
    """Fork the processes of one run; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [_fork(config, folder, resume, processes, rank, port, log) for rank in range(processes)]


def _fork(config: Path, folder: Path, resume: bool, processes: int, rank: int, port: int, log: Path) -> int:
    if child := os.fork():
        return child
    os.setpgid(0, 0)  # a group of its own, so that a kill takes the loader's workers too
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if processes > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= address | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(processes)}
    argv = ["fit", "-c", str(config), "--trainer.default_root_dir", str(folder)]
    argv += ["--vars.checkpoint_steps", "3"]
    code = 1
    try:
        code = main(argv + (["--ckpt_path", "last"] if resume else []))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(children: list[int], seconds: float, until: Callable[[], bool] = lambda: False) -> list[int] | None:
    """Exit codes of the children, or None if they still run after `seconds` or when `until()` becomes true."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or until():
            return None
        time.sleep(0.002)
    return [codes[c] for c in children]


class Versions:
    """Counts how often a checkpoint was replaced, so that a kill can be aimed at any part of a run on any machine."""

    def __init__(self, path: Path, ignore_first: bool) -> None:
        self.path, self.seen, self.ignored = path, set(), 0
        self.ignored = self() if ignore_first else 0

    def __call__(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            self.seen.add((status.st_ino, status.st_mtime_ns))
        return len(self.seen) - self.ignored


def send(children: list[int], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, number)


def final_state(folder: Path) -> dict:
    """What must be equal at the end: weights, optimizer, schedule, place in the data."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    keep = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    place = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    return {k: checkpoint[k] for k in keep} | {"place": (place["epoch"], place["position"])}


def equal(a: object, b: object) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def experiment(root: Path, kills: int, workers: int, processes: int, seed: int, number: int, accumulate: int) -> dict:
    """One undisturbed run, then runs that are killed twice each until there were `kills` kills."""
    torch.set_num_threads(1)
    config = write_config(root, workers, processes, accumulate)
    codes = wait(start(config, root / "calm", False, processes, root / "calm.log"), 120)
    assert codes == [0] * processes, (codes, (root / "calm.log").read_text()[-3000:])
    calm = final_state(root / "calm")
    generator = random.Random(seed)
    runs = [killed_run(root / f"killed{i}", config, processes, generator, number, calm) for i in range(kills // 2)]
    return {"steps": calm["global_step"], "runs": runs}


def killed_run(folder: Path, config: Path, processes: int, generator: random.Random, number: int, calm: dict) -> dict:
    """A run with two kills at random moments, then left in peace; says what it saw."""
    log, kills, expected = folder.with_suffix(".log"), [], 0
    for attempt in range(2):
        children = start(config, folder, attempt > 0, processes, log)
        # aimed at a checkpoint, then anywhere between it and the next; 0 is while the run starts
        versions, wanted = Versions(folder / "checkpoints" / "last.ckpt", attempt > 0), generator.randrange(7)
        early = wait(children, 60, lambda v=versions, w=wanted: v() >= w)
        early = early or wait(children, generator.random() * (0.3 if wanted else 2.0))
        send(children, number)
        codes = early or wait(children, 60)
        exists = (folder / "checkpoints" / "last.ckpt").exists()
        expected += exists
        kills.append({"codes": codes, "saved_step": final_state(folder)["global_step"] if exists else 0})
    again = wait(start(config, folder, True, processes, log), 120)
    # Lightning says so; a run that began anew would end in the same weights, and prove nothing
    restored = log.read_text().count("Restored all states from the checkpoint")
    ok = again == [0] * processes and restored >= expected - 1 + (expected == 1) and equal(final_state(folder), calm)
    row = {"kills": kills, "resumed": again, "restored": restored, "equal": ok}
    return row if ok else row | {"log": log.read_text()[-2000:]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, default in (
        ("kills", 4),
        ("workers", 0),
        ("processes", 1),
        ("seed", 0),
        ("signal", signal.SIGKILL),
        ("accumulate", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=int(default))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = (options.kills, options.workers, options.processes, options.seed, options.signal, options.accumulate)
    print(json.dumps(experiment(options.folder, *chosen)))
