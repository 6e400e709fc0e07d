"""Each fault of a store is found, alone and by name; a sound store has none."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import zarr

from datamodules import episode_checks
from datamodules.episode_checks import action_shift, check_store
from datamodules.episode_writer import EpisodeWriter
from datamodules.tools import main as data_tool
from mmtrain import marker_pca
from mmtrain.config_errors import UserError
from tests.datamodules.released_store import ENDS, EPOCH, as_released, labels, recorded, write

Data = dict[str, np.ndarray]


def sound() -> Data:
    """A store without a fault: our layout, with an embedding that fits."""
    data = {key: values for key, values in recorded().items() if key != "left_gripper1_img"}
    data["timestamp"] = EPOCH + np.arange(150) / 24
    fields = data["left_gripper1_marker_offset"]
    data["left_gripper1_marker_offset_emb"] = marker_pca.embed(marker_pca.fit(fields), fields)
    return data


def found(path, severity: str = "") -> list[tuple[str, str, str]]:
    return [(f.severity, f.array, f.check) for f in check_store(path) if f.severity.startswith(severity)]


def test_a_sound_store_has_notes_only(tmp_path):
    data = sound()
    writer, starts = EpisodeWriter(tmp_path / "store"), [0, *ENDS[:-1]]
    for start, stop in zip(starts, ENDS, strict=True):
        writer.append({key: values[start:stop] for key, values in data.items()})
    writer.write_pca("gelsight", *marker_pca.fit(data["left_gripper1_marker_offset"]))
    assert {f.severity for f in check_store(tmp_path / "store")} == {"note"}
    lag = next(f.message for f in check_store(tmp_path / "store") if f.check == "lag")
    assert "+1 frame on" in lag and "as expected" in lag
    assert not any("order of its channels" in f.message for f in check_store(tmp_path / "store"))  # it is known


def test_episodes_do_not_hide_that_they_are_of_another_store_s_matrix(tmp_path):
    data = sound()
    writer = EpisodeWriter(tmp_path / "store")
    writer.append(data)
    writer.write_pca("gelsight", *marker_pca.fit(recorded(seed=1)["left_gripper1_marker_offset"]))
    assert found(tmp_path / "store", "error") == [("error", "data/left_gripper1_marker_offset_emb", "embedding")]


WRENCH, POSE = "left_robot_tcp_wrench", "left_robot_tcp_pose"


def set_at(key: str, index, value) -> Callable[[Data], None]:
    return lambda data: data[key].__setitem__(index, value)


def replace(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Data], None]:
    return lambda data: data.update({key: change(data[key])})


def later(frame: int, seconds: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda times: times + seconds * (np.arange(len(times)) >= frame)


FAULTS = {
    "NaN": (set_at(WRENCH, (70, 2), np.nan), f"error data/{WRENCH} finite", "1 frame .*episode 1, frame 10"),
    "infinity": (set_at("action", (3, 0), np.inf), "error data/action finite", "episode 0, frame 3"),
    "outlier": (set_at(WRENCH, (70, 2), 900.0), f"warning data/{WRENCH} outlier", "number 2 is 900 at episode 1"),
    "dead": (set_at(WRENCH, slice(None), 0.0), f"warning data/{WRENCH} dead", "constant in the whole store"),
    "dead action": (set_at("action", slice(None), 0.5), "error data/action dead", "nothing can be learned"),
    "dead episode": (set_at(WRENCH, slice(60, 105), 1.0), f"warning data/{WRENCH} dead", "1 episode .* first: 1"),
    "frozen": (
        set_at(WRENCH, slice(70, 100), 1.0),
        f"warning data/{WRENCH} frozen",
        "30 frames from episode 1, frame 10",
    ),
    "rotation": (set_at(POSE, (5, 3), 0.2), f"warning data/{POSE} rotation", "1 frame .* episode 0, frame 5"),
    "gap": (replace("timestamp", later(70, 2 / 24)), "warning data/timestamp gaps", "1 gap, 2 frames .* frame 9"),
    "long gap": (replace("timestamp", later(70, 3.0)), "error data/timestamp gaps", "72 frames lost"),
    "back in time": (replace("timestamp", later(70, -1.0)), "error data/timestamp time", "1 frames, first: episode 1"),
    "other rate": (
        replace("timestamp", lambda t: EPOCH + np.arange(150) / 12.0),
        "warning data/timestamp time",
        "12.00",
    ),
    "float32 time": (
        replace("timestamp", lambda t: t.astype(np.float32)),
        "warning data/timestamp time",
        "float32 tells seconds 128 apart",
    ),
    "no time": (set_at("timestamp", 7, np.nan), "error data/timestamp time", "nan at episode 0, frame 7"),
    "lag 0": (
        lambda data: data.update(action=data["target"].copy()),
        "error data/action lag",
        r"state \+0 frames on .* stand still",
    ),
    "lag 2": (
        lambda data: data.update(action=labels(data["target"], ENDS, 2)),
        "warning data/action lag",
        r"state \+2 frames on",
    ),
    "into the next": (
        lambda data: data.update(action=labels(data["target"], np.array([150]))),
        "error data/action lag",
        "2 episodes whose last action is the first state of the next",
    ),
    "no action": (lambda data: data.pop("action"), "error data/action lag", "no such array"),
    "other width": (replace("action", lambda a: a[:, :3]), "warning data/action lag", "3 numbers: not a layout"),
    "raw field": (
        lambda data: data.update(
            left_gripper1_marker_offset_emb=recorded()["left_gripper1_marker_offset"].reshape(150, -1)
        ),
        "error data/left_gripper1_marker_offset_emb embedding",
        r"\[126\] numbers.*raw marker field.*--pca FILE",
    ),
    "short array": (replace(WRENCH, lambda w: w[:-1]), f"error data/{WRENCH} read", "149 frames"),
    "whole numbers": (replace(WRENCH, lambda w: w.astype(np.int32)), f"error data/{WRENCH} type", "int32"),
    "float64": (replace(WRENCH, lambda w: w.astype(np.float64)), f"note data/{WRENCH} type", "float64"),
    "grey": (set_at("left_wrist_img", slice(None), 7), "warning data/left_wrist_img pictures", r"one colour \(7\)"),
}
CHUNKS = {("data/left_wrist_img", "pictures")}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else(tmp_path, name):
    damage, expected, message = FAULTS[name]
    data = sound()
    damage(data)
    path = write(tmp_path / "store", data)
    findings = check_store(path)
    severity, array, check = expected.split()
    hits = [f for f in findings if (f.array, f.check) == (array, check)]
    assert any(f.severity == severity and re.search(message, f.message) for f in hits), hits
    others = {(f.array, f.check) for f in findings if f.severity != "note" and f not in hits}
    # of an action that does not move, the lag cannot be told either
    assert others <= CHUNKS | ({("data/action", "lag")} if array == "data/action" else set()), others


def test_pictures_in_chunks_of_many_frames_are_named(tmp_path):
    path = write(tmp_path / "store", sound())
    assert {(array, check) for _, array, check in found(path, "warning")} == CHUNKS


def test_a_released_store_shows_its_known_faults(tmp_path):
    path = write(tmp_path / "store", as_released(recorded()))
    orders = [f.array for f in check_store(path) if "order of its channels" in f.message and f.severity == "note"]
    assert orders == ["data/left_wrist_img"]
    assert found(path, "error") == [("error", "data/left_gripper1_marker_offset_emb", "embedding")]
    assert ("warning", "data/timestamp", "time") in found(path)


@pytest.mark.parametrize("ends", [[60, 60, 150], [60, 50, 150], []])
def test_ends_that_do_not_increase_are_an_error(tmp_path, ends):
    path = write(tmp_path / "store", sound(), ends)
    assert found(path) == [("error", "meta/episode_ends", "episodes")]


def test_episodes_of_odd_length_are_named(tmp_path):
    path = write(tmp_path / "store", sound(), [20, 60, 150])
    (short,) = (f for f in check_store(path) if f.check == "length" and f.severity == "error")
    assert short.message.endswith("first: 0 with 20")
    lengths = np.cumsum([40] * 9 + [170])
    assert [f.severity for f in episode_checks.check_lengths(lengths)] == ["warning", "note"]


@pytest.mark.parametrize("shift", range(-2, 7))
def test_the_lag_is_found_under_noise(shift):
    rng = np.random.default_rng(shift + 5)
    target = np.cumsum(rng.normal(0, 0.01, (400, 3)), 0)
    ends = np.array([100, 250, 400])
    action = labels(target, ends, shift) + rng.normal(0, 0.002, target.shape)
    assert action_shift(action, target, ends)[0] == shift


def test_a_lag_of_an_arm_at_rest_cannot_be_told():
    still = np.ones((100, 3))
    assert action_shift(still, still, np.array([100]))[0] is None
    moving = np.arange(20.0)[:, None] * [1, 1, 1]
    assert action_shift(moving, moving, np.arange(4, 21, 4))[0] is None  # episodes shorter than the shifts tried


def test_pictures_are_not_read_but_for_one(tmp_path, monkeypatch):
    path = write(tmp_path / "store", sound())
    whole = zarr.Array.__getitem__

    def read(self: zarr.Array, selection):
        assert "_img" not in self.path, "pictures must not be read through zarr"
        return whole(self, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", read)
    check_store(path)


def test_the_verb_prints_a_table_and_tells_errors_by_its_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    good = write(tmp_path / "good", sound())
    assert data_tool(["check", str(good)]) == 0
    assert "0 errors, 1 warning" in capsys.readouterr().out
    data = sound()
    FAULTS["NaN"][0](data)
    assert data_tool(["check", str(write(tmp_path / "bad", data))]) == 1
    out = capsys.readouterr().out
    assert "1 error," in out and f"data/{WRENCH}" in out
    assert data_tool(["check", str(tmp_path / "nothing")]) == 2
    assert "no such store" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a zarr store"):
        check_store(tmp_path / "empty")
