"""`python -m mmtrain data ...`: work on data sets that is done once, before training."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmtrain.config_errors import UserError


def main(argv: list[str]) -> int:
    """Run one of the verbs below; returns the exit code, 2 for a mistake of the user."""
    more = "also: python -m mmtrain data story-graph FOLDER, a story world's Character-Graph; it has its own --help"
    parser = argparse.ArgumentParser(prog="python -m mmtrain data", description=__doc__, epilog=more)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    index = verbs.add_parser(
        "index", help="count and check the samples of shards, once", description=index_shards.__doc__
    )
    index.add_argument("shards", nargs="+", help="paths, folders, globs, {00000..00331} ranges or URLs")
    index.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="shards read at a time")
    index.add_argument("--rebuild", action="store_true", help="read all shards again, also if an index exists")
    index.add_argument("--out", type=Path, help="folder of the index; default: beside the shards, or the cache")
    index.set_defaults(run=lambda a: index_shards(a.shards, a.workers, a.rebuild, a.out))
    check = verbs.add_parser("check", help="what is wrong with a store of episodes", description=check_episodes.__doc__)
    check.add_argument("path", type=Path, help="zarr store, or a folder that holds replay_buffer.zarr")
    check.set_defaults(run=lambda a: check_episodes(a.path))
    convert = verbs.add_parser(
        "convert", help="a store as RDP released it, to ours", description=convert_episodes.__doc__
    )
    convert.add_argument("released", type=Path, help="store in the released layout")
    convert.add_argument("out", type=Path, help="the new store")
    convert.add_argument("--pca", type=Path, action="append", default=[], help="marker PCA (.npz); one for each sensor")
    convert.add_argument("--cameras", choices=("bgr", "rgb"), default="bgr", help="order in the RealSense pictures")
    convert.add_argument("--jpeg", type=int, help="keep pictures as JPEG of this quality, 1..100; default: the pixels")
    convert.set_defaults(run=lambda a: convert_episodes(a.released, a.out, a.pca, a.cameras == "bgr", a.jpeg))
    pca = verbs.add_parser("pca", help="fit the PCA of a sensor's marker field", description=fit_marker_pca.__doc__)
    pca.add_argument("store", type=Path, help="zarr store with marker fields")
    pca.add_argument("out", type=Path, help="file to write (.npz)")
    pca.add_argument("--sensor", choices=("gelsight", "mctac"), help="needed if the store has both")
    pca.set_defaults(run=lambda a: fit_marker_pca(a.store, a.out, a.sensor))
    _add_vggsound(verbs)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_vggsound(verbs: argparse._SubParsersAction) -> None:
    shards = verbs.add_parser("vggsound", help="videos with sound to shards", description=make_clip_shards.__doc__)
    shards.add_argument("source", type=Path, help="folder of videos, or a csv with a column path")
    shards.add_argument("out", type=Path, help="folder for the shards")
    shards.add_argument("--csv", type=Path, help="vggsound.csv: youtube id, start second, label, split")
    shards.add_argument("--split", nargs="*", default=[], help="only these; without a list, the name of the one split")
    shards.add_argument("--fps", type=float, default=4.0, help="frames a second")
    shards.add_argument("--size", type=int, default=224, help="height and width of the frames")
    shards.add_argument("--sample-rate", type=int, default=16000, help="of the sound, in Hz")
    shards.add_argument("--seconds", type=float, default=10.0, help="longest clip")
    shards.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="videos decoded at a time")
    shards.add_argument("--shard-size", type=int, default=512, help="clips a shard")
    shards.set_defaults(run=make_clip_shards)


def index_shards(shards: list[str], workers: int = 1, rebuild: bool = False, out: Path | None = None) -> int:
    """Write the index of a set of shards and print what each holds and what is wrong with it.

    Returns 0, or 1 if samples are known to be missing.
    """
    from datamodules.paths import expand_shards, unpacked
    from datamodules.tar_index import open_index

    urls = [unpacked(url) for url in expand_shards(shards)]
    index, folder = open_index(urls, workers, rebuild, out)
    table = Table("shard", "samples", "expected", "problems", title=f"{len(urls)} shards", title_justify="left")
    faulty = [s for s in index.shards if s.problems]
    for shard in faulty[:50]:
        problems = ", ".join(f"{name} {n}" for name, n in shard.problems.items())
        table.add_row(shard.url, str(shard.samples), "" if shard.expected is None else str(shard.expected), problems)
    console = Console()
    if faulty:
        console.print(table)
    gigabytes = sum(s.bytes for s in index.shards) / 1e9
    console.print(
        f"{len(index):,} samples in {len(urls):,} shards, {gigabytes:.2f} GB; members: {', '.join(index.extensions)}"
    )
    lost = sum(s.lost for s in index.shards)
    console.print(f"{lost:,} samples are known to be missing; {len(faulty)} shards have problems; index: {folder}")
    return 1 if faulty else 0


def check_episodes(path: Path) -> int:
    """Print all that is odd about a store of episodes; pictures are looked at by shape and one sample.

    Returns 0, or 1 if there are errors.
    """
    from datamodules.episode_checks import SEVERITIES, check_store

    findings = check_store(path)
    colours = {"error": "bold red", "warning": "yellow", "note": "dim"}
    table = Table("severity", "array", "check", "found", title=str(path), title_justify="left")
    for finding in findings:
        table.add_row(*map(escape, finding), style=colours[finding.severity])
    counts = {severity: sum(f.severity == severity for f in findings) for severity in SEVERITIES}
    console = Console()
    console.print(table)
    console.print(", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in counts.items()))
    return 1 if counts["error"] else 0


def convert_episodes(
    released: Path, out: Path, pca: list[Path], cameras_bgr: bool = True, jpeg_quality: int | None = None
) -> int:
    """Write a store of the released layout anew: float64 time, RGB, one frame a chunk, embeddings by the given PCA.

    Stopped, it goes on where it was when it is called again.
    """
    from rich.progress import Progress

    from datamodules.released_episodes import convert
    from datamodules.tar_index import COLUMNS

    console = Console()
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("episodes", total=None)
        show = lambda done, total: progress.update(bar, completed=done, total=total)  # noqa: E731
        what = convert(released, out, pca, cameras_bgr, jpeg_quality, show)
    for line in what.lines():
        console.print(line, markup=False)
    console.print(f"written: {out}", markup=False)
    return 0


def fit_marker_pca(store: Path, out: Path, sensor: str | None = None) -> int:
    """Fit 15 principal components of a sensor's marker offsets and save them for `data convert --pca`."""
    from datamodules.episodes import EpisodeStore
    from datamodules.released_episodes import fit_pca
    from mmtrain import marker_pca

    found, matrix, kept = fit_pca(EpisodeStore(store), sensor)
    marker_pca.save(matrix, out)
    print(f"{out}: {found}, {len(matrix.mean) // 2} markers, {matrix.components.shape[1]} components keep {kept:.2%}")
    return 0


def make_clip_shards(arguments: argparse.Namespace) -> int:
    """Cut videos into frames and sound and write them as shards for the stages of Diff-Foley.

    Stopped, it goes on where it was when it is called again. What cannot be used is listed in failures.csv; returns 1
    if that is more than half.
    """
    from rich.progress import Progress

    from datamodules.tar_index import COLUMNS
    from datamodules.vggsound import FAILURES, vggsound_rows, write_vggsound
    from mmtrain.video_audio import ClipFormat

    whole = max(1, int(arguments.fps * arguments.seconds))  # windows are cut later; any that fit do here
    clip_format = ClipFormat(
        fps=arguments.fps,
        seconds=arguments.seconds,
        frame_size=arguments.size,
        sample_rate=arguments.sample_rate,
        contrast_frames=whole,
        window_frames=whole,
    )
    rows = vggsound_rows(arguments.source, arguments.csv, arguments.split)
    console = Console()
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("clips", total=len(rows))
        show = lambda done, total: progress.update(bar, completed=done, total=total)  # noqa: E731
        written = write_vggsound(rows, arguments.out, clip_format, arguments.shard_size, arguments.workers, show)
    for split, count in written.counts.items():
        console.print(f"{split}: {count:,} clips, ids in {arguments.out / f'{split}_ids.txt'}", markup=False)
    lost = len(written.failures)
    console.print(f"{lost:,} of {len(rows):,} could not be used: {arguments.out / FAILURES}", markup=False)
    return 1 if lost > len(rows) / 2 else 0
