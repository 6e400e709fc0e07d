"""Windows of robot episodes from memory, pictures from disk, and the loader's share of an epoch, on one core.

python -m tests.benchmarks.episodes [--episodes 60] [--frames 340]
The usual way is rebuilt from its description: one window at a time, sliced, padded and made relative in Python. The
store has 25,710 frames like Peeling's; the aim is 50,000 windows a second. Times are of the processor.
"""

import argparse
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import zarr

from datamodules.episode_pictures import PictureArray
from datamodules.episode_writer import EpisodeWriter
from datamodules.episodes import EpisodeStore, window_rows
from datamodules.robot import RobotDataModule, write_demonstrations
from datamodules.robot_windows import RobotWindows
from datamodules.synthetic_episodes import SyntheticDemonstrations
from mmtrain import poses
from mmtrain.normaliser import limits
from mmtrain.rdp.dp import DiffusionPolicy
from mmtrain.rdp.module import LatentDiffusionPolicy
from mmtrain.rdp.normalising import fit_normaliser
from mmtrain.rdp.tokenizer import Tokenizer

BATCH = 64
ROWS = (  # task, touch, method
    ("peel", "force", "rdp"),
    ("wipe", "gelsight", "rdp"),
    ("lift", "gelsight_mctac", "rdp"),
    ("wipe", "force", "dp"),
)


def cpu(work: Callable[..., int], *args: Any) -> float:
    """Things a second; `work` says how many it did."""
    begin = time.process_time()
    count = work(*args)
    return count / (time.process_time() - begin)


def opened(path: Path, task: str, touch: str, method: str) -> RobotDataModule:
    module = RobotDataModule(str(path), task, touch, method, "pose", images=False, batch_size=BATCH, val_ratio=0.0)
    module.setup("fit")
    return module


def gathered(windows: RobotWindows) -> int:
    order = np.random.default_rng(0).permutation(len(windows))
    for start in range(0, len(order) - BATCH, BATCH):
        windows.gather(order[start : start + BATCH])
    return (len(order) - 1) // BATCH * BATCH


def loaded(module: RobotDataModule) -> int:
    return sum(len(batch["action"]) for batch in module.train_dataloader())


def one_by_one(windows: RobotWindows, count: int = 3000) -> int:
    """The same arrays window by window."""
    spec = windows.spec
    rows = window_rows(windows.store.episode_ends, spec.horizon, spec.pad_before, spec.pad_after)
    for row in rows[np.random.default_rng(0).permutation(len(rows))[:count]]:
        cut = {key: padded(values, row, spec.horizon) for key, values in windows.streams.items()}
        action = padded(windows.action, row, spec.horizon)
        base = np.concatenate([cut[f"{side}_robot_tcp_pose"][spec.now] for side in spec.arms])
        if spec.relative:
            poses.relative_action(action, base, spec.pose_dim)
        {key: torch.from_numpy(values) for key, values in cut.items()}
    return count


def padded(values: np.ndarray, row: np.ndarray, horizon: int) -> np.ndarray:
    begin, end, first, last = row
    window = np.zeros((horizon, *values.shape[1:]), dtype=values.dtype)
    window[first:last] = values[begin:end]
    window[:first], window[last:] = values[begin], values[end - 1]
    return window


def report_windows(paths: dict[str, Path]) -> None:
    print(f"{'windows a second':<34}{'gathered':>12}{'by loader':>12}{'one by one':>12}")
    for task, touch, method in ROWS:
        module = opened(paths[task], task, touch, method)
        alone = f"{cpu(one_by_one, module.windows):12,.0f}" if method == "rdp" else f"{'':>12}"
        figures = cpu(gathered, module.windows), cpu(loaded, module)
        print(f"{f'{method} {task} {touch}':<34}" + "".join(f"{figure:12,.0f}" for figure in figures) + alone)


def report_epoch(paths: dict[str, Path], steps: int = 60) -> None:
    """Share of the time of training steps that waits for the loader, with the networks of the `sim` preset."""
    print(f"\n{'an epoch of low-dimensional training':<34}{'loader ms':>12}{'model ms':>12}{'loader %':>12}")
    for name, model, method in (
        ("tokenizer", Tokenizer, "rdp"),
        ("latent diffusion policy", LatentDiffusionPolicy, "rdp"),
        ("diffusion policy", DiffusionPolicy, "dp"),
    ):
        data = opened(paths["wipe"], "wipe", "force", method)
        network = model(task="wipe", touch="force", vision="pose", preset="sim")
        waiting, working, batches = profile(network, data, steps)
        share = waiting / (waiting + working)
        print(f"{name:<34}{1e3 * waiting / batches:12.2f}{1e3 * working / batches:12.2f}{100 * share:12.1f}")


def profile(network: torch.nn.Module, data: RobotDataModule, steps: int) -> tuple[float, float, int]:
    loss_of = prepare(network, data)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad])
    waiting = working = 0.0
    loader = data.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for step in range(steps + 5):
        begin = time.process_time()
        batch = next(batches)
        middle = time.process_time()
        optimizer.zero_grad()
        loss_of(batch).backward()
        optimizer.step()
        if step >= 5:  # warm by now
            waiting, working = waiting + middle - begin, working + time.process_time() - middle
    return waiting, working, steps


def prepare(network: torch.nn.Module, data: RobotDataModule) -> Callable[[dict], torch.Tensor]:
    affines = data.normaliser_affines()
    fit_normaliser(network.normalizer, affines)
    if isinstance(network, Tokenizer):
        return lambda batch: network.losses(batch, sampled=True)[0]
    if isinstance(network, LatentDiffusionPolicy):
        fit_normaliser(network.tokenizer.normalizer, affines)
        latent = network._latent(next(data.training_windows())).detach().flatten(0, 1).numpy()
        network.normalizer.set("latent", limits(latent))
    return network.noise_loss


def report_pictures(folder: Path, count: int = 300, size: tuple[int, int] = (240, 320)) -> None:
    """Reading of frames in the three forms they may have."""
    noise = np.random.default_rng(0).integers(0, 40, (count, *size, 3))
    pixels = (noise + np.linspace(0, 200, size[1])[:, None]).astype(np.uint8)
    print(f"\n{f'pictures of {size[0]} x {size[1]}':<34}{'frames/s':>12}{'kB a frame':>12}")
    forms = {"one-frame chunks": None, "JPEG, quality 90": 90, "100-frame chunks": None}
    for name, quality in forms.items():
        path = folder / f"{name}.zarr"
        EpisodeWriter(path, jpeg_quality=quality).append({"picture": pixels})
        if name.startswith("100"):
            zarr.open_group(path, mode="a").create_array(
                "data/picture", data=pixels, chunks=(100, *size, 3), overwrite=True
            )
        speed = cpu(read_pairs, EpisodeStore(path).pictures("picture"))
        stored = sum(file.stat().st_size for file in (path / "data/picture").glob("[0-9]*")) / count / 1e3
        note = "  (3 chunks, all kept once read)" if name.startswith("100") else ""
        print(f"{name:<34}{speed:12,.0f}{stored:12,.0f}{note}")


def read_pairs(pictures: PictureArray) -> int:
    order = np.random.default_rng(1).permutation(len(pictures))
    for start in range(0, len(order), 2):
        pictures.read(order[start : start + 2])
    return len(order)


def report_opening(path: Path) -> None:
    group, count = zarr.open_group(path, mode="a"), EpisodeStore(path).num_frames
    for camera in ("left_wrist_img", "external_img"):  # their chunks need not be there: opening reads none
        group.create_array(f"data/{camera}", shape=(count, 240, 320, 3), chunks=(1, 240, 320, 3), dtype="uint8")
    begin = time.perf_counter()
    module = RobotDataModule(str(path), "peel", "force", val_ratio=0.0)
    module.setup("fit")
    opening = time.perf_counter() - begin
    module.normaliser_affines()
    fitting = time.perf_counter() - begin - opening
    print(f"\na store of {count:,} frames with two cameras ({count * 2 * 0.2304:,.0f} MB of pixels)")
    print(f"opened in {opening:.2f} s, normalisers fitted in {fitting:.2f} s")


def report(episodes: int, frames: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        paths = {task: Path(name) / f"{task}.zarr" for task in ("peel", "wipe", "lift")}
        for task, path in paths.items():
            write_demonstrations(path, SyntheticDemonstrations(task, episodes, frames))
        report_windows(paths)
        report_epoch(paths)
        report_pictures(Path(name))
        report_opening(paths["peel"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=60)
    parser.add_argument("--frames", type=int, default=340, help="of the shortest; each next episode has 3 more")
    report(**vars(parser.parse_args()))
