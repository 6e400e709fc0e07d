"""`plan`: what is counted in a trial, what follows from it, and the memory that a process really takes."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmtrain.__main__ import main
from mmtrain.config_errors import UserError
from mmtrain.config_layers import split_arguments
from mmtrain.footprint import Footprint, LiveBytes, measure
from mmtrain.gpus import GPUS
from mmtrain.plan import make, steps_of_run
from tests.benchmarks.memory_plan import CASES, compare
from tests.small_trainings import write_training

MIB = 2**20
TRIAL = Footprint(
    parameters=10**9, trained=10**9, weights=4 * 10**9, gradients=4 * 10**9, optimizer=8 * 10**9, fixed=0, each=10**8,
    update=10**9, flops=10**12, checkpoint=12 * 10**9, loader_seconds=0.01, samples=10**6,
)  # fmt: skip


def options(nodes: int = 1, strategy: str = "ddp", cores: int = 12) -> argparse.Namespace:
    return argparse.Namespace(nodes=nodes, strategy=strategy, cores=cores)


def test_live_bytes_are_those_of_what_is_held_and_its_highest_moment() -> None:
    held = torch.zeros(MIB)
    with LiveBytes([held]) as live:
        first = held + 1  # 8 MiB
        view = first[:10]
        second = first * 2  # 12 MiB
        del first
        assert live.now == 12 * MIB, "a view keeps its storage"
        del view
        assert (live.now, live.most) == (8 * MIB, 12 * MIB)
        nn.functional.linear(held.view(1024, 1024), held.view(1024, 1024))
        assert (live.now, live.most) == (8 * MIB, 12 * MIB) and second.numel()


def test_memory_network_and_time_follow_from_the_trial() -> None:
    h100, alone = GPUS["h100"], make(TRIAL, 64, 1, GPUS["h100"], "bf16-mixed", options(), 100)
    assert alone.network == 0 and alone.buckets == 0
    assert alone.memory == pytest.approx(4e9 + 4e9 + 8e9 + 64 * 1e8 + 0.7 * 2**30)
    assert alone.compute_seconds == pytest.approx(64 * 1e12 / (h100.bf16 * 1e12 * 0.35))
    ddp = make(TRIAL, 64, 8, h100, "bf16-mixed", options(), 100)
    assert ddp.network == pytest.approx(2 * 7 / 8 * 4e9) and ddp.samples_each == 8
    # the optimizer's step takes more than 8 samples do
    assert ddp.memory == pytest.approx(4e9 + 4e9 + 8e9 + 1e9 + 4e9 + 0.7 * 2**30)
    fsdp = make(TRIAL, 64, 8, h100, "bf16-mixed", options(strategy="fsdp"), 100)
    assert fsdp.memory == pytest.approx(16e9 / 8 + 1e9 + 0.7 * 2**30) and fsdp.network == pytest.approx(7 / 8 * 12e9)
    two = make(TRIAL, 64, 16, h100, "bf16-mixed", options(nodes=2), 100)
    slower = h100.network * 1e9 * 0.7  # of the two links
    assert two.network_seconds == pytest.approx(2 * 15 / 16 * 4e9 / slower)
    assert two.hours == pytest.approx(100 * two.step_seconds / 3600)


@pytest.mark.parametrize(
    ("change", "nodes", "gpu", "expected"),
    [
        ({}, 1, "h100", "compute"),
        ({"flops": 10**9, "loader_seconds": 0.0}, 4, "h100", "network"),
        ({"loader_seconds": 10.0}, 1, "h100", "loader"),
        ({"each": 10**11}, 1, "h100", "memory"),
        ({}, 1, "t4", "memory"),
    ],
)
def test_the_bottleneck_is_named_with_what_to_change(change, nodes, gpu, expected) -> None:
    found = make(replace(TRIAL, **change), 512, 8 * nodes, GPUS[gpu], "32-true", options(nodes), 100)
    assert found.bottleneck == expected and found.advice
    if expected == "memory":
        assert "--strategy fsdp" in found.advice


def test_a_format_that_a_gpu_lacks_is_told() -> None:
    with pytest.raises(UserError, match=r"trainer\.precision bf16-mixed: v100 has no such format"):
        make(TRIAL, 64, 1, GPUS["v100"], "bf16-mixed", options(), 1)


def test_steps_end_at_the_first_limit() -> None:
    assert steps_of_run({"max_epochs": 10, "max_steps": 50, "accumulate_grad_batches": 2}, 1000, 10) == 100
    assert steps_of_run({"max_epochs": 10, "max_steps": -1}, 1000, 10) == 1000
    assert steps_of_run({}, 1000, 10) == 100


def test_a_trial_counts_the_config_itself(tmp_path) -> None:
    config = write_training(tmp_path, "tokenizer")
    found = measure(*split_arguments(["-c", str(config)]))
    assert found.gradients == 4 * found.trained and found.weights >= 4 * found.parameters
    assert found.optimizer == pytest.approx(8 * found.trained, rel=0.01), "two moments"
    assert found.checkpoint > found.weights + found.optimizer
    assert found.each > 0 and found.flops > 2 * found.trained and found.loader_seconds > 0
    assert not (tmp_path / "run").exists(), "the run folder is left alone"


def test_the_verb_prints_a_table_and_json_and_refuses_what_cannot_be(capsys, tmp_path) -> None:
    config = str(write_training(tmp_path, "tokenizer"))
    assert main(["plan", "-c", config, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "a100", "--json"]) == 0
    out = capsys.readouterr().out
    plan = json.loads(out[out.index("{\n") :])["plan"]
    assert plan["processes"] == 2 and plan["samples_each"] == 16 and plan["steps"] == 28
    for words, said in (
        (["-c", config, "--gpu", "h10"], "--gpu h10: not in the table; nearest: h100"),
        (["-c", config, "--gpus-per-node", "5"], "the global batch of 32 cannot be divided among 5 GPUs"),
        ([], "which training? -c CONFIG"),
    ):
        assert main(["plan", *words]) == 2
        assert said in capsys.readouterr().err


def test_made_up_episodes_stand_in_for_those_that_are_not_at_hand(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "-c", "rdp_at_peel", "--gpus-per-node", "1", "--samples", "6400", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "data/peel.zarr does not exist" in printed.err and "--samples" in printed.err
    found = json.loads(printed.out[printed.out.index("{\n") :])
    assert found["trial"]["parameters"] == 8588 and found["plan"]["steps"] % 100 == 0
    assert not (tmp_path / "data").exists(), "what was made up is not left behind"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(CASES))
def test_predicted_memory_is_what_a_process_takes(name) -> None:
    found = compare(name)
    assert 0.8 <= found["predicted"] / found["measured"] <= 1.2, found
