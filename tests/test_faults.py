"""What clusters do to runs: each fault has its outcome, its message and its exit code, and is injected here."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.resume_driver import differences, final_state
from tests.small_trainings import write_training

ROOT = Path(__file__).parents[1]
Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """Returns a function: a request to `tests.fault_driver` -> what became of it."""
    command = [sys.executable, "-m", "tests.fault_driver", str(tmp_path_factory.mktemp("faults"))]
    driver = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(what: str | None = None, **request: Any) -> SimpleNamespace:
        print(json.dumps(what or request), file=driver.stdin, flush=True)
        found = SimpleNamespace(**json.loads(driver.stdout.readline()))
        assert not getattr(found, "left", False), f"processes were left: {found.log}"
        return found

    yield ask
    driver.stdin.close()
    driver.wait(30)


@pytest.fixture(scope="module")
def calm(run: Run) -> SimpleNamespace:
    """A run that nothing disturbs."""
    found = run()
    assert found.codes == [0], found.log
    return found


def step_of(folder: str | Path, name: str = "last.ckpt") -> int:
    return torch.load(Path(folder, "checkpoints", name), weights_only=True)["global_step"]


# ---------------------------------------------------------------------------------------------------------- preemption


def test_a_signal_to_any_process_saves_and_tells_why_by_the_exit_code(run: Run) -> None:
    told = run(processes=2, inject={"what": "SIGUSR1 in backward", "rank": 1, "step": 4})
    assert told.codes[0] == 138 and told.codes[1] in (0, -signal.SIGKILL), told.log  # the second goes with its launcher
    assert "told to make room at step 5; saved " in told.log and "go on with --ckpt_path last" in told.log
    assert step_of(told.folder) == 5 and "Traceback" not in told.log


def test_a_signal_while_a_checkpoint_is_written(run: Run) -> None:
    told = run(inject={"what": "SIGTERM while saving"})
    assert told.codes == [143] and "terminated at step 4; saved " in told.log, told.log
    assert (step_of(told.folder), step_of(told.folder, "previous.ckpt")) == (4, 3)


def test_a_signal_in_validation_is_acted_on_after_the_next_step(run: Run) -> None:
    words = ("--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2")
    told = run(inject={"what": "SIGUSR1 in validation"}, words=words)
    assert told.codes == [138] and step_of(told.folder) == 3, told.log


def test_a_signal_while_a_run_starts_ends_it_at_once(run: Run) -> None:
    assert run("at start").codes == [138]


def test_a_preemption_on_a_full_disk_says_what_is_not_saved_and_still_asks_to_go_on(run: Run) -> None:
    words = (
        "--trainer.callbacks+",
        json.dumps({"class_path": "tests.fault_driver.Inject", "init_args": {"what": "full disk"}}),
    )
    told = run(inject={"what": "SIGUSR1 in backward", "step": 4}, words=words)
    assert told.codes == [138], told.log
    assert "told to make room at step 5; nothing saved: " in told.log and "File too large" in told.log


# ------------------------------------------------------------------------------------------- lost and hanging processes


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_hanging_process_ends_the_run_and_shows_where(run: Run, rank) -> None:
    hung = run(processes=2, inject={"what": "hang", "rank": rank, "seconds": 2.0})
    assert hung.codes[0] == 1 and hung.codes[1] in (1, -signal.SIGKILL), hung.log
    assert "Timeout (0:00:02)!" in hung.log and ", line" in hung.log and " in hang\n" in hung.log


def test_a_stopped_process_ends_the_run_and_is_not_left(run: Run) -> None:
    stopped = run(processes=2, inject={"what": "SIGSTOP in backward", "rank": 1, "seconds": 2.0})
    assert stopped.codes == [1, -signal.SIGKILL], stopped.log
    assert "Timeout (0:00:02)!" in stopped.log and " in hang\n" not in stopped.log


def test_kill_9_of_another_process_is_named(run: Run) -> None:
    lost = run(processes=2, inject={"what": "SIGKILL in backward", "rank": 1})
    assert lost.codes == [1, -signal.SIGKILL], lost.log
    assert "rank 0: another process is gone or does not answer (" in lost.log
    assert "the last checkpoint is sound, go on with --ckpt_path last" in lost.log and "Traceback" not in lost.log


def test_kill_9_of_the_first_process_leaves_no_orphan(run: Run) -> None:
    lost = run(processes=2, inject={"what": "SIGKILL in backward"}, words=("--data.num_workers", "1"))
    assert lost.codes[0] == -signal.SIGKILL and lost.codes[1] in (1, -signal.SIGKILL), lost.log


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_is_left_under_lightnings_own_launcher(tmp_path, rank) -> None:
    config = write_training(tmp_path, "rankclip")
    words = ["fit", "-c", str(config), "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs"]
    command = [sys.executable, "-m", "mmtrain", *words, "1000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("run/checkpoints/last.ckpt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    (second,) = psutil.Process(process.pid).children()
    os.kill(second.pid if rank else process.pid, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]  # it ends when both have closed it
    _, left = psutil.wait_procs([second], timeout=30)
    assert not left and process.returncode == (1 if rank else -signal.SIGKILL), output
    assert rank == 0 or "another process is gone or does not answer" in output


# ------------------------------------------------------------------------------------------------- numbers that are bad


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_is_named(run: Run) -> None:
    stopped = run(processes=2, inject={"what": "inf in loss", "rank": 1, "step": 4})
    assert stopped.codes[0] == 2 and stopped.codes[1] in (2, -signal.SIGKILL), stopped.log
    assert "error: step 4: not finite: process 1: the loss (inf); no step was made with it" in stopped.log
    assert step_of(stopped.folder) == 3 and "Traceback" not in stopped.log


# ---------------------------------------------------------------------------------------------------------------- disk


def test_a_disk_that_is_full_for_a_while_costs_warnings(run: Run, calm) -> None:
    words = ("--trainer.max_steps", "12")
    passing = run(inject={"what": "full disk", "step": 4, "until": 9}, words=words)
    assert passing.codes == [0] and step_of(passing.folder) == 12, passing.log
    line = "checkpoints/last.ckpt was not written: [Errno 27] File too large; step 3 stays there"
    assert passing.log.count(line) == 2 and "UserWarning: step 6: " in passing.log and "step 9: " in passing.log
    assert step_of(passing.folder, "previous.ckpt") == 3


def test_a_disk_that_stays_full_ends_the_run_on_all_processes_with_the_old_checkpoint(run: Run) -> None:
    words = ("--trainer.max_steps", "12")
    full = run(processes=2, inject={"what": "full disk", "step": 4}, words=words)
    assert full.codes[0] == 2 and full.codes[1] in (2, -signal.SIGKILL), full.log
    assert "3 times in a row; make room, then go on with --ckpt_path last" in full.log
    assert step_of(full.folder) == 3 and os.listdir(Path(full.folder, "checkpoints")) == ["last.ckpt"]


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(run: Run) -> None:
    full = run(inject={"what": "full disk", "step": 4}, words=("--trainer.max_steps", "5"))
    assert full.codes == [2] and "error: the run is over, but " in full.log, full.log
    assert step_of(full.folder) == 3


def test_a_folder_that_cannot_be_written_to_is_told_at_the_start(run: Run) -> None:
    refused = run(folder="/proc/self/run")  # read-only even for root
    assert refused.codes == [2] and "train: " not in refused.log, refused.log
    assert "error: trainer.default_root_dir: cannot write to /proc/self/run: " in refused.log


# --------------------------------------------------------------------------------------------------------- checkpoints


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


@pytest.fixture
def copied(calm, tmp_path) -> Path:
    """The calm run's folder, to be spoilt."""
    return shutil.copytree(calm.folder, tmp_path / "run")


@pytest.mark.parametrize(
    "what", ["cut", "missing", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("empty", "garbage"))]
)
def test_a_damaged_last_checkpoint_is_passed_over_with_a_line(run: Run, calm, copied, what) -> None:
    last = copied / "checkpoints" / "last.ckpt"
    content = {"cut": last.read_bytes()[:5000], "empty": b"", "garbage": os.urandom(5000)}.get(what)
    last.write_bytes(content) if content is not None else last.unlink()
    again = run(folder=str(copied), resume=True)
    assert again.codes == [0], again.log
    said = f"no {last}: going on from" if what == "missing" else f"{last}: not a checkpoint that can be loaded ("
    assert said in again.log and "previous.ckpt" in again.log and again.log.count(said) == 1
    assert "previous.ckpt, step 3" in again.log or what == "missing"
    assert not differences(final_state(Path(calm.folder)), final_state(copied))


def test_a_checkpoint_with_code_is_refused_and_not_passed_over(run: Run, copied) -> None:
    last, mark = copied / "checkpoints" / "last.ckpt", copied / "ran"
    torch.save(torch.load(last, weights_only=True) | {"x": Code(mark)}, last)
    refused = run(folder=str(copied), resume=True)
    assert refused.codes == [2] and "it holds code (posix.mkdir)" in refused.log and not mark.exists(), refused.log


def test_two_damaged_checkpoints_end_the_run(run: Run, copied) -> None:
    for name in ("last", "previous"):
        (copied / "checkpoints" / f"{name}.ckpt").write_bytes(b"no")
    refused = run(folder=str(copied), resume=True)
    assert refused.codes == [2] and "previous.ckpt: not a checkpoint that can be loaded" in refused.log, refused.log


def test_the_checkpoint_of_a_run_with_other_settings_is_refused(run: Run, copied) -> None:
    refused = run(folder=str(copied), resume=True, words=("--model.optim.lr", "0.5"))
    assert refused.codes == [2] and "model.optim.lr: 0.001 then, 0.5 now" in refused.log, refused.log
