"""The embedded emoji as a data module: what is held out is never trained on."""

import pytest

from datamodules.emoji.datamodule import EmojiDataModule
from mmtrain.config_errors import UserError


def keys(source, field: str = "label") -> set[int]:
    return {getattr(sample, field) for sample in source.read(range(len(source)))}


@pytest.mark.parametrize("vendor", ["twemoji", "fluent"])
def test_style_split_keeps_a_vendor_out_and_all_concepts_in(vendor: str) -> None:
    data = EmojiDataModule(heldout_vendor=vendor)
    data.setup("fit")
    assert len(data.train_source) == 3 * 1418
    assert not any(f"/{vendor}-" in shard.url for shard in data.train_source.reader.index.shards)
    (name,) = data.evaluation_sets
    assert name == f"{vendor}_style"
    about = data.evaluation_sets[name]
    assert about["num_samples"] == 1418 and tuple(about["prompts"].shape) == (1418, 1, 24) and about["captioned"]
    assert keys(data.sources[name]) == set(range(1418))


def test_concept_split_keeps_concepts_out() -> None:
    texts = {"captions": "json:tags", "extra_captions": "json:keywords"}
    data = EmojiDataModule(heldout_vendor="fluent", split="concept", **texts)
    data.setup("fit")
    assert len(data.train_source) == 3 * 1275
    trained = {text for s in data.train_source.read(range(len(data.train_source))) for text in s.extra_captions}
    sizes = {name: len(source) for name, source in data.sources.items()}
    assert sizes == {"unseen_concepts": 3 * 143, "fluent_style": 1275, "unseen_fluent": 143}
    unseen = keys(data.sources["unseen_fluent"])
    assert unseen == keys(data.sources["unseen_concepts"]) and len(unseen) == 143
    assert not unseen & keys(data.sources["fluent_style"])
    about = data.evaluation_sets
    assert about["unseen_fluent"]["present"] == sorted(unseen) and not about["unseen_concepts"]["captioned"]
    assert len(trained) > 1000
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch["image"].shape) == (256, 3, 64, 64) and batch["extra_text"].shape == batch["text"].shape


def test_the_probe_goes_from_the_training_pictures_to_the_heldout_style() -> None:
    data = EmojiDataModule(split="concept")
    data.setup("test")
    assert data.loader_names[-2:] == ["subgroups", "subgroups/train"]
    assert (len(data.sources["subgroups"]), len(data.sources["subgroups/train"])) == (1275, 3 * 1275)
    about = data.evaluation_sets["subgroups"]
    labels = data.sources["subgroups/train"].labels()
    assert about["probe_classes"] == 1 + max(labels) == 95 and about["prompts"] is None and not about["captioned"]
    assert about["probe_chance"] == 1 / len(set(labels))


def test_unknown_vendor_is_named() -> None:
    with pytest.raises(UserError, match="'apple' is not one of noto, twemoji, fluent, openmoji"):
        EmojiDataModule(heldout_vendor="apple")
