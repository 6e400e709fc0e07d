"""Both stages train, resume exactly, hold together in one checkpoint, and refuse what does not belong together."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from mmtrain import distributed
from mmtrain.checkpoint import AtomicCheckpointIO
from mmtrain.config_errors import UserError
from mmtrain.normaliser import limits
from mmtrain.rdp.dp import DiffusionPolicy
from mmtrain.rdp.module import LatentDiffusionPolicy
from mmtrain.rdp.tokenizer import Tokenizer, TokenizerSettings
from tests.rdp.conftest import OPTIM, data_of, train


def latent_policy(tokenizer: object, **kwargs: object) -> LatentDiffusionPolicy:
    path = None if tokenizer is None else str(tokenizer)
    return LatentDiffusionPolicy("wipe", "force", "pose", tokenizer=path, preset="sim", optim=OPTIM, **kwargs)


def read(path: object) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def test_a_tokenizer_learns(tokenizer_checkpoint, tmp_path) -> None:
    module = Tokenizer("wipe", "force", "pose", preset="sim", optim=OPTIM)
    data = data_of(tokenizer_checkpoint.parents[2])
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    module.load_state_dict(read(tokenizer_checkpoint)["state_dict"])
    before = trainer.validate(module, data, verbose=False)[0]["val/wipe/loss"]
    longer = train(tmp_path, module, data_of(tokenizer_checkpoint.parents[2]), 150)
    module.load_state_dict(read(longer)["state_dict"])
    after = trainer.validate(module, data, verbose=False)[0]["val/wipe/loss"]
    assert after < 0.8 * before


@pytest.mark.parametrize("method", ["ldp", "dp"])
def test_a_resumed_policy_is_the_undisturbed_one(method, tokenizer_checkpoint, tmp_path) -> None:
    root = tokenizer_checkpoint.parents[2]

    def make() -> tuple[pl.LightningModule, pl.LightningDataModule]:
        pl.seed_everything(1, verbose=False)  # the same first weights
        if method == "ldp":
            return latent_policy(tokenizer_checkpoint, latent_target="sample"), data_of(root)
        return DiffusionPolicy("wipe", "none", "pose", preset="sim", optim=OPTIM), data_of(
            root, method="dp", touch="none"
        )

    whole = read(train(tmp_path, *make(), 8, save_at=3))
    resumed = read(train(tmp_path, *make(), 8, resume=tmp_path / "at.ckpt"))
    assert resumed["global_step"] == whole["global_step"] == 8
    for part in ("state_dict", "ema"):
        assert whole[part].keys() == resumed[part].keys()
        for key, value in whole[part].items():
            assert torch.equal(value, resumed[part][key]), key


def test_a_policy_holds_its_tokenizer(tokenizer_checkpoint, tmp_path) -> None:
    checkpoint = read(train(tmp_path, latent_policy(tokenizer_checkpoint), data_of(tokenizer_checkpoint.parents[2]), 3))
    tokenizer = read(tokenizer_checkpoint)["state_dict"]
    inside = {
        k.removeprefix("tokenizer."): v for k, v in checkpoint["state_dict"].items() if k.startswith("tokenizer.")
    }
    assert inside.keys() == tokenizer.keys()
    assert all(torch.equal(inside[key], value) for key, value in tokenizer.items())
    assert not any(key.startswith("tokenizer.") for key in checkpoint["ema"])
    alone = latent_policy(None)  # evaluation needs no file of the tokenizer's
    alone.load_state_dict(checkpoint["state_dict"])
    assert alone.normalizer.is_fitted("latent") and alone.tokenizer.normalizer.is_fitted("action")


def test_the_latent_of_the_training_data_is_normalised(tokenizer_checkpoint, tmp_path) -> None:
    data = data_of(tokenizer_checkpoint.parents[2])
    policy = latent_policy(tokenizer_checkpoint)
    train(tmp_path, policy, data, 1)
    targets = torch.cat([policy.target(batch) for batch in data.training_windows()])
    assert targets.amin() == pytest.approx(-1, abs=1e-4) and targets.amax() == pytest.approx(1, abs=1e-4)


def test_limits_of_a_drawn_latent_are_the_same_on_every_process(tokenizer_checkpoint, tmp_path, monkeypatch) -> None:
    policy = latent_policy(tokenizer_checkpoint, latent_target="sample")
    train(tmp_path, policy, data_of(tokenizer_checkpoint.parents[2]), 1)
    one = policy.normalizer.affine("latent")
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shared = limits(policy._training_latents())
        assert np.array_equal(shared.scale, one.scale) and np.array_equal(shared.offset, one.offset)


def test_stages_that_do_not_belong_together_are_refused(tokenizer_checkpoint, tmp_path) -> None:
    root = tokenizer_checkpoint.parents[2]
    with pytest.raises(UserError, match=r"tokenizer: none is given"):
        train(tmp_path, latent_policy(None), data_of(root), 1)
    with pytest.raises(UserError, match=r"no such checkpoint"):
        train(tmp_path, latent_policy(tmp_path / "absent.ckpt"), data_of(root), 1)
    with pytest.raises(UserError, match=r"tokenizer\.symmetric False, this policy has True"):
        train(
            tmp_path,
            latent_policy(tokenizer_checkpoint, tokenizer_settings=TokenizerSettings(symmetric=True)),
            data_of(root),
            1,
        )
    peel = LatentDiffusionPolicy("peel", "force", "pose", tokenizer=str(tokenizer_checkpoint), preset="sim")
    with pytest.raises(UserError, match=r"trained with task wipe, this policy has peel"):
        train(tmp_path, peel, data_of(tmp_path, "peel"), 1)
    other = data_of(root)
    other.val_ratio = 0.5  # another split has other statistics
    with pytest.raises(UserError, match=r"normaliser of .* in the policy is not that of the tokenizer"):
        train(tmp_path, latent_policy(tokenizer_checkpoint), other, 1)
    policy = train(tmp_path / "policy", latent_policy(tokenizer_checkpoint), data_of(root), 1)
    with pytest.raises(UserError, match=r"is a checkpoint of .*LatentDiffusionPolicy, expected one of .*Tokenizer"):
        train(tmp_path, latent_policy(policy), data_of(root), 1)


def test_a_resume_on_other_data_is_refused(tokenizer_checkpoint, tmp_path) -> None:
    root = tokenizer_checkpoint.parents[2]
    train(tmp_path, latent_policy(tokenizer_checkpoint), data_of(root), 4, save_at=2)
    other = data_of(root)
    other.val_ratio = 0.5
    with pytest.raises(UserError, match=r"in the checkpoint is not that of these training data|samples"):
        train(tmp_path, latent_policy(tokenizer_checkpoint), other, 4, resume=tmp_path / "at.ckpt")


def evaluate(module: pl.LightningModule, data: pl.LightningDataModule, checkpoint: object) -> None:
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, plugins=[AtomicCheckpointIO()])
    trainer.validate(module, data, ckpt_path=checkpoint, verbose=False, weights_only=True)


def test_a_checkpoint_of_another_policy_is_refused_in_one_line(tokenizer_checkpoint, tmp_path) -> None:
    root = tokenizer_checkpoint.parents[2]
    path = train(tmp_path, latent_policy(tokenizer_checkpoint), data_of(root), 1)
    evaluate(latent_policy(None), data_of(root), path)
    evaluate(latent_policy(None, relative=True), data_of(root, relative=True), path)  # what was released for Wiping
    with pytest.raises(UserError, match=r"checkpoint was trained with task wipe, this model has peel; give the config"):
        peel = LatentDiffusionPolicy("peel", "force", "pose", preset="sim")
        evaluate(peel, data_of(tmp_path, "peel"), path)
    with pytest.raises(UserError, match=r"trained with relative True, this model has False"):  # the weights would fit
        evaluate(latent_policy(None, relative=False), data_of(root, relative=False), path)
    with pytest.raises(UserError, match=r"trained with tokenizer_settings.symmetric False, this model has True"):
        evaluate(latent_policy(None, tokenizer_settings=TokenizerSettings(symmetric=True)), data_of(root), path)
    with pytest.raises(UserError, match=r"is a checkpoint of .*LatentDiffusionPolicy, this model is .*DiffusionPolicy"):
        dp = DiffusionPolicy("wipe", "force", "pose", preset="sim")
        evaluate(dp, data_of(root, method="dp"), path)
    with pytest.raises(UserError, match=r"is a checkpoint of .*LatentDiffusionPolicy, this model is .*Tokenizer"):
        evaluate(Tokenizer("wipe", "force", "pose", preset="sim"), data_of(root), path)
    with pytest.raises(UserError, match=r"trained with preset sim, this model has reference"):
        evaluate(Tokenizer("wipe", "force", "pose"), data_of(root), tokenizer_checkpoint)


def test_data_of_another_policy_are_refused(tokenizer_checkpoint) -> None:
    root = tokenizer_checkpoint.parents[2]
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(UserError, match=r"data\.relative: False, but the model has True; give both the same"):
        trainer.validate(latent_policy(None), data_of(root, relative=False), verbose=False)
    with pytest.raises(UserError, match=r"data\.touch: gelsight, but the model has force"):
        trainer.validate(Tokenizer("wipe", "force", preset="sim"), data_of(root, touch="gelsight"), verbose=False)
    with pytest.raises(UserError, match=r"data\.method: rdp, but the model has dp"):
        trainer.validate(DiffusionPolicy("wipe", "force", "pose", preset="sim"), data_of(root), verbose=False)


@pytest.mark.parametrize("settings", [{"quantizer": "vq"}, {"symmetric": True}, {"decoder_touch": False}])
def test_variants_of_the_tokenizer_train(settings, tmp_path) -> None:
    variant = TokenizerSettings(**settings)
    module = Tokenizer("wipe", "force", "pose", preset="sim", tokenizer=variant, optim=OPTIM)
    checkpoint = train(tmp_path / "at", module, data_of(tmp_path), 3)
    policy = latent_policy(checkpoint, tokenizer_settings=variant)
    train(tmp_path / "ldp", policy, data_of(tmp_path), 2)
    error = policy.trainer.callback_metrics["train/loss"]
    assert error.isfinite()
