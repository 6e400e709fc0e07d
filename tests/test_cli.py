"""The command line: layers, references, the run folder, and every mistake a user is likely to make in a config."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mmtrain.__main__ import main
from mmtrain.config_errors import UserError, is_first_process, nearest
from mmtrain.config_layers import find_config, load
from mmtrain.config_references import is_secret
from mmtrain.listing import configs_dir
from tests.cli_fixtures import KeepsParameters  # imports Lightning here, for its log handler keeps the stderr it finds

REPOSITORY = Path(__file__).parent.parent
TINY = """\
# A run of two steps
vars: {width: 8}
model:
  class_path: tests.cli_fixtures.TinyModel
  init_args:
    width: ${vars.width}
    optim: {rate: 1e-3, warmup: "${vars.width}"}
    extra: {a: "${vars.width}"}
data:
  class_path: tests.cli_fixtures.TinyData
trainer:
  max_steps: 2
  limit_val_batches: 0
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  callbacks:
  - class_path: tests.cli_fixtures.Every
    init_args: {every: "${vars.width}"}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with tiny.yaml; signal handlers are put back, Lightning changes them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    before = signal.getsignal(signal.SIGINT)
    yield tmp_path
    signal.signal(signal.SIGINT, before)


def saved(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


# ------------------------------------------------------------------------------------------------------------- layers


def test_references_see_later_layers_and_options_at_every_depth(folder: Path) -> None:
    (folder / "wide.yaml").write_text("vars: {width: 16, other: 1}\n")
    layers = load(["tiny", "wide.yaml"], [("vars.width", "32")])
    assert layers.data["vars"].items() >= {"name": "tiny", "width": 32, "other": 1}.items()
    arguments = layers.data["model"]["init_args"]
    assert (arguments["width"], arguments["optim"]["warmup"], arguments["extra"]["a"]) == (32, 32, 32)
    assert layers.data["trainer"]["callbacks"][0]["init_args"]["every"] == 32
    assert layers.data["trainer"]["default_root_dir"] == "runs/tiny"
    assert arguments["optim"]["rate"] == 1e-3  # PyYAML alone reads a string


def test_relative_references_mean_the_same(folder: Path) -> None:
    (folder / "relative.yaml").write_text("model: {init_args: {width: '${...vars.width}', label: '${..class_path}'}}\n")
    arguments = load(["tiny", "relative"], []).data["model"]["init_args"]
    assert arguments["width"] == 8 and arguments["label"].endswith("TinyModel")


def test_options_win_over_files_wherever_they_stand(folder: Path) -> None:
    assert main(["fit", "--vars.name", "second", "--trainer.max_steps=1", "-c", "tiny"]) == 0
    assert saved(folder / "runs/second")["trainer"]["max_steps"] == 1


def test_lists_replace_append_and_are_reached_into(folder: Path) -> None:
    (folder / "more.yaml").write_text("trainer: {callbacks+: {class_path: tests.cli_fixtures.Every}}\n")
    options = [("trainer.callbacks.0.init_args.every", "5"), ("trainer.callbacks.1.every", "6")]
    callbacks = load(["tiny", "more"], options).data["trainer"]["callbacks"]
    assert [callback["init_args"]["every"] for callback in callbacks] == ["5", "6"]
    (folder / "other.yaml").write_text("trainer: {callbacks: []}\n")
    assert load(["tiny", "more", "other"], []).data["trainer"]["callbacks"] == []


def test_arguments_without_init_args_and_a_class_given_as_option(folder: Path) -> None:
    layers = load(["tiny"], [("model", "tests.cli_fixtures.OtherModel"), ("model.depth", "3"), ("data.size", "5")])
    assert layers.data["model"] == {
        "class_path": "tests.cli_fixtures.OtherModel",
        "init_args": {"width": 8, "depth": "3"},
    }
    assert layers.data["data"]["init_args"] == {"size": "5"}


def test_swapped_class_names_what_it_drops(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "swap.yaml").write_text("model: {class_path: tests.cli_fixtures.OtherModel, init_args: {depth: 3}}\n")
    assert main(["fit", "-c", "tiny.yaml", "-c", "swap.yaml"]) == 0
    error = capsys.readouterr().err
    assert "warning: swap.yaml:1: model changes from tests.cli_fixtures.TinyModel" in error
    assert "does not take: optim (tiny.yaml:7), extra (tiny.yaml:8); dropped" in error
    assert saved(folder / "runs/tiny")["model"]["init_args"] == {"width": 8, "depth": 3}


def test_a_plain_value_replaces_a_class(folder: Path) -> None:
    logger = ("trainer.logger", "tests.cli_fixtures.KeepsParameters")
    assert load(["tiny"], [logger, ("trainer.logger", "True")]).data["trainer"]["logger"] == "True"
    strategy = ("trainer.strategy", "{class_path: lightning.pytorch.strategies.DDPStrategy}")
    assert load(["tiny"], [strategy, ("trainer.strategy", "ddp")]).data["trainer"]["strategy"] == "ddp"


def test_an_empty_section_keeps_what_is_below(folder: Path) -> None:
    (folder / "empty.yaml").write_text("trainer:\n  # nothing yet\nvars:\n")
    layers = load(["tiny", "empty"], [])
    assert layers.data["trainer"]["max_steps"] == 2 and layers.data["vars"]["width"] == 8


@pytest.mark.parametrize("name", ["base", "base.yaml", "configs/base.yaml", "configs/base"])
def test_shipped_configs_are_found_from_anywhere(folder: Path, name: str) -> None:
    assert find_config(name) == configs_dir() / "base.yaml"


def test_a_file_here_comes_before_a_shipped_one(folder: Path) -> None:
    (folder / "base.yaml").write_text("vars: {}\n")
    assert find_config("base.yaml") == Path("base.yaml")


# --------------------------------------------------------------------------------------------------------- run folder


def test_resolved_config_can_be_run_again(folder: Path) -> None:
    assert main(["fit", "-c", "tiny", "--vars.width", "4"]) == 0
    first = saved(folder / "runs/tiny")
    assert first["model"]["init_args"]["extra"] == {"a": 4.0}
    assert main(["fit", "-c", "runs/tiny/config.yaml"]) == 0
    assert saved(folder / "runs/tiny") == first and (folder / "runs/tiny.1/checkpoints").is_dir()


def test_fresh_start_moves_the_old_run_aside_and_resume_does_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert main(["fit", "-c", "tiny"]) == 0
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["tiny", "tiny.1", "tiny.2"]
    assert capsys.readouterr().err.count("held an earlier run: moved to") == 2
    checkpoint = next((folder / "runs/tiny/checkpoints").glob("*.ckpt"))
    more = ["--ckpt_path", str(checkpoint.relative_to(folder)), "--trainer.max_steps", "3"]
    assert main(["fit", "-c", "tiny", *more]) == 0
    assert len(list((folder / "runs").iterdir())) == 3 and saved(folder / "runs/tiny")["trainer"]["max_steps"] == 3
    assert main(["validate", "-c", "tiny", "--trainer.limit_val_batches", "1"]) == 0
    assert main(["fit", "-c", "tiny", "--trainer.fast_dev_run", "true"]) == 0
    assert len(list((folder / "runs").iterdir())) == 3
    assert saved(folder / "runs/tiny")["trainer"]["max_steps"] == 3  # validate wrote its own file


def test_the_current_folder_is_never_moved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "old.ckpt").touch()
    assert main(["fit", "-c", "tiny", "--trainer.default_root_dir", "."]) == 2
    assert "trainer.default_root_dir" in capsys.readouterr().err and (folder / "old.ckpt").exists()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"])
def test_only_the_first_process_moves_and_speaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert is_first_process()
    monkeypatch.setenv(name, "1")
    assert not is_first_process()


def test_loggers_get_config_versions_and_data_counts(folder: Path) -> None:
    KeepsParameters.received.clear()
    loggers = (
        "[tests.cli_fixtures.KeepsParameters, tests.cli_fixtures.FailingLogger, tests.cli_fixtures.KeepsParameters]"
    )
    with pytest.warns(UserWarning, match="FailingLogger did not take the config"):
        assert main(["fit", "-c", "tiny", "--trainer.logger", loggers, "--data.size", "7"]) == 0
    assert len(KeepsParameters.received) == 2
    parameters = KeepsParameters.received[0]
    assert parameters["data_counts"] == {"train": 7}
    assert parameters["model"]["init_args"]["width"] == 8
    assert {"mmtrain", "torch", "lightning"} <= set(parameters["code"])


def test_secrets_are_not_written_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_API_KEY", "hunter2hunter2")
    monkeypatch.setenv("TINY_HOME", "/somewhere")
    (folder / "secret.yaml").write_text(
        "vars: {url: 'https://me:${oc.env:TINY_API_KEY}@host', image_key: jpg, password: typed-in}\n"
        "model: {init_args: {api_key: '${oc.env:TINY_API_KEY}', label: '${oc.env:TINY_HOME}'}}\n"
    )
    assert main(["fit", "-c", "tiny", "-c", "secret"]) == 0
    text = (folder / "runs/tiny/config.yaml").read_text()
    assert "hunter2" not in text and "typed-in" not in text
    config = yaml.safe_load(text)
    assert config["model"]["init_args"]["api_key"] == "${oc.env:TINY_API_KEY}"
    assert config["vars"]["url"] == "https://me:${oc.env:TINY_API_KEY}@host"
    assert config["vars"]["image_key"] == "jpg" and config["model"]["init_args"]["label"] == "/somewhere"
    assert main(["fit", "-c", "runs/tiny/config.yaml"]) == 0  # still runs: the reference is back in place


def test_secret_names() -> None:
    assert all(map(is_secret, ["api_key", "WANDB_API_KEY", "HF_TOKEN", "password", "apiKey", "key"]))
    assert not any(map(is_secret, ["key_dim", "tokenizer", "num_tokens", "monkey"]))


# ------------------------------------------------------------------------------------------------------------ mistakes

INIT = "model.init_args"
MISTAKES = {  # name: (second config, options, parts of the message)
    "empty key at the top": ("trainr:", [], ["f.yaml:1: trainr", "unknown key trainr", "nearest: trainer"]),
    "key at the top": ("trainr: {}", [], ["f.yaml:1: trainr", "unknown key trainr", "nearest: trainer"]),
    "key at the wrong depth": ("max_steps: 3", [], ["f.yaml:1: max_steps: 3", "nearest: trainer.max_steps"]),
    "key in trainer": ("trainer:\n  max_step: 3", [], ["f.yaml:2: trainer.max_step: 3", "nearest: trainer.max_steps"]),
    "key in init_args": (
        "model:\n  init_args:\n    widht: 3",
        [],
        [f"f.yaml:3: {INIT}.widht: 3", "in tests.cli_fixtures.TinyModel", f"nearest: {INIT}.width", "allowed: width,"],
    ),
    "key in a dataclass": (
        "model: {init_args: {optim: {ratte: 3}}}",
        [],
        [f"f.yaml:1: {INIT}.optim.ratte: 3", f"nearest: {INIT}.optim.rate", "allowed: rate, warmup, betas"],
    ),
    "key in an optional dataclass": (
        "model: {init_args: {maybe: {warm: 3}}}",
        [],
        [f"f.yaml:1: {INIT}.maybe.warm: 3", f"nearest: {INIT}.maybe.warmup"],
    ),
    "key in a callback": (
        "trainer:\n  callbacks+:\n  - class_path: tests.cli_fixtures.Every\n    init_args:\n      evry: 3",
        [],
        ["f.yaml:5: trainer.callbacks.1.init_args.evry: 3", "nearest: trainer.callbacks.1.init_args.every"],
    ),
    "type in trainer": ("trainer: {max_steps: many}", [], ["f.yaml:1: trainer.max_steps: 'many'", "expected int"]),
    "type in init_args": (f"{INIT}.width: many", [], [f"f.yaml:1: {INIT}.width: 'many'", "expected int"]),
    "type in a dict": ("model: {init_args: {extra: {b: x}}}", [], [f"f.yaml:1: {INIT}.extra.b: 'x'", "expected float"]),
    "type in a union": ("trainer: {devices: [1.5]}", [], ["f.yaml:1: trainer.devices.0: 1.5", "expected int"]),
    "type through a reference": (
        "vars: {width: many}",
        [],
        [f"tiny.yaml:6: {INIT}.width: ${{vars.width}} = 'many'", "expected int"],
    ),
    "number for text": (f"{INIT}.label: 7", [], [f"{INIT}.label: 7", "expected str", 'in quotes: "7"']),
    "literal": (f"{INIT}.eps_form: publish", [], ["one of 'published', 'true'", "nearest: published"]),
    "value for a group": (f"{INIT}.optim: 3", [], [f"{INIT}.optim: 3", "expected settings", "rate, warmup, betas"]),
    "value for trainer": ("trainer: 3", [], ["f.yaml:1: trainer: 3", "expected settings"]),
    "class name": (
        "model: {class_path: tests.cli_fixtures.TinyModl}",
        [],
        ["f.yaml:1: model.class_path", "no class TinyModl", "nearest: tests.cli_fixtures.TinyModel"],
    ),
    "class name without module": (
        "trainer: {callbacks: [{class_path: EarlyStoping}]}",
        [],
        ["trainer.callbacks.0.class_path", "nearest: lightning.pytorch.callbacks.EarlyStopping"],
    ),
    "module": (
        "model: {class_path: tests.cli_fixturs.TinyModel}",
        [],
        ["f.yaml:1: model.class_path", "no module named tests.cli_fixturs", "nearest: tests.cli_fixtures.TinyModel"],
    ),
    "top module": (
        "model: {class_path: testz.cli_fixtures.TinyModel}",
        [],
        ["f.yaml:1: model.class_path", "no module named testz"],
    ),
    "not a subclass": (
        "model: {class_path: tests.cli_fixtures.TinyData}",
        [],
        ["f.yaml:1: model.class_path", "expected a subclass of LightningModule"],
    ),
    "missing argument": (
        "model: {class_path: tests.cli_fixtures.OtherModel, init_args: {width: null}}",
        [],
        ["f.yaml:1: model.class_path", f"needs {INIT}.width"],
    ),
    "YAML": ("trainer:\n  a: [1,\n  b: 3", [], ["f.yaml:4, column 1: not valid YAML"]),
    "key twice": ("trainer:\n  max_steps: 1\n  max_steps: 2", [], ["f.yaml:3: trainer.max_steps", "first in line 2"]),
    "no mapping": ("- a\n- b", [], ["f.yaml:1", "got a list"]),
    "environment": (f"{INIT}.label: ${{oc.env:TINY_NOPE}}", [], [f"f.yaml:1: {INIT}.label", "TINY_NOPE is not set"]),
    "reference": (
        f"{INIT}.label: ${{vars.widht}}",
        [],
        [f"f.yaml:1: {INIT}.label", "vars.widht", "nearest: vars.width"],
    ),
    "relative reference": (f"{INIT}.label: ${{...vars.nope}}", [], [f"f.yaml:1: {INIT}.label", "vars.nope"]),
    "reference function": (f"{INIT}.label: ${{env:HOME}}", [], ["unknown function env", "nearest: oc.env"]),
    "reference not closed": (
        f'{INIT}.label: "${{vars.width"',
        [],
        [f"f.yaml:1: {INIT}.label", "not a valid reference"],
    ),
    "circle": ("vars: {a: '${vars.b}', b: '${vars.a}'}", [], ["f.yaml:1: vars.a", "ecursive"]),
    "list index": ("", ["--trainer.callbacks.4.every", "1"], ["command line: trainer.callbacks has 1 entries"]),
    "option": ("", ["--trainer.max_step", "3"], ["command line: trainer.max_step: '3'", "nearest: trainer.max_steps"]),
    "nested option": (
        "",
        [f"--{INIT}.optim.ratte=3"],
        [f"command line: {INIT}.optim.ratte", f"nearest: {INIT}.optim.rate"],
    ),
    "short option": ("", ["--model.widht", "3"], [f"command line: {INIT}.widht", f"nearest: {INIT}.width"]),
    "option without value": ("", ["--trainer.max_steps"], ["--trainer.max_steps needs a value"]),
    "stray word": ("", ["tiny.yaml"], ["unexpected argument tiny.yaml"]),
    "file": ("", ["-c", "tinny.yaml"], ["config file tinny.yaml not found", "nearest: tiny.yaml"]),
    "shipped file": ("", ["-c", "configs/bas.yaml"], ["config file configs/bas.yaml not found", "nearest: base.yaml"]),
    "strategy": ("trainer: {strategy: dpp}", [], ["error: trainer: ", "dpp"]),
    "callback refuses": (
        "trainer: {callbacks+: tests.cli_fixtures.Refuses}",
        [],
        ["error: refused by its constructor"],
    ),
    "data refuses": ("data: {root: missing}", [], ["error: data.init_args.root: no folder missing"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, options, parts = MISTAKES[name]
    (folder / "f.yaml").write_text(text + "\n")
    layer = ["-c", "f.yaml"] if text else []
    assert main(["fit", "-c", "tiny.yaml", *layer, *options]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in parts), error
    assert "Traceback" not in error and error.count("error: ") == 1
    assert len(error[error.index("error: ") :].splitlines()) <= 5  # Lightning may have logged lines above
    assert not (folder / "runs").exists()


def test_nothing_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    error = capsys.readouterr().err
    assert "not set: data, model" in error and "python -m mmtrain list" in error


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fti", "-c", "tiny.yaml"]) == 2
    assert "unknown verb fti" in (error := capsys.readouterr().err) and "nearest: fit" in error


def test_a_secret_is_not_shown_in_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_API_KEY", "hunter2hunter2")
    assert main(["fit", "-c", "tiny", "--model.width", "${oc.env:TINY_API_KEY}"]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_traceback_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_TRACEBACK", "1")
    with pytest.raises(UserError):
        main(["fit", "-c", "tiny", "--data.root", "missing"])


def test_other_exceptions_keep_their_type_though_jsonargparse_wraps_them(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["fit", "-c", "tiny", "--trainer.callbacks+", "tests.cli_fixtures.Divides"])


# ---------------------------------------------------------------------------------------------------- codes and doors


def test_exit_code_raised_inside_training_comes_out(folder: Path) -> None:
    assert main(["fit", "-c", "tiny", "--trainer.callbacks.0.exit_code", "143"]) == 143
    assert "MMTRAIN_LAUNCHER" not in os.environ, "what is started afterwards is no part of the run"


def test_real_process_interrupted_and_mistaken(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "mmtrain", "fit", "-c", "tiny"]
    done = subprocess.run(
        [*command, "--trainer.callbacks.0.interrupt", "true"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted" and "Traceback" not in done.stderr
    done = subprocess.run([*command, "--model.widht", "3"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: command line: model.init_args.widht")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_children_of_the_launcher_move_nothing(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for _ in range(2):
        command = [sys.executable, "-m", "mmtrain", "fit", "-c", "tiny", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert done.stderr.count("held an earlier run") == 1
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["tiny", "tiny.1"]


def test_doors_without_lightning(folder: Path) -> None:
    code = (
        "import sys; from mmtrain.__main__ import main\n"
        "codes = [main([]), main(['--help']), main(['--version']), main(['fit', '-c', 'tiny', '--print_config']),"
        " main(['fit', '-c', 'nope'])]\n"
        "print(codes, sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 2] []"
    assert "default_root_dir: runs/tiny" in done.stdout and "mmtrain 0." in done.stdout


def test_help_of_a_verb_and_of_a_class(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out
    assert main(["fit", "--model.help", "tests.cli_fixtures.TinyModel"]) == 0
    assert "--model.eps_form {published,true}" in capsys.readouterr().out


def test_nearest() -> None:
    assert nearest("zzzz", ["width"]) is None
    assert nearest("Width", ["width", "depth"]) == "width"
