"""Networks and files with the stand-in weights of the reference, by the names of the released checkpoints."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tests.golden
from mmtrain.difffoley.layouts import State
from mmtrain.difffoley.networks import AlignmentNetwork, FoleyUNet
from tests.golden.fill import array, fill

SMALL = {
    "feature_dim": 20,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "heads": 4,
    "context_width": 24,
    "max_frames": 12,
}


def manifest(name: str) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint."""
    text = (Path(tests.golden.__file__).parent / f"difffoley/manifest_{name}.json").read_text()
    return {key: value["shape"] for key, value in json.loads(text).items()}


def filled(shapes: dict[str, list[int]]) -> State:
    """Stand-in weights of these names and shapes."""
    return {key: torch.from_numpy(np.asarray(fill(key, tuple(shape)))) for key, shape in shapes.items()}


def condition_shapes(prefix: str, feature_dim: int = 20, width: int = 24, frames: int = 12) -> dict[str, list[int]]:
    """Names and shapes of a released condition embedder."""
    shapes = {"embedder.0.weight": [width, feature_dim], "embedder.0.bias": [width], "pos_emb.weight": [frames, width]}
    return {prefix + name: shape for name, shape in shapes.items()}


def given(name: str, *shape: int) -> Tensor:
    """Input of the reference."""
    return torch.from_numpy(array(name, shape))


def logistic(name: str, *shape: int) -> Tensor:
    """Input of the reference in (0, 1)."""
    return torch.from_numpy((1 / (1 + np.exp(-array(name, shape).astype(np.float64)))).astype(np.float32))


def small_unet() -> FoleyUNet:
    """Of the sizes of the reference's small UNet."""
    return FoleyUNet(**SMALL).eval()


def small_classifier() -> AlignmentNetwork:
    """Of the sizes of the reference's small classifier."""
    return AlignmentNetwork(**SMALL).eval()


def assert_close(actual: Tensor, expected: np.ndarray | float, tolerance: float = 2e-5) -> None:
    """Equal in shape and, to an absolute tolerance, in value."""
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected), rtol=0, atol=tolerance, check_dtype=False)
