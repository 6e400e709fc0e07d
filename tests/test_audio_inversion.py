"""Inversion of mels: residual beside SciPy's exact solver, pitch, likeness, and independence of the batch."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from mmtrain import audio_inversion
from mmtrain.audio import PRESETS, decompress, filter_bank, preset, resample, spectrogram
from mmtrain.audio_inversion import griffin_lim, invert, mel_to_magnitude

LDM = PRESETS["mel_ldm"]


def tone(hertz: float, seconds: float, sample_rate: int = 16000) -> torch.Tensor:
    return torch.from_numpy(
        0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * sample_rate)) / sample_rate)
    ).float()


def knocks(seed: int, seconds: float = 1.5) -> torch.Tensor:
    """Short decaying sounds over faint noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * 16000)) / 16000
    sound = 0.002 * rng.standard_normal(len(t))
    for at in np.arange(0.2, seconds - 0.2, 0.4):
        late = np.clip(t - at, 0, None)
        for _ in range(4):
            sound += (
                0.2 * (t >= at) * np.exp(-late * rng.uniform(8, 30)) * np.sin(2 * np.pi * rng.uniform(300, 5000) * late)
            )
    return torch.from_numpy(sound).float()


def nnls_per_frame(mel_magnitude: torch.Tensor) -> torch.Tensor:
    bank = filter_bank(LDM).double().numpy()
    columns = [nnls(bank, column)[0] for column in mel_magnitude.double().numpy().T]
    return torch.from_numpy(np.stack(columns, 1)).float()


def residual(magnitude: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (filter_bank(LDM) @ magnitude - target).norm(dim=0) / target.norm(dim=0)


def peak_frequency(sound: torch.Tensor, sample_rate: int) -> float:
    power = torch.fft.rfft(sound * torch.hann_window(len(sound)), 8 * len(sound)).abs()
    return power.argmax().item() * sample_rate / (8 * len(sound))


@pytest.mark.parametrize("noise", [0.0, 0.05], ids=["of a sound", "off every sound"])
def test_least_squares_are_as_near_as_the_exact_solver(noise: float) -> None:
    torch.manual_seed(0)
    mel = torch.cat([spectrogram(knocks(1), LDM)[:, 10:40], spectrogram(tone(1000, 1), LDM)[:, 10:20]], 1)
    target = decompress((mel + noise * torch.randn_like(mel)).clamp(0, 1))
    got, exact = mel_to_magnitude(target[None], LDM)[0], nnls_per_frame(target)
    assert got.shape == (513, 40) and (got >= 0).all()
    excess = residual(got, target) - residual(exact, target)
    assert excess.max() < 2e-3 and excess.mean() < 3e-4


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_tone_keeps_its_pitch(name: str) -> None:
    chosen = preset(name)
    mel = spectrogram(tone(1000, 1.5, chosen.sample_rate), chosen)
    sound = invert(mel[None], chosen, generator=torch.Generator().manual_seed(0))[0]
    assert sound.shape[0] == (mel.shape[1] - 1) * chosen.hop
    assert abs(peak_frequency(sound, chosen.sample_rate) - 1000) < 5, "0.726 of it with a basis of another rate"


def test_an_inverted_sound_has_the_mel_it_came_from() -> None:
    mel = spectrogram(knocks(2), LDM)
    sound = invert(mel[None], LDM, generator=torch.Generator().manual_seed(0))[0]
    again = spectrogram(sound, LDM)
    assert again.shape == mel.shape
    loud = mel > 0.4
    assert (again - mel)[loud].abs().mean() < 0.04
    few = spectrogram(invert(mel[None], LDM, 1, torch.Generator().manual_seed(0))[0], LDM)
    assert (again - mel).abs().mean() < 0.9 * (few - mel).abs().mean(), "iterations help"


def test_batch_and_chunks_do_not_change_a_sample(monkeypatch) -> None:
    mel = torch.stack([spectrogram(knocks(seed, 1.0), LDM) for seed in range(3)])
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = invert(mel, LDM, 4, seeds)
    monkeypatch.setattr(audio_inversion, "FRAMES_AT_ONCE", 80)
    in_chunks = invert(mel, LDM, 4, [torch.Generator().manual_seed(seed) for seed in range(3)])
    alone = invert(mel[1:2], LDM, 4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(in_chunks, together, atol=1e-3, rtol=0)
    torch.testing.assert_close(alone[0], together[1], atol=1e-3, rtol=0)


def test_silence_stays_silent_and_finite() -> None:
    sound = invert(torch.zeros(1, 128, 20), LDM)
    assert sound.isfinite().all() and sound.abs().max() < 1e-3


def test_wrong_inputs_are_told() -> None:
    with pytest.raises(ValueError, match=r"mel must be \[B, 128, F\] for mel_ldm, got \[1, 80, 9\]"):
        invert(torch.zeros(1, 80, 9), LDM)
    with pytest.raises(ValueError, match="not finite"):
        invert(torch.full((1, 128, 9), float("nan")), LDM)
    with pytest.raises(ValueError, match="2 frames are too few, mel_ldm needs 4"):
        griffin_lim(torch.zeros(1, 513, 2), LDM)
    with pytest.raises(ValueError, match="got 1 generators for 2 samples"):
        griffin_lim(torch.zeros(2, 513, 9), LDM, generator=[torch.Generator()])


def test_the_sound_at_another_rate_has_the_pitch_too() -> None:
    """The way to 22,050 Hz that the evaluation takes keeps frequencies, unlike the released conversion."""
    sound = resample(tone(1000, 1.0), 16000, 22050)
    assert abs(peak_frequency(sound, 22050) - 1000) < 2
