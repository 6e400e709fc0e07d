"""Pictures inside a page: shrunk so that all of them together keep within a number of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SHRINKING = [(900, 256), (720, 128), (560, 64), (420, 64), (300, 32), (200, 16)]  # (widest side in px, colours)
SMALLEST_SHARE = 6_000  # bytes; below it a picture shows nothing, so that fewer are shown instead
LARGEST_SHARE = 90_000  # bytes; more is not seen at the size of a page


def embed(files: Sequence[Path], room: int) -> list[str | None]:
    """Return each picture as a `data:` address, None for one that cannot be read or has no room left.

    The rule: every picture has the same share of the room, between 6 and 90 kB; it is made smaller and given fewer
    colours until it fits that share. Where there are more pictures than shares of 6 kB the last ones are left out.

    Args:
        files: the most important first.
        room: bytes of all addresses together; they are a third longer than the PNG files in them.
    """
    share = min(max(room // max(len(files), 1), SMALLEST_SHARE), LARGEST_SHARE)
    addresses: list[str | None] = []
    for file in files:
        address = _address(file, share) if room >= SMALLEST_SHARE else None
        if address and len(address) > room:
            address = None
        room -= len(address or "")
        addresses.append(address)
    return addresses


def _address(file: Path, share: int) -> str | None:
    """The picture at the first size that fits the share, or at the smallest; None if it is no picture."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    background = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(background, picture).convert("RGB")
    for side, colours in SHRINKING:
        address = _png_address(flat, side, colours)
        if len(address) <= share:
            break
    return address


def _png_address(picture: Image.Image, side: int, colours: int) -> str:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.quantize(colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
