"""Melception against the golden outputs and the released manifest, its importer, and the small classifier of sounds."""

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tests.golden
from mmtrain.config_errors import UserError
from mmtrain.difffoley.melception import Melception, load_melception
from mmtrain.difffoley.sound_classifier import SmallMelception, SoundClassifier, load_feature_network
from mmtrain.optim import AdamWSettings
from tests.golden import load
from tests.golden.fill import array, fill

GOLDEN = "difffoley/melception.npz"
NAMES = ("64", "192", "768", "2048", "logits_unbiased", "logits")


@pytest.fixture(scope="module")
def filled() -> Melception:
    network = Melception().eval()
    state = {
        k: torch.from_numpy(np.asarray(fill(k, tuple(v.shape)))).to(v.dtype) for k, v in network.state_dict().items()
    }
    network.load_state_dict(state)
    return network


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        state = Melception().state_dict()
    manifest = json.loads((Path(tests.golden.__file__).parent / "difffoley/manifest_melception.json").read_text())
    expected = {key: about["shape"] for key, about in manifest.items() if key != "_info"}
    assert {key: list(value.shape) for key, value in state.items()} == expected
    assert len(expected) == 580


@torch.no_grad()
def test_golden_features(filled: Melception) -> None:
    got = filled(torch.from_numpy(array("melception_x", (2, 80, 160))), standardised=True)
    assert tuple(got) == NAMES
    for name in NAMES:
        expected = load(GOLDEN)[f"feat_{name}"]
        assert np.abs(got[name].numpy() - expected).max() <= 2e-4 * np.abs(expected).max(), name


def test_bins_are_standardised_by_the_released_constants(filled: Melception) -> None:
    golden = load(GOLDEN)
    mel = torch.rand(1, 80, 5)
    means, deviations = (golden[f"official_mel_bin_{name}"][:, None] for name in ("means", "stds"))
    assert torch.equal(filled.standardise(mel), (mel - torch.from_numpy(means)) / torch.from_numpy(deviations))
    with torch.no_grad():
        mel = torch.rand(1, 80, 40)
        assert torch.equal(filled(mel)["2048"], filled(filled.standardise(mel), standardised=True)["2048"])


def test_released_file_is_read(filled: Melception, tmp_path: Path) -> None:
    torch.save({"model": filled.state_dict(), "epoch": 3}, tmp_path / "melception.pt")
    network = load_feature_network(tmp_path / "melception.pt")
    assert isinstance(network, Melception) and not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(network.fc.weight, filled.fc.weight)
    state = dict(filled.state_dict())
    del state["fc.bias"]
    torch.save({"model": state}, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"feature_network: .*cut\.pt: .*fc\.bias"):
        load_melception(tmp_path / "cut.pt")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.feature_network: .*none\.ckpt: no such"):
        load_feature_network(tmp_path / "none.ckpt", "test.feature_network")
    torch.save({"state_dict": {}, "hyper_parameters": {}, "model_class": "a.B"}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt: is a checkpoint of a\.B"):
        load_feature_network(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="expected"):
        Melception()(torch.rand(1, 128, 100))


@torch.no_grad()
def test_small_network_has_the_same_outputs() -> None:
    network = SmallMelception(6, width=4).eval()
    got = network(torch.rand(3, 80, 100))
    assert tuple(got) == NAMES
    assert [value.shape[1] for value in got.values()] == [4, 8, 16, 32, 6, 6]
    assert torch.allclose(got["logits"] - got["logits_unbiased"], network.fc.bias.expand(3, -1), atol=1e-6)
    mel = torch.rand(1, 80, 96)
    tiled = network(torch.cat([mel] * 4, dim=2))["2048"]
    assert torch.allclose(network(torch.cat([mel] * 8, dim=2))["2048"], tiled, atol=0.05), "any length"


class Sounds(pl.LightningDataModule):
    """Noise in the band of its class; 3 of the 24 validation sounds come twice, as a sampler's padding does."""

    class_names = ("low", "middle", "high")

    def __init__(self) -> None:
        super().__init__()
        self.evaluation_sets = {"toy": {}}

    def loader(self, size: int, seed: int) -> DataLoader:
        random = torch.Generator().manual_seed(seed)
        label = torch.arange(size) % 3
        mel = 0.2 * torch.rand(size, 80, 48, generator=random)
        for row, place in zip(mel, label.tolist(), strict=True):
            row[25 * place : 25 * place + 25] += 0.3
        items = [{"mel": m, "label": y, "id": i} for i, (m, y) in enumerate(zip(mel, label, strict=True))]
        return DataLoader(items if seed == 0 else items + items[:3], batch_size=12)

    def train_dataloader(self) -> DataLoader:
        return self.loader(48, 0)

    def val_dataloader(self) -> DataLoader:
        return self.loader(24, 1)


def train(module: SoundClassifier, folder: Path, epochs: int) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Sounds())
    return trainer


def test_classifier_learns_and_its_checkpoint_is_a_feature_network(tmp_path: Path) -> None:
    pl.seed_everything(0)
    module = SoundClassifier(3, width=4, optim=AdamWSettings(lr=1e-2, warmup_steps=2))
    trainer = train(module, tmp_path, 6)
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert values["val/toy/accuracy"] == 1
    assert values["val/toy/accuracy_low"] == pytest.approx(24 / (24 + 1.959964**2), abs=1e-5), "24 sounds, not 27"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    network = load_feature_network(tmp_path / "last.ckpt")
    mel = torch.rand(2, 80, 48)
    assert torch.equal(network(mel)["logits"], module.network.eval()(mel)["logits"])
    again = SoundClassifier(3, width=4, pretrained=str(tmp_path / "last.ckpt"))
    assert torch.equal(again.network.fc.weight, module.network.fc.weight)
    with pytest.raises(UserError, match=r"pretrained: .*last\.ckpt: does not fit: size mismatch for fc\.weight"):
        SoundClassifier(4, width=4, pretrained=str(tmp_path / "last.ckpt"))
    assert module.chance_levels() == {"val/toy/accuracy": 1 / 3, "test/toy/accuracy": 1 / 3}


def test_classes_of_model_and_data_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.num_classes: 5, but the data have 3 classes"):
        train(SoundClassifier(5, width=4), tmp_path, 1)
    with pytest.raises(UserError, match="num_classes: 1"):
        SoundClassifier(1)
    module: nn.Module = SoundClassifier(2, width=4)
    batch: dict[str, Tensor] = {"mel": torch.rand(2, 80, 48), "label": torch.tensor([0, 2])}
    with pytest.raises(UserError, match=r"num_classes: 2, but a label is 2"):
        module.loss(batch)
