"""Streams with jitter, drop-outs and latency against what is known to have happened."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from datamodules.stream_alignment import Stream, align
from mmtrain.config_errors import UserError
from mmtrain.poses import ortho6d_from_rotation, rotation_from_ortho6d

EPOCH = 1.7e9  # seconds; float32 could not tell two frames apart


def stream(rate: float, seconds: float = 10.0, jitter: float = 0.0, seed: int = 0, latency: float = 0.0) -> Stream:
    """A sensor of a given rate whose value is the true time of its sample; stamps are late by latency and jitter."""
    rng = np.random.default_rng(seed)
    truth = np.arange(0, seconds, 1 / rate)
    truth = truth + rng.uniform(-jitter, jitter, len(truth)) / rate
    return Stream(EPOCH + truth + latency, truth[:, None])


def drop(source: Stream, start: float, stop: float) -> Stream:
    keep = (source.times - EPOCH < start) | (source.times - EPOCH > stop)
    return Stream(source.times[keep], source.values[keep])


SENSORS = {
    "camera": stream(24, jitter=0.2, seed=1),
    "gelsight": stream(25, jitter=0.2, seed=2),
    "mctac": stream(30, jitter=0.2, seed=3),
    "wrench": stream(120, jitter=0.2, seed=4),
}


def test_every_frame_of_the_slowest_camera_finds_its_partners_under_jitter():
    table = align(SENSORS)
    camera = SENSORS["camera"]
    assert len(table) >= len(camera.times) - 2 and table.times.dtype == np.float64
    assert (np.diff(table.times) > 0).all() and not table.gaps
    np.testing.assert_array_equal(table.values["camera"], camera.values[table.indices["camera"]])
    for name, rate in (("gelsight", 25), ("mctac", 30), ("wrench", 120)):
        # the nearest of two neighbours is at most half a period plus the jitter away, a free neighbour one period more
        off = np.abs(table.values[name] - table.values["camera"])
        assert off.max() < 2 / rate and np.median(off) < 0.4 / rate
        assert (np.diff(table.indices[name]) > 0).all()  # in order, and none twice
    assert table.unused["wrench"] == 1200 - len(table)


def test_a_record_bears_its_newest_stamp():
    table = align(SENSORS)
    stamps = np.stack([SENSORS[name].times[index] for name, index in table.indices.items()])
    np.testing.assert_array_equal(table.times, stamps.max(0))
    np.testing.assert_array_equal(table.spread, stamps.max(0) - stamps.min(0))
    assert table.spread.max() <= 0.1


def test_a_record_needs_a_partner_in_every_stream_and_the_gap_names_who_was_missing():
    streams = SENSORS | {"mctac": drop(SENSORS["mctac"], 3.0, 4.0)}
    table = align(streams)
    (gap,) = table.gaps
    assert gap.without == ("mctac",)
    # partners may be up to the slop away, so the hole is at most two slops shorter than the drop-out
    assert EPOCH + 2.9 < gap.start < EPOCH + 3.15 and EPOCH + 3.85 < gap.stop < EPOCH + 4.1
    assert abs(gap.missing - 20) <= 3
    (gap,) = align(SENSORS | {"camera": drop(SENSORS["camera"], 3.0, 4.0)}).gaps
    assert gap.without == ("camera",) and gap.missing in (23, 24, 25)
    narrow = align(streams, slop=0.03)
    assert (narrow.spread <= 0.03).all() and len(narrow) < len(table)


def test_a_sample_that_two_records_want_goes_to_the_nearer_one():
    slow = Stream(np.array([0.00, 0.10, 0.20]), np.arange(3.0))
    fast = Stream(np.array([0.02, 0.09, 0.23]), np.arange(3.0))
    late = Stream(np.array([-0.03, 0.08, 0.23]), np.arange(3.0))
    assert align({"slow": slow, "fast": fast}, pivot="slow").indices["fast"].tolist() == [0, 1, 2]
    lonely = Stream(np.array([0.06, 0.21]), np.arange(2.0))
    once = align({"slow": slow, "lonely": lonely}, pivot="slow")
    assert (once.indices["slow"].tolist(), once.indices["lonely"].tolist()) == ([1, 2], [0, 1])
    held = align({"slow": slow, "lonely": lonely}, pivot="slow", once=False)
    assert (held.indices["slow"].tolist(), held.indices["lonely"].tolist()) == ([0, 1, 2], [0, 0, 1])
    # 0.00 and 0.10 are both nearest to 0.04; all three find a partner if the last two take the next one
    both = Stream(np.array([0.04, 0.13, 0.22]), np.arange(3.0))
    assert align({"slow": slow, "both": both}, pivot="slow").indices["both"].tolist() == [0, 1, 2]
    assert align({"slow": slow, "late": late}, pivot="slow").indices["late"].tolist() == [0, 1, 2]


def most_saved(pivot: np.ndarray, times: np.ndarray, slop: float) -> float:
    """What the best matching in order saves, by trying all."""
    if not len(pivot) or not len(times):
        return 0.0
    gain = slop - abs(pivot[0] - times[0])
    both = gain + most_saved(pivot[1:], times[1:], slop) if gain >= 0 else 0.0
    return max(both, most_saved(pivot[1:], times, slop), most_saved(pivot, times[1:], slop))


@pytest.mark.parametrize("seed", range(8))
def test_the_matching_has_the_least_sum_of_distances(seed):
    rng = np.random.default_rng(seed)
    pivot, times = (np.sort(rng.uniform(0, 0.4, n)) for n in (7, 6))
    table = align({"p": Stream(pivot, pivot), "t": Stream(times, times)}, pivot="p")
    saved = (0.1 - np.abs(table.values["p"] - table.values["t"])).sum()
    assert saved == pytest.approx(most_saved(pivot, times, 0.1), abs=1e-7)
    assert len(set(table.indices["t"].tolist())) == len(table)


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_never_used_twice_nor_out_of_order_whatever_is_lost(seed):
    rng = np.random.default_rng(seed)
    streams = {}
    for name, source in SENSORS.items():
        keep = rng.random(len(source.times)) > 0.3
        streams[name] = Stream(source.times[keep], source.values[keep])
    table = align(streams)
    for index in table.indices.values():
        assert (np.diff(index) > 0).all()
    assert (table.spread <= 0.1).all() and 50 < len(table) < 240
    assert sum(gap.missing for gap in table.gaps) > 0


def test_a_known_latency_is_taken_off_the_stamps_and_only_on_demand():
    streams = {"camera": stream(24), "gelsight": stream(25, latency=0.052), "wrench": stream(120)}
    errors = {}
    for known in ({}, {"gelsight": 0.052}):
        table = align(streams, latency=known)
        errors[len(known)] = np.median(table.values["camera"] - table.values["gelsight"])
    assert errors[0] == pytest.approx(0.052, abs=0.02)  # touch is older than the picture beside it
    assert abs(errors[1]) < 0.01


def test_linear_interpolation_gives_the_value_at_the_record_s_stamp():
    streams = {"camera": stream(24, jitter=0.2), "wrench": stream(60, jitter=0.3, seed=5)}
    table = align(streams, interpolate={"wrench": "linear"})
    np.testing.assert_allclose(table.values["wrench"][:, 0], table.times - EPOCH, atol=1e-6)
    assert "wrench" not in table.indices
    holed = align(streams | {"wrench": drop(streams["wrench"], 3, 4)}, interpolate={"wrench": "linear"})
    assert holed.gaps[0].without == ("wrench",)  # never across a hole wider than the slop


def test_poses_are_interpolated_on_the_sphere():
    def pose(t: np.ndarray) -> np.ndarray:
        rotation = Rotation.from_rotvec(np.outer(t, [0.0, 0.6, 0.8]) * 1.5).as_matrix()
        return np.concatenate([np.stack([t, 2 * t, -t], -1), ortho6d_from_rotation(rotation)], -1)

    camera, robot = stream(24, jitter=0.2), stream(30, jitter=0.2, seed=7)
    robot = Stream(robot.times, pose(robot.values[:, 0]).astype(np.float32))
    table = align({"camera": camera, "pose": robot}, interpolate={"pose": "pose"})
    truth = pose(table.times - EPOCH)
    np.testing.assert_allclose(table.values["pose"], truth, atol=2e-6)
    rotation = rotation_from_ortho6d(table.values["pose"][:, 3:])
    np.testing.assert_allclose(
        rotation @ rotation.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotation.shape), atol=1e-6
    )
    assert table.values["pose"].dtype == np.float32 and len(table) > 230


def test_pictures_pass_as_they_are():
    pictures = np.random.default_rng(0).integers(0, 255, (240, 4, 5, 3), dtype=np.uint8)
    table = align({"camera": Stream(stream(24).times, pictures), "wrench": stream(120)})
    np.testing.assert_array_equal(table.values["camera"], pictures[table.indices["camera"]])


def broken(change) -> dict[str, Stream]:
    times, values = (array.copy() for array in SENSORS["wrench"])
    return SENSORS | {"wrench": Stream(*change(times, values))}


def swapped(times, values):
    times[[7, 8]] = times[[8, 7]]
    return times, values


def repeated(times, values):
    times[8] = times[7]
    return times, values


def not_finite(times, values):
    times[7] = np.nan
    return times, values


@pytest.mark.parametrize(
    ("streams", "options", "message"),
    [
        (broken(swapped), {}, r"stream wrench: stamp 8 is .* expected increasing seconds \(1 such"),
        (broken(repeated), {}, "stream wrench: stamp 8 is .* expected increasing"),
        (broken(lambda t, v: (t.astype(np.float32), v)), {}, "stream wrench: stamp 1 .* expected increasing"),
        (broken(not_finite), {}, "stream wrench: stamp 7 is nan"),
        (broken(lambda t, v: (t[1:], v)), {}, "stream wrench: .*1199.* stamps for 1200 values"),
        (broken(lambda t, v: (t[:0], v[:0])), {}, "at least one"),
        ({}, {}, "there is none"),
        (SENSORS, {"slop": 0.0}, "slop: 0.0, expected seconds above 0"),
        (SENSORS, {"latency": {"gelsigth": 0.05}}, "latency: no stream gelsigth; did you mean gelsight?"),
        (SENSORS, {"pivot": "kamera"}, "pivot: no stream kamera; did you mean camera?"),
        (SENSORS, {"pivot": "camera", "interpolate": {"camera": "linear"}}, "pivot: camera is interpolated"),
        (SENSORS, {"interpolate": dict.fromkeys(SENSORS, "linear")}, "all streams are interpolated"),
        (SENSORS, {"interpolate": {"wrench": "cubic"}}, "cubic is not known, expected linear or pose"),
        (SENSORS, {"interpolate": {"wrench": "pose"}}, "expected poses of 9 numbers"),
        (broken(lambda t, v: (t, v.astype(np.uint8))), {"interpolate": {"wrench": "linear"}}, "wrench holds uint8"),
    ],
)
def test_bad_streams_are_refused_by_name(streams, options, message):
    with pytest.raises(UserError, match=message):
        align(streams, **options)


def test_no_overlap_gives_an_empty_table():
    table = align({"a": stream(24), "b": stream(24, latency=100.0)})
    assert len(table) == 0 and table.values["b"].shape == (0, 1) and table.gaps == []
