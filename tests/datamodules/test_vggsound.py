"""Videos to shards, the layouts of the release, and videos for predict."""

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.clip_reader import ClipReader
from datamodules.synthetic import write_shard
from datamodules.synthetic_video_audio import SMALL, SyntheticClips
from datamodules.tools import main
from datamodules.vggsound import Row, vggsound_rows, write_vggsound
from datamodules.video_audio_shards import decode_wav, encode_strip, encode_wav
from datamodules.video_audio_sources import ReleasedFiles, ReleasedShards, open_source
from datamodules.video_files import VideoFiles
from datamodules.video_folder import VideoFolderDataModule
from mmtrain.audio import clip_spectrogram, preset
from mmtrain.config_errors import UserError
from mmtrain.media import write_video
from mmtrain.video_audio import ClipFormat

FORMAT = replace(SMALL, fps=4.0, seconds=2.0, contrast_frames=4, window_frames=4, window_mel_frames=64)
MAKER = SyntheticClips({"train": 4}, replace(SMALL, seconds=2.0, frame_size=32, window_mel_frames=64))
ARGUMENTS = ["--fps", "4", "--size", "16", "--seconds", "2", "--workers", "1", "--shard-size", "2"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 2 s, one file that is none, one without sound, and VGGSound's list of them."""
    folder = tmp_path_factory.mktemp("videos")
    names = ["abc-_1_000030", "def_30", "ghi_30000_40000"]
    for index, name in enumerate(names):
        clip = MAKER.clip("train", index)
        write_video(folder / f"{name}.mp4", clip.frames, 8.0, clip.audio)
    write_video(folder / "silent.mp4", MAKER.clip("train", 3).frames, 8.0)
    (folder / "broken_000001.mp4").write_bytes(b"no video")
    rows = [
        ("abc-_1", 30, "dog, barking", "train"),
        ("def", 30, "bell", "train"),
        ("gone", 7, "bell", "train"),
        ("broken", 1, "bell", "train"),
        ("silent", 5, "bell", "train"),
        ("ghi", 30, "bell", "test"),
    ]
    with open(folder / "vggsound.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def written(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "shards"
    assert main(["vggsound", str(videos), str(out), "--csv", str(videos / "vggsound.csv"), *ARGUMENTS]) == 0
    return out


def test_videos_become_shards_and_failures_are_listed(written: Path) -> None:
    assert (written / "train_ids.txt").read_text().split() == ["abc-_1_000030", "def_000030"]
    assert (written / "test_ids.txt").read_text().split() == ["ghi_000030"]
    with open(written / "failures.csv") as file:
        failures = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert set(failures) == {"gone_000007", "broken_000001", "silent_000005"}
    assert failures["gone_000007"] == "no such file" and "silent.mp4" in failures["silent_000005"]
    train, test = (open_source(written, split, FORMAT) for split in ("train", "test"))
    assert (len(train), len(test), train.class_names) == (2, 1, ["bell", "dog, barking"])
    first, second = train.read([0, 1], {"frames", "audio"})
    assert (first.id, first.label, second.label) == ("abc-_1_000030", 1, 0)
    assert first.frames.shape == (8, 3, 16, 16) and first.audio.shape == (32000,)
    expected = MAKER.clip("train", 0)
    assert np.abs(first.frames[:, 0].mean((1, 2)) - expected.frames[::2, 0].mean((1, 2))).max() < 12
    assert np.corrcoef(first.audio, expected.audio)[0, 1] > 0.9


def test_a_stopped_call_goes_on_and_other_settings_are_refused(videos: Path, written: Path, tmp_path: Path) -> None:
    rows = vggsound_rows(videos, videos / "vggsound.csv")
    form = ClipFormat(fps=4, seconds=2, frame_size=16, contrast_frames=8, window_frames=8)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_vggsound(rows, tmp_path, form, 2, 1, stop)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert before and open_source(tmp_path, "train", FORMAT).warnings
    result = write_vggsound(rows, tmp_path, form, 2, 1)
    assert result.counts == {"test": 1, "train": 2} and len(result.failures) == 3
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in before.items())
    assert json.loads((tmp_path / "source.json").read_text())["complete"]
    with pytest.raises(UserError, match="was written with another format"):
        write_vggsound(rows, tmp_path, replace(form, frame_size=8), 2, 1)
    with pytest.raises(UserError, match="was written with another source"):
        write_vggsound(rows[:-1], tmp_path, form, 2, 1)


def test_mistakes_in_the_list_are_named(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"bad.csv: line 1: \['a', 'b'\]: wanted are youtube id"):
        vggsound_rows(videos, tmp_path / "bad.csv")
    (tmp_path / "other.csv").write_text("zzz,1,bell,train\n")
    with pytest.raises(UserError, match=r"none of the 1 clips of .*, such as zzz_000001.mp4"):
        vggsound_rows(videos, tmp_path / "other.csv")
    assert main(["vggsound", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    for text, message in [
        ("path,start\na.mp4,soon\n", "line 2: start: soon: must be seconds"),
        ("file\na.mp4\n", r"a column `path` is wanted"),
        ("path,split\n", "no lines"),
        ("path\na.mp4\na.mp4\n", "2 clips of split train are named a: rename"),
    ]:
        (tmp_path / "set.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            vggsound_rows(tmp_path / "set.csv", None)
    with pytest.raises(UserError, match=r"none\.csv: no such file"):
        vggsound_rows(tmp_path / "none.csv", None)
    (tmp_path / "set.csv").write_text("\ufeffpath,start,split\na.mp4,,valid\na.mp4,30,train\n", encoding="utf-8")
    rows = vggsound_rows(tmp_path / "set.csv", None)
    assert [(row.id, row.split, row.start) for row in rows] == [("a", "valid", 0.0), ("a_30", "train", 30.0)]


def test_files_of_one_name_in_several_folders_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.mp4").touch()
        (tmp_path / folder / "._1.mp4").touch()  # as macOS leaves them
    assert [row.id for row in vggsound_rows(tmp_path, None)] == ["a/1", "b/1"]


def test_a_file_that_comes_later_is_taken_in(videos: Path, tmp_path: Path) -> None:
    form = ClipFormat(fps=4, seconds=2, frame_size=16, contrast_frames=8, window_frames=8)
    rows = [Row("one", videos / "def_30.mp4", "train"), Row("two", tmp_path / "two.mp4", "train")]
    first = write_vggsound(rows, tmp_path / "out", form, 2, 1)
    assert first.counts == {"train": 1} and first.failures[0][2] == "no such file"
    shutil.copy(videos / "ghi_30000_40000.mp4", tmp_path / "two.mp4")
    second = write_vggsound(rows, tmp_path / "out", form, 2, 1)
    assert second.counts == {"train": 2} and not second.failures


def test_videos_can_be_read_as_they_are(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text(
        f"path,label\n{videos}/def_30.mp4,bell\n{videos}/broken_000001.mp4,bell\n{videos}/abc-_1_000030.mp4,dog\n"
    )
    source = open_source(tmp_path / "set.csv", "train", FORMAT)
    assert isinstance(source, VideoFiles) and open_source(tmp_path / "set.csv", "test", FORMAT) is None
    clips = ClipReader(source, FORMAT, {"frames"}, "mel_cavp").read([0, 1, 2])
    assert clips[1].reason == "unreadable_video" and [clips[0].label, clips[2].label] == [0, 1]
    assert clips[0].frames.shape == (8, 3, 16, 16) and clips[0].mel.shape == (128, 128)
    assert len(open_source(videos, "train", FORMAT)) == 5


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_released_stage_1_shards(tmp_path: Path) -> None:
    maker = SyntheticClips({"train": 2}, replace(SMALL, fps=4.0, seconds=4.0, contrast_frames=4, window_frames=4))
    form = maker.format
    samples, mels = [], []
    for index in range(2):
        clip = maker.clip("train", index)
        mels.append(clip_spectrogram(clip.audio, preset("mel_cavp"), 4.0).numpy())
        strip = encode_strip(clip.frames)
        samples.append({"__key__": f"vid{index}_00", "spec.npy": _npy(mels[-1]), "video.jpg": strip})
    (tmp_path / "Train").mkdir()
    write_shard(tmp_path / "Train" / "vggsound-000000.tar", samples, stats=False)
    source = open_source(tmp_path, "train", form)
    assert isinstance(source, ReleasedShards)
    clips = ClipReader(source, form, {"frames"}, "mel_cavp").read([0, 1])
    assert [clip.id for clip in clips] == ["vid0_00", "vid1_00"] and np.array_equal(clips[1].mel, mels[1])
    with pytest.raises(UserError, match="has spectrograms of mel_cavp and no sound; this stage needs mel_ldm"):
        ClipReader(source, form, (), "mel_ldm")
    with pytest.raises(UserError, match=r"have about 4 frames a second of sound, format.fps is 8"):
        open_source(tmp_path, "train", replace(form, fps=8.0, seconds=2.0, contrast_frames=8))
    with pytest.raises(UserError, match=r"frame_size 16, format.frame_size is 32"):
        open_source(tmp_path, "train", replace(form, frame_size=32)).read([0], {"frames"})
    wrong = clip_spectrogram(maker.clip("train", 0).audio, preset("mel_ldm"), 4.0).numpy()
    (tmp_path / "Test").mkdir()
    write_shard(tmp_path / "Test" / "vggsound-000000.tar", [samples[0] | {"spec.npy": _npy(wrong)}], stats=False)
    with pytest.raises(UserError, match=r"250 mel frames .* are of preset mel_ldm; here mel_cavp with 256"):
        open_source(tmp_path, "test", form)


def test_released_stage_2_files(tmp_path: Path) -> None:
    form = ClipFormat(seconds=10.0)
    names, numbers = ["a_1", "b_2", "c_3"], np.random.default_rng(0)
    (tmp_path / "split_txt").mkdir()
    (tmp_path / "split_txt" / "Train.txt").write_text("\n".join(names) + "\n")
    for folder in (tmp_path / "Train" / "audio_npy_spec", tmp_path / "CAVP_feat" / "Train"):
        folder.mkdir(parents=True)
    for name, frames in zip(names[:2], (625, 625), strict=True):
        mel = numbers.random((128, frames), np.float32)
        np.save(tmp_path / "Train" / "audio_npy_spec" / f"{name}_mel.npy", mel)
        np.savez(tmp_path / "CAVP_feat" / "Train" / f"{name}.npz", feat=numbers.random((37, 512), np.float32))
    source = open_source(tmp_path, "train", form)
    assert isinstance(source, ReleasedFiles) and len(source) == 3
    reader = ClipReader(source, form, {"features"}, "mel_ldm")
    clip, missing = reader.read([0, 2])
    assert clip.mel.shape == (128, 625) and missing.reason == "missing_file"
    assert clip.features.shape == (40, 512) and np.array_equal(clip.features[37:], clip.features[:3])
    with pytest.raises(UserError, match=r"have about 3.7 features a second of sound, format.fps is 8"):
        open_source(tmp_path, "train", ClipFormat(fps=8.0))
    np.save(tmp_path / "Train" / "audio_npy_spec" / "b_2_mel.npy", numbers.random((128, 640), np.float32))
    with pytest.raises(UserError, match=r"b_2_mel.npy: 640 mel frames .* are of preset mel_cavp"):
        reader.read([1])
    np.savez(tmp_path / "CAVP_feat" / "Train" / "a_1.npz", feat=np.full((40, 512), np.inf))
    with pytest.raises(UserError, match=r"Train.txt: a_1: the stored features hold NaN or infinity"):
        reader.read([0])


def test_videos_for_predict(videos: Path, tmp_path: Path) -> None:
    data = VideoFolderDataModule(str(videos), FORMAT)
    data.setup("predict")
    assert data.paths[0].name == "abc-_1_000030.mp4" and len(data.paths) == 4
    assert "broken_000001.mp4" in next(iter(data.missing))
    batch = next(iter(data.predict_dataloader()))
    assert batch["frames"].shape == (8, 3, 16, 16) and batch["frames"].dtype == torch.uint8
    assert batch["path"].endswith("abc-_1_000030.mp4") and (batch["fps"], batch["seconds"]) == (4.0, 2.0)
    with pytest.raises(UserError, match="no video files there"):
        VideoFolderDataModule(str(tmp_path / "*.mp4"), FORMAT).setup("predict")


def test_a_broken_wav_is_no_error_of_the_user() -> None:
    with pytest.raises(ValueError, match="not a PCM WAV"):
        decode_wav(encode_wav(np.zeros(4, np.float32), 16000)[:20])
