"""Models as folders and as single files: round trips, what diffusers makes of them, and what is refused."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.storyweaver import single_file
from mmtrain.storyweaver.pipeline import Components, load_components, save_pipeline
from mmtrain.storyweaver.tokenizer import CLIP_SIZE, clip_tokenizer, read_tokenizer, small_tokenizer
from tests.storyweaver.tiny import TEXTS, equal, tiny_components, tiny_pipeline


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for a network fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for a network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def same(a: Components, b: Components) -> bool:
    parts = all(equal(getattr(a, part), getattr(b, part)) for part in ("unet", "vae", "text_encoder"))
    return parts and a.tokenizer.get_vocab() == b.tokenizer.get_vocab() and a.objective == b.objective


@pytest.mark.parametrize("vae", ["AutoencoderKL", "PatchAutoencoder"])
def test_a_folder_round_trip_and_diffusers_opens_it(tmp_path: Path, vae: str) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    made = tiny_pipeline(tmp_path / "model", vae=vae, objective="v")
    read = load_components(tmp_path / "model")
    assert same(made, read) and read.factor == 2 and read.text_width == 32
    assert not (read.unet.training or read.vae.training or read.text_encoder.training)
    ids = read.tokenizer(["a fox"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(read.text_encoder(ids).pooler_output, made.text_encoder(ids).pooler_output)

    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "model"), local_files_only=True)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.vae).__name__ == vae and pipe.safety_checker is None
    assert equal(pipe.unet, made.unet) and equal(pipe.text_encoder, made.text_encoder)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a fox", height=16, width=32, num_inference_steps=2, output_type="np").images
    assert picture.shape == (1, 16, 32, 3)

    save_pipeline(read, tmp_path / "model")  # over itself
    assert same(made, load_components(tmp_path / "model")) and not (tmp_path / "model" / ".part").exists()
    assert str(tmp_path) not in (tmp_path / "model/unet/config.json").read_text()
    names = load_file(tmp_path / "model/text_encoder/model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # what transformers 4 needs


def test_layouts_of_released_folders(tmp_path: Path) -> None:
    """Half-precision variants, .bin files, parts listed in an index, names of old and of new libraries."""
    made, folder = tiny_pipeline(tmp_path / "model"), tmp_path / "model"
    (folder / "model_index.json").unlink()
    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    state = load_file(unet)
    unet.unlink()
    save_file({k: v.half() for k, v in state.items()}, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(vae).items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = value
    vae.unlink()
    torch.save(renamed, folder / "vae/diffusion_pytorch_model.bin")
    text = folder / "text_encoder/model.safetensors"
    state = {name.removeprefix("text_model."): value for name, value in load_file(text).items()}
    text.unlink()
    torch.save(state | {"embeddings.position_ids": torch.arange(77)[None]}, folder / "text_encoder/pytorch_model.bin")
    for file in ("tokenizer.json",):  # as in every folder of 2022
        (folder / "tokenizer" / file).unlink()
    read = load_components(folder)
    assert equal(read.vae, made.vae) and equal(read.text_encoder, made.text_encoder)
    assert {p.dtype for p in read.unet.parameters()} == {torch.float32}
    torch.testing.assert_close(read.unet.conv_in.weight, made.unet.conv_in.weight, atol=1e-3, rtol=1e-3)
    assert {p.dtype for p in load_components(folder, dtype="bfloat16").unet.parameters()} == {torch.bfloat16}
    assert read.tokenizer("a red fox").input_ids == made.tokenizer("a red fox").input_ids

    names = list(made.unet.state_dict())
    index = {"weight_map": {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}}
    for i in range(2):
        save_file({n: made.unet.state_dict()[n] for n in names[i::2]}, folder / f"unet/part-{i}.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(load_components(folder).unet, made.unet)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("touched",)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline(tmp_path / "model")

    def changed(part: str, **values: object) -> Path:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "model", folder)
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    wider = tiny_components(width=48)
    cases = [
        ("scheduler", {"beta_end": 0.02}, "pipeline: .*scheduler_config.json: beta_end is 0.02, expected .* 0.012"),
        ("scheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type is 'sample', expected one of epsilon"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("unet", {"_class_name": "UNet2DModel"}, "_class_name is UNet2DModel, expected UNet2DConditionModel"),
        ("unet", {"block_out_channels": [32, 32]}, "safetensors: does not fit this network: .*other shapes"),
        ("unet", {"down_block_types": ["Nonsense", "DownBlock2D"]}, "unet: configuration or names .* wrong"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny, expected AutoencoderKL or PatchAutoencoder"),
        ("text_encoder", {"model_type": "t5"}, "model_type t5, expected CLIP's"),
        ("text_encoder", {"eos_token_id": 7}, "eos_token_id is 7, but the tokenizer's end token is 549"),
    ]
    for part, values, message in cases:
        with pytest.raises(UserError, match=message):
            load_components(changed(part, **values))
    folder = changed("unet")
    save_pipeline(Components(wider.unet, *(getattr(wider, p) for p in ("vae", "text_encoder", "tokenizer"))), folder)
    shutil.copytree(tmp_path / "model/text_encoder", folder / "text_encoder", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"unet.cross_attention_dim is 48, but text_encoder.hidden_size is 32"):
        load_components(folder)
    (folder / "text_encoder/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"text_encoder: has no weights, expected model.safetensors or pytorch_model"):
        load_components(folder)
    torch.save({"a": Evil()}, folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: refused, it holds posix"):
        load_components(folder)
    torch.save({"state_dict": {}, "callbacks": Evil()}, tmp_path / "sd.ckpt")
    with pytest.raises(UserError, match=r"sd.ckpt: refused, it holds posix"):
        load_components(tmp_path / "sd.ckpt")
    assert not (tmp_path / "touched").exists()

    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match=r"start: .*changed: has no folder vae, expected unet, vae"):
        load_components(folder, "start")
    (tmp_path / "release").mkdir()
    shutil.copytree(tmp_path / "model", tmp_path / "release/pipeline")
    with pytest.raises(UserError, match=r"did you mean .*release/pipeline"):
        load_components(tmp_path / "release")
    with pytest.raises(UserError, match="runwayml/stable-diffusion-v1-5: no such folder or file"):
        load_components("runwayml/stable-diffusion-v1-5")
    with pytest.raises(UserError, match="dtype: 'float8', expected one of"):
        load_components(tmp_path / "model", dtype="float8")


def test_tokenizers(tmp_path: Path) -> None:
    clip = clip_tokenizer(tmp_path / "clip", model_max_length=8)  # its ids are compared in test_spans.py
    assert (len(clip), clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (CLIP_SIZE, 49406, 49407, 49407)
    assert clip("A Dog", padding="max_length").input_ids == [49406, 320, 1929, *[49407] * 5]

    small, again = small_tokenizer(TEXTS, tmp_path / "small", 550, 30), small_tokenizer(TEXTS, None, 550, 30)
    assert small.get_vocab() == again.get_vocab() and len(small) == 550 and small.model_max_length == 30
    assert small.eos_token_id == small.pad_token_id == 549 and small.bos_token_id == 548
    assert small("A Red FOX").input_ids == small("a red fox").input_ids
    assert sorted(small.get_vocab().values()) == list(range(550))
    text = "wörter, die es nie sah 日本"
    assert small.decode(small(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert read_tokenizer(tmp_path / "small").get_vocab() == small.get_vocab()
    for attempt, message in (
        (lambda: small_tokenizer(TEXTS, None, 100), "tokenizer size: 100, .* 514"),
        (lambda: read_tokenizer(tmp_path / "none"), "none: no such folder"),
        (lambda: read_tokenizer(tmp_path), "neither vocab.json with merges.txt nor tokenizer.json"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def ldm_state(made: Components) -> dict[str, Tensor]:
    """The weights under the names of latent diffusion: diffusers' rules the other way round."""
    state = {}
    for name, value in made.unet.state_dict().items():
        state["model.diffusion_model." + _ldm_unet(name)] = value
    for name, value in made.vae.state_dict().items():
        for pattern, new in LDM_VAE:
            name = re.sub(pattern, new, name)
        name = re.sub(r"\.up\.(\d)\.", lambda m: f".up.{1 - int(m[1])}.", name)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        state["first_stage_model." + name] = value[:, :, None, None] if is_projection else value
    for name, value in made.text_encoder.state_dict().items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {name: value.clone().contiguous() for name, value in state.items()}


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"} | {
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"} | {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LDM_VAE = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def _ldm_unet(name: str) -> str:
    """For two levels of one layer, attention in the first."""
    for old, new in ENDS.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    blocks = {
        "down_blocks.0.resnets.0.": "input_blocks.1.0.",
        "down_blocks.0.attentions.0.": "input_blocks.1.1.",
        "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
        "down_blocks.1.resnets.0.": "input_blocks.3.0.",
        "mid_block.resnets.0.": "middle_block.0.",
        "mid_block.attentions.0.": "middle_block.1.",
        "mid_block.resnets.1.": "middle_block.2.",
        "up_blocks.0.resnets.0.": "output_blocks.0.0.",
        "up_blocks.0.resnets.1.": "output_blocks.1.0.",
        "up_blocks.0.upsamplers.0.conv.": "output_blocks.1.1.conv.",
        "up_blocks.1.resnets.0.": "output_blocks.2.0.",
        "up_blocks.1.resnets.1.": "output_blocks.3.0.",
        "up_blocks.1.attentions.0.": "output_blocks.2.1.",
        "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    }
    old, new = next((old, new) for old, new in blocks.items() if name.startswith(old))
    rest = name.removeprefix(old)
    if ".resnets." in old:
        first, _, kind = rest.partition(".")
        rest = f"{RESNET[first]}.{kind}"
    return new + rest


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_single_files(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    made, path = tiny_components(), tmp_path / f"sd.{kind}"
    made.tokenizer.save_pretrained(tmp_path / "words")
    state = ldm_state(made)
    save_file(state, path) if kind == "safetensors" else torch.save({"state_dict": state, "global_step": 3}, path)
    options = {"heads": 2, "text_heads": 2, "tokenizer": tmp_path / "words"}
    read = load_components(path, **options)
    assert same(made, read) and read.vae.config.scaling_factor == 0.18215
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 7, 32)
    torch.testing.assert_close(read.unet(x, t, context).sample, made.unet(x, t, context).sample)
    picture = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(read.vae.encode(picture).latent_dist.mean, made.vae.encode(picture).latent_dist.mean)

    averaged = {"model_ema.diffusion_modelout2bias": torch.full((4,), 7.0), "scale_factor": torch.tensor(0.5)}
    save_file(state | averaged, tmp_path / "ema.safetensors")
    read = load_components(tmp_path / "ema.safetensors", **options)
    assert (read.unet.conv_out.bias == 7).all() and read.vae.config.scaling_factor == 0.5
    assert "averaged weights of the UNet (1 of" in capsys.readouterr().err
    with pytest.raises(UserError, match="has a vocabulary of 550, not CLIP's of 49408: name the folder"):
        load_components(path, **options | {"tokenizer": None})
    with pytest.raises(UserError, match="heads: 5 do not divide the 32 channels"):
        load_components(path, **options | {"heads": 5})
    for gone, message in (("first_stage_model.", "so no autoencoder"), ("cond_stage_model.", "so no text encoder")):
        save_file({k: v for k, v in state.items() if not k.startswith(gone)}, tmp_path / "cut.safetensors")
        with pytest.raises(UserError, match=message):
            load_components(tmp_path / "cut.safetensors", **options)
    part = {k: v for k, v in state.items() if "decoder.conv_in" not in k}
    save_file(part, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"names of such a model are missing .*decoder.conv_in.weight"):
        load_components(tmp_path / "cut.safetensors", **options)


def test_the_sizes_of_stable_diffusion_are_told_from_its_weights() -> None:
    """On the meta device; names by the map of another room, which was checked against the released Diff-Foley."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    from mmtrain.difffoley.layouts import autoencoder_names, to_released, unet_names

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict()
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **blocks).state_dict()
    released = to_released(unet, unet_names(unet), single_file.UNET)
    released |= to_released(vae, autoencoder_names(vae), single_file.VAE)
    sizes = single_file.unet_config(released, 8, 32)
    assert (sizes["block_out_channels"], sizes["layers_per_block"]) == ([320, 640, 1280, 1280], 2)
    assert sizes["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (sizes["cross_attention_dim"], sizes["use_linear_projection"]) == (768, False)
    assert shapes(convert_ldm_unet_checkpoint(released, sizes)) == shapes(unet) and len(unet) == 686
    sizes = single_file.vae_config(released, 32)
    assert (sizes["block_out_channels"], sizes["layers_per_block"]) == ([128, 256, 512, 512], 2)
    assert shapes(convert_ldm_vae_checkpoint(single_file.part(released, single_file.VAE), sizes)) == shapes(vae)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
