"""Generating sound with double guidance: ours against plain loops over the same networks, in one run, clip by clip.

Plain: one clip after another; diffusers' DDIM, the UNet called once for each condition, the classifier's gradient by
autograd, the first stage, non-negative least squares frame by frame with scipy, and Griffin-Lim, as the released code
of Diff-Foley goes from features to sound. Ours takes the clips as one batch. Both sample the same latents. Weights are
random: that doesn't change the times.

python -m tests.benchmarks.foley_sampling [--part all] [--size impacts] [--device cuda --size released] [--repeats 3]
"""

import argparse
import multiprocessing as mp
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from scipy.optimize import nnls
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from mmtrain.audio import decompress, filter_bank, preset
from mmtrain.audio_inversion import griffin_lim, mel_to_magnitude
from mmtrain.difffoley.first_stage import FirstStage, autoencoder_config
from mmtrain.difffoley.generation import SamplerSettings, generate_latents, generate_long, to_waveform
from mmtrain.difffoley.guidance import GuidanceSettings
from mmtrain.difffoley.networks import AlignmentNetwork, FoleyUNet
from mmtrain.difffoley.testing import Stopwatch
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.video_audio import ClipFormat

SCHEDULE, PRESET = NoiseSchedule(), preset("mel_ldm")
GUIDANCE = GuidanceSettings(4.5, 50.0, "embedded_zeros")
SMALL = {"feature_dim": 128, "layers_per_block": 1, "attention_levels": (False, True, True), "heads": 4}
SMALL |= {"context_width": 64, "condition_channels": 16}
SIZES: dict[str, dict[str, Any]] = {  # "impacts": those of the configs for simulated impacts
    "impacts": {
        "unet": SMALL | {"block_out_channels": (32, 64, 96)},
        "classifier": SMALL | {"block_out_channels": (32, 64, 64)},
        "first_stage": {"channels": (32, 32, 64), "layers_per_block": 1, "in_channels": 1, "patch": 2}
        | {"has_mid_attention": False},
        "format": {"fps": 8.0, "seconds": 5.0, "frame_size": 64, "window_mel_frames": 256},
    },
    "released": {"unet": {}, "classifier": {}, "first_stage": {}, "format": {}},
}
Part = Callable[[], Any]


class Networks:
    """What generates, of a size, with random weights."""

    def __init__(self, size: str, device: str) -> None:
        torch.manual_seed(0)
        sizes = SIZES[size]
        self.format = ClipFormat(**sizes["format"])
        made = (
            FoleyUNet(**sizes["unet"]),
            AlignmentNetwork(**sizes["classifier"]),
            FirstStage(autoencoder_config(**sizes["first_stage"])),
        )
        self.unet, self.classifier, self.first_stage = (m.to(device).eval().requires_grad_(False) for m in made)

    def features(self, clips: int, frames: int, device: str) -> Tensor:
        width = self.unet.embedder.embedder[0].in_features
        return normalize(torch.randn(clips, frames, width, generator=torch.Generator().manual_seed(1)), dim=-1).to(
            device
        )

    def noise(self, clips: int, device: str) -> Tensor:
        shape = (clips, 4, PRESET.n_mels // 8, self.format.window_mel_frames // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)


# --- the plain way, one clip ---


def plain_latent(networks: Networks, features: Tensor, x: Tensor, steps: int) -> Tensor:
    """The loop that one writes with diffusers: features [1, T, D], x [1, 4, h, w]."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        context, clip = networks.unet.context(features), networks.classifier.context(features)
        null = torch.zeros_like(context)
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            eps_null, eps = networks.unet(x, t, null), networks.unet(x, t, context)
        noisy = x.detach().requires_grad_()
        gradient = torch.autograd.grad(logsigmoid(networks.classifier(noisy, t, clip)).sum(), noisy)[0]
        sigma = (1 - scheduler.alphas_cumprod[t]) ** 0.5
        guided = eps_null + GUIDANCE.scale * (eps - eps_null) - GUIDANCE.classifier_scale * sigma * gradient
        x = scheduler.step(guided, t, x).prev_sample
    return x


def frame_by_frame(mel: Tensor) -> Tensor:
    """Magnitudes [B, K, F] of mel spectrograms [B, C, F]."""
    bank = filter_bank(PRESET).double().numpy()
    columns = decompress(mel).double().cpu().transpose(1, 2).flatten(0, 1).numpy()
    found = torch.stack([torch.from_numpy(nnls(bank, column)[0]) for column in columns])
    return found.view(len(mel), -1, bank.shape[1]).transpose(1, 2).float().to(mel.device)


def plain(networks: Networks, features: Tensor, noise: Tensor, steps: int, watch: Stopwatch) -> Tensor:
    latents = []
    for own, x in zip(features.split(1), noise.split(1), strict=True):
        z = watch("latent", lambda own=own, x=x: plain_latent(networks, own, x, steps))
        with torch.no_grad():
            mel = watch("decode", lambda z=z: networks.first_stage.decode(z).clamp(0, 1))
        watch("inversion", lambda mel=mel: griffin_lim(frame_by_frame(mel), PRESET))
        latents.append(z)
    return torch.cat(latents)


# --- ours ---


def ours(
    networks: Networks,
    features: Tensor,
    noise: Tensor,
    watch: Stopwatch,
    sampler: SamplerSettings,
    objective: str = "eps",
    guidance: GuidanceSettings = GUIDANCE,
) -> Tensor:
    given = (networks.unet, features, noise, SCHEDULE, objective, guidance, sampler, networks.classifier)
    z = watch("latent", lambda: generate_latents(*given))
    with torch.no_grad():
        mel = watch("decode", lambda: networks.first_stage.decode(z).clamp(0, 1))
    watch("inversion", lambda: to_waveform(mel))
    return z


def compare_clips(networks: Networks, clips: int, steps: int, repeats: int, device: str) -> dict[str, float]:
    """Print time a clip of each part, and the ratio to the plain way; returns the ratios and the largest difference."""
    features, noise = networks.features(clips, networks.format.window_frames, device), networks.noise(clips, device)
    cfg = GuidanceSettings(GUIDANCE.scale, 0.0, GUIDANCE.null_condition)
    works: dict[str, Callable[[Stopwatch], Tensor]] = {
        "plain, DDIM": lambda watch: plain(networks, features, noise, steps, watch),
        "ours, DDIM": lambda watch: ours(networks, features, noise, watch, SamplerSettings("ddim", steps)),
        "ours, DPM-Solver++": lambda watch: ours(
            networks, features, noise, watch, SamplerSettings("dpm_solver", steps)
        ),
        "ours, flow, 5 steps": lambda watch: ours(
            networks, features, noise, watch, SamplerSettings("euler", 5), "flow", cfg
        ),
    }
    latents = {name: work(Stopwatch(torch.device(device))) for name, work in works.items()}  # warm-up
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for _ in range(repeats):  # in turn, so that whatever else the machine does meets all
        for name, work in works.items():
            watch = Stopwatch(torch.device(device))
            work(watch)
            runs[name].append(watch.seconds)
    medians = {name: sorted(some, key=lambda one: sum(one.values()))[repeats // 2] for name, some in runs.items()}
    base, found = sum(medians["plain, DDIM"].values()), {}
    print(f"{clips} clips of {networks.format.window_seconds:g} s, {steps} steps, double guidance (flow: CFG)")
    for name, seconds in medians.items():
        found[name] = base / sum(seconds.values())
        parts = "  ".join(f"{part} {1e3 * value / clips:8.1f}" for part, value in seconds.items())
        print(
            f"  {name:<20} {1e3 * sum(seconds.values()) / clips:9.1f} ms a clip  {found[name]:5.2f} x faster  ({parts})"
        )
    found["difference"] = (latents["ours, DDIM"] - latents["plain, DDIM"]).abs().max().item()
    scale = latents["plain, DDIM"].abs().max().item()
    print(f"  largest difference of the latents, DDIM: {found['difference']:.1e}, of values up to {scale:.1f}")
    return found


def compare_inversion(frames: int, device: str) -> None:
    """Print time and residual of the first step of the inversion."""
    levels = torch.rand(1, 128, frames) * torch.linspace(0.8, 0.2, 128)[:, None]
    mel = torch.nn.functional.avg_pool2d(levels, 5, 1, 2).to(device)
    for name, work in (
        ("scipy, frame by frame", lambda: frame_by_frame(mel)),
        ("ours, batched", lambda: mel_to_magnitude(decompress(mel), PRESET)),
    ):
        watch, wanted = Stopwatch(torch.device(device)), decompress(mel).cpu()
        magnitude = watch("inversion", work)
        residual = ((filter_bank(PRESET) @ magnitude.cpu() - wanted).norm() / wanted.norm()).item()
        took = 1e3 * watch.seconds["inversion"]
        print(f"{frames} mel frames  {name:<22} {took:9.1f} ms  residual {residual:.5f}")


# --- memory of long clips, each in a process of its own ---


def peak_of(size: str, seconds: int, steps: int, window_batch: int, device: str) -> tuple[float, float, float]:
    """MiB with the networks in memory, peak MiB while a clip is generated, seconds it took."""
    torch.set_num_threads(1)
    networks = Networks(size, device)
    sampler = SamplerSettings("dpm_solver", steps, window_batch=window_batch)
    features = networks.features(1, round(seconds * networks.format.fps), device)[0]
    given = (networks.format, SCHEDULE, "eps", GUIDANCE, sampler, networks.classifier)
    to_waveform(torch.rand(1, PRESET.n_mels, 9, device=device), iterations=1)  # what is made once and kept
    before = memory(device, peak=False)
    begin = time.perf_counter()
    to_waveform(generate_long(networks.unet, networks.first_stage, features, *given))
    return before, memory(device, peak=True), time.perf_counter() - begin


def memory(device: str, peak: bool) -> float:
    """MiB of this process: of the GPU, or resident as Linux counts it (`ru_maxrss` would include the parent's)."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) / 1024


def compare_memory(size: str, steps: int, window_batch: int, device: str, lengths: tuple[int, int] = (16, 60)) -> float:
    """Print peak memory of a short and a long clip; returns long / short."""
    peaks, growth = [], []
    for seconds in lengths:
        with mp.get_context("spawn").Pool(1) as pool:
            before, peak, took = pool.apply(peak_of, (size, seconds, steps, window_batch, device))
        peaks.append(peak)
        growth.append(peak - before)
        print(
            f"{seconds} s, {window_batch} windows at once: peak {peak:.0f} MiB, {growth[-1]:.0f} above the "
            f"{before:.0f} before; {took:.1f} s, {took / seconds:.2f} of real time"
        )
    print(
        f"{lengths[1]} s against {lengths[0]} s: peak {peaks[1] / peaks[0]:.2f} x, growth {growth[1] / growth[0]:.2f} x"
    )
    return peaks[1] / peaks[0]


def main(argv: list[str] | None = None) -> None:
    """Run the parts that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="impacts", choices=SIZES, help="released: 3.8 GB of weights, for a GPU")
    parser.add_argument("--part", default="all", choices=["all", "clips", "inversion", "memory"])
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--window-batch", type=int, default=4)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # equal latents need float32
    print(torch.cuda.get_device_name() if options.device == "cuda" else "CPU, 1 thread")
    if options.part in ("clips", "all"):
        networks = Networks(options.size, options.device)
        compare_clips(networks, options.clips, options.steps, options.repeats, options.device)
    if options.part in ("inversion", "all"):
        compare_inversion(256, options.device)
    if options.part in ("memory", "all"):
        compare_memory(options.size, min(options.steps, 4), options.window_batch, options.device)


if __name__ == "__main__":
    main()
