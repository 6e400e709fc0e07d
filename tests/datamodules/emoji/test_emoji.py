import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

from datamodules import emoji

FOLDER = Path(emoji.__file__).parent


def read_samples(path: str) -> list[dict]:
    """Samples of a shard in order; the members of a sample stand side by side, the picture first."""
    samples = []
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            if extension == "webp":
                samples.append({"key": key})
            assert samples[-1]["key"] == key
            samples[-1][extension] = tar.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, str], list[dict]]:
    return {
        (vendor, split): [sample for path in emoji.shards([vendor], split) for sample in read_samples(path)]
        for vendor in emoji.VENDORS
        for split in ("seen", "unseen")
    }


@pytest.fixture(scope="module")
def classes() -> dict:
    return json.loads((FOLDER / "classes.json").read_text(encoding="utf-8"))


def test_files_are_small_and_all_are_listed():
    sizes = [path.stat().st_size for path in FOLDER.glob("*.tar.gz")]
    assert sum(sizes) <= 7_500_000
    assert max(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= 1_000_000
    assert sorted(emoji.shards(emoji.VENDORS)) == sorted(map(str, FOLDER.glob("*.tar.gz")))


def test_classes_are_unique(classes):
    rows = classes["classes"]
    assert len(rows) == len({row["name"] for row in rows}) == len({row["hexcode"] for row in rows}) == 1418
    assert {row["group"] for row in rows} == set(classes["groups"])
    assert {row["subgroup"] for row in rows} == set(classes["subgroups"])


@pytest.mark.parametrize("vendor", emoji.VENDORS)
def test_a_vendor_holds_every_concept_once(vendor, samples, classes):
    seen, unseen = ([sample["key"] for sample in samples[vendor, split]] for split in ("seen", "unseen"))
    assert sorted(seen + unseen) == sorted(f"{vendor}_{row['hexcode']}" for row in classes["classes"])
    assert 0.08 < len(unseen) / len(classes["classes"]) < 0.12


def test_all_vendors_share_the_split_by_concept(samples):
    for split in ("seen", "unseen"):
        hexcodes = [{sample["key"].split("_")[1] for sample in samples[vendor, split]} for vendor in emoji.VENDORS]
        assert all(codes == hexcodes[0] for codes in hexcodes)


def test_texts_match_the_class(samples, classes):
    for (vendor, _), part in samples.items():
        for sample in part:
            fields = json.loads(sample["json"])
            row = classes["classes"][fields["label"]]
            assert {name: fields[name] for name in row} == row
            assert sample["key"] == f"{vendor}_{row['hexcode']}" and fields["vendor"] == vendor
            assert sample["txt"].decode() == row["name"].replace(": ", " ") != ""
            assert fields["keywords"] == ", ".join(fields["tags"]) != ""


@pytest.mark.parametrize("vendor", emoji.VENDORS)
def test_pictures_decode_and_are_not_blank(vendor, samples):
    for sample in samples[vendor, "seen"] + samples[vendor, "unseen"]:
        encoded = torch.frombuffer(bytearray(sample["webp"]), dtype=torch.uint8)
        picture = decode_image(encoded, ImageReadMode.RGB)
        assert picture.shape == (3, 64, 64) and picture.dtype == torch.uint8
        assert picture.float().std() > 1, sample["key"]  # the faintest: a white square on white


def test_samples_are_in_mixed_order(samples):
    labels = [json.loads(sample["json"])["label"] for sample in samples["noto", "seen"]]
    assert abs(torch.corrcoef(torch.tensor([labels, range(len(labels))], dtype=torch.float))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["noto", "apple"],), "'apple'; allowed: noto, twemoji, fluent, openmoji"),
        (("noto",), r"got the string 'noto'; write \[noto\]"),
        ((["noto"], "new"), "concepts: unknown 'new'; allowed: all, seen, unseen"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        emoji.shards(*arguments)


def test_writing_is_reproducible(tmp_path):
    build = pytest.importorskip("datamodules.emoji.build")
    contents = [("noto_1f600.txt", b"grinning face"), ("noto_1f600.json", b"{}")]
    for name in ("first.tar.gz", "second.tar.gz"):
        build.write_shard(tmp_path / name, contents)
    first = (tmp_path / "first.tar.gz").read_bytes()
    assert first == (tmp_path / "second.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert [(member.name, member.mtime, member.uid) for member in tar] == [(name, 0, 0) for name, _ in contents]
