"""Which logger a run gets when its config names none: W&B where it is set up, else CSV files. Never a stall."""

import os

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from mmtrain.config_errors import is_first_process

SECONDS_TO_CONNECT = 15.0


def default_logger(folder: str, name: str) -> Logger:
    """W&B if WANDB_API_KEY is set or WANDB_MODE is offline, otherwise CSV under `<folder>/logs/version_N`.

    Online without an answer within `SECONDS_TO_CONNECT`, or with a key that is refused, the run is logged offline.
    """
    mode = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "disabled")
    if mode == "disabled" or not is_first_process():
        return CSVLogger(folder, name="logs")  # other processes log nothing, whichever it is
    os.makedirs(folder, exist_ok=True)
    if mode == "online":
        try:
            return _wandb(folder, name, offline=False)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            rank_zero_warn(f"W&B does not answer ({reason}): logging offline; `wandb sync {folder}/wandb/...` later")
            wandb.teardown()  # a process that tried to connect otherwise stays online
    return _wandb(folder, name, offline=True)


def _wandb(folder: str, name: str, offline: bool) -> WandbLogger:
    settings = wandb.Settings(init_timeout=SECONDS_TO_CONNECT, console="off")
    mode = {"mode": "offline"} if offline else {}
    project = os.environ.get("WANDB_PROJECT", "mmtrain")
    logger = WandbLogger(name=name, save_dir=folder, project=project, offline=offline, settings=settings, **mode)
    logger.experiment  # noqa: B018  connects now, so that a failure is seen here
    return logger
