"""The released layout, its pickle without its code, and our checkpoints as folders of diffusers."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmtrain.config_errors import UserError
from mmtrain.export import main as export_main
from mmtrain.storyweaver.lora_files import FILE
from mmtrain.storyweaver.networks import KnowledgeEncoder
from mmtrain.storyweaver.pipeline import Components, load_components, save_pipeline
from mmtrain.storyweaver.pretrained import (
    NAMES,
    convert_knowledge_encoder,
    load_released,
    main,
    read_knowledge_encoder,
)
from tests.storyweaver.tiny import equal, tiny_components, tiny_pipeline

SOURCE = """
from torch import nn, zeros
class Autok_encoder(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.H, self.W, self.scale = 64, 112, 1.0
        self.grid = zeros(2, 3)
        self.mean_predictor, self.cor_predictor = head(), head()
"""


def released_module(path: Path, extra: Any = None) -> dict[str, Tensor]:
    """A module pickled whole, of a class that is gone afterwards; returns its state."""

    def head() -> nn.Sequential:
        return nn.Sequential(nn.Linear(768, 64), nn.LeakyReLU(), nn.LayerNorm(64), nn.Linear(64, 2), nn.Tanh())

    module = types.ModuleType("released_model")
    exec(SOURCE, module.__dict__)
    sys.modules["released_model"] = module
    try:
        made = module.Autok_encoder(head)
        if extra is not None:
            made.extra = extra
        torch.save(made, path)
        return made.state_dict()
    finally:
        del sys.modules["released_model"]


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("touched",)


def test_the_pickled_encoder_is_converted_without_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    state = released_module(tmp_path / "k_encoder.pt")
    assert tuple(state) == NAMES
    with pytest.raises(UserError, match=r"pickled module, .*\n.*pretrained convert .*k_encoder.pt .*k_encoder.safe"):
        read_knowledge_encoder(tmp_path / "k_encoder.pt")
    assert main(["convert", "k_encoder.pt", "out/k_encoder.safetensors"]) == 0
    assert "98,948" in capsys.readouterr().out
    read = read_knowledge_encoder(tmp_path / "out/k_encoder.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    KnowledgeEncoder(768).load_state_dict(read)
    torch.save(state, tmp_path / "state.pt")  # of tensors alone, so no pickled class
    assert read_knowledge_encoder(tmp_path / "state.pt").keys() == state.keys()

    for extra, name in ((Evil(), "posix.mkdir"), (eval, "eval"), (nn.Conv2d(1, 1, 1), "conv.Conv2d")):
        released_module(tmp_path / "evil.pt", extra)
        with pytest.raises(UserError, match=rf"evil.pt: refused, it holds .*{name}"):
            convert_knowledge_encoder(tmp_path / "evil.pt", tmp_path / "evil.safetensors")
    assert not (tmp_path / "touched").exists() and not list(tmp_path.glob("*evil.safetensors*"))

    torch.save(nn.Linear(2, 2), tmp_path / "other.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    (tmp_path / "text.pt").write_text("nothing")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "k_encoder.pt").read_bytes()[:5000])
    convert = convert_knowledge_encoder
    for attempt, message in (
        (lambda: convert("other.pt", "o.safetensors"), "is no knowledge encoder: lacks mean_predictor.0.weight"),
        (lambda: convert("tensor.pt", "o.safetensors"), "holds a Tensor, expected a pickled module"),
        (lambda: convert("text.pt", "o.safetensors"), "text.pt: is no file of torch.save"),
        (lambda: convert("cut.pt", "o.safetensors"), "cut.pt: is no file of torch.save"),
        (lambda: convert("none.pt", "o.safetensors"), "none.pt: no such file"),
        (lambda: convert("k_encoder.pt", "k_encoder.pt"), "is the file to convert itself"),
        (lambda: main(["convert", "k_encoder.pt"]), "the following arguments are required: OUT"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_a_released_folder(tmp_path: Path) -> None:
    made = tiny_pipeline(tmp_path / "pipeline")
    components, encoder = load_released(tmp_path)
    assert equal(components.unet, made.unet) and encoder is None
    state = released_module(tmp_path / "k_encoder.pt")
    with pytest.raises(UserError, match="pretrained convert"):
        load_released(tmp_path)
    convert_knowledge_encoder(tmp_path / "k_encoder.pt", tmp_path / "k_encoder.safetensors")
    assert load_released(tmp_path)[1].keys() == state.keys()


# our checkpoints


CHARACTERS = ("Mr. Bean", "Pororo")


def checkpoint_of(module: Any, path: Path, seed: int = 3) -> dict[str, Tensor]:
    """A file as a training leaves it, with an average that is apart from the raw weights, which it returns."""
    torch.manual_seed(seed)
    content = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(content)
    averaged = {name: value + 0.05 * torch.randn_like(value) for name, value in content["state_dict"].items()}
    torch.save(content | {"pytorch-lightning_version": "2", "ema": averaged}, path)
    return averaged


@torch.no_grad()
def drawn(unet: nn.Module) -> Tensor:
    torch.manual_seed(5)
    return unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 6, 32)).sample


def world() -> Any:
    from mmtrain.story import Character, World

    people = {name: Character(name, "fox", "This fox is red.") for name in CHARACTERS}
    return World("pororo", "2.5D cartoon style.", people)


def test_a_lora_is_exported_merged_and_as_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from diffusers import DiffusionPipeline

    from mmtrain.storyweaver.module import StoryDiffusion

    tiny_pipeline(base := tmp_path / "base", objective="v")
    module = StoryDiffusion(str(base), lora={"rank": 2, "alpha": 3.0}, guidance={"encoder": "soft", "alpha": 0.5})
    averaged = checkpoint_of(module, tmp_path / "last.ckpt")
    module.load_state_dict(averaged, strict=False)
    expected = drawn(module.unet)
    assert export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "out")]) == 0
    assert "StoryDiffusion" in capsys.readouterr().out

    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    torch.testing.assert_close(drawn(pipe.unet), expected, atol=1e-5, rtol=0)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe = DiffusionPipeline.from_pretrained(str(base), local_files_only=True)
    assert (drawn(pipe.unet) - expected).abs().max() > 1e-3
    pipe.load_lora_weights(str(tmp_path / "out"), weight_name=FILE, local_files_only=True)
    torch.testing.assert_close(drawn(pipe.unet), expected, atol=1e-5, rtol=0)

    encoder = read_knowledge_encoder(tmp_path / "out/k_encoder.safetensors")
    assert all(torch.equal(value, averaged["guidance.encoder." + name]) for name, value in encoder.items())
    guidance = json.loads((tmp_path / "out/guidance.json").read_text())
    assert (guidance["encoder"], guidance["alpha"], guidance["beta"]) == ("soft", 0.5, 0.85)
    assert load_released(tmp_path / "out")[1].keys() == encoder.keys()

    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"last.ckpt: pipeline: .*base: no such folder"):
        export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "none")])
    options = ["--pipeline", str(tmp_path / "moved"), "--unmerged"]
    export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "unmerged"), *options])
    assert equal(load_components(tmp_path / "unmerged").unet, load_components(tmp_path / "moved").unet)
    assert (tmp_path / "unmerged" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()
    with pytest.raises(UserError, match="out: is there already"):
        export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "out"), "--pipeline", str(tmp_path / "moved")])
    save_pipeline(tiny_components(objective="v", seed=9), tmp_path / "moved")
    with pytest.raises(UserError, match="was trained on another pipeline"):
        export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "none"), "--pipeline", str(tmp_path / "moved")])
    with pytest.raises(UserError, match=r"the unet has adapters"):
        save_pipeline(Components(*(getattr(module.components, p) for p in Components.__annotations__)), tmp_path / "no")
    torch.save({"model_class": "torch.nn.Linear", "state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"--pipeline: .*other.ckpt is no model of StoryWeaver's room"):
        export_main([str(tmp_path / "other.ckpt"), str(tmp_path / "none"), "--pipeline", "x"])
    assert not (tmp_path / "none").exists() and not (tmp_path / "no").exists()


def test_a_whole_unet_is_exported(tmp_path: Path) -> None:
    from mmtrain.storyweaver.module import StoryDiffusion

    tiny_pipeline(tmp_path / "base", vae="PatchAutoencoder")
    averaged = checkpoint_of(StoryDiffusion(str(tmp_path / "base"), trains="full"), tmp_path / "last.ckpt")
    export_main([str(tmp_path / "last.ckpt"), str(tmp_path / "out")])
    read = load_components(tmp_path / "out")
    assert all(torch.equal(value, averaged["unet." + name]) for name, value in read.unet.state_dict().items())
    assert equal(read.vae, load_components(tmp_path / "base").vae) and not (tmp_path / "out/guidance.json").exists()


def test_weights_for_each_character_are_exported(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from mmtrain.storyweaver.dreambooth import DreamBooth
    from mmtrain.storyweaver.lora import LoraPerCharacter

    tiny_pipeline(base := tmp_path / "base")
    lora = LoraPerCharacter(str(base), lora={"rank": 2})
    lora.world = world()
    lora.add_characters(CHARACTERS)
    averaged = checkpoint_of(lora, tmp_path / "lora.ckpt")
    export_main([str(tmp_path / "lora.ckpt"), str(tmp_path / "lora")])
    assert equal(load_components(tmp_path / "lora").unet, load_components(base).unet)
    files = json.loads((tmp_path / "lora/characters.json").read_text())["characters"]
    assert files == {"Mr. Bean": "lora/Mr_ Bean.safetensors", "Pororo": "lora/Pororo.safetensors"}
    lora.load_state_dict(averaged, strict=False)
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "lora"), local_files_only=True)
    for name, file in files.items():
        pipe.load_lora_weights(str(tmp_path / "lora"), weight_name=file, local_files_only=True)
        torch.testing.assert_close(drawn(pipe.unet), drawn(lora.unet_for((name,))), atol=1e-5, rtol=0)
        pipe.unload_lora_weights()

    booth = DreamBooth(str(base))
    booth.world = world()
    booth.add_characters(CHARACTERS)
    averaged = checkpoint_of(booth, tmp_path / "booth.ckpt")
    export_main([str(tmp_path / "booth.ckpt"), str(tmp_path / "booth")])
    about = json.loads((tmp_path / "booth/characters.json").read_text())
    assert about["characters"] == {"Mr. Bean": "unets/Mr_ Bean", "Pororo": "unets/Pororo"}
    assert (about["prompt"], about["rare_token"]) == ("rare_token", "sks")
    read = UNet2DConditionModel.from_pretrained(str(tmp_path / "booth/unets/Pororo"), local_files_only=True)
    assert torch.equal(read.conv_out.bias, averaged["networks.Pororo.conv_out.bias"])
    assert load_file(tmp_path / "booth/unet/diffusion_pytorch_model.safetensors").keys() == read.state_dict().keys()

    alone = DreamBooth(str(base), characters=["Pororo"])
    alone.world = world()
    alone.add_characters(CHARACTERS)
    averaged = checkpoint_of(alone, tmp_path / "alone.ckpt")
    export_main([str(tmp_path / "alone.ckpt"), str(tmp_path / "alone")])
    read = load_components(tmp_path / "alone").unet
    assert torch.equal(read.conv_out.bias, averaged["networks.Pororo.conv_out.bias"])
    assert json.loads((tmp_path / "alone/characters.json").read_text())["characters"] == {"Pororo": "unet"}
