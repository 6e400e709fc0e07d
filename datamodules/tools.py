"""`python -m mmtrain data ...`: work on data sets that is done once, before training."""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmtrain.config_errors import UserError


def main(argv: list[str]) -> int:
    """Run one of the verbs below; returns the exit code, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(prog="python -m mmtrain data", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    index = verbs.add_parser(
        "index", help="count and check the samples of shards, once", description=index_shards.__doc__
    )
    index.add_argument("shards", nargs="+", help="paths, folders, globs, {00000..00331} ranges or URLs")
    index.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="shards read at a time")
    index.add_argument("--rebuild", action="store_true", help="read all shards again, also if an index exists")
    index.add_argument("--out", type=Path, help="folder of the index; default: beside the shards, or the cache")
    index.set_defaults(run=lambda a: index_shards(a.shards, a.workers, a.rebuild, a.out))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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
