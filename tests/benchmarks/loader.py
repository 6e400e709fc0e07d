"""512-px JPEG shards to 224-px batches on one core: our loader and the usual PIL float chain over WebDataset.

python -m tests.benchmarks.loader [--count 600]
The usual chain is built the way open_clip builds it: tar stream, PIL decode, bicubic resize, centre crop, float tensor,
normalise, tokenise, collate. Prints samples per second and how near the pixels are (PSNR of uint8 values).
"""

import argparse
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import webdataset as wds

from datamodules.image_text import ImageTextDataset
from datamodules.loading import EvaluationLoader
from datamodules.pictures import Pictures
from datamodules.sources import ShardSource
from datamodules.synthetic import jpeg, write_shard
from tests.benchmarks.measure import measure

SIZE, BATCH = 224, 50


def photograph(seed: int, side: int = 512) -> np.ndarray:
    """Noise with the falling spectrum of photographs, uint8 [side, side, 3]."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
    shape = (3, *frequency.shape)
    spectrum = generator.standard_normal(shape) + 1j * generator.standard_normal(shape)
    spectrum /= frequency**1.2
    pixels = np.fft.irfft2(spectrum, s=(side, side))
    pixels = 127 + 50 * (pixels - pixels.mean((1, 2), keepdims=True)) / pixels.std((1, 2), keepdims=True)
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def write(folder: Path, count: int) -> str:
    pictures = [jpeg(photograph(seed), 90) for seed in range(20)]
    samples = (
        {"__key__": f"{i:09d}", "jpg": pictures[i % 20], "txt": f"a photograph number {i}"} for i in range(count)
    )
    return str(write_shard(folder / "00000.tar", samples))


def ours(shard: str) -> Callable[[], torch.Tensor]:
    torch.set_num_threads(1)
    source = ShardSource(shard)

    def run() -> torch.Tensor:
        loader = EvaluationLoader(ImageTextDataset(source, Pictures(SIZE, crop_scale=None), training=False), BATCH)
        return torch.cat([batch["image"][:2] for batch in loader])

    return run


def usual(shard: str) -> Callable[[], torch.Tensor]:
    torch.set_num_threads(1)
    wds.utils.enforce_security = False  # WebDataset opens no local file otherwise
    transform = open_clip.image_transform(SIZE, is_train=False)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")

    def run() -> torch.Tensor:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList([shard]),
            wds.tarfile_to_samples(),
            wds.decode("pilrgb"),
            wds.rename(image="jpg", text="txt"),
            wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH),
        )
        return torch.cat([images[:2] for images, _ in pipeline])

    return run


def bytes_of(normalised: torch.Tensor) -> torch.Tensor:
    mean, deviation = (
        torch.tensor(c).view(3, 1, 1) for c in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return (normalised * deviation + mean) * 255


def report(count: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        shard = write(Path(folder), count)
        speeds = {}
        for name, work in (("usual PIL float chain", usual), ("ours", ours)):
            seconds, _ = measure(work, shard, repeats=3)
            speeds[name] = count / seconds
        for name, speed in speeds.items():
            print(f"{name:<22} {speed:7.0f} samples/s   {speed / speeds['usual PIL float chain']:.2f} x")
        mine, theirs = ours(shard)(), bytes_of(usual(shard)())
        error = F.mse_loss(mine.float(), theirs).item()
        print(f"same pixels: PSNR {10 * math.log10(255**2 / error):.1f} dB over {len(mine)} pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=600)
    report(parser.parse_args().count)
