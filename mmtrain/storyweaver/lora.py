"""LoRA as the paper compares it: a low-rank adapter for each character, on one frozen UNet."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.story import Frame
from mmtrain.storyweaver.adapters import LoraSettings, activate, adapter_name, adapters_of, add_adapters
from mmtrain.storyweaver.module import Network, StoryDiffusion

Combine = Literal["average", "sum"]


class LoraPerCharacter(StoryDiffusion):
    """One adapter a character, called by its name; a batch trains that of its character (`data.group: character`).

    Drawing a frame lets its character's adapter act. The paper does not say how frames of several characters were
    drawn; here all their adapters act, see `combine`. An adapter that no batch was of leaves the base model as it is.

    On several processes `trainer.strategy: ddp_find_unused_parameters_true`, since a step trains one adapter of many.
    `trainer.max_steps` are those of all characters together.

    Args:
        pipeline: see StoryDiffusion, as for `options`.
        lora: sizes of each adapter.
        combine: of the updates of several characters, "average" or "sum" (as loading several LoRAs does).
        method: the row's name in tables.
    """

    blocks = None  # a step trains one character's weights, and sharding needs the same ones on all processes

    def __init__(
        self,
        pipeline: str = "",
        lora: LoraSettings | None = None,
        combine: Combine = "average",
        method: str = "LoRA",
        **options: Any,
    ) -> None:
        if combine not in ("average", "sum"):
            raise UserError(f"combine: {combine!r}, must be average or sum")
        if options.pop("trains", "lora") != "lora":
            raise UserError("trains: full, must be lora: DreamBooth trains whole networks for each character")
        super().__init__(pipeline=pipeline, lora=lora, method=method, **options)
        self.combine = combine

    def prepare_training(self) -> None:
        """There is nothing to train before the characters are known."""
        self.active: Network | None = None

    def add_characters(self, names: Sequence[str]) -> None:
        for name in names:
            if adapter_name(name) not in adapters_of(self.unet):
                add_adapters(self.adapted, self.lora, adapter_name(name))
                self.active = None

    def unet_for(self, names: Network) -> nn.Module:
        """The UNet with the adapters of these characters; of none, the base model.

        Raises:
            UserError: a character without an adapter.
        """
        if names != self.active:
            self.active = activate_characters(self.adapted, names, self.combine)
        return self.unet

    def by_network(self, frames: Sequence[Frame]) -> dict[Network, list[int]]:
        """Names of the characters -> places of the frames that show them."""
        groups: dict[Network, list[int]] = {}
        for place, frame in enumerate(frames):
            groups.setdefault(tuple(sorted(frame.names)), []).append(place)
        return groups

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            check_strategy(self.trainer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        one_character(list(batch["frames"]))
        return super().training_step(batch, batch_idx)

    def sampling_about(self) -> dict[str, Any]:
        """See StoryDiffusion."""
        return super().sampling_about() | {"combine": self.combine}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        return {
            "characters": f"a LoRA each; frames of several characters: {self.combine} of theirs"
        } | super().protocols()


def activate_characters(networks: dict[str, nn.Module], names: Network, combine: Combine = "average") -> Network:
    """Let the adapters of these characters act, and no others; returns the names.

    Raises:
        UserError: a character without an adapter.
    """
    known = adapters_of(networks["unet"])
    for name in names:
        if adapter_name(name) not in known:
            raise UserError(f"no LoRA of {name!r}: the model has those of {', '.join(known) or 'nobody'}")
    factor = 1 / max(1, len(names)) if combine == "average" else 1.0
    activate(networks, {adapter_name(name): factor for name in names})
    return names


def one_character(frames: Sequence[Frame]) -> str:
    """The character that all frames of a training batch show, alone.

    Raises:
        UserError: there are several.
    """
    shown = {frame.names for frame in frames}
    if len(shown) != 1 or len(next(iter(shown))) != 1:
        listed = "; ".join(sorted(" and ".join(names) or "nobody" for names in shown))
        raise UserError(f"data.group: a batch shows {listed}; a model for each character needs data.group: character")
    return next(iter(shown))[0]


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuse DDP that would wait for gradients of the characters that a step does not train.

    Raises:
        UserError: says what to set.
    """
    options = getattr(trainer.strategy, "_ddp_kwargs", None)
    if trainer.world_size > 1 and options is not None and not options.get("find_unused_parameters"):
        raise UserError(
            "trainer.strategy: a step trains one character's weights, so DDP needs ddp_find_unused_parameters_true"
        )
