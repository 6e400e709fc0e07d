"""Whole clips with their features, for SpecVQGAN."""

from pathlib import Path

import pytest
import torch

from datamodules.synthetic_video_audio import SMALL, MeanColours
from datamodules.video_audio_shards import make_shards
from datamodules.whole_clips import WholeClipDataModule
from mmtrain.config_errors import UserError
from tests.datamodules.test_video_audio import MAKER, opened, whole_mel


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "made"
    make_shards(path, MAKER, shard_size=4, workers=1)
    return path


def test_clips_are_whole_with_a_feature_of_each_frame(shards: Path) -> None:
    data = opened(WholeClipDataModule, shards, features=MeanColours())
    for batch in data.train_dataloader():
        assert set(batch) == {"mel", "features", "id"} and batch["mel"].shape[1] == 80
        for mel, features, clip in zip(batch["mel"], batch["features"], batch["id"], strict=True):
            assert len(features) == SMALL.frames and float(features[0, 0]) == pytest.approx(0, abs=0.5)
            assert mel.shape[1] == 1 + (round(SMALL.seconds * 22050) - 1) // 256
            assert clip in range(6)
    data = opened(WholeClipDataModule, shards, stage="test", features=MeanColours(), mel="mel_ldm")
    (loader,) = data.test_dataloader()
    batch = next(iter(loader))
    assert torch.equal(batch["mel"][0], whole_mel("test", 0, "mel_ldm"))
    assert batch["audio"].shape == (3, SMALL.samples) and batch["label"].tolist() == [0, 1, 2]
    assert [len(onsets) for onsets in batch["onsets"]] == [3, 3, 3] and len(batch["name"]) == 3


def test_features_may_be_left_out_and_presets_must_be_known(shards: Path) -> None:
    batch = next(iter(opened(WholeClipDataModule, shards, with_features=False).train_dataloader()))
    assert "features" not in batch
    with pytest.raises(UserError, match=r"mel preset: 'mel_cav' is unknown, .*did you mean mel_cavp"):
        WholeClipDataModule(str(shards), mel="mel_cav")
