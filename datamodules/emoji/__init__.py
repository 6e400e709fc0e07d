"""Embedded emoji image-text set: the same concepts drawn by four vendors, split by concept and by drawing style."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

VENDORS = ("noto", "twemoji", "fluent", "openmoji")
SPLITS = {"all": ("seen", "unseen"), "seen": ("seen",), "unseen": ("unseen",)}


def shards(vendors: Sequence[str] = VENDORS, concepts: Literal["all", "seen", "unseen"] = "all") -> list[str]:
    """Paths of the embedded shard files of these vendors, in the order given.

    >>> [Path(path).name for path in shards(["fluent"], "unseen")]
    ['fluent-unseen-00000.tar.gz']
    """
    if isinstance(vendors, str):
        raise ValueError(f"vendors: expected a list of names, got the string {vendors!r}; write [{vendors}]")
    unknown = [vendor for vendor in vendors if vendor not in VENDORS]
    if unknown:
        raise ValueError(f"vendors: unknown {', '.join(map(repr, unknown))}; allowed: {', '.join(VENDORS)}")
    if concepts not in SPLITS:
        raise ValueError(f"concepts: unknown {concepts!r}; allowed: {', '.join(SPLITS)}")
    folder = Path(__file__).parent
    patterns = [f"{vendor}-{split}-*.tar.gz" for vendor in vendors for split in SPLITS[concepts]]
    return [str(path) for pattern in patterns for path in sorted(folder.glob(pattern))]
