"""A layer of settings that knows where each key was written, and how one layer merges onto another.

Mappings merge by key, everything else replaces, `key+:` appends to a list, and a `class_path` that a later layer
changes keeps the init_args that the new class takes and names the ones it drops. Done here and not by jsonargparse,
which drops init_args and references without a word, replaces the whole `vars` dict and forgets the file of a value.
"""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mmtrain.config_errors import UserError, clip

KeyPath = tuple[str | int, ...]
CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
# a class as text; not `ddp` or `false`, plain values that replace
CLASS_NAME = re.compile(r"(?!(?i:true|false|null|none)$)(?:([A-Za-z_]\w*\.)+[A-Za-z_]\w*|[A-Z]\w*)")


@dataclass(frozen=True)
class Origin:
    """Where a key was written: `file` as shown to the user, `line` from 1, `text` when the value held a reference."""

    file: str
    line: int | None = None
    text: str | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Layer:
    """A tree of settings with the origin of every key; `notes` are warnings.

    `environment` lists what `${oc.env:NAME}` brought in: the value, NAME, and the key it was written at.
    """

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    environment: list[tuple[str, str, KeyPath]] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin | None:
        """The origin of a key, or of the closest key above it."""
        return next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)


def dotted(path: KeyPath) -> str:
    """A key path as it is written on the command line, list positions as numbers."""
    return ".".join(str(part) for part in path)


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Every node below `value` with its path, parents first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key), child
        yield from walk(child, (*path, key))


def merge(below: Layer, above: Layer) -> None:
    """Merge `above` into `below` in place.

    Raises:
        UserError: a section that cannot be one.
    """
    for section in ("trainer", "vars"):
        value = above.data.get(section, {})
        if value is None:  # `trainer:` with nothing under it is an unfinished thought, not an order to forget the rest
            del above.data[section]
        elif not isinstance(value, dict):
            where = above.origins[(section,)]
            raise UserError(f"{where}: {section}: {clip(value)}\nexpected settings as `key: value` lines below it")
    if "config" in above.data:
        raise UserError(f"{above.origins[('config',)]}: config: configs are layered on the command line: -c A -c B")
    _Merge(below, above).mapping(below.data, above.data, (), ())


class _Merge:
    """One merge of two layers. Paths: `path` in the layer below, `source` in the layer above."""

    def __init__(self, below: Layer, above: Layer) -> None:
        self.below, self.above = below, above

    def mapping(self, target: dict, update: dict, path: KeyPath, source: KeyPath) -> None:
        for key, value in update.items():
            if isinstance(key, str) and key.endswith("+"):
                self.append(target, key, value, path, source)
            elif isinstance(value, (dict, str)) and self.into(target, key, value, (*path, key), (*source, key)):
                self.below.origins.setdefault((*path, key), self.above.origins[(*source, key)])
            else:
                self.put(target, key, value, (*path, key), (*source, key))

    def put(self, target: dict | list, key: Any, value: Any, path: KeyPath, source: KeyPath) -> None:
        """Replace a whole value, with its origins."""
        origins, depth = self.below.origins, len(path)
        for old in [old for old in origins if old[:depth] == path]:
            del origins[old]
        moved = [new for new in self.above.origins if new[: len(source)] == source]
        origins.update({path + new[len(source) :]: self.above.origins[new] for new in moved})
        target[key] = {} if isinstance(value, dict) else copy.deepcopy(value)
        if isinstance(value, dict):
            self.mapping(target[key], value, path, source)  # by key, for a `key+` may be inside

    def append(self, target: dict, key: str, value: Any, path: KeyPath, source: KeyPath) -> None:
        """`key+: value`: add one item, or every item of a list."""
        name = key[:-1]
        old = target.get(name)
        items = [] if old is None else old if isinstance(old, list) else [old]
        target[name] = items
        self.below.origins.setdefault((*path, name), self.above.origins[(*source, key)])
        added = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in added:
            items.append(None)
            origin = (*source, key) if index is None else (*source, key, index)
            self.put(items, len(items) - 1, item, (*path, name, len(items) - 1), origin)

    def into(self, target: dict | list, key: Any, value: dict | str, path: KeyPath, source: KeyPath) -> bool:
        """Merge into the value that is there; False when there is nothing to merge with and it is to be replaced."""
        old = target[key] if isinstance(target, list) else target.get(key)
        if isinstance(value, str):
            if not (isinstance(old, dict) and "class_path" in old and CLASS_NAME.fullmatch(value)):
                return False
            self.above.origins[(*source, "class_path")] = self.above.origins[source]
            value = {"class_path": value}  # `--model pkg.Class`
        if isinstance(old, list) and "class_path" not in value:
            return self.items(old, value, path, source)
        if isinstance(old, str) and "class_path" not in value and CLASS_NAME.fullmatch(old):
            target[key] = old = {"class_path": old}
        if not isinstance(old, dict):
            return False
        if "class_path" in old:
            value = self.class_settings(old, value, path, source)
        self.mapping(old, value, path, source)
        return True

    def items(self, old: list, value: dict, path: KeyPath, source: KeyPath) -> bool:
        """`--callbacks.1.init_args.x v` goes to the item of that number, `--callbacks.x v` to the last one."""
        numbers = {key: int(key) for key in value if str(key).isdigit()}
        if not old or any(number >= len(old) for number in numbers.values()):
            raise UserError(f"{self.above.origin(source)}: {dotted(path)} has {len(old)} entries, got {clip(value)}")
        if not numbers:
            return self.into(old, len(old) - 1, value, (*path, len(old) - 1), source)
        for key, number in numbers.items():
            child = value[key]
            where = ((*path, number), (*source, key))
            if not (isinstance(child, (dict, str)) and self.into(old, number, child, *where)):
                self.put(old, number, child, *where)
        return True

    def class_settings(self, old: dict, value: dict, path: KeyPath, source: KeyPath) -> dict:
        """Settings for a class: arguments written without `init_args` go there; a new class keeps what it takes."""
        short = {key: child for key, child in value.items() if key not in CLASS_KEYS}
        if short:
            value = {key: child for key, child in value.items() if key in CLASS_KEYS}
            value["init_args"] = {**short, **(value.get("init_args") or {})}
            origins, depth = self.above.origins, len(source)
            self.above.origins = {
                (*source, "init_args", *key[depth:])
                if key[:depth] == source and key[depth:][:1] and key[depth] in short
                else key: origin
                for key, origin in origins.items()
            }
            self.above.origins.setdefault((*source, "init_args"), origins[source])
        before, after = old["class_path"], value.get("class_path", old["class_path"])
        if before != after and old.get("init_args"):
            self.swap(old, str(before), str(after), path, source)
        return value

    def swap(self, old: dict, before: str, after: str, path: KeyPath, source: KeyPath) -> None:
        names = argument_names(after)
        accepted = {name.partition(".")[0] for name in names or ()}
        dropped = [] if names is None else [key for key in old["init_args"] if key not in accepted]
        if not dropped:
            return
        where = self.above.origin((*source, "class_path"))
        listed = ", ".join(f"{key} ({self.below.origin((*path, 'init_args', key))})" for key in dropped)
        for key in dropped:
            del old["init_args"][key]
        self.below.notes.append(
            f"{where}: {dotted(path)} changes from {before} to {after}, which does not take: {listed}; dropped"
        )


@functools.cache
def argument_names(class_path: str) -> list[str] | None:
    """Argument names of a class or function, `group.name` inside a dataclass; None if it cannot be imported.

    Not being importable is no error here: jsonargparse reports it, with more to say.
    """
    from jsonargparse import ArgumentParser  # here: slow, and most runs never swap a class

    module, _, name = class_path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    parser = ArgumentParser(exit_on_error=False)
    add = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    add(target, fail_untyped=False)
    return [action.dest for action in parser._actions if action.dest != "help"]
