"""PCA of marker fields against scikit-learn's (golden), files, and matrices of another sensor."""

from pathlib import Path

import numpy as np
import pytest

from mmtrain import marker_pca
from mmtrain.config_errors import UserError
from mmtrain.marker_pca import MarkerPca
from tests.golden import load
from tests.golden.fill import array

GOLDEN = load("rdp/pca.npz")
SENSORS = {"gelsight": 63, "mctac": 25}


def fields(sensor: str) -> np.ndarray:
    """The golden training data, [300, n, 2]."""
    width = 2 * SENSORS[sensor]
    low, mix, noise = (
        array(f"pca.{sensor}.{name}", shape)
        for name, shape in (("low", (300, 20)), ("mix", (20, width)), ("noise", (300, width)))
    )
    return (0.01 * (low @ mix + 0.1 * noise)).reshape(300, SENSORS[sensor], 2)


@pytest.mark.parametrize("sensor", SENSORS)
def test_fit_and_embedding_are_the_golden_ones(sensor: str) -> None:
    data = fields(sensor)
    pca = marker_pca.fit(data)
    assert pca.components.dtype == pca.mean.dtype == np.float32
    signs = np.sign((pca.components * GOLDEN[f"{sensor}_components"]).sum(0))
    np.testing.assert_allclose(pca.components * signs, GOLDEN[f"{sensor}_components"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(pca.mean, GOLDEN[f"{sensor}_mean"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(pca.components.T @ pca.components, np.eye(15), rtol=0, atol=1e-6)
    ratio = marker_pca.explained_ratio(pca, data)
    np.testing.assert_allclose(ratio, GOLDEN[f"{sensor}_explained_ratio"], rtol=1e-4)
    first = marker_pca.embed(pca, data[:5]) * signs
    # the golden fit was made in float32: neighbours of like variance are turned into each other by 1e-5
    np.testing.assert_allclose(first, GOLDEN[f"{sensor}_train_embedding_first5"], rtol=0, atol=5e-6)
    assert (pca.components.max(0) >= -pca.components.min(0)).all()  # the largest entry of each is positive
    flat = marker_pca.fit(data.reshape(300, -1))
    assert np.array_equal(flat.components, pca.components)


@pytest.mark.parametrize("sensor", SENSORS)
def test_stored_components_give_the_golden_embedding(sensor: str) -> None:
    pca = MarkerPca(GOLDEN[f"{sensor}_components"], GOLDEN[f"{sensor}_mean"])
    query = 0.02 * array(f"pca.{sensor}.query", (5, SENSORS[sensor], 2))
    embedding = marker_pca.embed(pca, query[:, None])
    assert embedding.shape == (5, 1, 15) and embedding.dtype == np.float32
    np.testing.assert_allclose(embedding[:, 0], GOLDEN[f"{sensor}_embedding"], rtol=0, atol=1e-6)
    back = marker_pca.reconstruct(pca, embedding)
    assert back.shape == (5, 1, SENSORS[sensor], 2)
    np.testing.assert_allclose(back.reshape(5, -1), GOLDEN[f"{sensor}_reconstruction"], rtol=0, atol=1e-6)


def test_few_fields_are_enough_and_files_come_back(tmp_path: Path) -> None:
    data = fields("gelsight")[:20]  # fewer rows than numbers: the other branch of the decomposition
    pca = marker_pca.fit(data, components=19)
    np.testing.assert_allclose(marker_pca.reconstruct(pca, marker_pca.embed(pca, data)), data, rtol=0, atol=1e-6)
    path = tmp_path / "new" / "gelsight.pca"  # NumPy by itself would write gelsight.pca.npz
    marker_pca.save(pca, path)
    again = marker_pca.load(path, markers=63)
    assert all(map(np.array_equal, again, pca))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    pca = marker_pca.fit(fields("mctac"))
    with pytest.raises(
        UserError, match=r"shape \(4, 63, 2\) do not fit the PCA matrix \(50, 15\): expected \[..., 25, 2\]"
    ):
        marker_pca.embed(pca, np.zeros((4, 63, 2)))
    with pytest.raises(UserError, match=r"\[..., 25, 2\]"):
        marker_pca.embed(pca, np.zeros((4, 50)))  # flattened by the caller, perhaps in another order
    with pytest.raises(UserError, match=r"embedding of 14 numbers .* expected 15"):
        marker_pca.reconstruct(pca, np.zeros(14))
    with pytest.raises(UserError, match="15 components need at least as many"):
        marker_pca.fit(fields("mctac")[:9])
    bad = fields("mctac")
    bad[3, 2, 1] = np.nan
    with pytest.raises(UserError, match="1 of 300 marker fields hold values that are not finite"):
        marker_pca.fit(bad)
    path = tmp_path / "mctac.npz"
    marker_pca.save(pca, path)
    with pytest.raises(UserError, match=r"mctac.npz: components \(50, 15\) .* \(126, 15\) expected"):
        marker_pca.load(path, markers=63)
    with pytest.raises(UserError, match="no such file"):
        marker_pca.load(tmp_path / "none.npz")
    for number, content in enumerate((b"", b"PK\x03\x04broken", b"text")):
        broken = tmp_path / f"broken{number}.npz"
        broken.write_bytes(content)
        with pytest.raises(UserError, match="not a PCA file"):
            marker_pca.load(broken)
    np.savez(tmp_path / "other.npz", W=np.zeros(3))
    with pytest.raises(UserError, match="not a PCA file"):
        marker_pca.load(tmp_path / "other.npz")
