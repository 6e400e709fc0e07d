"""The shipped configs: where they are, and the `list` verb that shows them. Standard library only, to stay instant."""

from __future__ import annotations

import sys
from pathlib import Path

LAYER_MARK = "Layer:"


def configs_dir() -> Path:
    """The folder of shipped configs: inside the package when installed from a wheel, beside it in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def describe(path: Path) -> str:
    """The first comment line of a config, without its '#'; empty if there is none. Reads only the head of the file."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("#"):
                return line.lstrip("#").strip()
            if line.strip():
                return ""
    return ""


def table(folder: Path) -> str:
    """Two groups of aligned lines, one line a config: runs first, then the layers that go on top of a run."""
    entries = [(path.stem, describe(path)) for path in sorted(folder.glob("*.yaml"))]
    if not entries:
        return f"no configs in {folder}"
    runs = [(name, text) for name, text in entries if not text.startswith(LAYER_MARK)]
    layers = [(name, text.removeprefix(LAYER_MARK).strip()) for name, text in entries if text.startswith(LAYER_MARK)]
    width = max(len(name) for name, _ in entries)
    groups = []
    for title, group in (
        ("Runs, for `python -m mmtrain fit -c NAME`:", runs),
        ("Layers, for a further `-c NAME` after a run (base is always there):", layers),
    ):
        if group:
            groups.append("\n".join([title, *(f"  {name:<{width}}  {text}".rstrip() for name, text in group)]))
    return "\n\n".join(groups)


def main(argv: list[str]) -> int:
    """`python -m mmtrain list [FOLDER]`: print the shipped configs, or those of another folder."""
    if any(arg.startswith("-") for arg in argv) or len(argv) > 1:
        print("usage: python -m mmtrain list [FOLDER]", file=sys.stderr)
        return 0 if argv[0] in ("-h", "--help") else 2
    print(table(Path(argv[0]) if argv else configs_dir()))
    return 0
