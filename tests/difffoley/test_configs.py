"""Every config of Diff-Foley is instantiated: released sizes and settings, stages that fit each other, layers."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import cli as lightning_cli
from torch import nn

from mmtrain.config_errors import UserError
from mmtrain.difffoley.autoencoder import Autoencoder
from mmtrain.difffoley.cavp import Cavp
from mmtrain.difffoley.evaluate import FoleyEvaluation
from mmtrain.difffoley.reproduce import OWN, PLAN, RANDOM
from mmtrain.difffoley.specvqgan_training import SpecVqganCodebook
from mmtrain.listing import configs_dir
from mmtrain.plans import jobs
from mmtrain.video_audio import ClipFormat
from tests.difffoley.stand_ins import lay_out, merged, model_settings, save
from tests.test_configs import NAMES

FOLEY = [name for name in NAMES if name.startswith("difffoley_")]
SMALL = [name for name in FOLEY if name.endswith("_impacts")]
FULL = [name for name in FOLEY if name not in SMALL]
PARTS = {
    "cavp": ("Cavp", "ContrastiveDataModule"),
    "vae": ("Autoencoder", "LatentDataModule"),
    "ldm": ("LatentDiffusion", "LatentDataModule"),
    "ldm_flow": ("LatentDiffusion", "LatentDataModule"),
    "align_guidance": ("AlignmentClassifier", "AlignmentDataModule"),
    "align_metric": ("AlignmentClassifier", "AlignmentDataModule"),
    "sounds": ("SoundClassifier", "SoundClassDataModule"),
}
FRESH = ("--vars.stable_diffusion", "null")  # its sizes, without its file of 4 GB
NARROW = {"width": 32, "multipliers": (1, 1, 1, 1, 1), "blocks": 1, "code_width": 8}  # with as many codes as released
PAPER_CAVP = {"width": 8, "audio_width": 8, "feature_dim": 512}
Made = tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]


def part_of(name: str) -> str:
    return name.removeprefix("difffoley_").removesuffix("_impacts")


def checkpoint_of(run: str) -> str:
    return f"runs/{run}/checkpoints/last.ckpt"


def count(module: nn.Module, trainable: bool = True) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What has to exist for a config to be instantiated, at the places that the configs themselves name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    for run, sizes in (("difffoley_cavp", PAPER_CAVP), ("difffoley_cavp_impacts", {})):
        save(Cavp(**(model_settings(run) | sizes)), folder / checkpoint_of(run))
    save(Autoencoder(**model_settings("difffoley_vae_impacts")), folder / checkpoint_of("difffoley_vae_impacts"))
    save(SpecVqganCodebook(network=NARROW, gan_weight=0.0), folder / checkpoint_of("specvqgan_codebook"))
    return folder


@pytest.fixture
def made(instantiate, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Returns a function: config, further words -> (trainer, model, data); models of full size have no memory."""
    construct = lightning_cli._InstantiatorFn.__call__  # of models and data modules

    @functools.wraps(construct)  # its signature is looked at
    def without_memory(self: lightning_cli._InstantiatorFn, kind: type, *args: Any, **kwargs: Any) -> Any:
        full = self.key == "model" and self.cli.layer.data["vars"]["scale"] == "full"
        with torch.device("meta") if full else nullcontext():
            return construct(self, kind, *args, **kwargs)

    monkeypatch.setattr(lightning_cli._InstantiatorFn, "__call__", without_memory)

    def run(name: str, *words: str) -> Made:
        lay_out(stand_ins, tmp_path, but=name)
        fresh = FRESH if "stable_diffusion" in merged(name)["vars"] else ()
        return instantiate("-c", name, *fresh, *words)

    return run


def test_there_is_a_config_for_every_stage() -> None:
    assert {part_of(name) for name in SMALL} == set(PARTS)
    assert {part_of(name) for name in FULL} == {"cavp", "ldm", "align_guidance", "align_metric"}


@pytest.mark.parametrize("name", FOLEY)
def test_every_config_is_instantiated(made, name: str) -> None:
    trainer, model, data = made(name)
    assert (type(model).__name__, type(data).__name__) == PARTS[part_of(name)]
    assert trainer.default_root_dir.endswith(f"runs/{name}") and model.paper == "difffoley"
    text = (configs_dir() / f"{name}.yaml").read_text()
    assert f"# python -m mmtrain fit -c configs/{name}.yaml" in text
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    assert {"RandomState", "NonFiniteGuard", "ResumeGuard", "LastCheckpoint", "Results"} <= set(callbacks)
    small = name in SMALL
    assert next(model.parameters()).is_meta != small
    assert callbacks["Results"].scale == ("laptop" if small else "full")
    assert callbacks["Results"].train_data == ("simulated impacts" if small else "VGGSound")
    assert data.name == ("impacts" if small else "vggsound") and (data.maker is not None) == small
    assert getattr(model, "format", data.format) == data.format
    if small:
        assert data.format.frames == ClipFormat().frames, "as many as in the paper, in half the time"
        assert data.maker.format.fps == data.format.fps and data.maker.format.frame_size == data.format.frame_size
    else:
        assert data.format == ClipFormat(), "the paper's"


# --- the sizes and settings of the release ---


def test_cavp_is_the_released_one(made) -> None:
    trainer, model, data = made("difffoley_cavp")
    assert count(model) == 113_406_593 and model.intra_weight == 1.0
    optim = model.optim
    assert (optim.lr, tuple(optim.betas), optim.weight_decay, optim.decay) == (8e-4, (0.9, 0.999), 0.2, "matrices")
    assert (optim.schedule, optim.warmup_steps, optim.eps) == ("cosine", 200, 1e-8)
    assert data.batch_size == 240 and data.clips == 3 and trainer.max_epochs == 300
    assert trainer.precision == "bf16-mixed" and trainer.check_val_every_n_epoch == 2
    (kept,) = [c for c in trainer.callbacks if type(c).__name__ == "ModelCheckpoint"]
    assert (kept._every_n_epochs, kept.save_top_k) == (3, -1)


def test_latent_diffusion_is_the_released_one(made) -> None:
    trainer, model, data = made("difffoley_ldm")
    network = model.network
    assert count(network.unet) == 859_520_964 and count(network.embedder) == 424_704
    assert network.unet.is_gradient_checkpointing and network.unet.config.in_channels == 4
    assert count(model.first_stage) == 0 and count(model.first_stage, trainable=False) == 83_653_863
    assert count(model) == 859_520_964 + 424_704 + 768, "and a null token, which is ours"
    assert (model.objective, model.null_condition, model.condition_dropout) == ("eps", "learned", 0.2)
    optim = model.optim
    assert (optim.lr, tuple(optim.betas), optim.weight_decay, optim.decay) == (1e-4, (0.9, 0.999), 0.01, "all")
    assert (optim.schedule, optim.warmup_steps) == ("constant", 1000)
    assert (model.guidance.scale, model.guidance.classifier_scale) == (4.5, 0.0)
    assert (model.sampler.name, model.sampler.steps) == ("dpm_solver", 25)
    assert (model.method, model.test_settings.spec_conversion) == ("Diff-Foley (CFG)", "official")
    assert model.test_settings.feature_network is None and model.test_settings.alignment_classifier is None
    assert data.batch_size == 8 * 220 and data.window_options["split_merge"] == 0.5
    assert (trainer.max_epochs, trainer.precision) == (250, "32-true") and trainer.gradient_clip_val is None
    assert not any(type(callback).__name__ == "TrainableEma" for callback in trainer.callbacks), "none in the release"
    assert model.cavp == checkpoint_of("difffoley_cavp") and data.features.width == 512


@pytest.mark.parametrize("use", ["guidance", "metric"])
def test_alignment_classifiers_are_the_released_ones(made, use: str) -> None:
    _, model, data = made(f"difffoley_align_{use}")
    embedder = count(model.network.embedder)
    assert count(model.network) - embedder == 11_450_753 and embedder == 512 * 512 + 512 + 40 * 512
    assert count(model) == 11_450_753 + embedder and model.noisy == (use == "guidance")
    assert (model.optim.lr, model.optim.weight_decay, model.optim.decay) == (5e-5, 0.01, "all")
    assert model.optim.schedule == "constant"
    assert data.proportions == [0.5, 0.25, 0.25] and data.window_options["min_shift_seconds"] == 0.5


def test_first_stage_and_starting_weights_are_stable_diffusion_s(made, tmp_path: Path, monkeypatch) -> None:
    for name in set(FULL) - {"difffoley_cavp"}:
        assert model_settings(name)["first_stage"] == "weights/stable-diffusion-v1-4"
    assert model_settings("difffoley_ldm")["stable_diffusion"] == "weights/stable-diffusion-v1-4"
    assert "stable_diffusion" not in model_settings("difffoley_align_guidance"), "its classifiers start from nothing"
    monkeypatch.setenv("MMTRAIN_TRACEBACK", "1")  # lets the error out
    with pytest.raises(UserError, match=r"elsewhere: no such file"):
        made("difffoley_align_metric", "--vars.stable_diffusion", str(tmp_path / "elsewhere"))


# --- the small ones fit each other ---


def test_stages_on_impacts_fit_each_other(made, tmp_path: Path) -> None:
    """Every checkpoint that the diffusion model takes is found where the configs put it, and passes the checks."""
    settings = model_settings("difffoley_ldm_impacts", "double_guidance_impacts")
    named = {settings[key] for key in ("first_stage", "cavp", "guidance_classifier")}
    named |= {settings["test"][key] for key in ("alignment_classifier", "feature_network")}
    runs = ("vae", "cavp", "align_metric", "sounds", "align_guidance")
    assert named == {checkpoint_of(f"difffoley_{run}_impacts") for run in runs}
    for run in ("align_guidance", "align_metric", "sounds"):
        name = f"difffoley_{run}_impacts"
        _, model, data = made(name)
        if run != "sounds":
            assert model.network.embedder.embedder[0].in_features == data.features.width
            model.features_from = data.hparams["features"]
        else:
            assert model.num_classes == len(data.maker.class_names)
        save(model, tmp_path / checkpoint_of(name))
    _, model, data = made("difffoley_ldm_impacts", "-c", "double_guidance_impacts")
    model.features_from = data.hparams["features"]
    assert model.network.embedder.embedder[0].in_features == data.features.width == model.cavp_features().width
    assert model.guide is not None and model.method == "Diff-Foley (double guidance)"
    evaluation = FoleyEvaluation(model.test_settings, model.format, model.first_stage)
    assert evaluation.classifier is not None and evaluation.feature_network is not None
    batch = {
        "mel": torch.rand(1, 128, model.format.window_mel_frames),
        "features": torch.rand(1, 32, data.features.width),
    }
    latent = model.first_stage.encode(batch["mel"])
    assert latent.shape[1:] == model.latent_shape(batch["mel"]) == (4, 16, 32)
    predicted = model.network(latent, torch.tensor([5.0]), model.context(batch["features"]))
    assert predicted.shape == latent.shape


def test_the_first_stage_of_impacts_has_the_factor_of_the_paper_s(made) -> None:
    _, model, data = made("difffoley_vae_impacts")
    assert model.first_stage.factor == 8 and not data.with_features
    assert data.format.window_mel_frames % 8 == 0
    with torch.no_grad():
        loss, *_ = model.losses(torch.rand(2, 128, data.format.window_mel_frames), sampled=True)
    assert loss.isfinite()


def test_flow_differs_from_noise_prediction_in_objective_and_sampler_alone(made) -> None:
    noise, flow = (model_settings(f"difffoley_{name}_impacts") for name in ("ldm", "ldm_flow"))
    assert {key for key in noise if noise[key] != flow[key]} == {"objective", "sampler"}
    _, model, _ = made("difffoley_ldm_flow_impacts")
    assert (model.objective, model.sampler.name) == ("flow", "euler") and model.sampler.steps < 10
    for name in ("difffoley_ldm_impacts", "difffoley_ldm_flow_impacts"):
        names = [callback["class_path"] for callback in merged(name)["trainer"]["callbacks"]]
        assert "mmtrain.ema.TrainableEma" in names


def test_options_of_the_reproduction_reach_the_model(made) -> None:
    here = [
        *("--vars.cavp", checkpoint_of("difffoley_cavp_impacts")),
        *("--vars.first_stage", checkpoint_of("difffoley_vae_impacts")),
    ]
    todo = {job.method: job for job in jobs(PLAN, Path("out"), quick=True)}
    for name in (OWN, RANDOM):
        words = todo[name].command("test")
        _, model, data = made(words[2], *words[3:-2], *here, "--model.test.sampling_seed", "2")
        assert model.test_settings.sampling_seed == 2 and model.method == name
        assert data.maker.sizes() == {"train": 64, "val": 16, "test": 16} and str(data.path) == "out/impacts"


# --- layers ---


@pytest.mark.parametrize(
    ("run", "layer"),
    [
        ("difffoley_ldm", "double_guidance"),
        ("difffoley_ldm_impacts", "double_guidance_impacts"),
        ("difffoley_ldm_flow_impacts", "double_guidance_impacts"),
    ],
)
def test_a_layer_adds_the_classifier_s_guidance_and_nothing_else(made, run: str, layer: str) -> None:
    plain, double = model_settings(run), model_settings(run, layer)
    assert {key for key in double if double[key] != plain.get(key)} == {"guidance", "guidance_classifier"}
    assert double["guidance"]["scale"] == plain["guidance"]["scale"]
    text = (configs_dir() / f"{layer}.yaml").read_text()
    assert text.startswith("# Layer:") and f"-c configs/{layer}.yaml" in text
    _, model, _ = made(run, "-c", layer)
    scales = (model.guidance.scale, model.guidance.classifier_scale)
    assert scales == (double["guidance"]["scale"], double["guidance"]["classifier_scale"]) and scales[1] > 0
    assert scales == (4.5, 50.0) or run != "difffoley_ldm", "as released"
    assert "double guidance" in model.method
    suffix = "_impacts" if layer.endswith("_impacts") else ""
    assert model.guidance_classifier == checkpoint_of(f"difffoley_align_guidance{suffix}")


# --- the rival SpecVQGAN ---


def test_specvqgan_s_codebook_is_the_released_one(made) -> None:
    name = "specvqgan_codebook"
    trainer, model, data = made(name)
    assert f"fit -c configs/{name}.yaml" in (configs_dir() / f"{name}.yaml").read_text()
    assert model.frames == 848 and model.network.factor == 16 and not model.lent, "without LPAPS"
    quantizer = model.network.quantize
    assert tuple(quantizer.embedding.weight.shape) == (1024, 256)
    assert (quantizer.beta, quantizer.order) == (0.25, "released")
    weights = (model.gan_weight, model.gan_start, model.gan_limits, model.codebook_weight, model.perceptual_weight)
    assert weights == (0.8, 30_001, (1.0, 1.0), 1.0, 1.0)
    assert model.optim.lr == pytest.approx(4.5e-6 * 3 * 8) and tuple(model.optim.betas) == (0.5, 0.9)
    assert model.optim.weight_decay == 0 and data.batch_size == 3 * 8 and not data.with_features
    assert data.mel == "mel_specvqgan" and data.format == ClipFormat() and data.name == "vggsound"
    assert merged(name)["trainer"]["sync_batchnorm"] is True and trainer.max_epochs > 0


def test_specvqgan_s_transformer_is_the_released_one_but_for_its_features(made) -> None:
    name = "specvqgan_transformer"
    trainer, model, data = made(name)
    gpt = model.transformer
    assert (len(gpt.blocks), gpt.blocks[0].attn.heads, gpt.head.in_features, gpt.drop.p) == (24, 16, 1024, 0.1)
    assert gpt.sequence == 5 * 53 and gpt.tok_emb.num_embeddings == 1024 and model.frames == 848
    assert gpt.embedder.in_channels == data.features.width == 512
    assert gpt.feature_frames == round(data.format.frames * 848 / 862), "those of the 848 frames of a clip's 862"
    assert (model.top_k, model.temperature, model.condition) == (100, 1.0, "features")
    assert model.optim.lr == pytest.approx(5e-6 * 2 * 8) and tuple(model.optim.betas) == (0.9, 0.95)
    assert model.optim.weight_decay == 0.01 and data.batch_size == 2 * 8 and data.mel == "mel_specvqgan"
    (stopping,) = [c for c in trainer.callbacks if type(c).__name__ == "EarlyStopping"]
    assert (stopping.monitor, stopping.patience) == (f"val/{data.name}/loss", 2)
    assert f"fit -c configs/{name}.yaml" in (configs_dir() / f"{name}.yaml").read_text()
    assert merged(name)["vars"]["codebook"] == checkpoint_of("specvqgan_codebook")
