"""Pairs of image and text features in a plane (RankCLIP, figure 6 and section 5.4), for looking at the modality gap."""

from typing import Literal

import numpy as np
from torch import Tensor

from mmtrain.config_errors import UserError

Projection = Literal["svd", "umap"]
Features = Tensor | np.ndarray


def project(
    images: Features, texts: Features, projection: Projection = "svd", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Images and texts [M, 2] in one plane, fitted to both together.

    Args:
        images: unit features [M, D], D at least 2.
        texts: unit features [M, D] of the same pairs.
        projection: "svd", on the first two right singular vectors of the centred joint features, turned such that the
            images lie to the right of and above the texts on average; or "umap" (umap-learn, cosine distance).
        seed: of UMAP. SVD has no randomness.

    Raises:
        ValueError: features that are not finite or not pairs.
        UserError: "umap" without umap-learn or with a single pair, or another projection.
    """
    images, texts = paired_features(images, texts)
    joint = np.concatenate([images, texts])
    if projection == "umap":
        points = _umap(joint, seed)
    elif projection == "svd":
        joint -= joint.mean(axis=0)
        directions = np.linalg.eigh(joint.T @ joint).eigenvectors[:, [-1, -2]]  # needs no [2M, D] besides
        lean = directions.T @ (images.mean(axis=0) - texts.mean(axis=0))
        largest = directions[np.abs(directions).argmax(axis=0), [0, 1]]
        signs = np.where(np.where(np.abs(lean) > 1e-9, lean, largest) < 0, -1, 1)
        points = (joint @ (directions * signs)).round(12)  # a direction without spread is 0, not rounding noise
    else:
        raise UserError(f"projection: {projection!r} is not one of svd, umap")
    return points[: len(images)], points[len(images) :]


def projected_means(
    images: Features, texts: Features, projection: Projection = "svd", seed: int = 0
) -> dict[str, float]:
    """What figure 6's dashed lines show: mean first coordinate as `text_mean`, `image_mean`, and their `gap`.

    Arguments and errors: `project`. The gap in the plane is never larger than that of the features (for "svd").
    """
    return mean_coordinates(*project(images, texts, projection, seed))


def mean_coordinates(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """`projected_means` of points that are already in the plane, [M, 2] each."""
    text_mean, image_mean = float(texts[:, 0].mean()), float(images[:, 0].mean())
    return {"text_mean": text_mean, "image_mean": image_mean, "gap": abs(image_mean - text_mean)}


def paired_features(images: Features, texts: Features) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays; raises ValueError if they are no pairs or not finite."""
    images, texts = (
        rows.detach().cpu().double().numpy() if isinstance(rows, Tensor) else np.asarray(rows, dtype=np.float64)
        for rows in (images, texts)
    )
    if images.ndim != 2 or images.shape != texts.shape or len(images) == 0 or images.shape[1] < 2:
        raise ValueError(f"images and texts must be pairs, [M, D] with D > 1, got {images.shape} and {texts.shape}")
    if not (np.isfinite(images).all() and np.isfinite(texts).all()):
        raise ValueError("features are not finite: the weights may have diverged")
    return images, texts


def _umap(joint: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UserError(
            "projection: umap needs umap-learn: pip install 'mmtrain[umap]'; or take svd, which needs nothing"
        ) from error
    if len(joint) < 4:
        raise UserError("projection: umap needs two pairs at least, got 1; take svd")
    neighbours = min(15, len(joint) - 1)
    start = "spectral" if len(joint) > 10 else "random"  # the spectral start fails on a handful of points
    model = UMAP(n_neighbors=neighbours, metric="cosine", init=start, random_state=seed, n_jobs=1)
    return model.fit_transform(joint)
