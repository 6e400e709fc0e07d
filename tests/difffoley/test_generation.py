"""Clips of any length: that windows keep with the picture, add up to one whole, and stay as few at once as asked."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.difffoley.generation import (
    SamplerSettings,
    check_sampler,
    decode_long,
    generate_latents,
    generate_long,
    join,
    long_latents,
    run_sampler,
    starting_noise,
    to_waveform,
)
from mmtrain.difffoley.guidance import GuidanceSettings
from mmtrain.difffoley.windows import consecutive_windows, plan_windows, sound_frames
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.video_audio import ClipFormat

SCHEDULE, CLIP = NoiseSchedule(), ClipFormat()
PLAIN = GuidanceSettings(scale=1.0)
COLUMN = 8 * 256 / 16000  # seconds
SMALL = ClipFormat(fps=8.0, seconds=5.0, window_frames=16, window_mel_frames=128)
FORMATS = [
    CLIP,
    SMALL,
    ClipFormat(window_frames=33),
    ClipFormat(fps=8.0, seconds=5.0, window_frames=32, window_mel_frames=240),
]


class Network(nn.Module):
    """Noise 0.1 x, whatever the window; remembers how many latents it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def context(self, features: Tensor) -> Tensor:
        return features

    def null_context(self, kind: str, batch: int, frames: int) -> Tensor:
        return torch.zeros(batch, frames, 1)

    def forward(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        return 0.1 * x


class Clock(Network):
    """A flow network whose latents become the time that the features tell, at each column of the window."""

    def __init__(self, clip: ClipFormat) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, x: Tensor, t: float, context: Tensor) -> Tensor:
        seconds = context[:, :1, 0] + COLUMN * torch.arange(x.shape[-1])
        return (seconds[:, None, None] - x) / (t / 1000)  # network time 1000 (1 - flow time)


class FirstStage(nn.Module):
    """A column of the latent is 8 mel frames of its mean."""

    factor, latent_channels = 8, 4

    def decode(self, z: Tensor) -> Tensor:
        return z.mean(1).repeat_interleave(8, -1).repeat_interleave(8, -2)

    def decode_tiled(self, z: Tensor, tile: int, overlap: int) -> Tensor:
        assert 0 < overlap < tile < z.shape[-1]
        return self.decode(z)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clock_features(frames: int, clip: ClipFormat) -> Tensor:
    return (torch.arange(frames) / clip.fps)[:, None]


@pytest.mark.parametrize("clip", FORMATS)
def test_windows_cover_the_clip_and_keep_with_the_picture(clip: ClipFormat):
    width = clip.window_mel_frames // 8
    for features in (*range(1, 90), 240, 1200):
        windows, columns = plan_windows(features, clip)
        assert windows[0].column == 0 and windows[0].feature == 0
        assert windows[-1].column + width == columns >= sound_frames(features, clip) / 8
        for window, following in pairwise(windows):
            assert 0 < following.column - window.column <= width * 0.6
        for window in windows:
            assert 0 <= window.feature <= max(features - clip.window_frames, 0)
            apart = abs(window.feature / clip.fps - window.column * COLUMN)
            longer = clip.window_frames / clip.fps - clip.window_seconds  # picture than sound in a window
            last = COLUMN if longer <= 0 else 1.5 * COLUMN + longer
            assert apart <= (last if window is windows[-1] else COLUMN / 2) + 1e-9
        assert (sound_frames(features, clip) - 1) * 256 >= features / clip.fps * clip.sample_rate


@pytest.mark.parametrize("long", ["overlapping", "consecutive"])
def test_picture_and_sound_of_a_minute(long: str):
    """Overlapping windows stay within a column; the released way is 0.192 s further off with every window's latent."""
    frames = 240
    sampler = SamplerSettings("euler", steps=2, long=long)
    z = long_latents(Clock(CLIP), clock_features(frames, CLIP), CLIP, SCHEDULE, "flow", PLAIN, sampler)
    told = z.mean((1, 2))  # seconds [pieces, columns]
    played = COLUMN * torch.arange(told.numel()).view(told.shape)
    apart = (told - played).abs().amax(1)
    if long == "overlapping":
        assert len(z) == 1 and z.shape[-1] * COLUMN > 60 and apart.item() < COLUMN
    else:
        torch.testing.assert_close(apart, 0.192 * torch.arange(7), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("name", "window_batch"), [("dpm_solver", 1), ("ddim", 4), ("plms", 3)])
def test_windows_of_a_local_network_add_up_to_the_whole(name: str, window_batch: int):
    """If the noise does not depend on the window, the averaged predictions are those of one pass over everything."""
    features, network = torch.zeros(100, 1), Network()
    sampler = SamplerSettings(name, steps=6, window_batch=window_batch)
    told = []
    guidance = GuidanceSettings(scale=4.5)
    z = long_latents(
        network, features, CLIP, SCHEDULE, "eps", guidance, sampler, generator=seeded(),
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    noise = starting_noise(tuple(z.shape), seeded(), features)
    whole = run_sampler(lambda x, t: 0.1 * x, noise, SCHEDULE, sampler)
    torch.testing.assert_close(z, whole, rtol=1e-4, atol=1e-4)
    assert network.most == 2 * window_batch  # guidance doubles it
    assert told == [(i + 1, 6) for i in range(6)]


def test_one_window_is_the_window_alone():
    features = torch.randn(32, 1, generator=seeded(1))
    sampler = SamplerSettings(steps=4)
    z = long_latents(Network(), features, CLIP, SCHEDULE, "v", PLAIN, sampler, generator=seeded())
    noise = starting_noise((1, 4, 16, 64), seeded(), features)
    alone = generate_latents(Network(), features[None], noise, SCHEDULE, "v", PLAIN, sampler)
    assert torch.equal(z, alone)


def test_short_clip_is_cut_to_its_length():
    features = torch.zeros(6, 1)
    mel = generate_long(Network(), FirstStage(), features, CLIP, SCHEDULE, "eps", PLAIN, SamplerSettings(steps=2))
    assert mel.shape == (1, 128, 95) and mel.min() >= 0 and mel.max() <= 1  # 1.5 s are 93.75 frames, and one more
    with pytest.raises(UserError, match="features: none"):
        long_latents(Network(), features[:0], CLIP, SCHEDULE, "eps", PLAIN, SamplerSettings())


def test_consecutive_windows_drop_the_tail_and_join():
    assert [w.feature for w in consecutive_windows(100, CLIP)] == [0, 32, 64]
    sampler, told = SamplerSettings(steps=2, window_batch=2, long="consecutive"), []
    mel = generate_long(
        Network(), FirstStage(), torch.zeros(100, 1), CLIP, SCHEDULE, "eps", PLAIN, sampler, generator=seeded(),
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    assert mel.shape == (3, 128, 512) and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not torch.equal(mel[0], mel[1])  # noise of its own
    assert torch.equal(join(torch.tensor([[1, 2], [3, 4]])), torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(UserError, match="consecutive, needs at least 32 video frames at 4 frames/s, got 31"):
        consecutive_windows(31, CLIP)


def test_long_spectrogram_is_decoded_in_tiles():
    z = torch.rand(1, 4, 16, 100)
    mel = decode_long(FirstStage(), z, 777, CLIP)
    torch.testing.assert_close(mel, FirstStage().decode(z)[..., :777])


def test_waveform_has_the_length_asked_for():
    mel = torch.full((2, 128, 20), 0.3)
    for samples, expected in ((None, 19 * 256), (4000, 4000), (6000, 6000)):
        waveform = to_waveform(mel, iterations=2, generator=seeded(), samples=samples)
        assert waveform.shape == (2, expected) and waveform.abs().max() <= 1
    assert torch.equal(
        to_waveform(mel, iterations=2, generator=seeded()), to_waveform(mel, iterations=2, generator=seeded())
    )


def test_combinations_that_mean_nothing_are_refused():
    guided = GuidanceSettings(4.5, 50.0)
    for sampler, objective, guidance, message in (
        (SamplerSettings("plms"), "eps", guided, r"guidance\.classifier_scale: 50, PLMS has no classifier guidance"),
        (SamplerSettings("euler"), "eps", PLAIN, "objective 'eps' is sampled with dpm_solver, ddim or plms"),
        (SamplerSettings("ddim"), "flow", PLAIN, r"sampler\.name: ddim, objective 'flow' is sampled with euler"),
        (SamplerSettings("dpm_solver", eta=0.5), "eps", PLAIN, r"sampler\.eta: 0\.5, only ddim adds noise"),
    ):
        with pytest.raises(UserError, match=message):
            check_sampler(sampler, objective, guidance)
    for values, message in (
        ({"name": "dpm"}, r"sampler\.name: 'dpm', must be one of ddim, dpm_solver, plms, euler"),
        ({"long": "none"}, r"sampler\.long: 'none'"),
        ({"steps": 0}, r"sampler\.steps: 0, must be 1 or more"),
        ({"window_batch": 0}, r"sampler\.window_batch: 0"),
        ({"eta": -1.0}, r"sampler\.eta: -1\.0"),
    ):
        with pytest.raises(UserError, match=message):
            SamplerSettings(**values)
    with pytest.raises(UserError, match=r"format\.window_mel_frames: 500, must be a multiple of 8"):
        plan_windows(40, ClipFormat(window_mel_frames=500))
