"""Mel spectrogram to sound: non-negative least squares to linear magnitudes, then Griffin-Lim for the phases.

Shapes: B batch, C mel bins, F mel frames, K = n_fft // 2 + 1 frequencies. Both steps run on the device of the input and
take a whole batch; the released code of Diff-Foley solves every frame by itself on the CPU. Its demo moreover inverts
with a mel basis for 22,050 Hz and writes 16 kHz, so that its sounds have 0.726 times the pitch; here the preset gives
both.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mmtrain.audio import MelPreset, decompress, filter_bank

FRAMES_AT_ONCE = 4096  # bounds the memory: about 8 MB for each array of the least squares, 17 MB of Griffin-Lim
ITERATIONS_BETWEEN_CHECKS = 25
TOLERANCE = 1e-4  # least squares of a frame ends when 25 iterations gain less, as a part of the size of its spectrum


def mel_to_magnitude(mel_magnitude: Tensor, preset: MelPreset, iterations: int = 300) -> Tensor:
    """Linear magnitudes x >= 0 whose mel filters come nearest: min |A x - M|^2, every frame by itself.

    Starts from the pseudo-inverse without its negative values, which keeps the result as smooth over frequency as it
    can be, and goes on by accelerated projected gradient steps. Every frequency has its own step 1 / (A' A 1), which is
    a bound since A has no negative values, and every frame restarts its momentum when it points uphill. Frames that no
    longer gain drop out.

    Args:
        mel_magnitude: float [B, C, F], not negative; `mmtrain.audio.decompress` of a mel.
        preset: settings of the mel.
        iterations: at most.

    Returns:
        float32 [B, K, F].
    """
    with torch.autocast(mel_magnitude.device.type, enabled=False):
        bank = filter_bank(preset, mel_magnitude.device)
        inverse = _pseudo_inverse(preset, str(bank.device))
        columns = mel_magnitude.float().transpose(0, 1).flatten(1)
        parts = [_least_squares(bank, inverse, part, iterations) for part in columns.split(FRAMES_AT_ONCE, 1)]
        batch, _, frames = mel_magnitude.shape
        return torch.cat(parts, 1).unflatten(1, (batch, frames)).transpose(0, 1).contiguous()


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _pseudo_inverse(preset: MelPreset, device: str) -> Tensor:
    return torch.linalg.pinv(filter_bank(preset).double()).float().to(device)


def _least_squares(bank: Tensor, inverse: Tensor, target: Tensor, iterations: int) -> Tensor:
    """`bank` [C, K], `inverse` [K, C], `target` [C, n] -> [K, n]."""
    step = 1 / (bank.T @ bank.sum(1, keepdim=True)).clamp(min=1e-12)  # frequencies outside all filters stay as they are
    done = (inverse @ target).clamp(min=0)
    active = torch.arange(target.shape[1], device=target.device)
    x, point, age = done, done, torch.zeros_like(target[0])
    error = _error(bank, x, target)
    for begin in range(0, iterations, ITERATIONS_BETWEEN_CHECKS):
        for _ in range(min(ITERATIONS_BETWEEN_CHECKS, iterations - begin)):
            following = torch.addcmul(point, step, bank.T @ (bank @ point - target), value=-1).clamp_(min=0)
            change = following - x
            uphill = ((point - following) / step * change).sum(0) > 0
            age = torch.where(uphill, 0, age + 1)
            x, point = following, torch.addcmul(following, age / (age + 3), change)
        done[:, active] = x
        before, error = error, _error(bank, x, target)
        going = before - error > TOLERANCE
        if not going.any():
            break
        active, target, age, error = active[going], target[:, going], age[going], error[going]
        x, point = x[:, going], point[:, going]
    return done


def _error(bank: Tensor, x: Tensor, target: Tensor) -> Tensor:
    return (bank @ x - target).norm(dim=0) / target.norm(dim=0).clamp(min=1e-12)


def griffin_lim(
    magnitude: Tensor,
    preset: MelPreset,
    iterations: int = 32,
    momentum: float = 0.99,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Sound whose spectrogram has these magnitudes, by Griffin-Lim with momentum (Perraudin et al. 2013).

    Args:
        magnitude: float [B, K, F], not negative.
        preset: tells window and hop.
        iterations: of transform and back.
        momentum: 0 is the plain method.
        generator: of the random first phases, one for all samples, which are drawn in order, or one for each.

    Returns:
        float32 [B, (F - 1) * hop].

    Raises:
        ValueError: too few frames for the centred transform, or another number of generators than samples.
    """
    batch, _, frames = magnitude.shape
    if (frames - 1) * preset.hop <= preset.n_fft // 2:
        raise ValueError(f"{frames} frames are too few, {preset.name} needs {2 + preset.n_fft // 2 // preset.hop}")
    generators = [generator] * batch if generator is None or isinstance(generator, torch.Generator) else generator
    if len(generators) != batch:
        raise ValueError(f"got {len(generators)} generators for {batch} samples")
    parts = []
    for begin in range(0, batch, max(1, FRAMES_AT_ONCE // frames)):
        chosen = slice(begin, begin + max(1, FRAMES_AT_ONCE // frames))
        phases = torch.stack([_random_phase(magnitude[0], one) for one in generators[chosen]])
        parts.append(_griffin_lim(magnitude[chosen].float(), phases, preset, iterations, momentum))
    return torch.cat(parts)


def _random_phase(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, device=device).to(like.device)


def _griffin_lim(magnitude: Tensor, phase: Tensor, preset: MelPreset, iterations: int, momentum: float) -> Tensor:
    window = torch.hann_window(preset.n_fft, device=magnitude.device)
    spectrum = torch.polar(magnitude, 2 * torch.pi * phase)
    before = torch.zeros_like(spectrum)
    for _ in range(iterations):
        waveform = torch.istft(spectrum, preset.n_fft, preset.hop, window=window)
        rebuilt = torch.stft(waveform, preset.n_fft, preset.hop, window=window, return_complex=True)
        ahead = rebuilt.sub(before, alpha=momentum / (1 + momentum))
        spectrum = ahead * (magnitude / ahead.abs().clamp(min=1e-16))
        before = rebuilt
    return torch.istft(spectrum, preset.n_fft, preset.hop, window=window)


@torch.no_grad()
def invert(
    mel: Tensor,
    preset: MelPreset,
    iterations: int = 32,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Sound of a mel spectrogram at the sample rate of its preset.

    Args:
        mel: float [B, C, F] in [0, 1].
        preset: settings that the mel was made with.
        iterations: of Griffin-Lim.
        generator: of its random first phases, as `griffin_lim` takes it.

    Returns:
        float32 [B, (F - 1) * hop]: 512 frames of `mel_ldm` give 130,816 samples, 8.176 s.

    Raises:
        ValueError: mel of another shape than the preset makes, or values that are not finite.
    """
    if mel.ndim != 3 or mel.shape[1] != preset.n_mels:
        raise ValueError(f"mel must be [B, {preset.n_mels}, F] for {preset.name}, got {list(mel.shape)}")
    if not mel.isfinite().all():
        raise ValueError("mel has values that are not finite")
    magnitude = mel_to_magnitude(decompress(mel.float().clamp(0, 1)), preset)
    return griffin_lim(magnitude, preset, iterations, generator=generator)
