"""StoryDiffusion trains what it should and nothing else, and its checkpoints hold that and refuse what does not fit."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import Frame
from mmtrain.storyweaver.adapters import LoraSettings, adapter_name, add_adapters, lora_layers
from mmtrain.storyweaver.checkpoints import describe_base, fingerprint
from mmtrain.storyweaver.guidance import SpatialGuidance
from mmtrain.storyweaver.module import StoryDiffusion
from mmtrain.storyweaver.networks import KnowledgeEncoder
from mmtrain.storyweaver.pipeline import load_components
from tests.storyweaver.stand_ins import (
    OPTIM,
    SAMPLER,
    SIZE,
    data_of,
    fit,
    read,
    small_components,
    small_pipeline,
    small_world,
    trainer_of,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "storyweaver" / "sd15_parameters.json"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    return small_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return small_world(tmp_path_factory.mktemp("world") / "tiny")


def model(pipeline: str, **options: object) -> StoryDiffusion:
    torch.manual_seed(0)
    return StoryDiffusion(**{"pipeline": pipeline, "optim": OPTIM, "sampler": SAMPLER, "draw_steps": 2} | options)


def batch_of(world: Path, size: int = 4) -> dict:
    """The first pictures, as validation has them."""
    data = data_of(world, eval_batch_size=size)
    data.trainer = None
    data.setup("validate")
    return next(iter(data.val_dataloader()[0]))


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in after if not torch.equal(before[name], after[name])}


# what is trained


def test_trainable_names_and_counts_at_the_sizes_of_stable_diffusion() -> None:
    """On tensors without memory: 128 + 48 linears, and the released UNet with its knowledge encoder."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
        encoder = KnowledgeEncoder(768)
    shapes = json.loads(GOLDEN.read_text())["unet"]
    assert {name: list(parameter.shape) for name, parameter in unet.named_parameters()} == shapes
    whole = [*unet.parameters(), *encoder.parameters()]
    assert (len(whole), sum(p.numel() for p in whole)) == (698, 859_619_912)
    with torch.device("meta"):
        add_adapters({"unet": unet, "text_encoder": text}, LoraSettings())
    for network, linears, count in ((unet, 128, 797_184), (text, 48, 294_912)):
        trained = [p for p in network.parameters() if p.requires_grad]
        assert (len(lora_layers(network)), sum(p.numel() for p in trained)) == (linears, count)
    attention = {name.replace(".weight", ".base_layer.weight") for name in shapes if ".attn" in name}
    adapted = {name for name, _ in unet.named_parameters() if name.endswith("base_layer.weight")}
    assert adapted == {name for name in attention if name.endswith("weight")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora": {"text_encoder": True}}, {"unet": "lora", "text_encoder": "lora"}),
        ({"trains": "full"}, {"unet": ""}),
        ({"guidance": {"encoder": "soft"}}, {"unet": "lora", "guidance": "encoder"}),
        ({"trains": "full", "guidance": {"encoder": "released"}}, {"unet": "", "guidance": "encoder"}),
    ],
)
def test_training_moves_exactly_the_trained_part(pipeline, world, tmp_path, options, expected) -> None:
    """The checkpoint and the average hold that part and nothing else; the rest stays as the pipeline's files say."""
    module = model(pipeline, caption_dropout=0.5, **options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    content = read(fit(tmp_path, module, data_of(world), 3))
    after = module.state_dict()
    changed = moved(before, after)
    assert {name.partition(".")[0] for name in changed} == expected.keys()
    assert all(expected[name.partition(".")[0]] in name for name in changed)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert changed == trained == content["state_dict"].keys() == content["ema"].keys()
    assert all(torch.equal(content["state_dict"][name], after[name]) for name in trained)
    frozen, fresh = {"vae", "unet", "text_encoder"} - expected.keys(), load_components(pipeline)
    for part in frozen:
        assert fingerprint(getattr(module, part)) == fingerprint(getattr(fresh, part))
    assert module.unet.training and not module.vae.training
    assert module.text_encoder.training == ("text_encoder" in expected)


def test_the_loss_falls_on_two_pictures(pipeline, world) -> None:
    """All weights, the same noise and times each step, well below what it was."""
    module, batch = model(pipeline, trains="full", guidance={}), batch_of(world, 2)
    frames, latents = list(batch["frames"]), module.training_latents(batch)
    generator = torch.Generator().manual_seed(1)
    noise, t = torch.randn(latents.shape, generator=generator), torch.tensor([200, 800])
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(25):
        loss = module.errors(frames, latents, noise, t).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], losses


def test_errors_weights_and_regulariser_make_up_the_training_loss(pipeline, world) -> None:
    batch = batch_of(world)
    for options in ({}, {"snr_gamma": 5.0}, {"guidance": {"encoder": "soft"}}):
        module = model(pipeline, caption_dropout=0.0, **options)
        module.log = lambda *_, **__: None
        torch.manual_seed(7)
        loss = module.training_step(batch, 0)
        torch.manual_seed(7)
        latents = module.training_latents(batch)
        noise, t = torch.randn_like(latents), module.schedule.draw_times(len(latents), "eps")
        errors = module.errors(list(batch["frames"]), latents, noise, t).double()
        if module.snr_gamma:
            snr = torch.from_numpy(module.schedule.alphas_cumprod)[t]
            errors = errors * (snr / (1 - snr)).clamp(max=5.0) / (snr / (1 - snr))
        expected = errors.mean()
        if module.guidance is not None:
            extra = module.guidance.regulariser(module.encode(list(batch["frames"])), SIZE)
            assert extra > 0
            expected = expected + extra
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_gradients_are_clipped(pipeline, world, tmp_path) -> None:
    class Norms(pl.Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])))

    module = model(pipeline)
    trained = [p for p in module.parameters() if p.requires_grad]
    hook = lambda opt, *_: after.append(  # noqa: E731
        float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    )
    after: list[float] = []
    configure = module.configure_optimizers

    def configured() -> dict:
        made = configure()
        made["optimizer"].register_step_pre_hook(hook)
        return made

    module.configure_optimizers = configured
    fit(tmp_path, module, data_of(world), 3, gradient_clip_val=1e-3, callbacks=[Norms()])
    assert max(after) <= 1e-3 * 1.001 and min(Norms.seen) > 1e-3


@pytest.mark.parametrize(("precision", "encoder"), [("bf16-mixed", "soft"), ("bf16-true", "frozen_prior")])
def test_half_precision_trains_and_draws(pipeline, world, tmp_path, precision, encoder) -> None:
    module = model(pipeline, guidance={"encoder": encoder}, draws_per_validation=1)
    content = read(fit(tmp_path, module, data_of(world), 3, precision=precision, limit_val_batches=1.0))
    assert all(value.isfinite().all() for value in content["state_dict"].values())
    if precision == "bf16-mixed":
        assert all(value.dtype == torch.float32 for value in content["state_dict"].values())
    else:  # latents and losses are float32 all the same
        assert module.training_latents(batch_of(world, 1)).dtype == torch.float32
    assert list((tmp_path / "samples").glob("step_*.png"))


@pytest.mark.parametrize("encoder", ["frozen_prior", "soft"])
def test_checkpointed_gradients_are_the_same(pipeline, world, encoder) -> None:
    batch, grads = batch_of(world, 2), []
    for checkpointing in (False, True):
        module = model(pipeline, trains="full", guidance={"encoder": encoder}, gradient_checkpointing=checkpointing)
        module.train()
        latents = module.training_latents(batch)
        noise, t = torch.ones_like(latents), torch.tensor([300, 900])
        module.errors(list(batch["frames"]), latents, noise, t).mean().backward()
        grads.append([p.grad for p in module.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# conditions


def fixed_errors(module: StoryDiffusion, batch: dict, frames: list[Frame], dropped: list[bool] | None = None):
    latents = torch.ones(len(frames), 4, 8, 14)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.arange(len(frames)) * 200 + 100
    given = None if dropped is None else torch.tensor(dropped)
    with torch.no_grad():
        return module.errors(frames, latents, noise, t, given)


def test_dropped_captions_leave_neither_words_nor_guidance(pipeline, world) -> None:
    batch = batch_of(world)
    module, frames = model(pipeline, guidance={}), list(batch["frames"])
    all_gone, none_gone = [True] * 4, [False] * 4
    gone = fixed_errors(module, batch, frames, all_gone)
    assert torch.equal(gone, fixed_errors(module, batch, frames[::-1], all_gone))
    nothing = [Frame("", (), "", "")] * 4
    torch.testing.assert_close(gone, fixed_errors(module, batch, nothing))
    full = fixed_errors(module, batch, frames, none_gone)
    assert torch.equal(full, fixed_errors(module, batch, frames)) and not torch.equal(full, gone)
    some = fixed_errors(module, batch, frames, [True, False, True, False])
    torch.testing.assert_close(some, torch.where(torch.tensor([True, False, True, False]), gone, full))


def test_guidance_of_strength_zero_is_no_guidance(pipeline, world) -> None:
    batch = batch_of(world)
    frames = list(batch["frames"])
    plain = fixed_errors(model(pipeline), batch, frames)
    torch.testing.assert_close(fixed_errors(model(pipeline, guidance={"alpha": 0.0}), batch, frames), plain)
    assert not torch.allclose(fixed_errors(model(pipeline, guidance={}), batch, frames), plain)
    unguided = model(pipeline)
    off = model(pipeline, guidance={"sampling_alpha": 0.0})
    for module in (unguided, off):
        module.picture_size = SIZE
    assert torch.equal(unguided.draw(frames[:1], [3]), off.draw(frames[:1], [3]))


def test_latents_and_texts_are_encoded_once(pipeline, world, tmp_path) -> None:
    """Cached moments are those of the autoencoder, whatever batch they came in; each step samples anew."""
    module, batch = model(pipeline), batch_of(world)
    calls, encode = [], module.vae.encode
    module.vae.encode = lambda x: calls.append(len(x)) or encode(x)
    first, second = module.training_latents(batch), module.training_latents(batch)
    assert calls == [1, 1, 1, 1] and not torch.equal(first, second)
    reference = encode(batch["picture"][2:3].float() / 127.5 - 1).latent_dist
    mean, std = module.latents.moments([int(batch["id"][2])], lambda rows: pytest.fail("is known"))
    assert torch.equal(mean, reference.mean) and torch.equal(std, reference.std)
    assert not first.requires_grad
    uncached = model(pipeline, cache=False)
    assert not uncached.prompts.cache and not uncached.latents.keep


# validation


def test_a_validation_does_not_depend_on_chance_batches_or_training(pipeline, world, tmp_path) -> None:
    found = []
    for seed, size in ((1, 4), (2, 3)):
        torch.manual_seed(seed)
        trainer = trainer_of(tmp_path / str(size), limit_val_batches=1.0)
        module = model(pipeline, guidance={})
        torch.manual_seed(seed)
        found.append(trainer.validate(module, data_of(world, eval_batch_size=size), verbose=False)[0])
        assert (tmp_path / str(size) / "samples" / "step_000000.png").exists()
    assert found[0].keys() == {"val/tiny_frames/loss", "val/tiny_frames/loss_unguided"}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# checkpoints


def test_a_checkpoint_goes_only_where_it_belongs(pipeline, world, tmp_path) -> None:
    path = fit(tmp_path / "run", model(pipeline, lora={"rank": 2}), data_of(world), 1)
    other = small_pipeline(tmp_path / "other", seed=1)
    changed = small_world(tmp_path / "changed", characters=2)
    cases = [
        (model(other, lora={"rank": 2}), world, r"was trained on another pipeline \(unet .*set model.pipeline"),
        (model(pipeline), world, r"other trained tensors than this model: 64 other shapes"),
        (model(pipeline, trains="full"), world, r"other trained tensors.*missing keys.*unexpected keys"),
        (model(pipeline, lora={"rank": 2}, guidance={"encoder": "soft"}), world, r"12 missing keys \(guidance.encoder"),
        (model(pipeline, lora={"rank": 2}), changed, r"has a character 'Cy'"),
    ]
    for module, data, message in cases:
        with pytest.raises(UserError, match=message):
            trainer_of(tmp_path / "refused").validate(module, data_of(data), ckpt_path=str(path), verbose=False)
    with pytest.raises(UserError, match=r"guidance.given False, this model has True"):
        fit(tmp_path / "go", model(pipeline, lora={"rank": 2}, guidance={}), data_of(world), 1, ckpt_path=path)
    trainer = trainer_of(tmp_path / "taken", limit_val_batches=1.0)
    taken = model(pipeline, lora={"rank": 2}, guidance={}, draws_per_validation=0)  # drawing may be guided
    trainer.validate(taken, data_of(world), ckpt_path=str(path), verbose=False)
    assert taken.trained["step"] == 1 and taken.picture_size == SIZE


def test_training_starts_from_a_checkpoint_of_ours(pipeline, world, tmp_path) -> None:
    path = fit(tmp_path / "run", model(pipeline), data_of(world), 2)
    module = model(pipeline, pretrained=str(path), draws_per_validation=0)
    trainer_of(tmp_path / "on", limit_val_batches=1.0).validate(module, data_of(world), verbose=False)
    content = read(path)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in content["ema"].items())
    loaded = StoryDiffusion.load_from_checkpoint(path, weights_only=True)
    assert loaded.world.names == ["Ada", "Bo", "Cy"] and loaded.picture_size == SIZE
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in content["state_dict"].items())
    with pytest.raises(UserError, match=r"pretrained: .*absent.ckpt: no such checkpoint"):
        module = model(pipeline, pretrained=str(tmp_path / "absent.ckpt"))
        trainer_of(tmp_path / "absent").validate(module, data_of(world))


def test_a_base_is_told_apart_before_and_after_adapters() -> None:
    one, same, other = small_components(), small_components(), small_components(seed=1)
    assert describe_base(one) == describe_base(same) != describe_base(other)
    assert describe_base(one)["unet"] != describe_base(other)["unet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline": ""}, r"pipeline: none is given; name a folder in diffusers' layout .*not shipped"),
        ({"pipeline": "/nowhere/sd"}, r"pipeline: /nowhere/sd: no such folder or file; name a folder"),
        ({"trains": "some"}, r"trains: 'some', must be lora or full"),
        ({"caption_dropout": 1.5}, r"caption_dropout: 1.5, must be in \[0, 1\]"),
        ({"snr_gamma": 0.0}, r"snr_gamma: 0.0, must be above 0"),
        ({"noise_offset": -1.0}, r"noise_offset: -1.0"),
        ({"lora": LoraSettings(4) and {"rank": 0}}, r"lora: rank 0"),
    ],
)
def test_settings_out_of_range_are_refused(pipeline, options, message) -> None:
    with pytest.raises(UserError, match=message):
        StoryDiffusion(**{"pipeline": pipeline} | options)


def test_a_name_that_torch_uses_is_refused() -> None:
    with pytest.raises(UserError, match=r"character 'keys': torch does not allow this name"):
        adapter_name("keys")


# all stages


def test_a_model_is_tested_and_tells_stories(pipeline, world, tmp_path) -> None:
    module = model(pipeline, guidance={}, test={"seeds": 1})
    trainer = trainer_of(tmp_path)
    trainer.test(module, data_of(world), verbose=False)
    assert set(trainer.callback_metrics) == {"test/parameters/per_world"}, "no network was given to measure with"
    assert "dino_i left out" in module.protocols()["tiny_single"]
    assert "image_features" in trainer.datamodule.missing["tiny_single: dino_i"]
    assert isinstance(module.guidance, SpatialGuidance) and "sampling" in module.protocols()
    trainer_of(tmp_path).predict(module, data_of(world))
    drawn = sorted(tmp_path.glob("stories/*/seed_655/image/00000.png"))
    assert len(drawn) == 4
    about = json.loads((drawn[0].parent.parent / "options.json").read_text())
    assert about["sampler"] == module.sampling_about()["sampler"]
