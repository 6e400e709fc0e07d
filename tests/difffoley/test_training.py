"""Latent diffusion and the alignment classifier train, keep what belongs together, and refuse what does not."""

import copy

import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.difffoley.alignment import AlignmentClassifier, accuracies, load_alignment, right_by_kind
from mmtrain.difffoley.guidance import GuidanceSettings
from mmtrain.difffoley.module import LatentDiffusion, fixed_times
from mmtrain.difffoley.pretrained import export_alignment, export_ldm, write_released
from mmtrain.noise_schedule import NoiseSchedule
from mmtrain.seeding import clip_noise, spread_times
from mmtrain.video_audio import ClipFormat
from tests.difffoley.foley_data import (
    CLASSIFIER,
    FIRST_STAGE,
    FORMAT,
    OPTIM,
    UNET,
    TinyData,
    equal,
    train,
    trainer_of,
    validate,
)


def diffusion(objective: str = "eps", **options: object) -> LatentDiffusion:
    torch.manual_seed(0)
    sampler = {"name": "euler", "steps": 2} if objective == "flow" else {"steps": 2}
    given = {"first_stage": FIRST_STAGE, "optim": OPTIM, "sampler": sampler, **options}
    return LatentDiffusion(FORMAT, UNET, objective=objective, **given)


def classifier(**options: object) -> AlignmentClassifier:
    torch.manual_seed(1)
    given = {"first_stage": FIRST_STAGE, "optim": OPTIM, **options}
    return AlignmentClassifier(FORMAT, CLASSIFIER, **given)


def read(path: object) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


def batch_of(data: TinyData) -> dict:
    return next(iter(data.val_dataloader()[0]))


@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
def test_every_objective_overfits_two_clips(objective) -> None:
    """Below a tenth of the first loss within 300 steps, the same noise and times each step."""
    module = diffusion(objective)
    batch = batch_of(TinyData(2, 2))
    with torch.no_grad():
        latent = 4 * module.first_stage.encode(batch["mel"], sample=False)
    noise = clip_noise(batch["id"], latent.shape[1:])
    t = fixed_times(batch["id"], objective, module.schedule)
    optimizer = torch.optim.AdamW([p for p in module.network.parameters() if p.requires_grad], lr=2e-3)
    first, last = None, None
    for _ in range(300):
        loss = module.denoising_loss(latent, module.context(batch["features"]), noise, t).mean()
        first, last = first or float(loss), float(loss)
        if last < 0.1 * first:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last < 0.1 * first


def test_dropped_conditions_are_the_null_condition_of_the_setting() -> None:
    features = batch_of(TinyData(4))["features"]
    dropped = torch.tensor([True, False, True, False])
    for kind in ("learned", "raw_zeros", "embedded_zeros"):
        module = diffusion(null_condition=kind)
        assert module.network.null_token.requires_grad == (kind == "learned")
        context, full = module.context(features, dropped), module.network.context(features)
        assert torch.equal(context[1::2], full[1::2])
        assert torch.equal(context[::2], module.network.null_context(kind, 2, features.shape[1]))


def test_training_moves_all_that_is_not_frozen_and_nothing_else(tmp_path) -> None:
    module = diffusion(condition_dropout=0.5)
    before = copy.deepcopy(module.state_dict())
    state = read(train(tmp_path, module, TinyData(4), 3))
    moved = {key for key, value in state["state_dict"].items() if not torch.equal(value, before[key])}
    assert "network.null_token" in moved and "network.embedder.pos_emb.weight" in moved
    assert not any(key.startswith("first_stage.") for key in moved)
    assert {key for key in before if key.startswith("first_stage.")} <= state["state_dict"].keys()
    assert not any(key.startswith("first_stage.") for key in state["ema"])
    assert not module.train().first_stage.training


def test_the_validation_loss_does_not_depend_on_chance_or_batches() -> None:
    module = diffusion()
    torch.manual_seed(5)
    one = validate(module, TinyData(4, 4))
    torch.manual_seed(6)
    other = validate(module, TinyData(4, 2))
    assert one.keys() == {"val/tiny/loss", "val/tiny/condition_gain"}
    assert one["val/tiny/loss"] == pytest.approx(other["val/tiny/loss"], rel=1e-5)


def test_noise_belongs_to_the_clip() -> None:
    ids = torch.tensor([7, 3, 7])
    noise = clip_noise(ids, (2, 3))
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1:2], clip_noise(torch.tensor([3]), (2, 3)))
    for seed, sample in ((1, 0), (0, 1)):
        assert not torch.equal(noise, clip_noise(ids, (2, 3), seed, sample))
    times = spread_times(torch.arange(100)).sort().values
    assert times[0] >= 0 and times[-1] < 1 and times.diff().max() < 0.02
    flow = fixed_times(torch.arange(1000), "flow", NoiseSchedule())
    assert flow.logit().mean().abs() < 0.02 and flow.logit().std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("noisy", [True, False])
def test_an_alignment_classifier_learns_its_pairs(noisy) -> None:
    """Six pairs by heart on clean latents; noised ones are told apart where the noise lets them."""
    module, data = classifier(noisy=noisy), TinyData(6, 6, pairs=True)
    batch = batch_of(data)
    with torch.no_grad():
        latent = module.first_stage.encode(batch["mel"], sample=False)
    t, noise = (torch.full((6,), 10), clip_noise(batch["id"], latent.shape[1:])) if noisy else (None, None)
    optimizer = torch.optim.AdamW(module.network.parameters(), lr=2e-3)
    for _ in range(100):
        logits = module.logits(latent, batch["features"], t, noise)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["match"])
        if loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    if not noisy:
        probability = module.eval().probability(batch["mel"], batch["features"])
        assert torch.equal(probability.round(), batch["match"])


def test_accuracies_are_counted_by_kind() -> None:
    logits = torch.tensor([2.0, -1.0, 1.0, -3.0, 4.0])
    match, kind = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 1])
    found = accuracies(right_by_kind(logits, match, kind))
    assert found == {"accuracy": 2 / 5, "accuracy_true": 1 / 2, "accuracy_shifted": pytest.approx(1 / 3)}


def test_an_evaluation_logs_each_kind(tmp_path) -> None:
    module = classifier()
    one, other = (validate(module, TinyData(6, batch, pairs=True)) for batch in (6, 4))
    names = {"loss", "accuracy", "accuracy_true", "accuracy_shifted", "accuracy_wrong"}
    assert one.keys() == {f"val/tiny/{name}" for name in names}
    assert one == pytest.approx(other, rel=1e-5)  # batches of other sizes: the same pairs, noise and times


def test_a_classifier_is_loaded_alone_and_checked(tmp_path) -> None:
    module = classifier()
    path = train(tmp_path, module, TinyData(6, 6, pairs=True), 2)
    loaded = load_alignment(path, "guidance_classifier", FORMAT, module.first_stage, noisy=True)
    content = read(path)
    assert equal({k: v for k, v in loaded.state_dict().items() if k in content["ema"]}, content["ema"])
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match=r"metric: .*last.ckpt: was trained with noisy: true; the metric needs"):
        load_alignment(path, "metric", noisy=False)
    with pytest.raises(UserError, match=r"guide: .*: was made with format.fps 4, this stage has 8"):
        load_alignment(path, "guide", ClipFormat(**{**vars(FORMAT), "fps": 8}))
    with pytest.raises(UserError, match=r"guide: .*: was trained on the latents of another first_stage"):
        load_alignment(path, "guide", first_stage=diffusion().first_stage)
    with pytest.raises(UserError, match=r"guide: .*no such file"):
        load_alignment(tmp_path / "absent.ckpt", "guide")
    other = train(tmp_path / "ldm", diffusion(), TinyData(2, 2), 1)
    with pytest.raises(UserError, match=r"guide: .*: is of .*LatentDiffusion, expected one of .*AlignmentClassifier"):
        load_alignment(other, "guide")


def test_a_first_stage_file_goes_into_the_model(tmp_path) -> None:
    source = diffusion()
    path = train(tmp_path, source, TinyData(2, 2), 1)
    module = diffusion(first_stage=str(path))
    assert equal(module.first_stage.state_dict(), source.first_stage.state_dict())
    guide = classifier(first_stage=str(path))
    assert guide.first_stage.fingerprint() == module.first_stage.fingerprint()


def test_training_goes_on_from_ours_and_from_released_layouts(tmp_path) -> None:
    source, buffers = diffusion(), NoiseSchedule().released_buffers()
    write_released(export_ldm(source.network, source.first_stage, buffers), tmp_path / "ldm.ckpt")
    module = diffusion(pretrained=str(tmp_path / "ldm.ckpt"), first_stage=None)
    assert equal(module.network.unet.state_dict(), source.network.unet.state_dict())
    assert equal(module.first_stage.state_dict(), source.first_stage.state_dict())
    ours = train(tmp_path, module, TinyData(2, 2), 1)
    again = diffusion(pretrained=str(ours), first_stage=str(ours))
    assert torch.equal(again.network.null_token, read(ours)["ema"]["network.null_token"])
    guide = classifier()
    write_released(export_alignment(guide.network, guide.first_stage, buffers, True), tmp_path / "align.ckpt")
    started = classifier(pretrained=str(tmp_path / "align.ckpt"))
    assert equal(started.network.state_dict(), guide.network.state_dict())
    whole = classifier(pretrained=str(tmp_path / "align.ckpt"), first_stage=None)  # its file holds a first stage
    assert equal(whole.first_stage.state_dict(), guide.first_stage.state_dict())


def test_a_released_network_is_not_guided_by_an_untrained_token(tmp_path) -> None:
    source = diffusion()
    write_released(
        export_ldm(source.network, source.first_stage, NoiseSchedule().released_buffers()), tmp_path / "ldm.ckpt"
    )
    trainer = trainer_of(tmp_path)
    for options in ({"pretrained": str(tmp_path / "ldm.ckpt")}, {"null_condition": "raw_zeros"}):
        with pytest.raises(UserError, match=r"guidance.null_condition: learned, but the network was not trained"):
            trainer.test(diffusion(guidance=GuidanceSettings(2.0), **options), TinyData(2))


def test_features_of_another_cavp_are_refused(tmp_path) -> None:
    def data(sha: str, pairs: bool) -> TinyData:
        made = TinyData(2, 2, pairs)
        made.save_hyperparameters({"features": {"sha": sha, "fps": 4.0}})
        return made

    for make, pairs in ((diffusion, False), (classifier, True)):
        path = train(tmp_path / f"{pairs}", make(), data("a", pairs), 1)
        trainer_of(tmp_path).validate(make(), data("a", pairs), ckpt_path=path, weights_only=True, verbose=False)
        with pytest.raises(UserError, match=r"data.features: has features of another CAVP \(sha b\) .*\(a\)"):
            trainer_of(tmp_path).validate(make(), data("b", pairs), ckpt_path=path, weights_only=True)
    other = data("a", False)
    other.hparams["features"]["fps"] = 8.0
    with pytest.raises(UserError, match=r"data.features: are of a CAVP .* format.fps 8.0, this stage has 4"):
        validate(diffusion(), other)


def test_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"condition_dropout: 1.5 is not in"):
        diffusion(condition_dropout=1.5)
    with pytest.raises(UserError, match=r"objective"):
        diffusion(objective="x0")
    with pytest.raises(UserError, match=r"sampler.name: dpm_solver, objective 'flow'"):
        diffusion("flow", sampler=None)
    path = train(tmp_path, diffusion(), TinyData(2, 2), 1)
    with pytest.raises(UserError, match=r"ckpt_path: the checkpoint was trained with objective eps, this model has v"):
        trainer_of(tmp_path / "v").validate(diffusion("v"), TinyData(2, 2), ckpt_path=path, weights_only=True)
    with pytest.raises(UserError, match=r"is of .*LatentDiffusion, expected one of .*AlignmentClassifier"):
        trainer_of(tmp_path / "a").validate(classifier(), TinyData(2, 2, True), ckpt_path=path, weights_only=True)
    for module in (diffusion(), classifier()):
        module.first_stage_from = None  # as if none had been given; those of the paper's size take seconds
        with pytest.raises(UserError, match=r"first_stage: none is given, so the latents would be those of random"):
            trainer_of(tmp_path).fit(module, TinyData(2, 2))
    for make in (diffusion, classifier):
        with pytest.raises(UserError, match=r"first_stage: .*absent.ckpt: no such file"):
            make(first_stage=str(tmp_path / "absent.ckpt"))
        with pytest.raises(UserError, match=r"pretrained: .*absent.ckpt: no such file"):
            make(pretrained=str(tmp_path / "absent.ckpt"))
    with pytest.raises(UserError, match=r"format.sample_rate: sample rate 8000 Hz, mel preset mel_ldm is for 16000 Hz"):
        LatentDiffusion(ClipFormat(sample_rate=8000), UNET, FIRST_STAGE)
    data = TinyData(2, 2)
    data.format = ClipFormat(**{**vars(FORMAT), "window_frames": 8})
    with pytest.raises(UserError, match=r"data: was made with format.window_frames 8, this stage has 4"):
        validate(diffusion(), data)
