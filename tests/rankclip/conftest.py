"""The tiny ViT of the golden data for the checkpoint tests: weights, outputs, and its names in open_clip's registry."""

import json
from collections.abc import Iterator

import open_clip
import pytest
import torch

from tests.rankclip.tiny import TINY, TINY_GELU, build, filled_state, model_config, outputs


@pytest.fixture(scope="package")
def state() -> dict[str, torch.Tensor]:
    return filled_state("vit_tiny")


@pytest.fixture(scope="package")
def expected(state) -> torch.Tensor:
    network = build("vit_tiny")
    network.load_state_dict(state)
    return outputs(network)


@pytest.fixture(scope="package")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make the tiny model known to open_clip under two names, with each activation."""
    registry = open_clip.factory
    paths, configs = list(registry._MODEL_CONFIG_PATHS), dict(registry._MODEL_CONFIGS)
    for name, quick_gelu in ((TINY, True), (TINY_GELU, False)):
        file = tmp_path_factory.mktemp("configs") / f"{name}.json"
        file.write_text(json.dumps(model_config("vit_tiny") | {"quick_gelu": quick_gelu}))
        open_clip.add_model_config(file)
    yield
    registry._MODEL_CONFIG_PATHS[:], registry._MODEL_CONFIGS = paths, configs
