"""Both trainings of SpecVQGAN on a world of a few clips, and bad input."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmtrain.config_errors import UserError
from mmtrain.difffoley.specvqgan import Vqgan
from mmtrain.difffoley.specvqgan_gpt import FeatureGpt
from mmtrain.difffoley.specvqgan_inputs import matching_features, picture
from mmtrain.difffoley.specvqgan_training import SpecVqganCodebook, SpecVqganTransformer
from mmtrain.optim import AdamWSettings
from mmtrain.video_audio import ClipFormat
from tests.difffoley.foley_data import bare_trainer as trainer

FRAMES, FEATURES, WIDTH = 32, 4, 6
NETWORK = {"width": 32, "multipliers": (1, 1, 1, 1, 1), "blocks": 1, "num_codes": 16, "code_width": 8}
GPT = {"feature_dim": WIDTH, "feature_frames": FEATURES, "layers": 2, "heads": 2, "width": 32, "dropout": 0.0}
FORMAT = ClipFormat(
    fps=4, seconds=2, frame_size=32, contrast_frames=4, min_shift_frames=2, window_frames=4, window_mel_frames=64
)
OPTIM = AdamWSettings(lr=3e-3, warmup_steps=5, schedule="constant", weight_decay=0.01)


# --- training ---


def clip(number: int) -> dict[str, Any]:
    """One of four sounds, and the feature that tells which."""
    generator = torch.Generator().manual_seed(number)
    mel = torch.zeros(80, FRAMES + 4)
    mel[20 * number : 20 * number + 20, 2 + 8 * number : 10 + 8 * number] = 0.8
    mel += 0.05 * torch.rand(mel.shape, generator=generator)
    features = torch.nn.functional.one_hot(torch.tensor(number), WIDTH).float().expand(FEATURES, WIDTH)
    audio = 0.1 * torch.randn(FORMAT.window_samples, generator=generator)
    return {"mel": mel, "features": features, "audio": audio, "id": torch.tensor(number)}


class Clips(pl.LightningDataModule):
    """Four clips, all in one training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluation_sets = {"bars": {"num_samples": 4}}
        self.items = [clip(number) for number in range(4)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items, batch_size=4)

    def val_dataloader(self) -> list[DataLoader]:
        return [DataLoader(self.items, batch_size=3)]

    test_dataloader = val_dataloader

    def all(self) -> dict[str, Tensor]:
        return next(iter(DataLoader(self.items, batch_size=4)))


@pytest.fixture(scope="module")
def trained_codebook(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], dict[str, float]]:
    """Checkpoint of a codebook, and its scores before and after training."""
    folder = tmp_path_factory.mktemp("codebook")
    pl.seed_everything(0, verbose=False)
    module = SpecVqganCodebook(FRAMES, NETWORK, gan_weight=0, optim=OPTIM)
    run = trainer(folder, 45)
    before = run.validate(module, Clips(), verbose=False)[0]
    run.fit(module, Clips())
    return folder / "checkpoints/last.ckpt", before, run.test(module, Clips(), verbose=False)[0]


def test_codebook_learns_the_clips_and_its_checkpoint_comes_back(trained_codebook: tuple) -> None:
    path, before, after = trained_codebook
    assert after["test/bars/l1"] < 0.5 * before["val/bars/l1"]
    assert after["test/bars/perplexity"] > 1.5
    again = SpecVqganCodebook.load_from_checkpoint(path, weights_only=True)
    assert again.trained["step"] == 45 and again.optim == OPTIM and again.discriminator is None
    started = SpecVqganCodebook(FRAMES, NETWORK, pretrained=str(path))  # with a fresh discriminator
    assert torch.equal(started.network.quantize.embedding.weight, again.network.quantize.embedding.weight)
    with pytest.raises(UserError, match=r"pretrained: .*last.ckpt: does not fit this network"):
        SpecVqganCodebook(FRAMES, NETWORK | {"code_width": 4}, pretrained=str(path))
    with pytest.raises(UserError, match=r"ckpt_path: .* trained with network .*'code_width': 8"):
        other = SpecVqganCodebook(FRAMES, NETWORK | {"code_width": 4}, gan_weight=0)
        trainer(path.parent, 46).fit(other, Clips(), ckpt_path=str(path))


def test_transformer_learns_which_codes_follow_which_features(tmp_path: Path, trained_codebook: tuple) -> None:
    pl.seed_everything(0, verbose=False)
    module = SpecVqganTransformer(str(trained_codebook[0]), GPT, format=FORMAT, top_k=1, optim=OPTIM)
    codebook = {name: value.clone() for name, value in module.codebook.state_dict().items()}
    data, run = Clips(), trainer(tmp_path, 60)
    before = run.validate(module, data, verbose=False)[0]["val/bars/loss"]
    run.fit(module, data)
    after = run.test(module, data, verbose=False)[0]
    assert after["test/bars/loss"] < 0.1 * before
    assert after["test/bars/code_accuracy"] > 0.95
    assert all(torch.equal(value, codebook[name]) for name, value in module.codebook.state_dict().items())
    assert not module.codebook.training or not module.training

    # what was generated was scored, with how it was made
    assert 0 <= after["test/bars/onset_f1"] <= 1 and after["test/bars/seconds_diffusion"] > 0
    assert "4 clips" in module.protocols()["bars"] and "top-k 1, temperature 1" in module.protocols()["bars"]
    assert (tmp_path / "evaluated_ids.txt").read_text().split() == ["0", "1", "2", "3"]

    # the features decide what is generated
    batch = data.all()
    module.eval()
    with torch.no_grad():
        own = module.codebook.decode(module.codebook.encode(picture(batch["mel"], FRAMES))[0])[:, 0]
        made = module.generate(batch["features"].flip(0), torch.rand(4, module.transformer.sequence))
    torch.testing.assert_close(made, ((own.flip(0) + 1) / 2).clamp(0, 1), rtol=0, atol=1e-4)
    sound, _ = module.sounds(batch)
    alone, _ = module.sounds({name: value[2:3] for name, value in batch.items()})
    torch.testing.assert_close(sound[2:3], alone, rtol=1e-3, atol=1e-3)

    # its checkpoint holds the codebook: sizes are enough to load it
    again = SpecVqganTransformer.load_from_checkpoint(
        tmp_path / "checkpoints/last.ckpt", codebook={"frames": FRAMES, "network": NETWORK}, weights_only=True
    )
    assert torch.equal(again.codebook.quantize.embedding.weight, codebook["quantize.embedding.weight"])
    sizes = {"frames": FRAMES, "network": NETWORK}
    started = SpecVqganTransformer(sizes, GPT, pretrained=str(tmp_path / "checkpoints/last.ckpt"))
    assert torch.equal(started.transformer.pos_emb, module.transformer.pos_emb)


def test_released_layouts_load(tmp_path: Path) -> None:
    network = Vqgan(**NETWORK)
    state = {f"first_stage_model.{name}": value for name, value in network.state_dict().items()}
    state |= {"first_stage_model.loss.perceptual_loss.lin0.weight": torch.ones(1), "transformer.x": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "transformer.ckpt")
    started = SpecVqganCodebook(FRAMES, NETWORK, pretrained=str(tmp_path / "transformer.ckpt"))
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in started.network.state_dict().items())


# --- adversary, perceptual distance, condition, decay ---


def adversarial(**given: Any) -> tuple[SpecVqganCodebook, Tensor]:
    torch.manual_seed(0)
    small = {"width": 4, "layers": 2}
    module = SpecVqganCodebook(FRAMES, NETWORK, discriminator=small, **given)
    return module, picture(torch.rand(2, 80, FRAMES), FRAMES)


def test_each_adversary_s_loss_moves_its_own_parameters_only() -> None:
    module, real = adversarial(gan_start=0)
    decoded = torch.randn_like(real).requires_grad_()
    loss, parts = module.adversarial_loss(real, decoded, decoded.mean())
    loss.backward()
    given = {name: p.grad.clone() for name, p in module.discriminator.named_parameters()}
    expected = -0.8 * torch.autograd.grad(module.discriminator(decoded).mean(), decoded)[0]
    torch.testing.assert_close(decoded.grad, expected)
    module.discriminator.zero_grad()
    own = (
        torch.relu(1 - module.discriminator(real)).mean()
        + torch.relu(1 + module.discriminator(decoded.detach())).mean()
    )
    (own / 2).backward()
    for name, parameter in module.discriminator.named_parameters():
        torch.testing.assert_close(given[name], parameter.grad)
    torch.testing.assert_close(loss.detach(), 0.8 * parts["generator"] + parts["discriminator"])


def test_before_its_step_the_adversary_rests() -> None:
    module, real = adversarial(gan_start=5)
    loss, parts = module.adversarial_loss(real, real.clone().requires_grad_(), real.mean())
    loss.backward()
    assert loss == 0 and parts == {}
    assert all(not parameter.grad.any() for parameter in module.discriminator.parameters())


def test_adaptive_weight_is_the_ratio_of_gradients_within_its_limits() -> None:
    module, real = adversarial(gan_start=0, gan_limits=(0.0, 1e4))
    decoded, _, _ = module.network(real)
    reconstruction, generator = (decoded - real).abs().mean(), -module.discriminator(decoded).mean()
    last = module.network.decoder.conv_out.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, generator)]
    balance = module.gan_balance(reconstruction, generator)
    torch.testing.assert_close(balance, norms[0] / (norms[1] + 1e-4))
    module.gan_limits = (0.0, 0.5 * float(balance))
    torch.testing.assert_close(module.gan_balance(reconstruction, generator), 0.5 * balance)


def test_training_with_adversary_and_perceptual_network(tmp_path: Path) -> None:
    class Distance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Conv2d(1, 4, 3, 2)

        def forward(self, real: Tensor, decoded: Tensor) -> Tensor:
            return (self.features(real) - self.features(decoded)).square().mean((1, 2, 3))

    module, _ = adversarial(gan_start=1, gan_limits=(0.0, 10.0), perceptual=Distance(), optim=OPTIM)
    before = [parameter.detach().clone() for parameter in module.discriminator.parameters()]
    run = trainer(tmp_path, 1)
    run.fit(module, Clips())
    # its gradients are zero so far, so that only the decay moves it
    moved = [(a - b).abs().max() for a, b in zip(before, module.discriminator.parameters(), strict=True)]
    assert max(moved) < 1e-3
    run = trainer(tmp_path, 3)
    run.fit(module, Clips(), ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    assert run.global_step == 3  # both networks make one step
    assert {"train/lpaps", "train/generator", "train/discriminator"} <= set(run.callback_metrics)
    assert not any("perceptual" in name or "features" in name for name in module.state_dict())


def test_random_condition_is_fixed_in_evaluation_and_no_feature_is_seen() -> None:
    module = SpecVqganTransformer({"frames": FRAMES, "network": NETWORK}, GPT, condition="random")
    batch = Clips().all()
    other = {**batch, "features": batch["features"].flip(0)}
    module.eval()
    assert torch.equal(module.prefix(batch, FRAMES), module.prefix(other, FRAMES))
    module.train()
    assert not torch.equal(module.prefix(batch, FRAMES), module.prefix(batch, FRAMES))
    assert not module.codebook.training


def test_only_weights_of_linear_maps_decay(tmp_path: Path) -> None:
    module = SpecVqganTransformer({"frames": FRAMES, "network": NETWORK}, GPT, optim=OPTIM)
    module.trainer = trainer(tmp_path, 1)
    module.trainer.strategy.connect(module)
    module.trainer._data_connector.attach_data(module, datamodule=Clips())
    decayed, kept = module.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and kept["weight_decay"] == 0
    linear = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv1d)}
    assert {names[id(parameter)] for parameter in decayed["params"]} == linear
    assert len(decayed["params"]) + len(kept["params"]) == len(list(module.transformer.parameters()))


# --- inputs ---


def test_features_are_those_of_the_frames_that_are_taken() -> None:
    features = torch.arange(215.0)[None, :, None]
    taken = matching_features(features, 848 / 860, 212)
    assert torch.equal(taken.flatten(), torch.arange(1.0, 213.0))
    assert matching_features(features, 848 / 860, 1).flatten().tolist() == [107.0]
    assert matching_features(features, 848 / 860, 5).flatten().tolist() == [36.0, 78.0, 120.0, 163.0, 205.0]
    mel = torch.arange(860.0).expand(1, 80, 860) / 860
    assert ((picture(mel, 848)[0, 0, 0] + 1) / 2 * 860)[[0, -1]].round().tolist() == [6.0, 853.0]


SIZES = {"frames": FRAMES, "network": NETWORK}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpecVqganCodebook(30, NETWORK), r"frames: 30, must be a positive multiple of .* 16"),
        (lambda: SpecVqganCodebook(FRAMES, NETWORK | {"width": 20}), r"network.width: 20, must be a multiple of 32"),
        (lambda: SpecVqganCodebook(FRAMES, NETWORK | {"term_order": "new"}), r"term_order: 'new', must be released or"),
        (lambda: SpecVqganCodebook(FRAMES, NETWORK | {"attention_levels": (True,)}), r"attention_levels: 1 entries"),
        (lambda: SpecVqganCodebook(FRAMES, NETWORK, gan_limits=(2.0, 1.0)), r"gan_limits: \[2.0, 1.0\]"),
        (lambda: SpecVqganTransformer("nothing.ckpt", GPT), r"codebook: nothing.ckpt: no such file"),
        (lambda: SpecVqganTransformer(SIZES, GPT | {"heads": 3}), r"transformer.width: 32 is not divisible by heads 3"),
        (lambda: SpecVqganTransformer(SIZES, GPT, condition="none"), r"condition: 'none', must be features or random"),
        (lambda: SpecVqganTransformer(SIZES, GPT, temperature=0), r"temperature: 0, must be above 0"),
        (lambda: picture(torch.rand(1, 128, 64), 32), r"spectrograms are \[128, 64\], the model takes \[80, 32\]"),
        (lambda: picture(torch.rand(1, 80, 31), 32), r"\[80, 31\]"),
        (lambda: matching_features(torch.rand(1, 3, 2), 1.0, 4), r"feature_frames: 4, but a clip has 3 features"),
        (
            lambda: FeatureGpt(2, 4, 8, 9, 1, 1, 8)(torch.rand(1, 3, 2), torch.zeros(1, 2, dtype=torch.long)),
            "features: 3 a clip, the transformer has 4",
        ),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_file_without_a_codebook_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"transformer.x": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"codebook: .*other.ckpt: holds no codebook"):
        SpecVqganTransformer(str(tmp_path / "other.ckpt"), GPT)
