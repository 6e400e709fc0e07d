"""Sound to mel spectrogram, as the released code of Diff-Foley (arXiv 2306.17203) and SpecVQGAN computes it.

Shapes: N samples, C mel bins, F mel frames. Waveforms are mono in [-1, 1], spectrograms ("mel") in [0, 1].
`mmtrain.audio_inversion` goes the other way.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor
from torch.nn.functional import pad

from mmtrain.config_errors import UserError, nearest

FLOOR = 1e-5  # least magnitude before the logarithm
TOP_DB, REFERENCE_DB = 100.0, 20.0  # mel 0 is -80 dB or less, mel 1 is +20 dB or more


@dataclass(frozen=True)
class MelPreset:
    """Settings of one mel spectrogram: periodic Hann window of `n_fft`, centred, magnitude, Slaney scale and area.

    Args:
        name: as configs and error messages call it.
        sample_rate: of the waveform, Hz.
        n_fft: samples of a window.
        hop: samples between two frames.
        n_mels: mel bins.
        fmin, fmax: lowest and highest frequency of the filters, Hz.
    """

    name: str
    sample_rate: int
    n_fft: int
    hop: int
    n_mels: int
    fmin: float
    fmax: float

    @property
    def frame_rate(self) -> float:
        """Mel frames a second."""
        return self.sample_rate / self.hop


# Hop 250 puts 16 mel frames on one video frame at 4 frames/s, for the contrastive stage only; hop 256 makes 512 frames
# last 8.192 s, for the diffusion stage.
PRESETS = {
    "mel_cavp": MelPreset("mel_cavp", 16000, 1024, 250, 128, 125.0, 7600.0),
    "mel_ldm": MelPreset("mel_ldm", 16000, 1024, 256, 128, 125.0, 7600.0),
    "mel_specvqgan": MelPreset("mel_specvqgan", 22050, 1024, 256, 80, 125.0, 7600.0),
}


def preset(name: str) -> MelPreset:
    """The preset of that name.

    Raises:
        UserError: no such name.
    """
    if name not in PRESETS:
        guess = nearest(name, PRESETS)
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError(f"mel preset: {name!r} is unknown, choose one of {', '.join(PRESETS)}{hint}")
    return PRESETS[name]


def check_rate(rate: int, preset: MelPreset, where: str) -> None:
    """Refuse sound of another sample rate than the preset is for: it would come out at another pitch.

    Args:
        rate: sample rate of the sound, Hz.
        preset: that it is to be used with.
        where: file or setting that the message names.

    Raises:
        UserError: the two differ.
    """
    if rate != preset.sample_rate:
        raise UserError(
            f"{where}: sample rate {rate} Hz, mel preset {preset.name} is for {preset.sample_rate} Hz: resample the "
            "sound, or choose the preset that fits"
        )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # else a bank first asked for in validation could not be used in training
def _filter_bank(preset: MelPreset, device: str) -> Tensor:
    frequencies = np.linspace(0, preset.sample_rate / 2, preset.n_fft // 2 + 1)
    edges = _mel_to_hz(np.linspace(_hz_to_mel(preset.fmin), _hz_to_mel(preset.fmax), preset.n_mels + 2))
    width = np.diff(edges)
    slopes = edges[:, None] - frequencies
    rising, falling = -slopes[:-2] / width[:-1, None], slopes[2:] / width[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    triangles *= (2 / (edges[2:] - edges[:-2]))[:, None]  # Slaney: every filter has the same area
    return torch.tensor(triangles, dtype=torch.float32, device=device)


def filter_bank(preset: MelPreset, device: torch.device | str | None = None) -> Tensor:
    """Mel filters float32 [C, n_fft // 2 + 1] (Slaney scale and area), computed in float64; cached: do not change it.

    Args:
        preset: settings.
        device: where the filters are to be; None is the CPU.
    """
    return _filter_bank(preset, str(torch.device(device or "cpu")))


def _hz_to_mel(frequency: float) -> float:
    if frequency < 1000:
        return frequency * 3 / 200
    return 15 + math.log(frequency / 1000) / (math.log(6.4) / 27)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(math.log(6.4) / 27 * (mel - 15)))


def compress(magnitude: Tensor) -> Tensor:
    """Mel magnitudes to [0, 1]: clip((20 log10(max(1e-5, M)) - 20 + 100) / 100, 0, 1), of any shape."""
    return ((20 * magnitude.clamp(min=FLOOR).log10() - REFERENCE_DB + TOP_DB) / TOP_DB).clamp(0, 1)


def decompress(mel: Tensor) -> Tensor:
    """Inverse of `compress`: M = 10^((100 mel - 80) / 20), of any shape; 0 comes back as 1e-4."""
    return 10 ** ((TOP_DB * mel - TOP_DB + REFERENCE_DB) / 20)


def spectrogram(waveform: Tensor | np.ndarray, preset: MelPreset) -> Tensor:
    """Mel spectrogram of a waveform, always in float32, whatever autocast says.

    Args:
        waveform: float [..., N] in [-1, 1] at the sample rate of the preset, N above n_fft / 2.
        preset: settings.

    Returns:
        float32 [..., C, 1 + N // hop] in [0, 1]. The padding at both ends reflects, as librosa 0.8 did; zero padding,
        the default of later ones, differs in the first and the last 3 frames.

    Raises:
        ValueError: too few samples to reflect.
    """
    waveform = torch.as_tensor(waveform).float()
    if waveform.shape[-1] <= preset.n_fft // 2:
        raise ValueError(f"waveform has {waveform.shape[-1]} samples, {preset.name} needs over {preset.n_fft // 2}")
    with torch.autocast(waveform.device.type, enabled=False):
        window = torch.hann_window(preset.n_fft, device=waveform.device)
        flat = waveform.reshape(-1, waveform.shape[-1])
        magnitude = torch.stft(flat, preset.n_fft, preset.hop, window=window, return_complex=True).abs()
        mel = compress(filter_bank(preset, waveform.device) @ magnitude)
    return mel.reshape(*waveform.shape[:-1], *mel.shape[-2:])


def clip_spectrogram(waveform: Tensor | np.ndarray, preset: MelPreset, seconds: float) -> Tensor:
    """Mel spectrogram of a clip of known length: cut or padded with zeros to it, the last sample dropped.

    Args:
        waveform: float [..., N] at the sample rate of the preset.
        preset: settings.
        seconds: length of the clip.

    Returns:
        float32 [..., C, F] in [0, 1], F = ceil(seconds * sample rate / hop): 625 for 10 s of `mel_ldm`, 640 of
        `mel_cavp`, 862 of `mel_specvqgan`, of which SpecVQGAN's data keep the first 860.
    """
    waveform = torch.as_tensor(waveform)
    samples = round(seconds * preset.sample_rate)
    waveform = waveform[..., :samples]
    waveform = pad(waveform, (0, samples - waveform.shape[-1]))
    return spectrogram(waveform[..., :-1], preset)  # else a centred transform has one frame too many


def resample(waveform: Tensor | np.ndarray, source_rate: int, target_rate: int) -> Tensor:
    """Change the sample rate by a polyphase filter (Kaiser window).

    Args:
        waveform: float [..., N].
        source_rate, target_rate: Hz.

    Returns:
        float32 [..., ceil(N * target_rate / source_rate)] on the device of the waveform. Runs on the CPU, and no
        gradient passes.
    """
    waveform = torch.as_tensor(waveform)
    if source_rate == target_rate:
        return waveform.float()
    divisor = math.gcd(source_rate, target_rate)
    samples = waveform.detach().cpu().double().numpy()
    changed = resample_poly(samples, target_rate // divisor, source_rate // divisor, axis=-1)
    return torch.from_numpy(changed.astype(np.float32)).to(waveform.device)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _official_mel_change() -> Tensor:
    whole_band = replace(PRESETS["mel_ldm"], fmin=0.0, fmax=8000.0)
    eighty = replace(PRESETS["mel_specvqgan"], fmin=0.0, fmax=11025.0)
    return filter_bank(eighty).double() @ torch.linalg.pinv(filter_bank(whole_band).double())


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _official_time_change(frames: int) -> Tensor:
    zeros, roll_off, beta = 50, 0.917347, 12.9846  # windowed sinc of "kaiser_best", the default of librosa 0.8
    target = np.arange(math.ceil(frames * 22050 / 16000)) * 16000 / 22050
    distance = target[None] - np.arange(frames)[:, None]
    window = np.i0(beta * np.sqrt(np.clip(1 - (distance / zeros) ** 2, 0, None))) / np.i0(beta)
    kernel = roll_off * np.sinc(roll_off * distance) * window * (np.abs(distance) <= zeros)
    return torch.from_numpy(kernel)


def official_conversion(mel: Tensor) -> Tensor:
    """Spectrogram of 128 mels at 16 kHz to 80 mels at 22,050 Hz, as the released evaluation of Diff-Foley does it.

    Its faults, kept so that scores can be set beside the reported ones: both mel bases have librosa's default band
    limits instead of 125 to 7600 Hz; the linear bins of 16 kHz are read as bins of 22,050 Hz, so every frequency is
    multiplied by 1.378; magnitudes are resampled in time as if they were sound, so steps ring below 0. The result is
    0.09 (mean, on [0, 1]) off the spectrogram of the same sound, and a window has 706 frames where real clips have 848.
    To be right, `resample` the generated sound and take its spectrogram; the two ways are not comparable.

    Args:
        mel: float [..., 128, T] in [0, 1], of `mel_ldm`.

    Returns:
        float32 [..., 80, ceil(T * 22050 / 16000)] in [0, 1].
    """
    with torch.autocast(mel.device.type, enabled=False):
        magnitude = decompress(mel.double())
        changed = _official_mel_change().to(mel.device) @ magnitude
        return compress(changed @ _official_time_change(mel.shape[-1]).to(mel.device)).float()
