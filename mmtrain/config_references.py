"""`${...}` references of a merged config, and keeping secrets that came through them out of what is saved.

Resolved here once all layers are merged and before jsonargparse sees a value: its own `omegaconf+` mode fails on
references inside nested dicts and dataclasses, reports a missing one with a traceback, and counts every reference from
below the verb, so that `${vars.x}` would need another number of dots at each depth.
"""

from __future__ import annotations

import os
import re
from typing import Any

from mmtrain.config_errors import UserError, nearest
from mmtrain.config_merge import KeyPath, Layer, dotted, walk

ENV_REFERENCE = re.compile(r"\$\{oc\.env:\s*([A-Za-z_]\w*)")
DATA_KEY = re.compile(r"(?<!api)(?<!access)(?<!secret)(?<!private)(?<!auth)_key$|^key$", re.IGNORECASE)
SHORTEST_SECRET = 6  # characters; replacing shorter text inside other values would garble them


def resolve(layer: Layer) -> None:
    """Replace every `${...}` by what it refers to in the merged tree, in place.

    Raises:
        UserError: an unknown key, a missing environment variable, a circle or a malformed reference.
    """
    from omegaconf import OmegaConf  # here: the verbs that need no config never pay for it
    from omegaconf.errors import OmegaConfBaseException

    marked = [(path, value) for path, value in walk(layer.data) if isinstance(value, str) and "${" in value]
    for path, text in marked:
        try:
            OmegaConf.create({"x": text})
        except OmegaConfBaseException as error:
            raise _reference_error(layer, path, text, "not a valid reference", str(error).splitlines()[0]) from error
        layer.environment += [
            (os.environ[name], name, path) for name in ENV_REFERENCE.findall(text) if name in os.environ
        ]
    try:
        tree = OmegaConf.create(layer.data) if marked else None
    except OmegaConfBaseException as error:  # a key or value of a type YAML has and OmegaConf has not
        raise UserError(f"config cannot hold references: {str(error).splitlines()[0]}") from error
    for path, text in marked:
        try:
            value = _select(tree, path)
        except RecursionError as error:
            raise _reference_error(layer, path, text, "refers to itself") from error
        except OmegaConfBaseException as error:
            raise _explain_reference(layer, path, text, str(error)) from error
        _assign(layer.data, path, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)


def _select(tree: Any, path: KeyPath) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _assign(data: Any, path: KeyPath, value: Any) -> None:
    _select(data, path[:-1])[path[-1]] = value


def _reference_error(layer: Layer, path: KeyPath, text: str, *lines: str) -> UserError:
    return UserError("\n".join([f"{layer.origin(path)}: {dotted(path)}: {text}", *lines]))


def _explain_reference(layer: Layer, path: KeyPath, text: str, message: str) -> UserError:
    """Say which name is missing and the nearest one there is."""
    if variable := re.search(r"Environment variable '([^']+)' not found", message):
        name = variable[1]
        lines = [f"environment variable {name} is not set; a default can follow a comma: ${{oc.env:{name},default}}"]
        guess = nearest(name, os.environ)
    elif resolver := re.search(r"Unsupported interpolation type (\S+)", message):
        lines, guess = [f"unknown function {resolver[1]}"], nearest(resolver[1], ["oc.env", "oc.select", "oc.decode"])
    elif missing := re.search(r"Interpolation key '\.*([^']+)' not found", message):
        keys = [dotted(key) for key, _ in walk(layer.data)]
        lines = [f"no layer sets {missing[1]} (a reference reaches keys that a config file or option sets)"]
        guess = nearest(missing[1], keys)
    else:
        lines, guess = [message.splitlines()[0]], None
    return _reference_error(layer, path, text, *lines, *([f"nearest: {guess}"] if guess else []))


# ---------------------------------------------------------------------------------------------------------- secrets


def is_secret(key: str) -> bool:
    """Whether a name ends in key, token, password or secret: `api_key`, `HF_TOKEN`, not `key_dim` or `tokenizer`."""
    words = re.split(r"[_\-. ]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return words[-1] in {"key", "apikey", "token", "password", "passwd", "secret", "credentials"}


def mask(value: Any, layer: Layer, key: str = "") -> Any:
    """A copy of a config that is safe to write down.

    Text brought in from the environment under a secret-looking name goes back to its `${oc.env:NAME}`, wherever it
    ended up, so that the saved file still runs. Secrets typed in literally become `***`; a plain `..._key` is left,
    because datasets have those too (`image_key: jpg`).
    """
    if isinstance(value, dict):
        return {name: mask(child, layer, str(name)) for name, child in value.items()}
    if isinstance(value, list):
        return [mask(child, layer, key) for child in value]
    for secret, name, path in layer.environment:
        if len(secret) >= SHORTEST_SECRET and (is_secret(name) or is_secret(str(path[-1]))):
            if isinstance(value, str):
                value = value.replace(secret, f"${{oc.env:{name}}}")
            elif str(value) == secret:
                return f"${{oc.env:{name}}}"
    typed_in = isinstance(value, str) and value and "${oc.env:" not in value
    return "***" if typed_in and is_secret(key) and not DATA_KEY.search(key) else value
