"""Every shipped config is instantiated: trainer, model and data module, with the values that it promises."""

from pathlib import Path

import pytest

from datamodules.evaluation_sets import EvaluationSet, is_labelled
from datamodules.synthetic import jpeg, picture, write_shard
from mmtrain.__main__ import main
from mmtrain.config_layers import load, split_arguments
from mmtrain.listing import configs_dir

NAMES = sorted(p.stem for p in configs_dir().glob("*.yaml") if not p.read_text().startswith("# Layer:"))
# tested in the folders of their papers
ELSEWHERE = (
    *("rdp_", "dp_", "difffoley_", "specvqgan_"),
    *("storyweaver_", "lora_", "dreambooth_", "recogniser_", "clip_creatures", "clip_text_creatures"),
)
RUNS = [name for name in NAMES if not name.startswith(ELSEWHERE)]
LAYERS = sorted(p.stem for p in configs_dir().glob("*.yaml") if p.read_text().startswith("# Layer:"))


def test_there_are_the_configs_that_the_readme_names() -> None:
    assert (
        sorted(
            [f"{m}_{d}" for m in ("rankclip", "clip", "cyclip", "alip") for d in ("cc3m", "emoji")]
            + ["rankclip_yfcc15m"]
        )
        == RUNS
    )
    guidance = ["double_guidance", "double_guidance_impacts"]
    assert ["base", "cluster", "cluster_cpu", *guidance, "fsdp", "laptop", "rn50", "story_features", "videos"] == LAYERS


@pytest.mark.parametrize("name", RUNS)
def test_every_config_is_instantiated(instantiate, name: str) -> None:
    trainer, model, data = instantiate("-c", name)
    method = {"rankclip": "RankClip", "clip": "Clip", "cyclip": "CyClip", "alip": "Alip"}[name.split("_")[0]]
    assert type(model).__name__ == method
    assert trainer.default_root_dir.endswith(f"runs/{name}")
    names = [type(c).__name__ for c in trainer.callbacks]
    assert {"RandomState", "NonFiniteGuard", "ResumeGuard", "Preemption", "LastCheckpoint"} <= set(names)
    if name.endswith("emoji"):
        assert type(data).__name__ == "EmojiDataModule" and data.pictures.size == 64
    else:
        assert model.architecture == ("ViT-B-32" if method == "Alip" else "ViT-B-32-quickgelu")
        assert sum(p.numel() for p in model.network.parameters()) == 151_277_313
        assert data.loading["batch_size"] == 512 and trainer.precision == "bf16-mixed"
        assert "ModelCheckpoint" in names
    if method == "RankClip":
        assert model.eps == (0.0 if name.endswith("emoji") else 1e-10)
        assert (model.cross, model.inmodal, model.ramp.slope) == (1 / 16, 1 / 16, 3.0)


def test_layers_change_what_they_say(instantiate, monkeypatch) -> None:
    _, model, _ = instantiate("-c", "rankclip_cc3m", "-c", "rn50")
    assert model.architecture == "RN50-quickgelu"
    assert sum(p.numel() for p in model.network.parameters()) == 102_007_137
    trainer, model, data = instantiate("-c", "rankclip_cc3m", "-c", "laptop", "--data.evaluate.imagenet", "null")
    assert (model.architecture, data.pictures.size, trainer.precision) == ("rn_small.json", 64, "32-true")
    assert list(data.evaluate) == ["cc3m_val"]
    assert model.eps == 1e-10  # what a layer does not name stays
    monkeypatch.setenv("SLURM_NNODES", "4")
    assert main(["fit", "-c", "rankclip_cc3m", "-c", "cluster", "--print_config"]) == 0


def test_config_text_names_the_published_form_and_its_command(capsys) -> None:
    for name in RUNS:
        text = Path(configs_dir() / f"{name}.yaml").read_text()
        assert f"python -m mmtrain fit -c configs/{name}.yaml" in text
    assert "PUBLISHED" in (configs_dir() / "rankclip_cc3m.yaml").read_text()
    main(["fit", "-c", "rankclip_cc3m", "--vars.data", "elsewhere", "--print_config"])
    assert "elsewhere/cc3m/cc3m-train-{0000..0575}.tar" in capsys.readouterr().out


def test_imagenet_may_be_shards_under_the_root_of_every_config(tmp_path) -> None:
    """What a config names itself goes before what `test` finds, so it must take the same layouts."""
    samples = [{"__key__": str(label), "jpg": jpeg(picture(0, 0, 20)), "cls": str(label)} for label in (7, 999)]
    (tmp_path / "imagenet/val").mkdir(parents=True)
    write_shard(tmp_path / "imagenet/val/0.tar", samples, stats=False)
    for name in (run for run in RUNS if not run.endswith("emoji")):
        layer = load(*split_arguments(["-c", name, "--vars.data", str(tmp_path)]))
        chosen = EvaluationSet(**layer.data["data"]["init_args"]["evaluate"]["imagenet"])
        assert chosen.open().labels() == [7, 999] and is_labelled(chosen.open()), name
