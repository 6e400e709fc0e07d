"""The world of impacts: its physics, that eye and ear can tell classes and times, and that it is reproducible."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from datamodules.impact_physics import EDGE, FLOOR, LEFT, MIN_GAP, RIGHT, Scene, loudness, simulate
from datamodules.impact_pictures import LOOKS, frames_of
from datamodules.impact_sounds import MATERIALS, strike
from datamodules.impacts import FORMAT, Impacts
from mmtrain.audio import clip_spectrogram, preset
from mmtrain.checkpoint import plain
from mmtrain.config_errors import UserError
from mmtrain.metrics.onsets import detect_onsets, score_onsets
from mmtrain.video_audio import Clip


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    world = Impacts({"test": 200})
    return [world.clip("test", index) for index in range(96)]


@cache  # several tests look at the same ones
def _scenes(seconds: float, number: int) -> list[Scene]:
    return [simulate(np.random.default_rng([7, index]), seconds) for index in range(number)]


@pytest.mark.parametrize(("seconds", "number"), [(5.0, 60), (10.0, 10), (60.0, 1)])
def test_contacts_keep_their_distance_and_number(seconds: float, number: int) -> None:
    scenes = _scenes(seconds, number)
    for scene in scenes:
        times = np.array([contact.time for contact in scene.contacts])
        assert round(0.6 * seconds) <= len(times) <= 2 * seconds
        assert np.diff(times).min() >= MIN_GAP - 1e-9
        assert times[0] >= EDGE and times[-1] <= seconds - EDGE
        assert all(-10 <= loudness(contact.speed) <= 0 for contact in scene.contacts)
    if number >= 60:
        assert {len(scene.radii) for scene in scenes} == {1, 2, 3}
        assert {contact.surface for scene in scenes for contact in scene.contacts} == {"floor", "left", "right", "body"}
        assert 5 < np.mean([len(scene.contacts) for scene in scenes]) < 8


def test_bodies_stay_in_the_box_and_touch_exactly_at_contacts() -> None:
    for scene in _scenes(5.0, 60):
        times = np.linspace(0, 5, 300)
        for body, radius in enumerate(scene.radii):
            x, y = scene.positions(body, times).T
            assert y.max() <= FLOOR - radius + 1e-6
            assert x.min() >= LEFT + radius - 1e-6 and x.max() <= RIGHT - radius + 1e-6
        for contact in scene.contacts:
            now = np.array([contact.time])
            places = [scene.positions(body, now)[0] for body in contact.bodies]
            radii = [scene.radii[body] for body in contact.bodies]
            distance = {
                "floor": FLOOR - places[0][1] - radii[0],
                "left": places[0][0] - LEFT - radii[0],
                "right": RIGHT - places[0][0] - radii[0],
                "body": np.hypot(*(places[0] - places[-1])) - sum(radii),
            }[contact.surface]
            assert abs(distance) < 1e-6


def test_bodies_do_not_pass_through_each_other() -> None:
    for scene in _scenes(5.0, 60):
        for one in range(len(scene.radii)):
            for other in range(one):
                start = max(scene.flights[one][0].time, scene.flights[other][0].time)
                times = np.linspace(start, 5, 300)
                away = np.linalg.norm(scene.positions(one, times) - scene.positions(other, times), axis=1)
                assert away.min() >= scene.radii[one] + scene.radii[other] - 1e-6


def test_clip_holds_what_the_format_says(clips: list[Clip]) -> None:
    for clip in clips:
        assert clip.frames.shape == (40, 3, 64, 64) and clip.frames.dtype == np.uint8
        assert clip.audio.shape == (80000,) and clip.audio.dtype == np.float32
        assert 0.1 < np.abs(clip.audio).max() < 1.0
        assert all(type(time) is float for time in clip.onsets)
    assert [clip.label for clip in clips[:9]] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert len({clip.id for clip in clips}) == len(clips)


def test_another_format_shows_the_same_world() -> None:
    form = replace(FORMAT, fps=16.0, frame_size=96, sample_rate=32000)
    one, other = Impacts({"test": 1}).clip("test", 0), Impacts({"test": 1}, format=form).clip("test", 0)
    assert other.frames.shape == (80, 3, 96, 96) and other.audio.shape == (160000,)
    assert other.onsets == one.onsets


def test_same_seed_same_clip_and_another_seed_another() -> None:
    first = Impacts({"train": 3, "test": 3}, seed=4)
    again = Impacts({"test": 3, "train": 3}, seed=4)
    one, two = first.clip("train", 2), again.clip("train", 2)
    assert np.array_equal(one.frames, two.frames) and np.array_equal(one.audio, two.audio) and one.onsets == two.onsets
    for other in (first.clip("test", 2), first.clip("train", 1), Impacts({"train": 3}, seed=5).clip("train", 2)):
        assert other.onsets != one.onsets


def test_the_description_is_plain_and_tells_worlds_apart() -> None:
    world = Impacts({"test": 2}, seed=1)
    assert plain(world.describe()) == world.describe()
    assert world.describe() != Impacts({"test": 2}, seed=2).describe()
    assert world.sizes() == {"test": 2}
    assert len(world.class_names) == 8 and set(LOOKS) == set(world.class_names)


def _nearest_mean(values: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the second half under the class means of the first."""
    half = len(values) // 2
    means = np.stack([values[:half][labels[:half] == label].mean(0) for label in range(8)])
    guesses = np.linalg.norm(values[half:, None] - means, axis=2).argmin(1)
    return float((guesses == labels[half:]).mean())


def test_classes_can_be_heard_and_seen(clips: list[Clip]) -> None:
    labels = np.array([clip.label for clip in clips])
    sounds = np.stack([clip_spectrogram(clip.audio, preset("mel_ldm"), 5.0).amax(1).numpy() for clip in clips])
    looks = []
    for clip in clips:
        frames = clip.frames[:, :, 4:52, 6:58].astype(np.float32) / 255  # without floor and walls
        away = np.abs(frames - np.median(frames, axis=0)).max(axis=1)
        colours = frames.transpose(0, 2, 3, 1)[away > 0.15]
        colours = colours[colours.max(1) < 0.97]
        looks.append(np.concatenate([np.median(colours, axis=0), np.percentile(colours, 20, axis=0)]))
    assert _nearest_mean(sounds, labels) >= 0.95
    assert _nearest_mean(np.stack(looks), labels) >= 0.6  # from colour alone; chance is 0.125


@pytest.mark.parametrize("seconds", [5.0, 4.096])
def test_onsets_of_the_sound_are_the_contacts(clips: list[Clip], seconds: float) -> None:
    """The evaluator's proof: real sound scores 1, another clip's sound near what chance gives."""
    num = round(seconds * 16000)
    found = [detect_onsets(torch.from_numpy(clip.audio[:num]), 16000) for clip in clips]
    references = [torch.tensor(clip.onsets) for clip in clips]
    own = [score_onsets(times, reference, seconds) for times, reference in zip(found, references, strict=True)]
    assert np.mean([score.f1 for score in own]) == 1.0
    assert sum(score.distance for score in own) / sum(score.hits for score in own) < 0.004
    others = [score_onsets(found[place - 5], reference, seconds).f1 for place, reference in enumerate(references)]
    assert 0.1 < np.mean(others) < 0.4


def test_time_of_a_contact_can_be_read_between_frames() -> None:
    """The first frame after a contact changes with the instant of the contact, at the place of the contact."""
    scene = next(s for s in _scenes(5.0, 60) if len(s.radii) == 1 and s.contacts[0].surface == "floor")
    contact = scene.contacts[0]
    brightness = []
    for shift in (0.01, 0.05, 0.09):  # frames at these distances after the contact
        later = int(np.ceil(contact.time * 1000)) / 1000 + shift
        frames = frames_of(scene, "rubber", np.random.default_rng(0), 2, 1 / later, 64).astype(np.float32)
        column = frames[1].mean(0)[40:58, min(63, int(contact.x * 64))]
        brightness.append(column)
    assert np.abs(brightness[0] - brightness[1]).max() > 25 and np.abs(brightness[1] - brightness[2]).max() > 25


def test_smaller_bodies_sound_higher() -> None:
    peaks = []
    for radius in (0.07, 0.12):
        sound = strike(np.random.default_rng(0), MATERIALS[1], radius, 16000)
        spectrum = np.abs(np.fft.rfft(sound, 16000))[:1200]
        peaks.append(int(spectrum.argmax()))
    assert peaks[0] / peaks[1] == pytest.approx(0.12 / 0.07, rel=0.02)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(UserError, match=r"splits.train: -1"):
        Impacts({"train": -1})
    with pytest.raises(UserError, match=r"split: valid: must be one of test"):
        Impacts({"test": 1}).clip("valid", 0)
    with pytest.raises(IndexError):
        Impacts({"test": 1}).clip("test", 1)
    with pytest.raises(ValueError, match="no scene"):
        simulate(np.random.default_rng(0), 0.2)
