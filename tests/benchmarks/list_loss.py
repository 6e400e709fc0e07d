"""RankCLIP's loss, forward and backward on one thread: ours, the released form, and plain CLIP, in one run.

python -m tests.benchmarks.list_loss [--size 4096] [--width 512]
The released form is rebuilt from its description: four lists, each sorted, gathered, masked and run through autograd.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.rankclip.losses import clip_objective, rankclip_objective, row_chunked_loss
from tests.benchmarks.measure import measure

TAU = 14.3


def features(size: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(size, width, generator=generator)
    text = image / 2 + torch.randn(size, width, generator=generator)
    scale = torch.tensor(TAU).log().requires_grad_()
    return F.normalize(image, dim=1).requires_grad_(), F.normalize(text, dim=1).requires_grad_(), scale


def released_list(scores: Tensor, reference: Tensor, eps: float = 1e-10) -> Tensor:
    columns = torch.randperm(scores.shape[1])
    scores, reference = scores[:, columns], reference[:, columns]
    ordered, order = reference.sort(dim=-1, descending=True)
    padding = ordered == -1.0
    x = scores.gather(1, order)
    x = x.masked_fill(padding, float("-inf"))
    shifted = x - x.max(dim=1, keepdim=True).values
    tails = shifted.exp().flip(1).cumsum(1).flip(1)
    return (torch.log(tails + eps) - shifted).masked_fill(padding, 0.0).sum(1).mean()


def released(size: int, width: int) -> Callable[[], float]:
    image, text, scale = features(size, width)

    def run() -> float:
        tau, target = scale.exp(), torch.arange(size)
        scores, images, texts = tau * image @ text.T, tau * image @ image.T, tau * text @ text.T
        contrastive = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        lists = released_list(scores, scores.T) + released_list(scores.T, scores)
        lists = lists + released_list(images, texts) + released_list(texts, images)
        loss = contrastive + 2 * lists / 32 / size
        loss.backward()
        return loss.item()

    return run


def ours(size: int, width: int, eps: float, chunk: int) -> Callable[[], float]:
    image, text, scale = features(size, width)

    def run() -> float:
        objective = rankclip_objective(2.0, eps=eps)
        loss, _ = row_chunked_loss(objective, (image, text), scale, chunk)
        loss.backward()
        return loss.item()

    return run


def plain_clip(size: int, width: int, chunk: int) -> Callable[[], float]:
    image, text, scale = features(size, width)

    def run() -> float:
        loss, _ = row_chunked_loss(clip_objective(), (image, text), scale, chunk)
        loss.backward()
        return loss.item()

    return run


def report(size: int, width: int, chunk: int) -> None:
    print(f"N = {size}, D = {width}, float32, one thread, tau = {TAU}, forward and backward")
    rows = {
        "released form": measure(released, size, width),
        "ours, eps 1e-10": measure(ours, size, width, 1e-10, chunk),
        "ours, eps 0": measure(ours, size, width, 0.0, chunk),
        "CLIP loss only, ours": measure(plain_clip, size, width, chunk),
    }
    base_seconds, base_memory = rows["released form"]
    clip_seconds, _ = rows["CLIP loss only, ours"]
    for name, (seconds, memory) in rows.items():
        print(
            f"{name:<22} {seconds:7.2f} s  {memory:7.0f} MiB   time {seconds / base_seconds:5.2f} x,"
            f" memory {memory / base_memory:5.2f} x of the released form;  {seconds / clip_seconds:5.1f} x CLIP"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("size", 4096), ("width", 512), ("chunk", 128)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    report(options.size, options.width, options.chunk)
