"""Outcome records to metrics: keys, tiers, repeated records, words, figures, records on disk, wrong input."""

import json
import math
from pathlib import Path

import pytest

from mmtrain import reported
from mmtrain.config_errors import UserError
from mmtrain.metrics.intervals import wilson
from mmtrain.rdp.evaluate import RolloutEvaluation
from mmtrain.rdp.records import CELLS, FILE, episode_values, read_records

FORCE = {"stable_force_share": 0.9, "mean_contact_force": 7.0, "peak_force": 12.0, "stopped_for_force": False}


def outcome(variation: str, seed: int, **values) -> dict:
    return {"frames": 200, "perturbed_at": 40, **FORCE, **values, "variation": variation, "seed": seed}


def wipes(after: float = 0.6) -> list[dict]:
    """Four episodes a variation: clean, but half of those after contact leave more."""
    return [
        outcome(name, 100_000 + i, residue=after if name == "after" and i % 2 else 1 / 30, score=0.0, force=[0.0, 5.0])
        for name in CELLS["wipe"]
        for i in range(4)
    ]


def test_wipe_scores_follow_the_residue_and_repeated_records_count_once() -> None:
    evaluation = RolloutEvaluation("wipe")
    evaluation.add(wipes())
    evaluation.add(wipes()[5:9])
    found = evaluation.compute()
    assert found["test/wipe/no_perturb"] == found["test/wipe/perturb_before_contact"] == 1
    assert (found["test/wipe/no_perturb_low"], found["test/wipe/no_perturb_high"]) == pytest.approx(wilson(4, 4)[1:])
    assert found["test/wipe/perturb_after_contact"] == 0.5 and found["test/wipe/all"] == pytest.approx(5 / 6)
    assert found["test/wipe/stable_force"] == pytest.approx(0.9) and found["test/wipe/peak_force"] == 12
    assert found["test/wipe/no_contact"] == found["test/wipe/stopped_for_force"] == 0
    evaluation.add([outcome("none", 1, residue=0.0) | {"stopped_for_force": True}])
    assert evaluation.compute()["test/wipe/no_perturb"] == pytest.approx(0.8), "clean, but with far too much force"
    assert all(found[f"{key}_low"] <= found[key] <= found[f"{key}_high"] for key in found if f"{key}_low" in found)


def test_peel_is_divided_by_the_demonstrations_and_lift_has_its_cups() -> None:
    peel = RolloutEvaluation("peel", demonstration_mean=0.8)
    peel.add([outcome(name, seed, length_ratio=0.4 + 0.4 * seed) for name in CELLS["peel"] for seed in (0, 1)])
    assert peel.compute()["test/peel/perturb_after_contact"] == pytest.approx(0.75)
    assert "0.800" in peel.protocol()
    lift = RolloutEvaluation("lift")
    lift.add([outcome("soft", i, clamped=True, lifted=i > 0, score=float(i > 0)) for i in range(4)])
    lift.add([outcome("hard", i, clamped=True, lifted=True, score=0.5) for i in range(4)])
    found = lift.compute()
    assert (found["test/lift/soft_clamp"], found["test/lift/soft_lift"], found["test/lift/hard_score"]) == (
        1,
        0.75,
        0.5,
    )
    assert found["test/lift/all_score"] == 0.625


def test_the_keys_are_those_of_the_reported_tables() -> None:
    if "rdp" not in reported.papers():
        pytest.skip("no reported numbers yet")
    made = {"peel": {"length_ratio": 1.0}, "wipe": {"residue": 0.0}, "lift": dict(clamped=True, lifted=True, score=1.0)}
    keys = set()
    for task, values in made.items():
        evaluation = RolloutEvaluation(task)
        evaluation.add([outcome(name, 0, **values) for name in CELLS[task]])
        keys |= evaluation.compute().keys()
    tables = {"rdp_table2_peeling", "rdp_table3_wiping", "rdp_table4_lifting"}
    columns = [c for t in reported.load("rdp").tables if t.id in tables for c in t.columns]
    assert len(columns) == 15 and {column.metric for column in columns} <= keys
    assert not any(column.comparable for column in columns), "a simulation never compares with the robot"


def test_an_episode_without_contact_has_no_share_of_stable_force() -> None:
    evaluation = RolloutEvaluation("wipe")
    records = wipes()
    records[0] |= {"mean_contact_force": 0.0, "stable_force_share": 0.0}
    evaluation.add(records)
    found = evaluation.compute()
    assert found["test/wipe/stable_force"] == pytest.approx(0.9) and found["test/wipe/no_contact"] == pytest.approx(
        1 / 12
    )


def test_protocol_says_what_was_run() -> None:
    evaluation = RolloutEvaluation("wipe")
    evaluation.add(wipes())
    text = evaluation.protocol(max_frames=120)
    assert "simulation, not the paper's robot: 4 episodes of each of none, before, after" in text
    assert "seeds 100000 to 100003" in text and "at most 5 s" in text and "Wilson" in text


def test_figures_are_written_and_listed(tmp_path: Path) -> None:
    evaluation = RolloutEvaluation("wipe")
    evaluation.add(wipes())
    figures = evaluation.figures(wipes(), tmp_path)
    assert [entry["file"] for entry in figures] == [
        "figures/scores.png", "figures/force-none.png", "figures/force-before.png", "figures/force-after.png"
    ]  # fmt: skip
    assert all((tmp_path / entry["file"]).stat().st_size > 5000 for entry in figures)
    bare = [{key: value for key, value in record.items() if key != "force"} for record in wipes()]
    assert len(evaluation.figures(bare, tmp_path)) == 1, "what was not recorded is not drawn"


def test_wrong_records_and_settings_are_named() -> None:
    evaluation = RolloutEvaluation("wipe")
    with pytest.raises(UserError, match=r"outcome of wipe: has no residue; it has .*length_ratio"):
        evaluation.add([outcome("none", 0, length_ratio=1.0)])
    with pytest.raises(UserError, match="variation is 'soft', expected one of none, before, after"):
        evaluation.add([outcome("soft", 0, residue=0.1)])
    with pytest.raises(UserError, match="task: 'cook' is not known; one of peel, wipe, lift"):
        RolloutEvaluation("cook")
    for mean in (0.0, math.nan, 1.2):
        with pytest.raises(UserError, match="demonstration_mean"):
            RolloutEvaluation("peel", mean)


def write(folder: Path, records: list[dict]) -> None:
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_records_give_the_values_behind_a_cell(tmp_path: Path) -> None:
    write(tmp_path, [r | {"score": float(i)} for i, r in enumerate(wipes())])
    assert episode_values(tmp_path, "test/wipe/perturb_after_contact") == [8, 9, 10, 11]
    assert len(episode_values(tmp_path, "test/wipe/all")) == 12 == len(read_records(tmp_path))
    with pytest.raises(UserError, match="'stable_force' is not known there, but wanted for test/wipe/stable_force"):
        episode_values(tmp_path, "test/wipe/stable_force")
    with pytest.raises(UserError, match="has no episode for test/lift/soft_score"):
        episode_values(tmp_path, "test/lift/soft_score")


def test_broken_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_records(tmp_path)
    (tmp_path / FILE).write_text('{"variation": "none", "seed": 0}\n{"varia')
    with pytest.raises(UserError, match=r"rollouts.jsonl:2: not JSON"):
        read_records(tmp_path)
    write(tmp_path, [{"seed": 0}])
    with pytest.raises(UserError, match="expected an object with variation and seed"):
        read_records(tmp_path)
