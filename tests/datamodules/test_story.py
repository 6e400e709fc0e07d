"""The data modules of StoryWeaver: pictures as released, the same order for any number of processes, sets, folds."""

import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision import transforms

from datamodules.story import CharacterDataModule, StoryDataModule
from datamodules.story_batches import CharacterOrder, fit_picture, held_out, read_picture, spread
from mmtrain.config_errors import UserError
from mmtrain.story import FrameBatch, StoryFault
from tests.datamodules.story_worlds import CAST, FOLDER, SIZE, epochs, ids, joined, opened, same, write, write_world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 characters with 5 pictures each and 6 pictures of two: 21."""
    return write_world(tmp_path_factory.mktemp("story"), frames=5, pairs=6)


# --- pictures ---


def test_released_fit_is_the_published_transform() -> None:
    """Shorter side to H, bilinear, centre crop with black bars; Pillow rounds elsewhere: one step of 255 is allowed."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 16, 3), np.uint8)
    for height, width in [(108, 192), (100, 239), (100, 130), (190, 80)]:
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        published = transforms.Compose([transforms.Resize(SIZE[0]), transforms.CenterCrop(SIZE)])(picture)
        ours = fit_picture(torch.from_numpy(np.array(picture)).permute(2, 0, 1), SIZE, "released")
        difference = ours.permute(1, 2, 0).numpy().astype(int) - np.array(published)
        assert ours.shape == (3, *SIZE) and np.abs(difference).max() <= 1, (height, width)


def test_cover_leaves_no_bars_and_pad_loses_nothing() -> None:
    for height, width in [(64, 112), (40, 112), (64, 70), (90, 30), (31, 57), (4, 900)]:
        column = torch.arange(width) * 100 // width + 100  # 100 to 199 from left to right
        picture = column.to(torch.uint8).expand(3, height, width)
        cover, pad = (fit_picture(picture, SIZE, fit) for fit in ("cover", "pad"))
        assert cover.shape == pad.shape == (3, *SIZE) and cover.min() >= 100
        row = cover[0, 16].int()
        shown = min(1, height * SIZE[1] / (width * SIZE[0]))
        assert abs(int(row[-1] - row[0]) - 100 * shown) < 6  # not squeezed
        assert abs(int(row[27] + row[28]) - 299) < 6  # the centre
        seen = pad[0, 16][pad[0, 16] >= 100] if height * SIZE[1] > width * SIZE[0] else pad[0, 16]
        if width < 900:
            assert seen[0] < 107 and seen[-1] > 191


def test_files_are_read_as_pillow_converts_them(tmp_path) -> None:
    generator = np.random.default_rng(1)
    rgba = Image.fromarray(generator.integers(0, 255, (20, 30, 4), np.uint8), "RGBA")
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("RGB").quantize(16).save(tmp_path / "palette.png")
    rgba.convert("L").save(tmp_path / "grey.png")
    rgba.convert("RGB").save(tmp_path / "other.png", format="BMP")
    rgba.convert("RGB").save(tmp_path / "photo.png", format="JPEG", quality=95)  # as 173 of TBC-Bench's
    for path in tmp_path.iterdir():
        expected = np.array(Image.open(path).convert("RGB")).astype(int)
        found = read_picture(path).permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= (4 if path.stem == "photo" else 0), path.name


def test_a_picture_that_breaks_off_is_named_before_training(tmp_path) -> None:
    root = write_world(tmp_path / "w", frames=2)
    for name in ("Ada", "Cy"):
        path = root / "train-folder" / FOLDER / "image" / name / "1.png"
        path.write_bytes(path.read_bytes()[:60])  # the header is whole
    with pytest.raises(StoryFault, match=r"(?s)Ada/1\.png: cannot be used .*Cy/1\.png: cannot be used"):
        opened(StoryDataModule, root)
    data = opened(StoryDataModule, root, cache=False)  # read when it comes up
    with pytest.raises(StoryFault, match="cannot be used"):
        epochs(data.train_dataloader())


# --- training batches ---


def test_batches_hold_pictures_and_what_they_show(root) -> None:
    data = opened(StoryDataModule, root)
    assert data.world.name == "tiny" and len(data.train_dataloader()) == 5
    assert data.data_counts["train"] == {"pictures": 21, "of_one_character": 15, "of_several": 6}
    for batch in epochs(data.train_dataloader()):
        assert batch.keys() == {"picture", "frames", "id"}
        assert batch["picture"].shape == (4, 3, *SIZE) and batch["picture"].dtype == torch.uint8
        assert isinstance(batch["frames"], FrameBatch) and batch["id"].dtype == torch.int64
        for picture, frame, place in zip(batch["picture"], batch["frames"], batch["id"], strict=True):
            assert frame == data.frames[place].frame
            for i, name in enumerate(frame.names):  # the tags' order is that from left to right
                middle = (2 * i + 1) * SIZE[1] // (2 * len(frame.names))
                assert (picture[:, 24, middle].int() - torch.tensor(CAST[name][2])).abs().max() <= 1


def test_the_order_does_not_depend_on_processes_workers_or_the_cache(root) -> None:
    for group in ("all", "character"):
        settings = {"group": group, "seed": 3}
        alone = epochs(opened(StoryDataModule, root, **settings).train_dataloader())
        halves = [
            epochs(opened(StoryDataModule, root, rank=rank, world_size=2, **settings).train_dataloader())
            for rank in range(2)
        ]
        assert same(alone, joined(halves))
        assert same(alone, epochs(opened(StoryDataModule, root, cache=False, **settings).train_dataloader()))
        assert ids(alone) != ids(epochs(opened(StoryDataModule, root, group=group, seed=4).train_dataloader()))
    assert same(alone, epochs(opened(StoryDataModule, root, num_workers=1, **settings).train_dataloader()))


def test_a_run_goes_on_inside_an_epoch(root) -> None:
    for group in ("all", "character"):
        data = opened(StoryDataModule, root, group=group, batch_size=2)
        whole = epochs(data.train_dataloader())
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        batches = iter(loader)
        taken = [next(batches) for _ in range(2)]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        again = data.train_dataloader()
        again.load_state_dict(state)
        assert same(whole[len(whole) // 2 :], taken + list(again))
    with pytest.raises(UserError, match="was made with 12 training samples, now there are 21"):
        opened(StoryDataModule, root, batch_size=2).train_dataloader().load_state_dict(state)


def test_batches_of_one_character(root) -> None:
    data = opened(StoryDataModule, root, group="character", batch_size=2)
    batches = epochs(data.train_dataloader(), 3)
    shown = [{frame.names for frame in batch["frames"]} for batch in batches]
    assert all(len(names) == 1 for names in shown)
    counts = Counter(next(iter(names)) for names in shown)
    assert counts == {("Ada",): 6, ("Bo",): 6, ("Cy",): 6}  # floor(5 / 2) batches an epoch
    first = batches[:6]
    assert len(set(chain(*ids(first)))) == 12  # none twice in an epoch
    assert [next(iter(names)) for names in shown[:6]] != [next(iter(names)) for names in shown[6:12]]
    few = epochs(
        opened(StoryDataModule, root, group="character", batch_size=8, characters=["Bo"]).train_dataloader(), 1
    )
    times = Counter(few[0]["id"].tolist())  # 5 pictures in a batch of 8: all, and three of them again
    assert len(few) == 1 and set(times) == set(range(5, 10)) and sorted(times.values()) == [1, 1, 2, 2, 2]
    order = CharacterOrder([range(3), [], range(3, 20)], 4, seed=1)
    assert len(order(0)) == 20 and np.array_equal(order(5), order(5)) and set(order(0)) > {0, 1, 2}


def test_chosen_characters_are_trained_alone(root) -> None:
    data = opened(StoryDataModule, root, characters=["Cy", "Ada"])
    frames = [frame.names for batch in epochs(data.train_dataloader()) for frame in batch["frames"]]
    assert set(frames) == {("Ada",), ("Cy",)} and data.data_counts["train"]["pictures"] == 10
    with pytest.raises(UserError, match=r"data\.characters: Adda: tiny has no such character; nearest: Ada"):
        opened(StoryDataModule, root, characters=["Adda"])
    with pytest.raises(UserError, match="batch_size: the global batch of 32 is larger than the 21 samples"):
        opened(StoryDataModule, root, batch_size=32).train_dataloader()


# --- evaluation sets ---


def test_validation_sets(root) -> None:
    data = opened(StoryDataModule, root, eval_batch_size=5)
    assert data.loader_names == ["tiny_frames", "tiny_prompts"]
    assert data.evaluation_sets == {"tiny_frames": {"num_samples": 21}, "tiny_prompts": {"num_samples": 2}}
    frames, prompts = (list(loader) for loader in data.val_dataloader())
    assert list(chain(*ids(frames))) == list(range(21)) and frames[0]["picture"].shape == (5, 3, *SIZE)
    assert prompts[0].keys() == {"frames", "id"} and [f.names for f in prompts[0]["frames"]] == [("Ada",), ("Bo",)]

    data = opened(StoryDataModule, root, holdout=0.3, characters=None)
    held = list(chain(*ids(list(data.val_dataloader()[0]))))
    trained = set(chain(*ids(epochs(data.train_dataloader(), 6))))
    assert len(held) == 6 and not trained & set(held) and len(trained) == 15
    assert Counter(data.frames[i].group for i in held) == {"Ada": 1, "Bo": 2, "Cy": 1, "Multi": 2}
    assert held == held_out(data.frames, range(21), 0.3) == sorted(held)
    alone = opened(StoryDataModule, root, "validate", holdout=0.3)
    assert ids(list(alone.val_dataloader()[0])) == ids(list(data.val_dataloader()[0]))
    assert alone.val_dataloader()[0].fingerprint() == alone.val_dataloader()[0].fingerprint()


def test_stories_are_tested_and_predicted(root, tmp_path) -> None:
    data = opened(StoryDataModule, root, "test")
    assert data.loader_names == ["tiny_single", "tiny_multi"]
    assert data.data_counts["tiny_single"] == {"stories": 6, "lines": 18}
    single, multi = (list(loader) for loader in data.test_dataloader())
    assert single[0].keys() == {"frames", "id", "story", "line"}
    assert single[0]["story"] == ["Ada_1", "Ada_1", "Ada_1", "Ada_2"] and single[0]["line"] == [0, 1, 2, 0]
    assert list(chain(*ids(multi))) == list(range(6)) and multi[-1]["story"] == ["multi_2", "multi_2"]
    ranks = [opened(StoryDataModule, root, "test", rank, 2).test_dataloader()[0] for rank in range(2)]
    assert sorted(chain(*(chain(*ids(list(loader))) for loader in ranks))) == list(range(18))

    part = opened(StoryDataModule, root, "test", stories="single", limit_lines=6)
    assert part.loader_names == ["tiny_single"] and part.evaluation_sets["tiny_single"]["num_samples"] == 6
    lines = list(part.test_dataloader()[0])
    assert sorted(chain(*(batch["story"] for batch in lines))) == [
        f"{n}_{i}" for n in ("Ada", "Bo", "Cy") for i in (1, 2)
    ]
    assert len(set(chain(*(batch["line"] for batch in lines)))) > 1
    assert opened(StoryDataModule, root, "predict").loader_names == ["tiny_single", "tiny_multi"]

    write(tmp_path / "mine.txt", "# a comment\n<style> A fox runs. <Ada>\n\nA beach at night.\n")
    data = opened(StoryDataModule, root, "predict", story_files=str(tmp_path / "mine.txt"))
    assert data.loader_names == ["tiny_stories"]
    (batch,) = data.predict_dataloader()[0]
    assert batch["story"] == ["mine", "mine"] and batch["line"] == [0, 1]
    assert [frame.names for frame in batch["frames"]] == [("Ada",), ()]
    with pytest.raises(StoryFault, match="a story is named mine already"):
        opened(StoryDataModule, root, "predict", story_files=[str(tmp_path / "mine.txt")] * 2)


def test_sets_that_are_not_there_are_told(tmp_path) -> None:
    root = write_world(tmp_path / "w", characters=1, stories=1)
    with pytest.warns(UserWarning, match="tiny_multi: not there; looked for .*Multi/all"):
        data = opened(StoryDataModule, root, "test")
    assert list(data.missing) == ["tiny_multi"] and data.loader_names == ["tiny_single"]
    with pytest.raises(StoryFault, match="no stories; looked for eval-plot/eval_new_story/Tiny_World/Multi/all"):
        opened(StoryDataModule, root, "test", stories="multi")
    (root / "train-folder" / FOLDER / "image").rename(root / "pictures")
    with (
        pytest.warns(UserWarning, match="captions without a picture"),
        pytest.raises(StoryFault, match="no pictures; looked"),
    ):
        opened(StoryDataModule, root)


def test_spread_takes_one_of_each_part() -> None:
    for total, count in [(405, 45), (89, 20), (7, 6), (5, 5), (5, 9), (5, None)]:
        places = spread(total, count)
        assert places == sorted(set(places)) and len(places) == min(total, count or total)
        assert max(np.diff([-1, *places, total])) <= 2 * -(-total // len(places))


def test_references_are_the_pictures_of_each_character_alone(tmp_path) -> None:
    root = write_world(tmp_path, frames=2, size=(300, 1024))
    references = opened(StoryDataModule, root, "test").references()
    assert {name: [tuple(p.shape) for p in found] for name, found in references.items()} == {
        name: [(3, 150, 512)] * 2 for name in ("Ada", "Bo", "Cy")
    }
    assert references["Cy"][0].dtype == torch.uint8
    assert (references["Cy"][0][:, 120, 256].int() - torch.tensor(CAST["Cy"][2])).abs().max() <= 1


# --- makers and configs ---


class TinyMaker:
    """Makes the tests' world."""

    def __init__(self, frames: int = 2, fails: bool = False) -> None:
        self.frames, self.fails = frames, fails

    def make(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        write_world(folder, frames=self.frames)
        progress(self.frames, self.frames)
        if self.fails:
            raise KeyboardInterrupt

    def describe(self) -> dict[str, Any]:
        return {"maker": "tiny", "frames": self.frames, "size": (64, 112)}


def test_a_world_is_made_once_and_only_by_these_settings(tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        opened(StoryDataModule, tmp_path / "deep" / "made", maker=TinyMaker(fails=True))
    assert list((tmp_path / "deep").iterdir()) == []
    path = tmp_path / "deep" / "made"
    data = opened(StoryDataModule, path, maker=TinyMaker())
    assert json.loads((path / "made_by.json").read_text())["frames"] == 2 and len(data.frames) == 9
    stamp = (path / "made_by.json").stat().st_mtime_ns
    opened(CharacterDataModule, path, maker=TinyMaker())
    assert (path / "made_by.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        UserError, match=r"made_by\.json: made with other settings \(frames: 2 there, 3 in data\.maker\)"
    ):
        opened(StoryDataModule, path, maker=TinyMaker(3))
    with pytest.raises(UserError, match=r"is there, but no made_by\.json"):
        opened(StoryDataModule, write_world(tmp_path / "own"), maker=TinyMaker())


def test_configs_take_the_arguments(root, tmp_path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--story", type=StoryDataModule)
    config = {
        "class_path": "datamodules.story.StoryDataModule",
        "init_args": {
            "path": str(tmp_path / "w"),
            "picture_size": [64, 112],
            "story_files": ["a.txt"],
            "characters": ["Ada"],
            "maker": {"class_path": "tests.datamodules.test_story.TinyMaker", "init_args": {"frames": 3}},
        },
    }
    data = parser.instantiate_classes(parser.parse_object({"story": config})).story
    assert data.picture_size == (64, 112) and data.maker.frames == 3 and data.story_files == ["a.txt"]
    assert data.hparams["maker"] == {"maker": "tiny", "frames": 3, "size": [64, 112]} and data.hparams["fit"] == "cover"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"picture_size": (512,)}, r"data\.picture_size: \[512\]: must be height and width"),
        ({"holdout": 1.0}, r"data\.holdout: 1\.0: must be from 0"),
        ({"limit_lines": 0}, r"data\.limit_lines: 0: must be at least 1"),
        ({"batch_size": 0}, r"data\.batch_size: 0: must be"),
    ],
)
def test_arguments_out_of_range(root, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        StoryDataModule(str(root), **settings)
    with pytest.raises(UserError, match=r"data\.folds: 30: more than the 21 pictures"):
        opened(CharacterDataModule, root, folds=30)
