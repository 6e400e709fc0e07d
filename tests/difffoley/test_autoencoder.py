"""Training a first stage: loss, the factor of its latents, checkpoints that the next stages read."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from mmtrain.config_errors import UserError
from mmtrain.difffoley.autoencoder import Autoencoder, autoencoder_loss
from mmtrain.difffoley.first_stage import load_first_stage
from mmtrain.optim import AdamWSettings
from tests.difffoley.foley_data import bare_trainer as trainer

SIZES = {"channels": (32, 32), "layers_per_block": 1, "latent_channels": 2}


class Mels(pl.LightningDataModule):
    """Spectrograms with one bright bar each."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.evaluation_sets = {"bars": {"num_samples": 8}}
        torch.manual_seed(0)
        mel = 0.1 * torch.rand(count, 16, 32)
        for index in range(count):
            mel[index, :, index % 29 : index % 29 + 3] += 0.7
        self.items = [{"mel": row} for row in mel]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items, batch_size=4)

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(self.items, batch_size=8)]

    test_dataloader = val_dataloader


def test_loss() -> None:
    mel, mean, logvar = torch.rand(2, 16, 32), torch.randn(2, 4, 2, 4), torch.randn(2, 4, 2, 4)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).mean()
    loss, parts = autoencoder_loss(mel + 0.25, mel, mean, logvar, 0.1)
    torch.testing.assert_close(parts["kl"], kl)
    torch.testing.assert_close(loss, 0.25 + 0.1 * kl)
    # noise averages out at the lower resolutions, a shift does not
    noise = torch.randn(2, 16, 32)
    fine, coarse = (autoencoder_loss(mel + noise, mel, mean, logvar, 0.0, scales)[0] for scales in (1, 3))
    assert coarse < 0.7 * fine
    torch.testing.assert_close(autoencoder_loss(mel + 0.25, mel, mean, logvar, 0.0, 3)[0], torch.tensor(0.25))


def test_factor_follows_the_latents() -> None:
    module = Autoencoder(**SIZES)
    torch.manual_seed(0)
    moments = lambda x: torch.stack([x.mean(), x.square().mean()])  # noqa: E731
    for _ in range(50):
        module.follow_spread(moments(3 + 5 * torch.randn(8, 2, 8, 16)))
    assert module.first_stage.scale_factor.item() == pytest.approx(0.2, rel=0.01)
    for _ in range(300):  # the first ones are forgotten
        module.follow_spread(moments(0.5 * torch.randn(8, 2, 8, 16)))
    assert module.first_stage.scale_factor.item() == pytest.approx(2.0, rel=0.02)


def test_training_lowers_the_error_and_its_checkpoint_is_a_first_stage(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    optim = AdamWSettings(lr=3e-3, warmup_steps=5)
    module, data = Autoencoder(**SIZES, optim=optim), Mels()
    run = trainer(tmp_path, 60)
    before = run.validate(module, data, verbose=False)[0]["val/bars/l1"]
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]
    assert after["test/bars/l1"] < 0.35 * before
    assert after["test/bars/latent_std"] == pytest.approx(1.0, abs=0.15)

    last = tmp_path / "checkpoints" / "last.ckpt"
    stage = load_first_stage(last)
    assert stage.factor == 2 and stage.latent_channels == 2
    assert stage.fingerprint() == module.first_stage.fingerprint()
    mel = torch.stack([item["mel"] for item in data.items])
    with torch.no_grad():
        latent = stage.encode(mel)
        assert latent.std().item() == pytest.approx(1.0, abs=0.15)
        assert (stage.decode(latent) - mel).abs().mean() < 0.4 * before

    again = Autoencoder.load_from_checkpoint(last, weights_only=True)
    assert again.optim == optim and again.first_stage.fingerprint() == stage.fingerprint()
    assert again.trained["step"] == 60 and again.batches_seen == 60
    again.on_load_checkpoint({"hyper_parameters": {"channels": [32, 32]}})  # as a config gives them
    started = Autoencoder(**SIZES, pretrained=str(last))
    assert started.first_stage.fingerprint() == stage.fingerprint()
    assert again.backbone == "KL autoencoder 32-32" and again.chance_levels() == {}

    with pytest.raises(UserError, match=r"ckpt_path: .* with channels \(32, 32\), this model has \(32, 64\)"):
        trainer(tmp_path, 61).fit(Autoencoder(**SIZES | {"channels": (32, 64)}), data, ckpt_path=str(last))
    with pytest.raises(UserError, match=r"pretrained: .*last.ckpt: does not fit this network"):
        Autoencoder(**SIZES | {"channels": (32, 64)}, pretrained=str(last))
