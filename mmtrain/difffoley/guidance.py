"""Double guidance (Diff-Foley, arXiv 2306.17203): the video, and the gradient of an alignment classifier.

B batch, T features of a window, D their width, W width of a token, h x w latent.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from mmtrain.config_errors import UserError
from mmtrain.difffoley.networks import NULL_CONDITIONS, NullCondition
from mmtrain.noise_schedule import NoiseSchedule, Objective, check_objective

ClassifierContext = Literal["embedded_window", "raw_full"]
CLASSIFIER_CONTEXTS = ("embedded_window", "raw_full")
EARLIEST_FLOW_TIME = 0.05  # the classifier's push on a velocity grows as 1 / t, without bound at pure noise


@dataclass
class GuidanceSettings:
    """How strongly, and by what, sampling is guided.

    Args:
        scale: weight w of classifier-free guidance, 1 is none. 4.5 as released (the authors' slides say [0, 1]).
        classifier_scale: weight gamma of the alignment classifier's gradient, 0 is none; 50 as released.
        null_condition: what stands for "no video". "learned": a token trained with the network. "raw_zeros": features
            of zeros, embedded: what the released network was trained with. "embedded_zeros": tokens of zeros: what the
            released sampling uses, and which that network never saw in training.
        classifier_context: "embedded_window": the window's features through the classifier's embedder, as it is
            trained. "raw_full": the features of the whole clip as they are, past the embedder, as the released sampling
            does; the classifier never saw such a context in training.

    Raises:
        UserError: a value that is none of these, or a negative scale.
    """

    scale: float = 4.5
    classifier_scale: float = 0.0
    null_condition: NullCondition = "learned"
    classifier_context: ClassifierContext = "embedded_window"

    def __post_init__(self) -> None:
        for name in ("scale", "classifier_scale"):
            if not getattr(self, name) >= 0:
                raise UserError(f"guidance.{name}: {getattr(self, name)}, must be 0 or more")
        for name, known in (("null_condition", NULL_CONDITIONS), ("classifier_context", CLASSIFIER_CONTEXTS)):
            if getattr(self, name) not in known:
                raise UserError(f"guidance.{name}: {getattr(self, name)!r}, must be one of {', '.join(known)}")


def guided_noise(
    eps_cond: Tensor,
    eps_null: Tensor | None,
    scale: float,
    gradient: Tensor | None = None,
    classifier_scale: float = 0.0,
    sigma: float = 0.0,
) -> Tensor:
    """eps_null + scale (eps_cond - eps_null) - classifier_scale sigma gradient.

    Args:
        eps_cond, eps_null: noise predicted with and without the video [B, ...]; None takes the first alone.
        gradient: of log p(match) with respect to the noisy sample [B, ...].
        sigma: standard deviation of the noise, sqrt(1 - alphas_cumprod).
    """
    eps = eps_cond if eps_null is None else eps_null + scale * (eps_cond - eps_null)
    return eps if gradient is None else eps - classifier_scale * sigma * gradient


def log_probability_gradient(classifier: nn.Module, x: Tensor, t: float, context: Tensor) -> Tensor:
    """Gradient of log sigmoid(logit) of each sample with respect to the noisy sample.

    From the logit, so that it stays finite where the probability underflows to 0. Works under `torch.no_grad` and
    `torch.inference_mode`.

    Args:
        classifier: (x, t, context) -> logit [B].
        x: noisy latents [B, 4, h, w].
        t: network's time.
        context: tokens [B, T, W].

    Returns:
        [B, 4, h, w].
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors made in inference mode can't take part in a backward pass; copies of them can.
        x, context = x.detach().clone().requires_grad_(), context.detach().clone()
        return torch.autograd.grad(logsigmoid(classifier(x, t, context)).sum(), x)[0]


class GuidedDenoiser:
    """The network, its null condition and the classifier as one function for the samplers of `mmtrain.samplers`.

    For the objectives "eps" and "v" a call gives noise at a network's time; for "flow" a velocity at a flow time. The
    conditional and the null prediction come from one call of the network on a doubled batch, null first; a scale of 1
    needs the conditional one alone.

    Args:
        unet: has `context(features)`, `null_context(kind, batch, frames)` and forward(x, t, context).
        features: of the windows [B, T, D].
        schedule: that the network, unless "flow", and the classifier were trained with.
        classifier: has `context(features)` and forward(x, t, context) -> logits; None where its scale is 0.
        clip_features: of the whole clip [B or 1, T', D], for `classifier_context: raw_full`; None takes `features`.

    Raises:
        UserError: a classifier scale without a classifier; an objective that is none.
    """

    def __init__(
        self,
        unet: nn.Module,
        features: Tensor,
        schedule: NoiseSchedule,
        objective: Objective,
        guidance: GuidanceSettings,
        classifier: nn.Module | None = None,
        clip_features: Tensor | None = None,
    ) -> None:
        check_objective(objective)
        if guidance.classifier_scale and classifier is None:
            raise UserError(
                f"guidance.classifier_scale: {guidance.classifier_scale:g}, needs an alignment classifier: "
                "name its checkpoint in guidance_classifier, or give 0"
            )
        self.unet, self.schedule, self.objective, self.guidance = unet, schedule, objective, guidance
        self.classifier = classifier if guidance.classifier_scale else None
        batch, frames = features.shape[:2]
        with torch.no_grad():
            self.context = unet.context(features)
            self.null: Tensor | None = None
            if guidance.scale != 1:
                self.null = unet.null_context(guidance.null_condition, batch, frames).to(self.context)
            self.classifier_context: Tensor | None = None
            if self.classifier is not None and guidance.classifier_context == "raw_full":
                whole = features if clip_features is None else clip_features
                self.classifier_context = whole.expand(batch, -1, -1)
            elif self.classifier is not None:
                self.classifier_context = self.classifier.context(features)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: float, rows: slice = slice(None)) -> Tensor:
        """Noise, or velocity, in x.

        Args:
            x: [b, 4, h, w], float32.
            t: network's time, or flow time if the objective is "flow".
            rows: which of the B windows `x` holds.
        """
        output = self._predictions(x, t, rows)
        if self.classifier is None:
            return guided_noise(output[-1], output[0] if self.null is not None else None, self.guidance.scale)
        context = self.classifier_context[rows]
        if self.objective != "flow":
            gradient = log_probability_gradient(self.classifier, x, t, context).to(x)
            return self._guided(output, gradient, self.schedule.sigma(t))
        # The classifier knows the schedule's noisy samples: the flow's, rescaled, at the time of the same ratio.
        t = max(t, EARLIEST_FLOW_TIME)
        length = math.hypot(t, 1.0 - t)
        time = self.schedule.time_of_alpha(t / length)
        gradient = log_probability_gradient(self.classifier, x / length, time, context).to(x)
        # x = (1 - t) noise + t data, so velocity = (x - noise) / t: a change of the noise counts -1/t in it.
        return self._guided(output, -gradient / t, (1.0 - t) / length)

    def _guided(self, output: tuple[Tensor, ...], gradient: Tensor, sigma: float) -> Tensor:
        null = output[0] if self.null is not None else None
        guidance = self.guidance
        return guided_noise(output[-1], null, guidance.scale, gradient, guidance.classifier_scale, sigma)

    def _predictions(self, x: Tensor, t: float, rows: slice) -> tuple[Tensor, ...]:
        """(null, conditional) or (conditional,) in the precision of x: guidance subtracts what is nearly equal."""
        time = self.schedule.network_time(t, self.objective)
        context, batch = self.context[rows], x
        if self.null is not None:
            context, batch = torch.cat([self.null[rows], context]), torch.cat([x, x])
        parts = self.unet(batch, time, context).to(x.dtype).split(len(x))
        if self.objective == "v":
            parts = tuple(self.schedule.eps_from(part, x, t, "v") for part in parts)
        return parts
