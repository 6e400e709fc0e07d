"""The embedded emoji set as a data module: a small stand-in for training data with natural distribution shifts."""

import json
from pathlib import Path
from typing import Literal

from datamodules.emoji import VENDORS, shards
from datamodules.evaluation_sets import EvaluationSet
from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from mmtrain.config_errors import UserError

CLASSES = str(Path(__file__).with_name("classes.json"))


class EmojiDataModule(ImageTextDataModule):
    """1,418 concepts, each drawn by four vendors, 64 px, with their names.

    `test` also fits a linear probe on the 95 subgroups, from the training pictures to the held-out style.

    Args:
        heldout_vendor: the drawing style that is kept out of training.
        split: "style" trains on all concepts of the other vendors and evaluates on the held-out style; "concept"
            trains on the seen concepts of the other vendors and evaluates on their unseen concepts, and on the seen
            and the unseen concepts in the held-out style.
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
        subset: int | None = None,
        batch_size: int = 256,
        pictures: Pictures | None = None,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int = 512,
    ) -> None:
        if heldout_vendor not in VENDORS:
            raise UserError(f"heldout_vendor: {heldout_vendor!r} is not one of {', '.join(VENDORS)}")
        vendors = [v for v in VENDORS if v != heldout_vendor]
        train = shards(vendors, "all" if split == "style" else "seen")
        style = shards([heldout_vendor], "all" if split == "style" else "seen")
        labelled = {"label": "json:label", "classes": CLASSES, "templates": templates or ["{}"]}
        sets = {f"{heldout_vendor}_style": EvaluationSet(style, **labelled, restrict=split == "concept")}
        if split == "concept":
            # without captions: three pictures share each name, so that no caption has one right picture
            unseen = EvaluationSet(shards(vendors, "unseen"), captions=None, **labelled, restrict=True)
            both = EvaluationSet(shards([heldout_vendor], "unseen"), **labelled, restrict=True)
            sets = {"unseen_concepts": unseen, **sets, f"unseen_{heldout_vendor}": both}
        subgroups = json.loads(Path(CLASSES).read_text())["subgroups"]
        sets["subgroups"] = EvaluationSet(
            style, captions=None, label="json:subgroup", classes=subgroups, templates=None, probe_train=train
        )
        super().__init__(
            train=train,
            captions=captions,
            extra_captions=extra_captions,
            subset=subset,
            evaluate=sets,
            batch_size=batch_size,
            pictures=pictures or Pictures(size=64, crop_scale=(0.7, 1.0), context_length=24),
            num_workers=num_workers,
            seed=seed,
            eval_batch_size=eval_batch_size,
        )
