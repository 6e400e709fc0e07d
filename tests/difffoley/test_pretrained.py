"""Released layouts: every name and shape, both ways; Stable Diffusion as a start; files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmtrain.config_errors import UserError
from mmtrain.difffoley.alignment import AlignmentClassifier
from mmtrain.difffoley.autoencoder import Autoencoder
from mmtrain.difffoley.cavp import Cavp
from mmtrain.difffoley.checkpoints import class_path
from mmtrain.difffoley.features import load_cavp
from mmtrain.difffoley.first_stage import FirstStage, autoencoder_config, load_first_stage
from mmtrain.difffoley.module import LatentDiffusion
from mmtrain.difffoley.networks import AlignmentNetwork, FoleyUNet
from mmtrain.difffoley.pretrained import (
    export_alignment,
    export_first_stage,
    export_ldm,
    init_from_stable_diffusion,
    load_alignment_network,
    load_foley_unet,
    write_released,
)
from mmtrain.export import main as export_main
from tests.difffoley.filling import SMALL, manifest, small_classifier, small_unet

SCHEDULE = [name for name, shape in manifest("ldm").items() if shape == [1000]]


def vectors() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1000) for name in SCHEDULE}


def small_stage() -> FirstStage:
    return FirstStage(autoencoder_config((32, 64), 1), 0.5).eval()


def equal(a: torch.nn.Module, b: torch.nn.Module, but: str = "-") -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a if but not in key)


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in state.items()}


def test_every_name_and_shape_of_the_released_models() -> None:
    with torch.device("meta"):
        unet, classifier, stage, schedule = FoleyUNet(), AlignmentNetwork(), FirstStage(), vectors()
    assert shapes(export_ldm(unet, stage, schedule)) == manifest("ldm")
    assert len(manifest("ldm")) == 949
    for name, has_first_stage in (("double_guidance_classifier", False), ("eval_classifier", True)):
        assert shapes(export_alignment(classifier, stage, schedule, has_first_stage)) == manifest(name)


def test_round_trip_of_a_diffusion_model(tmp_path: Path) -> None:
    network, stage, other = small_unet(), small_stage(), small_unet()
    write_released(export_ldm(network, stage, vectors()), tmp_path / "ldm.ckpt")
    load_foley_unet(other, tmp_path / "ldm.ckpt")
    assert equal(network, other, but="null_token")
    read = load_first_stage(tmp_path / "ldm.ckpt")
    assert equal(stage.autoencoder, read.autoencoder) and not read.training
    assert read.scale_factor.item() == pytest.approx(0.18215)  # theirs does not hold it


@pytest.mark.parametrize("has_first_stage", [False, True])
def test_round_trip_of_a_classifier(tmp_path: Path, has_first_stage: bool) -> None:
    network, stage, other = small_classifier(), small_stage(), small_classifier()
    write_released(export_alignment(network, stage, vectors(), has_first_stage), tmp_path / "c.ckpt")
    load_alignment_network(other, tmp_path / "c.ckpt")
    assert equal(network, other)
    if has_first_stage:
        assert equal(load_first_stage(tmp_path / "c.ckpt"), stage)
    else:
        with pytest.raises(UserError, match="holds no autoencoder"):
            load_first_stage(tmp_path / "c.ckpt")


def checkpoint_of(module: torch.nn.Module, path: Path) -> str:
    """A file as a training leaves it, with an average that is apart from the raw weights."""
    state = module.state_dict()
    averaged = {name: value + 1 for name, value in state.items() if name.startswith("network.") and value.ndim}
    content = {"state_dict": state, "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2"}
    torch.save(content | {"model_class": class_path(type(module)), "ema": averaged}, path)
    return str(path)


def test_our_checkpoints_are_exported_averaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stage = autoencoder_config((32, 64), 1)
    plain = dict(network=SMALL, first_stage=stage)
    out = tmp_path / "released.ckpt"

    diffusion = LatentDiffusion(**plain, sampler={"steps": 2})
    assert export_main([checkpoint_of(diffusion, tmp_path / "ldm.ckpt"), str(out)]) == 0
    network = small_unet()
    load_foley_unet(network, out)
    own = diffusion.network.unet.state_dict()
    assert all(torch.equal(value, own[name] + 1) for name, value in network.unet.state_dict().items())
    assert equal(load_first_stage(out).autoencoder, diffusion.first_stage.autoencoder)
    assert "LatentDiffusion" in capsys.readouterr().out

    for noisy in (True, False):
        classifier = AlignmentClassifier(**plain, noisy=noisy)
        export_main([checkpoint_of(classifier, tmp_path / "align.ckpt"), str(out)])
        network = small_classifier()
        load_alignment_network(network, out)
        assert torch.equal(network.classifier.bias, classifier.network.classifier.bias + 1)
        assert ("first_stage_model.quant_conv.bias" in torch.load(out)["state_dict"]) == (not noisy)

    cavp = Cavp(width=4, audio_width=4, feature_dim=16)
    export_main([checkpoint_of(cavp, tmp_path / "cavp.ckpt"), str(out)])
    assert torch.equal(load_cavp(str(out))[0].video_project_head.bias, cavp.network.video_project_head.bias + 1)

    framed = LatentDiffusion(network=SMALL | {"condition_channels": 4}, first_stage=stage)
    flow = LatentDiffusion(**plain, objective="flow", sampler={"name": "euler"})
    thin = LatentDiffusion(network=SMALL, first_stage=autoencoder_config((32, 64), 1, in_channels=1))
    for module, message in (
        (framed, "own.ckpt: network.condition_channels must be 0"),
        (flow, "own.ckpt: was trained with objective flow"),
        (thin, "own.ckpt: the first stage has 1 input"),
        (Autoencoder((32, 32), 1), "own.ckpt: is of Autoencoder, which was not released"),
    ):
        with pytest.raises(UserError, match=message):
            export_main([checkpoint_of(module, tmp_path / "own.ckpt"), str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=r"--architecture: is for CLIP models, .* is one of Diff-Foley"):
        export_main([str(tmp_path / "ldm.ckpt"), str(out), "--architecture", "RN50"])


def stable_diffusion_folder(folder: Path, network: FoleyUNet, stage: FirstStage, old: bool = False) -> Path:
    for part, module in (("unet", network.unet), ("vae", stage.autoencoder)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps({"scaling_factor": 0.25}))
        state = {key: value.clone() for key, value in module.state_dict().items()}
        if old and part == "vae":
            names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
            for new, before in names.items():
                state = {key.replace(f".{new}.", f".{before}."): value for key, value in state.items()}
        save_file(state, folder / part / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["folder", "unet folder", "single file", "safetensors"])
def test_start_from_stable_diffusion(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture) -> None:
    source, network = small_unet(), small_unet()
    path = tmp_path / ("sd.safetensors" if layout == "safetensors" else "sd")
    if "folder" in layout:
        path = stable_diffusion_folder(path, source, small_stage()) / ("unet" if layout == "unet folder" else "")
    else:
        state = export_ldm(source, small_stage(), vectors())
        state = {key: value.contiguous() for key, value in state.items() if not key.startswith("cond_stage_model.")}
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.zeros(1, 77)
        save_file(state, path) if layout == "safetensors" else torch.save({"state_dict": state}, path)
    fresh = init_from_stable_diffusion(network, path)
    assert equal(source.unet, network.unet) and not equal(source.embedder, network.embedder)
    assert fresh == ["null_token", "embedder.embedder.0.weight", "embedder.embedder.0.bias", "embedder.pos_emb.weight"]
    wider = FoleyUNet(**SMALL, condition_channels=6).eval()
    assert "frame_condition.projection.weight" in init_from_stable_diffusion(wider, path)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    torch.testing.assert_close(wider(x, 5, context), source(x, 5, context))  # it begins as the network without them


@pytest.mark.parametrize("old", [False, True])
def test_first_stage_of_a_diffusers_folder(tmp_path: Path, old: bool) -> None:
    stage = small_stage()
    folder = stable_diffusion_folder(tmp_path / "sd", small_unet(), stage, old)
    for path in (folder, folder / "vae"):
        read = load_first_stage(path)
        assert equal(stage.autoencoder, read.autoencoder) and read.scale_factor == 0.25


def test_first_stage_of_a_bare_autoencoder_and_of_ours(tmp_path: Path) -> None:
    stage = small_stage()
    bare = {k.removeprefix("first_stage_model."): v for k, v in export_first_stage(stage).items()}
    torch.save({"state_dict": bare | {"loss.logvar": torch.zeros(())}}, tmp_path / "kl.ckpt")
    assert equal(load_first_stage(tmp_path / "kl.ckpt").autoencoder, stage.autoencoder)
    ours = {f"first_stage.{key}": value for key, value in stage.state_dict().items()}
    torch.save({"state_dict": ours | {f"guidance.{k}": v for k, v in ours.items()}}, tmp_path / "last.ckpt")
    read = load_first_stage(tmp_path / "last.ckpt")
    assert equal(read, stage) and read.fingerprint() == stage.fingerprint()
    with torch.no_grad():
        stage.scale_factor += 0.1
    assert read.fingerprint() != stage.fingerprint()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    unet, classifier, stage = small_unet(), small_classifier(), small_stage()
    ldm, guide = tmp_path / "ldm.ckpt", tmp_path / "guide.ckpt"
    write_released(export_ldm(unet, stage, vectors()), ldm)
    write_released(export_alignment(classifier, stage, vectors(), False), guide)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"callbacks": Path("x"), "state_dict": {}}, tmp_path / "code.ckpt")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "cut.ckpt").write_bytes(ldm.read_bytes()[:5000])
    (tmp_path / "folder").mkdir()
    larger = FoleyUNet(**SMALL | {"block_out_channels": (32, 96)})
    framed = FoleyUNet(**SMALL, condition_channels=4)
    cases = [
        (lambda: load_foley_unet(unet, tmp_path / "none.ckpt"), "none.ckpt: no such file"),
        (lambda: load_foley_unet(unet, guide), "guide.ckpt: is no checkpoint of Diff-Foley's diffusion model"),
        (lambda: load_foley_unet(larger, ldm), r"ldm.ckpt: does not fit this network: .*other shapes \("),
        (lambda: load_foley_unet(framed, ldm), "ldm.ckpt: network.condition_channels must be 0"),
        (lambda: load_foley_unet(FoleyUNet(**SMALL, feature_scale=2.0), ldm), "feature_scale must be 1"),
        (lambda: load_alignment_network(classifier, ldm), "ldm.ckpt: is no checkpoint of a released alignment"),
        (lambda: load_foley_unet(unet, tmp_path / "tensor.pt"), "tensor.pt: holds a Tensor"),
        (lambda: load_foley_unet(unet, tmp_path / "code.ckpt"), "code.ckpt: refused, it holds pathlib"),
        (lambda: load_first_stage(tmp_path / "bad.safetensors"), "bad.safetensors: damaged"),
        (lambda: load_first_stage(tmp_path / "cut.ckpt"), "cut.ckpt: damaged"),
        (lambda: load_first_stage(tmp_path / "folder"), "no config.json there, nor in a folder vae"),
        (lambda: init_from_stable_diffusion(larger, ldm), "stable_diffusion: .*ldm.ckpt: does not fit"),
        (lambda: export_ldm(framed, stage, vectors()), "condition_channels must be 0"),
        (lambda: stage.encode(torch.zeros(1, 16, 31)), "window_mel_frames: a mel of 16 bins and 31 frames"),
        (lambda: autoencoder_config((32, 40)), r"channels: \[40\] are no multiples of 32"),
    ]
    for attempt, message in cases:
        with pytest.raises(UserError, match=message):
            attempt()
