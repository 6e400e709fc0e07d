"""The door: `python -m mmtrain VERB ...`. Looks at the verb first, so that what needs no torch starts at once."""

from __future__ import annotations

import importlib
import os
import sys

from mmtrain import __version__
from mmtrain.config_errors import UserError, nearest, say_once

TRAINING = {
    "fit": "train, and evaluate while training",
    "validate": "evaluate a checkpoint on the validation data",
    "test": "measure a checkpoint: the paper's tables with our row, figures, results.json",
    "predict": "run a checkpoint and keep its outputs",
}
OTHERS = {  # verb: (module whose main(argv) runs it, description); imported only when used
    "list": ("mmtrain.listing", "show the shipped configs"),
    "data": ("datamodules.tools", "prepare and check data: index, check, convert, pca"),
    "data story-graph": ("mmtrain.storyweaver.graph_command", "a story world's characters, mentions and prompts"),
    "report": ("mmtrain.reporting.report", "one page of many runs beside the reported numbers"),
    "dashboard": ("mmtrain.reporting.dashboard", "the same as a W&B project: baselines, workspace, report"),
    "reproduce": ("mmtrain.reproduce", "a paper's comparison at laptop scale, with a verdict on each claim"),
    "plan": ("mmtrain.plan", "what a config needs on N nodes: memory, network, hours, and the bottleneck"),
    "submit": ("mmtrain.submit", "write and submit a Slurm job, or an array of them"),
    "export": ("mmtrain.export", "write a checkpoint in a released layout"),
}
USAGE = """usage: python -m mmtrain VERB ...

{verbs}

  python -m mmtrain list
  python -m mmtrain fit -c NAME [-c FILE ...] [--key value ...]
  python -m mmtrain fit -c NAME --ckpt_path last      continue an interrupted run
  python -m mmtrain fit -c NAME --print_config        show the merged config and stop
  python -m mmtrain fit --help                        every key
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C, or what training
    exits with. MMTRAIN_TRACEBACK=1 lets a user's mistake come out with its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return dispatch(argv)
    except UserError as error:
        if os.environ.get("MMTRAIN_TRACEBACK", "0") not in ("", "0"):
            raise
        rank = int(os.environ.get("LOCAL_RANK") or 0)
        print(f"error{f' (local rank {rank})' if rank else ''}: {indent(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted()
    except BrokenPipeError:  # whoever read our output, `head` for example, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into SystemExit(1)
            return interrupted()
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0


def dispatch(argv: list[str]) -> int:
    """Find the verb and run it.

    Raises:
        UserError: an unknown verb, and everything the verbs raise it for.
    """
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        descriptions = {**TRAINING, **{name: text for name, (_, text) in OTHERS.items()}}
        print(USAGE.format(verbs="\n".join(f"  {name:<18}{text}" for name, text in descriptions.items())), end="")
        return 0
    if verb == "--version":
        print(f"mmtrain {__version__}")
        return 0
    if (both := " ".join(argv[:2])) in OTHERS:  # a verb of data that needs a room: data modules know none
        return importlib.import_module(OTHERS[both][0]).main(argv[2:])
    if verb in OTHERS:
        return importlib.import_module(OTHERS[verb][0]).main(rest)
    if verb in TRAINING:
        train(verb, rest)
        return 0
    guess = nearest(verb, [*TRAINING, *OTHERS])
    hint = f"nearest: {guess}" if guess else f"verbs: {', '.join([*TRAINING, *OTHERS])}"
    raise UserError(f"unknown verb {verb}\n{hint}")


def train(verb: str, argv: list[str]) -> None:
    """Merge the configs and run a training verb. Lightning is imported last: mistakes in files show within a blink."""
    if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in argv):
        importlib.import_module("mmtrain.cli").show_help(verb, argv)
        return
    layers = importlib.import_module("mmtrain.config_layers")
    layer = layers.load(*layers.split_arguments([word for word in argv if word != "--print_config"]))
    for note in layer.notes:
        say_once(f"warning: {note}")
    if "--print_config" in argv:
        print(layers.as_text(layer), end="")
        return
    importlib.import_module("mmtrain.cli").run(verb, layer)


def interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def indent(text: str) -> str:
    """Further lines of a message under its first."""
    return text.strip().replace("\n", "\n  ")


if __name__ == "__main__":
    sys.exit(main())
