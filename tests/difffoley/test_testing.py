"""`test`: sounds that depend on the clip alone, times, the proofs of the evaluators, and what is left in the folder."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.difffoley.alignment import AlignmentClassifier
from mmtrain.difffoley.evaluate import FoleyTestSettings
from mmtrain.difffoley.guidance import GuidanceSettings
from mmtrain.difffoley.module import LatentDiffusion
from mmtrain.difffoley.networks import AlignmentNetwork
from mmtrain.difffoley.records import clip_values
from mmtrain.difffoley.testing import SoundTest, Stopwatch
from mmtrain.media import read_wav
from tests.difffoley.foley_data import (
    CLASSIFIER,
    FIRST_STAGE,
    FORMAT,
    OPTIM,
    UNET,
    WIDTH,
    TinyData,
    clip,
    test_batch,
    train,
    trainer_of,
)


def diffusion(**options: object) -> LatentDiffusion:
    torch.manual_seed(0)
    given = {"first_stage": FIRST_STAGE, "optim": OPTIM, "sampler": {"steps": 2}, **options}
    return LatentDiffusion(FORMAT, UNET, **given).eval()


def attached(module: LatentDiffusion, folder: Path) -> LatentDiffusion:
    module.trainer = trainer_of(folder)
    return module


def run_test(module: LatentDiffusion, folder: Path, data: TinyData) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that networks for IS and Align Acc are not there
        return trainer_of(folder).test(module, data, verbose=False)[0]


def test_a_clips_sound_does_not_depend_on_its_batch(tmp_path) -> None:
    module = attached(diffusion(), tmp_path)
    test = SoundTest(module, "tiny")
    waveforms, mels, seconds = test.sounds(test_batch([clip(0), clip(1), clip(2)]), 0)
    alone, mel, _ = test.sounds(test_batch([clip(2)]), 0)
    assert torch.allclose(mels[2:], mel, atol=1e-5)
    correlation = np.corrcoef(waveforms[2].numpy(), alone[0].numpy())[0, 1]
    assert correlation > 0.99  # the phases are the same; Griffin-Lim magnifies rounding
    assert seconds.keys() == {"diffusion", "decode", "inversion"} and min(seconds.values()) > 0
    assert waveforms.shape == (3, (FORMAT.window_mel_frames - 1) * 256)
    _, another, _ = test.sounds(test_batch([clip(2)]), 1)
    assert not torch.allclose(mel, another, atol=1e-3)  # another sample of the same clip


def test_random_sounds_are_of_the_clip_before(tmp_path) -> None:
    module = attached(diffusion(test=FoleyTestSettings(audio="random")), tmp_path)
    test = SoundTest(module, "tiny")
    clips = [clip(number) for number in range(5)]
    first, mel, seconds = test.sounds(test_batch(clips[:3]), 0)
    assert torch.equal(first, torch.stack([clips[n]["audio"] for n in (2, 0, 1)])) and not seconds
    second, _, _ = test.sounds(test_batch(clips[3:]), 0)
    assert torch.equal(second, torch.stack([clips[n]["audio"] for n in (2, 3)]))
    assert torch.equal(mel, torch.stack([clips[n]["mel"] for n in (2, 0, 1)]))
    given = test_batch(clips) | {"other_audio": torch.ones(5, 9), "other_mel": torch.zeros(5, 128, 64)}
    assert torch.equal(test.sounds(given, 0)[0], given["other_audio"])  # what the data chose is taken
    assert torch.equal(test.sounds(given, 0)[1], given["other_mel"])


def test_a_test_leaves_numbers_sounds_and_pictures(tmp_path) -> None:
    module = diffusion(test=FoleyTestSettings(examples=2))
    metrics = run_test(module, tmp_path, TinyData(3, test_batch=2))
    wanted = {
        "onset_f1",
        "onset_precision",
        "onset_recall",
        "seconds_per_clip",
        "seconds_diffusion",
        "seconds_inversion",
    }
    assert {f"test/tiny/{name}" for name in wanted} <= metrics.keys()
    assert (tmp_path / "evaluated_ids.txt").read_text().split("\n")[:3] == ["clip 0", "clip 1", "clip 2"]
    drawn = [*(f"figures/tiny-generated-{n}.png" for n in (0, 1)), "figures/tiny-generated-onset_f1.png"]
    assert [figure["file"] for figure in module.figures] == drawn
    values = clip_values(tmp_path, "test/tiny/onset_f1")
    assert len(values) == 3 and np.mean(values) == pytest.approx(metrics["test/tiny/onset_f1"], abs=1e-6)
    assert clip_values(tmp_path, "test/tiny/fid") is None
    for figure in module.figures:
        assert (tmp_path / figure["file"]).stat().st_size > 5000
    samples, rate = read_wav(tmp_path / "figures" / "tiny-real-1.wav")
    assert rate == 16000 and np.allclose(samples, clip(1)["audio"].numpy(), atol=1e-4)
    assert "guidance 4.5, null condition learned" in module.protocols()["tiny"]
    assert "3 clips" in module.protocols()["tiny"]


def test_the_own_sound_is_taken_as_it_is(tmp_path) -> None:
    module = diffusion(test=FoleyTestSettings(audio="ground_truth", examples=1))
    metrics = run_test(module, tmp_path, TinyData(2, test_batch=2))
    assert "test/tiny/onset_f1" in metrics and "test/tiny/seconds_diffusion" not in metrics
    samples, _ = read_wav(tmp_path / "figures" / "tiny-ground_truth-0.wav")
    assert np.allclose(samples, clip(0)["audio"].numpy(), atol=1e-4)


def test_rows_have_the_names_of_the_paper(tmp_path) -> None:
    names = {
        "Diff-Foley (no guidance)": GuidanceSettings(1.0),
        "Diff-Foley (CFG)": GuidanceSettings(4.5),
        "Diff-Foley (double guidance)": GuidanceSettings(4.5, 50.0),
    }
    for name, guidance in names.items():
        assert diffusion(guidance=guidance).method == name
    assert diffusion(test=FoleyTestSettings(audio="ground_truth")).method == "Ground truth"
    assert diffusion(test=FoleyTestSettings(audio="random")).method == "Random audio"
    flow = diffusion(objective="flow", sampler={"name": "euler", "steps": 4})
    assert flow.method == "Diff-Foley (CFG, flow 4 steps)"


def test_a_classifier_guides_and_is_not_kept_in_the_checkpoint(tmp_path) -> None:
    torch.manual_seed(0)
    guide = AlignmentClassifier(FORMAT, CLASSIFIER, FIRST_STAGE, optim=OPTIM)
    path = train(tmp_path / "guide", guide, TinyData(4, 4, pairs=True), 1)
    options = {"first_stage": str(path), "guidance_classifier": str(path)}
    plain = attached(diffusion(**options, guidance=GuidanceSettings(1.0)), tmp_path)
    double = diffusion(**options, guidance=GuidanceSettings(1.0, 50.0))
    assert plain.guide is None
    assert double.state_dict().keys() == plain.state_dict().keys()
    metrics = run_test(double, tmp_path, TinyData(1, test_batch=1))  # in inference mode, where gradients are off
    assert metrics["test/tiny/seconds_diffusion"] > 0 and double.guide is not None
    batch = test_batch([clip(0)])
    mels = [SoundTest(module, "tiny").sounds(batch, 0)[1] for module in (plain, double)]
    assert mels[0].isfinite().all() and not torch.allclose(*mels, atol=1e-4)
    raw = GuidanceSettings(1.0, 50.0, classifier_context="raw_full")
    with pytest.raises(
        UserError, match=r"guidance_classifier: .*raw_full, shows .* of width 16, .*context_width is 32"
    ):
        SoundTest(attached(diffusion(**options, guidance=raw), tmp_path), "tiny").sounds(batch, 0)


def test_the_released_sampling_is_reachable() -> None:
    """Its null condition, and the classifier that sees the features of the whole clip past its embedder."""
    guidance = {"classifier_scale": 50.0, "null_condition": "embedded_zeros", "classifier_context": "raw_full"}
    module = diffusion(guidance=guidance, guidance_classifier="guide.ckpt", null_condition="raw_zeros")
    module.trainer = trainer_of(Path())
    guide = AlignmentNetwork(**CLASSIFIER | {"context_width": WIDTH}).eval()
    module.lent["guide"] = guide
    contexts = []
    guide.register_forward_pre_hook(lambda _, given: contexts.append(given[2]))
    module._check_null()  # the released null condition needs no training with it
    batch = test_batch([clip(0)])
    SoundTest(module, "tiny").sounds(batch, 0)
    assert all(torch.equal(context, batch["features"]) for context in contexts) and len(contexts) == 2
    whole = batch | {"clip_features": torch.randn(1, 7, WIDTH)}
    SoundTest(module, "tiny").sounds(whole, 0)
    assert torch.equal(contexts[-1], whole["clip_features"])


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    assert watch("decode", lambda: 3) == 3
    before = watch.seconds["decode"]
    watch("decode", lambda: None)
    assert watch.seconds.keys() == {"decode"} and watch.seconds["decode"] >= before


def test_an_empty_batch_is_left_out(tmp_path) -> None:
    test = SoundTest(attached(diffusion(test=FoleyTestSettings(examples=0)), tmp_path), "tiny")
    test.run({})
    assert test.batches == 0
