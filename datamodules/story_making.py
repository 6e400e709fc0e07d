"""Story worlds that are made where there are none: who makes them, and what is kept beside them to tell them apart."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from datamodules.story_files import read_json
from datamodules.tar_index import COLUMNS
from mmtrain.config_errors import UserError

MADE_BY = "made_by.json"


class StoryMaker(Protocol):
    """Makes a story world's folder in the layout of `datamodules.story_folder`."""

    def make(self, folder: Path, progress: Callable[[int, int], None]) -> None:
        """Write all into an empty folder that is there; calls `progress` with what is done and all there is to do."""

    def describe(self) -> dict[str, Any]:
        """What the world depends on, as plain types; kept beside it."""


def make_world(path: Path, maker: StoryMaker) -> None:
    """Make a world in a folder of its own first, so that `path` is never half of one.

    Of several processes that do so at a time the first one's folder stays.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        with Progress(*COLUMNS, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task(f"story world {path}", total=None)
            maker.make(part, lambda done, total: progress.update(bar, completed=done, total=total))
        (part / MADE_BY).write_text(json.dumps(maker.describe(), indent=1))
        part.rename(path)
    except OSError:
        if not (path / MADE_BY).exists():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_maker(path: Path, maker: StoryMaker | None) -> None:
    """Refuse a folder that another maker, or one of other settings, has made.

    Raises:
        UserError: names the settings that differ.
    """
    if maker is None:
        return
    wanted, file = plain_description(maker), path / MADE_BY
    if not file.exists():
        raise UserError(
            f"{path}: is there, but no {MADE_BY} of data.maker in it: give another data.path, or no data.maker"
        )
    found = read_json(file)
    if found == wanted:
        return
    found = found if isinstance(found, dict) else {}
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    listed = ", ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} in data.maker" for key in differing[:4])
    raise UserError(f"{file}: made with other settings ({listed}): delete the folder, or give another data.path")


def plain_description(maker: StoryMaker) -> dict[str, Any]:
    """What a maker says of itself, as it reads back from JSON."""
    return json.loads(json.dumps(maker.describe()))
