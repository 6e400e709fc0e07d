"""The two tiny models of the golden data as open_clip networks, and checkpoints of them in the common layouts."""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP

from tests.golden.fill import fill

TINY, TINY_GELU = "mmtrain-test-vit-quickgelu", "mmtrain-test-vit"  # names for open_clip: fixture `architectures`
FOLDER = Path(__file__).parents[1] / "golden" / "rankclip"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def model_config(name: str) -> dict[str, Any]:
    """Translate the manifest's OpenAI-style sizes of `name` to an open_clip model config."""
    c = MANIFEST[name]["config"]
    vision = {"layers": c["vision_layers"], "width": c["vision_width"], "image_size": c["image_resolution"]}
    text = {"width": c["transformer_width"], "heads": c["transformer_heads"], "layers": c["transformer_layers"]}
    return {
        "embed_dim": c["embed_dim"],
        "quick_gelu": True,
        "vision_cfg": vision | {"patch_size": c["vision_patch_size"]},
        "text_cfg": text | {"context_length": c["context_length"], "vocab_size": c["vocab_size"]},
    }


def filled_state(name: str) -> dict[str, torch.Tensor]:
    """Return every tensor of the golden model `name`: fill() for floats, 0 for counters."""
    state = {}
    for key, spec in MANIFEST[name]["tensors"].items():
        is_float = spec["dtype"] == "float32"
        shape = tuple(spec["shape"])
        state[key] = torch.as_tensor(fill(key, shape)) if is_float else torch.zeros(shape, dtype=torch.int64)
    return state


def build(name: str, quick_gelu: bool = True) -> CLIP:
    """Return the golden model `name` with random weights."""
    return CLIP(**(model_config(name) | {"quick_gelu": quick_gelu}))


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


def lightning(state: dict[str, torch.Tensor], prefix: str, **hyper_parameters: Any) -> dict[str, Any]:
    """A checkpoint the way Lightning writes it, with tensors of the module's own beside the network."""
    tensors = prefixed(state, prefix) | {"objective.momentum": torch.ones(3), "logit_scale": torch.ones(())}
    about = {"epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.6.6"}
    return about | {"state_dict": tensors, "hyper_parameters": hyper_parameters}


def trainer(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"epoch": 64, "name": "cc3m", "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def outputs(network: CLIP) -> torch.Tensor:
    network.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 512, (2, 16), generator=generator)
    with torch.no_grad():
        image = network.encode_image(torch.randn(2, 3, 32, 32, generator=generator), normalize=True)
        return torch.cat([image, network.encode_text(tokens, normalize=True)])
