"""Training steps against the released code, gradient caching, and the four methods through a real Trainer."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from datamodules.evaluation_sets import EvaluationSet
from datamodules.image_text import ImageTextDataModule
from datamodules.pictures import Pictures
from datamodules.synthetic import CLASSES, write_pairs
from mmtrain.checkpoint import AtomicCheckpointIO
from mmtrain.config_errors import UserError
from mmtrain.optim import AdamWSettings, parameter_groups
from mmtrain.rankclip.alip import Alip
from mmtrain.rankclip.cyclip import CyClip
from mmtrain.rankclip.losses import rankclip_objective, row_chunked_loss
from mmtrain.rankclip.module import Clip, ImageTextModule, LossSettings, Ramp, RankClip
from mmtrain.rankclip.networks import encode, encode_images, encode_texts
from tests.golden import load
from tests.golden.fill import array
from tests.rankclip.tiny import MANIFEST, build, filled_state

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4}
RN = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}


def network(vision: dict[str, Any]) -> CLIP:
    torch.manual_seed(0)
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, quick_gelu=True)


# ---------------------------------------------------------------------------------------- the released training step


@pytest.mark.parametrize("name", MANIFEST)
@pytest.mark.parametrize("chunk", [2, 5])
def test_four_steps_of_the_released_trainer(name: str, chunk: int) -> None:
    golden = {k.removeprefix(f"{name}/"): v for k, v in load("rankclip/model.npz").items()}
    wide = MANIFEST[name]["config"]["image_resolution"]
    pixels = torch.from_numpy(array(f"rankclip.model.pixels.{name}", (5, 3, wide, wide)))
    tokens = torch.from_numpy(golden["tokens"])
    model = build(name)
    model.load_state_dict(filled_state(name))
    model.train()
    nn.init.constant_(model.logit_scale, np.log(1 / 0.07))
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), 0.1, "by_name"), lr=5e-4)
    losses = []
    for step in range(4):
        features = tuple(F.normalize(f, dim=-1) for f in (model.encode_image(pixels), model.encode_text(tokens)))
        loss, parts = row_chunked_loss(rankclip_objective(2.0, eps=1e-10), features, model.logit_scale, chunk)
        losses.append([float(parts[k]) for k in ("loss", "contrastive")] + [float(parts["cross"] + parts["inmodal"])])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            parameters = dict(model.named_parameters())
            norms = [parameters[key].grad.norm() for key in MANIFEST[name]["parameter_order"]]
            np.testing.assert_allclose(norms, golden["train_step/grad_norms"], rtol=1e-3, atol=1e-6)
        optimizer.step()
        model.logit_scale.data.clamp_(0, 4.6052)
    np.testing.assert_allclose(losses[0], golden["train_step/losses"][0], rtol=1e-5)
    np.testing.assert_allclose(losses, golden["train_step/losses"], rtol=1e-2)
    assert model.logit_scale.item() == pytest.approx(float(golden["train_step/logit_scale_after"]), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- gradient caching


def in_float64(model: CLIP) -> CLIP:
    model.double().visual.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return model


def batch(rows: int, size: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (rows, 3, size, size), generator=generator, dtype=torch.uint8)
    texts = [torch.randint(1, 49408, (rows, 8), generator=generator) for _ in range(2)]
    return pictures, tuple(texts)


def plain_micro_batches(model: CLIP, pictures: Tensor, texts: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """What `encode` with micro-batches stands for, with all activations kept."""
    parts = zip(pictures.split(size), *(t.split(size) for t in texts), strict=True)
    rows = [(encode_images(model, p), *(encode_texts(model, t) for t in ts)) for p, *ts in parts]
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def gradients(model: CLIP, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of all parameters under RankCLIP's loss, with the loss itself as "loss"."""
    model.zero_grad()
    loss, _ = row_chunked_loss(rankclip_objective(2.0), features[:2], model.logit_scale, 3)
    (loss + features[-1][:, 0].sum()).backward()  # the last block of texts has a gradient too
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_cached_gradients_are_those_of_the_whole_batch(micro_batch: int) -> None:
    model, (pictures, texts) = in_float64(network(VIT)), batch(8, 16)
    rows_seen: list[int] = []
    model.visual.register_forward_hook(lambda _, args, out: rows_seen.append(len(out)))
    whole = gradients(model, encode(model, pictures, texts))
    assert rows_seen == [8]
    cached = gradients(model, encode(model, pictures, texts, micro_batch))
    torch.testing.assert_close(cached, whole, rtol=1e-10, atol=1e-13)
    if micro_batch < 8:
        once = {1: [1] * 8, 3: [3, 3, 2]}[micro_batch]
        assert sorted(rows_seen[1:]) == sorted(2 * once), "each micro-batch is run once more in the backward pass"
    with torch.no_grad():
        rows_seen.clear()
        encode(model, pictures, texts, micro_batch)
        assert rows_seen == [8], "nothing is cached where no gradient is wanted"


def test_cached_gradients_repeat_the_dropped_patches() -> None:
    model, (pictures, texts) = in_float64(network(VIT | {"patch_dropout": 0.5})), batch(7, 16)
    torch.manual_seed(3)
    expected = gradients(model, plain_micro_batches(model, pictures, texts, 3))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    cached = gradients(model, encode(model, pictures, texts, 3))
    torch.testing.assert_close(cached, expected, rtol=1e-10, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), state), "running again must not draw new numbers"
    torch.manual_seed(4)
    other = gradients(model, encode(model, pictures, texts, 3))
    assert not torch.equal(other["loss"], cached["loss"])


def test_cached_gradients_update_batch_statistics_once() -> None:
    (pictures, texts), models = batch(7, 32), [in_float64(network(RN)), in_float64(network(RN))]
    expected = gradients(models[0], plain_micro_batches(models[0], pictures, texts, 4))
    cached = gradients(models[1], encode(models[1], pictures, texts, 4))
    torch.testing.assert_close(cached, expected, rtol=1e-10, atol=1e-13)
    buffers = [dict(model.named_buffers()) for model in models]
    assert any("num_batches_tracked" in name for name in buffers[0])
    for name, value in buffers[0].items():
        assert torch.equal(value, buffers[1][name]), name
        if "num_batches_tracked" in name:
            assert value == 2
    norms = [m for m in models[1].modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.1}


# ------------------------------------------------------------------------------------------------ through the Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pairs(tmp_path_factory.mktemp("shards"), [10, 14], size=20)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("architecture") / "module_test_vit.json"
    path.write_text(json.dumps({"embed_dim": 16, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}))
    return str(path)


def data(shards: list[str], **options: Any) -> ImageTextDataModule:
    usual = {"batch_size": 8, "eval_batch_size": 7, "pictures": Pictures(size=16, context_length=8)}
    return ImageTextDataModule(shards, **(usual | options))


def trained(model: ImageTextModule, datamodule: ImageTextDataModule, folder: Path, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    limits = {} if datamodule.evaluate else {"limit_val_batches": 0}
    usual = {"max_steps": 3, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "default_root_dir": folder}
    plugins = {"plugins": [AtomicCheckpointIO()], "use_distributed_sampler": False}
    trainer = pl.Trainer(**(quiet | usual | limits | plugins | options))
    trainer.fit(model, datamodule)
    return trainer


OPTIM = AdamWSettings(lr=1e-3, warmup_steps=1)
COMMON = {"train/loss", "train/tau"}
LISTS = {f"train/{pair}_list_{side}" for pair in ("cross", "inmodal") for side in "ab"}
METHODS = {
    Clip: COMMON,
    CyClip: COMMON | {"train/contrastive", "train/inmodal", "train/cross"},
    RankClip: COMMON
    | LISTS
    | {"train/contrastive", "train/cross", "train/inmodal", "train/saturated", "train/ranking_weight"},
    Alip: COMMON
    | {"train/text", "train/caption", "train/sample_weight", "train/text_weight", "train/caption_weight"}
    | {f"train/momentum_{pair}" for pair in ("text_caption", "image_text", "image_caption")},
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_and_logs_its_parts(method, shards, architecture, tmp_path) -> None:
    pl.seed_everything(0)
    model = method(architecture=architecture, optim=OPTIM, micro_batch=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    extra = "json:captions" if method is Alip else None
    trainer = trained(model, data(shards, extra_captions=extra), tmp_path)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert trainer.global_step == 3 and set(values) == METHODS[method]
    assert all(np.isfinite(value) for value in values.values())
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, "every parameter is trained"
    parts = {Clip: (), Alip: ("text", "caption")}.get(method, ("contrastive", "cross", "inmodal"))
    if parts:
        assert sum(values[f"train/{part}"] for part in parts) == pytest.approx(values["train/loss"], rel=1e-5)
    if method is RankClip:
        assert values["train/ranking_weight"] == 2.0  # after 2 of 3 steps: min(2, 3 * 2 / 3)
        assert all(0.5 < values[name] < 1.5 for name in LISTS), "shares of ln(N!), 1 without any order"
    if method is Clip:
        assert abs(values["train/loss"] - np.log(8)) < 1.0
    assert values["train/tau"] == pytest.approx(1 / 0.07, rel=0.02)


def test_alip_without_second_captions_says_so(shards, architecture, tmp_path) -> None:
    with pytest.raises(UserError, match=r"ALIP needs a second text .*data\.init_args\.extra_captions"):
        trained(Alip(architecture=architecture, optim=OPTIM), data(shards), tmp_path)


def test_alip_keeps_its_momenta_in_the_checkpoint(shards, architecture, tmp_path) -> None:
    model = Alip(architecture=architecture, momentum=0.5, optim=OPTIM)
    trainer = trained(model, data(shards, extra_captions="json:caption"), tmp_path)
    assert (model.momenta[1:] < 0.9).all()  # the first is between two texts, here the same
    trainer.save_checkpoint(tmp_path / "alip.ckpt")
    again = Alip(architecture=architecture, momentum=0.5, optim=OPTIM)
    assert torch.equal(again.momenta, torch.ones(3))
    again.load_state_dict(torch.load(tmp_path / "alip.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(again.momenta, model.momenta)


@pytest.mark.parametrize(("start", "expected"), [(9.0, 4.6052), (-1.0, 0.0)])
def test_logit_scale_is_clamped_after_each_step(start, expected, shards, architecture, tmp_path) -> None:
    model = Clip(architecture=architecture, optim=AdamWSettings(lr=1e-3, warmup_steps=1))
    nn.init.constant_(model.network.logit_scale, start)
    trained(model, data(shards), tmp_path, max_steps=1)
    assert model.network.logit_scale.item() == pytest.approx(expected, abs=1e-6)
    own_limit = Clip(architecture=architecture, optim=OPTIM, loss=LossSettings(max_logit_scale=2.0))
    trained(own_limit, data(shards), tmp_path, max_steps=1)
    assert own_limit.network.logit_scale.item() == 2.0


def test_ranking_weight_grows_over_the_epochs_as_published(architecture) -> None:
    class Run(SimpleNamespace):
        """A namespace that can be referred to weakly, as Lightning does."""

    model, golden = RankClip(architecture=architecture), load("rankclip/metrics.npz")["schedule/rank_weight_64_epochs"]
    weights = []
    for epoch in range(64):
        model.trainer = run = Run(max_steps=-1, max_epochs=64, current_epoch=epoch, global_step=0)
        weights.append(model.ranking_weight)
    np.testing.assert_allclose(weights, golden, rtol=1e-12)
    run.max_epochs, run.current_epoch = 1, 0
    assert model.ranking_weight == 0  # a single epoch, where the released code divides by zero
    model.ramp = Ramp(low=0.5, high=0.5)
    assert model.ranking_weight == 0.5
    with pytest.raises(UserError, match="must not be negative"):
        RankClip(architecture=architecture, cross=-1.0)


def labelled(shards: list[str], folder: Path) -> EvaluationSet:
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return EvaluationSet(shards, label="json:label", classes=str(folder / "classes.json"), templates=["a {}", "{}"])


def test_training_ends_with_zero_shot_and_retrieval(shards, architecture, tmp_path) -> None:
    evaluate = {"both": labelled(shards, tmp_path), "captions": EvaluationSet(shards[:1], captions="json:captions")}
    model = RankClip(architecture=architecture, optim=OPTIM)
    trainer = trained(model, data(shards, evaluate=evaluate), tmp_path)
    values = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    recalls = {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    tops = {f"zero_shot_top{k}" for k in (1, 3, 5)}
    assert set(values) == {f"val/both/{n}" for n in recalls | tops} | {f"val/captions/{n}" for n in recalls}
    assert all(0 <= value <= 1 for value in values.values())
    assert values["val/captions/i2t_r10"] > 0.5 and values["val/captions/t2i_r10"] == 1.0  # of 10 pictures
    chance = model.chance_levels()
    assert (chance["val/both/i2t_r5"], chance["val/captions/t2i_r10"]) == (pytest.approx(5 / 24), 1.0)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["architecture"] == architecture
    assert {key.partition(".")[0] for key in saved["state_dict"]} == {"network"}, "metrics and prompts stay out"


def test_chance_of_zero_shot_is_by_classes(shards, architecture, tmp_path) -> None:
    model = Clip(architecture=architecture, optim=OPTIM)
    trained(model, data(shards, evaluate={"both": labelled(shards, tmp_path)}), tmp_path)
    assert model.chance_levels()["val/both/zero_shot_top3"] == pytest.approx(3 / len(CLASSES))


@pytest.mark.parametrize("name", ["train", "imagenet-v2.0"])
def test_evaluation_sets_can_have_any_name(name, shards, architecture, tmp_path) -> None:
    model = Clip(architecture=architecture, optim=OPTIM)
    trainer = trained(model, data(shards, evaluate={name: EvaluationSet(shards)}), tmp_path)
    assert f"val/{name}/i2t_r1" in trainer.callback_metrics
    assert f"val/{name}/i2t_r1" in model.chance_levels()


def test_prediction_gives_unit_features_with_ids(shards, architecture, tmp_path) -> None:
    model = Clip(architecture=architecture)
    datamodule = data(shards, evaluate={"all": labelled(shards, tmp_path)})
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, use_distributed_sampler=False, **quiet
    )
    parts = trainer.predict(model, datamodule)
    features = {key: torch.cat([p[key] for p in parts]) for key in parts[0]}
    assert features["id"].tolist() == features["text_id"].tolist() == list(range(24))
    assert features["label"].tolist() == [i % len(CLASSES) for i in range(24)]
    for key in ("image", "text"):
        torch.testing.assert_close(features[key].norm(dim=-1), torch.ones(24))
