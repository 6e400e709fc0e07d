"""Broken shards, odd pictures and odd captions: each is counted exactly, nothing hangs, no good sample is lost."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.image_text import ImageTextDataset
from datamodules.loading import Draw, EvaluationLoader, TrainLoader
from datamodules.paths import expand_shards
from datamodules.pictures import Pictures
from datamodules.sources import CsvSource, FolderSource, ShardSource
from datamodules.synthetic import jpeg, pairs, picture, write_pairs, write_shard
from datamodules.tar_index import build_index, load_index, open_index
from datamodules.tools import main as data_tool
from datamodules.transforms import UnreadablePicture, decode
from mmtrain.config_errors import UserError

COUNT = 20
PICTURES = Pictures(size=32, crop_scale=None, context_length=8)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two sound shards of COUNT samples each."""
    return write_pairs(tmp_path / "shards", [COUNT, COUNT])


def keep(path: str, size: int) -> None:
    data = Path(path).read_bytes()[:size]
    Path(path).write_bytes(data)


def member(path: str, number: int) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmembers()[number]


def evaluate(source: ShardSource) -> tuple[list[int], dict[str, int]]:
    """Ids that come out of the evaluation loader, and its counters."""
    loader = EvaluationLoader(ImageTextDataset(source, PICTURES, training=False), 7)
    ids = [int(i) for batch in loader if "id" in batch for i in batch["id"]]
    return ids, dict(loader.counts)


# Shards as files: (what is done to the second shard, problems of the index, samples left in it, reason and lost count)
def empty(path: str) -> None:
    Path(path).write_bytes(b"")


def html(path: str) -> None:
    Path(path).write_bytes(b"<html><body>404 Not Found</body></html>" * 200)


def random_bytes(path: str) -> None:
    Path(path).write_bytes(np.random.default_rng(0).bytes(50_000))


def cut_inside_a_member(path: str) -> None:
    m = member(path, 3 * 12)  # the picture of the 13th sample
    assert m.name.endswith("jpg")
    keep(path, m.offset_data + m.size // 2)


def cut_at_a_boundary(path: str) -> None:
    keep(path, member(path, 3 * 12).offset)


def cut_inside_a_header(path: str) -> None:
    keep(path, member(path, 3 * 12).offset_data - 300)


def broken_block_in_the_middle(path: str) -> None:
    data = bytearray(Path(path).read_bytes())
    offset = member(path, 3 * 12).offset_data
    data[offset - 512 : offset] = b"\xff" * 512
    Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "left", "problems"),
    [
        (empty, 0, {"empty_file": 1, "fewer_than_stats": 20}),
        (html, 0, {"not_a_tar": 1, "fewer_than_stats": 20}),
        (random_bytes, 0, {"not_a_tar": 1, "fewer_than_stats": 20}),
        (cut_inside_a_member, 12, {"cut_sample": 1, "no_end_marker": 1, "fewer_than_stats": 8}),
        (cut_at_a_boundary, 12, {"no_end_marker": 1, "fewer_than_stats": 8}),
        (cut_inside_a_header, 12, {"broken_header": 1, "no_end_marker": 1, "fewer_than_stats": 8}),
        (broken_block_in_the_middle, 20, {"broken_header": 1}),  # the sample keeps txt and json, without a picture
    ],
)
def test_damaged_shards_are_counted_and_the_rest_is_read(shards, damage, left, problems) -> None:
    damage(shards[1])
    index = build_index(shards)
    assert index.shards[1].samples == left
    assert index.shards[1].problems == problems
    source = ShardSource(shards, max_lost=1.0)
    usable = COUNT + left - (damage is broken_block_in_the_middle)
    assert len(source) == usable
    assert sum(n for name, n in source.counts.items() if name not in ("samples", "shards")) == 2 * COUNT - usable
    ids, skipped = evaluate(source)
    assert (len(set(ids)), skipped) == (usable, {})
    with pytest.raises(UserError, match=r"more than max_lost = 1\.00%"):
        ShardSource(shards)


def test_cut_at_a_boundary_is_noticed_without_stats(shards, capsys) -> None:
    Path(shards[1].replace(".tar", "_stats.json")).unlink()
    cut_at_a_boundary(shards[1])
    assert data_tool(["index", *shards]) == 1
    assert "no_end_marker" in capsys.readouterr().out


def test_shard_that_shrinks_or_vanishes_after_indexing_is_named(shards) -> None:
    index, folder = open_index(shards)
    assert len(index) == 2 * COUNT
    cut_at_a_boundary(shards[1])
    with pytest.raises(UserError, match=r"00001\.tar: .* bytes, but .* when it was indexed"):
        load_index(folder)
    Path(shards[1]).unlink()
    with pytest.raises(UserError, match=r"00001\.tar: the shard is gone"):
        load_index(folder)
    with pytest.raises(UserError, match="no such shard"):
        expand_shards(shards)


def test_shard_that_vanishes_while_it_is_read_is_counted(shards) -> None:
    source = ShardSource(shards)
    Path(shards[1]).unlink()
    ids, skipped = evaluate(source)
    assert (len(ids), skipped) == (COUNT, {"unreadable_shard": COUNT})


def test_rewritten_shard_is_indexed_again(shards) -> None:
    _, folder = open_index(shards)
    first = (folder / "index.json").read_text()
    assert open_index(shards)[1] == folder and (folder / "index.json").read_text() == first
    os.utime(shards[0], (1, 1))
    assert len(open_index(shards)[0]) == 2 * COUNT
    assert (folder / "index.json").read_text() != first


def write(folder: Path, samples: list[dict]) -> list[str]:
    folder.mkdir(exist_ok=True)
    return [str(write_shard(folder / "00000.tar", samples, stats=False))]


def test_members_missing_doubled_or_empty_are_counted(tmp_path) -> None:
    samples = list(pairs(8))
    del samples[1]["txt"]
    del samples[2]["jpg"]
    samples[3]["txt"] = ""
    samples[4]["jpg"] = b""
    samples[5]["txt"] = "  \n\t "  # seen only when it is read
    samples[6]["json"] = "{broken"
    paths = write(tmp_path / "a", samples)
    with tarfile.open(paths[0], "a") as tar:  # the same member again, with other content
        info = tarfile.TarInfo("000000000.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"other"))
    source = ShardSource(paths, max_lost=1.0)
    assert source.counts == {"samples": 4, "shards": 1, "without_image": 2, "without_captions": 2}
    assert source.reader.index.problems() == {"duplicate_member": 1}
    assert source.read([0])[0].captions == ["a red square"]  # the first of the doubled members counts
    ids, skipped = evaluate(source)
    assert (len(ids), skipped) == (3, {"empty_caption": 1})
    by_json = ShardSource(paths, captions="json:caption", max_lost=1.0)
    ids, skipped = evaluate(by_json)
    assert (len(ids), skipped) == (5, {"bad_json": 1})


def encoded(mode: str, file_format: str, size: tuple[int, int] = (48, 40), **options: object) -> bytes:
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def animation() -> bytes:
    frames = [Image.fromarray(np.full((40, 48, 3), v, np.uint8)) for v in (10, 200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def png_16_bit() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 48), 40_000, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def png_bomb(side: int = 60_000) -> bytes:
    """A PNG whose header claims side x side pixels, padded past the size at which the header is looked at."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000) + b"\0" * 300_000
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", rows) + block(b"IEND", b"")


READABLE = {
    "gray_jpeg": encoded("L", "JPEG"),
    "cmyk_jpeg": encoded("CMYK", "JPEG"),
    "progressive_jpeg": encoded("RGB", "JPEG", progressive=True),
    "palette_png": encoded("P", "PNG"),
    "rgba_png": encoded("RGBA", "PNG"),
    "png_16_bit": png_16_bit(),
    "webp": encoded("RGB", "WEBP"),
    "animated_gif": animation(),
    "bmp": encoded("RGB", "BMP"),
    "tiff": encoded("RGB", "TIFF"),
    "one_pixel": encoded("RGB", "PNG", (1, 1)),
    "very_long": encoded("RGB", "PNG", (2000, 2)),
}
UNREADABLE = {
    "no_bytes": (b"", "empty_image"),
    "html": (b"<html>gone</html>" * 20, "undecodable_image"),
    "random": (np.random.default_rng(2).bytes(5000), "undecodable_image"),
    "truncated_jpeg": (encoded("RGB", "JPEG", (300, 300))[:3000], "undecodable_image"),
    "truncated_png": (encoded("RGB", "PNG")[:600], "undecodable_image"),
    "bomb": (png_bomb(), "too_large_image"),
}


@pytest.mark.parametrize("name", READABLE)
def test_odd_but_sound_pictures_are_read(name: str) -> None:
    decoded = decode(READABLE[name])
    assert (decoded.shape[0], decoded.dtype) == (3, torch.uint8)
    usual = np.array(Image.open(io.BytesIO(READABLE[name])).convert("RGB")) if name != "png_16_bit" else None
    if usual is None:
        assert abs(int(decoded.float().mean()) - 40_000 // 257) <= 1
    else:
        difference = np.abs(decoded.permute(1, 2, 0).numpy().astype(int) - usual)
        assert difference.mean() < (12 if name == "cmyk_jpeg" else 2)


@pytest.mark.parametrize("name", UNREADABLE)
def test_broken_pictures_say_why(name: str) -> None:
    data, reason = UNREADABLE[name]
    with pytest.raises(UnreadablePicture) as problem:
        decode(data)
    assert problem.value.reason == reason


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_bad_pictures_and_keeps_every_good_sample(tmp_path, num_workers) -> None:
    samples = list(pairs(24))
    for row, (data, _) in zip((3, 4, 10, 23), list(UNREADABLE.values())[1:5], strict=True):
        samples[row]["jpg"] = data
    source = ShardSource(write(tmp_path / "a", samples), max_lost=1.0)
    dataset = ImageTextDataset(source, PICTURES, training=True)
    loader = TrainLoader(dataset, 8, num_workers=num_workers, max_lost=1.0)
    batches = list(loader)
    assert [len(b["image"]) for b in batches] == [8, 8, 8]
    # 3 is replaced through 4 (bad too) by 5, so it is tried twice: 4 alone, 3 then 4
    assert dict(loader.counts) == {"read": 24, "undecodable_image": 5}
    seen = {tuple(row.flatten()[:200].tolist()) for b in batches for row in b["image"]}
    assert len(seen) == 20


def test_training_stops_when_too_much_is_lost(tmp_path) -> None:
    samples = list(pairs(1040))
    for sample in samples[::50]:
        sample["jpg"] = b"<html>"
    loader = TrainLoader(ImageTextDataset(ShardSource(write(tmp_path / "a", samples)), PICTURES, training=True), 104)
    with pytest.raises(UserError, match=r"undecodable_image \d+\), more than max_lost = 1.00%"):
        list(loader)


ODD_CAPTIONS = {
    "latin1": "caf\xe9 am Stra\xdfenrand".encode("latin-1"),
    "null_bytes": b"a\x00cat\x00",
    "huge": b"word " * 1_000_000,
    "only_emoji": "🙂🙃🫠".encode(),
    "right_to_left": "قطة على الطاولة".encode(),
    "markup": b"<b>a &amp; b</b> &nbsp; <script>",
    "control": b"a\r\n\t\x07cat",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ODD_CAPTIONS)
def test_odd_captions_are_read(tmp_path, name: str) -> None:
    (sample,) = pairs(1)
    source = ShardSource(write(tmp_path / "a", [sample | {"txt": ODD_CAPTIONS[name]}]))
    batch = ImageTextDataset(source, PICTURES, training=False)[[Draw(0, 0, 0, 0)]]
    ids = batch["text"][0]
    assert batch["skipped"] == {}
    assert ids[0] == 49406 and ids.max() == 49407 and len(ids) == 8
    assert (ids > 0).sum() >= 3  # something of the caption was kept


def test_csv_rows_without_path_and_missing_files_are_counted(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(picture(0, 0)))
    (tmp_path / "pairs.csv").write_text('image,caption\na.jpg,"one, two"\n,no path\na.jpg,\ngone.jpg,three\n')
    source = CsvSource(str(tmp_path / "pairs.csv"), max_lost=1.0)
    assert source.counts == {"samples": 2, "empty_path_or_caption": 2}
    assert source.read([0])[0].captions == ["one, two"]
    assert evaluate(source)[1] == {"missing_file": 1}
    with pytest.raises(UserError, match="2 of 4 rows"):
        CsvSource(str(tmp_path / "pairs.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat\thttp://x.org/1.jpg\na dog\thttp://x.org/2.jpg\n", "img2dataset --input_format tsv"),
        ("path\ttext\na.jpg\tcat\n", "columns 'image' and 'caption' are wanted"),
        ("", "columns 'image' and 'caption' are wanted"),
    ],
)
def test_tables_that_are_not_pairs_are_explained(tmp_path, text, message) -> None:
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(UserError, match=message):
        CsvSource(str(tmp_path / "train.tsv"))


def test_sources_that_hold_nothing_are_explained(tmp_path, shards) -> None:
    with pytest.raises(UserError, match=r"no usable sample .* members found: jpg, json, txt"):
        ShardSource(shards, captions="caption.txt", max_lost=1.0)
    with pytest.raises(UserError, match=r"holds no \.tar"):
        expand_shards(str(tmp_path))
    with pytest.raises(UserError, match="shell pipes are not read"):
        expand_shards("pipe:cat x.tar")
    (tmp_path / "cats").mkdir()
    with pytest.raises(UserError, match="no pictures in sub-folders"):
        FolderSource(str(tmp_path))


def test_index_tool_reports_and_is_used_by_the_source(shards, capsys) -> None:
    assert data_tool(["index", str(Path(shards[0]).parent), "--workers", "2"]) == 0
    assert "40 samples in 2 shards" in capsys.readouterr().out
    assert ShardSource(str(Path(shards[0]).parent)).index_folder.parent.name == ".mmtrain_index"
    stats = json.loads(Path(shards[0].replace(".tar", "_stats.json")).read_text())
    assert stats["successes"] == COUNT
