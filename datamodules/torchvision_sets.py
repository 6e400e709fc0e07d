"""Labelled data sets in the layout of torchvision, named by "torchvision://CIFAR10/test?root=FOLDER"."""

from collections.abc import Sequence
from urllib.parse import parse_qs, urlsplit

import torchvision
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from datamodules.sources import Sample, UnusableSample
from mmtrain.config_errors import UserError

SCHEME = "torchvision"
# Names of the training and test parts; more than one are joined (DTD and Flowers102: the published probe trains on
# train + val). Data sets that are not here take train=True and train=False.
SPLITS: dict[str, tuple[list[str], list[str]]] = {
    "DTD": (["train", "val"], ["test"]),
    "FGVCAircraft": (["trainval"], ["test"]),
    "Flowers102": (["train", "val"], ["test"]),
    "Food101": (["train"], ["test"]),
    "GTSRB": (["train"], ["test"]),
    "OxfordIIITPet": (["trainval"], ["test"]),
    "RenderedSST2": (["train"], ["test"]),
    "STL10": (["train"], ["test"]),
    "StanfordCars": (["train"], ["test"]),
    "SVHN": (["train"], ["test"]),
}


def is_torchvision(path: str | Sequence[str]) -> bool:
    """Whether a path names a data set of torchvision."""
    return isinstance(path, str) and path.startswith(f"{SCHEME}://")


def torchvision_path(name: str, split: str, root: str) -> str:
    """The path of one split, "train" or "test"."""
    return f"{SCHEME}://{name}/{split}?root={root}"


def open_torchvision(path: str) -> Dataset:
    """The data set that a path names, never downloaded.

    Raises:
        UserError: no such class in torchvision.datasets, or its files are not there.
    """
    parts = urlsplit(path)
    name, split, root = parts.netloc, parts.path.strip("/"), parse_qs(parts.query).get("root", ["."])[0]
    kind = getattr(torchvision.datasets, name, None)
    if kind is None or split not in ("train", "test"):
        raise UserError(f"{path}: expected {SCHEME}://NAME/train?root=FOLDER or /test, NAME from torchvision.datasets")
    try:
        if name not in SPLITS:
            return kind(root, train=split == "train", download=False)
        found = [kind(root, split=part, download=False) for part in SPLITS[name][split == "test"]]
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    return found[0] if len(found) == 1 else ConcatDataset(found)


class TorchvisionSource:
    """Labelled pictures of a torchvision data set.

    Raises:
        UserError: the data set is not there.
    """

    shard_starts = None

    def __init__(self, path: str) -> None:
        self.dataset = open_torchvision(path)
        first = self.dataset.datasets[0] if isinstance(self.dataset, ConcatDataset) else self.dataset
        names = getattr(first, "classes", None)
        self.class_names = [str(name) for name in names] if names else None
        self.counts, self.warnings = {"samples": len(self.dataset)}, []

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> list[int]:
        """Class of every sample; from the annotations where torchvision keeps them, else by reading all samples."""
        parts = self.dataset.datasets if isinstance(self.dataset, ConcatDataset) else [self.dataset]
        return [label for part in parts for label in _labels(part)]

    def read(self, samples: Sequence[int]) -> list[Sample | UnusableSample]:
        return [self._read_one(s) for s in samples]

    def _read_one(self, sample: int) -> Sample | UnusableSample:
        try:
            picture, label = self.dataset[sample]
            return Sample(pil_to_tensor(picture.convert("RGB")), label=int(label))
        except OSError:
            return UnusableSample("undecodable_image")


def _labels(dataset: Dataset) -> list[int]:
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return [int(label) for label in getattr(dataset, name)]
    if hasattr(dataset, "_samples"):
        return [int(label) for _, label in dataset._samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]
