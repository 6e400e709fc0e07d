"""A training that was interrupted ends with the bits of one that was not, for each method of this room."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from mmtrain.storyweaver.dreambooth import DreamBooth
from mmtrain.storyweaver.lora import LoraPerCharacter
from mmtrain.storyweaver.module import StoryDiffusion
from mmtrain.storyweaver.pipeline import load_components
from tests.storyweaver.stand_ins import OPTIM, SAMPLER, data_of, fit, read, small_pipeline, small_world

CASES = {
    "lora": (StoryDiffusion, {"guidance": {"encoder": "soft"}, "lora": {"text_encoder": True}, "noise_offset": 0.1}),
    "full": (StoryDiffusion, {"trains": "full", "guidance": {}, "snr_gamma": 5.0}),
    "characters": (LoraPerCharacter, {}),
    "dreambooth": (DreamBooth, {"characters": ["Bo"], "prior": {"per_class": 2, "steps": 1}}),
}
STEPS = 5


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_training_ends_with_the_same_bits(case, tmp_path) -> None:
    """Five steps against the last two of them by new objects; between them an evaluation draws a picture."""
    pipeline, world = small_pipeline(tmp_path / "pipeline"), small_world(tmp_path / "world", characters=2, frames=4)
    kind, options = CASES[case]

    def run(name: str, **about: Any) -> tuple[pl.LightningModule, dict[str, Any]]:
        data_options = {} if kind is StoryDiffusion else {"group": "character"}
        if case == "dreambooth":
            data_options["characters"] = ["Bo"]
        module = kind(pipeline=pipeline, optim=OPTIM, sampler=SAMPLER, draw_steps=2, draws_per_validation=1, **options)
        return module, read(fit(tmp_path / name, module, data_of(world, **data_options), STEPS, **about))

    stopped = tmp_path / "stopped.ckpt"
    _, whole = run("whole", callbacks=[SaveAt(3, stopped)], limit_val_batches=1)
    assert read(stopped)["global_step"] == 3
    module, parts = run("parts", ckpt_path=stopped, limit_val_batches=1)
    assert parts["global_step"] == whole["global_step"] == STEPS
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "random_state", "ema_updates"):
        assert same(parts[key], whole[key]), key
    start = read(stopped)["state_dict"]
    assert start.keys() == whole["state_dict"].keys()
    moved = [name for name, value in start.items() if not torch.equal(value, whole["state_dict"][name])]
    assert len(moved) > len(start) / 4  # not every character has its turn in each part
    frozen = load_components(pipeline)
    for part in ("vae", "text_encoder", "unet"):
        if case == "full" and part == "unet":
            continue
        theirs = {n.replace(".base_layer", ""): p for n, p in getattr(module, part).state_dict().items()}
        assert all(torch.equal(theirs[name], value) for name, value in getattr(frozen, part).state_dict().items())


class SaveAt(pl.Callback):
    """Saves once in the midst of an epoch, as what a kill leaves behind."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def same(one: Any, other: Any) -> bool:
    """Whether two nested structures hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
