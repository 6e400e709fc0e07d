"""The data modules of Diff-Foley on made clips whose pictures count frames and whose sound clicks with flashes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import feature_store
from datamodules.clip_batches import partners
from datamodules.clip_reader import ClipReader, fit_length
from datamodules.feature_store import FeatureStore, extract_features
from datamodules.loading import Draw
from datamodules.synthetic_video_audio import SMALL, MeanColours, SyntheticClips
from datamodules.video_audio import (
    AlignmentDataModule,
    ClipDataModule,
    ContrastiveDataModule,
    LatentDataModule,
    SoundClassDataModule,
)
from datamodules.video_audio_shards import decode_strip, decode_wav, encode_strip, encode_wav, make_shards, write_shard
from datamodules.video_audio_sources import open_source
from mmtrain.audio import clip_spectrogram, preset
from mmtrain.config_errors import UserError
from mmtrain.video_audio import Clip

MAKER = SyntheticClips()


class Stopped(MeanColours):
    """Is interrupted after so many calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def extract(self, frames: np.ndarray) -> np.ndarray:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().extract(frames)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "made"
    make_shards(path, MAKER, shard_size=4, workers=1)
    return path


def opened(kind: type[ClipDataModule], path: Path, stage: str = "fit", **settings: Any) -> Any:
    data = kind(str(path), **{"maker": MAKER, "batch_size": 2, "eval_batch_size": 3, "name": "made"} | settings)
    data.trainer = SimpleNamespace(
        state=SimpleNamespace(fn=stage),
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.prepare_data()
    data.setup(stage)
    return data


def whole_mel(split: str, index: int, name: str) -> torch.Tensor:
    """Spectrogram of a made clip as the WAV keeps it."""
    audio, _ = decode_wav(encode_wav(MAKER.clip(split, index).audio, 16000))
    return clip_spectrogram(audio, preset(name), SMALL.seconds)


def test_strip_and_wav_round_trip() -> None:
    clip = MAKER.clip("train", 0)
    assert np.abs(decode_strip(encode_strip(clip.frames)).astype(int) - clip.frames).mean() < 3
    audio, rate = decode_wav(encode_wav(clip.audio, 16000))
    assert rate == 16000 and np.abs(audio - clip.audio).max() < 1 / 32767
    with pytest.raises(UserError, match="a JPEG has at most"):
        encode_strip(np.zeros((300, 3, 1, 224), np.uint8))


def test_contrast_items_are_picture_and_sound_of_the_same_frames(shards) -> None:
    data = opened(ContrastiveDataModule, shards)
    assert data.loader_names == ["made"] and data.evaluation_sets["made"]["num_samples"] == 3
    for batch in data.train_dataloader():
        assert batch["video"].shape == (2, 3, 8, 3, 16, 16) and batch["mel"].shape == (2, 3, 128, 64)
        for video, mel, clip in zip(batch["video"], batch["mel"], batch["id"], strict=True):
            starts = (video[:, 0, 0].float().mean(dim=(1, 2)) / 10).round().long()
            assert (starts.diff() >= SMALL.min_shift_frames).all()
            for start, cut in zip(starts, mel, strict=True):
                assert torch.equal(cut, whole_mel("train", int(clip), "mel_cavp")[:, 8 * start : 8 * start + 64])
    (loader,) = data.val_dataloader()
    (batch,) = loader
    assert batch["video"].shape == (3, 8, 3, 16, 16) and batch["id"].tolist() == [0, 1, 2]
    assert (batch["video"][:, 0, 0].float().mean(dim=(1, 2)) / 10).round().tolist() == [8, 8, 8]  # centred


def test_latent_windows_have_features_and_sound_of_the_same_instant(shards) -> None:
    data = opened(LatentDataModule, shards, features=MeanColours(), split_merge=0.0, seed=3)
    for batch in data.train_dataloader():
        for mel, features, clip in zip(batch["mel"], batch["features"], batch["id"], strict=True):
            start = round(float(features[0, 0]))
            begin = round(start / SMALL.fps * SMALL.mel_rate)
            assert torch.equal(mel, whole_mel("train", int(clip), "mel_ldm")[:, begin : begin + 128])
            assert (features[:, 0].round() - start).tolist() == list(range(16))


def test_merged_windows_are_of_two_clips_without_a_gap(shards) -> None:
    data = opened(LatentDataModule, shards, features=MeanColours(), split_merge=1.0)
    seen = set()
    for epoch in range(4):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            assert batch["mel"].shape == (2, 128, 128) and batch["features"].shape == (2, 16, 3)
            jumps = (batch["features"][:, :, 0].round().diff(dim=1) != 1).sum(dim=1)
            assert (jumps <= 1).all()
            seen |= set(jumps.tolist())
    assert 1 in seen


def test_order_does_not_depend_on_processes_cache_or_place_of_resuming(shards) -> None:
    whole = list(opened(LatentDataModule, shards, features=MeanColours(), batch_size=4).train_dataloader())
    cached = opened(LatentDataModule, shards, features=MeanColours(), batch_size=4, cache=True).train_dataloader()
    for _ in range(2):  # the second time from memory
        assert all(torch.equal(a["mel"], b["mel"]) for a, b in zip(whole, cached, strict=True))
        cached.sampler.position = 0
    halves = []
    for rank in (0, 1):
        data = opened(LatentDataModule, shards, features=MeanColours(), batch_size=4)
        data.trainer.global_rank, data.trainer.world_size = rank, 2
        halves.append(next(iter(data.train_dataloader())))
    for key in ("mel", "features", "id"):
        assert torch.equal(torch.cat([half[key] for half in halves]), whole[0][key])
    first = opened(ContrastiveDataModule, shards).train_dataloader()
    batches = list(first)
    again = opened(ContrastiveDataModule, shards).train_dataloader()
    next(iter(again))
    resumed = opened(ContrastiveDataModule, shards).train_dataloader()
    resumed.load_state_dict(again.state_dict())
    assert all(torch.equal(a["mel"], b["mel"]) for a, b in zip(batches[1:], resumed, strict=True))


def test_test_batches_hold_all_that_metrics_need(shards) -> None:
    data = opened(LatentDataModule, shards, stage="test", features=MeanColours())
    batches = list(data.test_dataloader()[0])
    assert torch.cat([b["id"] for b in batches]).tolist() == [0, 1, 2, 3]
    for batch in batches:
        assert batch["audio"].shape[1:] == (SMALL.window_samples,) and batch["mel"].shape[1:] == (128, 128)
        for row, (index, name) in enumerate(zip(batch["id"].tolist(), batch["name"], strict=True)):
            clip = MAKER.clip("test", index)
            assert name == clip.id and int(batch["label"][row]) == clip.label
            inside = [t for t in clip.onsets if t < SMALL.window_seconds]
            assert batch["onsets"][row].tolist() == pytest.approx(inside)
            first = lambda key, row=row, batch=batch: round(float(batch[key][row, 0, 0]))  # noqa: E731
            assert first("features") == first("wrong_features") == 0 and first("shifted_features") >= 4
            assert len(batch["clip_features"][row]) == SMALL.frames and first("clip_features") == 0
            other = MAKER.clip("test", int(partners(4)[index]))
            assert other.id != name
            sound, _ = decode_wav(encode_wav(other.audio, 16000))
            assert np.array_equal(batch["other_audio"][row], sound[: SMALL.window_samples])
            own = whole_mel("test", int(partners(4)[index]), "mel_ldm")[:, :128]
            assert torch.equal(batch["other_mel"][row], own)
            flashes = np.isin(np.arange(16), np.round(np.array(other.onsets) * SMALL.fps))
            assert (batch["wrong_features"][row, :, 2].numpy() > 0.5).tolist() == flashes.tolist()
    repeated = opened(LatentDataModule, shards, stage="test", features=MeanColours(), seed=5)
    again = next(iter(repeated.test_dataloader()[0]))
    for key in ("shifted_features", "wrong_features", "other_audio"):
        assert torch.equal(again[key], batches[0][key])


@pytest.mark.parametrize("num", [2, 3, 50])
def test_partners_are_one_cycle_over_the_set(num: int) -> None:
    chosen, place, seen = partners(num), 0, set()
    for _ in range(num):
        place = int(chosen[place])
        seen.add(place)
    assert place == 0 and len(seen) == num and np.array_equal(chosen, partners(num))
    assert num < 50 or not np.array_equal(chosen, partners(num, seed=1))


def test_a_broken_partner_does_not_take_a_clip_with_it(tmp_path) -> None:
    clips = [MAKER.clip("train", i) for i in range(3)]
    clips[1].audio = None
    write_shard(tmp_path / "test-00000.tar", clips, SMALL)
    data = opened(LatentDataModule, tmp_path, stage="test", maker=None, format=SMALL, with_features=False)
    (batch,) = data.test_dataloader()[0]
    assert batch["id"].tolist() == [0, 2] and torch.equal(batch["other_audio"], batch["audio"].flip(0))


def test_pairs_come_in_their_proportions_and_kinds(shards) -> None:
    data = opened(AlignmentDataModule, shards, features=MeanColours(), cache=True)
    dataset = data._datasets["train"]
    batch = dataset[[Draw(i % 6, 0, i, i) for i in range(800)]]
    shares = torch.bincount(batch["kind"], minlength=3) / 800
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.05)
    assert torch.equal(batch["match"], (batch["kind"] == 0).float())
    for mel, features, kind, clip in zip(*(batch[k] for k in ("mel", "features", "kind", "id")), strict=True):
        full = whole_mel("train", int(clip), "mel_ldm") if kind < 2 else None
        start = round(float(features[0, 0]))
        if kind == 0:
            begin = round(start / SMALL.fps * SMALL.mel_rate)
            assert torch.equal(mel, full[:, begin : begin + 128])
        elif kind == 1:
            begins = [b for b in range(full.shape[1] - 127) if torch.equal(mel, full[:, b : b + 128])]
            assert abs(begins[0] / SMALL.mel_rate - start / SMALL.fps) >= 0.5 - 0.01
        if clip > 2:
            break  # a few of each kind were seen
    kinds = torch.cat([b["kind"] for b in data.val_dataloader()[0]])
    assert torch.bincount(kinds).tolist() == [6, 3, 3]


def test_sound_classes_come_at_the_rate_of_their_preset(shards) -> None:
    batch = next(iter(opened(SoundClassDataModule, shards).train_dataloader()))
    assert batch["mel"].shape == (2, 80, 176) and batch["label"].tolist() == [int(i) % 3 for i in batch["id"]]
    pitch_bins = batch["mel"].mean(dim=2).argmax(dim=1)
    order = batch["label"].argsort()
    assert pitch_bins[order].tolist() == sorted(pitch_bins.tolist())  # a higher class is a higher pitch


def test_features_are_kept_and_go_on_where_they_were_stopped(shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(feature_store, "STEP", 2)
    source = open_source(shards, "train", SMALL)
    with pytest.raises(KeyboardInterrupt):
        extract_features(tmp_path / "f", source, Stopped(1), SMALL)
    store = extract_features(tmp_path / "f", source, Stopped(2), SMALL)  # three calls are enough for six clips
    assert store.done.all()
    extract_features(tmp_path / "f", source, Stopped(0), SMALL)
    (clip,) = source.read([4], {"frames"})
    assert np.allclose(store.read(4, clip.id), MeanColours().extract(clip.frames))
    with pytest.raises(UserError, match="the data have 'other' there"):
        store.read(4, "other")
    data = opened(LatentDataModule, shards, features=str(tmp_path / "f"), val_split="train")
    assert next(iter(data.train_dataloader()))["features"].shape == (2, 16, 3)
    with pytest.raises(UserError, match=r"features of 6 clips, .* has 4"):
        opened(LatentDataModule, shards, stage="test", features=str(tmp_path / "f"))
    with pytest.raises(UserError, match=r"has 0 stores of split train"):
        opened(LatentDataModule, shards, features=str(tmp_path))


def test_bad_features_are_refused_by_name(shards, tmp_path) -> None:
    class Broken(MeanColours):
        def extract(self, frames: np.ndarray) -> np.ndarray:
            return np.where(frames[..., 0, 0] > 230, np.nan, 1.0)

    class Short(MeanColours):
        def extract(self, frames: np.ndarray) -> np.ndarray:
            return np.zeros((len(frames), 3, 2), np.float32)

    source = open_source(shards, "train", SMALL)
    with pytest.raises(UserError, match=r"features.npy: clip train_00000: the features hold NaN"):
        extract_features(tmp_path / "a", source, Broken(), SMALL)
    longer = replace(SMALL, seconds=4.0)
    store = extract_features(tmp_path / "c", source, MeanColours(), SMALL)
    with pytest.raises(UserError, match=r"features of 24 frames a clip, format.fps 8 and format.seconds 4 make 32"):
        FeatureStore(store.folder, source, longer)
    stored = MAKER.clip("train", 0)
    stored.features = np.full((24, 2), np.nan, np.float32)
    write_shard(tmp_path / "train-00000.tar", [stored], SMALL)
    with pytest.raises(UserError, match=r"train-00000.tar: train_00000: the stored features hold NaN"):
        open_source(tmp_path, "train", SMALL).read([0], {"features"})
    with pytest.raises(UserError, match=r"gives \[3, 2\] for 24 frames"):
        extract_features(tmp_path / "b", source, Short(), SMALL)
    with pytest.raises(UserError, match=r"no features: give data.features"):
        opened(LatentDataModule, shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 4.0, "contrast_frames": 4, "window_frames": 8}, r"source.json: fps 8.0, format.fps is 4.0"),
        ({"frame_size": 32}, r"frame_size 16, format.frame_size is 32"),
        ({"sample_rate": 32000}, r"sample_rate 16000, format.sample_rate is 32000"),
        ({"seconds": 4.0}, r"clips of 3.0 s, shorter than format.seconds 4.0"),
    ],
)
def test_shards_of_another_format_are_refused(shards, change, message) -> None:
    with pytest.raises(UserError, match=message):
        opened(ContrastiveDataModule, shards, format=replace(SMALL, **change), maker=None)


def test_shards_of_another_maker_or_none_are_refused(shards, tmp_path) -> None:
    with pytest.raises(UserError, match=r"'seed': 0.* data.maker says .*'seed': 1"):
        opened(ContrastiveDataModule, shards, maker=SyntheticClips(seed=1))
    with pytest.raises(UserError, match=r"does not exist and no data.maker"):
        opened(ContrastiveDataModule, tmp_path / "nowhere", maker=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips of split train; looked for"):
        opened(ContrastiveDataModule, tmp_path / "empty", maker=None)
    with pytest.raises(UserError, match=r"window_mel_frames: 256 are 4.096 s"):
        LatentDataModule(str(shards), format=replace(SMALL, window_mel_frames=256))


def test_windows_may_be_cut_otherwise_than_the_maker_says(shards) -> None:
    wider = SyntheticClips(format=replace(SMALL, contrast_frames=12))
    assert opened(ContrastiveDataModule, shards, maker=wider, clips=2).format.contrast_frames == 12


def test_without_a_validation_split_a_part_of_the_training_clips_is_kept(tmp_path) -> None:
    maker = SyntheticClips({"train": 10})
    make_shards(tmp_path / "a", maker, workers=1)
    data = opened(ContrastiveDataModule, tmp_path / "a", maker=maker, val_fraction=0.3)
    train, kept = (data._datasets[role].reader.source.positions for role in ("train", "val"))
    assert len(kept) == 3 and sorted([*train, *kept]) == list(range(10))


def test_short_and_broken_clips(tmp_path) -> None:
    short = MAKER.clip("train", 0)
    short = Clip("short", short.frames[:8], short.audio[:16000], label=0, onsets=[0.25])
    fit_length(short, SMALL)
    assert short.frames.shape[0] == 24 and np.array_equal(short.frames[8:16], short.frames[:8])
    assert np.array_equal(short.audio[16000:32000], short.audio[:16000]) and short.onsets == [0.25, 1.25, 2.25]
    almost = Clip("almost", audio=np.ones(47000, np.float32))  # less than a frame is missing: silence
    fit_length(almost, SMALL)
    assert len(almost.audio) == 48000 and not almost.audio[47000:].any()

    whole = [MAKER.clip("train", i) for i in range(3)]
    silent = Clip("silent", whole[1].frames, label=1)
    empty = Clip("empty", whole[1].frames, np.zeros(10, np.float32))
    write_shard(tmp_path / "train-00000.tar", [whole[0], silent, empty, whole[2]], SMALL)
    reader = ClipReader(open_source(tmp_path, "train", SMALL), SMALL, {"frames"}, "mel_cavp")
    assert [getattr(clip, "reason", clip.__class__.__name__) for clip in reader.read(range(4))] == [
        "Clip", "without_audio", "too_short", "Clip"
    ]  # fmt: skip
    data = opened(ContrastiveDataModule, tmp_path, maker=None, format=SMALL, val_fraction=0.01, max_lost=1.0)
    batch = data._datasets["train"][[Draw(i, 0, 0, i) for i in range(3)]]
    assert len(batch["video"]) == 3 and sum(batch["skipped"].values()) >= 1
