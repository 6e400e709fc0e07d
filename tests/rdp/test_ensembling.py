import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from mmtrain.config_errors import UserError
from mmtrain.poses import ortho6d_from_rotation
from mmtrain.rdp.ensembling import ensemble_weights, fold
from tests.golden import load

MODES = {
    "new": ("newest", {}),
    "old": ("oldest", {}),
    "avg": ("avg", {}),
    "act_k0.01": ("act_new_first", {"act_k": 0.01}),
    "act_k0.5": ("act_new_first", {"act_k": 0.5}),
    **{f"hato_tau{tau}": ("hato", {"tau": tau}) for tau in (0.2, 0.5, 0.8, 0.9)},
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(("layout", "pose_dim"), [("xyz", 3), ("pose9", 9), ("width", 1)])
def test_golden(name: str, layout: str, pose_dim: int) -> None:
    golden = load("rdp/ensemble.npz")
    chunks, expected = golden[f"{layout}_chunks"], golden[f"{layout}_{name}"]
    mode, options = MODES[name]
    for step in range(14):
        made = [time for time in (0, 2, 4, 6) if time <= step < time + 8]
        weights = ensemble_weights(made, mode, **options)
        actions = np.stack([chunks[time // 2, step - time] for time in made])
        got = fold(actions, weights, pose_dim, reference_rotation=True)
        np.testing.assert_allclose(got, expected[step], atol=1e-6)


def test_act_favours_old_predictions_as_in_act() -> None:
    np.testing.assert_allclose(
        ensemble_weights([0, 2, 4], "act", act_k=0.5), np.exp([0, -0.5, -1]) / np.exp([0, -0.5, -1]).sum()
    )
    new_first = ensemble_weights([0, 2, 4], "act_new_first", act_k=0.5)
    np.testing.assert_allclose(new_first, np.exp([-2, -1, 0]) / np.exp([-2, -1, 0]).sum())


def _turned(degrees: list[float]) -> np.ndarray:
    rotations = Rotation.from_euler("z", np.array(degrees)[:, None], degrees=True).as_matrix()
    return np.concatenate(
        [np.zeros((len(degrees), 3)), ortho6d_from_rotation(rotations), np.ones((len(degrees), 1))], 1
    )


def test_rotation_ends_where_its_weights_say() -> None:
    actions, weights = _turned([0, 90]), np.array([1 / 3, 2 / 3])
    np.testing.assert_allclose(fold(actions, weights, 9), _turned([60])[0], atol=1e-12)
    np.testing.assert_allclose(fold(actions, weights, 9, reference_rotation=True), _turned([30])[0], atol=1e-12)
    # about one axis the fold is the weighted mean, however many there are
    weights = np.array([0.1, 0.4, 0.2, 0.3])
    angles = np.array([5.0, 40, -10, 80])
    np.testing.assert_allclose(fold(_turned(list(angles)), weights, 9), _turned([weights @ angles])[0], atol=1e-12)


def test_two_arms_are_folded_each_by_itself() -> None:
    left, right = _turned([0, 90]), _turned([20, 80])
    both = np.concatenate([left[:, :9], right[:, :9], left[:, 9:], right[:, 9:]], 1)
    got = fold(both, np.array([0.5, 0.5]), 9)
    np.testing.assert_allclose(got[:9], _turned([45])[0, :9], atol=1e-12)
    np.testing.assert_allclose(got[9:18], _turned([50])[0, :9], atol=1e-12)


@pytest.mark.parametrize("mode", ["newest", "oldest", "avg", "hato", "act", "act_new_first"])
def test_equal_times(mode: str) -> None:
    weights = ensemble_weights([3, 3, 5], mode)
    assert weights.sum() == pytest.approx(1)
    if mode in ("avg", "hato", "act_new_first"):
        assert weights[0] == weights[1]
    same = np.array([[1.0, 2, 3, 4]] * 3)
    np.testing.assert_allclose(fold(same, weights, 3), same[0])


def test_weights_do_not_vanish_for_old_predictions() -> None:
    weights = ensemble_weights([0, 10_000], "hato", tau=0.2)
    np.testing.assert_array_equal(weights, [0, 1])


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        ([0], {"mode": "hatto"}, "did you mean hato"),
        ([0], {"mode": "hato", "tau": 0.0}, "tau: 0.0"),
        ([0], {"mode": "act", "act_k": -1.0}, "act_k: -1.0"),
        ([2, 1], {"mode": "avg"}, "oldest first"),
        ([], {"mode": "avg"}, "at least one"),
    ],
)
def test_bad_input(made: list[int], options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ensemble_weights(made, **options)
