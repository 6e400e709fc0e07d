"""The training verbs: fit, validate, test, predict on LightningCLI. Knows Lightning and the config layers, no model."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import warnings
from typing import Any, ClassVar, NoReturn

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mmtrain import distributed
from mmtrain.callbacks import EvaluationTable
from mmtrain.checkpoint import LAST, PREVIOUS
from mmtrain.config_errors import UserError, clip, is_first_process, say_once
from mmtrain.config_merge import Layer
from mmtrain.config_rejections import Rejection, check_groups, check_sections, explain
from mmtrain.loggers import default_logger
from mmtrain.preemption import leaving_at_once
from mmtrain.run_folder import SaveConfig, check_writable, move_aside
from mmtrain.watchdog import LAUNCHER, die_with_launcher, is_lost_process

WRAPPED = re.compile(r"Does not validate against any of the Union subtypes|Problem with given class_path")


class Parser(LightningArgumentParser):
    """Collects what parsers reject instead of printing usage: nested parsers report first, the outermost one last."""

    rejections: ClassVar[list[Rejection]] = []
    layer: ClassVar[Layer] = Layer()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        owner = getattr(ex, "subcommand_parser", None) or self
        options = [action.dest for action in owner._actions if action.dest not in ("help", "config", "print_config")]
        Parser.rejections.append(Rejection(message, options))
        if not self.exit_on_error:  # nested: the class path around it is known only to the outer parser
            super().error(message, ex)
        raise explain(Parser.rejections, Parser.layer) from ex


class CLI(LightningCLI):
    """LightningCLI that is handed one merged config and leaves a run folder in order.

    Args:
        verb: fit, validate, test or predict.
        layer: the merged config of this run.
        help_argv: words to parse as they are, for `--help`; nothing runs then.
        only_build: make trainer, model and data, and leave the run folder and the loggers alone.
    """

    def __init__(self, verb: str, layer: Layer, help_argv: list[str] | None = None, only_build: bool = False) -> None:
        self.verb, self.layer, self.only_build = verb, layer, only_build
        self.constructor_error: Exception | None = None
        Parser.rejections, Parser.layer = [], layer
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"layer": layer, "verb": verb},
            trainer_defaults={"use_distributed_sampler": False},  # our data code shares out samples itself
            seed_everything_default=0,
            parser_class=Parser,
            # no abbreviations: `--trainer.max_step` would quietly become max_steps
            parser_kwargs={"prog": "mmtrain", "allow_abbrev": False},
            auto_configure_optimizers=False,  # else `--optimizer` would override the module's own
            args=help_argv or {"subcommand": verb, verb: copy.deepcopy(layer.data)},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--vars", type=dict, default={}, help="Values that configs refer to as ${vars.NAME}.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Without the parent's warning about arguments given from Python: ours come from the command line too."""
        if isinstance(args, list):
            self.config = parser.parse_args(args)
            return
        actions = self._subcommand_parsers[self.verb]._actions
        check_sections(self.layer, {action.dest.partition(".")[0] for action in actions} - {"help", "print_config"})
        check_groups(self.layer)
        self.config = parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """The parent lets hyper-parameters stored in a checkpoint override config and command line without a word."""

    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        self.parser.add_instantiator(self._construct, object)

    def _construct(self, class_type: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return class_type(*args, **kwargs)
        except Exception as error:
            self.constructor_error = error
            raise

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.only_build:
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """`fit` ends with the figures of its final weights, also when it stopped between two evaluations."""
        table = next((c for c in self.trainer.callbacks if isinstance(c, EvaluationTable)), None)
        if table and self.trainer.enable_validation and table.step != self.trainer.global_step:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """`last` becomes the run folder's file here, since Lightning looks where a run's logger would write."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs and any(isinstance(c, EvaluationTable) for c in self.trainer.callbacks):
            kwargs["verbose"] = False  # that table has the chance levels too
        if kwargs.get("ckpt_path") != "last":
            return kwargs
        path = os.path.join(self.trainer.default_root_dir, "checkpoints", LAST)
        filesystem = get_filesystem(path)
        exists = filesystem.exists(path)
        if not exists and filesystem.exists(previous := path.removesuffix(LAST) + PREVIOUS):
            say_once(f"no {path}: going on from {previous}")
            return kwargs | {"ckpt_path": previous}
        if not exists and subcommand != "fit":
            raise UserError(f"ckpt_path: last: there is no {path}; train first, or give --vars.name or a path")
        if not exists:  # so that the same command line starts a run and goes on with it
            say_once(f"no {path} yet: starting from the beginning")
        return kwargs | {"ckpt_path": path if exists else None}

    def instantiate_classes(self) -> None:
        """jsonargparse wraps what a constructor raises into a message about types: raise the original instead."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            original: BaseException = error
            while WRAPPED.match(str(original)) and original.__cause__:
                original = original.__cause__
            if WRAPPED.match(str(error)):
                raise self.constructor_error or original from None
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config_init[self.verb].trainer
        if self.only_build:
            trainer.logger = False
        begins = self.verb == "fit" and not self.config_init[self.verb].ckpt_path
        fresh = begins and not trainer.fast_dev_run and not self.only_build
        folder = str(trainer.default_root_dir or "")
        # only now, when model and data could be made: a mistake there must not move a run away
        if fresh and folder and is_first_process() and (aside := move_aside(folder)):
            say_once(f"{folder} held an earlier run: moved to {aside}")
        if trainer.logger is False and trainer.callbacks:
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, LearningRateMonitor)]  # it insists
        if trainer.logger is None and not trainer.fast_dev_run:
            name = self.layer.data["vars"]["name"]
            kwargs["logger"] = default_logger(folder, name, self.verb, fresh)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:  # for example an unknown strategy or precision
            raise UserError(f"trainer: {error}") from error
        if folder and is_first_process() and not (trainer.fast_dev_run or self.only_build):
            check_writable(folder)
        # Lightning's handler of SIGTERM broadcasts from inside a signal, and that of SIGUSR1 leaves files behind that a
        # later run would load; `Preemption` does what is needed
        trainer._signal_connector.register_signal_handlers = lambda: None
        return trainer


def run(verb: str, layer: Layer) -> None:
    """Run one training verb.

    Raises:
        UserError: a value that does not fit, or any mistake found on the way.
        SystemExit: raised inside training.
    """
    quiet()
    die_with_launcher()
    try:
        with leaving_at_once() if verb == "fit" else contextlib.nullcontext():
            CLI(verb, layer)
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        reason = clip(str(error).strip().splitlines()[-1], 200)
        raise SystemExit(
            f"rank {distributed.rank()}: another process is gone or does not answer ({reason}); "
            "the last checkpoint is sound, go on with --ckpt_path last"
        ) from error
    finally:
        os.environ.pop(LAUNCHER, None)  # what else this process starts is no part of the run


def build(layer: Layer) -> tuple[Trainer, LightningModule, LightningDataModule | None]:
    """Trainer, model and data of a config as `fit` would have them; nothing runs, and no run folder is touched.

    Raises:
        UserError: any mistake found on the way.
    """
    quiet()
    made = CLI("fit", layer, only_build=True)
    return made.trainer, made.model, made.datamodule


def show_help(verb: str, argv: list[str]) -> None:
    """`--help`, or `--model.help package.Class` for the settings of a class; exits."""
    quiet()
    CLI(verb, Layer(), help_argv=[verb, *argv])


def quiet() -> None:
    """Keep out what a user can do nothing about: the rest of the log should be worth reading."""
    # Lightning itself calls jsonargparse's older names
    warnings.filterwarnings("ignore", message=".*was deprecated in v4.*", module="lightning.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="(lightning|jsonargparse|torch).*")
    # workers are set in the configs with the data in mind; 0 is right where decoding is cheap or cores are few
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # the run folder is ours: an existing one was moved aside, or the run continues in it on purpose
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
    # asked of plain DataLoaders only; our batches carry the ids of their samples
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices.*")
    # our evaluation metrics are gathered by torchmetrics before they are logged
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True.*")
    # a frozen part of a model is in evaluation mode on purpose
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training.*")
    # only names settings of callbacks that changed, of which ResumeGuard tells those that matter
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create.*")
    # two libraries disagreeing inside Lightning
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
    # where Slurm is installed, a run outside of it is a wish, not a mistake
    warnings.filterwarnings("ignore", message="The `srun` command is available on your system.*")
    # advertisements for other products
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
