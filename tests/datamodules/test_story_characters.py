"""Pictures for classifiers of characters: folds, augmentation, synthetic pairs."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.loading import Draw
from datamodules.story import CharacterDataModule
from datamodules.story_batches import stratified_folds
from datamodules.story_folder import read_world
from tests.datamodules.story_worlds import CAST, SIZE, epochs, ids, joined, opened, same, write_world


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 characters with 5 pictures each and 6 pictures of two: 21."""
    return write_world(tmp_path_factory.mktemp("story"), frames=5, pairs=6)


def test_folds_have_as_many_of_each_character(root) -> None:
    frames = read_world(root).frames
    folds = stratified_folds(frames, 4)
    assert np.array_equal(folds, stratified_folds(frames, 4))
    for group in ("Ada", "Bo", "Cy", "Multi"):
        counts = [
            sum(f == fold and frame.group == group for f, frame in zip(folds, frames, strict=True)) for fold in range(4)
        ]
        assert max(counts) - min(counts) <= 1
    assert sorted(Counter(folds.tolist()).values()) == [5, 5, 5, 6]


def test_classifier_batches(root) -> None:
    data = opened(CharacterDataModule, root, eval_batch_size=8)
    assert data.loader_names == ["tiny_frames"]
    assert data.evaluation_sets == {"tiny_frames": {"num_samples": 21, "class_names": ["Ada", "Bo", "Cy"]}}
    evaluated = list(data.val_dataloader()[0])
    assert list(chain(*ids(evaluated))) == list(range(21)) and same(evaluated, list(data.test_dataloader()[0]))
    for batch in evaluated:
        assert batch["picture"].shape[1:] == (3, *SIZE) and batch["present"].dtype == torch.float32
        for place, present, picture in zip(batch["id"], batch["present"], batch["picture"], strict=True):
            names = data.frames[place].frame.names
            assert [n for n, p in zip(data.world.names, present, strict=True) if p] == sorted(names)
            middle = SIZE[1] // (2 * len(names))
            assert (picture[:, 24, middle].int() - torch.tensor(CAST[names[0]][2])).abs().max() <= 1
        assert torch.equal(batch["fold"], torch.from_numpy(stratified_folds(data.frames, 4))[batch["id"]])
    plain = {int(i): p for batch in evaluated for i, p in zip(batch["id"], batch["picture"], strict=True)}
    trained = epochs(data.train_dataloader())
    assert all(not torch.equal(plain[int(i)], p) for b in trained for i, p in zip(b["id"], b["picture"], strict=True))
    quiet = epochs(opened(CharacterDataModule, root, augment=False).train_dataloader())
    assert all(torch.equal(plain[int(i)], p) for b in quiet for i, p in zip(b["id"], b["picture"], strict=True))


def test_augmented_pictures_do_not_depend_on_processes(root) -> None:
    settings = {"pairs": 0.5, "seed": 2}
    alone = epochs(opened(CharacterDataModule, root, **settings).train_dataloader())
    halves = [
        epochs(opened(CharacterDataModule, root, rank=rank, world_size=2, **settings).train_dataloader())
        for rank in range(2)
    ]
    assert same(alone, joined(halves))
    first, second = (
        {int(i): p for b in alone[e : e + 5] for i, p in zip(b["id"], b["picture"], strict=True)} for e in (0, 5)
    )
    assert not any(torch.equal(first[i], second[i]) for i in first.keys() & second.keys())


def test_synthetic_pairs_stay_inside_a_fold(tmp_path) -> None:
    root = write_world(tmp_path, frames=4, pairs=2, size=(64, 112))
    data = opened(CharacterDataModule, root, folds=2, pairs=1.0, augment=False, size=(32, 57))
    dataset, names = data.train_dataloader()._loader.dataset, data.world.names
    partners = Counter()
    for position in range(60):
        batch = dataset[[Draw(position % 14, 0, 0, position)]]
        assert batch["picture"].shape == (1, 3, 32, 57)
        shown = {name for name, there in zip(names, batch["present"][0], strict=True) if there}
        own = set(data.frames[position % 14].frame.names)
        assert shown >= own and len(shown) == 2 and (len(own) == 1 or shown == own)
        if len(own) == 1:  # the halves show the colours of both, each on its side
            colours = [torch.tensor(CAST[name][2]) for name in sorted(shown)]
            halves = batch["picture"][0, :, 22, :28], batch["picture"][0, :, 22, 29:]
            close = [[bool(((half.T.int() - c).abs().amax(1) < 12).any()) for c in colours] for half in halves]
            assert close in ([[True, False], [False, True]], [[False, True], [True, False]])
            partners[close[0][0]] += 1
    assert min(partners.values()) > 5  # either side
    folds = np.array([0] * 4 + [1] * 8 + [0, 1])  # Ada alone in her fold: no partner there
    dataset.folds = folds
    for position in range(40):
        (present,) = dataset[[Draw(position % 12, 0, 0, position)]]["present"]
        assert present.tolist() == [1, 0, 0] if position % 12 < 4 else not present[0]
