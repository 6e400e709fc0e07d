"""DreamBooth as the paper compares it: a whole UNet, or an adapter, for each character, and prior preservation."""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mmtrain import distributed
from mmtrain.checkpoint import settings
from mmtrain.config_errors import UserError, nearest
from mmtrain.story import Frame
from mmtrain.storyweaver.adapters import adapter_name, adapters_of, add_adapters
from mmtrain.storyweaver.latents import LatentCache
from mmtrain.storyweaver.lora import activate_characters, check_strategy, one_character
from mmtrain.storyweaver.losses import prior_preserving_loss
from mmtrain.storyweaver.module import Network, StoryDiffusion, Trains
from mmtrain.storyweaver.prior import ClassPictures, PriorSettings
from mmtrain.storyweaver.sampling import draw

Wording = Literal["rare_token", "description"]
FOLDER = "class_pictures"  # in the run folder


class DreamBooth(StoryDiffusion):
    """A model for each character (arXiv 2208.12242); a batch trains that of its character (`data.group: character`).

    Each step also trains on as many pictures of the character's class, drawn by the base model before training begins.
    A frame of several characters is drawn by the leftmost one's network, or with the mean of their adapters; one whose
    characters have none, by the base model.

    Networks for all characters need much memory at Stable Diffusion's size, 14 GB each while it is trained: name one in
    `characters` (and in `data.characters`), and train one after the other. On several processes and of several
    characters: `trainer.strategy: ddp_find_unused_parameters_true`.

    Args:
        pipeline: see StoryDiffusion, as for `options`.
        trains: "full" a copy of the UNet each, "lora" an adapter each.
        characters: who gets one; everybody of the world if None.
        prior: prior preservation.
        prompt: "rare_token" calls a character by `rare_token` and its class, without a description; "description" has
            the world's prompts.
        rare_token: a word that means nothing to the base model.
        caption_dropout: see StoryDiffusion.
        method: the row's name in tables.
    """

    rates: ClassVar[dict[str, float]] = {"lora": 1e-4, "full": 5e-6}
    blocks = None  # a step trains one character's weights, and sharding needs the same ones on all processes

    def __init__(
        self,
        pipeline: str = "",
        trains: Trains = "full",
        characters: list[str] | None = None,
        prior: PriorSettings | None = None,
        prompt: Wording = "rare_token",
        rare_token: str = "sks",
        caption_dropout: float = 0.0,
        method: str = "DreamBooth",
        **options: Any,
    ) -> None:
        if prompt not in ("rare_token", "description"):
            raise UserError(f"prompt: {prompt!r}, must be rare_token or description")
        super().__init__(pipeline=pipeline, trains=trains, caption_dropout=caption_dropout, method=method, **options)
        self.characters, self.prior = characters, settings(PriorSettings, prior)
        self.prompt, self.rare_token = prompt, rare_token
        self.class_pictures: ClassPictures | None = None
        self.class_latents = LatentCache(self.vae, self.latents.keep)

    # networks

    def prepare_training(self) -> None:
        """There is nothing to train before the characters are known."""
        self.networks = nn.ModuleDict()
        self.active: Network | None = None

    def add_characters(self, names: Sequence[str]) -> None:
        """Give each character a network; those of `characters` only, where given.

        Raises:
            UserError: one that the world does not have.
        """
        for name in self.characters or ():
            if name not in names:
                guess = nearest(name, names)
                hint = f"nearest: {guess}" if guess else f"there are {', '.join(names)}"
                raise UserError(f"characters: {name!r} is not of this world; {hint}")
        for name in names if self.characters is None else self.characters:
            key = adapter_name(name)
            if self.trains == "full" and key not in self.networks:
                self.networks[key] = copy.deepcopy(self.unet).requires_grad_(True)
            elif self.trains == "lora" and key not in adapters_of(self.unet):
                add_adapters(self.adapted, self.lora, key)
                self.active = None

    def drawn_by(self, frame: Frame) -> Network:
        """Whose networks draw a frame."""
        known = self.networks if self.trains == "full" else adapters_of(self.unet)
        names = [name for name in frame.names if adapter_name(name) in known]
        return tuple(names[:1]) if self.trains == "full" else tuple(sorted(names))

    def by_network(self, frames: Sequence[Frame]) -> dict[Network, list[int]]:
        """See `drawn_by`."""
        groups: dict[Network, list[int]] = {}
        for place, frame in enumerate(frames):
            groups.setdefault(self.drawn_by(frame), []).append(place)
        return groups

    def unet_for(self, names: Network) -> nn.Module:
        """The copy of the character, or the UNet with these adapters; of nobody, the base model."""
        if self.trains == "full":
            return self.networks[adapter_name(names[0])] if names else self.unet
        if names != self.active:
            self.active = activate_characters(self.adapted, names)
        return self.unet

    def wording(self, frame: Frame) -> Frame:
        """The frame as the text encoder gets it."""
        if self.prompt == "description":
            return frame
        return with_rare_token(frame, self.drawn_by(frame), self.rare_token)

    # training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and len(self.networks) != 1:
            check_strategy(self.trainer)

    def on_fit_start(self) -> None:
        """Draw the class pictures that are not there."""
        if not self.prior.weight:
            return
        trained = self.world.names if self.characters is None else self.characters
        classes = [self.world.characters[name].coarse_class for name in trained]
        folder = Path(self.trainer.default_root_dir) / (self.prior.folder or FOLDER)
        sampler = replace(self.sampler, steps=self.prior.steps, scale=self.prior.scale)
        about = {
            "base": self.base,
            "sampler": [sampler.name, sampler.steps, sampler.scale, sampler.negative_prompt],
            "picture_size": list(self.picture_size),
        }
        self.class_pictures = ClassPictures(folder, self.prior, classes, about)

        def drawn(frame: Frame, seeds: list[int]) -> Tensor:
            parts = self.unet_for(()), self.vae, self.prompts, None, [frame], seeds, self.picture_size
            with self.trainer.precision_plugin.forward_context():
                return draw(*parts, sampler, self.components.objective)

        count = self.class_pictures.draw(drawn, self.trainer.strategy.barrier, sampler.batch_size)
        rank_zero_info(f"class pictures are in {folder}, {count} drawn now")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        frames = list(batch["frames"])
        name = one_character(frames)
        network = self.drawn_by(frames[0])
        if not network:
            raise UserError(f"characters: {name!r} has no network: give data.characters and model.characters the same")
        latents = self.training_latents(batch)
        if self.class_pictures is None:
            loss = self.training_errors(frames, latents, network).mean()
        else:
            class_name = self.world.characters[name].coarse_class
            pairs = [both for frame in frames for both in (frame, self.class_pictures.frame(class_name))]
            both = torch.stack([latents, self._class_latents(class_name, len(latents))], 1)
            # in pairs, so that a process's part of the batch is a part of one process's batch
            errors = self.training_errors(pairs, both.flatten(0, 1), network).view(-1, 2)
            loss, instance, prior = prior_preserving_loss(errors.T.flatten(), self.prior.weight)
            self.log_dict({"train/instance": instance.detach(), "train/prior": prior.detach()}, batch_size=len(latents))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(latents))
        return loss

    def _class_latents(self, name: str, count: int) -> Tensor:
        """Latents [count, C, h, w] of pictures of a class, chosen at random."""
        pictures = self.class_pictures
        chosen = distributed.rows_of_all(lambda n: torch.randint(self.prior.per_class, (n,)), count).tolist()
        ids = [pictures.number(name, index) for index in chosen]
        return self.class_latents.sample(ids, lambda rows: pictures.read(name, [chosen[row] for row in rows]))

    def sampling_about(self) -> dict[str, Any]:
        """See StoryDiffusion."""
        called_by = self.rare_token if self.prompt == "rare_token" else None
        return super().sampling_about() | {"prompt": self.prompt, "rare_token": called_by}

    def protocols(self) -> dict[str, str]:
        """How the figures are counted."""
        several = "the leftmost one's network" if self.trains == "full" else "the mean of their adapters"
        named = f'"{self.rare_token} <class>"' if self.prompt == "rare_token" else "the description"
        own = f"each is called by {named}; frames of several characters: {several}"
        if self.characters is not None:
            own += f"; frames without {', '.join(self.characters)}: the base model"
        return {"characters": own} | super().protocols()


def with_rare_token(frame: Frame, names: Sequence[str], token: str) -> Frame:
    """The event alone, with the token before the class words of these characters; behind it where it has none.

    >>> from mmtrain.story import Character
    >>> fox = Character("Eddy", "fox", "This brown fox has large ears.")
    >>> with_rare_token(Frame("A fox runs.", (fox,), "Cartoon style."), ["Eddy"], "sks").prompt
    'Cartoon style. A sks fox runs.'
    """
    event = frame.event
    for name in dict.fromkeys(c.coarse_class for c in frame.characters if c.name in names):
        event, count = re.subn(rf"\b{re.escape(name)}\b", lambda m: f"{token} {m[0]}", event, flags=re.IGNORECASE)
        event = event if count else f"{event} A {token} {name}."
    return replace(frame, event=event, characters=())
