"""The embedded emoji set as a data module: a small stand-in for training data with natural distribution shifts."""

from pathlib import Path
from typing import Literal

from datamodules.emoji import VENDORS, shards
from datamodules.image_text import EvaluationSet, ImageTextDataModule, Pictures
from mmtrain.config_errors import UserError

CLASSES = str(Path(__file__).with_name("classes.json"))


class EmojiDataModule(ImageTextDataModule):
    """1,418 concepts, each drawn by four vendors, 64 px, with their names.

    Args:
        heldout_vendor: the drawing style that is kept out of training.
        split: "style" trains on all concepts of the other vendors and evaluates on the held-out style; "concept"
            trains on the seen concepts of the other vendors and evaluates on their unseen concepts, and on the
            unseen concepts in the held-out style.
        captions: "txt" (the name), or "json:tags" (one keyword, drawn each time), or "json:keywords" (all of them).
        templates: prompts of the zero-shot classes. The captions are bare names, so is the default.
        Others: `ImageTextDataModule`.
    """

    def __init__(
        self,
        heldout_vendor: str = "twemoji",
        split: Literal["style", "concept"] = "style",
        captions: str = "txt",
        extra_captions: str | None = None,
        templates: list[str] | None = None,
        batch_size: int = 256,
        pictures: Pictures | None = None,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 512,
    ) -> None:
        if heldout_vendor not in VENDORS:
            raise UserError(f"heldout_vendor: {heldout_vendor!r} is not one of {', '.join(VENDORS)}")
        vendors = [v for v in VENDORS if v != heldout_vendor]
        templates = templates or ["{}"]
        sets = (
            {f"{heldout_vendor}_style": shards([heldout_vendor], "all")}
            if split == "style"
            else {
                "unseen_concepts": shards(vendors, "unseen"),
                f"unseen_{heldout_vendor}": shards([heldout_vendor], "unseen"),
            }
        )
        super().__init__(
            train=shards(vendors, "all" if split == "style" else "seen"),
            captions=captions,
            extra_captions=extra_captions,
            evaluate={
                name: EvaluationSet(paths, captions="txt", label="json:label", classes=CLASSES, templates=templates)
                for name, paths in sets.items()
            },
            batch_size=batch_size,
            pictures=pictures or Pictures(size=64, crop_scale=(0.7, 1.0), context_length=24),
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
        )
