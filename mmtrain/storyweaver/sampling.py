"""From frames to pictures: schedulers, classifier-free guidance in one network call a step, noise by seed, decoding.

B pictures, L text tokens, W text width, C x h x w latent, H x W picture.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mmtrain.config_errors import UserError, nearest
from mmtrain.noise_schedule import NoiseSchedule, Objective
from mmtrain.samplers import Progress
from mmtrain.story import Frame
from mmtrain.storyweaver.text import EncodedFrames, PromptEncoder

if TYPE_CHECKING:
    from mmtrain.storyweaver.guidance import GuidanceMaps, SpatialGuidance

SamplerName = Literal["lms", "ddim", "dpm_solver", "euler"]
SAMPLERS = ("lms", "ddim", "dpm_solver", "euler")
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}  # ours -> diffusers'
SEEDS = range(1, 1024)  # of the released sampling script
DECODED_PIXELS = 2**20  # a call of the decoder: its memory grows with them


@dataclass
class SamplerSettings:
    """How pictures are drawn; the defaults are those of the released sampling script.

    Args:
        name: "lms" (linear multistep), "euler", "dpm_solver" (DPM-Solver++ 2M) or "ddim", all of diffusers and
            without added noise.
        steps: network calls a picture.
        scale: of classifier-free guidance; 1 leaves the unconditional half out.
        negative_prompt: in place of the empty one.
        batch_size: pictures drawn together.

    Raises:
        UserError: an unknown name or a value out of its range.
    """

    name: SamplerName = "lms"
    steps: int = 100
    scale: float = 5.0
    negative_prompt: str = ""
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            guess = nearest(str(self.name), SAMPLERS)
            hint = f"; nearest: {guess}" if guess else ""
            raise UserError(f"sampler.name: {self.name!r}, must be one of {', '.join(SAMPLERS)}{hint}")
        if self.batch_size < 1:
            raise UserError(f"sampler.batch_size: {self.batch_size}, must be 1 or more")
        if self.scale < 0:
            raise UserError(f"sampler.scale: {self.scale}, must be 0 or more; 1 is without guidance")


def make_scheduler(sampler: SamplerSettings, objective: Objective, schedule: NoiseSchedule | None = None) -> Any:
    """A scheduler of diffusers, ready to run.

    "lms", "euler" and "dpm_solver" space their times evenly from the noisiest step on (999, 988.909, ... 0 for 100
    steps of the first two); "ddim" has every (1000 / steps)-th step from 1 on, as Stable Diffusion is configured.

    Raises:
        UserError: steps out of the sampler's range, or an objective other than "eps" and "v".
    """
    import diffusers

    schedule = schedule or NoiseSchedule()
    # one "linspace" step would be at time 0; beyond half of its steps DDIM leaves out the noisy end
    least = 2 if sampler.name in ("lms", "euler") else 1
    most = schedule.train_steps // (2 if sampler.name == "ddim" else 1)
    if not least <= sampler.steps <= most:
        raise UserError(f"sampler.steps: {sampler.steps}, must be {least} to {most} for {sampler.name}")
    if objective not in PREDICTIONS:
        raise UserError(f"objective: {objective!r}, {sampler.name} draws with one of {', '.join(PREDICTIONS)}")
    common = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": PREDICTIONS[objective],
    }
    if sampler.name == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    else:
        kinds = {
            "lms": diffusers.LMSDiscreteScheduler,
            "euler": diffusers.EulerDiscreteScheduler,
            "dpm_solver": diffusers.DPMSolverMultistepScheduler,
        }
        scheduler = kinds[sampler.name](**common, timestep_spacing="linspace")
    scheduler.set_timesteps(sampler.steps)
    if sampler.name != "ddim":
        scheduler.set_begin_index(0)  # else the place is looked up by time at the first step
    return scheduler


def story_seeds(count: int) -> list[int]:
    """The seeds of the released sampling script: drawn without replacement from 1 to 1023, after seeding with 42.

    >>> story_seeds(5)
    [655, 115, 26, 760, 282]

    Raises:
        UserError: a count below 1 or above 1023.
    """
    if not 1 <= count <= len(SEEDS):
        raise UserError(f"seeds: {count}, must be 1 to {len(SEEDS)}")
    return random.Random(42).sample(SEEDS, count)


def frame_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape], a seed a picture, on the host: a seed means the same on every device.

    Row i is what `torch.manual_seed(seeds[i])` would make `torch.randn` give.
    """
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def draw_latents(
    unet: nn.Module,
    encoded: EncodedFrames,
    null: Tensor | None,
    noise: Tensor,
    sampler: SamplerSettings,
    objective: Objective,
    maps: "GuidanceMaps | None" = None,
    sampling_alpha: float = 2.5,
    progress: Progress | None = None,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Denoise latents. They stay float32; what goes into the UNet has its dtype.

    Args:
        unet: of diffusers; with `maps`, its attention must take the bias, see `mmtrain.attention.install`.
        encoded: of B frames.
        null: [B, L, W] of the unconditional half; not needed for a scale of 1.
        noise: standard normal [B, C, h, w], see `frame_noise`.
        maps: of the spatial guidance, for the conditional half only.
        sampling_alpha: strength of the spatial guidance.
        progress: called as progress(done, steps).

    Returns:
        float32 [B, C, h, w] on the UNet's device.

    Raises:
        UserError: see `make_scheduler`.
    """
    scheduler = make_scheduler(sampler, objective, schedule)
    own = next(unet.parameters())
    halves = 1 if sampler.scale == 1 else 2
    contexts = [encoded.context] if halves == 1 else [null, encoded.context]
    context = torch.cat([part.to(own.device, own.dtype) for part in contexts])
    latents = noise.to(own.device, torch.float32) * scheduler.init_noise_sigma
    times = scheduler.timesteps.to(own.device, torch.float32)  # there at once: no step waits for a copy
    for number, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, t).to(own.dtype)
        output = unet(
            torch.cat([scaled] * halves),
            times[number].expand(len(context)),
            encoder_hidden_states=context,
            cross_attention_kwargs=_bias(maps, times[number].expand(len(noise)), sampling_alpha, halves),
        ).sample.float()
        if halves == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + sampler.scale * (conditional - unconditional)
        latents = scheduler.step(output, t, latents).prev_sample
        if progress is not None:
            progress(number + 1, sampler.steps)
    return latents


def _bias(maps: "GuidanceMaps | None", t: Tensor, alpha: float, halves: int) -> dict[str, Any] | None:
    if maps is None:
        return None
    bias = maps.at(t, alpha)
    return {"attention_bias": bias if halves == 1 else bias.with_unconditional()}


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pictures uint8 [B, 3, H, W] on the host, of latents [B, C, h, w] as the UNet has them.

    Raises:
        UserError: the decoder gave numbers that are not finite.
    """
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    pixels = scaled[0, 0].numel() * vae_factor(vae) ** 2
    with torch.autocast(scaled.device.type, enabled=False):  # Stable Diffusion's decoder overflows in half precision
        pieces = [vae.decode(piece).sample.float() for piece in scaled.split(max(DECODED_PIXELS // pixels, 1))]
    pictures = torch.cat(pieces)
    if not pictures.isfinite().all():
        raise UserError(
            f"{int((~pictures.isfinite().flatten(1).all(1)).sum())} of {len(pictures)} drawn pictures are not finite: "
            "the weights are broken, or the precision is too low; draw with trainer.precision 32-true or bf16-mixed"
        )
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def vae_factor(vae: nn.Module) -> int:
    """Pixels of a latent's side: 8 for Stable Diffusion."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def latent_size(picture_size: tuple[int, int], unet: nn.Module, vae: nn.Module) -> tuple[int, int]:
    """Height and width of the latents of pictures of a size.

    Raises:
        UserError: height or width is no multiple of the autoencoder's factor times the UNet's downsampling.
    """
    factor, halvings = vae_factor(vae), len(unet.config.block_out_channels) - 1
    unit = factor * 2**halvings
    if any(side < unit or side % unit for side in picture_size):
        close = " x ".join(str(max(round(side / unit), 1) * unit) for side in picture_size)
        raise UserError(
            f"picture size {' x '.join(map(str, picture_size))}: height and width must be multiples of {unit} (the "
            f"autoencoder divides by {factor}, the UNet by {2**halvings}); nearest: {close}"
        )
    return picture_size[0] // factor, picture_size[1] // factor


@torch.no_grad()
def draw(
    unet: nn.Module,
    vae: nn.Module,
    prompts: PromptEncoder,
    guidance: "SpatialGuidance | None",
    frames: Iterable[Frame],
    seeds: Sequence[int],
    picture_size: tuple[int, int],
    sampler: SamplerSettings,
    objective: Objective,
    alpha: float | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Draw frames; the same seed gives different frames the same noise, as released.

    A picture does not depend on what is drawn with it: prompts of unequal length in chunks go into different batches.

    Args:
        guidance: spatial guidance, or None.
        frames, seeds: a seed for each frame; a single one stands for all.
        picture_size: height and width in pixels.
        alpha: strength of the spatial guidance; None takes its `sampling_alpha`.
        batch_size: pictures together; None takes the sampler's.
        progress: called as progress(done, all) with network calls.

    Returns:
        uint8 [B, 3, H, W] on the host.

    Raises:
        UserError: see `latent_size`, `make_scheduler`, `decode`; numbers of frames and seeds that do not fit.
    """
    frames, seeds = paired(list(frames), list(seeds))
    latent = latent_size(picture_size, unet, vae)
    if guidance is not None:
        check_takes_bias(unet)
        alpha = guidance.settings.sampling_alpha if alpha is None else alpha
    lengths = [prompts.chunks(frame.prompt) for frame in frames]
    batches = plan_batches(lengths, batch_size or sampler.batch_size)
    shape = (unet.config.in_channels, *latent)
    pictures: dict[int, Tensor] = {}
    encoded, null, own, of = None, None, [], 0
    for number, (length, rows) in enumerate(batches):
        if length != of:  # each prompt once, however many seeds and batches it is drawn in
            own, of = list(dict.fromkeys(f for f, n in zip(frames, lengths, strict=True) if n == length)), length
            encoded = prompts.encode(own)
            null = prompts.null(1, encoded.context.shape[1], sampler.negative_prompt) if sampler.scale != 1 else None
        part = encoded.select([own.index(frames[i]) for i in rows])
        latents = draw_latents(
            unet,
            part,
            None if null is None else null.expand(len(rows), -1, -1),
            frame_noise([seeds[i] for i in rows], shape),
            sampler,
            objective,
            None if guidance is None else guidance.prepare(part, picture_size, latent),
            alpha or 0.0,
            part_of(progress, number, len(batches)),
            schedule,
        )
        pictures.update(zip(rows, decode(vae, latents), strict=True))
    return torch.stack([pictures[i] for i in range(len(frames))])


def paired(frames: list[Frame], seeds: list[int]) -> tuple[list[Frame], list[int]]:
    """A seed for each frame, where a single frame or seed stands for all.

    Raises:
        UserError: none, or numbers that do not fit.
    """
    count = max(len(frames), len(seeds))
    if not frames or not seeds or any(len(given) not in (1, count) for given in (frames, seeds)):
        raise UserError(f"{len(frames)} frames with {len(seeds)} seeds: give one seed for each frame, or one for all")
    return frames * (count // len(frames)), seeds * (count // len(seeds))


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """Batches of pictures whose prompts have equally many pieces: (pieces, numbers of the pictures).

    >>> plan_batches([1, 2, 1, 1], batch_size=2)
    [(1, [0, 2]), (1, [3]), (2, [1])]
    """
    batches = []
    for length in sorted(set(lengths)):
        rows = [i for i, own in enumerate(lengths) if own == length]
        batches += [(length, rows[k : k + batch_size]) for k in range(0, len(rows), batch_size)]
    return batches


def check_takes_bias(unet: nn.Module) -> None:
    """Diffusers leaves out an argument that its attention does not know, so spatial guidance would silently be off.

    Raises:
        ValueError: the attention of the UNet does not take the bias.
    """
    from mmtrain.attention import BiasProcessor

    if not any(isinstance(p, BiasProcessor) for p in getattr(unet, "attn_processors", {}).values()):
        raise ValueError("spatial guidance needs a UNet prepared by mmtrain.attention.install")


def part_of(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """The progress of one of several equal parts; None of None."""
    if progress is None:
        return None
    return lambda done, steps: progress(number * steps + done, parts * steps)
