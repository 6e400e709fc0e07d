"""Recall of 25,000 texts against 5,000 images on two threads: ours in blocks, and the full matrix, argsorted.

python -m tests.benchmarks.retrieval [--images 5000] [--captions 5] [--width 512] [--repeats 2]
The full-matrix version is the usual one: float32 scores of all pairs, each direction sorted whole, best rank read off.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.metrics.retrieval import recall_at_k
from tests.benchmarks.measure import measure

KS = (1, 5, 10)
THREADS = 2


def features(images: int, captions: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    text_image = torch.arange(images * captions) // captions
    image = torch.randn(images, width, generator=generator)
    text = 0.2 * image[text_image] + torch.randn(len(text_image), width, generator=generator)
    return F.normalize(image, dim=1), F.normalize(text, dim=1), text_image


def ours(images: int, captions: int, width: int) -> Callable[[], dict[str, Tensor]]:
    inputs = features(images, captions, width)
    return lambda: recall_at_k(*inputs, KS)


def full_matrix(images: int, captions: int, width: int) -> Callable[[], dict[str, Tensor]]:
    image, text, text_image = features(images, captions, width)

    def best_ranks(scores: Tensor, query_image: Tensor, candidate_image: Tensor) -> Tensor:
        order = scores.argsort(dim=1, descending=True)
        return 1 + (candidate_image[order] == query_image[:, None]).byte().argmax(dim=1)

    def run() -> dict[str, Tensor]:
        scores = image @ text.T
        i2t = best_ranks(scores, torch.arange(images), text_image)
        t2i = best_ranks(scores.T, text_image, torch.arange(images))
        ranks = {"i2t": i2t, "t2i": t2i}
        return {f"{way}_r{k}": (rank <= k).float().mean() for way, rank in ranks.items() for k in KS}

    return run


def report(images: int, captions: int, width: int, repeats: int) -> None:
    sizes = (images, captions, width)
    print(f"{images * captions} texts x {images} images, width {width}, float32, {THREADS} threads")
    rows = {name: measure(work, *sizes, repeats=repeats) for name, work in (("full", full_matrix), ("ours", ours))}
    for name, (seconds, memory) in rows.items():
        time, space = seconds / rows["full"][0], memory / rows["full"][1]
        print(f"{name:<5} {seconds:7.2f} s  {memory:6.0f} MiB extra   time {time:.2f} x, memory {space:.2f} x of full")
    mine, theirs = ours(*sizes)(), full_matrix(*sizes)()
    # i2t of the full version ranks a second own caption too, but the best own one has no own one in front of it
    print("ours: ", {key: round(float(value), 4) for key, value in mine.items()})
    print("full: ", {key: round(float(value), 4) for key, value in theirs.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("images", 5000), ("captions", 5), ("width", 512), ("repeats", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    report(options.images, options.captions, options.width, options.repeats)
