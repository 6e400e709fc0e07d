"""The run folder: an old run is moved aside before a fresh one starts, and each run leaves its config and code version.

`<default_root_dir>/config.yaml` is the fully resolved config and can be given to `-c` again.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from mmtrain import __version__
from mmtrain.config_errors import UserError
from mmtrain.config_merge import Layer
from mmtrain.config_references import mask

CHECKPOINTS = ("*.ckpt", "checkpoints/*.ckpt", "*/version_*/checkpoints/*.ckpt")  # own layout, Lightning's, loggers'


def move_aside(folder: str) -> str | None:
    """Rename a run folder that holds checkpoints to the next free `folder.N`; returns the new name, None if none held.

    Raises:
        UserError: the folder is the current one (or holds it), so that it cannot be a run folder of its own.
    """
    if "://" in folder:
        return None  # object stores have no rename; keep runs there apart by name
    root = Path(folder)
    if not any(next(root.glob(pattern), None) for pattern in CHECKPOINTS):
        return None
    if Path.cwd().is_relative_to(root.resolve()):
        raise UserError(
            f"trainer.default_root_dir: {folder} holds checkpoints and the current folder\n"
            "give the run a folder of its own, or continue with --ckpt_path last"
        )
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    root.rename(aside)
    return str(aside)


def check_writable(folder: str) -> None:
    """Write and remove a file: Lightning is silent about a folder that cannot be written to.

    Raises:
        UserError: it cannot.
    """
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        probe = os.path.join(folder, f".probe-{os.getpid()}")
        with open(probe, "wb") as file:
            file.write(b"mmtrain")
        os.unlink(probe)
    except OSError as error:
        raise UserError(f"trainer.default_root_dir: cannot write to {folder}: {error}") from error


def code_version() -> dict[str, Any]:
    """Versions of this code and of what it trains with; the git commit where this is a checkout."""
    versions: dict[str, Any] = {"mmtrain": __version__}
    for package in ("torch", "lightning"):
        versions[package] = importlib.metadata.version(package)
    repository = Path(__file__).parent.parent
    if (repository / ".git").exists():
        versions["commit"] = _git(repository, "rev-parse", "HEAD")
        changes = _git(repository, "status", "--porcelain", "--untracked-files=no")
        versions["dirty"] = None if changes is None else bool(changes)
    return versions


def _git(repository: Path, *arguments: str) -> str | None:
    """Output of a git command; None where git is missing, slow or unhappy: a version is never worth a failed run."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class SaveConfig(SaveConfigCallback):
    """Rank 0 writes the resolved config into the run folder and hands it to every logger, secrets masked.

    `fit` writes `config.yaml`; the other verbs write `config_<verb>.yaml`, so that they never replace it. The loggers
    also get the code version and `data_counts` of the datamodule and the model where they have one.
    """

    def __init__(self, parser: Any, config: Any, layer: Layer, verb: str) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=True)
        self.layer, self.verb = layer, verb

    def resolved(self) -> dict[str, Any]:
        """The config as plain values, safe to write down."""
        plain = mask(yaml.safe_load(self.parser.dump(self.config, skip_none=False)), self.layer)
        if plain.get("ckpt_path") == "last":
            plain["ckpt_path"] = None  # said how this process began; given to `-c` again the file should start afresh
        return plain

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        name = "config.yaml" if self.verb == "fit" else f"config_{self.verb}.yaml"
        self.write(f"{str(trainer.default_root_dir).rstrip('/')}/{name}")
        if stage != "fit":
            self.hand_over(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.hand_over(trainer, pl_module)  # only now: `setup` of the data and the model has counted the data

    def write(self, target: str) -> None:
        """Beside the target first, then renamed: a reader never sees half a config."""
        filesystem = get_filesystem(target)
        header = ", ".join(f"{name} {value}" for name, value in code_version().items() if value is not None)
        try:
            filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            with filesystem.open(f"{target}.part", "w") as file:
                file.write(f"# Resolved config of a run: {header}\n")
                file.write(yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True))
            filesystem.mv(f"{target}.part", target)
        except OSError as error:
            raise UserError(f"trainer.default_root_dir: cannot write {target}: {error}") from error

    def hand_over(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hyper-parameters for all loggers. A logger that cannot take them costs a warning, never the run."""
        parameters = {**self.resolved(), "code": code_version()}
        datamodule = getattr(trainer, "datamodule", None)
        counts = [getattr(owner, "data_counts", None) for owner in (datamodule, pl_module)]
        for found in counts:
            if isinstance(found, dict):
                parameters["data_counts"] = {**parameters.get("data_counts", {}), **found}
        for logger in trainer.loggers:
            try:
                logger.log_hyperparams(parameters)
            except Exception as error:
                rank_zero_warn(f"{type(logger).__name__} did not take the config as hyper-parameters: {error}")
