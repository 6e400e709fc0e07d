"""RankCLIP's figures 4, 6 and 7 and a sheet of answers: a function that draws each, and one that writes it as PNG.

Only matplotlib's Figure objects are used, no pyplot: nothing stays open and no window system is asked for.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from mmtrain.metrics import geometry
from mmtrain.rankclip.activation_maps import overlay
from mmtrain.rankclip.projection import Features, Projection, mean_coordinates, paired_features, project

Points = Mapping[str, Mapping[str, tuple[float, float]]]  # method -> name of the point -> (x, y)
Curves = Mapping[str, Mapping[int, float]]  # method -> number of training samples -> value

DOTS_PER_INCH = 100
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#606060"  # the palette of Okabe and Ito: safe for the colour-blind
METHODS = {"CLIP": (BLUE, "o"), "RankCLIP": (VERMILLION, "s"), "CyCLIP": ("#009E73", "^"), "ALIP": ("#CC79A7", "D")}
OTHERS = [("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X")]
styled = matplotlib.rc_context(  # a decorator here; whatever the user's matplotlibrc says
    {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "legend.fontsize": 9,
        "legend.frameon": False,
        "text.parse_math": False,  # captions may hold dollar signs
        "text.usetex": False,
    }
    | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#202020")
)


@styled
def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG with a palette of 256 colours, which takes a third of the space; returns the path."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    Image.fromarray(pixels).quantize(256, kmeans=2).save(path, "PNG", optimize=True)
    return path


# Modality gap, figure 6.


@styled
def modality_gap_figure(
    images: Features,
    texts: Features,
    projection: Projection = "svd",
    limit: int = 250,
    seed: int = 0,
) -> Figure:
    """Figure 6: pairs in the plane joined by lines, and histograms of the first coordinate with means dashed.

    The plane and the histograms are those of all pairs; `limit` of them, drawn by `seed`, are shown as points. The
    title tells the gap in the full space, ||mean(V) - mean(T)|| (section 5.4). Arguments and errors: `project`.
    """
    full_gap = geometry.modality_gap(*map(torch.from_numpy, paired_features(images, texts)))
    image_points, text_points = project(images, texts, projection, seed)
    shown = np.sort(np.random.default_rng(seed).permutation(len(image_points))[:limit])
    figure = Figure(figsize=(9, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    some = f"{len(shown):,} of {len(image_points):,} pairs" if len(shown) < len(image_points) else "all pairs"
    title = f"Modality gap ‖mean(V) − mean(T)‖ = {full_gap:.3f} in the full space ({some} shown)"
    figure.suptitle(title, fontsize=11)
    pairs, histogram = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_pairs(pairs, image_points[shown], text_points[shown])
    pairs.set(xlabel=f"{projection.upper()} 1", ylabel=f"{projection.upper()} 2")
    _draw_histograms(histogram, image_points, text_points)
    histogram.set(xlabel=f"{projection.upper()} 1", ylabel="number of features")
    return figure


def _draw_pairs(axes: Axes, images: np.ndarray, texts: np.ndarray) -> None:
    axes.add_collection(LineCollection(np.stack([images, texts], axis=1), colors="#A0A0A0", linewidths=0.5, alpha=0.6))
    style = {"s": 22, "edgecolors": "white", "linewidths": 0.4, "zorder": 2}
    axes.scatter(*images.T, color=BLUE, marker="o", label="image", **style)
    axes.scatter(*texts.T, color=VERMILLION, marker="^", label="text", **style)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handletextpad=0.2)


def _draw_histograms(axes: Axes, images: np.ndarray, texts: np.ndarray) -> None:
    means = mean_coordinates(images, texts)
    edges = np.histogram_bin_edges(np.concatenate([images[:, 0], texts[:, 0]]), bins=40)
    for rows, name, colour, dashes in ((images, "image", BLUE, (0, (5, 2))), (texts, "text", VERMILLION, (0, (2, 2)))):
        axes.hist(rows[:, 0], edges, histtype="stepfilled", facecolor=colour + "59", edgecolor=colour)
        mean = means[f"{name}_mean"]
        axes.axvline(mean, color=colour, linestyle=dashes, linewidth=1.8, label=f"{name} mean {_number(mean)}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _number(number: float) -> str:
    return f"{number:.3f}".replace("-", "−")


def modality_gap(
    images: Features,
    texts: Features,
    path: str | Path,
    projection: Projection = "svd",
    limit: int = 250,
    seed: int = 0,
) -> Path:
    """Write `modality_gap_figure`."""
    return save(modality_gap_figure(images, texts, projection, limit, seed), path)


# Robustness and data size, figure 4.


def _series(reported: Mapping, ours: Mapping) -> Iterator[tuple[Mapping, dict]]:
    """Each method's data and how it is drawn: reported hollow and dashed, ours filled; a method keeps its colour."""
    unknown = [name for name in dict.fromkeys([*reported, *ours]) if name not in METHODS]
    styles = METHODS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(unknown)}
    for group, origin, filled in ((reported, "reported (digitised)", False), (ours, "ours", True)):
        for name, points in group.items():
            colour, marker = styles[name]
            face = {"markerfacecolor": colour, "markeredgecolor": "white", "markersize": 9} if filled else {}
            hollow = {"markerfacecolor": "white", "markeredgewidth": 1.6, "markersize": 7}
            yield points, {"color": colour, "marker": marker, "label": f"{name}, {origin}", **(face or hollow)}


@styled
def robustness_figure(reported: Points, ours: Points) -> Figure:
    """Figure 4 right: ImageNet-R top-1 over ImageNet1K top-1, in percent, with the paper's y = x and y = 1.2 x - 13.

    Args:
        reported: e.g. {"CLIP": {"500K": (4.5, 4.9)}}; a point that holds None is left out.
        ours: the same of our runs, in percent too; may be empty.
    """
    figure = Figure(figsize=(5.6, 5.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    largest = 0.0
    for points, style in _series(reported, ours):
        known = {name: point for name, point in points.items() if None not in point}
        axes.plot([x for x, _ in known.values()], [y for _, y in known.values()], linestyle="none", **style)
        for name, point in known.items():
            _name_point(axes, name, point, style["color"], above=not style["label"].startswith("CLIP"))
        largest = max([largest, *(value for point in known.values() for value in point)])
    end = 1.12 * largest or 1.0
    axes.axline((0, 0), slope=1, color=GREY, linewidth=1, zorder=0, label="y = x")
    axes.axline((0, -13), slope=1.2, color=GREY, linewidth=1, linestyle="--", zorder=0, label="y = 1.2 x − 13")
    axes.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    axes.set(xlabel="ImageNet1K zero-shot top-1 (%)", ylabel="ImageNet-R zero-shot top-1 (%)")
    axes.legend(loc="upper left")
    return figure


def _name_point(axes: Axes, name: str, point: tuple[float, float], colour: str, above: bool) -> None:
    """A small name beside a point; CLIP's below and all others above, out of each other's way."""
    side = (
        {"xytext": (-6, 3), "ha": "right", "va": "bottom"} if above else {"xytext": (6, -4), "ha": "left", "va": "top"}
    )
    halo = [withStroke(linewidth=2, foreground="white")]
    axes.annotate(name, point, textcoords="offset points", fontsize=8, color=colour, path_effects=halo, **side)


def robustness(reported: Points, ours: Points, path: str | Path) -> Path:
    """Write `robustness_figure`."""
    return save(robustness_figure(reported, ours), path)


@styled
def data_size_figure(reported: Curves, ours: Curves, ylabel: str = "ImageNet1K zero-shot top-1 (%)") -> Figure:
    """Figure 4 left: accuracy in percent over the number of training samples, on a logarithmic axis.

    Args:
        reported: e.g. {"CLIP": {500_000: 4.5}}; None is left out.
        ours: the same of our runs; may be empty.
        ylabel: what is measured.
    """
    figure = Figure(figsize=(6, 4.4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    sizes: set[int] = set()
    for points, style in _series(reported, ours):
        known = sorted((size, value) for size, value in points.items() if value is not None)
        dashes = "-" if style["label"].endswith("ours") else (0, (4, 2))
        axes.plot([s for s, _ in known], [v for _, v in known], linestyle=dashes, linewidth=1.6, **style)
        sizes |= {size for size, _ in known}
    axes.set_xscale("log")
    axes.set_xticks(sorted(sizes), [count(size) for size in sorted(sizes)])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="training samples", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#E4E4E4")
    axes.legend(loc="upper left")
    return figure


def count(number: int) -> str:
    """500K for 500,000, 1.5M for 1,500,000."""
    scale, unit = (1e6, "M") if number >= 1e6 else (1e3, "K") if number >= 1e3 else (1, "")
    return f"{number / scale:.3g}{unit}"


def data_size(reported: Curves, ours: Curves, path: str | Path, ylabel: str = "ImageNet1K zero-shot top-1 (%)") -> Path:
    """Write `data_size_figure`."""
    return save(data_size_figure(reported, ours, ylabel), path)


# Sheets of pictures: figure 7, and what was retrieved.


def _show(axes: Axes, picture: Tensor, title: str = "") -> None:
    axes.imshow(picture.cpu().permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=8)
    axes.set_anchor("N")
    axes.set_axis_off()


def _wrapped(text: str, width: int, lines: int) -> str:
    """The text in at most so many lines; without the full stop, which some data set apart."""
    return textwrap.fill(text.strip(" ."), width, max_lines=lines, placeholder="…")


@styled
def activation_map_figure(
    pictures: Sequence[Tensor],
    maps: Sequence[Sequence[Tensor]],
    labels: Sequence[Sequence[tuple[str, float]]],
    captions: Sequence[str] | None = None,
) -> Figure:
    """Figure 7: a row a picture: the picture, then its overlay for each noun with the cosine of picture and noun.

    Args:
        pictures: uint8 [3, H, W] each.
        maps: for each picture, a map [H, W] in [0, 1] for each noun.
        labels: for each picture, (noun, cosine) for each map.
        captions: for each picture, written above it.

    Raises:
        ValueError: no picture, or lists that do not fit each other.
    """
    counts = [len(some) for some in maps]
    captions = [""] * len(pictures) if captions is None else captions
    if not len(pictures) or not len(pictures) == len(maps) == len(captions) or counts != [len(some) for some in labels]:
        raise ValueError("pictures, maps, labels and captions must be lists of the same length, and of one at least")
    columns = 1 + max(counts)
    figure = Figure(figsize=(1.5 * max(columns, 2), 1.95 * len(pictures)), dpi=DOTS_PER_INCH, layout="constrained")
    for row, axes in enumerate(figure.subplots(len(pictures), columns, squeeze=False)):
        _show(axes[0], pictures[row], _wrapped(captions[row], 22, 3))
        for place, (noun, cosine), activation in zip(axes[1:], labels[row], maps[row], strict=False):
            _show(place, overlay(pictures[row], activation), f"{_wrapped(noun, 22, 1)}\ncos {_number(cosine)}")
        for place in axes[1 + counts[row] :]:
            place.set_axis_off()
    return figure


def activation_map_sheet(
    pictures: Sequence[Tensor],
    maps: Sequence[Sequence[Tensor]],
    labels: Sequence[Sequence[tuple[str, float]]],
    path: str | Path,
    captions: Sequence[str] | None = None,
) -> Path:
    """Write `activation_map_figure`."""
    return save(activation_map_figure(pictures, maps, labels, captions), path)


@styled
def retrieval_figure(
    pictures: Sequence[Tensor],
    texts: Sequence[Sequence[str]],
    right: Sequence[Sequence[bool]],
    title: str = "",
    columns: int = 3,
) -> Figure:
    """Pictures with the captions or classes that score best for them, right ones with a tick and in blue.

    Args:
        pictures: uint8 [3, H, W] each.
        texts: for each picture, best first; three have room for long captions, nine for short names.
        right: for each text, whether it is right.
        title: of the sheet.
        columns: pictures side by side.

    Raises:
        ValueError: no picture, or lists that do not fit each other.
    """
    counts = [len(some) for some in texts]
    if not len(pictures) or len(pictures) != len(texts) or counts != [len(some) for some in right]:
        raise ValueError("pictures, texts and right must be lists of the same lengths, for one picture at least")
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.4 * columns, 1.55 * rows + 0.3 * bool(title)), dpi=DOTS_PER_INCH, layout="constrained")
    figure.suptitle(_wrapped(title, 36 * columns, 2), fontsize=11)
    places = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1.3, 2.1] * columns).reshape(-1, 2)
    for place in places.flat:
        place.set_axis_off()
    for (left, beside), picture, answers, marks in zip(places, pictures, texts, right, strict=False):
        _show(left, picture)
        _write_answers(beside, answers, marks)
    return figure


def _write_answers(axes: Axes, answers: Sequence[str], marks: Sequence[bool]) -> None:
    lines = max(1, 9 // max(1, len(answers)))  # that fit for each
    for rank, (answer, is_right) in enumerate(zip(answers, marks, strict=True)):
        style = {"color": BLUE, "weight": "bold"} if is_right else {"color": GREY}
        where = {"va": "top", "fontsize": 8, "transform": axes.transAxes}
        axes.text(0, 1 - rank / len(answers), "✓" if is_right else "✗", **where, **style)
        axes.text(0.1, 1 - rank / len(answers), _wrapped(answer, 25, lines), **where, **style)


def retrieval_sheet(
    pictures: Sequence[Tensor],
    texts: Sequence[Sequence[str]],
    right: Sequence[Sequence[bool]],
    path: str | Path,
    title: str = "",
) -> Path:
    """Write `retrieval_figure`."""
    return save(retrieval_figure(pictures, texts, right, title), path)
