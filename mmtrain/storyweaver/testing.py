"""What `test` does with a story model: draw every line of a set with each seed, score the pictures, and keep them.

<run>/pictures/<set>/seed_<s>/<story>_<line>.png   a picture
                              options.json         how it was drawn
<run>/pictures.jsonl                               the scores of each, see `mmtrain.storyweaver.records`
<run>/figures/<set>-stories.png                    some of them with their event sentences

Pictures that are there and would come out the same are taken from disk, so that a test that was cut short goes on.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mmtrain.config_errors import UserError
from mmtrain.distributed import rank, world_size
from mmtrain.story import Frame
from mmtrain.storyweaver.evaluate import StoryEvaluation, checked_recogniser, reference_features
from mmtrain.storyweaver.figures import contact_sheet
from mmtrain.storyweaver.outputs import (
    OPTIONS,
    about,
    check_story,
    compared,
    picture_mark,
    read_json,
    read_picture,
    show,
    write_marked,
    write_text,
)
from mmtrain.storyweaver.records import write_records
from mmtrain.storyweaver.sampling import story_seeds

if TYPE_CHECKING:
    from mmtrain.storyweaver.module import StoryDiffusion

PICTURES = "pictures"
SHEET_COLUMNS = 4
EXTRACTORS = ("image_features", "image_text_features")


class StoryTest:
    """The test of one set of story lines.

    Args:
        module: what draws.
        name: of the set.

    Raises:
        UserError: the recogniser does not fit the world, or is not good enough.
    """

    def __init__(self, module: "StoryDiffusion", name: str) -> None:
        self.module, self.name, self.settings = module, name, module.test_settings
        self.folder = Path(module.trainer.default_root_dir)
        skipped = self.settings.skip_seeds
        self.seeds = story_seeds(skipped + self.settings.seeds)[skipped:]
        shared = self._shared()
        self.evaluation = StoryEvaluation(
            module.trainer.datamodule.world,
            module.image_features,
            module.image_text_features,
            shared["recogniser"],
            shared["references"],
        ).to(module.device)
        self.missing = self.evaluation.missing
        self.about = about(module)
        self.records: dict[tuple[int, int], dict[str, Any]] = {}  # by line's id and sample; of all processes in the end
        self.figures: list[dict[str, str]] = []
        self._ids: dict[tuple[str, int], int] = {}  # by story and line

    def _shared(self) -> dict[str, Any]:
        """What the sets of a test have in common: the recogniser, and features of the real pictures."""
        lent, key = self.module.lent, ("story_test", id(self.settings))
        if key not in lent:
            module, data = self.module, self.module.trainer.datamodule
            found: dict[str, Any] = {"recogniser": checked_recogniser(self.settings, data.world), "references": {}}
            networks = {name: network for name in EXTRACTORS if (network := getattr(module, name)) is not None}
            if networks and hasattr(data, "references"):
                most = self.settings.most_references
                pictures = {name: own[:most] for name, own in data.references().items()}
                found["references"] = {
                    name: reference_features(network, pictures, module.device) for name, network in networks.items()
                }
            lent[key] = found
        return lent[key]

    def run(self, batch: dict[str, Any]) -> None:
        """Draw the lines of a batch with each seed and score the pictures; an empty one is left out.

        Args:
            batch: "frames" FrameBatch, "id" int64 [B], "story" names, "line" numbers in the story.

        Raises:
            UserError: a story's name is no file name, or two lines have the same story and number.
        """
        if not batch or not len(batch["frames"]):
            return
        frames, ids = list(batch["frames"]), torch.as_tensor(batch["id"])
        lines = [(str(story), int(line)) for story, line in zip(batch["story"], batch["line"], strict=True)]
        for line, number in zip(lines, ids.tolist(), strict=True):
            check_story(line[0])
            if self._ids.setdefault(line, number) != number:
                raise UserError(f"{self.name}: story {line[0]} has two lines {line[1]}; give each story its own name")
        for sample, seed in enumerate(self.seeds):
            pictures = self._pictures(frames, lines, seed).to(self.module.device)
            scores = self.evaluation.add(frames, pictures, ids, sample)
            for frame, line, number, score in zip(frames, lines, ids.tolist(), scores, strict=True):
                self.records[number, sample] = self._record(frame, line, seed) | score

    def _record(self, frame: Frame, line: tuple[str, int], seed: int) -> dict[str, Any]:
        file = self.target(line, seed).relative_to(self.folder).as_posix()
        about_it = {"set": self.name, "story": line[0], "line": line[1], "seed": seed, "file": file}
        return about_it | {"prompt": frame.prompt, "event": frame.event, "characters": list(frame.names)}

    def target(self, line: tuple[str, int], seed: int) -> Path:
        """The file of a picture of a (story, line)."""
        return self.folder / PICTURES / self.name / f"seed_{seed}" / f"{line[0]}_{line[1]:02d}.png"

    def mark(self, frame: Frame, seed: int) -> str:
        """Digest of all that a picture depends on: weights, options, seed, prompt, tags."""
        prompt = self.module.wording(frame).prompt
        text = json.dumps([compared(self.about), seed, prompt, list(frame.names)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _pictures(self, frames: Sequence[Frame], lines: Sequence[tuple[str, int]], seed: int) -> Tensor:
        """Pictures uint8 [B, 3, H, W] of lines, from disk or drawn now, and then written."""
        targets, marks = [self.target(line, seed) for line in lines], [self.mark(frame, seed) for frame in frames]
        found: dict[int, Tensor] = {}
        for row, (path, mark) in enumerate(zip(targets, marks, strict=True)):
            if self.settings.reuse and picture_mark(path) == mark:
                found[row] = read_picture(path)
        wanted, size = [row for row in range(len(frames)) if row not in found], self.module.sampler.batch_size
        if wanted:
            self._write_options(targets[0].parent / OPTIONS, seed)
        for first in range(0, len(wanted), size):  # what is drawn is written soon
            rows = wanted[first : first + size]
            for row, picture in zip(rows, self._draw([frames[row] for row in rows], seed), strict=True):
                found[row] = picture
                own = targets[row].with_name(f".rank{rank()}-{targets[row].name}")  # a line can be on two processes
                os.replace(write_marked(own, picture, marks[row]), targets[row])
        return torch.stack([found[row] for row in range(len(frames))])

    def _draw(self, frames: list[Frame], seed: int) -> Tensor:
        quiet = self.module.trainer.progress_bar_callback is None
        with tqdm(desc=f"{self.name}, seed {seed}", unit="step", leave=False, position=1, disable=quiet) as bar:
            return self.module.draw(frames, [seed] * len(frames), progress=partial(show, bar))

    def _write_options(self, path: Path, seed: int) -> None:
        options = {"seed": seed, **self.about}
        if read_json(path) != options:
            write_text(path, json.dumps(options, indent=1, ensure_ascii=False))

    def finish(self) -> dict[str, float]:
        """The metrics; call it on every process. The first one writes the records and draws the contact sheet."""
        metrics = self.evaluation.compute()
        if world_size() > 1:
            everyone: list[Any] = [None] * world_size()
            dist.all_gather_object(everyone, self.records)
            self.records = {key: record for one in everyone for key, record in one.items()}
        self.records = dict(sorted(self.records.items()))
        if self.module.trainer.is_global_zero:
            write_records(self.folder, self.name, list(self.records.values()))
            self._draw_sheet()
        return metrics

    def _draw_sheet(self) -> None:
        """Lines from all over the set, with the first seed; and where it is wrong, what the recogniser sees."""
        shown = [record for record in self.records.values() if record["seed"] == self.seeds[0]]
        shown = [record for record in shown if (self.folder / record["file"]).is_file()]  # other hosts have their own
        count = min(self.settings.sheet_pictures, len(shown))
        if not count:
            return
        shown = [shown[i * len(shown) // count] for i in range(count)]
        titles = []
        for record in shown:
            asked = ", ".join(record["characters"]) or "nobody"
            seen = record.get("predicted", record["characters"])  # without a recogniser nobody says otherwise
            wrong = set(seen) != set(record["characters"])
            titles.append(record["event"] + f"\n{asked}" + f", seen: {_listed(seen)}" * wrong)
        file = f"figures/{self.name}-stories.png"
        pictures = torch.stack([read_picture(self.folder / record["file"]) for record in shown])
        contact_sheet(self.folder / file, pictures, titles, SHEET_COLUMNS)
        self.figures.append({"file": file, "title": f"{self.name}: {self.module.method}", "kind": "sample"})

    def protocol(self) -> str:
        """How the numbers were measured, in words; after `finish`."""
        lines, shown = len({number for number, _ in self.records}), ", ".join(map(str, self.seeds[:5]))
        more = ", ..." if len(self.seeds) > 5 else ""
        words = [f"{lines} lines, {len(self.seeds)} seed(s) each ({shown}{more})", self.evaluation.protocol()]
        if self.evaluation.known:
            most = self.settings.most_references
            words.append("real pictures: those of one character alone" + (f", the first {most}" if most else ""))
        words.append("95 % intervals over lines: Wilson for fractions, bootstrap for cosines")
        words += [f"{name} left out: {why}" for name, why in self.missing.items()]
        return "; ".join(word for word in words if word)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nobody"
