"""Small writers of the formats that we read, for tests, demos and benchmarks: pictures of coloured shapes."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from torchvision.io import encode_jpeg

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ("square", "circle", "bar", "cross")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def picture(label: int, seed: int, size: int = 64) -> np.ndarray:
    """A shape of class `label` (see `CLASSES`) at a seeded place on a noisy ground, uint8 [size, size, 3]."""
    generator = np.random.default_rng((label, seed))
    pixels = generator.integers(100, 156, (size, size, 3)).astype(np.uint8)
    radius = size // 4
    y0, x0 = generator.integers(radius, size - radius, 2)
    y, x = np.ogrid[:size, :size]
    dy, dx = abs(y - y0), abs(x - x0)
    shape = SHAPES[label % len(SHAPES)]
    mask = {
        "square": (dy < radius) & (dx < radius),
        "circle": dy**2 + dx**2 < radius**2,
        "bar": (dy < radius) & (dx < radius // 3),
        "cross": ((dy < radius // 3) & (dx < radius)) | ((dx < radius // 3) & (dy < radius)),
    }[shape]
    pixels[mask] = list(COLOURS.values())[label // len(SHAPES)]
    return pixels


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """Encode uint8 [H, W, 3]."""
    return encode_jpeg(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), quality).numpy().tobytes()


def pairs(count: int, size: int = 64, start: int = 0) -> Iterator[dict[str, bytes | str]]:
    """Samples in the layout of img2dataset: jpg, txt, json (with captions and label) under a 9-digit key."""
    for i in range(start, start + count):
        name = CLASSES[i % len(CLASSES)]
        about = {"key": f"{i:09d}", "caption": f"a {name}", "captions": [f"a {name}", name], "label": i % len(CLASSES)}
        yield {
            "__key__": f"{i:09d}",
            "jpg": jpeg(picture(i % len(CLASSES), i, size)),
            "txt": f"a {name}",
            "json": json.dumps(about),
        }


def write_shard(path: Path, samples: Iterable[dict[str, bytes | str]], stats: bool = True) -> Path:
    """One tar, and img2dataset's `_stats.json` beside it."""
    count = 0
    with open(path, "wb") as file, wds.TarWriter(file) as writer:
        for sample in samples:
            writer.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})
            count += 1
    if stats:
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": count, "successes": count}))
    return path


def write_pairs(folder: Path, counts: Iterable[int], size: int = 64) -> list[str]:
    """One shard for each count, `00000.tar` and so on; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, start = [], 0
    for number, count in enumerate(counts):
        paths.append(str(write_shard(folder / f"{number:05d}.tar", pairs(count, size, start))))
        start += count
    return paths
