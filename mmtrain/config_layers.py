"""The layers of a run: base.yaml, the `-c` files in order, the command line; read with line numbers, then merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config_errors import UserError, clip, nearest
from mmtrain.config_merge import KeyPath, Layer, Origin, dotted, merge
from mmtrain.config_references import mask, resolve
from mmtrain.listing import configs_dir


class _Loader(yaml.SafeLoader):
    """YAML without timestamps, and with 1e-4 read as a number (PyYAML wants 1.0e-4 and reads a string)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def find_config(name: str) -> Path:
    """The file meant by `-c NAME`: a path from here, else a shipped config with or without `configs/` and `.yaml`.

    Raises:
        UserError: no such file; names the nearest one.
    """
    given = Path(name)
    if given.is_file():
        return given
    if given.with_name(f"{given.name}.yaml").is_file():
        return given.with_name(f"{given.name}.yaml")
    shipped = configs_dir()
    stem = given.name.removesuffix(".yaml").removesuffix(".yml")
    if str(given.parent) in (".", "configs") and (shipped / f"{stem}.yaml").is_file():
        return shipped / f"{stem}.yaml"
    folders = [folder for folder in dict.fromkeys((given.parent, shipped)) if folder.is_dir()]
    known = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.y*ml"))}
    guess = nearest(stem, known)
    where = " or ".join("the shipped configs" if folder == shipped else f"{folder}/" for folder in folders)
    lines = [f"config file {name} not found" + (f" in {where}" if where else "")]
    if guess:
        lines.append(f"nearest: {known[guess].name if known[guess].parent == shipped else known[guess]}")
    lines.append("all shipped configs: python -m mmtrain list")
    raise UserError("\n".join(lines))


def read_layer(path: Path) -> Layer:
    """Read one YAML file.

    Raises:
        UserError: unreadable, not YAML (with line and column), a key given twice, or no mapping at the top.
    """
    shown = _shown(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        layer = Layer()
        if node is not None:
            if not isinstance(node, yaml.MappingNode):
                got = "a list" if isinstance(node, yaml.SequenceNode) else clip(node.value)
                raise UserError(f"{shown}:{node.start_mark.line + 1}: expected `key: value` lines, got {got}")
            layer.data = _build(loader, node, (), layer.origins, shown)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}:{mark.line + 1}, column {mark.column + 1}" if mark else shown
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{place}: not valid YAML: {reason}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{shown}: cannot be read as YAML: {error}") from error
    return layer


def _shown(path: Path) -> str:
    """The path as the user would write it: shipped configs by their short name, others as given."""
    return f"configs/{path.name}" if path.parent == configs_dir() else str(path)


def _build(loader: _Loader, node: yaml.Node, path: KeyPath, origins: dict[KeyPath, Origin], shown: str) -> Any:
    """The plain value of a YAML node; fills `origins` on the way."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            origins[(*path, index)] = Origin(shown, child.start_mark.line + 1)
        return [_build(loader, child, (*path, index), origins, shown) for index, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        value = loader.construct_object(node, deep=True)
        if isinstance(value, str) and "${" in value and path in origins:
            origins[path] = Origin(shown, origins[path].line, value)
        return value
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if key in seen:
            raise UserError(f"{shown}:{line}: {dotted((*path, key))} is set twice, first in line {seen[key]}")
        seen[key] = line
    loader.flatten_mapping(node)  # `<<: *anchor`, after the check: what it merges in may be overridden
    result: dict[Any, Any] = {}
    for key_node, child in node.value:
        key = loader.construct_object(key_node, deep=True)
        # only at the top is a dotted key short for nesting; below it may be the key of a plain dict
        parts = tuple(key.split(".")) if not path and isinstance(key, str) else (key,)
        target = result
        for depth, part in enumerate(parts[:-1], start=1):
            origins.setdefault(parts[:depth], Origin(shown, key_node.start_mark.line + 1))
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"{shown}:{key_node.start_mark.line + 1}: {key} does not fit {parts[depth - 1]} above")
        origins[(*path, *parts)] = Origin(shown, key_node.start_mark.line + 1)
        target[parts[-1]] = _build(loader, child, (*path, *parts), origins, shown)
    return result


def option_layer(key: str, text: str) -> Layer:
    """One `--key text` as a layer. Mappings and lists are read as YAML; other values stay text, for the type to judge.

    Raises:
        UserError: text that starts like a list or mapping but is not YAML.
    """
    *parents, last = key.split(".")
    value: Any = text
    if text[:1] in ("[", "{") or parents[:1] == ["vars"]:
        try:
            value = yaml.load(text, _Loader)  # a SafeLoader: plain values only
        except yaml.YAMLError as error:
            raise UserError(f"command line: --{key}: not valid YAML: {text}") from error
    origin = Origin("command line", None, text if "${" in text else None)
    layer = Layer()
    target = layer.data
    for depth, part in enumerate(parents, start=1):
        target = target.setdefault(part, {})
        layer.origins[tuple(parents[:depth])] = Origin("command line")
    target[last] = value
    layer.origins[(*parents, last)] = origin
    return layer


def split_arguments(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Config names and `(key, value)` options from the words after the verb.

    Raises:
        UserError: a stray word, or an option without its value.
    """
    names, options, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            raise UserError(f"unexpected argument {word}; settings are written --key value, configs -c FILE")
        key, equals, value = word.partition("=")
        if not equals:
            if not words or words[0].startswith("--") or words[0] == "-c":
                raise UserError(f"command line: {word} needs a value")
            value = words.pop(0)
        if key in ("-c", "--config"):
            names.append(value)
        elif key.startswith("--"):
            options.append((key[2:], value))
        else:
            raise UserError(f"unknown option {key}; settings are written --key value, configs -c FILE")
    return names, options


def load(names: list[str], options: list[tuple[str, str]]) -> Layer:
    """base.yaml, then the named files in order, then the options; references resolved over the result.

    Raises:
        UserError: any mistake found on the way.
    """
    paths = [find_config(name) for name in names]
    layer = read_layer(configs_dir() / "base.yaml")
    default_name = paths[0].stem if paths else "run"
    merge(layer, option_layer("vars.name", default_name))
    for path in paths:
        merge(layer, read_layer(path))
    for key, value in options:
        merge(layer, option_layer(key, value))
    if isinstance(layer.data.get("vars"), dict) and layer.data["vars"].get("name") is None:
        layer.data["vars"]["name"] = default_name
    resolve(layer)
    return layer


def as_text(layer: Layer) -> str:
    """The merged config as YAML, secrets masked."""
    return yaml.safe_dump(mask(layer.data, layer), sort_keys=False, allow_unicode=True)
