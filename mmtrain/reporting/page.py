"""The report as one HTML page that loads nothing: tables, curves, pictures, runs, and filters over all of them."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from scipy.special import stdtrit

from mmtrain.config_errors import UserError
from mmtrain.reporting import palette
from mmtrain.reporting.claims import claims_values
from mmtrain.reporting.contents import LAPTOP_WARNING, Chart, Contents, PaperTables, has_ours, scale_name, seed_name
from mmtrain.reporting.curves import MOST_POINTS, thin
from mmtrain.reporting.page_tables import table_values
from mmtrain.reporting.pictures import embed
from mmtrain.reporting.results import Run, is_video

PAGE_LIMIT = 5_000_000  # bytes; pictures get what the rest of the page leaves of it
ROOM_ACROSS = 500_000  # bytes of the figures across runs
PICTURE_MARKUP = 700  # bytes around each picture
ALL_POINTS = 100_000  # of all curves together, about 13 bytes each
LEAST_POINTS = 20  # of a curve


def render(contents: Contents, across: Sequence[tuple[str, Path]] = ()) -> str:
    """Return the page.

    Pictures share what the rest leaves of 5 MB, see `pictures.embed`; those of the first seeds come first.

    Args:
        across: title and file of figures that are drawn from several runs.

    Raises:
        UserError: a run's config cannot be read.
    """
    environment = Environment(loader=PackageLoader("mmtrain", "reporting"), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    template = environment.get_template("page.html.j2")
    addresses = embed([file for _, file in across], ROOM_ACROSS)
    pictures = zip(across, addresses, strict=True)
    shown = [{"title": title, "address": address} for (title, _), address in pictures if address]
    values = _values(contents) | {"across": shown}
    room = PAGE_LIMIT - len(template.render(values).encode())
    return template.render(values | _figures(contents, room))


def _values(contents: Contents) -> dict[str, Any]:
    """Everything that the template shows but the pictures."""
    methods = contents.methods
    papers = [_paper_values(paper, contents) for paper in contents.papers]
    return {
        "title": contents.title,
        "summary": _summary(contents),
        "date": datetime.date.today().isoformat(),
        "methods": methods,
        "seeds": _seeds(contents.runs),
        "colours": [palette.method_colour(place) for place in range(max(len(methods), 1))],
        "dashes": palette.DASHES,
        "claims": [claims_values(claims) for claims in contents.claims],
        "papers": [paper for paper in papers if paper["tables"]],
        "laptop_warning": LAPTOP_WARNING,
        "laptop": [table_values(table, contents) for table in contents.laptop],
        "charts": list(dict.fromkeys(chart.setting for chart in contents.charts)),
        "runs": [_run_values(place, run) for place, run in enumerate(contents.runs)],
        "missing": _missing(contents.runs),
        "data": _data(contents),
    }


def _summary(contents: Contents) -> str:
    scales = Counter(scale_name(run) for run in contents.runs)
    counts = [f"{number} {scale}" for scale, number in scales.items()]
    num_methods = len(contents.methods)
    runs = f"{len(contents.runs)} run{'s' * (len(contents.runs) != 1)}"
    return f"{runs} ({', '.join(counts)}) of {num_methods} method{'s' * (num_methods != 1)}"


def _seeds(runs: Sequence[Run]) -> list[str]:
    return sorted({seed_name(run) for run in runs}, key=lambda name: (len(name), name))


def _data(contents: Contents) -> dict[str, Any]:
    """What the page's script works on. Curves of one logging rhythm share their list of steps."""
    num_curves = sum(len(chart.curves) for chart in contents.charts)
    limit = min(max(ALL_POINTS // max(num_curves, 1), LEAST_POINTS), MOST_POINTS)
    steps: dict[tuple[int, ...], int] = {}
    charts: dict[str, list[dict[str, Any]]] = {}
    for chart in contents.charts:
        charts.setdefault(chart.setting, []).append(_chart_values(chart, limit, steps))
    return {
        "methods": contents.methods,
        "runs": [{"method": run.method, "seed": seed_name(run)} for run in contents.runs],
        "dashes": palette.DASHES,
        "quantiles": [round(float(stdtrit(max(n - 1, 1), 0.975)), 6) for n in range(len(contents.runs) + 1)],
        "steps": [list(key) for key in steps],
        "charts": list(charts.values()),
    }


def _chart_values(chart: Chart, limit: int, all_steps: dict[tuple[int, ...], int]) -> dict[str, Any]:
    curves = []
    for place, curve in chart.curves.items():
        steps, values = thin(*curve, limit)
        index = all_steps.setdefault(tuple(steps), len(all_steps))
        curves.append([place, index, [float(f"{value:.5g}") for value in values]])
    return {"metric": chart.metric, "search": chart.metric.lower(), "curves": curves}


def _paper_values(paper: PaperTables, contents: Contents) -> dict[str, Any]:
    """Tables with rows of ours are open and come first; else the paper's order."""
    tables = sorted(paper.tables, key=lambda table: not has_ours(table))
    return {
        "short": paper.own_method or paper.name,
        "title": paper.title,
        "citation": paper.citation,
        "has_ours": paper.has_ours,
        "has_simulated": any(row.is_simulated for table in tables for row in table.rows),
        "tables": [table_values(table, contents, paper.errors.get(table.id, 0)) for table in tables + paper.measured],
    }


def _run_values(place: int, run: Run) -> dict[str, Any]:
    commit = str(run.code.get("commit") or "")[:8] + " with changes" * bool(run.code.get("dirty"))
    packages = {name: version for name, version in run.code.items() if name not in ("commit", "dirty")}
    setting = ", ".join(map(str, run.setting.values()))
    details = {
        "setting": setting,
        "checkpoint": run.checkpoint,
        "code": ", ".join([*(f"{name} {version}" for name, version in packages.items()), commit]).strip(", "),
        "data": _words(run.data_counts),
        "evaluated": _words(run.evaluated),
        "skipped": _words(run.skipped),
        "protocol": _words(run.protocol),
    }
    return {
        "place": place,
        "method": run.method,
        "name": run.run,
        "label": run.label,
        "seed": seed_name(run),
        "step": run.step,
        "epoch": run.epoch,
        "scale": run.scale,
        "setting": setting,
        "code": f"mmtrain {run.code.get('mmtrain', '?')} {commit}",
        "folder": str(run.folder),
        "details": [(name, value) for name, value in details.items() if value],
        "config": _config(run),
    }


def _words(values: dict[str, Any]) -> str:
    """`{"train": {"samples": 3}}` as "train: samples 3"."""
    inner = {name: _words(value) if isinstance(value, dict) else str(value) for name, value in values.items()}
    return ", ".join(f"{name}: {value}" if ":" in value else f"{name} {value}" for name, value in inner.items())


def _config(run: Run) -> str | None:
    path = run.folder / "config.yaml"
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _missing(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Each absent set and layout once, with the methods that lacked it."""
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for item in run.missing.items():
            found.setdefault(item, []).append(run.method)
    names = {
        item: ", ".join(f"{name} ({n})" for name, n in Counter(methods).items()) for item, methods in found.items()
    }
    return [{"set": name, "layout": layout, "who": names[name, layout]} for name, layout in sorted(found)]


def _figures(contents: Contents, room: int) -> dict[str, Any]:
    """Pictures of one title side by side; those of the first seeds are taken first if the room does not suffice."""
    wanted = [(place, figure) for place, run in enumerate(contents.runs) for figure in run.figures]
    wanted = [(place, figure) for place, figure in wanted if not is_video(figure)]  # links to files, in results.md
    wanted.sort(key=lambda pair: _seeds(contents.runs).index(seed_name(contents.runs[pair[0]])))
    files = [contents.runs[place].folder / figure["file"] for place, figure in wanted]
    addresses = embed(files, room - PICTURE_MARKUP * len(files))
    groups: dict[str, dict[str, Any]] = {}
    for (place, figure), address in zip(wanted, addresses, strict=True):
        if address:
            title, is_sample = str(figure.get("title", figure["file"])), figure.get("kind") == "sample"
            group = groups.setdefault(title, {"title": title, "is_sample": is_sample, "pictures": []})
            group["pictures"].append(_picture_values(place, contents, address))
    for group in groups.values():
        group["pictures"].sort(key=lambda picture: picture["run"])
    figures = sorted(groups.values(), key=lambda group: (group["is_sample"], group["title"]))
    return {"figures": figures, "num_left_out": addresses.count(None)}


def _picture_values(place: int, contents: Contents, address: str) -> dict[str, Any]:
    run = contents.runs[place]
    namesakes = sum((other.method, other.seed) == (run.method, run.seed) for other in contents.runs)
    detail = f"seed {seed_name(run)}" + f" · {run.run}" * (namesakes > 1)
    colour = contents.methods.index(run.method)
    return {
        "run": place,
        "method": run.method,
        "colour": colour,
        "detail": detail,
        "caption": f"{run.method} {detail}",
        "address": address,
    }
