"""Pictures of sounds on the time axis of their video, and of scores; without a display, and without pyplot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.special
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmtrain.audio import preset

FOUND, KNOWN = "#56B4E9", "#FFFFFF"  # Okabe and Ito: told apart on a dark spectrogram with any colour vision
BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#606060"  # of the same palette
DOTS_PER_INCH = 100
MOST_FRAMES = 12  # of a strip


def sound_picture(
    path: Path | str,
    mels: Mapping[str, np.ndarray],
    frames: np.ndarray | None = None,
    fps: float = 4.0,
    found: Mapping[str, Sequence[float]] | None = None,
    known: Sequence[float] | None = None,
    preset_name: str = "mel_ldm",
    title: str = "",
) -> Path:
    """Draw frames above spectrograms, all on one axis of time, with onsets as lines; returns the path.

    Args:
        path: PNG to write; its folder is made.
        mels: title -> spectrogram [C, F] in [0, 1].
        frames: uint8 [T, 3, H, W]; None draws no strip.
        fps: of the frames.
        found: title -> seconds of the onsets that were heard in that sound: lines in its lower half.
        known: seconds of the true onsets: dashed lines in the upper half of each spectrogram.
        preset_name: of `mmtrain.audio`, that the spectrograms were made with.
        title: above all.

    Raises:
        ValueError: no spectrogram.
    """
    if not mels:
        raise ValueError("sound_picture needs at least one spectrogram")
    settings = preset(preset_name)
    seconds = max(mel.shape[-1] for mel in mels.values()) * settings.hop / settings.sample_rate
    rows = [1.0] * (frames is not None) + [1.5] * len(mels)
    width = float(np.clip(seconds, 8, 24))
    figure = Figure(figsize=(width, 0.6 + sum(rows) * 1.1), layout="constrained")
    axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    if frames is not None:
        _strip(axes[0], frames, fps, seconds)
    for place, (name, mel) in zip(axes[len(axes) - len(mels) :], mels.items(), strict=True):
        _spectrogram(place, name, mel, settings.hop / settings.sample_rate)
        _lines(place, known or (), KNOWN, (0.5, 1.0), "--")
        _lines(place, (found or {}).get(name, ()), FOUND, (0.0, 0.5), "-")
    axes[0].set_title(title, loc="left", fontsize=10, parse_math=False)
    axes[-1].set_xlabel(_legend(found, known), fontsize=9)
    axes[-1].set_xlim(0, seconds)
    return _save(figure, Path(path))


def _legend(found: Mapping[str, Sequence[float]] | None, known: Sequence[float] | None) -> str:
    parts = ["time, s"]
    if known is not None:
        parts.append("dashed: true onsets")
    if found is not None:
        parts.append("solid: onsets heard")
    return "; ".join(parts)


def _strip(axes: Axes, frames: np.ndarray, fps: float, seconds: float) -> None:
    """Frames at their times, evenly chosen, each as wide as the time to the next one shown."""
    shown = min(MOST_FRAMES, len(frames))
    step = len(frames) / shown
    for place in range(shown):
        index = int(place * step)
        picture = np.moveaxis(frames[index], 0, -1)
        axes.imshow(picture, extent=(index / fps, (index + 0.95 * step) / fps, 0, 1), aspect="auto")
    axes.set_xlim(0, seconds)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)


def _spectrogram(axes: Axes, name: str, mel: np.ndarray, frame_seconds: float) -> None:
    extent = (0, mel.shape[-1] * frame_seconds, 0, mel.shape[0])
    axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=1, extent=extent)
    axes.set_ylabel(name, fontsize=9, parse_math=False)
    axes.set_yticks([])


def _lines(axes: Axes, times: Sequence[float], colour: str, reach: tuple[float, float], style: str) -> None:
    for time in times:
        axes.axvline(float(time), *reach, color=colour, linestyle=style, linewidth=1.2)


def draw_onset_scores(path: Path, f1: np.ndarray) -> Path:
    """Histogram of F1 [S] in [0, 1] by clip; returns the path."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(f1, bins=np.linspace(0, 1, 21), color=BLUE)
    axes.axvline(f1.mean(), color=VERMILLION, label=f"mean {f1.mean():.3f}")
    axes.set(xlabel="onset F1 of a clip", ylabel="clips", xlim=(0, 1))
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_alignment(path: Path, logits: Mapping[str, np.ndarray]) -> Path:
    """Histograms of the classifier's probability that sound and pictures match, one below the other.

    Args:
        path: PNG to write; its folder is made.
        logits: [S] by name; NaN and names without any number are left out.
    """
    shown = {name: values[np.isfinite(values)] for name, values in logits.items()}
    shown = {name: values for name, values in shown.items() if len(values)}
    titles = {"shifted": "real sound, shifted pictures", "wrong": "real sound, wrong pictures", "real": "real pairs"}
    figure = Figure(figsize=(5, 0.5 + 1.3 * max(1, len(shown))), layout="constrained")
    rows = figure.subplots(max(1, len(shown)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(rows, shown.items(), strict=False):
        axes.hist(
            scipy.special.expit(values), bins=np.linspace(0, 1, 41), color=VERMILLION if name == "generated" else BLUE
        )
        axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
        axes.set_title(titles.get(name, name), fontsize=9, loc="left")
    rows[-1].set(xlabel="probability of a match", xlim=(0, 1))
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DOTS_PER_INCH, facecolor="white")
    return path
