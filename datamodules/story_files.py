"""Files of story data: text, JSON, folders in the order of their numbers, and faults that are told together."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmtrain.story import StoryFault

MOST_FAULTS, MOST_NAMES = 5, 8  # told in one message


class Faults:
    """Faults of many files, told together; and notes on files that were left out."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.notes: dict[str, list[str]] = {}

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps a fault of the block and goes on behind it."""
        try:
            yield
        except StoryFault as fault:
            self.messages.append(str(fault))

    def note(self, what: str, path: Path) -> None:
        """One more file of which `what` is to be said; its last three parts name it."""
        self.notes.setdefault(what, []).append("/".join(path.parts[-3:]))

    def warnings(self) -> list[str]:
        """One line for each kind of note."""
        return [f"{what}: {listed(names)}" for what, names in self.notes.items()]

    def tell(self) -> None:
        """Raises what was collected.

        Raises:
            StoryFault: up to five messages, and how many there are more.
        """
        if len(self.messages) > MOST_FAULTS:
            rest = len(self.messages) - MOST_FAULTS
            raise StoryFault("\n".join([*self.messages[:MOST_FAULTS], f"and {rest} more of such faults"]))
        if self.messages:
            raise StoryFault("\n".join(self.messages))


def by_stem(folder: Path, suffixes: Sequence[str], faults: Faults) -> dict[str, Path]:
    """Files of a folder by their stems in lower case, 2 before 10; none if there is no such folder."""
    found: dict[str, Path] = {}
    entries = folder.iterdir() if folder.is_dir() else ()
    for path in sorted((p for p in entries if p.is_file() and p.name[0] != "."), key=_natural):
        if path.suffix.lower() not in suffixes:
            faults.note(f"not of the types {' '.join(suffixes[:4])}, left out", path)
        elif (stem := path.stem.casefold()) in found:
            faults.messages.append(f"{path}: has the same name as {found[stem].name}: delete or rename one of them")
        else:
            found[stem] = path
    return found


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, 2 before 10; none if it is not there."""
    if not folder.is_dir():
        return []
    return [path.name for path in sorted(folder.iterdir(), key=_natural) if path.is_dir() and path.name[0] != "."]


def first_line(path: Path) -> str:
    """The first line of a file that must have one.

    Raises:
        StoryFault: no file, or no line.
    """
    line = read_text(path).strip().partition("\n")[0].strip()
    if not line:
        raise StoryFault(f"{path}: is empty; one line is wanted")
    return line


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        StoryFault: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StoryFault(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise StoryFault(f"{path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        StoryFault: it is none, or cannot be read.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise StoryFault(f"{path}: not JSON: {error}") from error


def listed(names: Sequence[str]) -> str:
    """Eight of the names, and how many there are more."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
