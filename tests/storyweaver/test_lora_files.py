"""LoRA in files of every spelling, in diffusers, and taken into the weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmtrain.config_errors import UserError
from mmtrain.storyweaver.adapters import LoraSettings, add_adapters
from mmtrain.storyweaver.lora_files import (
    FILE,
    Parts,
    adapter_state,
    add_lora,
    from_any,
    merge_into,
    module_names,
    read_lora,
    to_diffusers,
    to_kohya,
    to_mix_of_show,
    write_lora,
)
from mmtrain.storyweaver.pipeline import Components
from tests.storyweaver.tiny import tiny_components, tiny_pipeline


def networks(of: Components) -> dict[str, torch.nn.Module]:
    return {"unet": of.unet, "text_encoder": of.text_encoder}


def adapted(of: Components, alpha: float | None = None, seed: int = 1) -> Parts:
    """Adapters on both networks with updates that matter, and what they are."""
    torch.manual_seed(seed)
    add_adapters(networks(of), LoraSettings(rank=2, alpha=alpha))
    scale = 1.0 if alpha is None else alpha / 2
    with torch.no_grad():
        for network in networks(of).values():
            for name, parameter in network.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(0, 0.1)
    return {part: adapter_state(network.state_dict(), scale=scale) for part, network in networks(of).items()}


def features(of: Components) -> Tensor:
    return of.text_encoder(torch.arange(20).reshape(2, 10)).last_hidden_state


def drawn(of: Components) -> Tensor:
    torch.manual_seed(5)
    return of.unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), features(of)).sample


def equal(a: Parts, b: Parts) -> bool:
    return a.keys() == b.keys() and all(
        a[p].keys() == b[p].keys() and all(torch.equal(a[p][k], b[p][k]) for k in a[p]) for p in a
    )


@torch.no_grad()
def test_every_spelling_comes_back(tmp_path: Path) -> None:
    plain = tiny_components()
    known = module_names(networks(plain))
    base, parts = drawn(plain), adapted(trained := tiny_components(), alpha=6)
    assert len(parts["unet"]) == 2 * 4 * 8 and len(parts["text_encoder"]) == 2 * 4 * 2  # 4 blocks, 2 layers
    assert module_names(networks(trained)) == known
    spellings = {
        "diffusers": to_diffusers(parts),
        "kohya": to_kohya(parts),
        "mix of show": {"params": to_mix_of_show(parts) | {"new_concept_embedding": {}}},
        "peft": {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()},
        "diffusers, old": {
            k.replace(".to_out.0.lora.", ".processor.to_out_lora.").replace(".to_q.lora.", ".processor.to_q_lora."): v
            for k, v in to_diffusers(parts).items()
        },
    }
    for spelling, content in spellings.items():
        assert equal(from_any(content, known, spelling), parts), spelling
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight" in spellings["diffusers"]
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in spellings["kohya"]
    assert (
        "text_model.encoder.layers.0.self_attn.q_proj.lora_up.weight"
        in spellings["mix of show"]["params"]["text_encoder"]
    )

    # alpha: divided by the rank in kohya's files, a factor in Mix-of-Show's
    half = {name: value * 0.5 if name.endswith(".alpha") else value for name, value in to_kohya(parts).items()}
    name = next(name for name in parts["unet"] if name.endswith("lora_B.weight"))
    for content, alpha in ((half, 1.0), (to_mix_of_show(parts), 0.5)):
        torch.testing.assert_close(from_any(content, known, "half", alpha)["unet"][name], parts["unet"][name] / 2)

    torch.save({"params": to_mix_of_show(parts)}, tmp_path / "edlora.pth")
    assert equal(read_lora(tmp_path / "edlora.pth", networks(plain)), parts)
    again = read_lora(write_lora(tmp_path / "lora/Loopy.safetensors", parts), networks(plain))
    assert equal(again, parts)

    # the same picture from the adapters, from a file's adapters, and from merged weights
    expected = drawn(trained)
    assert (expected - base).abs().max() > 0.01
    for part, network in networks(loaded := tiny_components()).items():
        add_lora(network, again[part], "Loopy")
    torch.testing.assert_close(drawn(loaded), expected, atol=1e-5, rtol=0)
    for part, network in networks(plain).items():
        merge_into(network, again[part])
    torch.testing.assert_close(drawn(plain), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_diffusers_loads_what_is_written(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    tiny_pipeline(tmp_path / "base")
    parts = adapted(trained := tiny_components(), alpha=6)
    write_lora(tmp_path / FILE, parts)
    save_file(to_kohya(parts), tmp_path / "kohya.safetensors")
    for file in (FILE, "kohya.safetensors"):
        pipe = StableDiffusionPipeline.from_pretrained(str(tmp_path / "base"), local_files_only=True)
        pipe.load_lora_weights(str(tmp_path), weight_name=file, local_files_only=True)
        loaded = Components(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer)
        torch.testing.assert_close(drawn(loaded), drawn(trained), atol=1e-5, rtol=0)
    theirs = tmp_path / "theirs"  # and what they write
    unet = {k.replace(".default.", "."): v for k, v in pipe.unet.state_dict().items() if ".lora_" in k}
    unet = {k.replace(".default_0.", "."): v for k, v in unet.items()}
    StableDiffusionPipeline.save_lora_weights(str(theirs), unet_lora_layers=unet)
    assert equal(read_lora(theirs / FILE, networks(tiny_components())), {"unet": parts["unet"]})


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    plain = tiny_components()
    parts = adapted(tiny_components())
    known = module_names(networks(plain))
    name = next(iter(parts["unet"]))
    other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
    unet = {f"unet.{key}": value for key, value in parts["unet"].items()}
    cases = [
        ({k: v for k, v in unet.items() if k != f"unet.{other}"}, "unet.* has one half of an update only"),
        (unet | {f"unet.{other}": torch.zeros(5, 5)}, "ranks .* differ"),
        ({f"unet.typo.{key}": value for key, value in parts["unet"].items()}, "is of no module of unet, text_encoder"),
        ({k.replace("unet.", "text_encoder."): v for k, v in unet.items()}, "is of no module"),
        ({"conv_in.weight": torch.zeros(1)}, "x: conv_in.weight is no name of a LoRA"),
        ({}, "x: holds no LoRA"),
    ]
    for content, message in cases:
        with pytest.raises(UserError, match=message):
            from_any(content, known, "x")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad.safetensors: damaged"):
        read_lora(tmp_path / "bad.safetensors", networks(plain))
    narrow = {key: value[..., :8] if "lora_A" in key else value for key, value in parts["unet"].items()}
    with pytest.raises(UserError, match="has shape"):
        merge_into(plain.unet, narrow)
    with pytest.raises(UserError, match="nonsense is no module of the network"):
        merge_into(plain.unet, {"nonsense.lora_A.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="has shape"):
        add_lora(tiny_components().unet, narrow)
    with pytest.raises(UserError, match=r"updates of ranks \[\]"):
        add_lora(tiny_components().unet, {})
