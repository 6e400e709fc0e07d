"""Force plots, bars of scores, and videos of rollouts. No display and no global state of matplotlib is used."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from mmtrain import media
from mmtrain.media import ENCODERS
from mmtrain.robot_tasks import FRAME_RATE

BLUE, VERMILLION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#606060"  # Okabe and Ito: safe for the colour-blind
COLOURS = (VERMILLION, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)
DOTS_PER_INCH = 100


def force_plot(
    path: Path,
    frames: ArrayLike | Sequence[ArrayLike],
    forces: ArrayLike | Sequence[ArrayLike],
    band: tuple[float, float] | None = None,
    perturbed_at: int | Sequence[int] = -1,
    titles: Sequence[str] = (),
) -> Path:
    """Draw the normal force over time, an episode below the other; returns the path.

    Args:
        path: PNG to write; its folder is made.
        frames: [T] frame numbers at 24 Hz of one episode, or a list of such.
        forces: [T] or [T, arms] newtons of one episode, or a list of such.
        band: lowest and highest force that count as stable, shaded.
        perturbed_at: frame of the perturbation, -1 for none; one an episode.
        titles: of the episodes.

    Raises:
        ValueError: episodes and their forces differ in number or length.
    """
    episodes = list(frames) if np.ndim(perturbed_at) else [frames]
    curves = list(forces) if np.ndim(perturbed_at) else [forces]
    pushes = np.atleast_1d(perturbed_at)
    if not len(episodes) == len(curves) == len(pushes):
        raise ValueError(f"got {len(episodes)} frames, {len(curves)} forces and {len(pushes)} perturbed_at")
    figure = Figure(figsize=(7, 0.6 + 1.7 * len(episodes)), layout="constrained")
    rows = figure.subplots(len(episodes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for place, (axes, frame, force, push) in enumerate(zip(rows, episodes, curves, pushes, strict=True)):
        seconds, force = np.asarray(frame, dtype=float) / FRAME_RATE, np.asarray(force, dtype=float)
        if len(seconds) != len(force):
            raise ValueError(f"episode {place} has {len(seconds)} frames and {len(force)} forces")
        if band is not None:
            axes.axhspan(*band, color=GREEN, alpha=0.15, linewidth=0, label=f"stable: {band[0]:g} to {band[1]:g} N")
        for arm, curve in enumerate(force.reshape(len(force), -1).T):
            axes.plot(seconds, curve, color=(BLUE, GREY)[arm % 2], linewidth=1)
        if push >= 0:
            axes.axvline(push / FRAME_RATE, color=VERMILLION, linestyle="--", linewidth=1, label="perturbed")
        if place < len(titles):
            axes.set_title(titles[place], loc="left", fontsize=9)
        axes.set_ylabel("force, N", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    rows[-1].set_xlabel("time, s", fontsize=9)
    return _save(figure, path)


def score_bars(path: Path, scores: Mapping[str, Mapping[str, tuple[float, float, float]]], title: str = "") -> Path:
    """Draw bars with their intervals, a group a cell and a bar a method; returns the path.

    Args:
        path: PNG to write; its folder is made.
        scores: method -> cell -> (value, low, high). NaN leaves a gap. One method may be called "".
    """
    methods = list(scores)
    cells = list(dict.fromkeys(cell for values in scores.values() for cell in values))
    figure = Figure(figsize=(max(6, 0.5 + len(cells) * (0.35 * len(methods) + 0.5)), 3.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(methods), 1)
    for place, method in enumerate(methods):
        triples = np.array([scores[method].get(cell, (np.nan,) * 3) for cell in cells], dtype=float).reshape(-1, 3)
        x = np.arange(len(cells)) - 0.4 + width * (place + 0.5)
        reach = np.abs(triples[:, 1:] - triples[:, :1]).T
        axes.bar(x, triples[:, 0], width * 0.95, color=COLOURS[place % len(COLOURS)], label=method)
        axes.errorbar(x, triples[:, 0], reach, fmt="none", ecolor="#202020", elinewidth=1, capsize=2)
        for at, (value, _, high) in zip(x, triples, strict=True):
            if np.isfinite(value):
                axes.annotate(f"{value:.2f}", (at, high), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(np.arange(len(cells)), [cell.replace("_", "\n") for cell in cells], fontsize=8)
    axes.set_ylabel("score, 95 % interval", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    if any(methods):
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.06))
    return _save(figure, path)


def write_video(path: Path, frames: np.ndarray, fps: int = FRAME_RATE) -> Path:
    """Write an MP4, H.264 where the installed FFmpeg has an encoder of it, else MPEG-4; returns the path.

    Args:
        path: file to write; its folder is made. Nothing is left there if it fails.
        frames: uint8 [T, H, W, 3] RGB, T at least 1; an odd edge is repeated once, as the encoders take even sizes.
        fps: frames a second.

    Raises:
        UserError: FFmpeg has none of the encoders.
        ValueError: frames of another shape or type, or none.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T > 0, got {frames.dtype} {list(frames.shape)}")
    return media.write_video(path, frames.transpose(0, 3, 1, 2), fps, encoders=ENCODERS)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return path
