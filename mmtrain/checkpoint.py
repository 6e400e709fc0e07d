"""Checkpoints that are never half-written, and a guard that a run goes on with the settings that it began with."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from mmtrain import distributed
from mmtrain.config_errors import UserError, clip

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# Settings that do not change what is computed, so they may differ on resume without a word.
HARMLESS = (
    *("num_workers", "pretrained", "eval_batch_size", "chunk", "evaluate", "benchmarks", "test", "cache"),
    *("guidance", "sampler", "guidance_classifier", "cavp", "predict"),  # of sampling, not of training
    *("draws_per_validation", "draw_steps", "image_features", "image_text_features", "recogniser"),
    *("pipeline", "gradient_checkpointing"),  # a model tells its base by its weights; the same gradients
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a part file beside the target and renames it; reads plain tensors and types only.

    Lightning writes through the system's temporary folder, and a kill while it copies to another file system leaves a
    broken file behind.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write so that at every moment `path` is either the old or the new checkpoint.

        Raises:
            OSError: the folder cannot be written to, or the disk is full; the old checkpoint stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # a store writes whole objects by itself
            return
        path = Path(path)
        checkpoint = {k: plain(v) if k.endswith("hyper_parameters") else v for k, v in checkpoint.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if failure := disk_failure(error):
                raise failure from None
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on disk too
        finally:
            os.close(folder)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain types.

        A `last.ckpt` that is cut, empty or garbage is told in one line, and `previous.ckpt` beside it is read instead.

        Raises:
            UserError: no such file, or one that cannot be read, or that holds code, or that no training wrote.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        try:
            return read_checkpoint(path, map_location)
        except UnreadableCheckpoint as error:
            previous = Path(path).with_name(PREVIOUS)
            if Path(path).name != LAST or not previous.exists():
                raise
            content = read_checkpoint(previous, map_location)
            step = content.get("global_step")
            rank_zero_warn(f"{error}: going on from {previous}, step {step}", category=UserWarning)
            return content


def disk_failure(error: BaseException | None) -> OSError | None:
    """The OSError behind an error, if there is one: on a full disk `torch.save` fails a second time while it closes
    its archive, with a RuntimeError about positions."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__ if isinstance(error, RuntimeError) else None
    return error


class UnreadableCheckpoint(UserError):
    """A file that is damaged, or no checkpoint at all."""


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """What a training wrote to a local file: tensors and plain types.

    Raises:
        UnreadableCheckpoint: it cannot be read, or no training wrote it.
        UserError: there is no such file, or it holds code.
    """
    if not os.path.exists(path):
        raise UserError(f"ckpt_path: {path}: no such checkpoint")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if names := code_in(path):
            raise UserError(
                f"ckpt_path: {path}: not a checkpoint that is loaded: it holds code ({first_names(names)})"
            ) from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnreadableCheckpoint(
            f"ckpt_path: {path}: not a checkpoint that can be loaded ({clip(first_line, 160)})"
        ) from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise UnreadableCheckpoint(
            f"ckpt_path: {path}: not a checkpoint of a training, for weights alone there is model.pretrained"
        )
    return content


def code_in(path: str | os.PathLike) -> list[str]:
    """Names of functions and classes that reading the file would call, beyond tensors and plain types."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # so damaged that it cannot be looked through
        return []


class ResumeGuard(pl.Callback):
    """Compares the settings of model, data and trainer with those of the checkpoint that a run resumes from.

    Args:
        allow: keys that may differ, besides those that do not change what is computed; "all" only warns.
    """

    def __init__(self, allow: list[str] | Literal["all"] = ()) -> None:
        self.allow = allow

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["settings"] = run_settings(trainer, pl_module)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hang the check before the weights are loaded; a callback's own hook comes after, when they may not fit."""
        if stage != "fit":
            return
        load = pl_module.on_load_checkpoint

        def check_and_load(checkpoint: dict[str, Any]) -> None:
            self.check(trainer, pl_module, checkpoint)
            load(checkpoint)

        pl_module.on_load_checkpoint = check_and_load

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to train when the processes stand at different steps, as when the hosts of a network disk do not agree
        yet which file is the last; asked here, where a process that found no checkpoint answers too."""
        steps = distributed.gather_objects(trainer.global_step)
        if len(set(steps)) > 1:
            raise UserError(f"ckpt_path: the processes read checkpoints of different steps: {steps}; start again")

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise a UserError that names every setting that changed; those that are allowed give a warning."""
        if "settings" not in checkpoint:
            return
        changes = changed_settings(checkpoint["settings"], run_settings(trainer, pl_module))
        if self.allow != "all":
            refused = {key: pair for key, pair in changes.items() if key not in self.allow}
            if refused:
                raise UserError(
                    "the checkpoint was made with other settings:\n"
                    + "\n".join(f"  {key}: {clip(old)} then, {clip(new)} now" for key, (old, new) in refused.items())
                    + "\nSet them back, start a new run (another vars.name), or name them in the ResumeGuard's `allow`."
                )
        for key, (old, new) in changes.items():
            rank_zero_warn(f"resuming with another {key}: {clip(old)} then, {clip(new)} now", category=UserWarning)


def run_settings(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """Everything that decides what is computed, flat, as plain types: dotted key -> value."""
    data = dict(trainer.datamodule.hparams) if trainer.datamodule is not None else {}
    settings = {
        "model": {"class": f"{type(module).__module__}.{type(module).__qualname__}", **module.hparams},
        "data": data,
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": trainer.precision,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            # an enumeration where it is set, which a file of plain types must not hold
            "gradient_clip_algorithm": getattr(trainer.gradient_clip_algorithm, "value", None),
            "limit_train_batches": trainer.limit_train_batches,
        },
    }
    return flatten(settings | {"seed_everything": os.environ.get("PL_GLOBAL_SEED")})


def settings(kind: type, given: Any) -> Any:
    """Settings as given, the defaults for None; a dict is what a checkpoint holds of them, see `plain`."""
    return kind(**given) if isinstance(given, dict) else given or kind()


def plain(value: Any) -> Any:
    """Dataclasses as dicts and paths as text, at any depth: what weights-only reading accepts."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return str(value) if isinstance(value, Path) else value


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts, lists and dataclasses as one dict of dotted keys; names with a leading underscore are left out."""
    value = plain(value)
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for key, entry in value.items():
            if not str(key).startswith("_"):
                flat |= flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        return flat
    if isinstance(value, list | tuple):
        value = [flatten(entry, "") or entry if isinstance(entry, dict) else entry for entry in value]
    return {prefix: value if isinstance(value, str | int | float | bool | list | None) else str(value)}


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of what differs and is not harmless."""
    harmless = lambda key: any(part in HARMLESS for part in key.split("."))  # noqa: E731
    keys = [key for key in {**old, **new} if not harmless(key)]
    missing = "(not set)"
    return {k: (old.get(k, missing), new.get(k, missing)) for k in keys if old.get(k, missing) != new.get(k, missing)}


def state_difference(expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> str:
    """Missing and unexpected keys of a state dict and changed shapes in one line, empty if there are none."""
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {list(state[key].shape)} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    kinds = (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes))
    return "; ".join(f"{len(found)} {kind} ({first_names(found)})" for kind, found in kinds if found)


def first_names(names: list[str]) -> str:
    """At most five of them, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


class LastCheckpoint(ModelCheckpoint):
    """Keeps `<run folder>/checkpoints/last.ckpt` up to date: every n optimizer steps, and when training ends.

    This is what `--ckpt_path last` reads. The one before it stays as `previous.ckpt`, for a disk that damages a file.
    A file that cannot be written costs a warning, on all processes alike; the third in a row, or the one at the end,
    stops the run with the last whole checkpoint in place.

    Args:
        every_n_train_steps: optimizer steps between two writings.
        dirpath: another folder.
        keep_previous: keep the one before the last.
        max_failures: writings in a row that may fail.
    """

    def __init__(
        self,
        every_n_train_steps: int = 500,
        dirpath: str | None = None,
        keep_previous: bool = True,
        max_failures: int = 2,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            save_top_k=1,  # without a metric to monitor: the newest
            enable_version_counter=False,
        )
        self.keep_previous, self.max_failures, self.failures = keep_previous, max_failures, 0
        self._step_before: int | None = None  # of the present batch
        self._step_in_file: int | None = None  # of the file that this process wrote, so that it is known to be sound

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = self.dirpath or os.path.join(trainer.default_root_dir, "checkpoints")
        super().setup(trainer, pl_module, stage)

    @property
    def path(self) -> str:
        """The file."""
        return os.path.join(self.dirpath, LAST)

    def save(self, trainer: pl.Trainer) -> str:
        """Write the file, on all processes together; returns what went wrong, on all of them, or an empty text."""
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        error = ""
        try:
            keeps = trainer.is_global_zero and self.keep_previous and self._step_in_file is not None
            with keeping_previous(self.path) if keeps else nullcontext():
                trainer.strategy.save_checkpoint(checkpoint, self.path)
        except OSError as failure:  # on the first process alone: the others must not wait for it
            error = f"{self.path} was not written: {failure}"
        error = trainer.strategy.broadcast(error)
        self.failures = self.failures + 1 if error else 0
        self._step_in_file = self._step_in_file if error else trainer.global_step
        return error

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        error = self.save(trainer)
        if error and self.failures > self.max_failures:
            raise UserError(f"{error}\n{self.failures} times in a row; make room, then go on with --ckpt_path last")
        if error:
            stays = "no checkpoint of this process" if self._step_in_file is None else f"step {self._step_in_file}"
            rank_zero_warn(f"step {trainer.global_step}: {error}; {stays} stays there", category=UserWarning)
            return
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, self.path
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # After a checkpoint of an epoch's last batch Lightning begins the next epoch without counting it as begun, and
        # a checkpoint inside that epoch would then pass for a finished one: a second resume would lose its place.
        loop, epoch = trainer.fit_loop, trainer.fit_loop.epoch_progress.current
        if loop.restarted_mid_epoch and epoch.processed == epoch.started:
            loop.reset_restart_stage()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._step_before = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step != self._step_before:  # else gradients are being accumulated, which no checkpoint holds
            super().on_train_batch_end(trainer, *args)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._step_before is None or self._last_global_step_saved == trainer.global_step:
            return
        if error := self.save(trainer):
            raise UserError(f"the run is over, but {error}\nmake room, then go on with --ckpt_path last")


@contextmanager
def keeping_previous(path: str) -> Iterator[None]:
    """While a checkpoint is replaced, keep a second name for the old one; once it is, that becomes `previous.ckpt`."""
    previous = os.path.join(os.path.dirname(path), PREVIOUS)
    part = Path(f"{previous}.part")
    if "://" in path or not os.path.exists(path):
        yield
        return
    part.unlink(missing_ok=True)
    try:
        os.link(path, part)
    except OSError:  # no links on this file system: for a moment there is no `last`, and a resume takes `previous`
        os.replace(path, previous)
    try:
        yield
        if part.exists():
            os.replace(part, previous)
    finally:
        part.unlink(missing_ok=True)


def training_record(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells of its training, for `results.json`."""
    return {
        "step": checkpoint.get("global_step", 0),
        "epoch": checkpoint.get("epoch", 0),
        "seed": checkpoint.get("settings", {}).get("seed_everything"),
        "data_counts": checkpoint.get("data_counts", {}),
    }
