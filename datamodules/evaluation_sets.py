"""Sets of pictures to evaluate on: captioned (retrieval), labelled (zero-shot, linear probe), or both."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import yaml
from torch import Tensor

from datamodules.paths import any_exists
from datamodules.pictures import Pictures
from datamodules.sources import Columns, CsvSource, FolderSource, ShardSource, Source, is_csv, is_picture_folder
from datamodules.text import tokenize
from datamodules.torchvision_sets import TorchvisionSource, is_torchvision
from mmtrain.config_errors import UserError

OPENAI_IMAGENET = tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)


@dataclass
class EvaluationSet:
    """A set of pictures to evaluate on.

    Args:
        path: shards, a csv/tsv, a Karpathy split (dataset_coco.json), a folder with one sub-folder of pictures a class,
            or a data set of torchvision ("torchvision://CIFAR10/test?root=FOLDER"). One that does not exist is skipped
            with a warning.
        captions: where a shard's captions are ("txt", "json:KEY"), None for no retrieval.
        max_captions: keep the first so many captions of a picture; None keeps all.
        prompt: put around captions, {} stands for the caption; ALIP has "a photo of {}".
        label: where a shard's class is ("cls", "json:KEY"), a number or one of the names in `classes`; None for none.
        classes: "imagenet", or a json/yaml file with a list of names or {"classes": [...]}, or the list itself; None
            takes folder names. With "imagenet", folders are WordNet ids or class numbers.
        templates: prompts with {} for the class name, or "openai_imagenet" for the 80 of the CLIP paper; None for no
            zero-shot classification.
        restrict: choose among the classes that occur in the set only (ImageNet-R); the accuracy among all of them is
            reported beside it.
        probe_train: training split for a linear probe on the labels, in the same notation as `path`, which is its test
            split. Probes are fitted by `test` only.
        columns: of a csv; rows with the same picture are its captions.
    """

    path: str | list[str]
    captions: str | None = "txt"
    max_captions: int | None = None
    prompt: str = "{}"
    label: str | None = None
    classes: str | list[str] | None = None
    templates: str | list[str] | None = "openai_imagenet"
    restrict: bool = False
    probe_train: str | list[str] | None = None
    columns: Columns | None = None

    def __post_init__(self) -> None:
        if "{}" not in self.prompt:
            raise UserError(f"prompt: {self.prompt!r} has no {{}} for the caption")

    @property
    def is_probe_only(self) -> bool:
        """Nothing to measure without fitting a probe."""
        return self.probe_train is not None and self.templates is None and self.captions is None

    def exists(self) -> bool:
        """False if nothing at all is there; object stores are not asked."""
        return all(any_exists(p) or is_torchvision(p) for p in (self.path, self.probe_train) if p is not None)

    def open(self) -> Source:
        """The set's source."""
        return self._open(self.path)

    def open_probe_train(self) -> Source | None:
        """The source of the probe's training split; None without one.

        Raises:
            UserError: its classes are not those of the test split.
        """
        if self.probe_train is None:
            return None
        train, test = self._open(self.probe_train), self.open()
        if getattr(train, "class_names", None) != getattr(test, "class_names", None):
            raise UserError(f"probe_train: {self.probe_train} and {self.path} have different classes")
        return train

    def _open(self, path: str | list[str]) -> Source:
        if is_torchvision(path):
            return TorchvisionSource(path)
        if is_picture_folder(path):
            source = FolderSource(path)
            if self.classes == "imagenet":
                source.set_labels(imagenet_labels(source.class_names, path))
            return source
        if is_csv(path):
            return CsvSource(path, self.columns, group=True)
        if isinstance(path, str) and path.endswith(".json"):
            return karpathy_source(path)
        names = class_names(self.classes, None) if self.label and self.classes else None
        return ShardSource(path, self.captions, None, self.label, class_names=names)

    def caption_prompts(self, captions: list[str]) -> list[str]:
        """The captions of one picture as they are encoded."""
        return [self.prompt.replace("{}", caption) for caption in captions[: self.max_captions]]

    def describe(self, source: Source, pictures: Pictures, probe_train: Source | None = None) -> dict[str, Any]:
        """What an evaluation must know: number of samples, kinds of measurement, prompts, classes that occur.

        Args:
            source: the set's.
            pictures: settings of its prompts.
            probe_train: the source of the probe's training split, if one is to be fitted.
        """
        prompts = self.prompts(source, pictures)
        needed = self.restrict or probe_train is not None
        present = sorted(set(source.labels())) if needed and is_labelled(source) else []
        about: dict[str, Any] = {
            "num_samples": len(source),
            "captioned": self.captions is not None and is_captioned(source),
            "prompts": prompts,
            "class_names": None if prompts is None else class_names(self.classes, getattr(source, "class_names", None)),
            "present": present if self.restrict else None,
        }
        if self.restrict and self.classes == "imagenet" and len(present) > 100 and present[-1] < 200:
            raise UserError(f"{self.path}: its labels number 200 classes; they must be ImageNet-1k's class numbers")
        if probe_train is not None:
            about["probe_classes"] = 1 + max([*present, *probe_train.labels()])
            about["probe_chance"] = 1 / len(present)
        return about

    def prompts(self, source: Source, pictures: Pictures) -> Tensor | None:
        """Token ids [classes, templates, context_length] of the zero-shot prompts, None for no classification."""
        if self.templates is None or not is_labelled(source):
            return None
        folders = getattr(source, "class_names", None)
        names = class_names(self.classes, folders)
        if folders is not None and self.classes != "imagenet" and len(names) != len(folders):
            raise UserError(
                f"classes: {self.classes} has {len(names)} names for the {len(folders)} folders of {self.path}"
            )
        templates = OPENAI_IMAGENET if self.templates == "openai_imagenet" else self.templates
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        if bad := [t for t in templates if "{}" not in t]:
            raise UserError(f"templates: {bad[0]!r} has no {{}} for the class name")
        return _tokens(tuple(names), templates, pictures.context_length, pictures.faithful_truncation)


@lru_cache(maxsize=8)
def _tokens(names: tuple[str, ...], templates: tuple[str, ...], context_length: int, faithful: bool) -> Tensor:
    """Token ids [classes, templates, context_length]; the same tensor for all sets with these classes."""
    filled = [template.replace("{}", name) for name in names for template in templates]
    return tokenize(filled, context_length, faithful).view(len(names), len(templates), -1)


def is_labelled(source: Source) -> bool:
    """Whether the samples of a source have a class."""
    return isinstance(source, FolderSource | TorchvisionSource) or bool(getattr(source, "fields", {}).get("label"))


def is_captioned(source: Source) -> bool:
    """Whether the samples of a source have captions."""
    return isinstance(source, CsvSource) or bool(getattr(source, "fields", {}).get("captions"))


def class_names(classes: str | list[str] | None, folder_names: list[str] | None) -> list[str]:
    """Names of the classes in label order; see `EvaluationSet.classes`."""
    if isinstance(classes, list):
        return list(classes)
    if classes == "imagenet":
        return list(open_clip.IMAGENET_CLASSNAMES)
    if classes is None:
        if folder_names is None:
            raise UserError("classes: a labelled shard set needs a file with its class names, or 'imagenet'")
        return [name.replace("_", " ") for name in folder_names]
    path = Path(classes)
    if not path.exists():
        raise UserError(f"classes: {classes}: no such file; give 'imagenet', or a json or yaml list of names")
    listed = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    listed = listed["classes"] if isinstance(listed, dict) else listed
    return [c["name"] if isinstance(c, dict) else str(c) for c in listed]


def imagenet_labels(folder_names: list[str], path: str) -> list[int]:
    """Class number of each folder: WordNet ids (n01440764), class numbers, or 1,000 folders in label order.

    Raises:
        UserError: a folder whose class cannot be known.
    """
    if all(name.isdigit() and int(name) < 1000 for name in folder_names):
        return [int(name) for name in folder_names]
    from timm.data import ImageNetInfo  # here: slow, and most sets do not need it

    number = {wordnet_id: label for label, wordnet_id in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if all(name in number for name in folder_names):
        return [number[name] for name in folder_names]
    if len(folder_names) == len(number):
        return list(range(len(number)))
    strange = next((n for n in folder_names if n not in number and not n.isdigit()), folder_names[0])
    raise UserError(
        f"classes: imagenet has 1000 names for the {len(folder_names)} folders of {path}, "
        f"and {strange} is neither a WordNet id of ImageNet-1k nor a class number"
    )


def karpathy_source(path: str, split: str = "test") -> CsvSource:
    """Pictures and captions of one split of a Karpathy file (dataset_coco.json, dataset_flickr30k.json).

    Pictures are looked for beside the file: in the sub-folder that an entry names (COCO), or in flickr30k-images/.

    Raises:
        UserError: not such a file, or no picture in the split.
    """
    try:
        entries = json.loads(Path(path).read_text())["images"]
        pairs = [
            (f"{entry.get('filepath', 'flickr30k-images')}/{entry['filename']}", sentence["raw"].strip())
            for entry in entries
            if entry["split"] == split
            for sentence in entry["sentences"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a Karpathy file with images, split and sentences ({error!r})") from error
    if not pairs:
        raise UserError(f"{path}: no picture in the split {split!r}")
    return CsvSource.from_pairs(Path(path).parent, pairs)
