"""Linear probe: AdamW written out in float64 numpy, scikit-learn, repeated samples, inference mode, two processes."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from mmtrain.config_errors import UserError
from mmtrain.metrics.linear_probe import LinearProbe, ProbeSettings, fit_lbfgs, fit_probe, sweep_lbfgs, top1
from tests.golden.fill import array
from tests.metrics.tester import assert_values, run_class, run_two_processes

CLASSES, WIDTH, SEED = 3, 6, 4
RECIPE = {"epochs": 5, "lr": 0.02, "weight_decay": 0.3, "batch_size": 8, "seed": SEED}
SETTINGS = ProbeSettings(**RECIPE)


def overlapping(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three classes that no line separates, as float64."""
    labels = torch.arange(count) % CLASSES
    centres = torch.tensor(array("test.probe.centres", (CLASSES, WIDTH)))
    return (torch.tensor(array(f"test.probe.{name}", (count, WIDTH))) + centres[labels]).double(), labels


@pytest.fixture(scope="module")
def train() -> tuple[torch.Tensor, torch.Tensor]:
    return overlapping("train", 61)


@pytest.fixture(scope="module")
def test() -> tuple[torch.Tensor, torch.Tensor]:
    return overlapping("test", 100)


def replay(seed: int, count: int, epochs: int) -> tuple[nn.Linear, list[np.ndarray]]:
    """What PyTorch's global generator gives from `seed`: a new nn.Linear, then the order of each epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(WIDTH, CLASSES), [torch.randperm(count).numpy() for _ in range(epochs)]


def numpy_adamw(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Section 5.2 word by word in float64: AdamW, decay on the weight only, cosine a step to 0."""
    initial, orders = replay(SEED, len(features), RECIPE["epochs"])
    parameters = [initial.weight.detach().double().numpy(), initial.bias.detach().double().numpy()]
    first, second = ([np.zeros_like(p) for p in parameters] for _ in range(2))
    batches = [o[i : i + RECIPE["batch_size"]] for o in orders for i in range(0, len(o), RECIPE["batch_size"])]
    for step, rows in enumerate(batches):
        outputs = features[rows] @ parameters[0].T + parameters[1]
        share = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        error = (share / share.sum(axis=1, keepdims=True) - np.eye(CLASSES)[labels[rows]]) / len(rows)
        lr = RECIPE["lr"] * (1 + math.cos(math.pi * step / len(batches))) / 2
        for k, gradient in enumerate((error.T @ features[rows], error.sum(axis=0))):
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            mean, variance = first[k] / (1 - 0.9 ** (step + 1)), second[k] / (1 - 0.999 ** (step + 1))
            decay = RECIPE["weight_decay"] if k == 0 else 0
            parameters[k] = parameters[k] * (1 - lr * decay) - lr * mean / (np.sqrt(variance) + 1e-8)
    return parameters[0], parameters[1]


def parameters_of(probe: nn.Linear) -> np.ndarray:
    return torch.cat([probe.weight, probe.bias[:, None]], dim=1).double().numpy()


def accuracy(weight: np.ndarray, bias: np.ndarray, features: torch.Tensor, labels: torch.Tensor) -> float:
    return float(((features.numpy() @ weight.T + bias).argmax(axis=1) == labels.numpy()).mean())


def scikit(features: torch.Tensor, labels: torch.Tensor, c: float) -> LogisticRegression:
    exact = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-10)
    return exact.fit(features.numpy(), labels.numpy())


def as_batches(rows, labels, split: str, batches) -> list[tuple]:
    """Updates of the given rows; ids run against the order of rows, so that sorting by id matters."""
    return [(rows[b], labels[b], 1000 - 7 * torch.as_tensor(b), split) for b in batches]


def test_the_recipe_equals_numpy(train) -> None:
    weight, bias = numpy_adamw(train[0].numpy(), train[1].numpy())
    expected = np.concatenate([weight, bias[:, None]], axis=1)
    np.testing.assert_allclose(parameters_of(fit_probe(*train, CLASSES, **RECIPE)), expected, rtol=0, atol=1e-9)
    single = fit_probe(train[0].float(), train[1], CLASSES, **RECIPE)
    assert single.weight.dtype == torch.float32
    np.testing.assert_allclose(parameters_of(single), expected, rtol=0, atol=2e-6)


def test_the_class_equals_numpy_and_scikit_learn(train, test) -> None:
    order = torch.arange(60, -1, -1)  # that of ascending ids
    weight, bias = numpy_adamw(train[0][order].numpy(), train[1][order].numpy())
    batches = as_batches(*train, "train", torch.arange(61).split(10)) + as_batches(*test, "test", [torch.arange(100)])
    make = partial(LinearProbe, CLASSES, ProbeSettings(**RECIPE, lbfgs=True))
    _, c = sweep_lbfgs(train[0][order], train[1][order], CLASSES, SEED)
    lbfgs = scikit(*train, c).score(test[0].numpy(), test[1].numpy())
    expected = {"linear_probe": accuracy(weight, bias, *test), "linear_probe_lbfgs": lbfgs}
    assert 0.4 < expected["linear_probe"] < 0.95
    assert_values(run_class(make, batches), expected)


@pytest.mark.parametrize("c", [1e-3, 1.0, 1e2])
def test_lbfgs_equals_scikit_learn(train, test, c: float) -> None:
    features, labels = train[0] + 3, train[1]  # embeddings share a mean, too
    got, want = fit_lbfgs(features, labels, CLASSES, c, tolerance=1e-10), scikit(features, labels, c)
    expected = np.concatenate([want.coef_, want.intercept_[:, None]], axis=1)
    expected -= expected.mean(axis=0)  # a constant added to all classes changes nothing
    parameters = parameters_of(got)
    np.testing.assert_allclose(parameters - parameters.mean(axis=0), expected, rtol=1e-5, atol=1e-6)
    assert got(test[0] + 3).argmax(dim=1).tolist() == want.predict(test[0].numpy() + 3).tolist()
    single = fit_lbfgs(features.float(), labels, CLASSES, c)
    assert single.weight.dtype == torch.float32
    single = parameters_of(single)
    np.testing.assert_allclose(single - single.mean(axis=0), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


def test_two_classes_have_twice_the_c_of_scikit_learn(train) -> None:
    features, labels = train[0], train[1] % 2
    got, want = fit_lbfgs(features, labels, 2, 0.5, tolerance=1e-10), scikit(features, labels, 1.0)
    np.testing.assert_allclose(got.weight[1] - got.weight[0], want.coef_[0], rtol=1e-5)


def test_the_sweep_walks_to_a_peak_and_refits_on_all_rows() -> None:
    features = torch.tensor(array("test.probe.sweep", (300, 60))).double()
    labels = (features[:, :CLASSES] + 1.5 * torch.tensor(array("test.probe.noise", (300, CLASSES)))).argmax(dim=1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    held_out, rest = order[:60], order[60:]

    def score(exponent: float) -> float:
        return scikit(features[rest], labels[rest], 10**exponent).score(features[held_out], labels[held_out])

    scores = {exponent: score(exponent) for exponent in range(-6, 7, 2)}
    for step in (1, 1 / 2, 1 / 4, 1 / 8):
        peak = min(exponent for exponent, value in scores.items() if value == max(scores.values()))
        scores |= {peak + side: score(peak + side) for side in (-step, step)}
    peak = min(exponent for exponent, value in scores.items() if value == max(scores.values()))
    assert max(scores[exponent] for exponent in range(-6, 7, 2)) < scores[peak]  # the fine steps matter here
    probe, c = sweep_lbfgs(features, labels, CLASSES, seed=1)
    assert c == pytest.approx(10**peak)
    assert probe(features).argmax(dim=1).tolist() == scikit(features, labels, c).predict(features).tolist()


def test_any_evaluation_loop_gives_the_same_and_the_global_generator_stays(train, test) -> None:
    features, labels = train[0].float(), train[1]
    before = torch.get_rng_state()
    expected = [fit_probe(features, labels, CLASSES, **RECIPE), fit_lbfgs(features, labels, CLASSES)]
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            inside = features + 0.0, labels + 0  # inference tensors under inference mode
            probes = [fit_probe(*inside, CLASSES, **RECIPE), fit_lbfgs(*inside, CLASSES)]
            assert not any(probe.weight.requires_grad for probe in probes)
            for probe, want in zip(probes, expected, strict=True):
                assert torch.equal(probe.weight, want.weight)
                assert top1(probe, *test) == top1(want, *test)
    assert torch.equal(torch.get_rng_state(), before)


def test_repeated_samples_and_padding_count_once(train, test) -> None:
    batches = as_batches(*train, "train", [torch.arange(40), torch.arange(30, 61), torch.tensor([0, 0, 60])])
    batches += as_batches(*test, "test", [torch.arange(100), torch.arange(50)])
    for split in ("train", "test"):  # labels of padding are free
        batches.append((torch.full((1, WIDTH), math.nan), torch.tensor([99]), torch.tensor([-1]), split))
    plain = as_batches(*train, "train", [torch.arange(61)]) + as_batches(*test, "test", [torch.arange(100)])
    make = partial(LinearProbe, CLASSES, SETTINGS)
    assert_values(run_class(make, batches), {k: float(v) for k, v in run_class(make, plain).items()})


SPLITS = {
    "uneven": ([range(0, 40), range(40, 50)], [range(50, 61)]),
    "padded": ([range(0, 61, 2)], [range(1, 61, 2), [0]]),
    "rank 1 saw nothing": ([range(61)], []),
    "rank 0 saw nothing": ([], [range(61)]),
}


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(train, test, two_processes, split: str) -> None:
    make = partial(LinearProbe, CLASSES, ProbeSettings(**RECIPE, lbfgs=split == "uneven"))
    tests = as_batches(*test, "test", [torch.arange(100)])
    one = run_class(make, as_batches(*train, "train", [torch.arange(61)]) + tests)
    shards = [as_batches(*train, "train", [torch.tensor(list(b)) for b in part]) for part in SPLITS[split]]
    shards[0] += tests
    got = run_two_processes(two_processes, make, shards)
    assert got == pytest.approx({key: float(value) for key, value in one.items()}, abs=1e-6)


def test_no_data_gives_nan_and_says_so(train, two_processes) -> None:
    make = partial(LinearProbe, CLASSES, ProbeSettings(lbfgs=True))
    nothing = {"linear_probe": math.nan, "linear_probe_lbfgs": math.nan}
    with pytest.warns(UserWarning, match="no test samples"):
        assert_values(run_class(make, as_batches(*train, "train", [torch.arange(61)])), nothing)
    with pytest.warns(UserWarning, match="no train samples"):
        assert_values(run_class(make, as_batches(*train, "test", [torch.arange(61)])), nothing)
    assert all(map(math.isnan, run_two_processes(two_processes, make, [[], []]).values()))


def test_nan_features_do_not_look_good(train) -> None:
    probe = fit_probe(*train, CLASSES, **RECIPE)
    rows = torch.full((4, WIDTH), math.nan, dtype=torch.float64)
    assert top1(probe, rows, torch.zeros(4, dtype=torch.int64)) == 0


def test_the_protocol_names_every_setting() -> None:
    assert str(ProbeSettings()) == (
        "linear probe: AdamW lr 0.005, weight decay 0.01 on the weight, cosine to 0, 32 epochs, batch 128, seed 0; "
        "features as they are, top-1 on test"
    )
    assert "epochs, batch 8, seed 4" in str(SETTINGS) and "L-BFGS" in str(ProbeSettings(lbfgs=True))


def test_wrong_input_is_named(train) -> None:
    features, labels = train
    ids = torch.arange(61)
    metric = LinearProbe(CLASSES)
    for fit in (fit_probe, fit_lbfgs, sweep_lbfgs):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 1 to 3"):
            fit(features, labels + 1, CLASSES)
        with pytest.raises(ValueError, match="no rows to fit"):
            fit(features[:0], labels[:0], CLASSES)
        with pytest.raises(ValueError, match=r"got \(61, 6\) and \(60,\)"):
            fit(features, labels[1:], CLASSES)
    with pytest.raises(ValueError, match="at least two rows"):
        sweep_lbfgs(features[:1], labels[:1], CLASSES)
    with pytest.raises(ValueError, match="c must be above 0"):
        fit_lbfgs(features, labels, CLASSES, 0.0)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        metric.update(features, labels - 1, ids, "train")
    with pytest.raises(ValueError, match="split must be one of"):
        metric.update(features, labels, ids, "validation")
    with pytest.raises(ValueError, match="one row a sample, got 61, 61 and 60"):
        metric.update(features, labels, ids[1:], "train")
    with pytest.raises(UserError, match="batch_size of the linear probe must be at least 1, got 0"):
        ProbeSettings(batch_size=0)
