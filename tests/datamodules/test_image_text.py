"""The data module: which sets exist, what each verb needs, and how captions and classes meet pictures."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from datamodules.evaluation_sets import EvaluationSet, class_names
from datamodules.image_text import ImageTextDataModule
from datamodules.paths import any_exists
from datamodules.pictures import Pictures
from datamodules.sources import Columns, CsvSource
from datamodules.synthetic import jpeg, picture, write_pairs
from datamodules.transforms import resize_and_centre_crop
from mmtrain.config_errors import UserError

PICTURES = Pictures(size=32, crop_scale=None, context_length=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three folders of labelled pictures, and a csv in which the first picture has three captions."""
    for label, name in enumerate(["10", "2", "1"]):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for i in range(label + 1):
            (tmp_path / "labelled" / name / f"{i}.jpg").write_bytes(jpeg(picture(label, i)))
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(picture(0, ord(name))))
    (tmp_path / "pairs.tsv").write_text('file\ttitle\na.jpg\t"one\nb.jpg\ttwo\na.jpg\tthree\na.jpg\tfour"\n')
    return tmp_path


def module(train: object = "nowhere.tar", stage: str = "validate", **sets: EvaluationSet) -> ImageTextDataModule:
    data = ImageTextDataModule(train, evaluate=sets, pictures=PICTURES, batch_size=2)
    data.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=stage),
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def test_evaluation_needs_no_training_data(folder) -> None:
    data = module(labelled=EvaluationSet(str(folder / "labelled"), classes=None, templates="a {}."))
    data.prepare_data()
    data.setup("validate")
    assert data.evaluation_sets["labelled"]["num_samples"] == 6
    assert tuple(data.evaluation_sets["labelled"]["prompts"].shape) == (3, 1, 8)
    labels = [int(label) for batch in data.val_dataloader()[0] for label in batch["label"]]
    assert labels == [0, 0, 0, 1, 1, 2]  # numeric folder names sort as numbers: 1, 2, 10


def test_classes_that_do_not_fit_the_folders_are_refused(folder) -> None:
    (folder / "labelled" / "10").rename(folder / "labelled" / "ten")
    data = module(labelled=EvaluationSet(str(folder / "labelled"), classes="imagenet"))
    with pytest.raises(UserError, match=r"1000 names for the 3 folders .* ten is neither"):
        data.setup("validate")
    with pytest.raises(UserError, match="no such file; give 'imagenet'"):
        class_names("imagnet", None)
    with pytest.raises(UserError, match="'a/b' has a slash"):
        ImageTextDataModule("x", evaluate={"a/b": EvaluationSet("y")})
    with pytest.raises(UserError, match=r"has no \{\} for the class name"):
        module(x=EvaluationSet(str(folder / "labelled"), templates="a photo")).setup("validate")


def test_missing_sets_are_skipped_with_a_warning_but_a_part_that_is_missing_is_named(tmp_path) -> None:
    write_pairs(tmp_path, [4, 4])
    there = str(tmp_path / "{00000..00001}.tar")
    assert any_exists(there) and any_exists(f"file://{tmp_path}/00000.tar") and any_exists("s3://bucket/x.tar")
    assert not any_exists([str(tmp_path / "*.zip"), str(tmp_path / "nothing")])
    data = module(here=EvaluationSet(there), gone=EvaluationSet(str(tmp_path / "no{0..3}.tar")))
    with pytest.warns(UserWarning, match="'gone' is skipped"):
        data.setup("validate")
    assert list(data.evaluation_sets) == ["here"]
    with pytest.raises(UserError, match=r"00002\.tar: no such shard \(1 of 3 named are missing\)"):
        module(half=EvaluationSet(str(tmp_path / "{00000..00002}.tar"))).setup("validate")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="none of its sets exists: gone"):
        module(gone=EvaluationSet(str(tmp_path / "gone.tar"))).setup("validate")


def test_rows_of_one_picture_are_its_captions_in_evaluation(folder) -> None:
    columns = Columns(image="file", caption="title")
    assert len(CsvSource(str(folder / "pairs.tsv"), columns)) == 4  # in training each row is a pair
    data = module(pairs=EvaluationSet(str(folder / "pairs.tsv"), columns=columns))
    data.setup("validate")
    (batch,) = data.val_dataloader()[0]
    assert batch["id"].tolist() == [0, 1] and batch["text_id"].tolist() == [0, 0, 0, 1]
    assert data.sources["pairs"].read([0])[0].captions == ['"one', "three", 'four"']  # quotes belong to a tsv's text
    with pytest.raises(UserError, match=r"set columns\.image and columns\.caption"):
        CsvSource(str(folder / "pairs.tsv"))


def test_training_from_a_csv_draws_every_row(folder) -> None:
    data = ImageTextDataModule(
        str(folder / "pairs.tsv"), columns=Columns("file", "title"), pictures=PICTURES, batch_size=2
    )
    data.setup("fit")
    texts = {tuple(row.tolist()) for batch in data.train_dataloader() for row in batch["text"]}
    assert len(texts) == 4 and data.data_counts == {"train": {"samples": 4}}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("shape", [(3, 1, 20_000), (3, 20_000, 2)])
def test_thin_pictures_cost_no_memory_and_keep_their_middle(shape) -> None:
    thin = torch.zeros(shape, dtype=torch.uint8)
    middle = shape[1] // 2 if shape[1] > shape[2] else shape[2] // 2
    (thin[:, middle - 20 : middle + 20] if shape[1] > shape[2] else thin[..., middle - 20 : middle + 20]).fill_(200)
    cropped = resize_and_centre_crop(thin, 224)
    assert cropped.shape == (3, 224, 224) and (cropped == 200).all()
