"""A small training of each kind, run by `fit` in a few CPU-seconds: random draws, a validation an epoch, checkpoints.

`write_training(folder, "ldm")` writes all that `python -m mmtrain fit -c <what it returns>` needs; it also runs with
`--trainer.devices 2 --trainer.strategy ddp`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from datamodules.synthetic import write_pairs

OPTIM = {"lr": 1e-3, "warmup_steps": 5}
EMA = {"callbacks+": {"class_path": "mmtrain.ema.TrainableEma"}}
VIT = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CLIPS = {"fps": 4.0, "seconds": 2.0, "frame_size": 32, "contrast_frames": 4, "min_shift_frames": 2}
CLIPS |= {"window_frames": 4, "window_mel_frames": 64}
FIRST_STAGE = {  # patches of 4 x 4, halved once
    "in_channels": 16,
    "out_channels": 16,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "mid_block_add_attention": False,
}
FOLEY_UNET = {
    "feature_dim": 3,
    "block_out_channels": [32, 32],
    "layers_per_block": 1,
    "attention_levels": [False, True],
    "heads": 4,
    "context_width": 16,
}
WIPING = {"task": "wipe", "touch": "force", "vision": "pose"}


def rankclip(folder: Path) -> dict[str, Any]:
    """RankCLIP on coloured shapes with random crops, mirroring and patch dropout: 3 epochs of 12 steps."""
    shards = write_pairs(folder / "shards", [60, 37], size=40)
    (folder / "small_vit.json").write_text(json.dumps(VIT))
    pictures = {"size": 32, "crop_scale": [0.5, 1.0], "flip": 0.5, "context_length": 8}
    return {
        "trainer": {"max_epochs": 3},
        "model": part("mmtrain.rankclip.module.RankClip", architecture=str(folder / "small_vit.json"), optim=OPTIM),
        "data": part(
            "datamodules.image_text.ImageTextDataModule",
            train=shards,
            batch_size=8,
            pictures=pictures,
            evaluate={"self": {"path": shards, "captions": "txt"}},
        ),
    }


def clips(kind: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Flashes with clicks, 8 steps an epoch."""
    maker = part("datamodules.synthetic_video_audio.SyntheticClips", splits={"train": 32, "val": 6}, format=CLIPS)
    return part(
        f"datamodules.video_audio.{kind}",
        path=str(folder / "clips"),
        format=CLIPS,
        maker=maker,
        batch_size=4,
        **options,
    )


def cavp(folder: Path) -> dict[str, Any]:
    """CAVP with dropout and random cuts: 3 epochs of 8 steps, BatchNorm with it."""
    sizes = {"width": 4, "audio_width": 4, "feature_dim": 16}
    return {
        "trainer": {"max_epochs": 3},
        "model": part("mmtrain.difffoley.cavp.Cavp", format=CLIPS, dropout=0.2, optim=OPTIM, **sizes),
        "data": clips("ContrastiveDataModule", folder, clips=2),
    }


def ldm(folder: Path) -> dict[str, Any]:
    """Diff-Foley's diffusion with dropped conditions, clipped gradients and an average: 3 epochs of 8 steps."""
    return {
        "trainer": {"max_epochs": 3, "gradient_clip_val": 1.0, **EMA},
        "model": part(
            "mmtrain.difffoley.module.LatentDiffusion",
            format=CLIPS,
            network=FOLEY_UNET,
            first_stage=FIRST_STAGE,
            condition_dropout=0.2,
            optim=OPTIM,
            sampler={"name": "dpm_solver", "steps": 2},
        ),
        "data": clips(
            "LatentDataModule", folder, features=part("datamodules.synthetic_video_audio.MeanColours"), cache=True
        ),
    }


def wiping(folder: Path) -> dict[str, Any]:
    """Made-up demonstrations, 245 windows, 7 steps an epoch."""
    maker = part("datamodules.synthetic_episodes.SyntheticDemonstrations", task="wipe", episodes=6)
    options = {"batch_size": 32, "val_ratio": 0.2, "episodes": 0}
    path = str(folder / "wipe.zarr")
    return part("datamodules.robot.RobotDataModule", path=path, method="rdp", demonstrations=maker, **options, **WIPING)


def tokenizer(folder: Path) -> dict[str, Any]:
    """RDP's tokenizer, whose latent is drawn: 28 steps, 4 epochs."""
    return {
        "trainer": {"max_epochs": 4},
        "model": part("mmtrain.rdp.tokenizer.Tokenizer", preset="sim", optim=OPTIM, **WIPING),
        "data": wiping(folder),
    }


def latent_policy(folder: Path) -> dict[str, Any]:
    """RDP's slow policy over a tokenizer with fresh weights, targets drawn, an average: 24 steps, over 3 epochs."""
    return {
        "trainer": {"max_steps": 24, **EMA},
        "model": part(
            "mmtrain.rdp.module.LatentDiffusionPolicy",
            tokenizer=write_tokenizer(folder),
            latent_target="sample",
            denoising_steps=2,
            preset="sim",
            optim=OPTIM,
            **WIPING,
        ),
        "data": wiping(folder),
    }


def write_tokenizer(folder: Path) -> str:
    """A tokenizer of these demonstrations that was never trained, as its training would leave it."""
    from datamodules.robot import RobotDataModule
    from datamodules.synthetic_episodes import SyntheticDemonstrations
    from mmtrain.checkpoint import plain
    from mmtrain.rdp.normalising import fit_normaliser
    from mmtrain.rdp.tokenizer import Tokenizer

    options = wiping(folder)["init_args"] | {"demonstrations": SyntheticDemonstrations("wipe", episodes=6)}
    data = RobotDataModule(**options)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    module = Tokenizer(**WIPING, preset="sim")
    fit_normaliser(module.normalizer, data.normaliser_affines())
    content = {"state_dict": module.state_dict(), "hyper_parameters": plain(dict(module.hparams))}
    content |= {"pytorch-lightning_version": "2.6.6", "settings": {"model.class": "mmtrain.rdp.tokenizer.Tokenizer"}}
    torch.save(content, folder / "tokenizer.ckpt")
    return str(folder / "tokenizer.ckpt")


def storyweaver(folder: Path) -> dict[str, Any]:
    """StoryWeaver's LoRA of UNet and text encoder with guidance that is trained; draws a picture while validating.

    Noise, times, posteriors, offsets and dropped captions are random; 24 steps, 3 epochs.
    """
    from tests.storyweaver.stand_ins import SIZE, small_pipeline, small_world

    return {
        "trainer": {"max_steps": 24, **EMA},
        "model": part(
            "mmtrain.storyweaver.module.StoryDiffusion",
            pipeline=small_pipeline(folder / "pipeline"),
            trains="lora",
            lora={"rank": 4, "text_encoder": True},
            guidance={"encoder": "soft"},
            caption_dropout=0.1,
            noise_offset=0.1,
            optim=OPTIM,
            sampler={"name": "ddim", "steps": 2, "scale": 2.0},
            draws_per_validation=1,
            draw_steps=2,
        ),
        "data": part(
            "datamodules.story.StoryDataModule",
            path=str(small_world(folder / "world", characters=3, frames=5, pairs=3)),
            picture_size=list(SIZE),
            batch_size=2,
        ),
    }


def part(class_path: str, **init_args: Any) -> dict[str, Any]:
    """A class and its arguments, as configs name them."""
    return {"class_path": class_path, "init_args": init_args}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "rankclip": rankclip,
    "cavp": cavp,
    "ldm": ldm,
    "tokenizer": tokenizer,
    "latent_policy": latent_policy,
    "storyweaver": storyweaver,
}
NAMES = tuple(KINDS)


def write_training(folder: Path, name: str) -> Path:
    """Write config, data and what else a small training needs into a folder; returns the config.

    Args:
        folder: made if need be; runs go to `folder / "run"` unless `--trainer.default_root_dir` says otherwise.
        name: of `NAMES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = KINDS[name](folder)
    config["trainer"] |= {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": str(folder / "run"),
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    config["vars"] = {"checkpoint_steps": 3}
    path = folder / f"{name}.yaml"
    path.write_text(f"# Small training for tests: {name}\n{yaml.safe_dump(config, sort_keys=False)}")
    return path
