"""Shards on disk, packed, and behind file systems: the same bytes from each, through few open files."""

import gzip
import os
import pickle
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
import torch

from datamodules import shards as shards_module
from datamodules import tar_index
from datamodules.image_text import ImageTextDataset
from datamodules.loading import Draw, EvaluationLoader, TrainLoader
from datamodules.paths import cache_folder, expand_shards, unpacked
from datamodules.pictures import Pictures
from datamodules.shards import ShardReader
from datamodules.sources import ShardSource
from datamodules.synthetic import CLASSES, pairs, write_pairs, write_shard
from datamodules.tar_index import build_index, open_index
from datamodules.text import tokenize
from mmtrain.config_errors import UserError

COUNTS = (6, 3, 5)
PICTURES = Pictures(size=16, crop_scale=None, context_length=8)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return write_pairs(tmp_path / "shards", COUNTS, size=24)


@pytest.fixture
def memory(paths) -> Iterator[list[str]]:
    """The shards in fsspec's in-process object store."""
    store = fsspec.filesystem("memory")
    for file in Path(paths[0]).parent.iterdir():
        if file.is_file():
            store.pipe(f"/bucket/{file.name}", file.read_bytes())
    yield [f"memory://bucket/{Path(path).name}" for path in paths]
    store.rm("/bucket", recursive=True)


class Ranges(SimpleHTTPRequestHandler):
    """Serves files with byte ranges; names of nothing that exists get the status `missing`, as some stores do."""

    ranges = 0
    missing = 404

    def do_GET(self, body: bool = True) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(self.missing)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        first, last = 0, len(data) - 1
        if asked:
            type(self).ranges += 1
            first, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(end or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(paths, monkeypatch) -> Iterator[list[str]]:
    """The shards behind an HTTP server on this machine."""
    pytest.importorskip("aiohttp")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(paths[0]).parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    Ranges.ranges = 0
    yield [f"http://127.0.0.1:{server.server_port}/{Path(path).name}" for path in paths]
    server.shutdown()
    server.server_close()


def contents(urls: list[str]) -> list[dict[str, bytes]]:
    reader = ShardReader(build_index(urls), {"image": ("jpg",), "text": ("txt",), "none": ("npy",)})
    return reader.read(np.random.default_rng(0).permutation(len(reader.index)))


def training_batches(urls: list[str], workers: int = 0) -> list[dict[str, torch.Tensor]]:
    return list(TrainLoader(ImageTextDataset(ShardSource(urls), PICTURES, training=True), 4, num_workers=workers))


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


# ----------------------------------------------------------------------------------------------------- file systems


@pytest.mark.parametrize("store", ["memory", "web"])
def test_remote_shards_give_the_bytes_of_local_ones(request, paths, store) -> None:
    urls = request.getfixturevalue(store)
    local, remote = contents(paths), contents(urls)
    assert len(local) == sum(COUNTS) and local == remote and set(local[0]) == {"image", "text"}
    source = ShardSource(urls)
    assert source.counts == {"samples": 14, "shards": 3}
    assert [s.expected for s in source.reader.index.shards] == list(COUNTS)  # img2dataset's stats were found there too
    assert source.index_folder.is_relative_to(cache_folder())
    assert same(training_batches(paths), training_batches(urls, workers=2))
    if store == "web":
        assert Ranges.ranges > 28, "members are asked for by byte range, not by shard"


def test_local_and_remote_shards_can_be_mixed(paths, memory, web) -> None:
    assert contents([paths[0], memory[1], memory[2]]) == contents(paths)


def test_two_kinds_of_remote_shards_can_be_mixed(paths, memory, web) -> None:
    assert contents([web[0], memory[1], paths[2]]) == contents(paths)


@pytest.mark.parametrize("store", ["memory", "web"])
def test_remote_shard_that_is_gone_is_counted(request, paths, store) -> None:
    urls = request.getfixturevalue(store)
    source = ShardSource(urls)
    if store == "memory":
        fsspec.filesystem("memory").rm("/bucket/00001.tar")
    else:
        Path(paths[1]).unlink()
    loader = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 7)
    ids = [int(i) for batch in loader for i in batch.get("id", ())]
    assert (ids, dict(loader.counts)) == ([*range(6), *range(9, 14)], {"unreadable_shard": 3})


def test_remote_shard_that_was_cut_is_counted(memory) -> None:
    source = ShardSource(memory)
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/00001.tar", store.cat("/bucket/00001.tar")[:1024])
    loader = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 7)
    assert sum(len(batch.get("id", ())) for batch in loader) == 11
    assert dict(loader.counts) == {"unreadable_shard": 3}


def test_web_store_that_forbids_what_it_lacks_needs_no_stats(paths, web, monkeypatch) -> None:
    monkeypatch.setattr(Ranges, "missing", 403)  # S3 over HTTPS without the right to list
    Path(paths[0].replace(".tar", "_stats.json")).unlink()
    assert [s.expected for s in build_index(web).shards] == [None, 3, 5]


def test_names_expand_on_every_file_system(paths, memory, web) -> None:
    folder = Path(paths[0]).parent
    assert expand_shards(str(folder)) == paths
    assert expand_shards(f"{folder}/*.tar") == expand_shards(f"file://{folder}/*.tar") == paths
    assert expand_shards(f"{folder}/{{00000..00002}}.tar") == paths
    assert expand_shards([f"{folder}/{{00001..00002}}.tar", f"{folder}/0000?.tar"]) == paths
    assert expand_shards([paths[2], paths[0], paths[2]]) == [paths[0], paths[2]]  # name order, none twice
    with pytest.raises(UserError, match=r"00003\.tar: no such shard \(1 of 4 named are missing\)"):
        expand_shards(f"{folder}/{{00000..00003}}.tar")
    with pytest.raises(UserError, match=r"9\*\.tar: no such shard"):
        expand_shards(f"{folder}/9*.tar")
    assert expand_shards("memory://bucket/{00000..00002}.tar") == memory
    assert [u.rpartition("/")[2] for u in expand_shards("memory://bucket/*.tar")] == [u[-9:] for u in memory]
    assert expand_shards(web[0].replace("00000.tar", "{00000..00002}.tar")) == web


# ------------------------------------------------------------------------------------------- descriptors, processes


def open_shards() -> int:
    links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).endswith(".tar") for link in links if os.path.islink(link))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_more_shards_than_files_kept_open(tmp_path, monkeypatch) -> None:
    paths = write_pairs(tmp_path / "many", [1] * 9, size=24)
    expected = contents(paths)
    monkeypatch.setattr(shards_module, "OPEN_FILES", 3)
    before = open_shards()
    reader = ShardReader(build_index(paths), {"image": ("jpg",), "text": ("txt",)})
    order = np.random.default_rng(0).permutation(9)
    for _ in range(3):
        assert reader.read(order) == expected
        assert open_shards() - before <= 3
    assert reader.read([4, 4, 4])[2] == reader.read([4])[0]


def test_reader_is_sent_to_and_forked_into_other_processes_without_its_files(paths) -> None:
    reader = ShardReader(build_index(paths), {"image": ("jpg",), "text": ("txt",)})
    expected = reader.read(range(14))
    own = dict(reader._files)
    assert len(own) == 3
    sent = pickle.loads(pickle.dumps(reader))
    assert not sent._files and sent.read(range(14)) == expected
    assert not set(sent._files.values()) & set(own.values())
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        for descriptor in own.values():
            os.close(descriptor)  # a child that used these would fail now
        good = reader.read(range(14)) == expected and list(reader._files) == paths
        os.write(write_end, b"good" if good else b"bad")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 4) == b"good"
    assert dict(reader._files) == own and reader.read(range(14)) == expected
    os.close(read_end)
    os.close(write_end)


# ---------------------------------------------------------------------------------------------------- packed shards


def pack(path: str) -> str:
    with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    os.remove(path)
    return f"{path}.gz"


def test_packed_shards_are_unpacked_once_into_the_cache(paths, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "cache"))
    expected = contents(paths)
    folder = Path(paths[0]).parent
    packed = [pack(path) for path in paths]
    assert expand_shards(str(folder)) == packed
    plain = [unpacked(path) for path in packed]
    assert all(Path(p).is_relative_to(tmp_path / "cache") for p in plain) and contents(plain) == expected
    monkeypatch.setattr(gzip, "open", None)  # a second unpacking would fail
    source = ShardSource(str(folder))
    assert len(source) == 14 and [unpacked(path) for path in packed] == plain
    monkeypatch.undo()
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "cache"))
    with gzip.open(packed[0], "wb") as file:  # another file under the old name
        file.write(Path(plain[1]).read_bytes())
    assert Path(unpacked(packed[0])).read_bytes() == Path(plain[1]).read_bytes()
    assert not list((tmp_path / "cache").rglob("*.part*"))


def test_stats_of_packed_shards_are_used(paths) -> None:
    packed = [pack(path) for path in paths]
    assert [s.expected for s in ShardSource(packed).reader.index.shards] == list(COUNTS)


@pytest.mark.parametrize("damage", ["cut", "not_gzip"])
def test_broken_packed_shard_is_named(paths, damage) -> None:
    packed = [pack(path) for path in paths]
    data = Path(packed[1]).read_bytes()
    Path(packed[1]).write_bytes(data[: len(data) // 2] if damage == "cut" else b"<html>")
    with pytest.raises(UserError, match=r"00001\.tar\.gz"):
        ShardSource(packed)


# ----------------------------------------------------------------------------------------------------------- index


def test_index_goes_to_the_cache_when_the_folder_cannot_be_written(paths, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "cache"))
    beside = Path(paths[0]).parent
    save = tar_index.save_index

    def refuse(index: tar_index.ShardIndex, folder: Path) -> None:
        if folder.is_relative_to(beside):
            raise PermissionError(13, "read-only", str(folder))
        save(index, folder)

    monkeypatch.setattr(tar_index, "save_index", refuse)
    index, folder = open_index(paths)
    assert len(index) == 14 and folder.is_relative_to(tmp_path / "cache") and not (beside / ".mmtrain_index").exists()
    monkeypatch.setattr(tar_index, "build_index", None)  # found again, not built again
    assert open_index(paths)[1] == folder
    monkeypatch.undo()
    monkeypatch.setattr(tar_index, "save_index", lambda *_: refuse(None, beside))
    with pytest.raises(UserError, match=r"written to none of .*\.mmtrain_index.*cache.*read-only"):
        open_index(paths[:2])


def test_index_is_reused_and_rebuilt_on_demand(paths) -> None:
    index, folder = open_index(paths)
    written = (folder / "index.json").stat().st_mtime_ns
    assert folder.parent == Path(paths[0]).parent / ".mmtrain_index"
    assert open_index(paths)[1] == folder and (folder / "index.json").stat().st_mtime_ns == written
    part_of_them, other = open_index(paths[:2])
    assert other != folder and (len(part_of_them), len(index)) == (9, 14)
    assert open_index(paths, rebuild=True)[1] == folder and (folder / "index.json").stat().st_mtime_ns > written


# -------------------------------------------------------------------------------------------- captions and labels


def test_several_captions_of_a_picture(paths) -> None:
    source = ShardSource(paths, captions="json:captions")
    assert source.read([1])[0].captions == ["a red circle", "red circle"]
    evaluation = ImageTextDataset(source, PICTURES, training=False)
    batch = evaluation[[Draw(i, 0, 0, 0) for i in (5, 1)]]
    assert torch.equal(batch["text"], tokenize(["a green circle", "green circle", "a red circle", "red circle"], 8))
    assert batch["text_id"].tolist() == [5, 5, 1, 1]
    training = ImageTextDataset(source, PICTURES, training=True)
    drawn = [training[[Draw(1, 0, epoch, 3)]]["text"] for epoch in range(30)]
    assert all(torch.equal(d, training[[Draw(1, 0, epoch, 3)]]["text"]) for epoch, d in enumerate(drawn))
    first = sum(torch.equal(d[0], batch["text"][2]) for d in drawn)
    assert 5 < first < 25 and first + sum(torch.equal(d[0], batch["text"][3]) for d in drawn) == 30


def test_second_captions_and_labels(paths) -> None:
    source = ShardSource(paths, extra_captions="json:caption", label="json:label")
    assert [s.label for s in source.read(range(14))] == [i % len(CLASSES) for i in range(14)]
    batch = ImageTextDataset(source, PICTURES, training=True)[[Draw(2, 0, 0, 0), Draw(3, 0, 0, 1)]]
    assert torch.equal(batch["extra_text"], batch["text"])
    assert ShardSource(paths, captions=None).read([0])[0].captions == []


def test_class_numbers_as_members_of_their_own(tmp_path) -> None:
    samples = [s | {"cls": str(i), "caption.txt": f"second {i}"} for i, s in enumerate(pairs(4, size=24))]
    samples[2]["cls"] = "three"
    path = str(write_shard(tmp_path / "a.tar", samples, stats=False))
    source = ShardSource(path, label="cls", extra_captions="caption.txt")
    loader = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 4)
    (batch,) = loader
    assert (batch["label"].tolist(), batch["id"].tolist()) == ([0, 1, 3], [0, 1, 3])
    assert dict(loader.counts) == {"bad_label": 1}
    assert [s.extra_captions for s in source.read([0, 3])] == [["second 0"], ["second 3"]]
