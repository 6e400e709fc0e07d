"""Dataclasses from the plain types that JSON keeps of them, with messages that name file and key."""

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mmtrain.config_errors import clip, nearest
from mmtrain.story import StoryFault


def dataclass_from(kind: type, given: dict[str, Any], content: Any, where: str) -> Any:
    """A dataclass from what `asdict` made of it; `given` are fields that stand elsewhere in the file.

    Raises:
        StoryFault: a key too many or too few, or a value of another type; names `where` and the key.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in given}
    check_keys(where, content, hints)
    values = {name: _value(hints[name], content[name], f"{where}.{name}") for name in hints}
    return kind(**given, **values)


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], one, f"{where}[{i}]") for i, one in enumerate(value))
    if is_dataclass(hint):
        return dataclass_from(hint, {}, value, where)
    allowed = get_args(hint) if get_origin(hint) is Literal else None
    if allowed and value not in allowed:
        raise StoryFault(f"{where} is {clip(value)}, expected one of {', '.join(allowed)}")
    if not allowed and not isinstance(value, hint):
        raise StoryFault(f"{where} is {clip(value)}, expected {hint if isinstance(hint, UnionType) else hint.__name__}")
    return value


def check_keys(where: str, content: Any, hints: dict[str, Any]) -> None:
    """Refuse what is no mapping of just these keys, or whose containers, texts and whole numbers are of another type.

    Args:
        hints: expected type by key.

    Raises:
        StoryFault: names `where` and the key.
    """
    if not isinstance(content, dict):
        raise StoryFault(f"{where} is {clip(content)}, expected a mapping with {', '.join(hints)}")
    for key in content:
        if key not in hints:
            guess = nearest(key, hints)
            raise StoryFault(f"{where} has an unknown key {key}; {f'nearest: {guess}' if guess else ', '.join(hints)}")
    for key, hint in hints.items():
        if key not in content:
            raise StoryFault(f"{where} has no {key}")
        kind = list if get_origin(hint) is tuple else hint
        if isinstance(kind, type) and kind in (list, dict, int, str) and not isinstance(content[key], kind):
            raise StoryFault(f"{where}.{key} is {clip(content[key])}, expected {kind.__name__}")
