"""What jsonargparse rejects, said so that a user can act: file, line, key, value, what was expected, nearest name.

jsonargparse reports a chain of nested messages without file or list position. `explain` reads the chain, finds the
key in the merged layers (which know file and line), and looks up the nearest name among what would have been accepted.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

from mmtrain.config_errors import UserError, clip, nearest
from mmtrain.config_merge import KeyPath, Layer, argument_names, dotted, walk

CHAIN = re.compile(r'Parser key "(?P<key>[^"]+)"|Problem with given class_path \'(?P<cls>[^\']+)\'')
UNKNOWN = re.compile(
    r"Group '(?P<group>[^']+)' does not accept option '(?P<inner>[^']+)'"
    r"|Subcommand '[^']+' does not accept option '(?P<top>[^']+)'"
    r"|Option '(?P<option>[^']+)' is not accepted"
)
MISSING = re.compile(r"the following arguments are required: (.+)")
NO_CLASS = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
NO_MODULE = re.compile(r"No module named '([^']+)'")
NO_SUBCLASS = re.compile(r"Import path (\S+) does not (?:correspond to a subclass of|implement protocol) (\S+)")
NO_PATH = re.compile(r"Expected a dot import path string: (\S+)")
EXPECTED = re.compile(r"Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)")
SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
MANY = 12  # names listed in a message; longer lists (the 40 of `trainer`) would bury the nearest one
SHORT_NAMES = ("lightning.pytorch.callbacks", "lightning.pytorch.loggers")  # where a bare class name is looked for


@dataclass
class Rejection:
    """One call of a parser's `error`: its message and the option names that parser has."""

    message: str
    options: list[str]


def explain(rejections: list[Rejection], layer: Layer) -> UserError:
    """The last rejection, which is the outermost and holds the messages of the ones nested in it, as a UserError."""
    message = rejections[-1].message
    for pattern, reader in (
        (UNKNOWN, _unknown),
        (MISSING, _missing),
        (NO_CLASS, _no_class),
        (NO_SUBCLASS, _no_subclass),
        (NO_PATH, _no_path),
        (NO_MODULE, _no_module),
    ):
        if match := pattern.search(message):
            chain, class_path = _chain(message[: match.start()])
            return UserError("\n".join(line for line in reader(match, chain, class_path, rejections, layer) if line))
    return UserError("\n".join(line for line in _wrong_value(message, layer) if line))


# ------------------------------------------------------------------------------------------------- finding the key


def _chain(message: str) -> tuple[tuple[str, ...], str | None]:
    """The key names that lead to the mistake, without `init_args` and list positions, and the innermost class."""
    names: list[str] = []
    class_path = None
    for match in CHAIN.finditer(message):
        if match["key"]:
            names += _plain(match["key"].split("."))
        else:
            class_path = match["cls"]
    return tuple(names), class_path


def _plain(parts: Any) -> list[str]:
    """A key path the way jsonargparse names it."""
    return [part for part in parts if isinstance(part, str) and part not in ("init_args", "dict_kwargs")]


def _locate(layer: Layer, chain: tuple[str, ...], class_path: str | None = None) -> KeyPath | None:
    """The path in the merged layers for a chain of names; `class_path` chooses among the entries of a list."""
    fits = [path for path, _ in walk(layer.data) if tuple(_plain(path)) == chain and path[-1] != "init_args"]
    if class_path:
        inside = [path for path in fits if _class_above(layer, path) == class_path]
        fits = inside or fits
    return fits[0] if fits else None


def _value(layer: Layer, path: KeyPath) -> Any:
    value: Any = layer.data
    for part in path:
        value = value[part]
    return value


def _class_above(layer: Layer, path: KeyPath) -> str | None:
    for end in range(len(path), -1, -1):
        value = _value(layer, path[:end])
        if isinstance(value, dict) and "class_path" in value:
            return value["class_path"]
    return None


def _where(layer: Layer, path: KeyPath | None, chain: tuple[str, ...], show_value: bool = True) -> str:
    """`file:line: key: value`, the value as written where it came through a reference (it may hold a secret)."""
    if path is None:
        return ".".join(chain)
    origin = layer.origin(path)
    value = _value(layer, path)
    text = origin.text if origin and origin.text else clip(value)
    if origin and origin.text and "oc.env" not in origin.text:
        text += f" = {clip(value)}"
    return f"{origin}: {dotted(path)}" + (f": {text}" if show_value else "")


def _guess(name: str, known: Any) -> str:
    found = nearest(name, known)
    return f"nearest: {found}" if found else ""


# -------------------------------------------------------------------------------------------- one reader a mistake


def _unknown(match: re.Match, chain: tuple[str, ...], cls: str | None, rejections: list[Rejection], layer: Layer):
    given = match["option"] or match["top"] or f"{match['group']}.{match['inner']}"
    names = (*chain, *_plain(given.split(".")))
    path = _locate(layer, names, cls)
    nested = next((r for r in reversed(rejections) if match[0] in r.message and r.message.startswith(match[0])), None)
    options = nested.options if nested else []
    parent, _, leaf = given.rpartition(".")
    siblings = [option for option in options if option.rpartition(".")[0] == parent]
    yield _where(layer, path, names)
    owner = f"{parent} of {cls}" if parent and cls else parent or cls
    yield f"unknown key {leaf} in {owner}" if owner else f"unknown key {leaf} at the top level"
    prefix = dotted(path).removesuffix(given) if path else ""
    guess = nearest(given, options)
    yield f"nearest: {prefix}{guess}" if guess else ""
    if len(siblings) <= MANY:
        yield f"allowed: {', '.join(option.rpartition('.')[2] for option in siblings)}"


def _missing(match: re.Match, chain: tuple[str, ...], cls: str | None, _: list[Rejection], layer: Layer):
    names = [name.strip() for name in match[1].split(",")]
    if not chain:  # model or data at the top: nothing to point at
        yield f"not set: {', '.join(_plain(name.rpartition('.')[2] for name in names))}"
        yield "give a config that sets it: -c NAME (shipped ones: python -m mmtrain list)"
        return
    path = _locate(layer, chain, cls)
    target = (*path, "class_path") if path and isinstance(_value(layer, path), dict) else path
    yield _where(layer, target, chain)
    prefix = f"{dotted(path)}.init_args." if path else ""
    yield f"{cls} needs {', '.join(prefix + name for name in names)}, which no config file or option sets"


def _class_path_of(layer: Layer, chain: tuple[str, ...], class_path: str) -> KeyPath | None:
    """Where this class_path was written, under the keys of the chain if possible."""
    fits = [path for path, value in walk(layer.data) if value == class_path]
    under = [path for path in fits if tuple(_plain(path))[: len(chain)] == chain]
    return (under or fits or [None])[0]


def _no_class(match: re.Match, chain: tuple[str, ...], cls: str | None, _: list[Rejection], layer: Layer):
    yield _where(layer, _class_path_of(layer, chain, cls or ""), chain)
    if f"{match['module']}.{match['name']}" != cls:  # what is missing is a module on the way
        yield from _nearest_module(f"{match['module']}.{match['name']}", cls or "")
        return
    yield f"module {match['module']} has no class {match['name']}"
    module = importlib.import_module(match["module"])
    names = [name for name, value in vars(module).items() if inspect.isclass(value)]
    own = [name for name in names if getattr(module, name).__module__ == match["module"]]
    guess = nearest(match["name"], own) or nearest(match["name"], names)
    yield f"nearest: {match['module']}.{guess}" if guess else f"it has: {', '.join(own[:MANY])}" if own else ""


def _no_subclass(match: re.Match, chain: tuple[str, ...], cls: str | None, _: list[Rejection], layer: Layer):
    yield _where(layer, _class_path_of(layer, chain, match[1]), chain)
    yield f"expected a subclass of {match[2]}, {match[1].rpartition('.')[2]} is none"


def _no_path(match: re.Match, chain: tuple[str, ...], cls: str | None, _: list[Rejection], layer: Layer):
    yield _where(layer, _class_path_of(layer, chain, match[1]), chain)
    yield "expected a class path such as package.module.Class"
    known = {name: f"{module}.{name}" for module in SHORT_NAMES for name in vars(importlib.import_module(module))}
    guess = nearest(match[1], known)
    yield f"nearest: {known[guess]}" if guess else ""


def _no_module(match: re.Match, chain: tuple[str, ...], cls: str | None, _: list[Rejection], layer: Layer):
    yield _where(layer, _class_path_of(layer, chain, cls or ""), chain)
    if not f"{cls}.".startswith(f"{match[1]}."):
        yield f"importing it failed: {match[0]}, which it needs"
        return
    yield from _nearest_module(match[1], cls or "")


def _nearest_module(missing: str, class_path: str):
    yield f"no module named {missing}"
    parent, _, name = missing.rpartition(".")
    folders = importlib.import_module(parent).__path__ if parent else None
    guess = nearest(name, [module.name for module in pkgutil.iter_modules(folders)])
    if guess:
        yield f"nearest: {parent}{'.' if parent else ''}{guess}{class_path[len(missing) :]}"


def _wrong_value(message: str, layer: Layer):
    chain, cls = _chain(message)
    matches = list(EXPECTED.finditer(message))
    path = _locate(layer, chain, cls)
    if path is None:
        yield re.sub(r"\s+", " ", message).strip()
        return
    got = matches[0]["value"] if matches else None
    # inside a plain dict or list the chain ends above the value: look for the value itself
    leaves = [inner for inner, value in walk(_value(layer, path), path) if got is not None and str(value) == got]
    path = leaves[0] if leaves else path
    last_key = max((match.end() for match in CHAIN.finditer(message)), default=0)
    union = SUBTYPES.search(message, last_key)
    expected = union[1] if union and not leaves else matches[0]["type"] if matches else ""
    yield _where(layer, path, chain)
    yield f"expected {type_text(expected)}" if expected else re.sub(r"\s+", " ", message[last_key:]).strip(" :")
    value = _value(layer, path)
    yield _guess(str(value), re.findall(r"'([^']*)'", "".join(re.findall(r"Literal\[([^\]]*)\]", expected))))
    if "'str'" in expected and isinstance(value, (int, float)) and not isinstance(value, bool):
        yield f'write it in quotes: "{value}"'


def type_text(expected: str) -> str:
    """jsonargparse's type names the way a user would say them.

    >>> type_text("<class 'int'>, <class 'NoneType'>")
    'int or null'
    >>> type_text("typing.Literal['a', 'b']")
    "one of 'a', 'b'"
    """
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", expected)
    text = re.sub(r"\bLiteral\[([^\]]*)\]", lambda literal: "one of " + literal[1].replace(", ", "\0"), text)
    text = re.sub(r"(?<!['\w.])(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*|one of )", r"\1", text)
    parts = re.split(r",\s*(?![^\[]*\])", text)  # commas outside brackets
    return " or ".join(parts).replace("NoneType", "null").replace("\0", ", ")


def check_sections(layer: Layer, known: set[str]) -> None:
    """jsonargparse silently takes an unknown section with nothing in it (`trainr: {}`): refuse it.

    Raises:
        UserError: names the section and the nearest known one.
    """
    for name, value in layer.data.items():
        if value == {} and name not in known:
            guess = nearest(name, known)
            lines = [f"{_where(layer, (name,), ())}", f"unknown key {name} at the top level"]
            raise UserError("\n".join([*lines, *([f"nearest: {guess}"] if guess else [])]))


def check_groups(layer: Layer) -> None:
    """jsonargparse silently takes a plain value where a group of settings belongs (a dataclass): refuse it.

    Raises:
        UserError: names the key and the settings of the group.
    """
    for path, value in walk(layer.data):
        if isinstance(value, dict) or value in (None, "null"):  # the latter from the command line
            continue
        names: list[str] = []
        if path[-2:-1] == ("init_args",):
            owner = _value(layer, path[:-2]).get("class_path")
            arguments = argument_names(owner) or [] if isinstance(owner, str) else []
            names = [name.partition(".")[2] for name in arguments if name.startswith(f"{path[-1]}.")]
        if names:
            raise UserError(f"{_where(layer, path, ())}\nexpected settings as `key: value` lines: {', '.join(names)}")
