"""What spatial guidance costs on one thread: the cross-attentions of Stable Diffusion 1.5, and whole sampling steps.

python -m tests.benchmarks.guided_attention [--part attention|sampling] [--repeats 15] [--seconds 30]
Attention: all 16 layers at 512 x 896 (latents 64 x 112, 8 heads), batch 2 = [unconditional; conditional], guided as
built against unguided, and against scores and a map of every head that lie in memory. Sampling: a narrow UNet with the
layers and heads of the real one, at 256 x 448. The ways take turns layer by layer, so that whatever else the machine
does meets all; CPU time; "median" is of the ratios of a round, "best" the ratio of the least times.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the profiler talks; read when torch is loaded
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtrain.attention import AttentionBias, BiasProcessor, grid_table, install
from mmtrain.storyweaver.guidance import GuidanceMaps, centres, signed_map

LATENT, SMALL, LENGTH, HEADS = (64, 112), (32, 56), 77, 8
LAYERS = ((7168, 320, 5), (1792, 640, 5), (448, 1280, 5), (112, 1280, 1))  # tokens, width, how many
SPANS = (((9, 10), (20, 41)), ((12, 13), (41, 63)))  # class words and description of two characters
T, ALPHA = 999, 2.5


def guidance(latent: tuple[int, int], heads: str, form: str = "bias") -> GuidanceMaps:
    """Of one frame of two characters."""
    places, size, signs = centres(2, 2), (8 * latent[0], 8 * latent[1]), {}
    for tokens, grid in grid_table(*latent, 4).items():
        signs[tokens] = signed_map(places, torch.ones_like(places), size, grid, 0.85).flatten(1)[None]
    usage = torch.zeros(1, 2, LENGTH)
    for row, spans in zip(usage[0], SPANS, strict=True):
        for start, end in spans:
            row[start:end] += 1
    return GuidanceMaps(signs, usage, heads, form)


class InMemory(BiasProcessor):
    """For comparison: softmax(Q K^T / sqrt(d) + map) V as it is written, with a map and scores of every head."""

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: AttentionBias | None) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if bias is not None:
            added = torch.zeros_like(scores)
            added[:, : 1 if bias.heads == "first" else None] = bias.bias(q.shape[2], q.dtype)[:, None]
            scores = scores + added
        return scores.softmax(-1) @ v


@dataclass
class Way:
    """One way to compute a pass: what attends, and what guides it."""

    processor: BiasProcessor
    maps: GuidanceMaps | None

    def bias(self) -> AttentionBias | None:
        """What a step makes before its first layer."""
        if self.maps is None:
            return None
        bias = self.maps.at(T, ALPHA).with_unconditional()
        if bias.form == "bias":
            for tokens in bias.maps:
                bias.bias(tokens)
        return bias


Layer = tuple[Callable[[Way, AttentionBias | None], Tensor], int]  # a call, and how often a pass makes it


def cores() -> list[Layer]:
    """Attention alone: from queries, keys and values to what goes into the output projection."""
    layers = []
    for tokens, width, count in LAYERS:
        q, k, v = (torch.randn(2, n, HEADS, width // HEADS).transpose(1, 2) for n in (tokens, LENGTH, LENGTH))

        def call(way: Way, bias: AttentionBias | None, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return way.processor._attend(q, k, v, None, bias).transpose(1, 2).flatten(2)

        layers.append((call, count))
    return layers


def modules() -> list[Layer]:
    """The same with the projections, as a UNet calls it."""
    from diffusers.models.attention_processor import Attention

    layers, text = [], torch.randn(2, LENGTH, 768)
    for tokens, width, count in LAYERS:
        layer = Attention(width, cross_attention_dim=768, heads=HEADS, dim_head=width // HEADS)
        hidden = torch.randn(2, tokens, width)

        def call(
            way: Way, bias: AttentionBias | None, layer: nn.Module = layer, hidden: Tensor = hidden, text: Tensor = text
        ) -> Tensor:
            return way.processor(layer, hidden, text, attention_bias=bias)

        layers.append((call, count))
    return layers


def steps() -> list[Layer]:
    """One step of sampling with a UNet of the layers and heads of Stable Diffusion 1.5, but 32 to 128 wide.

    Grids are those of 256 x 448: at the full size self-attention takes seconds, and would hide any guidance.
    """
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16}
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=HEADS, **sizes)
    install(unet.eval())
    latents, text = torch.randn(1, 4, *SMALL).expand(2, -1, -1, -1), torch.randn(2, LENGTH, 768)

    def call(way: Way, bias: AttentionBias | None) -> Tensor:
        options = {} if bias is None else {"cross_attention_kwargs": {"attention_bias": bias}}
        unconditional, conditional = unet(latents, T, encoder_hidden_states=text, **options).sample.chunk(2)
        return unconditional + 5.0 * (conditional - unconditional)

    return [(call, 1)]


def compare(name: str, ways: dict[str, Way], layers: list[Layer], repeats: int, seconds: float) -> None:
    """Time passes of each way in turn against the first; print the memory of one pass, too."""
    memory = {key: (peak_bytes(way, layers), largest_bytes(way, layers)) for key, way in ways.items()}
    times: dict[str, list[float]] = {key: [] for key in ways}
    end = time.monotonic() + seconds
    for number in range(repeats):
        if number >= 3 and time.monotonic() > end:
            break
        # Shuffled: who always comes first, or after itself, finds other caches than the rest.
        order = random.Random(number).sample(list(ways), len(ways))
        spent = dict.fromkeys(ways, 0.0)
        biases = {}
        for key in order:
            begin = time.process_time()
            biases[key] = ways[key].bias()
            spent[key] += time.process_time() - begin
        for call, count in layers:
            for key in order:
                begin = time.process_time()
                call(ways[key], biases[key])
                spent[key] += count * (time.process_time() - begin)
        for key, value in spent.items():
            times[key].append(value)
    base = next(iter(times.values()))
    for key, values in times.items():
        ratio = median([value / first for value, first in zip(values, base, strict=True)])
        best = min(values) / min(base)
        peak, largest = (size / 2**20 for size in memory[key])
        print(
            f"{name:<16} {key:<22} {1e3 * median(values):8.1f} ms  median {ratio:5.3f} x  best {best:5.3f} x  "
            f"peak {peak:6.1f} MiB  largest tensor {largest:5.1f} MiB",
            flush=True,
        )
    print(f"{name:<16} {len(base)} rounds", flush=True)


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def one_pass(way: Way, layers: list[Layer]) -> None:
    """Each kind of layer once: memory is given back after each."""
    bias = way.bias()
    for call, _ in layers:
        call(way, bias)


def peak_bytes(way: Way, layers: list[Layer]) -> int:
    """Most bytes that a pass held at a time beyond what was there before, by the profiler's book-keeping."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass(way, layers)
    held = most = 0
    for _, size in sorted(allocations(profiler)):
        held += size
        most = max(most, held)
    return most


def allocations(profiler: Any) -> Iterator[tuple[int, int]]:
    """Time of each, and bytes taken or, negative, given back."""
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            yield event.start_ns(), event.nbytes()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return results


def largest_bytes(way: Way, layers: list[Layer]) -> int:
    """The largest tensor of a pass."""
    with Largest() as watch:
        one_pass(way, layers)
    return watch.bytes


def ways(kinds: tuple[str, ...], latent: tuple[int, int] = LATENT) -> dict[str, Way]:
    """Ways by name; the first is unguided, "again" shows how far a ratio can be trusted."""
    ours, theirs = BiasProcessor(), InMemory()
    known = {
        "no guidance": Way(ours, None),
        "no guidance again": Way(ours, None),
        "bias, first head": Way(ours, guidance(latent, "first")),
        "bias, all heads": Way(ours, guidance(latent, "all")),
        "low rank, first head": Way(ours, guidance(latent, "first", "low_rank")),
        "low rank, all heads": Way(ours, guidance(latent, "all", "low_rank")),
        "in memory, first head": Way(theirs, guidance(latent, "first")),
        "in memory, all heads": Way(theirs, guidance(latent, "all")),
    }
    return {key: way for key, way in known.items() if key.startswith(kinds)}


def report(part: str | None, repeats: int, seconds: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if part != "sampling":
        compare("attention alone", ways(("no", "bias", "low", "in")), cores(), repeats, seconds / 2)
        compare("with projections", ways(("no", "bias", "in")), modules(), repeats, seconds / 2)
    if part != "attention":
        compare("a sampling step", ways(("no", "bias"), SMALL), steps(), repeats, seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("attention", "sampling"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30, help="of each part: no new round after that")
    options = parser.parse_args()
    with torch.inference_mode():
        report(options.part, options.repeats, options.seconds)
