"""Pictures of classes that DreamBooth's prior preservation trains on: drawn once by the base model, kept in a folder.

<folder>/<class>/00000.png ... and <folder>/drawn_with.json.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mmtrain.config_errors import UserError, clip
from mmtrain.distributed import rank, world_size
from mmtrain.story import Frame
from mmtrain.storyweaver.figures import save_picture, to_image
from mmtrain.storyweaver.outputs import read_json, read_picture, write_text

ABOUT = "drawn_with.json"


@dataclass
class PriorSettings:
    """Prior preservation (DreamBooth, arXiv 2208.12242, section 4.2).

    Args:
        folder: of the class pictures; "class_pictures" in the run folder if None.
        per_class: how many of each class.
        prompt: {} is the class.
        weight: of their loss; 0 does without them.
        steps, scale: how they are drawn, with the sampler of the model.
    """

    folder: str | None = None
    per_class: int = 200
    prompt: str = "a photo of a {}"
    weight: float = 1.0
    steps: int = 50
    scale: float = 7.5

    def __post_init__(self) -> None:
        if self.per_class < 1 or self.weight < 0:
            raise UserError(f"prior: per_class {self.per_class}, weight {self.weight}: at least 1, and 0 or more")
        if "{}" not in self.prompt:
            raise UserError(f"prior.prompt: {self.prompt!r} has no {{}} for the class")


class ClassPictures:
    """The class pictures in a folder.

    Args:
        folder: made if it is not there.
        settings: how many, of what.
        classes: coarse classes.
        about: what they depend on besides the class, as plain types.
    """

    def __init__(self, folder: Path, settings: PriorSettings, classes: Sequence[str], about: dict[str, Any]) -> None:
        self.folder, self.settings, self.classes = folder, settings, list(dict.fromkeys(classes))
        self.about = json.loads(json.dumps({"prompt": settings.prompt, **about}))

    def path(self, name: str, number: int) -> Path:
        """File of a picture of a class."""
        return self.folder / (re.sub(r"\W+", "_", name).strip("_") or "class") / f"{number:05d}.png"

    def frame(self, name: str) -> Frame:
        """The prompt of a class."""
        return Frame(self.settings.prompt.format(name), (), "", "")

    def number(self, name: str, index: int) -> int:
        """A picture's number among those of all classes."""
        return self.classes.index(name) * self.settings.per_class + index

    def check(self) -> None:
        """Refuse pictures that were drawn otherwise.

        Raises:
            UserError: names what differs.
        """
        path = self.folder / ABOUT
        there = read_json(path)
        for key, value in self.about.items():
            if path.is_file() and there.get(key) != value:
                raise UserError(
                    f"{path}: class pictures were drawn with {key} {clip(there.get(key))}, wanted is {clip(value)}: "
                    "delete the folder, or give another prior.folder"
                )

    def draw(self, draw: Callable[[Frame, list[int]], Tensor], barrier: Callable[[], None], at_once: int) -> int:
        """Draw what is missing; every process a part. Returns how many pictures this one drew.

        Args:
            draw: frame and seeds -> pictures uint8 [seeds, 3, H, W].
            barrier: waits for all processes.
            at_once: pictures that are drawn together.
        """
        self.check()
        barrier()  # each process has looked before the first one writes
        if rank() == 0:
            write_text(self.folder / ABOUT, json.dumps(self.about, indent=1))
        numbers = range(rank(), self.settings.per_class, world_size())
        jobs = [(name, n) for name in self.classes for n in numbers if not self.path(name, n).is_file()]
        with tqdm(total=len(jobs), desc="class pictures", unit="picture", disable=not jobs or rank() > 0) as bar:
            for name in self.classes:
                own = [n for other, n in jobs if other == name]
                for first in range(0, len(own), at_once):
                    some = own[first : first + at_once]
                    for number, picture in zip(some, draw(self.frame(name), some), strict=True):
                        save_picture(self.path(name, number), to_image(picture))
                        bar.update()
        barrier()
        return len(jobs)

    def read(self, name: str, indices: Sequence[int]) -> Tensor:
        """Pictures uint8 [n, 3, H, W] of a class."""
        return torch.stack([read_picture(self.path(name, index)) for index in indices])
