"""Models of Stable Diffusion's kind that are small enough for tests."""

from pathlib import Path

import torch

from mmtrain.storyweaver.pipeline import Components, save_pipeline
from mmtrain.storyweaver.tokenizer import small_tokenizer

TEXTS = ("a red fox and a blue robot in the snow", "this yellow robot wears grey clothes", "2.5D cartoon style.") * 2


def tiny_components(vae: str = "AutoencoderKL", objective: str = "eps", seed: int = 0, width: int = 32) -> Components:
    """A whole model of about 0.6 million weights; `vae` may be "PatchAutoencoder"."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = small_tokenizer(TEXTS, None, 550, model_max_length=77)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=2,
    )
    if vae == "PatchAutoencoder":
        from mmtrain.storyweaver.patch_autoencoder import PatchAutoencoder

        autoencoder = PatchAutoencoder(4, (1, 1))
    else:
        autoencoder = AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Components(unet.eval(), autoencoder.eval(), CLIPTextModel(config).eval(), tokenizer, objective)


def tiny_pipeline(folder: Path, **options: object) -> Components:
    """The same, also written to a folder."""
    components = tiny_components(**options)
    save_pipeline(components, folder)
    return components


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two networks have the same names and weights."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
