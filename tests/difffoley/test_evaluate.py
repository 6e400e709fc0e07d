"""The evaluation of sounds: ground truth and random sound, samples, conversions, two processes, protocol, bad input."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.audio import official_conversion, preset, resample, spectrogram
from mmtrain.config_errors import UserError
from mmtrain.difffoley.evaluate import FoleyEvaluation, FoleyTestSettings
from mmtrain.difffoley.sound_classifier import SmallMelception
from mmtrain.metrics.generation import frechet_distance
from mmtrain.metrics.intervals import wilson
from mmtrain.video_audio import ClipFormat

FORMAT = ClipFormat(
    fps=8, seconds=2.0, frame_size=16, contrast_frames=8, min_shift_frames=4, window_frames=16, window_mel_frames=120
)
CLIPS, BATCH = 12, 4
RATE = FORMAT.sample_rate


class FirstStage(nn.Module):
    """The mean level of the spectrogram is the latent."""

    def encode(self, mel: Tensor, sample: bool = True) -> Tensor:
        assert not sample and mel.shape[1] == 128
        return mel.mean(dim=(1, 2))


class Classifier(nn.Module):
    """Matching is what has the level that the features say."""

    def __init__(self) -> None:
        super().__init__()
        self.first_stage = FirstStage()

    def logits(self, latent: Tensor, features: Tensor) -> Tensor:
        return 0.01 - (latent - features.mean(dim=(1, 2))).abs()


def clicks(times: list[float], pitch: float) -> Tensor:
    """Decaying tones at times, [N] of a window."""
    time = torch.arange(FORMAT.window_samples) / RATE
    sound = torch.zeros(FORMAT.window_samples)
    for start in times:
        later = (time - start).clamp(min=0)
        sound += 0.3 * (time >= start) * torch.exp(-25 * later) * torch.sin(2 * math.pi * pitch * later)
    return sound


def make_clip(number: int) -> dict[str, Any]:
    times = [0.2 + 0.013 * number, 0.7 + 0.05 * (number % 5), 1.3 + 0.04 * (number % 7)]
    audio = clicks(times, 400 + 250 * (number % 4))
    mel = spectrogram(audio, preset("mel_ldm"))[:, : FORMAT.window_mel_frames]
    level = torch.full((16, 4), float(mel.mean()))
    return {
        "id": torch.tensor(number),
        "name": f"clip-{number}",
        "audio": audio,
        "mel": mel,
        "features": level,
        "shifted_features": level + (0.005 if number % 2 else 0.5),
        "wrong_features": level + 0.3,
        "onsets": torch.tensor(times),
    }


CLIP = [make_clip(number) for number in range(CLIPS)]


def batch_of(numbers: list[int]) -> dict[str, Any]:
    chosen = [CLIP[number] for number in numbers]
    keep = ("name", "onsets")
    return {k: [c[k] for c in chosen] if k in keep else torch.stack([c[k] for c in chosen]) for k in chosen[0]}


def batches(numbers: list[int]) -> list[dict[str, Any]]:
    return [batch_of(numbers[start : start + BATCH]) for start in range(0, len(numbers), BATCH)]


def evaluation(**settings: Any) -> FoleyEvaluation:
    torch.manual_seed(0)
    network = SmallMelception(5, width=4).eval()
    return FoleyEvaluation(FoleyTestSettings(**settings), FORMAT, feature_network=network, classifier=Classifier())


def other_sound(batch: dict[str, Any], step: int = 3) -> tuple[Tensor, Tensor]:
    """Sound and spectrogram of other clips: what a model that does not look at the pictures gives."""
    others = batch_of([(int(number) + step) % CLIPS for number in batch["id"]])
    return others["audio"][:, :-256], others["mel"]  # shorter, as inverted sound is


def test_ground_truth_is_perfect_and_random_sound_is_not() -> None:
    real, random = evaluation(audio="ground_truth"), evaluation(audio="random")
    for batch in batches(list(range(CLIPS))):
        real.add(batch, batch["audio"], batch["mel"])
        random.add(batch, *other_sound(batch))
    best, chance = real.compute(), random.compute()
    assert best["onset_f1"] == 1 and best["onset_offset"] < 0.02
    assert best["fid"] == pytest.approx(0, abs=1e-6) and best["kl"] == pytest.approx(0, abs=1e-4)
    assert best["align_acc"] == best["align_acc_real"] == 1
    assert chance["align_acc_real"] == 1 and chance["align_acc_wrong"] == 1 and chance["align_acc_shifted"] == 0.5
    assert chance["onset_f1"] < 0.8 and chance["onset_f1_low"] < chance["onset_f1"] < chance["onset_f1_high"]
    assert chance["kl"] > best["kl"]
    assert "seconds_per_clip" not in best, "nothing was generated, so no time"


def test_values_do_not_depend_on_batches_or_repeated_clips() -> None:
    one, other = evaluation(), evaluation()
    for batch in batches(list(range(CLIPS))):
        one.add(batch, *other_sound(batch))
    for numbers in ([7, 3], [11, 0, 1, 2, 3], [4, 5, 6, 8], [9, 10, 7]):
        other.add(batch_of(numbers), *other_sound(batch_of(numbers)))
    expected, got = one.compute(), other.compute()
    assert got.keys() == expected.keys()
    assert all(got[key] == pytest.approx(value, abs=1e-5) for key, value in expected.items())
    assert one.ids() == other.ids() == [f"clip-{number}" for number in range(CLIPS)]
    assert one.protocol().split(";")[0] == other.protocol().split(";")[0]


def test_scores_are_float32_under_autocast() -> None:
    plain, mixed = evaluation(), evaluation()
    for batch in batches(list(range(CLIPS))):
        plain.add(batch, *other_sound(batch))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed.add(batch, *other_sound(batch))
    assert mixed.compute() == plain.compute()


def test_samples_of_a_clip_are_counted_by_clip() -> None:
    twice = evaluation(samples=2)
    for batch in batches(list(range(CLIPS))):
        twice.add(batch, batch["audio"], batch["mel"], sample=0)
        twice.add(batch, *other_sound(batch), sample=1)
    found = twice.compute()
    passing = found["align_acc"] * CLIPS
    assert (found["align_acc_low"], found["align_acc_high"]) == pytest.approx(wilson(passing, CLIPS)[1:])
    once = evaluation()
    for batch in batches(list(range(CLIPS))):
        once.add(batch, *other_sound(batch))
    assert found["onset_f1"] == pytest.approx((1 + once.compute()["onset_f1"]) / 2)
    assert len(twice.ids()) == CLIPS
    records = twice.records()
    assert [(one["name"], one["sample"]) for one in records] == [(f"clip-{n}", s) for n in range(CLIPS) for s in (0, 1)]
    assert all(one["onset_f1"] == 1 and one["align_acc"] == 1 for one in records[::2])  # the clips' own sounds
    for metric in ("onset_f1", "align_acc"):
        assert sum(one[metric] for one in records) / len(records) == pytest.approx(found[metric], abs=1e-6)


def test_official_conversion_is_of_the_generated_spectrogram() -> None:
    official = evaluation(spec_conversion="official")
    generated, real = [], []
    for batch in batches(list(range(CLIPS))):
        waveform, mel = other_sound(batch)
        official.add(batch, torch.zeros_like(waveform), mel)
        sound = resample(batch["audio"][:, : waveform.shape[1]], RATE, 22050)
        with torch.no_grad():
            generated.append(official.feature_network(official_conversion(mel))["2048"])
            real.append(official.feature_network(spectrogram(sound, preset("mel_specvqgan")))["2048"])
    assert official.compute()["fid"] == pytest.approx(frechet_distance(torch.cat(generated), torch.cat(real)), rel=1e-5)


def test_times_are_a_clips_after_the_warm_up() -> None:
    timed = evaluation()
    for number, batch in enumerate(batches([*range(CLIPS), *range(CLIPS)])):
        parts = {"diffusion": 100.0 if number < 3 else 8.0 + number, "inversion": 4.0}
        timed.add(batch, batch["audio"], batch["mel"], parts | ({"features": 2.0} if number < 4 else {}))
    found = timed.compute()
    assert found["seconds_diffusion"] == 12 / 4 and found["seconds_inversion"] == 1 and found["seconds_features"] == 0.5
    assert found["seconds_per_clip"] == 4.5 and "seconds_decode" not in found
    with pytest.raises(ValueError, match="seconds must be of"):
        timed.add(batch_of([0]), CLIP[0]["audio"][None], CLIP[0]["mel"][None], {"vae": 1.0})


def test_protocol_tells_what_decides(tmp_path: Path) -> None:
    first, second, fewer = evaluation(), evaluation(spec_conversion="official", samples=1), evaluation()
    for batch in batches(list(range(CLIPS))):
        for one in (first, second):
            one.add(batch, batch["audio"], batch["mel"])
    for batch in batches(list(range(4))):
        fewer.add(batch, batch["audio"], batch["mel"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in (first, second, fewer):
            one.compute()
    words = first.protocol()
    for part in (
        f"{CLIPS} clips (ids sha256",
        "windows of 1.92 s",
        "Griffin-Lim 32",
        "feature network: given (",
        "80-mel of the sound",
    ):
        assert part in words, part
    assert len({one.protocol().split(":")[0] for one in (first, second, fewer)}) == 3
    assert first.write_ids(tmp_path).read_text().splitlines() == [f"clip-{number}" for number in range(CLIPS)]
    drawn = first.figures(tmp_path, "set-")
    assert [one["file"] for one in drawn] == ["figures/set-onset_f1.png", "figures/set-alignment.png"]
    assert all((tmp_path / one["file"]).stat().st_size > 5000 for one in drawn)


def test_without_networks_and_onsets_the_rest_is_measured() -> None:
    with pytest.warns(UserWarning, match=r"test\.feature_network is not set.*test\.alignment_classifier is not set"):
        bare = FoleyEvaluation(FoleyTestSettings(), FORMAT)
    for batch in batches(list(range(4))):
        del batch["onsets"], batch["name"]
        bare.add(batch, batch["audio"], batch["mel"])
    found = bare.compute()
    assert {key.partition("_")[0] for key in found} == {"onset"} and found["onset_f1"] == 1
    assert bare.ids() == ["0", "1", "2", "3"]


def test_sound_that_diverged_scores_nothing() -> None:
    own = evaluation()
    batch = batch_of([0, 1])
    waveform = batch["audio"].clone()
    waveform[1, 5] = math.nan
    with pytest.warns(UserWarning, match=r"1 generated sound\(s\) are not finite"):
        own.add(batch, waveform, batch["mel"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = own.compute()
    assert found["onset_f1"] == 0.5 and math.isnan(found["fid"]) and math.isnan(found["kl"])


def test_bad_input() -> None:
    with pytest.raises(UserError, match=r"test\.audio: 'silent', must be one of generated, ground_truth, random"):
        FoleyTestSettings(audio="silent")
    with pytest.raises(UserError, match=r"test\.spec_conversion: 'own'"):
        FoleyTestSettings(spec_conversion="own")
    with pytest.raises(UserError, match=r"test\.samples: 0"):
        FoleyTestSettings(samples=0)
    with pytest.raises(UserError, match=r"test\.feature_network: .*none\.ckpt: no such"):
        FoleyEvaluation(FoleyTestSettings(feature_network="none.ckpt"), FORMAT)
    batch = batch_of([0])
    del batch["audio"]
    with pytest.raises(UserError, match="data: the clips have no sound"):
        evaluation().add(batch, CLIP[0]["audio"][None], CLIP[0]["mel"][None])
