"""Pictures of the creatures' base world with captions, as shards for a small CLIP."""

import io
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from PIL import Image
from rich.console import Console
from rich.progress import track

from datamodules.creature_base import BAR_FROM, VERSION, base_frame, base_picture
from datamodules.evaluation_sets import EvaluationSet
from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from datamodules.synthetic import write_shard
from mmtrain.config_errors import UserError, is_first_process

ABOUT = "made_by.json"
SHARD = 1000  # pictures
SIZE = (64, 112)  # as drawn

Shape = Literal["squash", "pad"]


def square(picture: Image.Image, size: int, shape: Shape) -> Image.Image:
    """A picture as CLIP takes it: squeezed to a square, or with black above and below."""
    if shape == "pad":
        side = max(picture.size)
        padded = Image.new("RGB", (side, side))
        padded.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = padded
    return picture.resize((size, size), Image.Resampling.BICUBIC)


class CreaturePairsDataModule(ImageTextDataModule):
    """Random creatures with captions, without style; validated and tested on the retrieval of unseen ones.

    A training caption is the event alone or the event with the descriptions, drawn each time, so that both texts of a
    story line can be compared with a picture. Evaluated are the latter.

    Args:
        path: folder of the shards; written if it is not there.
        count: training pairs.
        val_count: pairs of the set "creatures_base".
        image_size: height and width of the square pictures.
        shape: "squash" squeezes the wide pictures, "pad" puts black above and below; the same must be done with what is
            compared later.
        world_seed: of the pictures and captions; they are other ones than `CreatureBaseDataModule` draws.
        Others: `ImageTextDataModule`.

    Raises:
        UserError: the folder was made with other settings.
    """

    def __init__(
        self,
        path: str,
        count: int = 6000,
        val_count: int = 500,
        image_size: int = 64,
        shape: Shape = "squash",
        world_seed: int = 0,
        batch_size: int = 256,
        pictures: Pictures | None = None,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 512,
    ) -> None:
        if min(count, val_count) < 1:
            raise UserError(f"data.count, data.val_count: {count}, {val_count}: must be 1 or more")
        self.folder, self.counts = Path(path).expanduser(), {"train": count, "val": val_count}
        self.about = {
            "maker": "creature_pairs",
            "version": VERSION,
            "seed": world_seed,
            "counts": self.counts,
            "image_size": image_size,
            "shape": shape,
        }
        super().__init__(
            train=str(self.folder / "train-*.tar"),
            captions="json:captions",
            evaluate={"creatures_base": EvaluationSet(str(self.folder / "val-*.tar"))},
            batch_size=batch_size,
            # mirrored or cropped pictures would make captions false
            pictures=pictures or Pictures(size=image_size, crop_scale=None, context_length=48),
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
        )

    def prepare_data(self) -> None:
        """Write the shards if they are not there."""
        if not self.folder.exists():
            self._write()
        file = self.folder / ABOUT
        found = json.loads(file.read_text()) if file.is_file() else None
        if found != self.about:
            raise UserError(
                f"{self.folder}: made with {found}, wanted are {self.about}: remove it, or give another path"
            )
        super().prepare_data()

    def _write(self) -> None:
        part = self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:8]}.part")
        part.mkdir(parents=True)
        try:
            for split, count in self.counts.items():
                samples = self._samples(split, count)
                for shard in range(-(-count // SHARD)):
                    chosen = range(min(SHARD, count - shard * SHARD))
                    write_shard(part / f"{split}-{shard:05d}.tar", (next(samples) for _ in chosen))
            (part / ABOUT).write_text(json.dumps(self.about, indent=1))
            part.rename(self.folder)
        except OSError:
            if not (self.folder / ABOUT).exists():  # else another process was as quick
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _samples(self, split: str, count: int) -> Iterator[dict[str, bytes | str]]:
        numbers = range(count)
        if count >= BAR_FROM:
            numbers = track(
                numbers, f"pairs {split}", console=Console(stderr=True), transient=True, disable=not is_first_process()
            )
        for i in numbers:
            seed, name = self.about["seed"], f"pairs {split}"
            frame, png = base_frame(seed, name, i), io.BytesIO()
            picture = Image.fromarray(base_picture(seed, name, i, SIZE))
            square(picture, self.about["image_size"], self.about["shape"]).save(png, "PNG")
            full = " ".join([frame.event, *(character.description for character in frame.characters)])
            yield {
                "__key__": f"{i:06d}",
                "png": png.getvalue(),
                "txt": full,
                "json": json.dumps({"captions": [frame.event, full]}),
            }
