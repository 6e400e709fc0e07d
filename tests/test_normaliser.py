"""Normalisers against the released ones (golden), their place in the state dict, and what they refuse."""

import numpy as np
import pytest
import torch

from mmtrain.config_errors import UserError
from mmtrain.normaliser import Affine, Normaliser, action_limits, gaussian, image_affine, limits, statistics
from tests.golden import load
from tests.golden.fill import array

GOLDEN = load("rdp/normalizer.npz")


def data() -> np.ndarray:
    """[50, 7]; column 2 is constant and column 4 nearly."""
    rows = array("norm.data", (50, 7)).copy()
    rows[:, 2] = 0.3
    rows[:, 4] *= 1e-6
    return rows


def fitted() -> Normaliser:
    normaliser = Normaliser({"action": 10, "wrench": 7})
    normaliser.set("action", action_limits(array("norm.action10", (40, 10))))
    normaliser.set("wrench", limits(data()))
    return normaliser


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("fit", [limits, gaussian])
def test_fits_are_the_golden_ones(fit, offset: bool) -> None:
    affine, key = fit(data(), offset=offset), f"{fit.__name__}_{'' if offset else 'no'}offset"
    np.testing.assert_allclose(affine.scale, GOLDEN[f"{key}_scale"], rtol=1e-6)
    np.testing.assert_allclose(affine.offset, GOLDEN[f"{key}_shift"], rtol=0, atol=2e-7)
    normaliser = Normaliser({"x": 7})
    normaliser.set("x", affine)
    rows = torch.from_numpy(data()[:5])
    torch.testing.assert_close(
        normaliser.normalise("x", rows), torch.from_numpy(GOLDEN[f"{key}_out"]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("width", [3, 4, 6, 8, 9, 10, 18, 20])
def test_action_fits_are_the_golden_ones(width: int) -> None:
    rows = array(f"norm.action{width}", (40, width)).copy()
    rows[:, 0] = 0.25
    affine = action_limits(rows.reshape(8, 5, width))  # windows of frames: all axes but the last are rows
    np.testing.assert_allclose(affine.scale, GOLDEN[f"action{width}_scale"], rtol=1e-6)
    np.testing.assert_allclose(affine.offset, GOLDEN[f"action{width}_shift"], rtol=0, atol=2e-7)
    with pytest.raises(UserError, match="an action or pose of 7 numbers is not known"):
        action_limits(np.zeros((4, 7)))


def test_image_fit_is_the_golden_one() -> None:
    assert image_affine().scale == GOLDEN["image_scale"] and image_affine().offset == GOLDEN["image_shift"]


def test_statistics_are_those_of_the_data() -> None:
    stats, rows = statistics(data().reshape(10, 5, 7)), torch.from_numpy(data())
    expected = (rows.min(0).values, rows.max(0).values, rows.mean(0), rows.std(0))
    for value, by_torch in zip(stats, expected, strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, by_torch, rtol=1e-5, atol=1e-7)


def test_quantile_limits_do_not_bend_to_an_outlier() -> None:
    rows = np.linspace(-1, 1, 1001)[:, None].repeat(2, 1)
    rows[500] = 100, 0  # one spike
    rows[:, 1] = np.where(np.arange(1001) == 7, 50.0, 3.0)  # a constant, but for one value
    assert limits(rows).scale[0] < 0.02
    robust = limits(rows, quantile=0.01)
    np.testing.assert_allclose(robust.scale, [1 / 0.98, 1], rtol=0.01)
    np.testing.assert_allclose(rows[0] * robust.scale + robust.offset, [-1.02, 0], atol=0.01)
    assert robust.stats.max[0] == 100  # the statistics are those of the data
    with pytest.raises(UserError, match=r"quantile: 0\.5 is not between"):
        limits(rows, quantile=0.5)


def test_state_dict_has_the_released_names_and_comes_back_exactly() -> None:
    normaliser = fitted()
    names = ["scale", "offset", *(f"input_stats.{name}" for name in ("min", "max", "mean", "std"))]
    state = normaliser.state_dict()
    assert set(state) == {f"params_dict.{key}.{name}" for key in ("action", "wrench") for name in names}
    assert all(value.dtype == torch.float32 for value in state.values()) and not list(normaliser.parameters())
    again = Normaliser(normaliser.widths)
    assert not again.is_fitted("action")
    again.load_state_dict(state, strict=True)
    assert again.is_fitted("action") and not again.differences(normaliser)
    for a, b in zip(again.affine("wrench").stats, normaliser.affine("wrench").stats, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_back_and_forth(dtype: torch.dtype) -> None:
    normaliser, x = fitted(), torch.from_numpy(array("x", (2, 3, 10))).to(dtype)
    y = normaliser.normalise("action", x)
    assert y.dtype == dtype and y.shape == x.shape
    torch.testing.assert_close(normaliser.unnormalise("action", y), x)
    assert normaliser.normalise("action", x.bfloat16()).dtype == torch.float32
    x.requires_grad_()
    normaliser.unnormalise("action", x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], 1 / torch.from_numpy(normaliser.affine("action").scale).to(dtype))


def test_differences_name_the_key() -> None:
    one, other = fitted(), fitted()
    affine = one.affine("wrench")
    for change, expected in ((1e-7, []), (1e-5, ["wrench"])):
        other.set("wrench", Affine(affine.scale * np.float32(1 + change), affine.offset, affine.stats))
        assert one.differences(other) == expected and one.differences(other, ["action"]) == []
    other.set("wrench", Affine(affine.scale, affine.offset + np.float32(1e-4), affine.stats))
    assert one.differences(other, ["wrench", "action"]) == ["wrench"]


def test_what_does_not_fit_is_named() -> None:
    normaliser = Normaliser({"action": 4, "left_robot_tcp_wrench": 6})
    with pytest.raises(UserError, match="action is not fitted: train first"):
        normaliser.normalise("action", torch.zeros(4))
    with pytest.raises(UserError, match="no key left_robot_wrench, did you mean left_robot_tcp_wrench"):
        normaliser.is_fitted("left_robot_wrench")
    with pytest.raises(UserError, match="of action is for 4 numbers, not 1"):
        normaliser.set("action", limits(np.random.default_rng(0).normal(size=(9, 1))))  # would broadcast without a word
    normaliser.set("action", limits(array("x", (9, 4))))
    with pytest.raises(UserError, match="of action is for 4 numbers, not 1"):
        normaliser.normalise("action", torch.zeros(5, 1))
    assert normaliser.normalise("action", torch.zeros(4)).isfinite().all()
    normaliser.load_state_dict(Normaliser(normaliser.widths).state_dict())  # back to not fitted
    with pytest.raises(UserError, match="action is not fitted"):
        normaliser.unnormalise("action", torch.zeros(4))
    rows = array("x", (9, 4)).copy()
    rows[3:5, 2] = np.nan
    with pytest.raises(UserError, match=r"channel -> number of them \{2: 2\}"):
        limits(rows)
    with pytest.raises(UserError, match=r"no data to fit a normaliser on: shape \(0, 4\)"):
        gaussian(rows[:0])
