"""Every RDP config: instantiated, at the released sizes, named for a row of the paper's tables."""

import json
from pathlib import Path

import pytest
import torch

from mmtrain import reported
from mmtrain.listing import configs_dir
from mmtrain.rdp.presets import encoder_channels
from tests.test_configs import NAMES

RDP = [name for name in NAMES if name.startswith(("rdp_", "dp_"))]
TOUCHES = {"peel": ("", "_gelsight", "_mctac"), "wipe": ("", "_gelsight"), "lift": ("", "_tactile")}
PARAMETERS = {"rdp_at_peel": 8588, "rdp_at_wipe_gelsight": 14522, "rdp_at_lift_tactile": 15576}
MANIFESTS = {
    "dp_peel": "dp_peel",
    "dp_tactile_img_peel": "dp_peel_tactile_img",
    "dp_tactile_emb_peel": "dp_peel_tactile_emb",
    "rdp_ldp_peel": "ldp_peel_force",
    "rdp_ldp_peel_gelsight": "ldp_peel_gelsight",
    "rdp_ldp_wipe": "ldp_wipe_force",
    "rdp_ldp_lift_tactile": "ldp_lift_tactile",
}
GOLDEN = Path(__file__).parents[1] / "golden" / "rdp"


def test_there_is_a_config_for_every_row() -> None:
    """A tokenizer and a latent policy for every RDP row, at the released sizes and in simulation."""
    rows = [f"rdp_{stage}_{task}{touch}" for task in TOUCHES for touch in TOUCHES[task] for stage in ("at", "ldp")]
    rows += [f"{method}_{task}" for task in TOUCHES for method in ("dp", "dp_tactile_emb")] + ["dp_tactile_img_peel"]
    assert sorted([*rows, *(f"{row}_sim" for row in rows)]) == RDP


@pytest.mark.parametrize("name", RDP)
def test_every_config_is_instantiated(instantiate, name: str) -> None:
    with torch.device("meta"):  # 300 M parameters each
        trainer, model, data = instantiate("-c", name)
    simulated, tokenizer = name.endswith("_sim"), "_at_" in name
    assert f"python -m mmtrain fit -c configs/{name}.yaml" in (configs_dir() / f"{name}.yaml").read_text()
    assert model.spec == data.spec
    assert (data.demonstrations is not None) == (model.spec.vision == "pose") == simulated
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert callbacks["Results"].scale == ("simulation" if simulated else "full")
    assert ("TrainableEma" in callbacks) == (not tokenizer)
    if tokenizer:
        assert model.network.encoder.encoder[2].out_channels == encoder_channels(model.spec.task)
        if name in PARAMETERS:
            assert sum(p.numel() for p in model.network.parameters()) == PARAMETERS[name]
        return
    table = {"peel": 2, "wipe": 3, "lift": 4}[model.spec.task]
    assert model.method in reported.load("rdp").tables[table - 1].rows
    if "_ldp_" in name:
        partner = name.replace("_ldp_", "_at_")
        assert partner in RDP and model.tokenizer_path == f"runs/{partner}/checkpoints/last.ckpt"
    if name in MANIFESTS:
        manifest = json.loads((GOLDEN / f"manifest_{MANIFESTS[name]}.json").read_text())
        named = {k: v["shape"] for k, v in manifest.items() if k != "_info" and "_dummy_variable" not in k}
        parts = {**prefixed("model.", model.model), **prefixed("obs_encoder.", model.obs_encoder)}
        assert parts == {k: v for k, v in named.items() if k.startswith(("model.", "obs_encoder."))}
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["_info"]["params_total"]


def prefixed(prefix: str, module: torch.nn.Module) -> dict[str, list[int]]:
    return {prefix + key: list(value.shape) for key, value in module.state_dict().items()}
