"""The patch code and the small text-to-picture model: exact inverse, trains, resumes, ends as a pipeline folder."""

from pathlib import Path

import lightning.pytorch as pl
import open_clip
import pytest
import torch

from datamodules.creature_base import CreatureBaseDataModule
from mmtrain.callbacks import RandomState
from mmtrain.checkpoint import AtomicCheckpointIO, LastCheckpoint
from mmtrain.config_errors import UserError
from mmtrain.ema import TrainableEma
from mmtrain.storyweaver.base import PIPELINE, BaseSizes, TextToPicture
from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder
from mmtrain.storyweaver.pipeline import load_components

SIZES = BaseSizes(channels=(16, 16), heads=2, norm_groups=4, latent_channels=6)
TEXT = {"context_length": 48, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP with fresh weights, in a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save({"state_dict": open_clip.CLIP(16, VISION, TEXT, quick_gelu=True).state_dict()}, path)
    return str(path)


def smooth(count: int) -> torch.Tensor:
    """Pictures [count, 3, 64, 112] in [-1, 1] with as many degrees of freedom as a coarse grid."""
    coarse = torch.rand(count, 3, 8, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (64, 112), mode="bilinear")


def test_patch_code_is_a_projection_with_unit_variance(tmp_path: Path) -> None:
    pictures = smooth(40)
    for whitening in (0.0, 0.5, 1.0):
        code = PatchAutoencoder(27)  # a bilinear patch has 9 values a colour
        assert code.fit(pictures.split(10), whitening) == pytest.approx(1.0, abs=1e-6)
        latents = code.encode(pictures).latent_dist
        assert torch.equal(latents.mode(), latents.mean) and latents.mode().shape == (40, 27, 8, 14)
        assert torch.allclose(latents.sample(), latents.mean, atol=1e-4), "the posterior is a point"
        torch.testing.assert_close(code.decode(latents.mean).sample, pictures, atol=1e-4, rtol=0)
        variances = latents.mean.double().var(dim=(0, 2, 3), correction=0)
        assert float(variances.mean()) == pytest.approx(1.0, abs=1e-4)
        assert (variances.max() / variances.min() < 1.01) == (whitening == 1.0)
    small = PatchAutoencoder(3)
    kept = small.fit(pictures.split(40))
    error = (small(pictures) - pictures).square().mean()
    total = (pictures - pictures.mean((0, 2, 3), keepdim=True)).square().mean()
    assert 0.3 < kept < 1 and float(error) < float(total), "the largest components are kept"
    small.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again(pictures), small(pictures)) and again.config.block_out_channels == [1, 1, 1, 1]


def test_patch_code_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="latent_channels: 193, a patch of 8 has 1 to 192 components"):
        PatchAutoencoder(193)
    with pytest.raises(UserError, match="60 x 112 has no whole patches of 8"):
        PatchAutoencoder(4).encode(torch.zeros(1, 3, 60, 112))
    with pytest.raises(UserError, match="112 patches are too few"):
        PatchAutoencoder(4).fit([torch.zeros(1, 3, 64, 112)])


def trained(folder: Path, clip: str, steps: int, resume: bool = False) -> tuple[TextToPicture, TrainableEma]:
    pl.seed_everything(0)
    optim = {"lr": 1e-3, "schedule": "constant", "warmup_steps": 2}
    module = TextToPicture(clip, SIZES, fit_pictures=60, sheet=0, optim=optim)
    ema = TrainableEma()
    trainer = pl.Trainer(
        max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[AtomicCheckpointIO()], limit_val_batches=1,
        callbacks=[RandomState(), ema, LastCheckpoint(3)], use_distributed_sampler=False,
    )  # fmt: skip
    data = CreatureBaseDataModule(count=60, val_count=4, batch_size=8)
    trainer.fit(module, data, ckpt_path=str(folder / "checkpoints" / "last.ckpt") if resume else None)
    return module, ema


def test_training_resumes_exactly_and_ends_as_a_pipeline(tmp_path: Path, clip: str) -> None:
    whole, ema = trained(tmp_path / "whole", clip, 6)
    trained(tmp_path / "parts", clip, 3)
    resumed, _ = trained(tmp_path / "parts", clip, 6, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    components = load_components(str(tmp_path / "whole" / PIPELINE))
    assert components.objective == "v" and components.factor == 8 and components.text_width == 16
    assert torch.equal(components.vae.basis, whole.vae.basis)
    for name, value in components.unet.state_dict().items():
        assert torch.equal(value, ema.weights[f"unet.{name}"]), "the averaged weights are written"
    assert any(
        not torch.equal(value, ema.weights[f"unet.{name}"]) for name, value in whole.unet.state_dict().items()
    ), "and training goes on with the raw ones"
    prompt = whole.trainer.datamodule.sets["val"].frames[0].prompt
    assert components.tokenizer(prompt).input_ids == whole.tokenizer(prompt).input_ids


def test_a_file_without_a_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clip: .*nowhere.ckpt: no such file.*clip_text_creatures.yaml makes"):
        TextToPicture(str(tmp_path / "nowhere.ckpt"))
