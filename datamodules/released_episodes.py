"""From the layout that RDP released to ours: the same arrays, with what is faulty or slow in them put right.

| released | ours |
|---|---|
| float32 time: epoch seconds are 128 s apart | float64, rebuilt from 24 frames a second where it cannot be trusted |
| RealSense pictures blue first | all pictures RGB |
| pictures in chunks of 100 frames | one frame a chunk, or JPEG |
| marker field without embedding, or the raw field in its place where the PCA did not fit | 15 numbers by a given PCA |
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.episode_writer import EpisodeWriter
from datamodules.episodes import EpisodeStore
from mmtrain import marker_pca
from mmtrain.config_errors import UserError
from mmtrain.marker_pca import MarkerPca
from mmtrain.robot_tasks import EMBEDDING, FRAME_RATE, MARKERS, sensor_of

EMBEDDED = "_marker_offset_emb"
RATE_TOLERANCE = 0.2  # of the frame rate, within which a stored time is trusted
PCA_FRAMES = 30_000  # presses that a PCA is fitted on at most


@dataclass(frozen=True)
class Plan:
    """What a conversion does, found out before anything is written.

    Args:
        time: None keeps the stored time, else why it is rebuilt.
        pictures: keys of pictures; bgr: those of them that are turned round.
        numbers: keys of the other arrays, embeddings and time not among them.
        kept: embeddings that are taken as they are; built: those made by a PCA, key -> sensor.
        without: marker fields that stay without an embedding.
    """

    time: str | None
    pictures: tuple[str, ...]
    bgr: tuple[str, ...]
    numbers: tuple[str, ...]
    kept: tuple[str, ...]
    built: dict[str, str]
    without: tuple[str, ...]

    def lines(self) -> list[str]:
        """For the user, one line a subject."""
        lines = [f"time: {'kept' if self.time is None else f'rebuilt from {FRAME_RATE} frames a second: {self.time}'}"]
        lines += [f"pictures: {', '.join(self.pictures)}"] * bool(self.pictures)
        lines += [f"blue first, turned to RGB: {', '.join(self.bgr)}"] * bool(self.bgr)
        lines += [f"embeddings made anew: {', '.join(self.built)}"] * bool(self.built)
        lines += [f"embeddings kept: {', '.join(self.kept)}"] * bool(self.kept)
        return lines + [f"without embedding (no PCA given): {', '.join(self.without)}"] * bool(self.without)


def convert(
    released: str | Path,
    out: str | Path,
    pca: Sequence[str | Path] = (),
    cameras_bgr: bool = True,
    jpeg_quality: int | None = None,
    on_episode: Callable[[int, int], None] | None = None,
) -> Plan:
    """Write a released store anew, episode by episode, into `OUT.part`, which becomes `out` when it is whole.

    A conversion that was stopped goes on behind its last whole episode when it is called again.

    Args:
        pca: files of marker PCAs (`marker_pca.save`); each tells its sensor by its size, and all embeddings of that
            sensor are made anew.
        cameras_bgr: the RealSense pictures of `released` are blue first, as the released recorder leaves them, unless
            the store says that they are RGB.
        jpeg_quality: see `EpisodeWriter`.
        on_episode: called with (episodes done, episodes in all) at the start and after each.

    Raises:
        UserError: `out` exists, a part of another conversion is in the way, or `released` cannot be converted: see
            `plan`.
    """
    store, out = EpisodeStore(released), Path(out)
    if out.exists():
        raise UserError(f"{out} exists: delete it, or give another path")
    matrices = load_pcas(pca)
    what = plan(store, matrices, cameras_bgr)
    part = out.with_name(out.name + ".part")
    attributes = {"conversion": _identity(store, matrices, cameras_bgr, jpeg_quality)}
    if part.exists():
        found = EpisodeWriter(part).group.attrs.get("conversion")
        if found != attributes["conversion"]:
            raise UserError(
                f"{part} is the part of another conversion ({found}, now {attributes['conversion']}): delete it"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = EpisodeWriter(part, attributes, jpeg_quality)
    own = {sensor: matrix for sensor in MARKERS if (matrix := store.pca(sensor)) is not None}
    for sensor, matrix in (own | matrices).items():
        writer.write_pca(sensor, *matrix)
    report = on_episode or (lambda done, total: None)
    report(writer.num_episodes, store.num_episodes)
    while writer.num_episodes < store.num_episodes:
        writer.append(read_episode(store, writer.num_episodes, what, matrices))
        report(writer.num_episodes, store.num_episodes)
    os.replace(part, out)
    return what


def plan(store: EpisodeStore, matrices: Mapping[str, MarkerPca], cameras_bgr: bool = True) -> Plan:
    """Look at all arrays of a released store without reading pictures.

    Raises:
        UserError: an array of wrong length or type, a raw field in the place of an embedding for which no PCA is given,
            or a PCA that fits no marker field.
    """
    pictures, numbers, kept, built, without = [], [], [], {}, []
    for key in store.keys:
        array = store.array(key)
        if array.dtype == object or (array.dtype == np.uint8 and array.ndim == 4):
            store.pictures(key)  # raises where it holds something else
            pictures.append(key)
        elif array.dtype.kind not in "fiu":
            raise UserError(
                f"{store.path}: data/{key} is {array.dtype} {list(array.shape)}, expected numbers or pictures"
            )
        elif key.endswith(EMBEDDED):
            if (sensor := sensor_of(key)) in matrices and key.removesuffix("_emb") in store.keys:
                continue  # made anew, below
            kept.append(_check_embedding(store, key, array.shape[1:], sensor))
        elif key != "timestamp":
            numbers.append(key)
            if key.endswith("_marker_offset"):
                sensor = sensor_of(key)
                if sensor in matrices:
                    _check_fields(store, key, array.shape[1:], matrices[sensor])
                    built[f"{key}_emb"] = sensor
                elif f"{key}_emb" not in store.keys:
                    without.append(key)
    if idle := set(matrices) - set(built.values()):
        raise UserError(
            f"pca: a matrix for {', '.join(sorted(idle))} is given, but {store.path} has no such marker field"
        )
    return Plan(
        time=_distrust(store),
        pictures=tuple(pictures),
        bgr=tuple(key for key in pictures if store.is_blue_first(key, cameras_bgr)),
        numbers=tuple(numbers),
        kept=tuple(kept),
        built=built,
        without=tuple(without),
    )


def read_episode(store: EpisodeStore, episode: int, what: Plan, matrices: Mapping[str, MarkerPca]) -> dict[str, Any]:
    """One episode as `EpisodeWriter.append` takes it."""
    stop = int(store.episode_ends[episode])
    start = int(store.episode_ends[episode - 1]) if episode else 0
    rows: dict[str, Any] = {}
    if what.time is None:
        rows["timestamp"] = np.asarray(store.array("timestamp")[start:stop], dtype=np.float64)
    else:
        rows["timestamp"] = np.arange(start, stop) / FRAME_RATE
    for key in (*what.numbers, *what.kept):
        rows[key] = np.asarray(store.array(key)[start:stop], dtype=np.float32)
    for key, sensor in what.built.items():
        rows[key] = marker_pca.embed(matrices[sensor], rows[key.removesuffix("_emb")])
    for key in what.pictures:  # opened for each episode: an array keeps the chunks that it has decoded
        planes = store.pictures(key, bgr=key in what.bgr).read(np.arange(start, stop))
        rows[key] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    for name in _facts(store):
        rows[name] = store.facts(name)[episode]
    return rows


def load_pcas(files: Sequence[str | Path]) -> dict[str, MarkerPca]:
    """PCAs by sensor, which their size tells.

    Raises:
        UserError: a size of no known sensor, another number of components than 15, or two for one sensor.
    """
    sensors = {rows * columns: sensor for sensor, (rows, columns) in MARKERS.items()}
    matrices: dict[str, MarkerPca] = {}
    for file in files:
        matrix = marker_pca.check(marker_pca.load(file), components=EMBEDDING, where=str(file))
        sensor = sensors.get(len(matrix.mean) // 2)
        if sensor is None:
            known = ", ".join(f"{name} {markers}" for markers, name in sensors.items())
            raise UserError(
                f"{file}: a PCA of {len(matrix.mean) // 2} markers; known sensors and their markers: {known}"
            )
        if sensor in matrices:
            raise UserError(f"{file}: a second PCA for {sensor}; give one for each sensor")
        matrices[sensor] = matrix
    return matrices


def fit_pca(store: EpisodeStore, sensor: str | None = None) -> tuple[str, MarkerPca, float]:
    """Fit a sensor's marker PCA on all its fields in a store, of either arm, at most PCA_FRAMES frames of them.

    RDP fits it on a data set of presses of its own; the demonstrations are a stand-in where there is none.

    Args:
        sensor: "gelsight" or "mctac"; None if the store has one only.

    Returns:
        The sensor, its PCA, and the share of the variance that the components keep.

    Raises:
        UserError: no marker field, or fields of several sensors and none named.
    """
    fields = {key: found for key in store.keys if key.endswith("_marker_offset") and (found := sensor_of(key))}
    present = sorted(set(fields.values()))
    if sensor is None and len(present) == 1:
        sensor = present[0]
    if sensor is None or sensor not in present:
        asked = "give --sensor" if sensor is None else f"not {sensor}"
        raise UserError(f"{store.path} has marker fields of {', '.join(present) or 'no sensor'}: {asked}")
    markers = int(np.prod(MARKERS[sensor]))
    rows = [store.low_dim(key, (markers, 2)) for key, found in fields.items() if found == sensor]
    stacked = np.concatenate(rows)
    stacked = stacked[np.unique(np.linspace(0, len(stacked) - 1, PCA_FRAMES).astype(int))]
    matrix = marker_pca.fit(stacked)
    return sensor, matrix, float(marker_pca.explained_ratio(matrix, stacked).sum())


def _check_embedding(store: EpisodeStore, key: str, tail: tuple[int, ...], sensor: str | None) -> str:
    if tail == (EMBEDDING,):
        return key
    markers = int(np.prod(MARKERS[sensor])) if sensor else 0
    if tail == (2 * markers,):
        raise UserError(
            f"{store.path}: data/{key} holds the raw marker field of {sensor} ({2 * markers} numbers): its PCA did not "
            f"fit when it was recorded. Give --pca FILE, a matrix for {markers} markers (`python -m mmtrain data pca` "
            "fits one)"
        )
    raise UserError(f"{store.path}: data/{key} has {list(tail)} numbers a frame, expected [{EMBEDDING}]")


def _check_fields(store: EpisodeStore, key: str, tail: tuple[int, ...], matrix: MarkerPca) -> None:
    if tail != (len(matrix.mean) // 2, 2):
        raise UserError(
            f"{store.path}: data/{key} has {list(tail)} a frame, the given PCA is for [{len(matrix.mean) // 2}, 2]"
        )


def _distrust(store: EpisodeStore) -> str | None:
    """Why the stored time is not to be trusted, None if it is."""
    if "timestamp" not in store.keys:
        return "there is none"
    array = store.array("timestamp")
    times = np.asarray(array[: store.num_frames], dtype=np.float64)
    if array.shape[1:] or not np.isfinite(times).all():
        return "it is not one finite number a frame"
    resolution = float(np.spacing(np.abs(times.astype(array.dtype)).max()))
    if resolution > 0.5 / FRAME_RATE:
        return f"{array.dtype} tells seconds {resolution:g} apart at {np.abs(times).max():.0f}"
    steps = np.delete(np.diff(times), store.episode_ends[:-1] - 1)
    if (steps <= 0).any():
        return "it does not increase within an episode"
    median = float(np.median(steps)) if len(steps) else 1 / FRAME_RATE
    if abs(median * FRAME_RATE - 1) > RATE_TOLERANCE:
        return f"it counts {1 / median:.1f} frames a second"
    return None


def _facts(store: EpisodeStore) -> list[str]:
    """Names of the facts of each episode."""
    group = store.group["meta"]
    return [name for name, array in group.arrays() if name != "episode_ends" and array.shape == (store.num_episodes,)]


def _identity(
    store: EpisodeStore, matrices: Mapping[str, MarkerPca], cameras_bgr: bool, jpeg_quality: int | None
) -> dict[str, Any]:
    """What a conversion depends on, in plain types, so that a part of another one is not gone on with."""
    return {
        "from": store.path.parent.name + "/" + store.path.name,
        "frames": store.num_frames,
        "episodes": store.num_episodes,
        "cameras_bgr": cameras_bgr,
        "jpeg_quality": jpeg_quality,
        "pca": {name: float(np.abs(matrix.components).sum()) for name, matrix in sorted(matrices.items())},
    }
