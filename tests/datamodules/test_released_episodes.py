"""A released store with its faults becomes ours: the numbers it was made of, and nothing else."""

import numpy as np
import pytest
import zarr

from datamodules import released_episodes
from datamodules.episode_checks import check_store
from datamodules.episodes import EpisodeStore
from datamodules.released_episodes import convert, fit_pca, load_pcas, plan
from datamodules.tools import main as data_tool
from mmtrain import marker_pca
from mmtrain.config_errors import UserError
from mmtrain.marker_pca import MarkerPca
from tests.datamodules.released_store import ENDS, as_released, recorded, write

DATA = recorded()
EMBEDDING = "left_gripper1_marker_offset_emb"
FIELD = "left_gripper1_marker_offset"


@pytest.fixture
def released(tmp_path):
    return write(tmp_path / "released" / "replay_buffer.zarr", as_released(DATA))


@pytest.fixture
def gelsight(tmp_path):
    path = tmp_path / "gelsight.npz"
    marker_pca.save(marker_pca.fit(recorded(seed=1)[FIELD]), path)
    return path


def test_everything_that_was_recorded_comes_out_and_the_faults_are_gone(tmp_path, released, gelsight):
    what = convert(released, tmp_path / "out", [gelsight])
    store = EpisodeStore(tmp_path / "out")
    np.testing.assert_array_equal(store.episode_ends, ENDS)
    for key, values in DATA.items():
        if values.dtype == np.uint8:
            np.testing.assert_array_equal(store.pictures(key).read(np.arange(150)), values.transpose(0, 3, 1, 2))
            assert store.array(key).chunks == (1, 6, 8, 3)
        else:
            np.testing.assert_array_equal(store.array(key)[:], values)
            assert store.array(key).dtype == np.float32
    time = store.array("timestamp")
    assert time.dtype == np.float64
    np.testing.assert_array_equal(time[:], np.arange(150) / 24)
    assert "128" in what.time and what.bgr == ("left_wrist_img",)
    matrix = marker_pca.load(gelsight)
    np.testing.assert_allclose(store.low_dim(EMBEDDING, 15), marker_pca.embed(matrix, DATA[FIELD]), atol=1e-7)
    np.testing.assert_array_equal(store.pca("gelsight")[0], matrix.components)
    assert what.without == ("left_gripper2_marker_offset",)
    assert {f.severity for f in check_store(tmp_path / "out")} == {"note"}
    assert set(store.keys) == set(as_released(DATA))


def test_a_raw_field_in_the_place_of_an_embedding_is_refused_without_a_matrix(tmp_path, released):
    with pytest.raises(
        UserError, match=r"data/left_gripper1_.*raw marker field of gelsight \(126 numbers\).*--pca FILE"
    ):
        convert(released, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_time_that_can_be_trusted_and_an_embedding_that_fits_are_kept(tmp_path):
    data = DATA | {
        "timestamp": 1.7e9 + np.arange(150) / 24.3 + 60 * (np.arange(150) >= 60),  # a pause between two episodes
        EMBEDDING: np.random.default_rng(0).normal(size=(150, 15)).astype(np.float32),
    }
    what = convert(write(tmp_path / "in", data), tmp_path / "out", cameras_bgr=False)
    store = EpisodeStore(tmp_path / "out")
    assert what.time is None and what.kept == (EMBEDDING,) and what.bgr == ()
    np.testing.assert_array_equal(store.array("timestamp")[:], data["timestamp"])
    np.testing.assert_array_equal(store.array(EMBEDDING)[:], data[EMBEDDING])
    np.testing.assert_array_equal(
        store.pictures("left_wrist_img").read(np.arange(150)), DATA["left_wrist_img"].transpose(0, 3, 1, 2)
    )


@pytest.mark.parametrize(
    ("times", "why"),
    [
        (np.arange(150) / 48, "48.0 frames a second"),
        (np.arange(150)[::-1] / 24, "does not increase"),
        (np.full(150, np.nan), "not one finite number"),
        (None, "there is none"),
    ],
)
def test_a_time_that_cannot_be_trusted_is_rebuilt(tmp_path, times, why):
    data = dict(DATA) if times is None else DATA | {"timestamp": times}
    what = plan(EpisodeStore(write(tmp_path / "in", data)), {})
    assert why in what.time


def test_a_stopped_conversion_goes_on_and_is_not_there_before_it_is_whole(tmp_path, released, gelsight):
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path / "out", [gelsight], on_episode=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"out\.part is the part of another conversion .*: delete it"):
        convert(released, tmp_path / "out", [gelsight], cameras_bgr=False)
    seen.clear()
    convert(released, tmp_path / "out", [gelsight], on_episode=lambda *counts: seen.append(counts))
    assert seen == [(2, 3), (3, 3)] and not (tmp_path / "out.part").exists()
    resumed = EpisodeStore(tmp_path / "out")
    for key in (key for key, values in DATA.items() if values.dtype != np.uint8):
        np.testing.assert_array_equal(resumed.array(key)[:], DATA[key])
    np.testing.assert_array_equal(
        resumed.pictures("left_wrist_img").read(np.arange(150)), DATA["left_wrist_img"].transpose(0, 3, 1, 2)
    )
    with pytest.raises(UserError, match=r"out exists: delete it"):
        convert(released, tmp_path / "out", [gelsight])


def test_facts_of_episodes_and_a_repeated_conversion_keep_everything(tmp_path, gelsight):
    path = write(tmp_path / "in", as_released(DATA))
    group = zarr.open_group(path, mode="a", zarr_format=2)
    group.create_array("meta/variation", data=np.array([b"none", b"before", b"after"]))
    convert(path, tmp_path / "once", [gelsight])
    assert EpisodeStore(tmp_path / "once").facts("variation").tolist() == [b"none", b"before", b"after"]
    what = convert(tmp_path / "once", tmp_path / "twice")  # says that it is RGB: nothing is turned round again
    assert what.time is None and what.kept == (EMBEDDING,) and what.bgr == ()
    once, twice = EpisodeStore(tmp_path / "once"), EpisodeStore(tmp_path / "twice")
    for key in once.keys:
        np.testing.assert_array_equal(once.array(key)[:], twice.array(key)[:])
    np.testing.assert_array_equal(once.pca("gelsight").components, twice.pca("gelsight").components)


def test_matrices_that_do_not_fit_are_refused(tmp_path, released, gelsight):
    rng = np.random.default_rng(0)
    odd, mctac = tmp_path / "odd.npz", tmp_path / "mctac.npz"
    marker_pca.save(marker_pca.fit(rng.normal(size=(100, 40, 2))), odd)
    marker_pca.save(marker_pca.fit(rng.normal(size=(100, 25, 2))), mctac)
    with pytest.raises(
        UserError, match=r"odd\.npz: a PCA of 40 markers; known sensors and their markers: gelsight 63, mctac 25"
    ):
        load_pcas([odd])
    with pytest.raises(UserError, match="a second PCA for gelsight"):
        load_pcas([gelsight, gelsight])
    with pytest.raises(UserError, match="a matrix for mctac is given"):
        plan(
            EpisodeStore(write(tmp_path / "in", {k: v for k, v in DATA.items() if "gripper2" not in k})),
            load_pcas([mctac]),
        )
    small = MarkerPca(np.eye(126, 10, dtype=np.float32), np.zeros(126, np.float32))
    marker_pca.save(small, odd)
    with pytest.raises(UserError, match=r"odd\.npz"):
        load_pcas([odd])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EMBEDDING: np.zeros((150, 20), np.float32)}, r"emb has \[20\] numbers a frame, expected \[15\]"),
        ({"left_robot_tcp_vel": np.zeros((149, 6), np.float32)}, "tcp_vel has 149 frames"),
        ({"left_wrist_img": np.zeros((150, 6, 8, 4), np.uint8)}, r"left_wrist_img is uint8 \[150, 6, 8, 4\], expected"),
        ({"left_robot_tcp_vel": np.zeros((150, 6), bool)}, r"is bool \[150, 6\], expected numbers"),
    ],
)
def test_arrays_that_cannot_be_converted_are_named_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        convert(write(tmp_path / "in", DATA | change), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_matrix_is_fitted_on_the_fields_of_one_sensor(tmp_path, released, monkeypatch):
    store = EpisodeStore(released)
    sensor, matrix, kept = fit_pca(store, "mctac")
    assert sensor == "mctac" and matrix.components.shape == (50, 15) and 0 < kept < 1
    with pytest.raises(UserError, match="gelsight, mctac: give --sensor"):
        fit_pca(store)
    monkeypatch.setattr(released_episodes, "PCA_FRAMES", 100)
    fewer = fit_pca(store, "mctac")[1]
    assert not np.array_equal(fewer.mean, matrix.mean)


def test_the_verbs_from_the_raw_store_to_a_sound_one(tmp_path, released, capsys):
    out, matrix = str(tmp_path / "out"), str(tmp_path / "g.npz")
    assert data_tool(["convert", str(released), out]) == 2
    assert "--pca FILE" in capsys.readouterr().err
    assert data_tool(["pca", str(released), matrix, "--sensor", "gelsight"]) == 0
    assert "gelsight, 63 markers, 15 components keep" in capsys.readouterr().out
    assert data_tool(["convert", str(released), out, "--pca", matrix, "--jpeg", "95"]) == 0
    text = capsys.readouterr().out
    assert "time: rebuilt from 24 frames a second" in text and "embeddings made anew: left_gripper1" in text
    assert data_tool(["check", out]) == 0
    assert EpisodeStore(out).pictures("left_wrist_img").is_jpeg
