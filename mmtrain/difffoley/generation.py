"""From video features to sound: latents of one window or of a clip of any length, the spectrogram, the waveform.

A clip longer than a window is one latent, denoised in overlapping windows whose predictions are averaged at every step
(MultiDiffusion, arXiv 2302.08113), decoded in overlapping tiles and inverted at once. B batch, T features, D their
width, h x L latent, C mel bins, F mel frames, N samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mmtrain.audio import PRESETS, preset
from mmtrain.audio_inversion import invert
from mmtrain.config_errors import UserError
from mmtrain.difffoley.guidance import GuidanceSettings, GuidedDenoiser
from mmtrain.difffoley.windows import WindowedDenoiser, consecutive_windows, plan_windows, sound_frames
from mmtrain.noise_schedule import NoiseSchedule, Objective
from mmtrain.samplers import Progress, ddim, dpm_solver_pp, euler, plms
from mmtrain.video_audio import ClipFormat

SamplerName = Literal["ddim", "dpm_solver", "plms", "euler"]
SAMPLERS = ("ddim", "dpm_solver", "plms", "euler")
LONG = ("overlapping", "consecutive")


@dataclass
class SamplerSettings:
    """How latents are sampled.

    Args:
        name: "dpm_solver" (DPM-Solver++ 2M, as released), "ddim" or "plms" for noise and v prediction, "euler" for
            flow.
        steps: of the sampler.
        eta: noise that DDIM adds, 0 none.
        window_batch: windows of a long clip that go through the network at once; memory grows with it.
        long: clips longer than a window. "overlapping": windows overlap by half and are averaged. "consecutive": as
            released: windows of their own noise one after the other, their waveforms joined; seams are heard, a tail
            shorter than a window is dropped, and as a window's 32 features span 8.000 s of video but its sound 8.176 s,
            every further window starts 0.176 s later than its picture.

    Raises:
        UserError: a value that is none of these or too small.
    """

    name: SamplerName = "dpm_solver"
    steps: int = 25
    eta: float = 0.0
    window_batch: int = 4
    long: Literal["overlapping", "consecutive"] = "overlapping"

    def __post_init__(self) -> None:
        for field, known in (("name", SAMPLERS), ("long", LONG)):
            if getattr(self, field) not in known:
                raise UserError(f"sampler.{field}: {getattr(self, field)!r}, must be one of {', '.join(known)}")
        for field in ("steps", "window_batch"):
            if getattr(self, field) < 1:
                raise UserError(f"sampler.{field}: {getattr(self, field)}, must be 1 or more")
        if self.eta < 0:
            raise UserError(f"sampler.eta: {self.eta}, must be 0 or more")


def check_sampler(sampler: SamplerSettings, objective: Objective, guidance: GuidanceSettings) -> None:
    """Refuse combinations that mean nothing.

    Raises:
        UserError: Euler without flow or flow without Euler; PLMS with a classifier (the released code then falls back
            to slow ancestral sampling without a word); eta without DDIM.
    """
    if (objective == "flow") != (sampler.name == "euler"):
        fitting = "euler" if objective == "flow" else "dpm_solver, ddim or plms"
        raise UserError(f"sampler.name: {sampler.name}, objective {objective!r} is sampled with {fitting}")
    if sampler.name == "plms" and guidance.classifier_scale:
        raise UserError(
            f"guidance.classifier_scale: {guidance.classifier_scale:g}, PLMS has no classifier guidance: "
            "give sampler.name dpm_solver or ddim, or a classifier_scale of 0"
        )
    if sampler.eta and sampler.name != "ddim":
        raise UserError(f"sampler.eta: {sampler.eta:g}, only ddim adds noise: give 0 with {sampler.name}")


def starting_noise(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Standard-normal noise on the device of `like`, drawn on the host: a seed means the same on every device."""
    return torch.randn(shape, generator=generator).to(like.device)


def latent_shape(first_stage: nn.Module) -> tuple[int, int, int]:
    """Channels, rows, and mel frames of a column of a first stage's latents of `mel_ldm`: 4, 16, 8."""
    factor = first_stage.factor
    return first_stage.latent_channels, PRESETS["mel_ldm"].n_mels // factor, factor


def run_sampler(
    denoise: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    schedule: NoiseSchedule,
    sampler: SamplerSettings,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The sampler that the settings name; `generator` is of the noise that DDIM with eta adds, on the host."""
    if sampler.name == "euler":
        return euler(denoise, noise, sampler.steps, progress=progress)
    if sampler.name == "ddim":
        return ddim(denoise, noise, sampler.steps, schedule, sampler.eta, generator, progress)
    run = plms if sampler.name == "plms" else dpm_solver_pp
    return run(denoise, noise, sampler.steps, schedule, progress)


@torch.no_grad()
def generate_latents(
    unet: nn.Module,
    features: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    objective: Objective,
    guidance: GuidanceSettings,
    sampler: SamplerSettings,
    classifier: nn.Module | None = None,
    clip_features: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents of one window each.

    Args:
        unet, classifier, clip_features: see `GuidedDenoiser`.
        features: [B, T, D].
        noise: [B, 4, h, w] of `starting_noise`.
        generator: of the noise that DDIM with eta adds, on the host.
        progress: called as progress(done, steps).

    Returns:
        [B, 4, h, w].

    Raises:
        UserError: see `check_sampler`, `GuidedDenoiser`.
    """
    check_sampler(sampler, objective, guidance)
    denoise = GuidedDenoiser(unet, features, schedule, objective, guidance, classifier, clip_features)
    return run_sampler(denoise, noise, schedule, sampler, generator, progress)


@torch.no_grad()
def long_latents(
    unet: nn.Module,
    features: Tensor,
    clip: ClipFormat,
    schedule: NoiseSchedule,
    objective: Objective,
    guidance: GuidanceSettings,
    sampler: SamplerSettings,
    classifier: nn.Module | None = None,
    generator: torch.Generator | None = None,
    latent: tuple[int, int, int] = (4, 16, 8),
    progress: Progress | None = None,
) -> Tensor:
    """Latents of one clip of any length.

    Args:
        unet, classifier: see `GuidedDenoiser`.
        features: of the whole clip [T, D] at `clip.fps`. Fewer than a window are filled up with the last one.
        generator: of the starting noise, on the host; the same seed gives the same sound on every device.
        latent: channels, rows, and mel frames of a column, see `latent_shape`.
        progress: called as progress(done, steps).

    Returns:
        [1, 4, h, L] with L columns for the whole clip; for `long: consecutive` [K, 4, h, w], one for each window.

    Raises:
        UserError: see `check_sampler`; no features; for `long: consecutive` fewer features than a window.
    """
    check_sampler(sampler, objective, guidance)
    if not len(features):
        raise UserError("features: none, a clip must have at least one video frame")
    channels, height, factor = latent
    width = columns = clip.window_mel_frames // factor
    if sampler.long == "consecutive":
        windows = consecutive_windows(len(features), clip)
    else:
        windows, columns = plan_windows(len(features), clip, factor)
    missing = max(clip.window_frames - len(features), 0)
    padded = torch.cat([features, features[-1:].expand(missing, -1)])
    parts = torch.stack([padded[w.feature : w.feature + clip.window_frames] for w in windows])
    denoise = GuidedDenoiser(unet, parts, schedule, objective, guidance, classifier, features[None])
    if sampler.long == "consecutive":
        noise = starting_noise((len(windows), channels, height, width), generator, features)
        return _separately(denoise, noise, schedule, sampler, generator, progress)
    noise = starting_noise((1, channels, height, columns), generator, features)
    if len(windows) > 1:
        denoise = WindowedDenoiser(denoise, windows, columns, width, sampler.window_batch, noise)
    return run_sampler(denoise, noise, schedule, sampler, generator, progress)


def _separately(
    denoise: GuidedDenoiser,
    noise: Tensor,
    schedule: NoiseSchedule,
    sampler: SamplerSettings,
    generator: torch.Generator | None,
    progress: Progress | None,
) -> Tensor:
    """Sample windows of their own noise, `window_batch` at once."""
    firsts = range(0, len(noise), sampler.window_batch)
    results = []
    for number, first in enumerate(firsts):
        rows = slice(first, first + sampler.window_batch)
        tell = None
        if progress is not None:
            tell = partial(_tell_part, progress, number, len(firsts))
        results.append(run_sampler(partial(denoise, rows=rows), noise[rows], schedule, sampler, generator, tell))
    return torch.cat(results)


def _tell_part(progress: Progress, number: int, parts: int, done: int, steps: int) -> None:
    progress(number * steps + done, parts * steps)


@torch.no_grad()
def decode_long(first_stage: nn.Module, z: Tensor, frames: int | None, clip: ClipFormat) -> Tensor:
    """Spectrogram of `long_latents`, decoded in overlapping tiles a window wide.

    Args:
        first_stage: has `decode(z)`, `decode_tiled(z, tile, overlap)` in latent columns, and `factor`.
        z: [K, 4, h, L].
        frames: mel frames to keep; None keeps all.

    Returns:
        [K, C, F] in [0, 1].
    """
    tile = clip.window_mel_frames // first_stage.factor
    if z.shape[-1] <= tile:
        mels = torch.cat([first_stage.decode(piece) for piece in z.split(4)])
    else:
        mels = first_stage.decode_tiled(z, tile, max(tile // 4, 1))
    return mels[..., :frames].float().clamp(0.0, 1.0)


def generate_long(
    unet: nn.Module,
    first_stage: nn.Module,
    features: Tensor,
    clip: ClipFormat,
    schedule: NoiseSchedule,
    objective: Objective,
    guidance: GuidanceSettings,
    sampler: SamplerSettings,
    classifier: nn.Module | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """`long_latents`, then `decode_long`: the spectrogram [1, C, F] in [0, 1] of a clip of any length.

    F is `sound_frames(T)`. For `long: consecutive` it is [K, C, F], one for each window; see `join`.
    """
    latent = latent_shape(first_stage)
    z = long_latents(
        unet, features, clip, schedule, objective, guidance, sampler, classifier, generator, latent, progress
    )
    frames = None if sampler.long == "consecutive" else sound_frames(len(features), clip)
    return decode_long(first_stage, z, frames, clip)


@torch.no_grad()
def to_waveform(
    mel: Tensor,
    preset_name: str = "mel_ldm",
    iterations: int = 32,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    samples: int | None = None,
) -> Tensor:
    """Waveforms of spectrograms: mel inversion and Griffin-Lim.

    Args:
        mel: [B, C, F] in [0, 1].
        preset_name: of `mmtrain.audio`; the paper's is "mel_ldm", 16 kHz (the released demo inverts at 22,050 Hz, which
            lowers the pitch to 0.73 of what it should be).
        iterations: of Griffin-Lim.
        generator: of its first phases, one or one for each spectrogram.
        samples: length to cut, or to fill up with silence, to; None keeps (F - 1) * hop.

    Returns:
        [B, N] in [-1, 1].
    """
    waveform = invert(mel, preset(preset_name), iterations=iterations, generator=generator)
    if samples is not None:
        waveform = pad(waveform[..., :samples], (0, max(samples - waveform.shape[-1], 0)))
    return waveform.clamp(-1.0, 1.0)


def join(waveforms: Tensor) -> Tensor:
    """Waveforms [K, N] of consecutive windows one after the other, [1, K * N], as the released code joins them."""
    return waveforms.reshape(1, -1)
