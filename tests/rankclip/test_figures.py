"""Figures show what they were given, are the same bytes each time, and projections equal those of LAPACK's SVD."""

import sys
import warnings
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from mmtrain.config_errors import UserError
from mmtrain.rankclip.activation_maps import overlay
from mmtrain.rankclip.figures import (
    METHODS,
    activation_map_figure,
    activation_map_sheet,
    data_size,
    data_size_figure,
    modality_gap,
    modality_gap_figure,
    retrieval_figure,
    retrieval_sheet,
    robustness,
    robustness_figure,
)
from mmtrain.rankclip.projection import project, projected_means

CURVES = {"CLIP": {500_000: 4.5, 15_000_000: 21.6}, "RankCLIP": {15_000_000: 30.9, 500_000: 8.3, 750_000: None}}
POINTS = {"CLIP": {"500K": (4.5, 4.9), "15M": (21.6, 17.0)}, "RankCLIP": {"500K": (8.3, None), "15M": (30.8, 27.0)}}


def features(count: int = 40, width: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of pairs with a gap along the first axis."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, width, generator=generator, dtype=torch.float64)
    offset = 2 * torch.eye(width, dtype=torch.float64)[0]
    noise = torch.randn(2, count, width, generator=generator, dtype=torch.float64) / 2
    return tuple(torch.nn.functional.normalize(shared + noise[i] + (-1) ** i * offset, dim=-1) for i in (0, 1))


def pictures(count: int = 2, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def sheet() -> tuple:
    generator = torch.Generator().manual_seed(2)
    maps = [list(torch.rand(2, 24, 24, generator=generator)), list(torch.rand(1, 24, 24, generator=generator))]
    return pictures(), maps, [[("dog", 0.25), ("$5 and $6", -0.125)], [("snow", 0.5)]]


ANSWERS = [["a dog", "a $5 note for $6", "a fence"], ["snow", "a very " + "long " * 40 + "caption", "sky"]]
RIGHT = [[True, False, False], [False, True, False]]
WRITERS = {
    "gap": lambda path: modality_gap(*features(), path),
    "robustness": lambda path: robustness(POINTS, {"RankCLIP": {"3M": (15.0, 12.0)}}, path),
    "size": lambda path: data_size(CURVES, {"CLIP": {500_000: 4.0}}, path),
    "maps": lambda path: activation_map_sheet(*sheet(), path, captions=["A dog . ", "Snow"]),
    "retrieval": lambda path: retrieval_sheet(pictures(), ANSWERS, RIGHT, path, title="coco"),
}


# Projection


def joint_svd(images: torch.Tensor, texts: torch.Tensor) -> np.ndarray:
    joint = torch.cat([images, texts]).numpy()
    joint = joint - joint.mean(axis=0)
    left, values, _ = np.linalg.svd(joint, full_matrices=False)
    return left[:, :2] * values[:2]


def test_projection_equals_svd_of_the_centred_joint_features():
    images, texts = features()
    ours = np.concatenate(project(images, texts))
    expected = joint_svd(images, texts)
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-10)  # signs are tested below
    np.testing.assert_allclose(np.abs((ours * expected).sum(axis=0)), (expected**2).sum(axis=0), rtol=1e-10)


def test_signs_do_not_depend_on_order_noise_or_type():
    images, texts = features()
    first, second = project(images, texts)
    assert (first.mean(axis=0) > second.mean(axis=0)).all()  # images to the right and above
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(project(images[order], texts[order])[0], first[order], atol=1e-10)
    nudged = project(images + 1e-6 * torch.randn_like(images), texts)
    np.testing.assert_allclose(nudged[0], first, atol=1e-4)
    np.testing.assert_allclose(project(images.float().numpy(), texts.bfloat16())[1], second, atol=0.02)


def test_signs_without_any_gap_are_settled_too():
    images, _ = features()
    first, second = project(images, images)
    order = torch.arange(len(images)).flip(0)
    np.testing.assert_allclose(project(images[order], images[order])[0], first[order], atol=1e-10)
    np.testing.assert_array_equal(first, second)


def test_projected_means_are_those_of_the_plane():
    images, texts = features()
    first, second = project(images, texts)
    means = projected_means(images, texts)
    assert means == {
        "image_mean": first[:, 0].mean(),
        "text_mean": second[:, 0].mean(),
        "gap": pytest.approx(first[:, 0].mean() - second[:, 0].mean()),
    }
    assert 0 < means["gap"] <= (images.mean(0) - texts.mean(0)).norm()


def test_refuses_what_is_no_pair_not_finite_or_unknown():
    images, texts = features()
    for bad in ((images, texts[1:]), (images[:0], texts[:0]), (images[:, :1], texts[:, :1]), (images[0], texts[0])):
        with pytest.raises(ValueError, match="must be pairs"):
            project(*bad)
    with pytest.raises(ValueError, match="not finite"):
        project(images * float("nan"), texts)
    with pytest.raises(UserError, match="'tsne' is not one of svd, umap"):
        project(images, texts, "tsne")


def test_umap_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # as if not installed
    with pytest.raises(UserError, match=r"umap needs umap-learn: pip install 'mmtrain\[umap\]'; or take svd"):
        project(*features(), "umap")


def test_umap_gets_all_pairs_and_the_seed(monkeypatch):
    class Umap:
        def __init__(self, **settings):
            self.settings = settings

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            assert self.settings["n_neighbors"] < len(rows)
            return rows[:, :2] + self.settings["random_state"]

    module = ModuleType("umap")
    module.UMAP = Umap
    monkeypatch.setitem(sys.modules, "umap", module)
    images, texts = features()
    first, second = project(images, texts, "umap", seed=5)
    np.testing.assert_allclose(first, images[:, :2].numpy() + 5)
    np.testing.assert_allclose(second, texts[:, :2].numpy() + 5)
    project(images[:2], texts[:2], "umap")
    with pytest.raises(UserError, match="two pairs at least"):
        project(images[:1], texts[:1], "umap")


# What is drawn


def test_modality_gap_shows_pairs_histograms_and_the_gap():
    images, texts = features()
    first, second = project(images, texts)
    figure = modality_gap_figure(images, texts)
    pairs, histogram = figure.axes
    lines, image_dots, text_dots = pairs.collections
    assert isinstance(lines, LineCollection)
    np.testing.assert_allclose(lines.get_segments(), np.stack([first, second], axis=1))
    np.testing.assert_allclose(image_dots.get_offsets(), first)
    np.testing.assert_allclose(text_dots.get_offsets(), second)
    assert f"= {(images.mean(0) - texts.mean(0)).norm():.3f} in the full space" in figure.get_suptitle()
    means = projected_means(images, texts)
    assert [line.get_xdata()[0] for line in histogram.lines] == [means["image_mean"], means["text_mean"]]
    assert all(line.get_linestyle() != "-" for line in histogram.lines)
    edges = np.histogram_bin_edges([*first[:, 0], *second[:, 0]], bins=40)
    for patch, points in zip(histogram.patches, (first, second), strict=True):
        assert patch.get_xy()[:, 1].max() == np.histogram(points[:, 0], edges)[0].max()


def test_modality_gap_shows_a_seeded_part_of_many_pairs():
    images, texts = features()
    first, _ = project(images, texts)

    def shown(seed: int, limit: int = 10) -> np.ndarray:
        return modality_gap_figure(images, texts, limit=limit, seed=seed).axes[0].collections[1].get_offsets().data

    assert len(shown(0)) == 10 and "10 of 40 pairs" in modality_gap_figure(images, texts, limit=10).get_suptitle()
    assert {tuple(row) for row in shown(0)} <= {tuple(row) for row in first}  # the plane stays that of all pairs
    np.testing.assert_array_equal(shown(0), shown(0))
    assert not np.array_equal(shown(0), shown(1))
    np.testing.assert_array_equal(shown(0, 40), shown(1, 40))


@pytest.mark.parametrize("count", [1, 2])
def test_modality_gap_of_one_or_two_pairs(tmp_path: Path, count):
    images, texts = features(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modality_gap(images, texts, tmp_path / "few.png")
        modality_gap(images, images, tmp_path / "no_gap.png")
    assert len(modality_gap_figure(images, texts).axes[0].collections[1].get_offsets()) == count


def drawn(figure: Figure) -> dict[str, tuple[list, str]]:
    """Points and face colour of each labelled line."""
    lines = figure.axes[0].lines
    return {line.get_label(): (line.get_xydata().tolist(), to_hex(line.get_markerfacecolor())) for line in lines}


def test_robustness_shows_the_points_and_the_papers_lines():
    figure = robustness_figure(POINTS, {"RankCLIP": {"3M": (15.0, 12.0)}, "SigLIP": {"3M": (40.0, 3.0)}})
    lines = drawn(figure)
    assert lines["CLIP, reported (digitised)"] == ([[4.5, 4.9], [21.6, 17.0]], "#ffffff")  # hollow
    assert lines["RankCLIP, reported (digitised)"] == ([[30.8, 27.0]], "#ffffff")  # the unknown point is left out
    assert lines["RankCLIP, ours"] == ([[15.0, 12.0]], METHODS["RankCLIP"][0].lower())
    assert lines["SigLIP, ours"][0] == [[40.0, 3.0]] and lines["SigLIP, ours"][1] not in METHODS.values()
    slopes = {line.get_label(): (line.get_xy1(), line.get_slope()) for line in figure.axes[0].lines[-2:]}
    assert slopes == {"y = x": ((0, 0), 1), "y = 1.2 x − 13": ((0, -13), 1.2)}
    assert [text.get_text() for text in figure.axes[0].texts] == ["500K", "15M", "15M", "3M", "3M"]
    assert figure.axes[0].get_xlim()[1] > 40 < figure.axes[0].get_ylim()[1]


def test_data_size_shows_curves_in_order_on_a_logarithmic_axis():
    figure = data_size_figure(CURVES, {"CLIP": {1_500_000: 10.0}})
    axes, lines = figure.axes[0], drawn(figure)
    assert lines["RankCLIP, reported (digitised)"] == ([[500_000, 8.3], [15_000_000, 30.9]], "#ffffff")
    assert lines["CLIP, ours"] == ([[1_500_000, 10.0]], METHODS["CLIP"][0].lower())
    assert axes.get_xscale() == "log" and axes.get_ylim()[0] == 0
    assert [label.get_text() for label in axes.get_xticklabels()] == ["500K", "1.5M", "15M"]


def test_activation_sheet_shows_each_picture_and_overlay():
    images, maps, labels = sheet()
    figure = activation_map_figure(images, maps, labels, captions=["A dog .", "Snow"])
    cells = [(axes.get_title(), axes.images[0].get_array().data) for axes in figure.axes if axes.images]
    expected = [
        ("A dog", images[0]),
        ("dog\ncos 0.250", overlay(images[0], maps[0][0])),
        ("$5 and $6\ncos −0.125", overlay(images[0], maps[0][1])),
        ("Snow", images[1]),
        ("snow\ncos 0.500", overlay(images[1], maps[1][0])),
    ]
    assert [title for title, _ in cells] == [title for title, _ in expected]
    for (_, found), (_, picture) in zip(cells, expected, strict=True):
        np.testing.assert_array_equal(found, picture.permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="same length"):
        activation_map_figure(images, maps, labels[:1])
    with pytest.raises(ValueError, match="at least"):
        activation_map_figure(images[:0], [], [])
    assert len(activation_map_figure(images[:1], [[]], [[]]).axes) == 1  # a caption without nouns


def test_retrieval_sheet_marks_what_is_right():
    figure = retrieval_figure(pictures(), ANSWERS, RIGHT, title="coco")
    shown = [axes.images[0].get_array().data for axes in figure.axes if axes.images]
    np.testing.assert_array_equal(shown, pictures().permute(0, 2, 3, 1).numpy())
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.texts]
    assert texts[0] == ["✓", "a dog", "✗", "a $5 note for $6", "✗", "a fence"]
    assert texts[1][::2] == ["✗", "✓", "✗"]
    assert texts[1][3].count("\n") == 2 and texts[1][3].endswith("…")  # cut to the room there is
    colours = [[to_hex(text.get_color()) for text in axes.texts[1::2]] for axes in figure.axes if axes.texts]
    assert [[colour == colours[0][0] for colour in row] for row in colours] == RIGHT
    with pytest.raises(ValueError, match="same lengths"):
        retrieval_figure(pictures(), ANSWERS, RIGHT[:1])
    with pytest.raises(ValueError, match="one picture at least"):
        retrieval_figure([], [], [])


# What is written


@pytest.mark.parametrize("name", WRITERS)
def test_files_open_and_are_the_same_each_time(tmp_path: Path, name):
    settings = dict(matplotlib.rcParams)
    path = WRITERS[name](tmp_path / "deep" / "a.png")
    assert dict(matplotlib.rcParams) == settings and not pyplot.get_fignums()
    assert path == tmp_path / "deep" / "a.png"
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 100
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == [255, 255, 255]  # light, also behind a dark page
    with matplotlib.rc_context({"figure.facecolor": "black", "text.color": "white", "font.size": 30}):  # a user's style
        again = WRITERS[name](tmp_path / "b.png")
    assert path.read_bytes() == again.read_bytes()
    assert path.stat().st_size < 150_000
