"""Attack animations from the unit files of Battle for Wesnoth (its markup language, WML): sprites and sounds by time.

Reads what attack animations use: tags, keys, macros with arguments, the first branch of [if], and lists such as
`grunt-[1~5].png:[100,75*2,50]`. What it cannot read is left out and counted by reason, see `read_animations`.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_MS = 100  # of a sprite without a duration
MACRO_DEPTH = 8
_DEFINE = re.compile(r"^[ \t]*#define[ \t]+(\S+)[ \t]*(.*?)\n(.*?)#enddef", re.MULTILINE | re.DOTALL)
_CALL = re.compile(r"\{([^{}]*)\}")
_COMMENT = re.compile(r"^[ \t]*#.*$|[ \t]+#[ \t].*$", re.MULTILINE)


@dataclass
class Node:
    """One tag: its keys and the tags inside it, in order."""

    keys: dict[str, str] = field(default_factory=dict)
    children: list[tuple[str, "Node"]] = field(default_factory=list)

    def all(self, tag: str) -> list["Node"]:
        """Return the tags of that name directly inside."""
        return [node for name, node in self.children if name == tag]


@dataclass(frozen=True)
class Animation:
    """One attack of one unit.

    Args:
        unit: id of the unit type.
        attack: name of the attack.
        kind: of damage: blade, pierce, impact, fire, cold or arcane.
        sprites: (picture file below images/, start, end) in milliseconds, where 0 is the hit.
        sounds: (choice of files below sounds/, start in milliseconds).
    """

    unit: str
    attack: str
    kind: str
    sprites: tuple[tuple[str, int, int], ...]
    sounds: tuple[tuple[tuple[str, ...], int], ...]


def read_macros(texts: list[str]) -> dict[str, tuple[list[str], str]]:
    """Return the argument names and the body of every macro that is defined in `texts`."""
    return {
        name: (arguments.split("#")[0].split(), _COMMENT.sub("", body).strip())
        for text in texts
        for name, arguments, body in _DEFINE.findall(text)
    }


def expand(text: str, macros: dict[str, tuple[list[str], str]], unknown: Counter[str] | None = None) -> str:
    """Put macros in place, innermost first; unknown ones vanish and are counted."""

    def put(match: re.Match[str]) -> str:
        name, *values = re.findall(r'"[^"]*"|\([^()]*\)|[^\s"()]+', match[1]) or [""]
        if name not in macros or len(values) < len(macros[name][0]):
            if unknown is not None:
                unknown[name] += 1
            return ""
        names, body = macros[name]
        for key, value in zip(names, values, strict=False):
            body = body.replace("{" + key + "}", value.strip("()"))
        return body

    for _ in range(MACRO_DEPTH):
        text, num = _CALL.subn(put, text)
        if not num:
            break
    return text


def parse(text: str) -> Node:
    """Return the tree of tags in expanded text.

    Raises:
        ValueError: a tag is closed that is not open, or left open.
    """
    root = Node()
    open_tags: list[tuple[str, Node]] = [("", root)]
    for line in _COMMENT.sub("", text).splitlines():
        line = line.strip()
        if closing := re.fullmatch(r"\[/(\w+)\]", line):
            if open_tags[-1][0] != closing[1]:
                raise ValueError(f"[/{closing[1]}] closes [{open_tags[-1][0]}]")
            open_tags.pop()
        elif opening := re.fullmatch(r"\[\+?(\w+)\]", line):
            node = Node()
            open_tags[-1][1].children.append((opening[1], node))
            open_tags.append((opening[1], node))
        elif pair := re.fullmatch(r"([\w,]+)\s*=\s*(.*)", line):
            open_tags[-1][1].keys[pair[1]] = pair[2].removeprefix("_").strip().strip('"')
    if len(open_tags) > 1:
        raise ValueError(f"[{open_tags[-1][0]}] is left open")
    return root


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _list(text: str) -> list[str]:
    """`1~3,2*2` as 1, 2, 3, 2, 2; leading zeros are kept."""
    values: list[str] = []
    for part in text.split(","):
        if span := re.fullmatch(r"\s*(\d+)~(\d+)\s*", part):
            first, last = int(span[1]), int(span[2])
            step = 1 if last >= first else -1
            values += [str(number).zfill(len(span[1])) for number in range(first, last + step, step)]
        else:
            value, _, times = part.strip().partition("*")
            values += [value] * int(times or 1)
    return values


def names_of(text: str) -> list[str]:
    """Return the names that a list such as `a-[1~3].png,b.png` stands for."""
    names = []
    for part in _split(text):
        bracket = re.search(r"\[([^\]]*)\]", part)
        names += [part.replace(bracket[0], value) for value in _list(bracket[1])] if bracket else [part]
    return names


def timed(text: str, default_ms: int = DEFAULT_MS) -> list[tuple[str, int]]:
    """Return names and durations in milliseconds of `a-[1~2].png:[100,50],b.png:75`.

    Raises:
        ValueError: as many durations as names are needed, or one for all.
    """
    found = []
    for part in _split(text):
        name, _, duration = part.partition(":")
        names = names_of(name)
        durations = [int(value) for value in _list(duration.strip("[]"))] if duration else [default_ms]
        if len(durations) not in (1, len(names)):
            raise ValueError(f"{part}: {len(names)} pictures and {len(durations)} durations")
        found += zip(names, durations * (len(names) if len(durations) == 1 else 1), strict=True)
    return found


def _flat(node: Node) -> Node:
    """The animation in which every [if] is replaced by what stands in it, and every [else] left out."""
    flat = Node(dict(node.keys))
    for tag, child in node.children:
        if tag == "if":
            inside = _flat(child)
            flat.keys |= inside.keys
            flat.children += inside.children
        elif tag not in ("else", "elseif"):
            flat.children.append((tag, child))
    return flat


def animation_of(node: Node, unit: str, attack: str, kind: str) -> Animation:
    """Return what an [attack_anim] shows and plays.

    Raises:
        ValueError: it cannot be read, has no sprites or no sounds.
    """
    node = _flat(node)
    sprites, sounds = [], []
    for tag in dict.fromkeys(name for name, _ in node.children if name.endswith("frame")):
        clock = int(node.keys.get(tag.removesuffix("frame") + "start_time", node.keys.get("start_time", "0")))
        for frame in node.all(tag):
            if "sound" in frame.keys:
                sounds.append((tuple(names_of(frame.keys["sound"])), clock))
            length = int(frame.keys.get("duration", DEFAULT_MS))
            pictures = timed(frame.keys["image"], length) if "image" in frame.keys else [("", length)]
            for name, duration in pictures:
                if tag == "frame" and name:
                    sprites.append((name, clock, clock + duration))
                clock += duration
    if not sprites or not sounds:
        raise ValueError("no sprites" if not sprites else "no sounds")
    return Animation(unit, attack, kind, tuple(sprites), tuple(sounds))


def read_animations(core: Path) -> tuple[list[Animation], dict[str, int]]:
    """Return the attack animations of the unit files below `core`/units, and what was left out, counted by reason.

    Args:
        core: folder `data/core` of the game, which holds units, macros, images and sounds.
    """
    macros = read_macros([path.read_text(encoding="utf-8") for path in sorted(core.glob("macros/*.cfg"))])
    animations: list[Animation] = []
    skipped: Counter[str] = Counter()
    for path in sorted(core.glob("units/**/*.cfg")):
        text = path.read_text(encoding="utf-8")
        try:
            own = macros | read_macros([text])
            root = parse(expand(_COMMENT.sub("", _DEFINE.sub("", text)), own))
        except ValueError:
            skipped["file cannot be read"] += 1
            continue
        for unit in root.all("unit_type"):
            kinds = {a.keys.get("name", ""): a.keys.get("type", "") for a in unit.all("attack")}
            for node in unit.all("attack_anim"):
                names = [name.strip() for f in node.all("filter_attack") for name in f.keys.get("name", "").split(",")]
                attack = next((name for name in names if kinds.get(name)), None)
                if attack is None:
                    skipped["attack is not known"] += 1
                    continue
                try:
                    animation = animation_of(node, unit.keys.get("id", path.stem), attack, kinds[attack])
                except ValueError as problem:
                    reason = str(problem)
                    skipped[reason if reason.startswith("no ") else "times cannot be read"] += 1
                    continue
                pictures = all((core / "images" / name.split("~")[0]).is_file() for name, _, _ in animation.sprites)
                files = all((core / "sounds" / name).is_file() for choice, _ in animation.sounds for name in choice)
                if pictures and files:
                    animations.append(animation)
                else:
                    skipped["file is missing"] += 1
    return animations, dict(skipped)
