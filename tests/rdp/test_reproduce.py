"""RDP's reproduction: what is run in which order, shared demonstrations, verdicts over episodes; processes stand in."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmtrain import reported, reproduce
from mmtrain.config_errors import UserError
from mmtrain.listing import configs_dir
from mmtrain.metrics.intervals import score_interval
from mmtrain.plans import jobs, plain_name, preparations
from mmtrain.rdp.records import CELLS, FILE
from mmtrain.rdp.reproduce import OWN, PLANS
from mmtrain.reporting.claims import claims_values, read_claims
from mmtrain.reporting.results import Run, find_runs, write_run

TABLES = {"wipe": "rdp_table3_wiping", "peel": "rdp_table2_peeling", "lift": "rdp_table4_lifting"}
METRICS = [f"test/wipe/{cell}" for cell in (*CELLS["wipe"].values(), "all")]
FORCE = {"test/wipe/stable_force": 0.9, "test/wipe/peak_force": 11.0, "test/wipe/stopped_for_force": 0.0}


@pytest.mark.parametrize("task", PLANS)
def test_a_plan_has_the_rows_of_the_paper_s_table_and_configs_that_exist(task: str) -> None:
    plan, table = PLANS[task], reported.load("rdp").table(TABLES[task])
    assert set(plan.methods) == set(table.rows) and plan.own_method == OWN
    for name in plan.methods:
        method = plan.method(name)
        assert method.needs in plan.prepared
        for config in (method.config, *(training.config for training in method.before)):
            assert (configs_dir() / f"{config}.yaml").exists(), config
    metrics = {column.metric for column in table.columns}
    assert {claim.metric for claim in plan.claims} == metrics, "every cell of the table is judged, and only those"
    dps = {name for name in plan.methods if name.startswith("DP")}
    assert {c.metric for c in plan.claims if set(c.rivals) == dps and c.own is None} == metrics


def test_a_tokenizer_comes_first_and_its_checkpoint_goes_to_the_policy(tmp_path: Path) -> None:
    todo = {job.method: job for job in jobs(PLANS["wipe"], tmp_path, quick=False) if job.seed == 2}
    rdp, dp = todo[OWN], todo["DP"]
    assert rdp.stages == ("tokenizer", "fit", "test") and dp.stages == ("fit", "test")
    assert rdp.folder == tmp_path / "rdp_force-seed2"
    first, second, third = (rdp.command(stage) for stage in rdp.stages)
    assert first[:3] == ["fit", "-c", "rdp_at_wipe_sim"] and "--vars.tokenizer" not in first
    assert second[:3] == ["fit", "-c", "rdp_ldp_wipe_sim"] and third[0] == "test" and second[1:] == third[1:]
    made = Path(option(first, "--trainer.default_root_dir")) / "checkpoints" / "last.ckpt"
    assert option(second, "--vars.tokenizer") == str(made) and made.is_relative_to(rdp.folder)
    for words in (first, second, dp.command("fit")):
        assert option(words, "--vars.data") == str(tmp_path / "demonstrations.zarr"), "one store for all"
        assert (option(words, "--seed_everything"), option(words, "--data.seed")) == ("2", "2")
        assert "--trainer.max_steps" not in words and "--trainer.max_epochs" not in words, "the configs' own lengths"


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_demonstrations_are_made_before_and_pictures_only_for_whom_they_are(tmp_path: Path) -> None:
    plain, pictures = preparations(PLANS["peel"], tmp_path, quick=True)
    assert plain.stages == pictures.stages == ("fit",)
    assert option(plain.command("fit"), "--trainer.max_epochs") == "0"
    runs = {job.method: option(job.command("fit"), "--vars.data") for job in jobs(PLANS["peel"], tmp_path, True)}
    assert runs.pop("DP w. tactile img.") == option(pictures.command("fit"), "--vars.data")
    assert set(runs.values()) == {option(plain.command("fit"), "--vars.data")}
    few = PLANS["peel"].only(["DP", OWN])
    assert list(few.prepared) == ["demonstrations"] and list(few.methods) == ["DP", OWN]
    assert {claim.rivals for claim in few.claims} == {("DP",)} and len(few.claims) == 4
    assert PLANS["peel"].only(["DP"]).claims == ()


class Recorder(reproduce.Children):
    """Stands in for the processes: `test` leaves what a simulation would."""

    calls: list[str] = []  # noqa: RUF012
    rates = {"rdp_force": 0.95, "dp": 0.5, "dp_w_tactile_emb": 0.9, "rdp_gelsight": 0.9}  # noqa: RUF012

    def run(self, words, log):
        folder = Path(option(words, "--trainer.default_root_dir"))
        self.calls.append(f"{words[0]} {folder.relative_to(log.parents[1])}")
        log.write_text("")
        if words[0] == "test":
            name, _, seed = folder.name.partition("-seed")
            random = np.random.default_rng([int(seed), len(name)])
            records = [
                {"variation": variation, "seed": 100_000 + i, "score": float(random.random() < self.rates[name])}
                for variation in CELLS["wipe"]
                for i in range(50)
            ]
            (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
            means = [
                np.mean([r["score"] for r in records if r["variation"] == variation]) for variation in CELLS["wipe"]
            ]
            metrics = dict(zip(METRICS, [*means, np.mean(means)], strict=True)) | FORCE
            method = next(method for method in PLANS["wipe"].methods if plain_name(method) == name)
            write_run(Run(folder, "rdp", method, folder.name, "simulation", seed=int(seed), metrics=metrics))
        return 0, 2.0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(reproduce, "Children", Recorder)
    Recorder.calls = []
    return Recorder


def test_all_is_run_once_and_judged_by_seeds_and_by_episodes(recorder, tmp_path: Path) -> None:
    result = reproduce.reproduce(PLANS["wipe"], tmp_path, False, 1, "the command")
    assert recorder.calls[0] == "fit demonstrations"
    assert [call for call in recorder.calls if "rdp_force-seed0" in call] == [
        "fit rdp_force-seed0/tokenizer", "fit rdp_force-seed0", "test rdp_force-seed0"
    ]  # fmt: skip
    assert len(recorder.calls) == 1 + 3 * (2 + 2 + 3 + 3) and result["cpu_seconds"] == 2 * len(recorder.calls)
    recorder.calls.clear()
    assert reproduce.reproduce(PLANS["wipe"], tmp_path, False, 2, "the command") == result and not recorder.calls

    by_rival = {(c["metric"], c["rival"]): c for c in result["claims"]}
    after = by_rival["test/wipe/perturb_after_contact", "DP"]
    assert after["verdict"] == "holds" and after["own"] == OWN
    episodes = after["episodes"]
    assert episodes["n"] == [150, 150] and episodes["pooled"]["verdict"] == episodes["by_seed"]["verdict"] == "holds"
    lines = [line for s in range(3) for line in (tmp_path / f"dp-seed{s}" / FILE).read_text().splitlines()]
    scores = [r["score"] for r in map(json.loads, lines) if r["variation"] == "after"]
    assert tuple(episodes["pooled"]["theirs"].values()) == score_interval(scores)
    close = by_rival["test/wipe/perturb_after_contact", "DP w. tactile emb."]["episodes"]
    assert close["pooled"]["verdict"] == "undecided at this scale", "0.95 against 0.9: intervals overlap"

    text = (tmp_path / "reproduce.md").read_text()
    assert "only the order of the methods" in text and "Laptop scale" not in text
    assert "| above DP: perturb after contact | wipe/perturb_after_contact | DP | 0.9" in text
    shown = claims_values(read_claims(tmp_path / "reproduce.json"))["claims"]
    assert "by all episodes: holds" in shown[0]["interval"] and shown[0]["methods"] == [OWN, "DP"]
    assert len(find_runs([tmp_path])) == 12, "tokenizers and demonstrations are no results"


def test_tasks_and_methods_can_be_chosen_on_the_command_line(recorder, tmp_path: Path, capsys) -> None:
    words = ["rdp", "--task", "wipe", "--only", "DP", "--quick", "--out", str(tmp_path)]
    assert reproduce.main(words) == 0
    assert recorder.calls == ["fit demonstrations", "fit dp-seed0", "test dp-seed0"]
    text = (tmp_path / "wipe" / "reproduce.md").read_text()
    assert "| wipe/perturb_after_contact |" in text and "claim" not in text and "quick" in text
    with pytest.raises(UserError, match="--task: 'wiping' is not known; rdp has wipe, peel, lift"):
        reproduce.main(["rdp", "--task", "wiping"])
    with pytest.raises(UserError, match=r"--only: no method 'RDP \(Froce\)', did you mean 'RDP \(Force\)'\?"):
        reproduce.main(["rdp", "--only", "RDP (Froce)"])
    with pytest.raises(UserError, match="--task: rankclip has no tasks"):
        reproduce.main(["rankclip", "--task", "wipe"])


def test_a_run_without_episodes_is_named(recorder, tmp_path: Path) -> None:
    reproduce.reproduce(PLANS["wipe"].only(["DP", OWN]), tmp_path, True, 1, "")
    (tmp_path / "dp-seed0" / FILE).unlink()
    with pytest.raises(UserError, match=r"dp-seed0/rollouts.jsonl: cannot be read"):
        reproduce.reproduce(PLANS["wipe"].only(["DP", OWN]), tmp_path, True, 1, "")
