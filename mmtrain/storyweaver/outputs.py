"""What `predict` does: draw the lines of stories, one picture a line and seed, with all that is needed to repeat them.

<folder>/<story>/seed_<s>/image/00000.png   one a line, as released
                          text/00000.txt    its full prompt
                          options.json      how it was drawn
                 contact_sheet.png          with the event sentences; of several seeds one row each

Batches: "frames" FrameBatch, "story" names, "line" numbers in the story.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from tqdm import tqdm

from mmtrain.checkpoint import flatten
from mmtrain.config_errors import UserError
from mmtrain.distributed import rank, world_size
from mmtrain.story import Frame, describe_world
from mmtrain.storyweaver.figures import contact_sheet, save_picture, to_image
from mmtrain.storyweaver.sampling import story_seeds

if TYPE_CHECKING:
    from mmtrain.storyweaver.module import StoryDiffusion

FORMATS = ("png", "jpg")
OPTIONS, SHEET = "options.json", "contact_sheet.png"
MARK = "drawn_with"  # in a picture's metadata: digest of all that it depends on
# pictures are the same without them; a checkpoint counts by its weights, a world by its prompts
NOT_COMPARED = ("seed", "checkpoint", "world", "method", "sampler.batch_size")
IGNORED = tuple(f"{key}." for key in NOT_COMPARED)
SHEET_COLUMNS = 4  # of a story with one seed
SAMPLED = 16  # numbers at both ends of each tensor that tell weights apart


@dataclass
class PredictSettings:
    """What `predict` writes. Pictures that are there and would come out the same are left alone.

    Args:
        folder: in the run folder, unless absolute; None is "stories".
        seeds: pictures a line, with the first so many seeds of `story_seeds`.
        format: "png", or "jpg" as released.
        contact_sheet: write one for each story.
        overwrite: replace pictures that were drawn with other options, weights or prompts. Without it a batch
            that has such is refused before it is drawn, so that the drawings of hours are not lost to a changed option.

    Raises:
        UserError: an unknown format, or an impossible number of seeds.
    """

    folder: str | None = None
    seeds: int = 1
    format: Literal["png", "jpg"] = "png"
    contact_sheet: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UserError(f"predict.format: {self.format!r}, must be one of {', '.join(FORMATS)}")
        try:
            story_seeds(self.seeds)
        except UserError as error:
            raise UserError(f"predict.{error}") from error


class Line(NamedTuple):
    """One line of a story."""

    frame: Frame
    story: str
    number: int


class StoryWriter:
    """Draws the lines of stories and writes them; knows which are done.

    Args:
        module: what draws.
    """

    def __init__(self, module: "StoryDiffusion") -> None:
        self.module, self.settings = module, module.predict_settings
        self.folder = Path(module.trainer.default_root_dir) / (self.settings.folder or "stories")
        self.seeds = story_seeds(self.settings.seeds)
        self.about = about(module)
        self._lines: dict[str, dict[int, str]] = {}  # events by story and number
        self._changed: set[str] = set()

    def write(self, batch: dict[str, Any]) -> list[Path]:
        """Draw and write what is missing of a batch; returns the pictures that were written.

        Raises:
            UserError: a picture is there that was drawn otherwise, and `overwrite` is not given.
        """
        lines = [Line(*given) for given in zip(batch["frames"], batch["story"], batch["line"], strict=True)]
        for line in lines:
            check_story(line.story)
            self._lines.setdefault(line.story, {})[line.number] = line.frame.event
        wanted = [(line, seed) for line in lines for seed in self.seeds if not self.is_done(line, seed)]
        size, written = self.module.sampler.batch_size, []
        for first in range(0, len(wanted), size):  # what is drawn is written soon
            written += self._draw(wanted[first : first + size])
        return written

    def finish(self) -> list[Path]:
        """Write the contact sheets of stories with new pictures; returns them. Every process must call it.

        Each process may have drawn some lines of a story; the first one sees to the sheets.
        """
        if world_size() > 1:
            parts: list[Any] = [None] * world_size()
            torch.distributed.all_gather_object(parts, (self._lines, self._changed))
            for lines, changed in parts:
                self._changed |= changed
                for story, events in lines.items():
                    self._lines.setdefault(story, {}).update(events)
        if rank() or not self.settings.contact_sheet:
            return []
        return [self._sheet(s) for s in self._lines if s in self._changed or not (self.folder / s / SHEET).is_file()]

    def target(self, story: str, number: int, seed: int) -> Path:
        """The file of a picture."""
        return self.folder / story / f"seed_{seed}" / "image" / f"{number:05d}.{self.settings.format}"

    def prompt(self, line: Line) -> str:
        """What the text encoder gets."""
        return self.module.wording(line.frame).prompt

    def mark(self, line: Line, seed: int) -> str:
        """Digest of all that a picture depends on."""
        text = json.dumps([compared(self.about), seed, self.prompt(line), list(line.frame.names)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def is_done(self, line: Line, seed: int) -> bool:
        """Whether this picture is there and was drawn in the same way.

        Raises:
            UserError: it was drawn otherwise, and `overwrite` is not given.
        """
        path = self.target(line.story, line.number, seed)
        if not path.is_file():
            return False
        if picture_mark(path) == self.mark(line, seed):
            return text_path(path).is_file()
        if not self.settings.overwrite:
            raise UserError(
                f"{path}: is there, but {self._difference(path)}. Give predict.overwrite true to replace such "
                "pictures, or another predict.folder to keep both"
            )
        return False

    def _difference(self, path: Path) -> str:
        """Why a picture is not the wanted one, as far as the options beside it tell."""
        before = read_json(path.parent.parent / OPTIONS)
        if before:
            if before.get("weights") != self.about["weights"]:
                return f"was drawn with other weights (checkpoint {before.get('checkpoint')})"
            old, new = compared(before), compared(self.about)
            for key in sorted(new.keys() | old.keys()):
                if old.get(key) != new.get(key):
                    return f"was drawn with {key} {old.get(key)}, now {new.get(key)}"
            return "was drawn from another prompt"
        return f"has no {OPTIONS} beside it that tells how it was drawn"

    def _draw(self, jobs: list[tuple[Line, int]]) -> list[Path]:
        (first, _), (last, _) = jobs[0], jobs[-1]
        name = f"{first.story} {first.number}" + (f" to {last.story} {last.number}" if first != last else "")
        frames, seeds = [line.frame for line, _ in jobs], [seed for _, seed in jobs]
        quiet = self.module.trainer.progress_bar_callback is None
        with tqdm(desc=name, unit="step", leave=False, position=1, disable=quiet) as bar:
            pictures = self.module.draw(frames, seeds, progress=partial(show, bar))
        return [self._write(line, seed, picture) for (line, seed), picture in zip(jobs, pictures, strict=True)]

    def _write(self, line: Line, seed: int, picture: Tensor) -> Path:
        path = self.target(line.story, line.number, seed)
        options = {"seed": seed, **self.about}
        beside = path.parent.parent / OPTIONS
        if read_json(beside) != options:
            write_text(beside, json.dumps(options, indent=1, ensure_ascii=False))
        write_text(text_path(path), self.prompt(line))
        self._changed.add(line.story)
        return write_marked(path, picture, self.mark(line, seed))  # last: what has no picture is not done

    def _sheet(self, story: str) -> Path:
        events = dict(sorted(self._lines[story].items()))
        several = len(self.seeds) > 1
        jobs = [(number, seed) for seed in self.seeds for number in events]
        pictures = [read_picture(self.target(story, number, seed)) for number, seed in jobs]
        titles = [f"seed {seed}\n{events[number]}" if several else events[number] for number, seed in jobs]
        columns = len(events) if several else SHEET_COLUMNS
        return contact_sheet(self.folder / story / SHEET, torch.stack(pictures), titles, columns)


def about(module: "StoryDiffusion") -> dict[str, Any]:
    """What all pictures of a run depend on, in plain types: options, checkpoint, and a fingerprint of the weights."""
    found = {
        "checkpoint": module.trainer.ckpt_path,
        "weights": weights_fingerprint(module),
        "precision": str(module.trainer.precision),
        "world": None if module.world is None else describe_world(module.world),
        **module.sampling_about(),
    }
    return json.loads(json.dumps(found, default=str))  # as it will be read again


def compared(about: dict[str, Any]) -> dict[str, Any]:
    """By dotted names, what makes another picture if it changes."""
    return {key: value for key, value in flatten(about).items() if not f"{key}.".startswith(IGNORED)}


def weights_fingerprint(module: Any) -> str:
    """16 hexadecimal digits that tell weights apart, in milliseconds: of the ends of each tensor.

    Training changes all of a tensor, or its last rows where words were added. A path would not do: `last.ckpt` is
    another model after more training, and a copied run is the same.
    """
    components = getattr(module, "components", None)
    networks = [module, *(vars(components).values() if components is not None else ())]
    tensors = {}
    for network in networks:
        if isinstance(network, nn.Module):
            tensors.update((id(t), t) for t in [*network.parameters(), *network.buffers()] if t.numel())
    ends = [
        part for t in tensors.values() for part in (t.detach().flatten()[:SAMPLED], t.detach().flatten()[-SAMPLED:])
    ]
    numbers = torch.cat([end.float().cpu() for end in ends]) if ends else torch.zeros(0)
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]


def show(bar: tqdm, done: int, steps: int) -> None:
    """Move a progress bar."""
    bar.total = steps
    bar.update(done - bar.n)


def check_story(name: str) -> None:
    """Refuse a story name that is no name of one folder.

    Raises:
        UserError: names it.
    """
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise UserError(f"story {name!r}: is no name of a folder, rename the story")


def text_path(picture: Path) -> Path:
    """The prompt's file of a picture's."""
    return picture.parent.parent / "text" / f"{picture.stem}.txt"


def write_marked(path: Path, picture: Tensor, mark: str) -> Path:
    """Write uint8 [3, H, W] with a mark in its metadata, by which it is known again; returns the path."""
    if path.suffix == ".jpg":
        return save_picture(path, to_image(picture), quality=95, subsampling=0, comment=mark.encode())
    info = PngInfo()
    info.add_text(MARK, mark)
    return save_picture(path, to_image(picture), pnginfo=info)


def picture_mark(path: Path) -> str | None:
    """The mark of `write_marked`; None if there is none, or the file is no picture."""
    try:
        with Image.open(path) as image:
            found = image.info.get(MARK, image.info.get("comment"))
    except OSError:
        return None
    return found.decode(errors="replace") if isinstance(found, bytes) else found


def read_picture(path: Path) -> Tensor:
    """uint8 [3, H, W]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part{rank()}")  # two processes may write the same options
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """A file's dictionary; empty if there is none, or something broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
