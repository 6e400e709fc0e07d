"""open_clip's CLIP class is the papers' model: same keys, shapes and outputs as the official module (golden)."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP

from tests.golden.fill import array
from tests.rankclip.tiny import FOLDER, MANIFEST, build, filled_state

OUTPUTS = np.load(FOLDER / "model.npz")
FULL = json.loads((FOLDER / "manifest_full.json").read_text())
ARCHITECTURES = {"ViT-B/32": "ViT-B-32-quickgelu", "RN50": "RN50-quickgelu"}


def specs(network: torch.nn.Module) -> dict[str, dict]:
    """Describe a state dict like the manifest does."""
    state = network.state_dict()
    return {k: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in state.items()}


@pytest.mark.parametrize("name", MANIFEST)
def test_tiny_keys_and_shapes(name: str) -> None:
    network = build(name)
    assert specs(network) == MANIFEST[name]["tensors"]
    assert {key for key, _ in network.named_parameters()} == set(MANIFEST[name]["parameter_order"])


@pytest.mark.parametrize("name", FULL)
def test_full_keys_shapes_and_parameter_count(name: str) -> None:
    with torch.device("meta"):
        network = CLIP(**open_clip.get_model_config(ARCHITECTURES[name]))
    assert specs(network) == FULL[name]["tensors"]
    assert sum(p.numel() for p in network.parameters()) == FULL[name]["parameters"]


def forward(name: str, network: CLIP, mode: str) -> dict[str, torch.Tensor]:
    """Run both towers on the golden inputs from fresh golden weights."""
    pixels_wide = MANIFEST[name]["config"]["image_resolution"]
    pixels = torch.from_numpy(array(f"rankclip.model.pixels.{name}", (5, 3, pixels_wide, pixels_wide)))
    network.load_state_dict(filled_state(name), strict=True)
    network.train(mode == "train")
    with torch.no_grad():
        image = network.encode_image(pixels)
        text = network.encode_text(torch.from_numpy(OUTPUTS[f"{name}/tokens"]))
    unit = torch.nn.functional.normalize
    return {"image_features": image, "text_features": text, "image_embeds": unit(image), "text_embeds": unit(text)}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", MANIFEST)
def test_outputs(name: str, mode: str) -> None:
    for key, value in forward(name, build(name), mode).items():
        np.testing.assert_allclose(value, OUTPUTS[f"{name}/float32/{mode}/{key}"], rtol=0, atol=1e-5, err_msg=key)


def test_the_activation_is_quickgelu() -> None:
    outputs = forward("vit_tiny", build("vit_tiny", quick_gelu=False), "eval")
    difference = np.abs(outputs["text_embeds"].numpy() - OUTPUTS["vit_tiny/float32/eval/text_embeds"]).max()
    assert difference > 1e-4, "exact GELU must be told apart from x * sigmoid(1.702 x) at this tolerance"
