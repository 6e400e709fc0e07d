"""Pictures that a story model draws: frames by the network that each needs, and the sheet of a validation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmtrain import distributed
from mmtrain.samplers import Progress
from mmtrain.story import Frame
from mmtrain.storyweaver.figures import contact_sheet
from mmtrain.storyweaver.sampling import SamplerSettings, draw, paired, part_of, story_seeds

if TYPE_CHECKING:
    from mmtrain.storyweaver.module import StoryDiffusion

COLUMNS = 3


def draw_frames(
    module: "StoryDiffusion",
    frames: Sequence[Frame],
    seeds: Sequence[int],
    sampler: SamplerSettings,
    progress: Progress | None = None,
) -> Tensor:
    """Draw each frame by the network that is its own.

    Args:
        frames, seeds: a seed for each frame; see `sampling.draw`.

    Returns:
        uint8 [B, 3, H, W] on the CPU.
    """
    frames, seeds = paired(list(frames), list(seeds))
    groups, pictures = module.by_network(frames), {}
    for number, (network, rows) in enumerate(groups.items()):
        drawn = draw(
            module.unet_for(network),
            module.vae,
            module.prompts,
            module.guidance,
            [module.wording(frames[row]) for row in rows],
            [seeds[row] for row in rows],
            module.picture_size,
            sampler,
            module.components.objective,
            progress=part_of(progress, number, len(groups)),
        )
        pictures.update(zip(rows, drawn, strict=True))
    return torch.stack([pictures[row] for row in range(len(frames))])


class Preview:
    """The sheet of one validation, of the pictures of all processes.

    Args:
        module: what draws.
        most: pictures on it; later ones are not drawn.
        steps: of sampling.
    """

    def __init__(self, module: "StoryDiffusion", most: int, steps: int) -> None:
        self.module, self.most, self.sampler = module, most, replace(module.sampler, steps=steps)
        self.pictures: dict[int, tuple[Tensor, str]] = {}  # number of the prompt -> picture, title

    def add(self, ids: Sequence[int], frames: Sequence[Frame]) -> None:
        """Draw the frames of these numbers, as far as there is room."""
        room = max(0, -(-self.most // distributed.world_size()) - len(self.pictures))
        frames = list(frames)[:room]
        if frames:
            pictures = draw_frames(self.module, frames, story_seeds(1), self.sampler)
            titles = [frame.event for frame in frames]
            self.pictures.update(zip(ids, zip(pictures, titles, strict=True), strict=False))

    def write(self, path: Path) -> None:
        """Bring the pictures of all processes together; the first writes them, in the order of their numbers."""
        found = [self.pictures]
        if distributed.world_size() > 1:
            found = [{} for _ in range(distributed.world_size())]
            torch.distributed.all_gather_object(found, self.pictures)
        everything = {number: entry for own in found for number, entry in own.items()}
        if not everything or distributed.rank():
            return
        pictures, titles = zip(*(everything[number] for number in sorted(everything)[: self.most]), strict=True)
        contact_sheet(path, torch.stack(pictures), list(titles), COLUMNS)
