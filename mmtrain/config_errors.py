"""Errors a user can act on: one short message, no traceback, exit code 2. Standard library only, as it comes first."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """A mistake in what the user gave. Its text is printed without a traceback and the exit code is 2.

    Raise it from anywhere: constructors, `setup`, training. `MMTRAIN_TRACEBACK=1` shows the traceback as well.
    """


def clip(value: Any, length: int = 60) -> str:
    """`repr`, cut to a length in characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that the user most likely meant, or None: same last part at another depth, else close spelling.

    >>> nearest("max_step", ["max_steps", "max_time"])
    'max_steps'
    >>> nearest("trainer.lr", ["model.init_args.optim.lr", "trainer.logger"])
    'model.init_args.optim.lr'
    """
    known = [str(entry) for entry in known]
    leaf = name.rpartition(".")[2]
    same_leaf = [entry for entry in known if entry.rpartition(".")[2] == leaf and entry != name]
    if same_leaf:
        return min(same_leaf, key=len)
    lower = {entry.lower(): entry for entry in reversed(known)}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if close:
        return lower[close[0]]
    by_leaf = {entry.rpartition(".")[2].lower(): entry for entry in reversed(known)}
    close = difflib.get_close_matches(leaf.lower(), by_leaf, n=1, cutoff=0.7)
    return by_leaf[close[0]] if close else None


def is_first_process() -> bool:
    """Whether this is global rank 0, told from the environment, before any process group exists.

    Children of Lightning's launcher have LOCAL_RANK, torchrun sets RANK, srun SLURM_PROCID; hosts after the first have
    NODE_RANK or GROUP_RANK.
    """
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


def say_once(text: str) -> None:
    """One line for the user, from the first process only."""
    if is_first_process():
        print(text, file=sys.stderr)
