"""The dual encoder: any open_clip architecture, fed with uint8 pictures, in micro-batches if memory is short."""

import logging
import re
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import Bottleneck
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from mmtrain.config_errors import UserError, nearest
from mmtrain.recompute import recomputed

BLOCKS = (ResidualAttentionBlock, Bottleneck)  # the repeated parts of both towers


def build_clip(architecture: str) -> open_clip.CLIP:
    """A freshly initialised open_clip.CLIP in float32.

    Args:
        architecture: a name that open_clip knows (`open_clip.list_models()`), or a JSON file in its format. The
            published models are "ViT-B-32-quickgelu" and "RN50-quickgelu"; plain "ViT-B-32" has another activation.

    Raises:
        UserError: unknown name or file, or an architecture that is not a plain dual encoder.
    """
    architecture = register(architecture)
    if architecture not in open_clip.list_models():
        close = nearest(architecture, open_clip.list_models())
        hint = f"; did you mean {close!r}?" if close else ""
        raise UserError(f"architecture: {architecture!r} is not known to open_clip{hint}")
    logging.getLogger().addFilter(_no_pretrained_weights)
    network = open_clip.create_model(architecture, load_weights=False, force_custom_text=False)
    logging.getLogger().removeFilter(_no_pretrained_weights)
    if not isinstance(network, open_clip.CLIP):
        raise UserError(
            f"architecture: {architecture!r} is a {type(network).__name__}, a plain open_clip.CLIP is wanted"
        )
    network.output_dict = False
    return network


def _no_pretrained_weights(record: logging.LogRecord) -> bool:
    return "No pretrained weights" not in record.getMessage()  # open_clip's warning; starting from nothing is meant


def register(architecture: str) -> str:
    """Make an architecture that is given as a JSON file known to open_clip; returns the name that it has there.

    Raises:
        UserError: no such file, here or beside this module.
    """
    if not architecture.endswith(".json"):
        return architecture
    path = Path(architecture)
    path = path if path.exists() else Path(__file__).parent / architecture
    if not path.exists():
        raise UserError(f"architecture: {architecture}: no such file")
    open_clip.add_model_config(path)
    return path.stem


def backbone_name(architecture: str) -> str:
    """How papers write an architecture.

    >>> [backbone_name(name) for name in ("ViT-B-32-quickgelu", "RN50", "sizes/rn_small.json")]
    ['ViT-B/32', 'RN50', 'rn_small']
    """
    name = Path(architecture).name.removesuffix(".json").removesuffix("-quickgelu")
    return re.sub(r"^(ViT-[A-Za-z]+)-(\d+)$", r"\1/\2", name)


def normalise_pictures(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 with CLIP's mean and deviation."""
    mean = pictures.new_tensor(open_clip.OPENAI_DATASET_MEAN, dtype=torch.float32).view(3, 1, 1)
    deviation = pictures.new_tensor(open_clip.OPENAI_DATASET_STD, dtype=torch.float32).view(3, 1, 1)
    return (pictures.float() / 255 - mean) / deviation


def encode_images(network: open_clip.CLIP, pictures: Tensor) -> Tensor:
    """Unit image features [B, D] of uint8 pictures [B, 3, H, W]; see `project_images`."""
    return F.normalize(project_images(network, pictures), dim=-1)


def project_images(network: open_clip.CLIP, pictures: Tensor) -> Tensor:
    """Projected image features [B, D] of any length, which linear probes take, of uint8 pictures [B, 3, H, W].

    Raises:
        UserError: pictures of another size than the architecture's.
    """
    size = network.visual.image_size
    size = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if tuple(pictures.shape[-2:]) != size:
        got = "x".join(map(str, pictures.shape[-2:]))
        raise UserError(
            f"pictures are {got}, the architecture takes {size[0]}x{size[1]}: set data.init_args.pictures.size"
        )
    return network.encode_image(normalise_pictures(pictures).to(network.logit_scale.dtype))


def encode_texts(network: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Unit text features [M, D] of token ids [M, context]; a shorter context is padded, which changes nothing.

    Raises:
        UserError: more token ids than the architecture takes.
    """
    missing = network.context_length - tokens.shape[1]
    if missing < 0:
        raise UserError(
            f"captions have {tokens.shape[1]} token ids, the architecture takes {network.context_length}: "
            "set data.init_args.pictures.context_length"
        )
    tokens = F.pad(tokens, (0, missing))
    return F.normalize(network.encode_text(tokens), dim=-1)


def encode(
    network: open_clip.CLIP, pictures: Tensor, texts: tuple[Tensor, ...], micro_batch: int | None = None
) -> tuple[Tensor, ...]:
    """Unit features of the pictures and of each block of texts, each [B, D].

    With `micro_batch`, gradients are cached: the features of all micro-batches are computed first, keeping no
    activations, and each micro-batch is run again in the backward pass. The loss still sees the whole batch, so the
    gradient is the same; memory is that of one micro-batch (GradCache, arXiv 2101.06983). BatchNorm uses the
    statistics of a micro-batch and updates its running statistics once.
    """
    parts = lambda images, *tokens: (encode_images(network, images), *(encode_texts(network, t) for t in tokens))  # noqa: E731
    if micro_batch is None or micro_batch >= len(pictures) or not torch.is_grad_enabled():
        return parts(pictures, *texts)
    blocks = [
        recomputed(parts, network, *block)
        for block in zip(pictures.split(micro_batch), *(t.split(micro_batch) for t in texts), strict=True)
    ]
    return tuple(torch.cat(features) for features in zip(*blocks, strict=True))
