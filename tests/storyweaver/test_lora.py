"""A LoRA for each character: a batch trains its character's alone, and a frame is drawn with those of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import FrameBatch
from mmtrain.storyweaver.adapters import adapters_of, lora_layers
from mmtrain.storyweaver.lora import LoraPerCharacter, check_strategy
from tests.storyweaver.stand_ins import OPTIM, SAMPLER, SIZE, data_of, fit, read, small_pipeline, small_world

NAMES = ["Ada", "Bo", "Cy"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    return small_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return small_world(tmp_path_factory.mktemp("world") / "tiny", frames=2)


@pytest.fixture(scope="module")
def module(pipeline) -> LoraPerCharacter:
    """With adapters that are told apart: those of character i are i + 1."""
    made = LoraPerCharacter(pipeline=pipeline, optim=OPTIM, sampler=SAMPLER)
    made.add_characters(NAMES)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_" in name:
                parameter.fill_(0.02 * (1 + NAMES.index(name.split(".")[-2])))
    made.picture_size = SIZE
    return made


def frames_of(world: Path, *groups: tuple[str, ...]) -> list:
    """A frame that shows each of these groups of characters."""
    data = data_of(world)
    by_names = {frame.frame.names: frame.frame for frame in data.frames}
    return [by_names.get(names) or by_names[names[::-1]] for names in groups]


def output(module: LoraPerCharacter, names: tuple[str, ...]) -> torch.Tensor:
    noised = torch.randn(1, 4, 8, 14, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module.unet_for(names)(noised, torch.tensor([500]), encoder_hidden_states=context).sample


def test_each_character_has_its_own_weights(module, pipeline) -> None:
    assert adapters_of(module.unet) == NAMES
    outputs = {names: output(module, names) for names in ((), ("Ada",), ("Bo",), ("Ada", "Bo"))}
    base = LoraPerCharacter(pipeline=pipeline).unet
    noised = torch.randn(1, 4, 8, 14, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(outputs[()], base(noised, torch.tensor([500]), context).sample)
    values = list(outputs.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(outputs["Ada",], output(module, ("Ada",)))  # whatever acted before
    assert all(p.requires_grad for n, p in module.named_parameters() if ".lora_" in n)
    with pytest.raises(UserError, match=r"no LoRA of 'Dee': the model has those of Ada, Bo, Cy"):
        module.unet_for(("Dee",))


@pytest.mark.parametrize("combine", ["average", "sum"])
def test_adapters_of_two_characters_are_combined(module, combine) -> None:
    """On one layer: the base's output plus the mean, or the sum, of the two updates."""
    module.combine, module.active = combine, None
    layer = lora_layers(module.unet_for(("Ada", "Cy")))[0]
    x = torch.randn(2, layer.in_features)
    updates = [layer.lora_B[name](layer.lora_A[name](x)) for name in ("Ada", "Cy")]
    expected = layer.base_layer(x) + sum(updates) / (2 if combine == "average" else 1)
    torch.testing.assert_close(layer(x), expected)
    layer = lora_layers(module.unet_for(("Ada",)))[0]  # and alone at its full strength again
    torch.testing.assert_close(layer(x), layer.base_layer(x) + updates[0])
    assert module.sampling_about()["combine"] == combine
    module.combine = "average"


def test_a_batch_trains_its_character_alone(pipeline, world, tmp_path) -> None:
    torch.manual_seed(0)
    module = LoraPerCharacter(pipeline=pipeline, optim=OPTIM, sampler=SAMPLER, lora={"text_encoder": True})
    content = read(fit(tmp_path, module, data_of(world, group="character", characters=["Ada", "Cy"]), 1))
    state = content["state_dict"]
    assert {name.split(".")[0] for name in state} == {"unet", "text_encoder"}
    trained = {name.split(".")[-2] for name, v in state.items() if ".lora_B." in name and v.any()}
    assert trained < {"Ada", "Cy"} and trained  # one of the two: the epoch has two batches
    assert {name.split(".")[-2] for name in state} == set(NAMES)
    loaded = LoraPerCharacter.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_frames_are_drawn_by_their_own_network(module, world) -> None:
    frames = frames_of(world, ("Bo",), ("Ada",), ("Ada", "Bo"), ("Bo",))
    together = module.draw(frames, [3])
    for frame, picture in zip(frames, together, strict=True):
        assert (module.draw([frame], [3])[0].int() - picture.int()).abs().max() <= 1  # rounded
    latents = torch.ones(4, 4, 8, 14)
    noise, t = torch.zeros_like(latents), torch.tensor([100, 300, 500, 700])
    errors = module.errors(frames, latents, noise, t)
    alone = [module.errors([f], latents[:1], noise[:1], t[i : i + 1]) for i, f in enumerate(frames)]
    torch.testing.assert_close(errors, torch.cat(alone))


def test_batches_and_trainers_that_do_not_fit_are_refused(module, world) -> None:
    batch = {"frames": FrameBatch(frames_of(world, ("Ada",), ("Bo",)))}
    with pytest.raises(UserError, match=r"data.group: a batch shows Ada; Bo; .* needs data.group: character"):
        module.training_step(batch, 0)
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(_ddp_kwargs={}))
    with pytest.raises(UserError, match=r"trainer.strategy: .*ddp_find_unused_parameters_true"):
        check_strategy(trainer)
    trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
    check_strategy(trainer)
