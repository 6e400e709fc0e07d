"""Which of a paper's tables `test` prints for a simulated run."""

from pathlib import Path

from mmtrain.reporting.callback import tables_of
from mmtrain.reporting.results import Run


def titles(method: str) -> list[str]:
    metrics = {"test/peel/no_perturb": 0.9, "test/peel/all": 0.8}
    run = Run(folder=Path("runs/x"), paper="rdp", method=method, run="x", scale="simulation", metrics=metrics)
    return [table.id for table in tables_of(run)]


def test_a_simulated_run_stands_in_the_tables_that_have_its_method() -> None:
    assert [i for i in titles("DP") if i.startswith("rdp_")] == ["rdp_table2_peeling"]
    force = [i for i in titles("RDP (Force)") if i.startswith("rdp_")]
    assert force[:2] == ["rdp_table2_peeling", "rdp_table6_tokenizer_ablation"]
    assert [i for i in titles("a new method") if i.startswith("rdp_")] == ["rdp_table2_peeling"]
