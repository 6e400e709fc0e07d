"""The creatures' customisation world and the labelled pictures of its characters and their doubles."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.creature_base import generator_of, vocabulary_texts
from datamodules.creature_captions import CHARACTERS
from datamodules.creature_characters import (
    KINDS,
    CharacterPictures,
    CreatureCharacterDataModule,
    double,
    labelled_picture,
    labelled_scene,
    labels,
)
from datamodules.creature_drawing import MARK_SHAPES, draw
from datamodules.creatures import Creatures, write_sheet
from datamodules.loading import Draw
from datamodules.story import StoryDataModule
from datamodules.story_folder import StoryFolder, read_world
from mmtrain.config_errors import UserError


@pytest.fixture(scope="module")
def world() -> Creatures:
    return Creatures()


@pytest.fixture(scope="module")
def made(world: Creatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("creatures") / "world"
    told: list[tuple[int, int]] = []
    world.make(path, lambda done, total: told.append((done, total)))
    assert told == [(i + 1, 145) for i in range(145)]
    return path


@pytest.fixture(scope="module")
def folder(made: Path) -> StoryFolder:
    return read_world(made)


def test_the_folder_has_the_size_of_the_original(world: Creatures, folder: StoryFolder) -> None:
    assert folder.world == world.world and folder.warnings == []
    groups = [frame.group for frame in folder.frames]
    assert {name: groups.count(name) for name in set(groups)} == {**dict.fromkeys(CHARACTERS, 12), "Multi": 37}
    seen = {frozenset(frame.frame.names) for frame in folder.frames if frame.group == "Multi"}
    assert len(seen) == 17 and seen == set(map(frozenset, world.pairs))
    assert {name for pair in seen for name in pair} == set(CHARACTERS)
    lines = {kind: [line for s in folder.stories if s.kind == kind for line in s.lines] for kind in ("single", "multi")}
    assert len(lines["single"]) == 225 and len(folder.stories) == 55 and len(folder.prompts) == 9
    pairs = [frozenset(line.names) for line in lines["multi"] if len(line.names) == 2]
    assert len(pairs) == 220 and len(set(pairs)) == 36
    assert sum(pair not in seen for pair in pairs) > 100
    assert Image.open(folder.frames[0].path).size == (112, 64)


def test_stories_tell_what_training_has_not_shown(world: Creatures) -> None:
    trained = [told.content for told in world.training.values()]
    single = [told.content for lines in world.single_stories.values() for told in lines]
    multi = [told.content for lines in world.multi_stories for told in lines if len(told.names) == 2]
    assert not set(trained) & {*single, *multi}
    for contents in (trained, single, multi):
        assert len(contents) == len(set(contents))
    places = [told.scene.place for key, told in world.training.items() if not key.startswith("Multi")]
    assert {places.count(place) for place in places} == {18}  # two for each character


def test_order_of_mention_is_free(world: Creatures) -> None:
    for told in (list(world.training.values()), [t for story in world.multi_stories for t in story]):
        pairs = [t for t in told if len(t.names) == 2]
        first = [
            t.raw.index(f"a {CHARACTERS[t.names[0]].species}") < t.raw.index(f"a {CHARACTERS[t.names[1]].species}")
            for t in pairs
        ]
        assert 0.25 < np.mean(first) < 0.75
        alphabetical = [t.names[0] < t.names[1] for t in pairs]
        assert 0.25 < np.mean(alphabetical) < 0.75


def test_tags_stand_left_to_right_and_every_mark_is_in_the_picture(world: Creatures) -> None:
    for key, told in world.training.items():
        assert told.raw.endswith(" ".join(f"<{name}>" for name in told.names))
        if not key.startswith("Multi") and not key.endswith("/1"):
            continue
        whole, middles = world.picture(key).astype(int), []
        for i, actor in enumerate(told.scene.actors):
            actors = list(told.scene.actors)
            actors[i] = replace(actor, look=replace(actor.look, mark=None))
            without = draw(replace(told.scene, actors=tuple(actors)), world._random(f"picture {key}"), world.size)
            _, columns = np.nonzero(np.abs(whole - without).sum(axis=2) > 60)
            assert len(columns) >= 25, (key, actor.look)  # not hidden by the other one
            middles.append(columns.mean())
        assert len(middles) == 1 or middles[1] - middles[0] > 25


def test_no_text_speaks_of_a_mark_and_all_words_are_known_to_the_base_world(world: Creatures) -> None:
    known = {word for text in vocabulary_texts() for word in text.replace(".", " ").split()}
    for path, text in world.texts():
        if path.endswith(".json"):
            continue
        words = {w for w in text.replace(".", " ").split() if not w.startswith("<")}
        assert words <= known, path
        assert not words & set(MARK_SHAPES)
    assert len({look.mark.shape for look in CHARACTERS.values()}) == 9


def test_the_world_depends_on_its_seed_alone(world: Creatures, made: Path) -> None:
    again = Creatures()
    assert dict(again.texts()) == dict(world.texts())
    for key in ("Doro/1", "Multi/37"):
        stored = np.asarray(Image.open(made / f"train-folder/Creatures/image/{key}.png"))
        assert np.array_equal(again.picture(key), stored)
    other = Creatures(seed=1)
    assert dict(other.texts()) != dict(world.texts()) and other.describe() != world.describe()
    assert json.loads(json.dumps(world.describe())) == world.describe()


def test_a_data_module_makes_the_world_by_itself(tmp_path: Path) -> None:
    maker = Creatures((32, 56), singles=2, pair_frames=3, seen_pairs=3)
    data = StoryDataModule(str(tmp_path / "made"), picture_size=(32, 56), batch_size=3, maker=maker)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["picture"].shape == (3, 3, 32, 56) and len(data.frames) == 21
    assert data.loader_names == ["creatures_frames", "creatures_prompts"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": (64, 300)}, "size"),
        ({"singles": 60}, "singles: 60"),
        ({"seen_pairs": 37, "pair_frames": 40}, "36 pairs"),
        ({"seen_pairs": 17, "pair_frames": 10}, "pair_frames: 10"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Creatures(**wrong)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        Creatures().make(tmp_path, lambda done, total: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_sheet_is_small(tmp_path: Path) -> None:
    write_sheet(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size < 150_000
    assert Image.open(tmp_path / "sheet.png").size == (1380, 740)


@pytest.mark.parametrize("name", CHARACTERS)
def test_doubles_are_nearly_the_character(name: str) -> None:
    own, rng = CHARACTERS[name], np.random.default_rng(0)
    for _ in range(20):
        assert double(own, "character", rng) == own
        assert double(own, "no mark", rng) == replace(own, mark=None)
        marked = double(own, "wrong mark", rng)
        assert marked.mark.shape != own.mark.shape and replace(marked, mark=own.mark) == own
        coloured = double(own, "wrong colours", rng)
        assert coloured.mark == own.mark and coloured.body != coloured.clothes
        assert (coloured.body == own.body) != (coloured.clothes == own.clothes)
        anyone = double(own, "anyone", rng)
        assert anyone.species == own.species and (anyone.body, anyone.clothes) != (own.body, own.clothes)


def test_labels_say_who_is_there_and_not_who_resembles_him() -> None:
    present, names, kinds = labels(0, 400), list(CHARACTERS), []
    for i in range(400):
        scene, there, which = labelled_scene(generator_of(0, "characters", i))
        assert {names[k] for k in np.flatnonzero(present[i])} == set(there)
        assert set(there) == {n for a in scene.actors for n, look in CHARACTERS.items() if a.look == look}
        assert all(
            (kind == "character") == (a.look in CHARACTERS.values())
            for kind, a in zip(which, scene.actors, strict=True)
        )
        kinds += which
    assert {kind: abs(kinds.count(kind) / len(kinds) - share) < 0.06 for kind, share in KINDS.items()} == dict.fromkeys(
        KINDS, True
    )
    assert present.mean(axis=0).min() > 0.03 and (present.sum(axis=1) == 0).mean() > 0.1


def test_classifier_batches_and_folds() -> None:
    data = CreatureCharacterDataModule(count=30, size=(32, 56), folds=3, batch_size=10, degrade=1.0)
    data.setup("fit")
    assert data.loader_names == ["creatures_frames"] and data.world.names == list(CHARACTERS)
    assert data.evaluation_sets["creatures_frames"] == {"num_samples": 30, "class_names": list(CHARACTERS)}
    (loader,) = data.val_dataloader()
    clean = {key: torch.cat([batch[key] for batch in loader]) for key in ("picture", "present", "fold", "id")}
    assert clean["id"].tolist() == list(range(30)) and clean["fold"].tolist() == [i % 3 for i in range(30)]
    assert clean["present"].dtype == torch.float32 and clean["present"].shape == (30, 9)
    assert np.array_equal(clean["present"].numpy(), labels(0, 30))
    assert np.array_equal(clean["picture"][7].permute(1, 2, 0).numpy(), labelled_picture(0, 7, (32, 56)))
    batch = next(iter(data.train_dataloader()))
    assert batch["picture"].dtype == torch.uint8
    error = (batch["picture"].float() - clean["picture"][batch["id"]].float()).abs().mean((1, 2, 3))
    assert error.min() > 0 and 1 < error.mean() < 40


def test_degraded_pictures_depend_on_their_place_in_the_order_alone() -> None:
    pictures = np.stack([labelled_picture(0, i, (32, 56)).transpose(2, 0, 1) for i in range(4)])
    dataset = CharacterPictures(pictures, labels(0, 4), folds=2, degrade=0.5)
    kept = pictures.copy()
    draws = [Draw(i, 0, 0, i) for i in range(4)]
    assert torch.equal(dataset[draws]["picture"], dataset[draws]["picture"])
    assert torch.equal(dataset[draws]["picture"][2:], dataset[draws[2:]]["picture"])
    assert not torch.equal(dataset[draws]["picture"], dataset[[Draw(i, 0, 1, i) for i in range(4)]]["picture"])
    assert np.array_equal(pictures, kept)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"folds": 0}, "folds"), ({"degrade": 2.0}, "degrade"), ({"size": (8, 14)}, "size")]
)
def test_wrong_classifier_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CreatureCharacterDataModule(**wrong)
