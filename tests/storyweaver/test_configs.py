"""Every config of StoryWeaver and its rivals is instantiated, with a tiny model in the place of Stable Diffusion."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.config_layers import load, split_arguments
from mmtrain.listing import configs_dir
from mmtrain.plans import jobs, shared_trainings
from mmtrain.storyweaver.reproduce import BASE, DREAMBOOTH, LORA, OWN, PLAIN, PLAN
from tests.storyweaver.stand_ins import small_pipeline
from tests.storyweaver.test_base import TEXT, VISION
from tests.test_configs import NAMES

STORIES = ("storyweaver_", "lora_", "dreambooth_")
CUSTOMISED = [name for name in NAMES if name.startswith(STORIES) and name != "storyweaver_standin_base"]
STANDIN = [name for name in CUSTOMISED if name.endswith("_standin")]
CLASSES = {"storyweaver": "StoryDiffusion", "lora": "LoraPerCharacter", "dreambooth": "DreamBooth"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that configs name: a pipeline, and checkpoints that are looked for but not opened."""
    folder = tmp_path_factory.mktemp("files")
    torch.save({"state_dict": open_clip.CLIP(16, VISION, TEXT, quick_gelu=True).state_dict()}, folder / "clip.ckpt")
    (folder / "recogniser.ckpt").touch()
    pipeline = small_pipeline(folder / "pipeline")
    files = {name: str(folder / f"{name}.ckpt") for name in ("clip", "recogniser")}
    return files | {"text": files["clip"], "pipeline": pipeline, "base": pipeline}


def words(name: str, places: dict[str, str]) -> list[str]:
    """`-c NAME` with those of the places that the config has a variable for."""
    known = load([name], []).data["vars"]
    return ["-c", name, *(word for key, path in places.items() if key in known for word in (f"--vars.{key}", path))]


def test_there_is_a_config_for_every_row() -> None:
    full = {"storyweaver_pororo", "storyweaver_pororo_full", "storyweaver_frozen", "lora_pororo", "dreambooth_pororo"}
    assert {name for name in CUSTOMISED if name not in STANDIN} == full
    assert set(STANDIN) == {f"{method}_standin" for method in CLASSES}


@pytest.mark.parametrize("name", CUSTOMISED)
def test_customisation_is_instantiated(instantiate, places: dict[str, str], name: str) -> None:
    trainer, model, data = instantiate(*words(name, places))
    assert type(model).__name__ == CLASSES[name.split("_")[0]] and type(data).__name__ == "StoryDataModule"
    assert {"RandomState", "NonFiniteGuard", "ResumeGuard", "LastCheckpoint"} <= {
        type(callback).__name__ for callback in trainer.callbacks
    }
    assert trainer.default_root_dir.endswith(f"runs/{name}")
    assert f"python -m mmtrain fit -c configs/{name}.yaml" in (configs_dir() / f"{name}.yaml").read_text()
    if name in STANDIN:
        assert tuple(data.picture_size) == (64, 112) and model.sampler.name == "ddim"
        assert model.lent["image_text_features"] is not None and data.maker is not None
    else:
        assert tuple(data.picture_size) == (512, 896), "as released"
        assert (model.sampler.name, model.sampler.steps, model.sampler.scale) == ("lms", 100, 5.0)
    if name in ("lora_pororo", "dreambooth_pororo", "lora_standin", "dreambooth_standin"):
        assert model.guidance is None and data.group == "character"
    else:
        assert model.guidance.settings.heads == "first" and model.guidance.settings.sampling_alpha == 2.5


def test_released_way_is_what_was_released(instantiate, places: dict[str, str]) -> None:
    trainer, model, data = instantiate(*words("storyweaver_pororo_full", places))
    assert model.trains == "full" and all(parameter.requires_grad for parameter in model.unet.parameters())
    assert model.caption_dropout == 0 and trainer.gradient_clip_val is None and trainer.accumulate_grad_batches == 4
    assert (model.optim.lr, model.optim.weight_decay, model.optim.schedule) == (7e-6, 1e-2, "constant")
    guidance = model.guidance.settings
    assert guidance.encoder == "released" and guidance.parity and guidance.span_rule == "released"
    assert data.fit == "released" and trainer.max_steps == 20_000
    _, lora, _ = instantiate(*words("storyweaver_pororo", places))
    _, plain, _ = instantiate(*words("storyweaver_pororo", places), "--model.guidance", "null")
    assert plain.guidance is None
    trained = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("name", ["storyweaver_standin_base", "clip_creatures", "clip_text_creatures"])
def test_what_the_stand_in_needs_is_instantiated(instantiate, places: dict[str, str], name: str) -> None:
    _, model, data = instantiate(*words(name, places), *(["--data.count", "8"] if name.startswith("clip") else []))
    kinds = {"TextToPicture": "CreatureBaseDataModule", "Clip": "CreaturePairsDataModule"}
    assert kinds[type(model).__name__] == type(data).__name__


@pytest.mark.parametrize("name", ["recogniser_standin", "recogniser_pororo", "recogniser_frozen"])
def test_recognisers_are_instantiated(instantiate, name: str) -> None:
    _, model, data = instantiate("-c", name)
    assert type(model).__name__ == "CharacterClassifier" and data.folds >= 2
    assert (model.architecture == "small") == name.endswith("standin")


def test_a_missing_model_is_one_message(instantiate, places: dict[str, str], capsys) -> None:
    from mmtrain.__main__ import main

    assert main(["fit", "-c", "storyweaver_pororo", "--vars.pipeline", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and "pipeline" in said and "Traceback" not in said


# --- the reproduction ---


def option(command: list[str], name: str) -> str:
    """The last value of an option, which is the one that counts."""
    return command[len(command) - command[::-1].index(name)]


def test_plan_names_what_there_is(tmp_path: Path) -> None:
    judges, (base,) = shared_trainings(PLAN, tmp_path, quick=False)
    assert {job.method for job in judges} == {"clip", "text", "recogniser"} and base.method == "base"
    for job in (*judges, base, *jobs(PLAN, tmp_path, quick=False)):
        assert (configs_dir() / f"{job.config}.yaml").exists(), job.config
    for claim in PLAN.claims:
        assert {claim.own or OWN, *claim.rivals} <= set(PLAN.methods) and claim.own not in claim.rivals
    settings = option(base.command("fit"), "--vars.text")
    assert settings == str(tmp_path / "text" / "checkpoints" / "last.ckpt")


def settings_of(tmp_path: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """Method -> merged config of its last seed's test."""
    return {
        job.method: load(*split_arguments(job.command("test")[1:])).data for job in jobs(PLAN, tmp_path, quick=quick)
    }


def test_rows_differ_in_what_the_table_says(tmp_path: Path) -> None:
    rows = settings_of(tmp_path, quick=False)
    model = {name: data["model"]["init_args"] for name, data in rows.items()}
    assert model[OWN]["guidance"]["heads"] == "first" and model[PLAIN]["guidance"] == model[BASE]["guidance"] == "null"
    assert model[BASE]["method"] == BASE and model[PLAIN]["method"] == PLAIN
    for name, data in rows.items():
        assert model[name]["pipeline"] == str(tmp_path / "base" / "pipeline")
        assert data["data"]["init_args"]["path"] == str(tmp_path / "creatures"), "one world for all"
        assert str(model[name]["test"]["skip_seeds"]) == "2"
        assert model[name]["sampler"] == model[OWN]["sampler"]
    assert [data["data"]["init_args"].get("stories") for data in (rows[LORA], rows[DREAMBOOTH])] == ["single"] * 2
    trainings = {job.method: job.stages for job in jobs(PLAN, tmp_path, quick=False)}
    assert trainings[BASE] == ("test",) and trainings[OWN] == ("fit", "test")
    quick = settings_of(tmp_path, quick=True)
    assert all(str(data["trainer"]["max_steps"]) == "4" for data in quick.values())
    assert all(str(data["data"]["init_args"]["limit_lines"]) == "6" for data in quick.values())


def test_text_that_is_no_config_of_ours() -> None:
    with pytest.raises(UserError, match="storyweaver_pororro"):
        load(["storyweaver_pororro"], [])
