"""Models of Stable Diffusion's kind of a few thousand weights, a tiny world's data, and trainers for tests."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from datamodules.story import StoryDataModule
from mmtrain.callbacks import RandomState
from mmtrain.checkpoint import AtomicCheckpointIO, LastCheckpoint, ResumeGuard
from mmtrain.ema import TrainableEma
from mmtrain.storyweaver.pipeline import Components, save_pipeline
from mmtrain.storyweaver.tokenizer import small_tokenizer
from tests.datamodules.story_worlds import CAST, write_world

SIZE = (16, 28)  # of pictures; latents are 8 x 14
WIDTH = 16  # of text features
OPTIM = {"lr": 1e-3, "weight_decay": 0.01, "decay": "all", "schedule": "constant", "warmup_steps": 0}
SAMPLER = {"name": "ddim", "steps": 2, "scale": 2.0}


def small_components(objective: str = "eps", seed: int = 0) -> Components:
    """About 70,000 weights; pictures are 2 times as high and wide as latents."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = small_tokenizer([f"A {words[0]} stands. {words[1]}" for words in CAST.values()] * 2, None, 600)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Components(unet.eval(), vae.eval(), CLIPTextModel(config).eval(), tokenizer, objective)


def small_pipeline(folder: Path, **options: Any) -> str:
    """The same as a folder in diffusers' layout."""
    return str(save_pipeline(small_components(**options), folder))


def small_world(folder: Path, **options: Any) -> Path:
    """Three characters with two pictures each, one pair, and a story of one line each."""
    return write_world(folder, **{"frames": 2, "pairs": 1, "stories": 1, "lines": 1, "size": SIZE} | options)


def data_of(world: Path, **options: Any) -> StoryDataModule:
    """Its data module."""
    return StoryDataModule(str(world), picture_size=SIZE, **{"batch_size": 2} | options)


def trainer_of(folder: Path, steps: int = 1, **options: Any) -> pl.Trainer:
    """A trainer with the callbacks of every run; more of them in `callbacks`."""
    callbacks = [RandomState(), ResumeGuard(), LastCheckpoint(every_n_train_steps=1000), TrainableEma()]
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*callbacks, *options.pop("callbacks", ())],
        **{"limit_val_batches": 0} | options,
    )


def fit(folder: Path, module: pl.LightningModule, data: StoryDataModule, steps: int, **options: Any) -> Path:
    """Train for so many steps; returns the checkpoint."""
    ckpt_path = options.pop("ckpt_path", None)
    pl.seed_everything(0, verbose=False)
    trainer_of(folder, steps, **options).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return folder / "checkpoints" / "last.ckpt"


def read(path: Path) -> dict[str, Any]:
    """Content of a checkpoint."""
    return torch.load(path, map_location="cpu", weights_only=True)
