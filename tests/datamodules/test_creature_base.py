"""The creatures' base world: looks that can be told apart, words that do not give the layout away, exact loading."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.creature_base import CreatureBaseDataModule, base_frame, base_picture, generator_of, vocabulary_texts
from datamodules.creature_captions import CHARACTERS, VISIBLE, base_sample
from datamodules.creature_drawing import MARK_SHAPES, SPECIES, Actor, Look, Mark, Scene, draw
from datamodules.creature_pairs import CreaturePairsDataModule, square
from datamodules.creature_scenes import PLACES
from mmtrain.config_errors import UserError
from mmtrain.story import FrameBatch


def shown(scene: Scene, seed: int, size: tuple[int, int] = (64, 112)) -> np.ndarray:
    return draw(scene, np.random.default_rng(seed), size).astype(int)


def changed(one: Scene, other: Scene, seed: int) -> np.ndarray:
    """Pixels [H, W] in which two scenes differ that leave the same to chance."""
    return np.abs(shown(one, seed) - shown(other, seed)).sum(axis=2) > 60


def test_pictures_depend_on_seed_split_and_number_alone() -> None:
    again = [base_picture(3, "train", 7), base_picture(3, "train", 7)]
    assert np.array_equal(*again) and again[0].shape == (64, 112, 3) and again[0].dtype == np.uint8
    for other in (base_picture(4, "train", 7), base_picture(3, "val", 7), base_picture(3, "train", 8)):
        assert not np.array_equal(again[0], other)
    assert base_picture(3, "train", 7, (96, 168)).shape == (96, 168, 3)


def test_species_differ_in_silhouette() -> None:
    empty = Scene("room", ())
    shapes = {}
    for species in SPECIES:
        scene = Scene("room", (Actor(Look(species, "blue", "red")),))
        shapes[species] = changed(scene, empty, seed=1)
        assert 300 < shapes[species].sum() < 2500
    for one, other in combinations(SPECIES, 2):
        both = (shapes[one] & shapes[other]).sum() / (shapes[one] | shapes[other]).sum()
        assert both < 0.87, (one, other)


@pytest.mark.parametrize("species", SPECIES)
@pytest.mark.parametrize("seed", range(2))
def test_marks_can_be_seen_and_told_apart(species: str, seed: int) -> None:
    scenes = {
        shape: Scene("desert", (Actor(Look(species, "blue", "white", Mark(shape, "black"))),)) for shape in MARK_SHAPES
    }
    plain = Scene("desert", (Actor(Look(species, "blue", "white")),))
    for scene in scenes.values():
        rows, columns = np.nonzero(changed(scene, plain, seed))
        assert 7 <= np.ptp(rows) + 1 <= 21 and 7 <= np.ptp(columns) + 1 <= 21 and len(rows) >= 25
    for one, other in combinations(MARK_SHAPES, 2):
        assert changed(scenes[one], scenes[other], seed).sum() >= 14, (one, other)


def test_places_and_actions_can_be_seen() -> None:
    look = Look("fox", "orange", "blue")
    pictures = [shown(Scene(p, (Actor(look, a),)), 0) for p in PLACES for a in ("stand", "jump", "wave", "hold a ball")]
    assert min(np.abs(a - b).mean() for a, b in combinations(pictures, 2)) > 0.5


def test_words_do_not_tell_left_from_right() -> None:
    counts: Counter[str] = Counter()
    for i in range(1500):
        scene, frame = base_sample(generator_of(0, "train", i))
        if len(scene.actors) < 2:
            continue
        left = scene.actors[0].look.species
        mentioned = min((frame.event.index(f"a {c.coarse_class}"), c.name) for c in frame.characters)[1]
        counts["pairs"] += 1
        counts["left mentioned first"] += mentioned == left
        counts["left described first"] += frame.characters[0].name == left
        counts["mentioned first described first"] += frame.characters[0].name == mentioned
    assert 500 < counts["pairs"] < 700  # four in ten
    for key in ("left mentioned first", "left described first", "mentioned first described first"):
        assert abs(counts[key] / counts["pairs"] - 0.5) < 0.06, counts


def test_base_world_shows_marks_but_no_character() -> None:
    own = {(look.species, look.body, look.clothes) for look in CHARACTERS.values()}
    looks = [a.look for i in range(2000) for a in base_sample(generator_of(1, "train", i))[0].actors]
    assert not own & {(look.species, look.body, look.clothes) for look in looks}
    assert all(look.body != look.clothes for look in looks)
    marks = [look.mark for look in looks if look.mark]
    assert abs(len(marks) / len(looks) - 0.75) < 0.04
    assert {mark.shape for mark in marks} == set(MARK_SHAPES)
    assert all(look.mark is None or look.mark.colour in VISIBLE[look.clothes] for look in looks)
    # each character's mark occurs, on others
    assert {look.mark.shape for look in CHARACTERS.values()} <= {mark.shape for mark in marks}


def test_prompts_use_known_words_and_name_each_species_once() -> None:
    known = {word for text in vocabulary_texts() for word in text.replace(".", " ").split()}
    for i in range(500):
        frame = base_frame(0, "train", i)
        assert set(frame.prompt.replace(".", " ").split()) <= known
        assert all(frame.event.split().count(c.coarse_class) == 1 for c in frame.characters)
        assert all(c.description.startswith("this ") and c.coarse_class in c.description for c in frame.characters)
    assert not {"star", "heart", "cross", "stripes", "spots", "bolt", "ring", "triangle", "letter"} & known


def test_batches_hold_pictures_with_their_words_and_resume_exactly() -> None:
    data = CreatureBaseDataModule(count=24, val_count=6, batch_size=8, size=(32, 56))
    data.setup("fit")
    loader = data.train_dataloader()
    seen = list(loader)
    assert len(seen) == 3 and sorted(torch.cat([b["id"] for b in seen]).tolist()) == list(range(24))
    for batch in seen:
        assert batch["picture"].shape == (8, 3, 32, 56) and batch["picture"].dtype == torch.uint8
        assert isinstance(batch["frames"], FrameBatch)
        for i, picture, frame in zip(batch["id"].tolist(), batch["picture"], batch["frames"], strict=True):
            assert frame == base_frame(0, "train", i)
            assert np.array_equal(picture.permute(1, 2, 0).numpy(), base_picture(0, "train", i, (32, 56)))
    first, second = data.train_dataloader(), data.train_dataloader()
    next(iter(first))
    second.load_state_dict(first.state_dict())
    assert [b["id"].tolist() for b in second] == [b["id"].tolist() for b in seen[1:]]
    (val,) = data.val_dataloader()
    assert data.loader_names == ["creatures_base"] and sum(len(b["frames"]) for b in val) == 6
    assert data.evaluation_sets == {"creatures_base": {"num_samples": 6}}
    assert torch.equal(data.pictures(5), torch.from_numpy(data.sets["train"].pictures[:5]))
    assert {len(pictures) for pictures in data.references().values()} == {4}


def test_kept_pictures_are_the_same_and_broken_files_are_named(tmp_path: Path) -> None:
    make = lambda: CreatureBaseDataModule(10, 2, (32, 56), 5, path=str(tmp_path / "kept"))  # noqa: E731
    first, second = make(), make()
    first.prepare_data()
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 2 and all(file.suffix == ".npy" for file in files)
    second.setup("fit")
    assert torch.equal(first.pictures(10), second.pictures(10))
    train = next(file for file in files if file.name.startswith("train"))
    train.write_bytes(train.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train_.*cannot be read"):
        make().prepare_data()
    np.save(train, np.zeros((3, 3, 32, 56), np.uint8))
    with pytest.raises(UserError, match=r"holds uint8 \[3, 3, 32, 56\], not uint8 \[10"):
        make().prepare_data()


@pytest.mark.parametrize(
    ("wrong", "message"), [({"count": 0}, "count: 0"), ({"val_count": -1}, "val_count"), ({"size": (64, 64)}, "size")]
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CreatureBaseDataModule(**wrong)


def test_pairs_for_clip_are_shards_of_pictures_with_two_kinds_of_captions(tmp_path: Path) -> None:
    path = str(tmp_path / "pairs")
    data = CreaturePairsDataModule(path, count=24, val_count=5, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3 and batches[0]["image"].shape == (8, 3, 64, 64) and batches[0]["text"].shape == (8, 48)
    lengths = torch.cat([(batch["text"] != 0).sum(1) for batch in batches])
    assert lengths.max() < 48 and len(lengths.unique()) > 3
    batch = next(iter(data.val_dataloader()[0]))
    frame = base_frame(0, "pairs val", 0)
    assert batch["caption"][0] == [" ".join([frame.event, *(c.description for c in frame.characters)])]
    picture = square(Image.fromarray(base_picture(0, "pairs val", 0)), 64, "squash")
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), np.asarray(picture))
    CreaturePairsDataModule(path, count=24, val_count=5).prepare_data()  # is there
    with pytest.raises(UserError, match="another path"):
        CreaturePairsDataModule(path, count=24, val_count=5, shape="pad").prepare_data()
    assert json.loads((tmp_path / "pairs" / "made_by.json").read_text())["shape"] == "squash"


def test_a_padded_picture_keeps_its_proportions() -> None:
    padded = np.asarray(square(Image.fromarray(np.full((64, 112, 3), 200, np.uint8)), 56, "pad"))
    assert padded.shape == (56, 56, 3) and padded[:11].max() == 0 and padded[14:42].min() > 190
