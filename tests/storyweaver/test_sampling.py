"""Samplers reach the picture, guidance takes one network call a step, and no picture depends on its neighbours."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmtrain.attention import install
from mmtrain.config_errors import UserError
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.story import Character, Frame
from mmtrain.storyweaver.guidance import GuidanceSettings, SpatialGuidance
from mmtrain.storyweaver.sampling import (
    SAMPLERS,
    SamplerSettings,
    decode,
    draw,
    draw_latents,
    frame_noise,
    latent_size,
    make_scheduler,
    story_seeds,
)
from mmtrain.storyweaver.text import EncodedFrames, PromptEncoder, TextSettings
from tests.storyweaver.tiny import tiny_components

FOX = Character("Eddy", "fox", "this red fox wears grey clothes")
ROBOT = Character("Rody", "robot", "this yellow robot wears grey clothes")
FRAMES = [
    Frame("a red fox in the snow.", (FOX,), "2.5D cartoon style."),
    Frame("a fox and a robot in the snow.", (FOX, ROBOT), "2.5D cartoon style."),
    Frame("a snow storm.", (), "2.5D cartoon style."),
]
LONG = Frame("a fox and a robot " + "in the snow and " * 12 + "again.", (FOX, ROBOT), "2.5D cartoon style.")
SIZE, LATENT = (16, 28), (8, 14)
FAST = SamplerSettings(steps=3, scale=3.0)


@pytest.fixture(scope="module")
def parts():
    components = tiny_components()
    for part in (components.unet, components.vae, components.text_encoder):
        part.requires_grad_(False)
    components.unet.conv_out.weight.mul_(3.0)  # fresh weights predict nearly nothing
    install(components.unet)
    return components


class Recorder(nn.Module):
    """Stands in for a UNet and keeps what it was given; predicts the noise of one known latent, or the context."""

    def __init__(self, clean: Tensor | None = None, objective: str = "eps", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.clean, self.objective, self.schedule = clean, objective, NoiseSchedule()
        self.inputs, self.times, self.contexts, self.biases = [], [], [], []

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, cross_attention_kwargs: dict | None):
        self.inputs.append(x)
        self.times.append(t)
        self.contexts.append(encoder_hidden_states)
        self.biases.append(cross_attention_kwargs)
        if self.clean is None:
            return SimpleNamespace(sample=encoder_hidden_states.mean((1, 2))[:, None, None, None].expand_as(x))
        alpha, sigma = self.schedule.alpha(float(t[0])), self.schedule.sigma(float(t[0]))
        noise = (x - alpha * self.clean) / sigma
        return SimpleNamespace(sample=noise if self.objective == "eps" else alpha * noise - sigma * self.clean)


def condition(value: float, count: int = 1) -> EncodedFrames:
    return EncodedFrames(torch.full((count, 77, 8), value), [[]] * count, torch.zeros(count, 0, 8), [0] * count)


def test_the_released_times_noise_and_seeds() -> None:
    scheduler = make_scheduler(SamplerSettings(), "eps")
    times = scheduler.timesteps.double()
    torch.testing.assert_close(times, torch.linspace(999, 0, 100).double(), atol=1e-3, rtol=0)
    assert abs(times[1] - 988.909) < 1e-3
    assert abs(float(scheduler.init_noise_sigma) - 14.6146) < 1e-4
    assert scheduler.config.prediction_type == "epsilon"
    assert make_scheduler(SamplerSettings(), "v").config.prediction_type == "v_prediction"
    assert story_seeds(1) == [655] and story_seeds(5) == [655, 115, 26, 760, 282]
    noise = frame_noise([655, 3, 655], (4, 8, 14))
    torch.manual_seed(655)
    assert torch.equal(noise[0], torch.randn(1, 4, 8, 14)[0]) and torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("objective", ["eps", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_one_picture_that_its_network_knows(name: str, objective: str) -> None:
    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    network = Recorder(clean, objective)
    sampler = SamplerSettings(name, steps=20, scale=1.0)
    found = draw_latents(network, condition(0.0), None, frame_noise([0], (4, 4, 4)), sampler, objective)
    residue = 0.03 * 4 if name == "ddim" else 0.01  # DDIM ends at the first training step, which has some noise
    assert (found - clean).abs().max() < residue
    assert len(network.times) == 20


def test_guidance_is_one_call_of_two_halves() -> None:
    noise, null = frame_noise([0, 1], (4, 4, 4)), torch.full((2, 77, 8), -1.0)
    asked = []

    class Bias:
        halves = 1

        def with_unconditional(self) -> "Bias":
            self.halves = 2
            return self

    class Maps:
        def at(self, t: Tensor, alpha: float) -> Bias:
            asked.append((t.tolist(), alpha))
            return Bias()

    network = Recorder()
    guided = draw_latents(network, condition(0.5, 2), null, noise, FAST, "eps", Maps(), 2.5)
    assert len(network.inputs) == FAST.steps and all(len(x) == 4 for x in network.inputs)
    assert all(torch.equal(x[:2], x[2:]) for x in network.inputs)
    assert torch.equal(network.contexts[0], torch.cat([null, condition(0.5, 2).context]))
    assert asked == [([999.0] * 2, 2.5), ([499.5] * 2, 2.5), ([0.0] * 2, 2.5)]
    assert all(t.shape == (4,) for t in network.times)
    assert all(given["attention_bias"].halves == 2 for given in network.biases)
    # prediction = -1 + 3 (0.5 + 1) = 3.5, as without guidance from a context of 3.5
    single = Recorder()
    alone = SamplerSettings(steps=3, scale=1.0)
    expected = draw_latents(single, condition(3.5, 2), None, noise, alone, "eps", Maps())
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-5)
    assert all(len(x) == 2 for x in single.inputs)
    assert all(given["attention_bias"].halves == 1 for given in single.biases)
    draw_latents(single, condition(3.5, 2), None, noise, alone, "eps")
    assert single.biases[-1] is None


def test_latents_stay_float32_beside_a_half_precision_network() -> None:
    network = Recorder(dtype=torch.bfloat16)
    steps, noise = [], frame_noise([0], (4, 4, 4))
    null = torch.zeros(1, 77, 8)
    done = lambda n, total: steps.append((n, total))  # noqa: E731
    found = draw_latents(network, condition(0.5), null, noise, FAST, "eps", progress=done)
    assert found.dtype == torch.float32 and steps == [(1, 3), (2, 3), (3, 3)]
    assert {x.dtype for x in network.inputs} == {x.dtype for x in network.contexts} == {torch.bfloat16}


def test_diffusers_own_pipeline_draws_the_same(parts) -> None:
    from diffusers import StableDiffusionPipeline

    scheduler = make_scheduler(FAST, "eps")
    given = (parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, scheduler, None, None)
    pipeline = StableDiffusionPipeline(*given, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(655)
    options = {"num_inference_steps": FAST.steps, "guidance_scale": FAST.scale, "output_type": "np"}
    size = (16, 32)  # it wants multiples of 8
    expected = pipeline(FRAMES[1].prompt, *size, **options, negative_prompt="snow").images
    prompts = PromptEncoder(parts.tokenizer, parts.text_encoder)
    sampler = SamplerSettings(steps=FAST.steps, scale=FAST.scale, negative_prompt="snow")
    found = draw(parts.unet, parts.vae, prompts, None, FRAMES[1:2], [655], size, sampler, "eps")
    assert found.dtype == torch.uint8 and found.shape == (1, 3, *size)
    levels = torch.from_numpy(expected).movedim(-1, 1) * 255
    assert (found - levels).abs().max() <= 0.51 and levels.std() > 2


@pytest.mark.parametrize("heads", ["first", "all"])
def test_pictures_do_not_depend_on_those_drawn_with_them(parts, heads: str) -> None:
    guidance = SpatialGuidance(GuidanceSettings(heads=heads, sampling_alpha=1.0), 32)
    prompts = PromptEncoder(parts.tokenizer, parts.text_encoder)

    def latents(frames: list[Frame], seeds: list[int]) -> Tensor:
        encoded = prompts.encode(frames)
        null, noise = prompts.null(len(frames), 77), frame_noise(seeds, (4, *LATENT))
        maps = guidance.prepare(encoded, SIZE, LATENT)
        return draw_latents(parts.unet, encoded, null, noise, FAST, "eps", maps, 1.0)

    together = latents(FRAMES, [5, 6, 5])
    alone = torch.cat([latents([frame], [seed]) for frame, seed in zip(FRAMES, [5, 6, 5], strict=True)])
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (together[0] - together[2]).abs().max() > 1e-3  # same noise, other prompt


def test_guidance_changes_pictures_of_characters_only(parts) -> None:
    prompts = PromptEncoder(parts.tokenizer, parts.text_encoder)
    guidance = SpatialGuidance(GuidanceSettings(heads="all", alpha=1.0, sampling_alpha=1.0), 32)

    def drawn(guidance: SpatialGuidance | None, **options: float) -> Tensor:
        given = (parts.unet, parts.vae, prompts, guidance, FRAMES, [5], SIZE, FAST, "eps")
        return draw(*given, **options)

    plain, none, guided = drawn(None), drawn(guidance, alpha=0.0), drawn(guidance)
    assert (plain.int() - none.int()).abs().max() <= 1
    assert not torch.equal(guided[1], plain[1]) and torch.equal(guided[2], plain[2])


def test_batches_of_many_prompts_and_seeds(parts) -> None:
    rows = []
    handle = parts.text_encoder.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    try:
        prompts = PromptEncoder(parts.tokenizer, parts.text_encoder, TextSettings("chunk"), cache=False)
        sampler, steps = SamplerSettings(steps=2, scale=3.0, batch_size=2), []
        frames, seeds = [FRAMES[0], LONG, FRAMES[0], FRAMES[1]], [5, 5, 6, 5]
        given = (parts.unet, parts.vae, prompts, None)
        together = draw(*given, frames, seeds, SIZE, sampler, "eps", progress=lambda n, total: steps.append((n, total)))
    finally:
        handle.remove()
    assert steps == [(n, 6) for n in range(1, 7)]
    chunks = prompts.chunks(LONG.prompt)
    assert sum(rows) == 2 + 1 + chunks + 1  # two short prompts, the long one, and the empty prompt beside each
    alone = [draw(*given, [f], [s], SIZE, sampler, "eps") for f, s in zip(frames, seeds, strict=True)]
    assert (together.int() - torch.cat(alone).int()).abs().max() <= 1  # the long prompt fills no other up
    assert not torch.equal(together[0], together[2])
    one = draw(*given, frames[3:], [5, 6], SIZE, sampler, "eps")
    assert len(one) == 2 and torch.equal(one[0], together[3])


def test_decoding_rounds_and_refuses_what_is_not_finite() -> None:
    config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(1,))
    vae = SimpleNamespace(config=config, dtype=torch.float32, decode=lambda z: SimpleNamespace(sample=z))
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 1.004]).repeat_interleave(3).reshape(2, 3, 1, 3).mT * 0.5
    expected = ((values / 0.5 / 2 + 0.5).clamp(0, 1) * 255).round()
    assert torch.equal(decode(vae, values), expected.to(torch.uint8))
    assert set(decode(vae, values).flatten().tolist()) == {0, 128, 191, 255}
    values[1, 0, 0] = float("nan")
    with pytest.raises(UserError, match="1 of 2 drawn pictures are not finite"):
        decode(vae, values)


def test_mistakes_are_named(parts) -> None:
    with pytest.raises(
        UserError, match=r"picture size 15 x 28: .* multiples of 4 .* by 2, .* by 2\); nearest: 16 x 28"
    ):
        latent_size((15, 28), parts.unet, parts.vae)
    assert latent_size(SIZE, parts.unet, parts.vae) == LATENT
    with pytest.raises(UserError, match=r"sampler.name: 'dpmsolver', .*nearest: dpm_solver"):
        SamplerSettings("dpmsolver")
    for field, value in {"batch_size": 0, "scale": -1.0}.items():
        with pytest.raises(UserError, match=rf"sampler.{field}: {value}"):
            SamplerSettings(**{field: value})
    for name, steps in {"lms": 1, "ddim": 501, "euler": 1001}.items():
        with pytest.raises(UserError, match=rf"sampler.steps: {steps}, must be"):
            make_scheduler(SamplerSettings(name, steps=steps), "eps")
    with pytest.raises(UserError, match="objective: 'flow'"):
        make_scheduler(SamplerSettings(), "flow")
    with pytest.raises(UserError, match="seeds: 1024, must be 1 to 1023"):
        story_seeds(1024)
    prompts = PromptEncoder(parts.tokenizer, parts.text_encoder)
    with pytest.raises(UserError, match="3 frames with 2 seeds: give one seed for each frame"):
        draw(parts.unet, parts.vae, prompts, None, FRAMES, [1, 2], SIZE, FAST, "eps")
    plain = tiny_components().unet
    guidance = SpatialGuidance(GuidanceSettings(), 32)
    with pytest.raises(ValueError, match=r"mmtrain.attention.install"):
        draw(plain, parts.vae, prompts, guidance, FRAMES, [1], SIZE, FAST, "eps")
