"""Training of CAVP on made clips, its checkpoints and features, bad input, retrieval values, weights from elsewhere."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mmtrain.config_errors import UserError
from mmtrain.difffoley.cavp import Cavp, CavpNetwork
from mmtrain.difffoley.clip_retrieval import ClipRetrieval, retrieval_values
from mmtrain.difffoley.features import CavpFeatures, frame_groups, load_cavp
from mmtrain.difffoley.pretrained_cavp import export_cavp, load_kinetics, load_panns
from mmtrain.difffoley.slowonly import SlowOnly
from mmtrain.optim import AdamWSettings
from mmtrain.video_audio import ClipFormat

FORMAT = ClipFormat(fps=8, seconds=2, frame_size=32, contrast_frames=4, window_frames=8, window_mel_frames=64)
SIZES = {"width": 4, "audio_width": 4, "feature_dim": 16}


def made_clip(number: int, moment: int) -> tuple[Tensor, Tensor]:
    """4 frames that light up in a colour at a moment, and 32 mel frames with a band of that colour at that moment."""
    frames = torch.full((4, 3, 32, 32), 20, dtype=torch.uint8)
    frames[moment, number % 3, :, :] = 230
    mel = torch.full((128, 32), 0.1)
    mel[40 * (number % 3) : 40 * (number % 3) + 30, 8 * moment : 8 * moment + 8] = 0.9
    return frames, mel


class MadeClips(pl.LightningDataModule):
    """Three colours; training items have 2 clips that differ in their moment."""

    def __init__(self, format: ClipFormat = FORMAT) -> None:
        super().__init__()
        self.format, self.missing, self.data_counts = format, {}, {}
        self.evaluation_sets = {"made": {"num_samples": 3}}
        self.loader_names = ["made"]

    def train_dataloader(self) -> DataLoader:
        clips = [[made_clip(number, moment) for moment in (0, 2)] for number in range(3)]
        items = [{"video": torch.stack([c[0] for c in v]), "mel": torch.stack([c[1] for c in v])} for v in clips]
        return DataLoader(items, batch_size=3)

    def val_dataloader(self) -> DataLoader:
        clips = [made_clip(number, number % 2) for number in range(3)]
        items = [{"video": c[0], "mel": c[1], "id": torch.tensor(i)} for i, c in enumerate(clips)]
        return DataLoader([*items, items[0]], batch_size=2)  # a clip that comes twice counts once

    test_dataloader = val_dataloader


def made_trainer(folder: Path, **settings) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=folder, accelerator="cpu", enable_checkpointing=False, **quiet, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cavp, Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("cavp")
    torch.manual_seed(0)
    module = Cavp(format=FORMAT, **SIZES, optim=AdamWSettings(lr=3e-3, schedule="constant", warmup_steps=1))
    trainer = made_trainer(folder, max_epochs=25, check_val_every_n_epoch=25)
    trainer.fit(module, datamodule=MadeClips())
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.save_checkpoint(folder / "cavp.ckpt")
    return module, folder / "cavp.ckpt", values


def test_it_learns_which_clip_and_when(trained) -> None:
    _, _, values = trained
    assert values["train/semantic"] < 0.7 * np.log(6)
    assert values["train/temporal"] < 0.6 * np.log(2)
    assert {"val/made/v2a_r1", "val/made/a2v_r10", "val/made/v2a_median_rank", "val/made/a2v_mean_rank"} <= set(values)


def test_test_reports_with_chance_and_protocol(trained, tmp_path: Path) -> None:
    _, checkpoint, _ = trained
    module = Cavp(format=FORMAT, **SIZES)
    trainer = made_trainer(tmp_path)
    trainer.test(module, datamodule=MadeClips(), ckpt_path=str(checkpoint), verbose=False)
    assert module.trained["step"] == 25
    assert module.chance_levels()["test/made/v2a_r1"] == pytest.approx(1 / 3)
    assert module.chance_levels().keys() == trainer.callback_metrics.keys()
    assert "0.5 s" in module.protocols()["made"]


def test_the_logit_scale_is_kept_in_its_range(tmp_path: Path) -> None:
    module = Cavp(format=FORMAT, **SIZES, optim=AdamWSettings(lr=1e-3, schedule="constant"))
    with torch.no_grad():
        module.network.logit_scale.fill_(9.0)
    made_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=MadeClips())
    assert module.network.logit_scale.item() == pytest.approx(np.log(100))


def test_data_that_were_cut_otherwise_are_refused(tmp_path: Path) -> None:
    module = Cavp(format=FORMAT, **SIZES)
    other = MadeClips(ClipFormat(fps=4, seconds=4, frame_size=32, contrast_frames=4, window_frames=8))
    with pytest.raises(UserError, match=r"data\.format: .*format\.fps 4"):
        made_trainer(tmp_path, max_steps=1).fit(module, datamodule=other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intra_weight": -1.0}, "intra_weight: -1.0"),
        ({"micro_batch": 1}, "micro_batch: 1"),
        ({"pretrained": "a.ckpt", "panns": "b.pth"}, "not both"),
        ({"pretrained": "nowhere.ckpt"}, "pretrained: nowhere.ckpt"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Cavp(format=FORMAT, **SIZES, **settings)


def test_features_load_from_ours_and_the_released_layout(trained, tmp_path: Path) -> None:
    module, checkpoint, _ = trained
    network, stored = load_cavp(str(checkpoint))
    assert stored == FORMAT
    export_cavp(module.network.state_dict(), tmp_path / "released.pt")
    other, paper = load_cavp(str(tmp_path / "released.pt"))
    assert paper == ClipFormat()  # a released file does not tell
    for name, value in module.network.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value)
        torch.testing.assert_close(other.state_dict()[name], value)
    resumed = Cavp(format=FORMAT, **SIZES, pretrained=str(tmp_path / "released.pt"))
    torch.testing.assert_close(resumed.network.logit_scale, module.network.logit_scale)
    with pytest.raises(UserError, match=r"pretrained: .*does not fit .*width"):
        Cavp(format=FORMAT, **SIZES | {"width": 8}, pretrained=str(checkpoint))


def test_overlapping_groups_equal_one_pass(trained) -> None:
    _, checkpoint, _ = trained
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (61, 3, 32, 32), dtype=torch.uint8, generator=generator)
    extractor = CavpFeatures(str(checkpoint), group_frames=24, format=FORMAT, device="cpu")
    with torch.no_grad():
        whole = extractor.network.encode_video(frames[None].float() / 255)[0]
    torch.testing.assert_close(extractor.extract(frames.numpy()), whole, atol=1e-5, rtol=0)
    together = extractor.extract(torch.stack([frames, frames.flip(0)]))
    torch.testing.assert_close(together[1], extractor.extract(frames.flip(0)), atol=1e-5, rtol=0)
    seams = CavpFeatures(str(checkpoint), group_frames=24, overlap=0, device="cpu")
    with torch.no_grad():
        parts = [extractor.network.encode_video(part[None].float() / 255)[0] for part in frames.split(24)]
    torch.testing.assert_close(seams.extract(frames), torch.cat(parts), atol=1e-5, rtol=0)
    assert not torch.allclose(seams.extract(frames)[23:25], whole[23:25], atol=1e-4)
    assert extractor.describe()["sha"] == seams.describe()["sha"] and extractor.describe() != seams.describe()


@pytest.mark.parametrize("frames", [1, 24, 25, 40, 41, 100])
@pytest.mark.parametrize(("size", "context"), [(24, 9), (24, 0), (19, 9), (40, 3)])
def test_groups_cover_every_frame_once(frames: int, size: int, context: int) -> None:
    groups = frame_groups(frames, size, context)
    assert [index for _, _, first, last in groups for index in range(first, last)] == list(range(frames))
    for start, end, first, last in groups:
        assert 0 <= start <= first < last <= end <= frames and end - start <= size
        assert start == 0 or first - start >= context
        assert end == frames or end - last >= context


def test_features_refuse_what_does_not_fit(trained) -> None:
    path = str(trained[1])
    other = ClipFormat(fps=4, seconds=4, frame_size=32, contrast_frames=4, window_frames=8)
    with pytest.raises(UserError, match=r"cavp\.ckpt: was trained with format\.fps 8"):
        CavpFeatures(path, format=other)
    with pytest.raises(UserError, match=r"cavp\.ckpt: .*frame_size 32.*64"):
        CavpFeatures(path, device="cpu").extract(np.zeros((4, 3, 64, 64), np.uint8))
    with pytest.raises(UserError, match=r"checkpoint: .*cavp\.ckpt: was given a video without frames"):
        CavpFeatures(path, device="cpu").extract(np.zeros((0, 3, 32, 32), np.uint8))
    broken = CavpFeatures(path, device="cpu")
    broken.network.video_project_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"checkpoint: .*cavp\.ckpt: gives features with NaN"):
        broken.extract(np.zeros((4, 3, 32, 32), np.uint8))
    with pytest.raises(UserError, match="group_frames: 18"):
        CavpFeatures(path, group_frames=18)
    with pytest.raises(UserError, match="nowhere"):
        CavpFeatures("nowhere.ckpt")


def test_encoders_start_from_kinetics_and_panns(tmp_path: Path) -> None:
    network = CavpNetwork(4, 4, 16)
    video = {f"backbone.{k}": torch.full_like(v, 2) for k, v in network.video_encoder.state_dict().items()}
    torch.save({"state_dict": video | {"cls_head.fc_cls.weight": torch.ones(3)}}, tmp_path / "kinetics.pth")
    load_kinetics(network.video_encoder, tmp_path / "kinetics.pth")
    assert all((value == 2).all() for value in network.video_encoder.state_dict().values())
    own = {k: v.clone() for k, v in network.spec_encoder.state_dict().items()}
    audio = {k: torch.full_like(v, 3) for k, v in own.items() if not k.startswith(("bn.", "final_project."))}
    extra = {"bn0.weight": torch.ones(64), "logmel_extractor.melW": torch.ones(2), "fc_audioset.bias": torch.ones(2)}
    torch.save({"model": audio | extra}, tmp_path / "panns.pth")
    fresh = load_panns(network.spec_encoder, tmp_path / "panns.pth")
    assert {key.split(".")[0] for key in fresh} == {"bn", "final_project"}
    for key, value in network.spec_encoder.state_dict().items():
        assert torch.equal(value, own[key]) if key in fresh else (value == 3).all()
    with pytest.raises(UserError, match=r"kinetics: .*panns\.pth: does not fit"):
        load_kinetics(SlowOnly(4), tmp_path / "panns.pth")


def test_retrieval_values_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(2)
    video, audio = (F.normalize(torch.randn(11, 4, generator=generator), dim=-1) for _ in range(2))
    audio = F.normalize(audio + 0.6 * video, dim=-1)
    metric = ClipRetrieval()
    ids = torch.arange(11)
    metric.update(video[:6] * 3, audio[:6], ids[:6])
    metric.update(video[4:], audio[4:], torch.where(ids[4:] == 5, -1, ids[4:]))  # 4 comes twice, 5 as padding
    values = metric.compute()
    for way, scores in (("v2a", video @ audio.T), ("a2v", audio @ video.T)):
        ranks = np.array([int((row >= row[i]).sum()) for i, row in enumerate(scores)])
        assert values[f"{way}_mean_rank"].item() == pytest.approx(ranks.mean())
        assert values[f"{way}_median_rank"].item() == np.floor(np.median(ranks))
        assert values[f"{way}_r5"].item() == pytest.approx((ranks <= 5).mean())
    same = torch.ones(5, 4)
    assert retrieval_values(same, same)["v2a_r1"] == 0  # collapsed features do not look good
    assert retrieval_values(same * torch.nan, same)["a2v_mean_rank"] == 5
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert ClipRetrieval().compute()["v2a_r1"].isnan()
