"""The data sets of the RankCLIP paper's tables, looked for under one folder (sections 5.1 to 5.3).

`test` evaluates on those that are there and says how to lay out the others.
"""

import os

from datamodules.evaluation_sets import EvaluationSet
from datamodules.sources import is_picture_folder
from datamodules.torchvision_sets import TorchvisionSource, torchvision_path
from mmtrain.config_errors import UserError

ZERO_SHOT = {  # set -> folders it may stand in; the second names are those of the official archives
    "imagenet": ("imagenet/val",),
    "imagenetv2_matched": ("imagenetv2_matched", "imagenetv2-matched-frequency-format-val"),
    "imagenetv2_threshold": ("imagenetv2_threshold", "imagenetv2-threshold0.7-format-val"),
    "imagenetv2_top": ("imagenetv2_top", "imagenetv2-top-images-format-val"),
    "imagenet_r": ("imagenet_r", "imagenet-r"),
}
RETRIEVAL = {"coco": "dataset_coco.json", "flickr30k": "dataset_flickr30k.json"}  # set -> Karpathy's file
PROBES = {  # set -> class in torchvision.datasets. The first ten are Table 3, in its order, the next three CyCLIP's.
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "dtd": "DTD",
    "fgvc_aircraft": "FGVCAircraft",
    "food101": "Food101",
    "gtsrb": "GTSRB",
    "oxford_pets": "OxfordIIITPet",
    "sst2": "RenderedSST2",
    "stl10": "STL10",
    "svhn": "SVHN",
    "caltech101": None,  # torchvision has no split of it
    "flowers102": "Flowers102",
    "stanford_cars": "StanfordCars",
    "fashion_mnist": "FashionMNIST",  # in no table; a small set that Linux distributions package
}


def benchmark_sets(root: str) -> tuple[dict[str, EvaluationSet], dict[str, str]]:
    """The sets found under `root`, and for each other one how to lay it out there; all if there is no such folder."""
    found = {
        **{name: _zero_shot(root, name) for name in ZERO_SHOT},
        **{name: _retrieval(root, name) for name in RETRIEVAL},
        **{name: _probe(root, name) for name in PROBES},
    }
    missing = {name: _layout(name) for name, there in found.items() if there is None}
    return {name: there for name, there in found.items() if there is not None}, missing


def _zero_shot(root: str, name: str) -> EvaluationSet | None:
    for folder in ZERO_SHOT[name]:
        path = f"{root}/{folder}"
        if _has_pictures(path):
            label = None if is_picture_folder(path) else "cls"
            return EvaluationSet(path, captions=None, label=label, classes="imagenet", restrict=name == "imagenet_r")
    return None


def _retrieval(root: str, name: str) -> EvaluationSet | None:
    karpathy = f"{root}/{name}/{RETRIEVAL[name]}"
    if os.path.exists(karpathy):
        return EvaluationSet(karpathy, templates=None)
    for path in (f"{root}/{name}/test", f"{root}/{name}"):
        if _holds_shards(path):
            return EvaluationSet(path, captions="json:captions", templates=None)
    return None


def _probe(root: str, name: str) -> EvaluationSet | None:
    train, test = f"{root}/{name}/train", f"{root}/{name}/test"
    if _has_pictures(train) and _has_pictures(test):
        label = "cls" if _holds_shards(test) else None
        return EvaluationSet(test, captions=None, label=label, templates=None, probe_train=train)
    kind = PROBES[name]
    paths = [torchvision_path(kind, split, root) for split in ("test", "train")] if kind else []
    try:
        for path in paths:
            TorchvisionSource(path)
    except UserError:
        return None
    return EvaluationSet(paths[0], captions=None, templates=None, probe_train=paths[1]) if paths else None


def _holds_shards(path: str) -> bool:
    return os.path.isdir(path) and any(n.endswith((".tar", ".tar.gz")) for n in os.listdir(path))


def _has_pictures(path: str) -> bool:
    return _holds_shards(path) or is_picture_folder(path)


def _layout(name: str) -> str:
    """One line: where below the root the set is looked for."""
    if name in ZERO_SHOT:
        classes = "0 to 999" if name.startswith("imagenetv2") else "n01440764, ..."
        return f"{' or '.join(ZERO_SHOT[name])}: a folder of pictures a class ({classes}), or *.tar with jpg and cls"
    if name in RETRIEVAL:
        pictures = "val2014/" if name == "coco" else "flickr30k-images/"
        return (
            f"{name}: {RETRIEVAL[name]} (Karpathy's split) beside {pictures}, "
            "or test/*.tar with jpg and json {captions: [...]}"
        )
    own = f"{name}/train and {name}/test: a folder of pictures a class, or *.tar with jpg and cls"
    kind = PROBES[name]
    return own + (f"; or what torchvision.datasets.{kind}(ROOT, download=True) makes" if kind else "")
