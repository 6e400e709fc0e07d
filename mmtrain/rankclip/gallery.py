"""Pictures of results: what one `test` draws of its sets, and figure 4 across runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mmtrain import reported
from mmtrain.rankclip import figures
from mmtrain.rankclip.activation_maps import activation_maps, nouns
from mmtrain.rankclip.evaluate import ImageTextEvaluation
from mmtrain.rankclip.networks import encode_images, encode_texts
from mmtrain.rankclip.projection import Projection
from mmtrain.reporting.results import RunGroup

PAIRS_SHOWN = 250  # figure 6 shows about as many
PICTURES_SHOWN = 9
MAPPED = 4  # pictures with activation maps
ANSWERS = 3
IMAGENET, IMAGENET_R = "test/imagenet/zero_shot_top1", "test/imagenet_r/zero_shot_top1"
SIZES = {"500K": 500_000, "750K": 750_000, "1M": 1_000_000, "3M": 3_000_000, "15M": 15_000_000}  # columns of figure 4

Drawn = list[dict[str, str]]  # file (in the folder drawn to), title, kind


@torch.no_grad()
def draw(
    module: pl.LightningModule,
    pairs: dict[str, tuple[Tensor, Tensor] | None],
    folder: Path,
    projection: Projection = "svd",
) -> Drawn:
    """Draw what a tested module's sets allow into `<folder>/figures`.

    Args:
        module: an ImageTextModule after its sets were evaluated.
        pairs: for each set some image and text features, None for a set without pairs.
        projection: of the figure of the modality gap.
    """
    drawn: Drawn = []

    def add(file: str, title: str, kind: str) -> str:
        drawn.append({"file": f"figures/{file}.png", "title": title, "kind": kind})
        return str(folder / drawn[-1]["file"])

    for name, evaluation in zip(module.set_names, module.evaluations, strict=True):
        if pairs[name] is not None and torch.isfinite(torch.cat(pairs[name])).all():
            images, texts = (part.cpu() for part in pairs[name])
            path = add(f"modality_gap_{name}", f"Modality gap, {name}", "figure")
            figures.modality_gap(images, texts, path, projection)
        batch = module.trainer.datamodule.peek(name, PICTURES_SHOWN)
        if "image" not in batch:
            continue
        answers = _classes(module, evaluation, batch) or _captions(module, batch)
        if answers is not None:
            title, texts, right = answers
            path = add(f"answers_{name}", f"{name}: {title}", "sample")
            figures.retrieval_sheet(list(batch["image"]), texts, right, path, title)
        if "caption" in batch and _draw_maps(module, batch, folder / f"figures/activation_maps_{name}.png"):
            add(f"activation_maps_{name}", f"Activation maps of nouns, {name}", "sample")
    return drawn


def _classes(module: pl.LightningModule, evaluation: ImageTextEvaluation, batch: dict[str, Any]) -> Any:
    """Title, best classes of each picture, and which are right; None for a set without zero-shot classification."""
    if evaluation.zero_shot is None:
        return None
    present = evaluation.present if evaluation.present is not None else range(len(evaluation.class_names))
    images = encode_images(module.network, batch["image"].to(module.device)).float()
    scores = images @ evaluation.weights[list(present)].T
    best = scores.topk(min(ANSWERS, scores.shape[1])).indices.tolist()
    classes = [[present[i] for i in row] for row in best]
    texts = [[evaluation.class_names[c] for c in row] for row in classes]
    right = [[c == label for c in row] for row, label in zip(classes, batch["label"].tolist(), strict=True)]
    return f"best of {len(present):,} classes", texts, right


def _captions(module: pl.LightningModule, batch: dict[str, Any]) -> Any:
    """The same with captions, chosen among those of the pictures shown; None without captions or with one picture."""
    if "caption" not in batch or len(batch["image"]) < 2:
        return None
    words = [caption for own in batch["caption"] for caption in own]
    images = encode_images(module.network, batch["image"].to(module.device))
    texts = encode_texts(module.network, batch["text"].to(module.device))
    best = (images @ texts.T).topk(min(ANSWERS, len(words))).indices.tolist()
    owners = batch["text_id"].tolist()
    right = [[owners[i] == own for i in row] for row, own in zip(best, batch["id"].tolist(), strict=True)]
    return f"best of the {len(words)} captions of these pictures", [[words[i] for i in row] for row in best], right


def _draw_maps(module: pl.LightningModule, batch: dict[str, Any], path: Path) -> bool:
    """Figure 7 for the first pictures whose caption has a noun; False if none has."""
    chosen = [(i, nouns(own[0])[:ANSWERS]) for i, own in enumerate(batch["caption"]) if nouns(own[0])][:MAPPED]
    if not chosen:
        return False
    maps, labels = [], []
    for i, words in chosen:
        picture = batch["image"][i : i + 1].to(module.device).expand(len(words), -1, -1, -1)
        tokens = module.trainer.datamodule.pictures.tokens(words).to(module.device)
        cosines = (encode_images(module.network, picture) * encode_texts(module.network, tokens)).sum(dim=-1)
        maps.append(list(activation_maps(module.network, picture, tokens).cpu()))
        labels.append(list(zip(words, cosines.tolist(), strict=True)))
    pictures = [batch["image"][i] for i, _ in chosen]
    figures.activation_map_sheet(pictures, maps, labels, path, [batch["caption"][i][0] for i, _ in chosen])
    return True


def across_runs(groups: Sequence[RunGroup], folder: Path) -> Drawn:
    """Figure 4 with our runs of full scale in it: robustness, and the ablation of the size of the training data.

    Only what our runs have points for is drawn. Sizes are those of `data_counts`, as `data.subset` leaves them.
    """
    groups = [group for group in groups if group.paper == "rankclip" and group.scale == "full"]
    paper = reported.load("rankclip")
    drawn: Drawn = []
    robust: dict[str, dict[str, tuple[float, float]]] = {}
    sizes: dict[str, dict[int, float]] = {}
    for group in groups:
        x, y = (group.metrics[name].mean if name in group.metrics else None for name in (IMAGENET, IMAGENET_R))
        samples = group.runs[0].data_counts.get("train", {}).get("samples")
        if x is not None and y is not None:
            name = figures.count(samples) if samples else group.setting.get("train_data", "")
            robust.setdefault(group.method, {})[name] = (100 * x, 100 * y)
        if x is not None and samples:
            sizes.setdefault(group.method, {})[samples] = 100 * x
    if robust:
        figures.robustness(_reported_points(paper), robust, folder / "figures/robustness.png")
        drawn.append({"file": "figures/robustness.png", "title": "Robustness (figure 4 right)", "kind": "figure"})
    if sizes:
        table = paper.table("rankclip_fig4a_datasize")
        curves = {row: {SIZES[c.name]: table.value(row, c.name) for c in table.columns} for row in table.rows}
        figures.data_size(curves, sizes, folder / "figures/data_size.png")
        drawn.append({"file": "figures/data_size.png", "title": "Size of the data (figure 4 left)", "kind": "figure"})
    return drawn


def _reported_points(paper: reported.Paper) -> dict[str, dict[str, tuple[float, float]]]:
    points: dict[str, dict[str, tuple[float, float]]] = {}
    for row, (x, y) in paper.table("rankclip_fig4b_robustness").rows.items():
        method, _, size = row.partition("-")
        points.setdefault(method, {})[size] = (x, y)
    return points
