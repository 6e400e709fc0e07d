import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from torchvision.io import encode_jpeg

from datamodules.episode_pictures import PictureArray
from datamodules.episode_writer import EpisodeWriter
from datamodules.episodes import EpisodeStore, downsample, split_episodes, window_indices, window_rows
from mmtrain.config_errors import UserError
from tests.golden import load

CAMERA = "left_wrist_img"


def episode(length: int, start: int = 0, **more: np.ndarray) -> dict[str, np.ndarray]:
    """State = number of the frame in the store."""
    state = (start + np.arange(length, dtype=np.float32))[:, None].repeat(4, axis=1)
    return {
        "timestamp": 1.7e9 + (start + np.arange(length)) / 24,
        "target": state,
        "action": np.concatenate([state[1:], state[-1:]]),
        "variation": np.bytes_(b"none"),
        **more,
    }


def pictures(length: int) -> np.ndarray:
    """Smooth colour ramps, so that JPEG keeps them."""
    ramp = np.linspace(0, 150, 16 * 24).reshape(1, 16, 24, 1)
    return (ramp + np.arange(length).reshape(-1, 1, 1, 1) + np.array([0, 20, 40])).astype(np.uint8)


def write(path: Path, lengths: tuple[int, ...] = (40, 35), with_pictures: bool = False, **options) -> Path:
    writer, start = EpisodeWriter(path, **options), 0
    for length in lengths:
        writer.append(episode(length, start, **({CAMERA: pictures(length)} if with_pictures else {})))
        start += length
    return path


# --- windows, split, rates ---


@pytest.mark.parametrize("name", ["rdp_24hz", "dp_12hz", "short"])
def test_windows_are_those_of_the_reference(name):
    golden = load("rdp/sampler.npz")
    ends, geometry = golden["episode_ends"], golden[f"{name}_args"].tolist()
    rows = window_rows(ends, *geometry)
    np.testing.assert_array_equal(rows, golden[name])
    index = window_indices(ends, *geometry)
    for (begin, end, first, last), window in zip(rows, index, strict=True):
        expected = np.concatenate([np.full(first, begin), np.arange(begin, end), np.full(geometry[0] - last, end - 1)])
        np.testing.assert_array_equal(window, expected)


def test_windows_of_chosen_episodes_are_those_rows_of_all():
    ends, geometry = np.array([40, 75, 90]), (8, 2, 3)
    everything = window_rows(ends, *geometry)
    chosen = window_rows(ends, *geometry, episodes=np.array([True, False, True]))
    np.testing.assert_array_equal(chosen, everything[(everything[:, 0] < 40) | (everything[:, 0] >= 75)])


def test_split_is_that_of_the_reference():
    golden = load("rdp/sampler.npz")
    train, validation = split_episodes(20, 0.1, max_train_episodes=10)
    np.testing.assert_array_equal(validation, golden["val_mask_20_0.1_42"])
    np.testing.assert_array_equal(train, golden["train_mask_max10_42"])
    train, validation = split_episodes(20, 0.0)
    assert train.all() and not validation.any()
    assert [mask.sum() for mask in split_episodes(2, 0.9)] == [1, 1]
    with pytest.raises(UserError, match=r"val_ratio: 1\.0"):
        split_episodes(20, 1.0)


def test_downsampled_labels_are_one_step_of_the_low_rate_ahead():
    ends = np.array([9, 17])  # an odd and an even number of frames
    action = np.concatenate([np.minimum(np.arange(9) + 1, 8), np.minimum(np.arange(9, 17) + 1, 16)])  # states
    frames, labels, low_ends = downsample(ends, 2)
    assert frames.tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15] and low_ends.tolist() == [5, 9]
    assert action[labels].tolist() == [2, 4, 6, 8, 8, 11, 13, 15, 16]
    frames, labels, low_ends = downsample(ends, 2, "reference")
    assert frames.tolist() == [0, 1, 3, 5, 7, 8, 9, 10, 12, 14, 16] and low_ends.tolist() == [6, 11]
    assert action[labels].tolist() == [1, 2, 4, 6, 8, 8, 10, 11, 13, 15, 16]


# --- store ---


def test_a_written_store_has_the_released_layout(tmp_path):
    path = write(tmp_path / "a.zarr", with_pictures=True, attributes={"source": {"size": (1, 2)}})
    about = lambda name: json.loads((path / name / ".zarray").read_text())  # noqa: E731
    assert about("data/action")["zarr_format"] == 2
    assert (about("data/action")["dtype"], about("data/action")["chunks"]) == ("<f4", [10_000, 4])
    assert about("data/action")["compressor"] == {
        "id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1, "blocksize": 0
    }  # fmt: skip
    assert (about(f"data/{CAMERA}")["dtype"], about(f"data/{CAMERA}")["chunks"]) == ("|u1", [1, 16, 24, 3])
    assert (about("meta/episode_ends")["dtype"], about("data/timestamp")["dtype"]) == ("<i8", "<f8")

    store = EpisodeStore(path)
    assert store.attributes["source"] == {"size": [1, 2]} and store.facts("variation").tolist() == [b"none"] * 2
    np.testing.assert_allclose(np.diff(store.array("timestamp")[:]), 1 / 24, atol=1e-6)
    np.testing.assert_array_equal(store.low_dim("target", 4)[:, 0], np.arange(75))
    assert store.where(40) == "episode 1, frame 0" and store.where(39) == "episode 0, frame 39"


@pytest.mark.parametrize("kind", ["one frame a chunk", "many frames a chunk", "jpeg"])
def test_pictures_come_back_in_any_order_and_as_rgb(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datamodules.episode_pictures.CACHE_BYTES", 25_000)  # two chunks of 10 frames
    path, options = tmp_path / "a.zarr", {"jpeg_quality": 95} if kind == "jpeg" else {}
    write(path, with_pictures=True, **options)
    stored = np.concatenate([pictures(40), pictures(35)])
    if kind == "many frames a chunk":
        group = zarr.open_group(path, mode="a")
        array = group.create_array(
            f"data/{CAMERA}", shape=stored.shape, chunks=(10, *stored.shape[1:]), dtype="uint8", overwrite=True
        )
        array[:] = stored
    store, frames = EpisodeStore(path), np.array([[74, 3], [3, 0], [55, 56]])
    read = store.pictures(CAMERA).read(frames)
    assert read.dtype == np.uint8 and store.pictures(CAMERA).size == (16, 24)
    expected = stored[frames].transpose(0, 1, 4, 2, 3)
    tolerance = 8 if kind == "jpeg" else 0
    assert np.abs(read.astype(int) - expected).max() <= tolerance
    np.testing.assert_array_equal(store.pictures(CAMERA, bgr=True).read(frames), read)  # the store says it is RGB
    del zarr.open_group(path, mode="a").attrs["channel_order"]
    flipped = EpisodeStore(path).pictures(CAMERA, bgr=True).read(frames)
    np.testing.assert_array_equal(flipped, read[:, :, ::-1])


def test_opening_a_large_store_reads_no_picture(tmp_path, monkeypatch):
    path = write(tmp_path / "a.zarr", (8570, 8570, 8570), attributes={})
    array = zarr.open_group(path, mode="a").create_array(
        f"data/{CAMERA}", shape=(25_710, 240, 320, 3), chunks=(1, 240, 320, 3), dtype="uint8"
    )
    for frame in (0, 7):
        (path / "data" / CAMERA / f"{frame}.0.0.0").write_bytes(b"not a chunk")
    for name in ("__getitem__", "get_orthogonal_selection", "get_basic_selection"):
        original = getattr(zarr.Array, name)
        monkeypatch.setattr(zarr.Array, name, lambda own, *a, _f=original, **k: _refuse_pictures(_f, own, a, k))
    store = EpisodeStore(path)
    cameras = store.pictures(CAMERA)
    store.low_dim("action", 4)
    assert array.shape == (25_710, 240, 320, 3) and len(cameras) == 25_710 and cameras.size == (240, 320)
    with pytest.raises(UserError, match=r"7\.0\.0\.0 is damaged"):
        cameras.read(np.array([7]))


def _refuse_pictures(function, array, positional, named):
    assert array.dtype != np.uint8, "a picture was read"
    return function(array, *positional, **named)


@pytest.mark.parametrize("has_made_place", [False, True])
def test_an_interrupted_episode_does_not_count(tmp_path, monkeypatch, has_made_place):
    path = tmp_path / "a.zarr"
    for finished in ((), (40,), (40, 35)):  # the first episode may be cut off too
        writer = EpisodeWriter(path)
        assert writer.num_episodes == len(finished)
        with monkeypatch.context() as patch:
            patch.setattr(zarr.Array, "append", _fail_at_ends(zarr.Array.append, has_made_place))
            with pytest.raises(KeyboardInterrupt):
                writer.append(episode(50, sum(finished)))
        if finished:
            store = EpisodeStore(path)
            assert store.episode_ends.tolist() == np.cumsum(finished).tolist()
            assert len(store.low_dim("action", 4)) == sum(finished)
        EpisodeWriter(path).append(episode((40, 35, 30)[len(finished)], sum(finished)))
    store = EpisodeStore(path)
    assert store.episode_ends.tolist() == [40, 75, 105]
    np.testing.assert_array_equal(store.low_dim("target", 4)[:, 0], np.arange(105))
    assert len(store.facts("variation")) == 3


def _fail_at_ends(append, has_made_place):
    def fail(array, values):
        if array.path.endswith("episode_ends"):
            if has_made_place:
                array.resize((array.shape[0] + 1,))
            raise KeyboardInterrupt
        return append(array, values)

    return fail


def replace(path: Path, name: str, values: np.ndarray) -> None:
    zarr.open_group(path, mode="a").create_array(name, data=values, overwrite=True)


def action_with_nan(path: Path) -> None:
    values = zarr.open_group(path)["data/action"][:]
    values[45:47, 2] = np.nan
    replace(path, "data/action", values)


BAD_STORES = {
    "no ends": (lambda p: zarr.open_group(p, mode="a").__delitem__("meta/episode_ends"), "no array meta/episode_ends"),
    "ends go back": (
        lambda p: replace(p, "meta/episode_ends", np.array([40, 30, 75])),
        "episode 1 ends at 30 after 40",
    ),
    "no episode": (lambda p: replace(p, "meta/episode_ends", np.array([], dtype=np.int64)), "no finished episode"),
    "ends not whole": (lambda p: replace(p, "meta/episode_ends", np.array([40.0, 75.0])), r"float64 \[2\]"),
    "ends short": (
        lambda p: replace(p, "meta/episode_ends", np.array([40, 70])),
        r"data/action has 75 frames, but meta/episode_ends ends at 70",
    ),
    "ends long": (lambda p: replace(p, "meta/episode_ends", np.array([40, 99])), "75 frames, but .* ends at 99"),
    "no array": (
        lambda p: zarr.open_group(p, mode="a").__delitem__("data/action"),
        r"no array data/action",
    ),
    "dtype": (lambda p: replace(p, "data/action", np.zeros((75, 4), np.int64)), "int64, expected float32"),
    "width": (lambda p: replace(p, "data/action", np.zeros((75, 10), np.float32)), r"\[10\] numbers .* expected \[4\]"),
    "nan": (action_with_nan, r"action is nan at episode 1, frame 5, number 2 \(2 such frames\)"),
    "too short": (lambda p: replace(p, "meta/episode_ends", np.array([70, 75])), "episode 1 has 5 frames, a window"),
}


@pytest.mark.parametrize("name", BAD_STORES)
def test_a_bad_store_gets_one_clear_error(tmp_path, name):
    spoil, message = BAD_STORES[name]
    path = write(tmp_path / "a.zarr")
    spoil(path)
    with pytest.raises(UserError, match=message) as caught:
        store = EpisodeStore(path)
        store.low_dim("action", 4)
        store.check_lengths(32)
    assert str(path) in str(caught.value)


def test_what_is_no_store_is_named(tmp_path):
    with pytest.raises(UserError, match="no such store"):
        EpisodeStore(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a zarr store"):
        EpisodeStore(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not a zarr store of format 2"):
        EpisodeWriter(tmp_path)
    zarr.open_group(tmp_path / "three", mode="w", zarr_format=3)
    with pytest.raises(UserError, match="three is a zarr store of format 3, expected format 2"):
        EpisodeStore(tmp_path / "three")
    write(tmp_path / "released" / "replay_buffer.zarr")
    assert EpisodeStore(tmp_path / "released").num_episodes == 2


def test_pictures_of_another_kind_are_refused(tmp_path):
    path = write(tmp_path / "a.zarr")
    replace(path, "data/wrong", np.zeros((75, 8, 8), np.uint8))
    group = zarr.open_group(path, mode="a")
    group.create_array("data/split", shape=(75, 8, 8, 3), chunks=(1, 4, 4, 3), dtype="uint8")
    group.create_array(
        "data/film", shape=(75,), chunks=(1,), dtype=zarr.dtype.VariableLengthBytes(), compressors=numcodecs.Zstd()
    )
    files = np.full(75, b"no jpeg", dtype=object)
    group["data/film"][:] = files
    store = EpisodeStore(path)
    with pytest.raises(UserError, match=r"wrong is uint8 \[75, 8, 8\], expected uint8 \[frames, H, W, 3\]"):
        store.pictures("wrong")
    with pytest.raises(UserError, match="chunks of whole frames"):
        store.pictures("split")
    film = store.pictures("film")
    assert isinstance(film, PictureArray)
    with pytest.raises(UserError, match="frame 3 is not a JPEG file"):
        film.read(np.array([3]))
    for frame, size in ((0, (8, 16)), (1, (16, 8))):
        files[frame] = encode_jpeg(torch.zeros(3, *size, dtype=torch.uint8)).numpy().tobytes()
    group["data/film"][:] = files
    with pytest.raises(UserError, match=r"frame 1 is a picture of \[16, 8\] pixels, others of \[8, 16\]"):
        store.pictures("film").read(np.array([0, 1]))


def test_the_writer_refuses_an_episode_that_does_not_fit(tmp_path):
    writer = EpisodeWriter(tmp_path / "a.zarr")
    with pytest.raises(UserError, match="same number of frames"):
        writer.append(episode(40) | {"target": np.zeros((39, 4))})
    writer.append(episode(40))
    with pytest.raises(UserError, match=r"on one side only: \['data/extra'\]"):
        writer.append(episode(40, extra=np.zeros((40, 2))))
    with pytest.raises(UserError, match=r"data/action has \[10\]"):
        writer.append(episode(40) | {"action": np.zeros((40, 10))})
    bad = episode(40)
    bad["action"][7, 1] = np.inf
    with pytest.raises(UserError, match=r"episode 1: the action of frame 7 is not finite"):
        writer.append(bad)
    with pytest.raises(UserError, match=r"variation 'before and after.' is longer than 16 characters"):
        writer.append(episode(40) | {"variation": "before and after."})
    assert EpisodeStore(tmp_path / "a.zarr").num_episodes == 1


def test_the_writer_keeps_rgb_bytes_only_and_only_where_the_store_says_so(tmp_path):
    path = write(tmp_path / "a.zarr", with_pictures=True)
    with pytest.raises(UserError, match=r"data/left_wrist_img is float64, which the store's uint8 cannot keep"):
        EpisodeWriter(path).append(episode(40, **{CAMERA: pictures(40) / 255}))
    del zarr.open_group(path, mode="a").attrs["channel_order"]  # as released: the cameras are blue first
    with pytest.raises(UserError, match=r"does not say that its pictures are RGB: convert it first"):
        EpisodeWriter(path).append(episode(40, **{CAMERA: pictures(40)}))
