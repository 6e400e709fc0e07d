"""DreamBooth: class pictures are drawn once, prompts have the rare token, and each character has its own network."""

import json
from pathlib import Path

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.story import Character, Frame
from mmtrain.storyweaver.checkpoints import fingerprint
from mmtrain.storyweaver.dreambooth import DreamBooth, with_rare_token
from mmtrain.storyweaver.losses import prior_preserving_loss
from mmtrain.storyweaver.prior import ClassPictures, PriorSettings
from tests.storyweaver.stand_ins import OPTIM, SAMPLER, SIZE, data_of, fit, read, small_pipeline, small_world

PRIOR = {"per_class": 3, "steps": 1}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    return small_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return small_world(tmp_path_factory.mktemp("world") / "tiny")


def model(pipeline: str, **options: object) -> DreamBooth:
    torch.manual_seed(0)
    return DreamBooth(**{"pipeline": pipeline, "optim": OPTIM, "sampler": SAMPLER, "prior": PRIOR} | options)


def test_a_network_for_each_chosen_character(pipeline, world, tmp_path) -> None:
    """Only the named one is copied, trained and saved; the base draws class pictures and stays as it is."""
    module = model(pipeline, characters=["Bo"])
    base = fingerprint(module.unet)
    data = data_of(world, group="character", characters=["Bo"])
    state = read(fit(tmp_path / "run", module, data, 2))["state_dict"]
    assert {".".join(name.split(".")[:2]) for name in state} == {"networks.Bo"}
    assert fingerprint(module.unet) == base != fingerprint(module.networks["Bo"])
    folder = tmp_path / "run" / "class_pictures"
    drawn = sorted(folder.glob("*/*.png"))
    assert [path.parent.name for path in drawn] == ["snow_owl"] * 3
    times = [path.stat().st_mtime_ns for path in drawn]
    drawn[1].unlink()

    again = model(pipeline, characters=["Bo"], prior={**PRIOR, "folder": str(folder)})
    other = fit(tmp_path / "again", again, data, 2)
    assert [drawn[i].stat().st_mtime_ns == times[i] for i in range(3)] == [True, False, True]  # only what is missing
    assert all(torch.equal(value, state[name]) for name, value in read(other)["state_dict"].items())
    with pytest.raises(UserError, match=r"class pictures were drawn with sampler .*give another prior.folder"):
        fit(tmp_path / "no", model(pipeline, prior={**PRIOR, "folder": str(folder), "steps": 2}), data, 1)
    with pytest.raises(UserError, match=r"characters: 'Bob' is not of this world; nearest: Bo"):
        fit(tmp_path / "no", model(pipeline, characters=["Bob"]), data, 1)
    with pytest.raises(UserError, match=r"characters: 'Bo' has no network"):
        fit(tmp_path / "no", model(pipeline, characters=["Ada"], prior={"weight": 0.0}), data, 1)
    named = {frame.frame.names: frame.frame for frame in data.frames}
    assert module.by_network([named["Bo",], named["Ada",]]) == {("Bo",): [0], (): [1]}
    assert module.unet_for(()) is module.unet and "the base model" in module.protocols()["characters"]


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_the_loss_is_that_of_instances_plus_that_of_their_class(pipeline, world, tmp_path, trains) -> None:
    module = model(pipeline, trains=trains, prior={**PRIOR, "weight": 0.5})
    data = data_of(small_world(tmp_path / "two", characters=2), group="character")
    fit(tmp_path, module, data, 1)
    batch = next(iter(data.train_dataloader()))
    frames = list(batch["frames"])
    name = frames[0].names[0]
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update({k: float(v) for k, v in values.items()})
    module.log = lambda key, value, **_: logged.update({key: float(value)})
    torch.manual_seed(3)
    loss = module.training_step(batch, 0)

    torch.manual_seed(3)
    latents, own = module.training_latents(batch), data.world.characters[name].coarse_class
    of_class = module._class_latents(own, 2)
    # drawn for pairs of a picture and one of its class
    noise, t = torch.randn(4, *latents.shape[1:]), module.schedule.draw_times(4, "eps")
    with torch.no_grad():
        instance = module.errors(frames, latents, noise[::2], t[::2], network=(name,))
        prompt = [Frame(f"a photo of a {own}", (), "", "")] * 2
        prior = module.errors(prompt, of_class, noise[1::2], t[1::2], network=(name,))
    assert logged["train/instance"] == pytest.approx(float(instance.mean()), rel=1e-5)
    assert logged["train/prior"] == pytest.approx(float(prior.mean()), rel=1e-5)
    expected = prior_preserving_loss(torch.cat([instance, prior]), 0.5)[0]
    assert float(loss.detach()) == logged["train/loss"] == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    grads = {n for n, p in module.named_parameters() if p.grad is not None}
    assert grads and all(f".{name}." in n for n in grads)


def test_no_prior_no_pictures(pipeline, world, tmp_path) -> None:
    module = model(pipeline, trains="lora", prior={"weight": 0.0}, prompt="description")
    fit(tmp_path, module, data_of(world, group="character"), 1)
    assert not (tmp_path / "class_pictures").exists()
    frame = Frame("A fox runs.", (Character("Ada", "fox", "This red fox has ears."),), "Flat.")
    assert module.wording(frame) is frame and module.sampling_about()["rare_token"] is None


def test_the_rare_token_stands_before_the_class() -> None:
    pair = (Character("Bo", "snow owl", "It is blue."), Character("Ada", "fox", "It is red."))
    frame = Frame("A fox and a Snow Owl sit; the foxes' den, the fox.", pair, "Flat.")
    one = with_rare_token(frame, ["Ada"], "sks").prompt
    assert one == "Flat. A sks fox and a Snow Owl sit; the foxes' den, the sks fox."
    both = with_rare_token(frame, ["Ada", "Bo"], "sks").prompt
    assert both == "Flat. A sks fox and a sks Snow Owl sit; the foxes' den, the sks fox."
    assert with_rare_token(Frame("It runs.", pair[1:], ""), ["Ada"], "sks").event == "It runs. A sks fox."
    assert with_rare_token(frame, [], "sks").event == frame.event


def test_a_frame_of_two_is_drawn_as_stated(pipeline, world) -> None:
    full, lora = model(pipeline), model(pipeline, trains="lora")
    pair = Frame("A b.", (Character("Bo", "snow owl", "x"), Character("Ada", "fox", "y")), "")
    for module in (full, lora):
        module.add_characters(["Ada", "Bo", "Cy"])
        module.picture_size = SIZE
    assert full.drawn_by(pair) == ("Bo",) and lora.drawn_by(pair) == ("Ada", "Bo")
    assert full.unet_for(("Bo",)) is full.networks["Bo"]
    assert full.draw([pair], [1]).shape == (1, 3, *SIZE)


def test_class_pictures_are_divided_and_described(tmp_path) -> None:
    pictures = ClassPictures(tmp_path, PriorSettings(per_class=3), ["fox", "polar bear", "fox"], {"steps": 2})
    asked: list[tuple[str, list[int]]] = []

    def draw(frame: Frame, seeds: list[int]) -> torch.Tensor:
        asked.append((frame.prompt, seeds))
        return torch.stack([torch.full((3, 2, 2), seed, dtype=torch.uint8) for seed in seeds])

    assert pictures.draw(draw, lambda: None, 2) == 6 and pictures.draw(draw, lambda: None, 2) == 0
    assert asked == [(f"a photo of a {c}", seeds) for c in ("fox", "polar bear") for seeds in ([0, 1], [2])]
    assert pictures.read("polar bear", [2, 0]).amax((1, 2, 3)).tolist() == [2, 0]
    assert len({pictures.number(c, i) for c in ("fox", "polar bear") for i in range(3)}) == 6
    about = json.loads((tmp_path / "drawn_with.json").read_text())
    assert about == {"prompt": "a photo of a {}", "steps": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": {"prompt": "a photo"}}, r"prior.prompt: 'a photo' has no \{\} for the class"),
        ({"prior": {"per_class": 0}}, r"prior: per_class 0"),
        ({"prompt": "sks"}, r"prompt: 'sks', must be rare_token or description"),
    ],
)
def test_settings_out_of_range_are_refused(pipeline, options, message) -> None:
    with pytest.raises(UserError, match=message):
        model(pipeline, **options)
