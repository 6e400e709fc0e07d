"""Data that go bad while a training reads them: shards that vanish or shrink, stores that do not answer, NaN in arrays.

Each has one outcome: lost samples are counted and replaced up to `max_lost`; more, or a store that is down, ends the
run with a message and exit code 2; what is broken for good is named before the first step.
"""

import csv
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import zarr

from datamodules import loading, stores
from datamodules.clip_reader import ClipReader
from datamodules.image_text import ImageTextDataset
from datamodules.loading import EvaluationLoader, TrainLoader
from datamodules.pictures import Pictures
from datamodules.sources import ShardSource
from datamodules.synthetic import write_pairs, write_shard
from datamodules.synthetic_video_audio import SMALL, SyntheticClips
from datamodules.video_audio_shards import encode_clip, make_shards
from datamodules.video_audio_sources import open_source
from mmtrain.__main__ import main
from mmtrain.config_errors import UserError
from tests.datamodules.test_shards import Ranges
from tests.small_trainings import write_training

PICTURES = Pictures(size=16, crop_scale=None, context_length=8)


def batches(source: ShardSource, size: int = 4, **options: Any) -> tuple[list[dict[str, torch.Tensor]], dict[str, int]]:
    """An epoch of training batches, and what was counted."""
    loader = TrainLoader(ImageTextDataset(source, PICTURES, training=True), size, **options)
    return list(loader), dict(loader.counts)


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# ------------------------------------------------------------------------------------------------ shards on disk


def cut(path: str) -> None:
    os.truncate(path, 0)


SHARD = 40


@pytest.mark.parametrize(("damage", "num_workers"), [(os.unlink, 2), (cut, 0)])
def test_one_shard_of_many_that_goes_while_it_is_read_costs_its_samples_only(tmp_path, damage, num_workers) -> None:
    paths = write_pairs(tmp_path / "shards", [SHARD] * 26, size=16)
    source = ShardSource(paths)
    damage(paths[7])  # after the index was made
    read, counts = batches(source, SHARD, max_lost=0.05, num_workers=num_workers)
    assert len(read) == 26 and counts == {"read": 26 * SHARD, "unreadable_shard": SHARD}  # each counted once
    with pytest.raises(UserError, match=r"samples read could not be used \(unreadable_shard \d+\), more than max_lost"):
        batches(source, SHARD, num_workers=num_workers)


def test_samples_of_a_lost_shard_are_replaced_by_different_ones(tmp_path) -> None:
    paths = write_pairs(tmp_path / "shards", [SHARD] * 3, size=16)
    source = ShardSource(paths)
    os.unlink(paths[1])
    read: list[int] = []
    read_each = source.reader.read_each
    source.reader.read_each = lambda samples: read.extend(samples) or read_each(samples)
    _, counts = batches(source, SHARD, max_lost=1.0)
    assert counts == {"read": 3 * SHARD, "unreadable_shard": SHARD}
    times = np.bincount(read, minlength=3 * SHARD)  # of the lost ones once, in vain
    assert times.tolist() == [1] * (2 * SHARD) + [2] * SHARD, "each stands in for one of the next shard"


def test_when_every_shard_is_gone_the_reason_is_told(tmp_path) -> None:
    paths = write_pairs(tmp_path / "shards", [80, 80], size=16)
    source = ShardSource(paths)
    for path in paths:
        os.unlink(path)
    with pytest.raises(UserError, match=r"65 samples in a row .*'unreadable_shard': 65.*No such file.*0000\d\.tar"):
        batches(source)


def test_a_shard_that_comes_back_is_read_again(tmp_path) -> None:
    (path,) = write_pairs(tmp_path / "shards", [8], size=16)
    source, content = ShardSource(path, max_lost=1.0), Path(path).read_bytes()
    expected = batches(source)[0]
    cut(path)
    assert all(str(sample) == "unreadable_shard" for sample in source.read(range(8)))
    Path(f"{path}.new").write_bytes(content)
    os.replace(f"{path}.new", path)  # another file under the old name, as a restored one is
    assert same(batches(source)[0], expected)


def test_video_clips_of_a_lost_shard_are_counted_too(tmp_path) -> None:
    make_shards(tmp_path / "clips", SyntheticClips({"train": 6}, SMALL), shard_size=3)
    source = open_source(tmp_path / "clips", "train", SMALL)
    cut(str(tmp_path / "clips" / "train-00001.tar"))
    found = ClipReader(source, SMALL, {"frames"}).read(range(6))
    assert [getattr(clip, "reason", "good") for clip in found] == ["good"] * 3 + ["unreadable_shard"] * 3


# --------------------------------------------------------------------------------------------------- through `fit`


class Happens(pl.Callback):
    """After some steps of training something happens to a file, or to the store."""

    def __init__(self, what: str, path: str = "", step: int = 2) -> None:
        self.what, self.path, self.step = what, path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            {"vanish": os.unlink, "shrink": cut, "store": Store.turn}[self.what](self.path)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Callable[[Path, str], list[str]]:
    """Words after `fit` for a copy of a small training in a folder of its own."""

    def make(folder: Path, name: str) -> list[str]:
        return ["-c", str(write_training(folder, name)), "--vars.checkpoint_steps", "1"]

    return make


def with_callback(folder: Path, what: str, path: str = "") -> list[str]:
    layer = folder / "happens.yaml"
    name = "tests.datamodules.test_data_faults.Happens"
    layer.write_text(
        f"trainer:\n  callbacks+:\n    class_path: {name}\n    init_args: {{what: {what}, path: {path!r}}}\n"
    )
    return ["-c", str(layer)]


def logged(folder: Path, name: str) -> list[str]:
    (path,) = (folder / "run" / "logs").glob("version_0/metrics.csv")
    return [row[name] for row in csv.DictReader(path.read_text().splitlines()) if row.get(name)]


@pytest.mark.parametrize("what", ["vanish", "shrink"])
def test_fit_ends_with_code_2_when_more_than_max_lost_goes(tmp_path, training, monkeypatch, capfd, what) -> None:
    monkeypatch.setattr(loading, "LOSS_CHECK_FROM", 24)
    monkeypatch.setattr("datamodules.shards.OPEN_FILES", 1)  # a file that is open can be read after it was deleted
    words = [*training(tmp_path, "rankclip"), "--trainer.limit_val_batches", "0"]
    shard = tmp_path / "shards" / "00001.tar"
    assert main(["fit", *words, *with_callback(tmp_path, what, str(shard))]) == 2
    told = capfd.readouterr().err
    assert "samples read could not be used (unreadable_shard" in told and "more than max_lost = 1.00%" in told
    assert "Traceback" not in told
    assert main(["fit", *words, "--ckpt_path", "last"]) == 2  # the data are not those of the checkpoint any more
    told = capfd.readouterr().err
    assert f"{shard}: " in told and ("no such shard" if what == "vanish" else "0 bytes, but") in told


def test_fit_goes_on_and_counts_up_to_max_lost(tmp_path, training, monkeypatch) -> None:
    monkeypatch.setattr(loading, "LOSS_CHECK_FROM", 24)
    words = [*training(tmp_path, "rankclip"), "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "1"]
    happens = with_callback(tmp_path, "shrink", str(tmp_path / "shards" / "00001.tar"))
    assert main(["fit", *words, *happens, "--data.max_lost", "0.9"]) == 0
    (lost,), (read,) = logged(tmp_path, "data/unreadable_shard"), logged(tmp_path, "data/read")
    assert float(read) == 96 and 10 < float(lost) < 38


# -------------------------------------------------------------------------------------------------- object stores


class Store(Ranges):
    """A web server that can be out of order: for the next `left` requests, or for good.

    busy: 503. cut: closes the connection in the middle. stalls: sends half and no more. slow: sends it bit by bit.
    """

    trouble: ClassVar[str] = ""
    left: ClassVar[float] = 0
    asked: ClassVar[int] = 0
    over: ClassVar[Event] = Event()

    @classmethod
    def turn(cls, trouble: str, requests: float = float("inf")) -> None:
        cls.trouble, cls.left, cls.asked = trouble, requests, 0

    def do_GET(self, body: bool = True) -> None:
        Store.asked += 1
        Store.left -= 1
        trouble = Store.trouble if Store.left >= 0 else ""
        if trouble in ("busy", "forbidden"):
            self.send_error(503 if trouble == "busy" else 403)
            return
        self.wfile, socket = io.BytesIO(), self.wfile
        super().do_GET(body)
        self.wfile, answer = socket, self.wfile.getvalue()
        half = len(answer) // 2 if trouble else len(answer)
        self.wfile.write(answer[:half])
        self.wfile.flush()
        self.close_connection = bool(trouble)
        if trouble == "stalls":
            Store.over.wait(20)
        if trouble == "slow":
            for start in range(half, len(answer), -(-(len(answer) - half) // 6)):
                Store.over.wait(stores.STALL / 4)
                self.wfile.write(answer[start : start + -(-(len(answer) - half) // 6)])
                self.wfile.flush()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Iterator[list[str]]:
    """Three shards of four samples behind the server, which is in order; their index is made."""
    pytest.importorskip("aiohttp")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stores, "PAUSES", (0.01,) * 4)
    paths = write_pairs(tmp_path / "behind", [4, 4, 4], size=16)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Store, directory=str(tmp_path / "behind")))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    Store.turn("", 0)
    Store.over.clear()
    yield [f"http://127.0.0.1:{server.server_port}/{Path(path).name}" for path in paths]
    Store.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("trouble", ["busy", "cut", "stalls", "slow"])
def test_a_store_that_is_out_of_order_for_a_while_changes_nothing(store, tmp_path, monkeypatch, trouble) -> None:
    monkeypatch.setattr(stores, "STALL", 1.5 if trouble in ("stalls", "slow") else stores.STALL)
    source = ShardSource(store)
    expected, _ = batches(ShardSource([str(tmp_path / "behind" / url.rpartition("/")[2]) for url in store]))
    Store.turn(trouble, 10)  # of 24 members, and what was asked for again
    found, counts = batches(source)
    assert same(found, expected) and counts == {"read": 12}
    assert Store.asked == (24 if trouble == "slow" else 34), "only what failed is asked for again"


@pytest.mark.parametrize(("trouble", "reason"), [("busy", "503 Service Unavailable"), ("stalls", "Timeout")])
def test_a_store_that_stays_out_of_order_ends_the_run(store, monkeypatch, trouble, reason) -> None:
    source = ShardSource(store)
    monkeypatch.setattr(stores, "STALL", 0.5 if trouble == "stalls" else stores.STALL)
    Store.turn(trouble)
    with pytest.raises(UserError, match=rf"the store does not answer: .*{reason}.* \(tried 5 times in \d+ s\)"):
        batches(source)
    with pytest.raises(UserError, match=r"^http://127\S+: the store does not answer: [^\n]*$"):
        batches(source, num_workers=1)  # without the traceback of the loader process
    loader = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 4)
    with pytest.raises(UserError, match="the store does not answer"):
        list(loader)


def test_a_store_that_is_switched_off_ends_the_run(store, monkeypatch) -> None:
    source = ShardSource(store)
    index = source.reader.index
    for shard in index.shards:
        shard.url = shard.url.replace(shard.url.split("/")[2], "127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match=r"the store does not answer: ClientConnector.*tried 5 times"):
        batches(source)


def test_a_store_is_not_asked_for_longer_than_other_processes_wait(store, monkeypatch) -> None:
    source = ShardSource(store)
    Store.turn("busy")
    monkeypatch.setattr(stores, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"tried 1 times in \d+ s"):
        batches(source)


def test_a_store_that_refuses_is_not_asked_again(store) -> None:
    source = ShardSource(store)
    Store.turn("forbidden")
    with pytest.raises(UserError, match=r"65 samples in a row .*unreadable_shard.*; the last: http.*: 403 Forbidden"):
        batches(source)
    assert Store.asked <= 8 + 2 * 65


def test_a_store_that_does_not_answer_at_the_start_is_named(store, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "other"))  # no index yet
    Store.turn("busy", 3)
    assert ShardSource(store).counts == {"samples": 12, "shards": 3}
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "third"))
    Store.turn("busy")
    with pytest.raises(UserError, match=r"00000\.tar: the store does not answer: 503"):
        ShardSource(store)
    Store.turn("", 0)
    with pytest.raises(UserError, match=r"9\.tar: 404 Not Found"):
        ShardSource([*store, store[0].replace("00000", "00009")])


def test_fit_ends_with_code_2_when_the_store_goes_and_goes_on_when_it_is_back(store, tmp_path, training, capfd) -> None:
    words = [*training(tmp_path, "rankclip"), "--trainer.limit_val_batches", "0", "--trainer.max_epochs", "2"]
    words += ["--data.train", store[0].replace("00000", "{00000..00002}"), "--data.batch_size", "4"]
    assert main(["fit", *words, *with_callback(tmp_path, "store", "busy")]) == 2
    told = capfd.readouterr().err
    assert re.search(r"the store does not answer: 503 Service Unavailable \(tried 5 times in \d+ s\)", told)
    assert "Traceback" not in told
    assert "Start again with --ckpt_path last" in told
    Store.turn("", 0)
    assert main(["fit", *words, "--ckpt_path", "last"]) == 0
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6


# ------------------------------------------------------------------------------------------------- NaN in arrays


def test_fit_names_a_robot_stream_that_is_not_finite_before_the_first_step(tmp_path, training, capfd) -> None:
    words = [*training(tmp_path, "tokenizer"), "--trainer.limit_val_batches", "0"]
    assert main(["fit", *words, "--trainer.max_steps", "1"]) == 0
    store = zarr.open_group(str(tmp_path / "wipe.zarr"), mode="r+")
    for key, value in (("action", np.nan), ("left_robot_tcp_wrench", np.inf), ("left_robot_tcp_pose", np.nan)):
        array = store[f"data/{key}"]
        sound, array[70, 1] = array[70, 1], value
        capfd.readouterr()
        assert main(["fit", *words]) == 2
        told = capfd.readouterr().err
        assert f"data/{key} is {value} at " in told and "number 1 (1 such frames): mend the data" in told
        array[70, 1] = sound


def float_wav(samples: np.ndarray, rate: int) -> bytes:
    """A WAV of float32, the one kind that can hold a NaN."""
    data = samples.astype("<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, rate, 4 * rate, 4, 32)
    return (
        struct.pack("<4sI4s", b"RIFF", 4 + len(form) + 8 + len(data), b"WAVE")
        + form
        + b"data"
        + struct.pack("<I", len(data))
        + data
    )


def test_sound_that_is_not_finite_never_reaches_a_model(tmp_path) -> None:
    maker = SyntheticClips({"train": 3}, SMALL)
    samples = [encode_clip(maker.clip("train", index), SMALL) for index in range(3)]
    sound = maker.clip("train", 1).audio.copy()
    sound[100] = np.nan
    samples[1]["wav"] = float_wav(sound, SMALL.sample_rate)
    write_shard(tmp_path / "train-00000.tar", samples, stats=False)
    source = open_source(tmp_path, "train", SMALL)
    found = source.read(range(3), {"audio"})
    assert [getattr(clip, "reason", "good") for clip in found] == ["good", "broken_member", "good"]


@pytest.mark.parametrize("member", ["mel.npy", "cavp.npy"])
def test_stored_spectrograms_and_features_that_are_not_finite_are_named(tmp_path, member) -> None:
    maker = SyntheticClips({"train": 1}, SMALL)
    clip = maker.clip("train", 0)
    rows = np.zeros((128, 1 + SMALL.samples // 256) if member == "mel.npy" else (SMALL.frames, 3), np.float32)
    rows[1, 1] = np.inf
    buffer = io.BytesIO()
    np.save(buffer, rows)
    write_shard(tmp_path / "train-00000.tar", [encode_clip(clip, SMALL) | {member: buffer.getvalue()}], stats=False)
    source = open_source(tmp_path, "train", SMALL)
    field, name = ("mel", "spectrogram") if member == "mel.npy" else ("features", "features")
    with pytest.raises(UserError, match=rf"the stored {name} hold NaN or infinity: write this clip anew"):
        source.read([0], {field})
