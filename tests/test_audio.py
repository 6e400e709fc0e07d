"""Mel spectrograms against the numbers of librosa and of the released evaluation of Diff-Foley."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.audio import (
    PRESETS,
    check_rate,
    clip_spectrogram,
    compress,
    decompress,
    filter_bank,
    official_conversion,
    preset,
    resample,
    spectrogram,
)
from mmtrain.config_errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "difffoley" / "mel_pipeline.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


def chirp(sample_rate: int) -> np.ndarray:
    t = np.arange(10 * sample_rate) / sample_rate
    return 0.4 * np.sin(2 * np.pi * (80 * t + 175 * t**2)) + 0.05 * np.sin(2 * np.pi * 2500 * t)


def test_mels_of_both_hops_match_librosa(golden) -> None:
    mel = clip_spectrogram(chirp(16000), preset("mel_ldm"), 10)
    assert mel.shape == (128, 625) and mel.dtype == torch.float32
    np.testing.assert_allclose(mel, golden["mel128_16k_hop256_reflect"], atol=3e-4)
    zero_padded = golden["mel128_16k_hop256_constant_first3_last3"]
    assert np.abs(mel[:, [0, 1, 2, -3, -2, -1]].numpy() - zero_padded).max() > 0.05, "borders reflect"
    mel = clip_spectrogram(chirp(16000), preset("mel_cavp"), 10)
    assert mel.shape == (128, 640)
    np.testing.assert_allclose(mel[:, ::4], golden["mel128_16k_hop250_reflect_every4"], atol=3e-4)


def test_mel_of_specvqgan_matches_librosa(golden) -> None:
    mel = spectrogram(chirp(22050), preset("mel_specvqgan"))[:, :860]
    np.testing.assert_allclose(mel[:, ::4], golden["mel80_22k_hop256_reflect_every4"], atol=3e-4)


def test_filter_banks_match_librosa(golden) -> None:
    bank = filter_bank(PRESETS["mel_ldm"]).numpy()
    np.testing.assert_allclose(bank[[0, 64, 127]], golden["mel_filter_16k_128_row0_row64_row127"], atol=1e-8)
    np.testing.assert_allclose(bank.sum(1), golden["mel_filter_16k_128_nonzero_rows_sum"], rtol=1e-5)
    assert (bank.argmax(1) == golden["mel_filter_16k_128_argmax"]).all()
    bank = filter_bank(PRESETS["mel_specvqgan"]).numpy()
    np.testing.assert_allclose(bank[[0, 40, 79]], golden["mel_filter_22k_80_row0_row40_row79"], atol=1e-8)
    assert filter_bank(PRESETS["mel_ldm"]) is filter_bank(PRESETS["mel_ldm"], "cpu"), "computed once"


def test_official_conversion_matches_the_released_helper(golden) -> None:
    mel = clip_spectrogram(chirp(16000), preset("mel_ldm"), 10)[None, :, :512]
    converted = official_conversion(mel)[0]
    assert tuple(converted.shape) == tuple(golden["transform_spec_kaiser_best_shape"])
    error = np.abs(converted[:, ::4].numpy() - golden["transform_spec_kaiser_best_every4"])
    assert error.max() < 2e-3 and error.mean() < 2e-5
    direct = spectrogram(resample(chirp(16000), 16000, 22050), preset("mel_specvqgan"))[:, :706]
    assert 0.07 < (direct - converted).abs().mean() < 0.11, "its faults are kept"


def test_clips_are_cut_and_padded_and_batched() -> None:
    sound = torch.randn(2, 3, 30000) * 0.1
    padded = clip_spectrogram(sound, preset("mel_cavp"), 2.5)
    assert padded.shape == (2, 3, 128, 160)
    alone = clip_spectrogram(torch.cat([sound[1, 2], torch.zeros(10000)]), preset("mel_cavp"), 2.5)
    torch.testing.assert_close(padded[1, 2], alone)
    assert (padded[..., -30:] == 0).all(), "silence is 0"
    assert clip_spectrogram(sound, preset("mel_ldm"), 1.0).shape[-1] == 63
    with pytest.raises(ValueError, match="512 samples, mel_ldm needs over 512"):
        spectrogram(sound[..., :512], preset("mel_ldm"))


def test_autocast_does_not_lower_the_precision() -> None:
    sound = chirp(16000)[:16000]
    wanted = spectrogram(sound, preset("mel_ldm"))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(spectrogram(sound, preset("mel_ldm")), wanted, atol=0, rtol=0)


def test_a_bank_first_used_in_validation_serves_training() -> None:
    small = replace(preset("mel_ldm"), n_mels=20)
    with torch.inference_mode():
        spectrogram(torch.zeros(2000), small)
    sound = torch.randn(2000, requires_grad=True)
    spectrogram(sound, small).sum().backward()
    assert sound.grad.isfinite().all() and sound.grad.abs().sum() > 0


def test_compression_has_its_ends_and_an_inverse() -> None:
    magnitudes = torch.tensor([0.0, 1e-4, 1e-3, 1.0, 10.0, 100.0], dtype=torch.float64)
    mel = compress(magnitudes)
    torch.testing.assert_close(mel, torch.tensor([0, 0, 0.2, 0.8, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(decompress(mel), magnitudes.clamp(1e-4, 10))


@pytest.mark.parametrize(("source", "target"), [(16000, 22050), (44100, 16000), (48000, 16000)])
def test_resampling_keeps_a_tone(source: int, target: int) -> None:
    t = np.arange(source) / source
    got = resample(np.sin(2 * np.pi * 1000 * np.stack([t, t + 0.1])), source, target)
    assert got.shape == (2, target) and got.dtype == torch.float32
    wanted = np.sin(2 * np.pi * 1000 * np.arange(target) / target)
    np.testing.assert_allclose(got[0, 500:-500], wanted[500:-500], atol=5e-3)


def test_wrong_names_and_rates_are_told() -> None:
    with pytest.raises(UserError, match=r"'mel_lmd' is unknown.*did you mean mel_ldm"):
        preset("mel_lmd")
    check_rate(16000, preset("mel_ldm"), "a.wav")
    with pytest.raises(UserError, match=r"a\.wav: sample rate 44100 Hz, mel preset mel_ldm is for 16000 Hz"):
        check_rate(44100, preset("mel_ldm"), "a.wav")
