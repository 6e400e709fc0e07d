"""Contact sheets: pictures in a grid, each with its text below; and pictures written whole or not at all."""

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTHS = (224, 384)  # of a picture in a sheet: smaller ones are enlarged by whole numbers, larger ones are reduced
FONT_SIZE, LINE, GAP = 13, 17, 8  # pixels
MOST_LINES = 7  # of a title
INK, PAPER = "#202020", "#FFFFFF"


def contact_sheet(path: Path | str, pictures: Tensor, titles: Sequence[str], columns: int = 4) -> Path:
    """Write pictures row by row as one PNG; returns its path.

    Args:
        path: to write; its folder is made.
        pictures: uint8 [n, 3, H, W].
        titles: one below each picture, wrapped; line breaks in them are kept.
        columns: of the grid, at most; no more than there are pictures.

    Raises:
        ValueError: no picture, no column, or not as many titles.
    """
    if not len(pictures) or columns < 1 or len(titles) != len(pictures):
        raise ValueError(f"contact_sheet: {len(pictures)} pictures, {len(titles)} titles, {columns} columns")
    cells = [_shown(picture) for picture in pictures]
    width, height = cells[0].size
    columns = min(columns, len(cells))
    texts = [wrapped(title, width) for title in titles]
    # each row only as high as its longest title
    rows = [range(first, min(first + columns, len(cells))) for first in range(0, len(cells), columns)]
    heights = [height + GAP // 2 + LINE * max(len(texts[i]) for i in row) + GAP for row in rows]
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = GAP
    for row, row_height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = GAP + place * (width + GAP)
            sheet.paste(cells[i], (left, top))
            for number, line in enumerate(texts[i]):
                pen.text((left, top + height + GAP // 2 + number * LINE), line, fill=INK, font=_font())
        top += row_height
    return save_picture(Path(path), sheet)


def to_image(picture: Tensor) -> Image.Image:
    """uint8 [3, H, W] as an image."""
    return Image.fromarray(picture.cpu().movedim(0, -1).contiguous().numpy())


def save_picture(path: Path, image: Image.Image, **options: Any) -> Path:
    """Write an image beside its name, then rename it, so that what has the name is whole; returns the path.

    Args:
        path: PNG or JPG; its folder is made.
        options: of Pillow's `save`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, format="JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG", **options)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def wrapped(text: str, width: int) -> list[str]:
    """Lines of a text that are at most `width` pixels wide; of a long text the beginning."""
    font, lines = _font(), []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:  # no blank to break at
                fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width))
                lines += [line] * bool(line) + [word[:fits]]
                line, word = "", word[fits:]
            joined = f"{line} {word}".strip()
            if font.getlength(joined) > width:
                lines.append(line)
                joined = word
            line = joined
        lines.append(line)
    return lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]


def _shown(picture: Tensor) -> Image.Image:
    image = to_image(picture)
    least, most = WIDTHS
    if image.width < least:
        factor = math.ceil(least / image.width)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if image.width > most:
        return image.resize((most, max(round(image.height * most / image.width), 1)), Image.Resampling.LANCZOS)
    return image


@cache
def _font() -> Any:
    """Matplotlib's, as it has the letters of most languages; Pillow's own has only those of English."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), FONT_SIZE)
