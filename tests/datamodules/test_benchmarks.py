"""The data sets of the paper's tables under one folder: what is found, in which layout, what is said of the rest."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.benchmarks import PROBES, RETRIEVAL, ZERO_SHOT, benchmark_sets
from datamodules.evaluation_sets import EvaluationSet, imagenet_labels, karpathy_source
from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from datamodules.synthetic import jpeg, pairs, picture, write_shard
from datamodules.torchvision_sets import TorchvisionSource, torchvision_path
from mmtrain.config_errors import UserError

SHORT = Pictures(16, context_length=8)  # one setting, since the 80,000 prompts of ImageNet take seconds to tokenize


def put(path: Path, label: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(picture(label, 0, 20)))


def put_idx(path: Path, values: np.ndarray) -> None:
    """A file of the MNIST family: magic number with the number of dimensions, sizes, bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def put_fashion_mnist(root: Path, train: int, test: int) -> None:
    """Random pictures in the layout of torchvision, labels 0 to 9 in turn."""
    generator = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        raw = root / "FashionMNIST" / "raw"
        put_idx(raw / f"{name}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        put_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(count) % 10)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with some of the sets, each in another of the allowed layouts."""
    for wordnet_id in ("n01440764", "n02119789", "n15075141"):  # classes 0, 278, 999
        put(tmp_path / "imagenet/val" / wordnet_id / "a.JPEG")
    for number in ("0", "10", "2"):
        put(tmp_path / "imagenetv2-matched-frequency-format-val" / number / "x.jpeg")
    for wordnet_id in ("n01443537", "n02119789"):  # classes 1, 278
        put(tmp_path / "imagenet-r" / wordnet_id / "art_0.jpg")
    entries = [
        {
            "filepath": "val2014",
            "filename": "a.jpg",
            "split": "test",
            "sentences": [{"raw": f"a {i} "} for i in range(6)],
        },
        {"filepath": "val2014", "filename": "b.jpg", "split": "test", "sentences": [{"raw": "b"}]},
        {"filepath": "train2014", "filename": "c.jpg", "split": "train", "sentences": [{"raw": "c"}]},
    ]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text(json.dumps({"images": entries}))
    put(tmp_path / "coco/val2014/a.jpg")
    put(tmp_path / "coco/val2014/b.jpg")
    for split, names in (("train", "abc"), ("test", "ab")):
        for label, kind in enumerate(("cat", "dog")):
            for name in names:
                put(tmp_path / "cifar10" / split / kind / f"{name}.png", label)
        (tmp_path / "svhn" / split).mkdir(parents=True)
        samples = [{"__key__": str(i), "jpg": s["jpg"], "cls": str(i % 3)} for i, s in enumerate(pairs(6, 20))]
        write_shard(tmp_path / "svhn" / split / "0.tar", samples, stats=False)
    put_fashion_mnist(tmp_path, 20, 10)
    return tmp_path


def test_what_is_there_is_found_and_the_rest_told_with_its_place(root: Path) -> None:
    found, missing = benchmark_sets(str(root))
    here = {"imagenet", "imagenetv2_matched", "imagenet_r", "coco", "cifar10", "svhn", "fashion_mnist"}
    assert set(found) == here
    assert set(missing) == {*ZERO_SHOT, *RETRIEVAL, *PROBES} - here
    assert all(name.split("_")[0] in layout for name, layout in missing.items())
    assert "torchvision.datasets.Food101" in missing["food101"] and "dataset_flickr30k.json" in missing["flickr30k"]
    assert found["imagenet_r"].restrict and not found["imagenet"].restrict
    nothing, everything = benchmark_sets(str(root / "no_such_folder"))
    assert not nothing and set(everything) == {*ZERO_SHOT, *RETRIEVAL, *PROBES}


def test_the_data_module_tests_on_what_is_there(root: Path) -> None:
    data = ImageTextDataModule(train="unused.tar", benchmarks=str(root), pictures=SHORT, eval_batch_size=64)
    data.setup("test")
    assert data.loader_names == [
        "imagenet", "imagenetv2_matched", "imagenet_r", "coco", "cifar10", "cifar10/train", "svhn", "svhn/train",
        "fashion_mnist", "fashion_mnist/train",
    ]  # fmt: skip
    batches = {name: next(iter(loader)) for name, loader in zip(data.loader_names, data.test_dataloader(), strict=True)}
    assert batches["imagenet"]["label"].tolist() == [0, 278, 999]
    assert batches["imagenetv2_matched"]["label"].tolist() == [0, 2, 10]
    assert batches["imagenet_r"]["label"].tolist() == data.evaluation_sets["imagenet_r"]["present"] == [1, 278]
    assert tuple(data.evaluation_sets["imagenet_r"]["prompts"].shape) == (1000, 80, 8)
    assert batches["coco"]["text_id"].tolist() == [0] * 6 + [1] and batches["coco"]["caption"][0][0] == "a 0"
    assert data.evaluation_sets["coco"]["prompts"] is None
    assert batches["cifar10/train"]["label"].tolist() == [0, 0, 0, 1, 1, 1]
    about = data.evaluation_sets["svhn"]
    assert (about["probe_classes"], about["probe_chance"], about["prompts"]) == (3, 1 / 3, None)
    assert batches["fashion_mnist/train"]["label"].tolist() == [*range(10)] * 2
    assert batches["fashion_mnist"]["image"].shape == (10, 3, 16, 16)
    # training's evaluations do not touch any of it
    own = {"mine": data.wanted["imagenet"]}
    data = ImageTextDataModule(train="unused.tar", benchmarks=str(root), evaluate=own, pictures=SHORT)
    data.setup("validate")
    assert data.loader_names == ["mine"] and not data.missing


def test_own_sets_go_before_those_found(root: Path) -> None:
    own = EvaluationSet(str(root / "coco/dataset_coco.json"), templates=None, max_captions=5, prompt="a photo of {}")
    data = ImageTextDataModule(train="unused.tar", benchmarks=str(root), evaluate={"coco": own}, pictures=SHORT)
    data.setup("test")
    batch = data.peek("coco", 2)
    assert [len(captions) for captions in batch["caption"]] == [5, 1]
    assert batch["caption"][1] == ["a photo of b"]
    assert torch.equal(batch["text"][5:], data.pictures.tokens(["a photo of b"]))
    loader = dict(zip(data.loader_names, data.test_dataloader(), strict=True))["coco"]
    plain = ImageTextDataModule(train="unused.tar", benchmarks=str(root), pictures=SHORT)
    plain.setup("test")
    other = dict(zip(plain.loader_names, plain.test_dataloader(), strict=True))["coco"]
    assert loader.fingerprint() != other.fingerprint(), "features of other captions must not be taken for these"


def test_dtd_is_probed_on_train_and_val(tmp_path: Path) -> None:
    for split, names in (("train", ("x/1.jpg", "y/2.jpg")), ("val", ("x/3.jpg",)), ("test", ("y/4.jpg", "x/5.jpg"))):
        for name in names:
            put(tmp_path / "dtd/dtd/images" / name)
        (tmp_path / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names) + "\n")
    train = TorchvisionSource(torchvision_path("DTD", "train", str(tmp_path)))
    assert (len(train), train.labels(), train.class_names) == (3, [0, 1, 0], ["x", "y"])
    assert [sample.label for sample in train.read([0, 1, 2])] == train.labels()
    found, _ = benchmark_sets(str(tmp_path))
    assert list(found) == ["dtd"] and len(found["dtd"].open()) == 2 and len(found["dtd"].open_probe_train()) == 3


def test_labels_of_every_kind_of_annotation_are_those_of_the_samples(root: Path) -> None:
    source = TorchvisionSource(torchvision_path("FashionMNIST", "test", str(root)))
    assert source.labels() == [sample.label for sample in source.read(range(len(source)))] == list(range(10))
    shards = EvaluationSet(str(root / "svhn/test"), captions=None, label="cls", templates=None).open()
    assert shards.labels() == [sample.label for sample in shards.read(range(len(shards)))]


def test_wrong_layouts_are_named(root: Path) -> None:
    with pytest.raises(UserError, match="n99999999 is neither a WordNet id"):
        imagenet_labels(["n01440764", "n99999999"], "somewhere")
    assert imagenet_labels([f"class {i:04d}" for i in range(1000)], "somewhere") == list(range(1000))
    with pytest.raises(UserError, match="not a Karpathy file"):
        karpathy_source(str(root / "cifar10/train"))
    with pytest.raises(UserError, match="no picture in the split 'restval'"):
        karpathy_source(str(root / "coco/dataset_coco.json"), "restval")
    with pytest.raises(UserError, match=r"expected torchvision://NAME/train\?root=FOLDER"):
        TorchvisionSource("torchvision://CIFAR1000/train?root=x")
    with pytest.raises(UserError, match="Dataset not found"):
        TorchvisionSource(torchvision_path("CIFAR10", "test", str(root / "empty")))
    with pytest.raises(UserError, match=r"has no \{\} for the caption"):
        EvaluationSet("x", prompt="a photo")
    put(root / "cifar10/train/horse/a.png")
    with pytest.raises(UserError, match="have different classes"):
        benchmark_sets(str(root))[0]["cifar10"].open_probe_train()


def test_imagenet_r_numbered_from_0_to_199_is_refused(tmp_path: Path) -> None:
    pixels = jpeg(picture(0, 0, 8))
    samples = [{"__key__": str(i), "jpg": pixels, "cls": str(i % 200)} for i in range(200)]
    (tmp_path / "imagenet_r").mkdir()
    write_shard(tmp_path / "imagenet_r/0.tar", samples, stats=False)
    chosen = benchmark_sets(str(tmp_path))[0]["imagenet_r"]
    with pytest.raises(UserError, match="must be ImageNet-1k's class numbers"):
        chosen.describe(chosen.open(), Pictures(8, context_length=8))


def test_grey_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    for mode, name in (("L", "a"), ("RGBA", "b"), ("P", "c")):
        for split in ("train", "test"):
            path = tmp_path / "stl10" / split / "k" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (9, 9)).save(path)
    data = ImageTextDataModule(train="unused.tar", benchmarks=str(tmp_path), pictures=Pictures(8))
    data.setup("test")
    assert data.peek("stl10", 5)["image"].shape == (3, 3, 8, 8)
