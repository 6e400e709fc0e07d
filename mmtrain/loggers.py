"""Which logger a run gets when its config names none: W&B where it is set up, else CSV files.

Logging never stalls a run and never ends one: without a key, with a refused key, without network or on a full disk
there is one warning, and what cannot be logged is left out.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from mmtrain.config_errors import is_first_process

SECONDS_TO_CONNECT = 15.0
SECONDS_TO_FINISH = 120  # for uploads after the last step; WANDB_FINISH_TIMEOUT changes it
ID_FILE = "wandb_id"  # in the run folder: the id of its W&B run, so that `test` and a resumed `fit` continue it


def default_logger(folder: str, name: str, verb: str = "fit", fresh: bool = False) -> Logger:
    """W&B if WANDB_API_KEY is set or WANDB_MODE is online or offline, otherwise CSV under `<folder>/logs/version_N`.

    Online without an answer within `SECONDS_TO_CONNECT`, without a key, or with one that is refused, the run is logged
    offline. `fit` and `test` continue the W&B run that the folder remembers; the other verbs write CSV.

    Args:
        folder: the run folder.
        name: name of the W&B run.
        verb: fit, validate, test or predict.
        fresh: whether this begins a new run, so that an id left in the folder is not its own.
    """
    mode = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "disabled")
    if mode == "disabled" or verb not in ("fit", "test") or not is_first_process():
        return SafeCSVLogger(folder, name="logs")  # other processes log nothing, whichever it is
    known = None if fresh else read_id(folder)
    for offline in (False, True) if mode == "online" else (True,):
        try:
            return connect(folder, name, known, verb, offline)
        except Exception as error:
            instead = "writing CSV files" if offline else f"logging offline; `wandb sync {folder}/wandb/...` later"
            rank_zero_warn(f"W&B is not available ({first_line(error)}): {instead}")
            with contextlib.suppress(Exception):
                wandb.teardown()  # a process that tried to connect otherwise stays online
    return SafeCSVLogger(folder, name="logs")


def connect(folder: str, name: str, known: str | None, verb: str, offline: bool) -> SafeWandbLogger:
    """Start the W&B run, or go on with the one whose id is known.

    Raises:
        Exception: of whatever kind W&B raises when it cannot.
    """
    if not offline and not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False, verify=False):
        raise wandb.errors.UsageError("no API key is configured")  # at a terminal W&B would ask, and wait for ever
    if wandb.run is not None and wandb.run.id != known:
        wandb.finish()  # an earlier run of this process, which Lightning would take for this one
    os.makedirs(folder, exist_ok=True)
    finish = {} if "WANDB_FINISH_TIMEOUT" in os.environ else {"finish_timeout": SECONDS_TO_FINISH}
    logger = SafeWandbLogger(
        name=name,
        save_dir=folder,
        id=known,
        project=os.environ.get("WANDB_PROJECT", "mmtrain"),
        job_type=os.environ.get("WANDB_JOB_TYPE", "train"),
        offline=offline,
        settings=wandb.Settings(init_timeout=SECONDS_TO_CONNECT, console="off", **finish),
        **({"mode": "offline"} if offline else {}),
    )
    logger.experiment  # noqa: B018  connects now, so that a failure is seen here
    logger.config_prefix = f"{verb}/" if known and verb != "fit" else ""
    logger.stay_quiet()
    with contextlib.suppress(OSError):  # a run without it is only not continued
        Path(folder, ID_FILE).write_text(f"{logger.version}\n")
    return logger


def read_id(folder: str) -> str | None:
    """The id of the W&B run that this run folder belongs to, None if it has none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path(folder, ID_FILE).read_text().strip() or None
    return None


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def warn_once(logger: Logger, error: BaseException) -> None:
    """One warning a logger: a full disk would otherwise be told at every step."""
    if not getattr(logger, "has_warned", False):
        logger.has_warned = True
        rank_zero_warn(f"{type(logger).__name__}: {first_line(error)}: what cannot be logged is left out")


def never_raises(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a logger; where it would raise it warns and returns None."""

    @functools.wraps(method)
    def guarded(self: Logger, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            warn_once(self, error)
            return None

    return guarded


class SafeCSVLogger(CSVLogger):
    """CSVLogger that outlives a full disk: rows that cannot be written are kept, and written once there is space."""

    log_metrics = never_raises(CSVLogger.log_metrics)
    log_hyperparams = never_raises(CSVLogger.log_hyperparams)
    finalize = never_raises(CSVLogger.finalize)

    @never_raises
    def save(self) -> None:
        """Write the collected rows; after an error the file is what it was before."""
        writer, backup = self.experiment, None
        path, keys = Path(writer.metrics_file_path), list(writer.metrics_keys)
        copy, size = path.with_name(f"{path.name}.part"), path.stat().st_size if path.exists() else 0
        try:
            if size and not set(keys).issuperset(set().union(*writer.metrics)):
                backup = shutil.copyfile(path, copy)  # for a new column Lightning empties the file and writes it again
            super().save()
        except OSError:
            writer.metrics_keys = keys
            if backup:
                os.replace(backup, path)
            elif size:
                os.truncate(path, size)
            else:
                path.unlink(missing_ok=True)
            raise
        finally:
            copy.unlink(missing_ok=True)


class SafeWandbLogger(WandbLogger):
    """WandbLogger that never raises once it is connected.

    Attributes:
        config_prefix: put before the keys of hyper-parameters, so that the config of a later `test` does not replace
            that of the training.
    """

    config_prefix = ""
    watch = never_raises(WandbLogger.watch)
    log_table = never_raises(WandbLogger.log_table)
    log_text = never_raises(WandbLogger.log_text)
    log_image = never_raises(WandbLogger.log_image)
    log_audio = never_raises(WandbLogger.log_audio)
    log_video = never_raises(WandbLogger.log_video)
    after_save_checkpoint = never_raises(WandbLogger.after_save_checkpoint)
    finalize = never_raises(WandbLogger.finalize)

    @never_raises
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        params = vars(params) if isinstance(params, Namespace) else params
        super().log_hyperparams({f"{self.config_prefix}{key}": value for key, value in params.items()})

    @never_raises
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        # W&B's own process writes the file, and says nothing when it cannot
        if not getattr(self, "has_warned", False) and shutil.disk_usage(self.experiment.dir).free == 0:
            warn_once(self, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.experiment.dir))

    def stay_quiet(self) -> None:
        """A debug log of W&B that cannot be written is worth our one warning, not a traceback at every line."""
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: warn_once(self, sys.exc_info()[1] or OSError("log file"))
