"""PCA of a tactile sensor's marker field (RDP, "tactile embedding"): n marker offsets to 15 numbers and back.

Offsets are in normalised image units, flattened marker by marker as x1 y1 x2 y2 ...; nothing is scaled or whitened.
One matrix per sensor type, fitted on a data set of presses of its own.
"""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmtrain.config_errors import UserError, clip
from mmtrain.robot_tasks import EMBEDDING

Array = np.ndarray


class MarkerPca(NamedTuple):
    """components [2n, K] float32 with orthonormal columns, by falling variance, and mean [2n] float32."""

    components: Array
    mean: Array


def fit(fields: Array, components: int = EMBEDDING) -> MarkerPca:
    """Principal components of marker fields [N, n, 2] or [N, 2n].

    The sign of each component is such that its entry of largest size is positive.

    Raises:
        UserError: fewer fields or numbers than components, or values that are not finite.
    """
    rows = _rows(fields)
    if min(rows.shape) < components:
        raise UserError(f"{components} components need at least as many fields and numbers; the data has {rows.shape}")
    _, _, directions = _svd(rows)
    directions = directions[:components]
    largest = np.abs(directions).argmax(1)
    signs = np.sign(directions[np.arange(components), largest])
    return MarkerPca((directions * signs[:, None]).T.astype(np.float32), rows.mean(0).astype(np.float32))


def embed(pca: MarkerPca, offsets: Array) -> Array:
    """Embeddings [..., K] of marker offsets [..., n, 2]: (v - mean) W, float32.

    Raises:
        UserError: the number of markers is not the one of the matrix.
    """
    offsets = np.asarray(offsets)
    if offsets.ndim < 2 or offsets.shape[-1] != 2 or offsets.shape[-2] * 2 != len(pca.mean):
        raise UserError(
            f"marker offsets of shape {offsets.shape} do not fit the PCA matrix {pca.components.shape}: "
            f"expected [..., {len(pca.mean) // 2}, 2]; is it the matrix of another sensor?"
        )
    flat = offsets.reshape(*offsets.shape[:-2], len(pca.mean))
    return (flat.astype(np.float32, copy=False) - pca.mean) @ pca.components


def reconstruct(pca: MarkerPca, embedding: Array) -> Array:
    """Marker offsets [..., n, 2] of embeddings [..., K]: e W^T + mean, float32.

    Raises:
        UserError: another number of components.
    """
    embedding = np.asarray(embedding, dtype=np.float32)
    if embedding.shape[-1] != pca.components.shape[1]:
        raise UserError(
            f"an embedding of {embedding.shape[-1]} numbers does not fit the PCA matrix {pca.components.shape}: "
            f"expected {pca.components.shape[1]}"
        )
    flat = embedding @ pca.components.T + pca.mean
    return flat.reshape(*embedding.shape[:-1], len(pca.mean) // 2, 2)


def explained_ratio(pca: MarkerPca, fields: Array) -> Array:
    """Share of the variance of fields [N, n, 2] or [N, 2n] along each component, float64 [K]."""
    rows = _rows(fields)
    if rows.shape[1] != len(pca.mean):
        raise UserError(f"fields of {rows.shape[1]} numbers do not fit the PCA matrix {pca.components.shape}")
    centred = rows - rows.mean(0)
    return ((centred @ pca.components.astype(np.float64)) ** 2).sum(0) / (centred**2).sum()


def check(pca: MarkerPca, markers: int | None = None, components: int | None = None, where: str = "PCA") -> MarkerPca:
    """`pca` as it is, if its sizes fit each other, `markers` and `components`.

    Raises:
        UserError: they do not; names `where`, what was found and what was expected.
    """
    found = f"components {np.shape(pca.components)} and mean {np.shape(pca.mean)}"
    if np.ndim(pca.components) != 2 or np.shape(pca.mean) != np.shape(pca.components)[:1] or len(pca.mean) % 2:
        raise UserError(f"{where}: {found} do not make a PCA; expected (2 * markers, K) and (2 * markers,)")
    expected = (len(pca.mean) if markers is None else 2 * markers, components or pca.components.shape[1])
    if pca.components.shape != expected:
        raise UserError(f"{where}: {found} found, components {expected} expected; is it the matrix of another sensor?")
    return pca


def save(pca: MarkerPca, path: str | os.PathLike) -> None:
    """Write a .npz file with `components` and `mean`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # given a name, NumPy would add .npz to it
        np.savez(file, components=pca.components, mean=pca.mean)


def load(path: str | os.PathLike, markers: int | None = None) -> MarkerPca:
    """Read what `save` wrote.

    Args:
        markers: the number of markers that the matrix must be for; None takes any.

    Raises:
        UserError: no such file, not such a file, or sizes that do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            pca = MarkerPca(*(np.asarray(file[name], dtype=np.float32) for name in MarkerPca._fields))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it should hold the PCA of a marker field") from None
    except (KeyError, ValueError, OSError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: not a PCA file: expected .npz with components and mean ({clip(str(error))})"
        ) from error
    return check(pca, markers, where=str(path))


def _rows(fields: Array) -> Array:
    fields = np.asarray(fields)
    rows = fields.reshape(len(fields), -1).astype(np.float64)
    bad = int((~np.isfinite(rows)).any(1).sum())
    if bad:
        raise UserError(f"{bad} of {len(rows)} marker fields hold values that are not finite; leave those frames out")
    return rows


def _svd(rows: Array) -> tuple[Array, Array, Array]:
    centred = rows - rows.mean(0)
    # many fields, few markers: the triangular factor has the same right singular vectors and is small
    return np.linalg.svd(np.linalg.qr(centred, mode="r") if len(rows) > rows.shape[1] else centred, full_matrices=False)
