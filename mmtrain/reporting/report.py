"""`python -m mmtrain report RUNS...`: one HTML page, a markdown file and a picture of each table and curve."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmtrain.config_errors import UserError
from mmtrain.reporting import page
from mmtrain.reporting.across import draw_across
from mmtrain.reporting.claims import claims_values
from mmtrain.reporting.contents import LAPTOP_WARNING, Contents, gather, has_ours, scale_name
from mmtrain.reporting.images import write_images
from mmtrain.reporting.results import find_runs
from mmtrain.reporting.tables import to_markdown


def main(argv: list[str]) -> int:
    """Run the verb `report`; see `--help`.

    Raises:
        UserError: no run is found, one of its files is broken, or the report cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m mmtrain report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, folders that hold them, or globs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write into (default: report)")
    parser.add_argument("--title", default="Runs beside reported numbers", help="heading of the page")
    options = parser.parse_args(argv)
    contents = gather(find_runs(options.runs), options.title)
    try:
        write_report(contents, options.out)
    except BrokenPipeError:
        raise  # of our own output, not of a file
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written ({error.strerror}: {error.filename})") from error
    return 0


def write_report(contents: Contents, folder: Path) -> None:
    """Write `report.html`, `report.md` and `images/*.png`, each printed with its size once it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(contents.runs)} run{'s' * (len(contents.runs) != 1)} of {', '.join(contents.methods)}")
    across = [(figure["title"], folder / figure["file"]) for figure in draw_across(contents.groups, folder)]
    html = folder / "report.html"
    html.write_text(page.render(contents, across), encoding="utf-8")
    print(f"{html}  {html.stat().st_size / 1e6:.1f} MB, opens in any browser without network")
    images = write_images(contents, folder / "images")
    print(f"{folder / 'images'}  {len(images)} pictures of tables and curves")
    text = folder / "report.md"
    pictures = "".join(f"\n![{title}]({path.relative_to(folder)})\n" for title, path in across)
    text.write_text(as_markdown(contents, [f"images/{path.name}" for path in images]) + pictures, encoding="utf-8")
    print(f"{text}  all tables in markdown")


def as_markdown(contents: Contents, images: Sequence[str]) -> str:
    """The report's tables in markdown. The pictures of curves, the last of `images`, are shown below them."""
    parts = [f"# {contents.title}"]
    for claims in map(claims_values, contents.claims):
        parts += [f"## {claims['title']}", "\n".join(map(_claim_line, claims["claims"]))]
    for paper in contents.papers:
        if tables := [*filter(has_ours, paper.tables), *paper.measured]:
            parts += [f"## {paper.title}", paper.citation, *map(to_markdown, tables)]
        if others := [table for table in paper.tables if not has_ours(table)]:
            parts += [f"## {paper.title}: reported tables without a run of ours", *map(to_markdown, others)]
    if contents.laptop:
        parts += ["## Laptop scale", f"**{LAPTOP_WARNING}**", *map(to_markdown, contents.laptop)]
    if contents.charts:
        curves = images[len(images) - len(contents.charts) :]
        parts += ["## Training curves"]
        parts += [f"![{chart.metric}]({path})" for chart, path in zip(contents.charts, curves, strict=True)]
    parts += ["## Runs", "\n".join(f"- {run.label} ({scale_name(run)}): `{run.folder}`" for run in contents.runs)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _claim_line(claim: dict[str, Any]) -> str:
    interval = f" ({claim['interval']})" if claim["interval"] else ""
    values = f"{claim['ours']} against {claim['theirs']} of {claim['rival']}"
    return f"- {claim['claim']}: **{claim['verdict']}**; {claim['metric']} {values}: {claim['difference']}{interval}"
