"""Diff-Foley's reproduction: shared trainings, what is handed on, verdicts over clips; processes stand in."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mmtrain import reproduce
from mmtrain.config_errors import UserError
from mmtrain.config_layers import load, split_arguments
from mmtrain.difffoley.records import FILE, clip_values, read_records, write_records
from mmtrain.difffoley.reproduce import CFG, FLOW, MADE, OWN, PLAIN, PLAN, RANDOM, REAL
from mmtrain.listing import configs_dir
from mmtrain.metrics.intervals import score_interval
from mmtrain.plans import Job, Method, Plan, Training, jobs, plain_name, preparations, shared_trainings
from mmtrain.reporting.results import Run, find_runs, write_run

SHARED = [name for group in PLAN.shared for name in group]
METRICS = [*dict.fromkeys(claim.metric for claim in PLAN.claims), *PLAN.shown]
ALL = ["fit data", *(f"fit {name}" for name in SHARED)]


def option(words: list[str], name: str) -> str:
    """The last value of an option, which is the one that counts."""
    return words[len(words) - words[::-1].index(name)]


# --- what is run ---


def test_the_plan_names_what_there_is() -> None:
    rows = [PLAN.method(name) for name in PLAN.methods]
    for entry in (*rows, *PLAN.prepared.values(), *(entry for group in PLAN.shared for entry in group.values())):
        assert (configs_dir() / f"{entry.config}.yaml").exists(), entry.config
        for layer in [entry.words[place + 1] for place, word in enumerate(entry.words) if word == "-c"]:
            assert (configs_dir() / f"{layer}.yaml").read_text().startswith("# Layer:")
    assert PLAN.own_method in PLAN.methods
    for claim in PLAN.claims:
        assert {claim.own or OWN, *claim.rivals} <= set(PLAN.methods) and claim.own not in claim.rivals
    assert set(MADE.values()) <= set(SHARED)
    variables = load(["difffoley_ldm_impacts"], []).data["vars"]
    assert set(MADE) <= set(variables), "options that the diffusion model's config knows"


def test_trainings_of_the_second_group_use_those_of_the_first(tmp_path: Path) -> None:
    first, second = shared_trainings(PLAN, tmp_path, quick=False)
    assert [job.method for job in first] == ["cavp", "vae", "sounds"]
    assert {job.method for job in second} == {"ldm", "ldm_flow", "align_guidance", "align_metric"}
    earlier = {str(job.folder / "checkpoints" / "last.ckpt") for job in first}
    for job in (*first, *second):
        assert job.stages == ("fit",) and job.seed == 0 and job.folder == tmp_path / job.method
        words = job.command("fit")
        assert words[:3] == ["fit", "-c", f"difffoley_{job.method}_impacts"] and words[-2:] == ["--ckpt_path", "last"]
        assert option(words, "--vars.data") == str(tmp_path / "impacts"), "one set of clips for all"
        assert not {"--trainer.max_steps", "--trainer.max_epochs"} & set(words), "the configs' own lengths"
        model = load(*split_arguments(words[1:])).data["model"]["init_args"]
        needed = {model.get("first_stage"), load(*split_arguments(words[1:])).data["vars"]["cavp"]} - {None}
        assert needed <= earlier or job in first
    assert {str(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("cavp", "vae")} <= earlier


def test_rows_are_tests_of_the_shared_model_with_the_seed_of_sampling(tmp_path: Path) -> None:
    todo = {(job.method, job.seed): job for job in jobs(PLAN, tmp_path, quick=False)}
    assert {seed for _, seed in todo} == {0, 1, 2} and len(todo) == 3 * len(PLAN.methods)
    for (name, seed), job in todo.items():
        assert job.stages == ("test",) and job.folder == tmp_path / f"{plain_name(name)}-seed{seed}"
        words = job.command("test")
        assert words[0] == "test" and option(words, "--model.test.sampling_seed") == str(seed)
        model = "ldm_flow" if name == FLOW else "ldm"
        assert option(words, "--ckpt_path") == str(tmp_path / model / "checkpoints" / "last.ckpt")
        assert words[2] == f"difffoley_{model}_impacts"
    for key, name in MADE.items():
        made = str(tmp_path / name / "checkpoints" / "last.ckpt")
        assert option(todo[OWN, 1].command("test"), f"--vars.{key}") == made
    settings = {}
    for name in PLAN.methods:
        data = load(*split_arguments(todo[name, 2].command("test")[1:])).data
        model = settings[name] = data["model"]["init_args"]
        assert model["test"]["sampling_seed"] == "2" and data["vars"]["name"] == f"{plain_name(name)}-seed2"
        assert model["cavp"] == str(tmp_path / "cavp" / "checkpoints" / "last.ckpt")
    scales = {name: float(model["guidance"]["scale"]) for name, model in settings.items()}
    assert scales[PLAIN] == 1 and scales[CFG] == scales[OWN] == scales[FLOW] > 1
    assert float(settings[OWN]["guidance"]["classifier_scale"]) > 0
    assert settings[OWN]["guidance_classifier"] == str(tmp_path / "align_guidance" / "checkpoints" / "last.ckpt")
    assert not any(float(settings[name]["guidance"].get("classifier_scale", 0)) for name in (PLAIN, CFG, FLOW))
    assert [settings[name]["test"].get("audio") for name in (REAL, RANDOM, CFG)] == ["ground_truth", "random", None]


def test_quick_is_a_few_steps_on_a_few_clips(tmp_path: Path) -> None:
    (data,) = preparations(PLAN, tmp_path, quick=True)
    groups = shared_trainings(PLAN, tmp_path, quick=True)
    for job in (data, *(job for group in groups for job in group), *jobs(PLAN, tmp_path, quick=True)):
        words = job.command(job.stages[0])
        assert job.seed == 0 and option(words, "--trainer.max_steps") == "4"
        merged = load(*split_arguments(words[1:])).data
        assert merged["data"]["init_args"]["maker"]["init_args"]["splits"] == {"train": 64, "val": 16, "test": 16}
    assert option(data.command("fit"), "--trainer.max_epochs") == "0", "the first only makes the clips"


def test_shared_trainings_of_any_plan(tmp_path: Path) -> None:
    """Groups stay groups, words of plan and training are filled, and trainings may have trainings before."""
    first = Method("first_config", words=("--data.x", "{out}/x"))
    second = Method("second_config", (Training("codes", "codes_config", "--model.codes"),), ("--model.seed", "{seed}"))
    row = Method("row_config", words=("--model.seed", "{seed}"), checkpoint="{out}/b/checkpoints/last.ckpt")
    shared = ({"a": first}, {"b": second})
    plan = Plan("paper", "Row", {"Row": row}, ("--vars.y", "{out}/y {z}"), (6, 3), (2, 1), (), shared=shared)
    (a,), (b,) = shared_trainings(plan, tmp_path, quick=True)
    length = ("--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "1")
    common = ("--vars.y", f"{tmp_path}/y {{z}}", *length)
    assert a == Job("a", "first_config", 0, tmp_path / "a", (*common, "--data.x", f"{tmp_path}/x"), (), ("fit",))
    assert b.stages == ("codes", "fit") and b.words == (*common, "--model.seed", "0")
    assert option(b.command("fit"), "--model.codes") == str(tmp_path / "b" / "codes" / "checkpoints" / "last.ckpt")
    rows = jobs(plan, tmp_path, quick=False)
    assert [option(job.command("test"), "--model.seed") for job in rows] == ["0", "1"]
    assert {job.checkpoint for job in rows} == {str(tmp_path / "b" / "checkpoints" / "last.ckpt")}
    assert shared_trainings(Plan("paper", "Row", {"Row": "config"}, (), None, (1, 1), ()), tmp_path, False) == []


# --- running and judging ---


class Recorder(reproduce.Children):
    """Stands in for the processes: `fit` leaves a checkpoint, `test` needs one and leaves what an evaluation would."""

    calls: list[str] = []  # noqa: RUF012
    f1 = {OWN: 0.7, CFG: 0.4, PLAIN: 0.3, FLOW: 0.4, REAL: 1.0, RANDOM: 0.1}  # noqa: RUF012
    hits = {OWN: 0.95, CFG: 0.93, PLAIN: 0.5, FLOW: 0.93, REAL: 1.0, RANDOM: 0.1}  # noqa: RUF012

    def run(self, words, log):
        folder = Path(option(words, "--trainer.default_root_dir"))
        self.calls.append(f"{words[0]} {folder.name}")
        log.write_text("")
        if words[0] == "fit":
            checkpoint = folder / "checkpoints" / "last.ckpt"
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text("weights")
            return 0, 2.0
        assert Path(option(words, "--ckpt_path")).exists(), "trained before"
        for key in MADE:
            assert Path(option(words, f"--vars.{key}")).exists(), key
        name, _, seed = folder.name.partition("-seed")
        assert option(words, "--model.test.sampling_seed") == seed
        method = next(method for method in PLAN.methods if plain_name(method) == name)
        random = np.random.default_rng([int(seed), len(method)])
        records = [
            {
                "name": f"clip {i}",
                "sample": 0,
                "onset_f1": float(np.clip(random.normal(self.f1[method], 0.1), 0, 1)),
                "align_acc": float(i < 60 * self.hits[method]),
            }
            for i in range(60)
        ]
        write_records(folder, records)
        metrics = dict.fromkeys(METRICS, 1.0)
        if method in (REAL, RANDOM):  # nothing is generated
            del metrics["test/impacts/seconds_per_clip"]
        for key in ("onset_f1", "align_acc"):
            metrics[f"test/impacts/{key}"] = float(np.mean([record[key] for record in records]))
        metrics["test/impacts/fid"] = (20.0 if method == OWN else 30.0) + 0.1 * int(seed)
        write_run(Run(folder, "difffoley", method, folder.name, "laptop", seed=int(seed), metrics=metrics))
        return 0, 2.0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(reproduce, "Children", Recorder)
    Recorder.calls = []
    return Recorder


def test_shared_trainings_are_done_once_before_the_rows_which_are_judged_by_clips(recorder, tmp_path: Path) -> None:
    result = reproduce.reproduce(PLAN, tmp_path, False, 1, "the command")
    tests = [f"test {plain_name(name)}-seed{seed}" for seed in range(3) for name in PLAN.methods]
    assert recorder.calls == [*ALL, *tests] and result["cpu_seconds"] == 2 * len(recorder.calls)
    recorder.calls.clear()
    assert reproduce.reproduce(PLAN, tmp_path, False, 2, "the command") == result and not recorder.calls

    judged = {(c["metric"].rpartition("/")[2], c["own"], c["rival"]): c for c in result["claims"]}
    assert len(judged) == len(result["claims"]) == len(PLAN.claims)
    onsets = judged["onset_f1", OWN, CFG]
    assert onsets["verdict"] == "holds" and onsets["episodes"]["n"] == [180, 180]
    assert onsets["episodes"]["pooled"]["verdict"] == onsets["episodes"]["by_seed"]["verdict"] == "holds"
    values = [r["onset_f1"] for s in range(3) for r in read_records(tmp_path / f"{plain_name(CFG)}-seed{s}")]
    assert tuple(onsets["episodes"]["pooled"]["theirs"].values()) == score_interval(values)
    close = judged["align_acc", OWN, CFG]["episodes"]["pooled"]
    assert close["verdict"] == "undecided at this scale", "0.95 against 0.93: intervals overlap"
    lower = judged["fid", OWN, CFG]
    assert lower["direction"] == "lower" and lower["verdict"] == "holds" and "episodes" not in lower
    assert judged["align_acc", CFG, PLAIN]["verdict"] == judged["onset_f1", PLAIN, RANDOM]["verdict"] == "holds"

    text = (tmp_path / "reproduce.md").read_text()
    assert text.startswith("## Diff-Foley on simulated impacts") and "seeds are of sampling" in text
    assert all(name in text for name in PLAN.methods) and "| impacts/seconds_per_clip |" in text
    assert re.search(r"\| impacts/seconds_per_clip \|.*\| – \| – \|$", text, re.MULTILINE), "no time of real sound"
    assert len(find_runs([tmp_path])) == 3 * len(PLAN.methods), "shared trainings are no results"


def test_a_row_keeps_the_shared_trainings_that_it_uses() -> None:
    names = {name for group in PLAN.shared for name in group}
    assert {name for group in PLAN.only([CFG]).shared for name in group} == names - {"ldm_flow"}
    assert {name for group in PLAN.only([FLOW, REAL]).shared for name in group} == names


def test_rows_can_be_chosen_on_the_command_line(recorder, tmp_path: Path) -> None:
    assert reproduce.main(["difffoley", "--quick", "--out", str(tmp_path), "--jobs", "1", "--only", CFG, PLAIN]) == 0
    rows = [f"test {plain_name(name)}-seed0" for name in (PLAIN, CFG)]
    assert recorder.calls[-2:] == rows and recorder.calls[-3].startswith("fit ")
    claims = json.loads((tmp_path / "reproduce.json").read_text())["claims"]
    assert claims and {(claim["own"], claim["rival"]) for claim in claims} == {(CFG, PLAIN)}


# --- scores of single clips ---


def test_records_come_back_and_no_clip_has_a_fid(tmp_path: Path) -> None:
    records = [{"name": f"ü{i}", "sample": i % 2, "onset_f1": i / 4, "align_acc": 1.0} for i in range(4)]
    assert write_records(tmp_path / "new", records) == tmp_path / "new" / FILE
    assert read_records(tmp_path / "new") == records
    assert clip_values(tmp_path / "new", "test/impacts/onset_f1") == [0.0, 0.25, 0.5, 0.75]
    assert clip_values(tmp_path / "new", "test/impacts/align_acc") == [1.0] * 4
    for metric in ("fid", "inception_score", "kl", "seconds_per_clip"):
        assert clip_values(tmp_path / "new", f"test/impacts/{metric}") is None
    write_records(tmp_path, [])
    assert clip_values(tmp_path, "test/impacts/onset_f1") is None
    write_records(tmp_path, [records[0], {"name": "unmeasured", "sample": 0}])
    assert clip_values(tmp_path, "test/impacts/onset_f1") is None, "some clips without: not these clips' mean"


def test_records_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"clips.jsonl: cannot be read .*`python -m mmtrain test` writes it"):
        read_records(tmp_path)
    (tmp_path / FILE).write_text('{"name": "a"}\n{"na')
    with pytest.raises(UserError, match=r"clips.jsonl: not JSON .*test the run again"):
        clip_values(tmp_path, "test/impacts/onset_f1")
