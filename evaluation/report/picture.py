"""One moving picture of a few transfers side by side, for places that display an image but no page, such as a README."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, TEXT = 144, 12, 30  # in pixels: the height and width of a clip, the gap between clips, the height of a line of text
PAPER, INK = (255, 255, 255), (40, 44, 52)
HOLD = 4  # for how many frames the last one stays, as on the page


class Column(NamedTuple):
    """One transfer: its title and its clips from top to bottom."""

    title: str
    clips: tuple[UInt8[np.ndarray, "T H W 3"], ...]


def write(columns: Sequence[Column], rows: Sequence[str], path: Path, fps: float) -> None:
    """Writes an endless animated WebP. Every column has one clip for each name in `rows`, and all clips have the same length."""
    frames = [drawn(columns, rows, t) for t in range(len(columns[0].clips[0]))]
    path.parent.mkdir(parents=True, exist_ok=True)
    period = round(1000 / fps)
    durations = [*[period] * (len(frames) - 1), period * (1 + HOLD)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=90, method=6)


def drawn(columns: Sequence[Column], rows: Sequence[str], frame: int) -> Image.Image:
    """The picture at one frame."""
    font = ImageFont.load_default(size=17)
    margin = GAP + max(round(font.getlength(name)) for name in rows) + GAP
    page = Image.new("RGB", (margin + len(columns) * (SIDE + GAP), TEXT + len(rows) * (SIDE + GAP)), PAPER)
    pen = ImageDraw.Draw(page)
    for j, column in enumerate(columns):
        left = margin + j * (SIDE + GAP)
        pen.text((left + SIDE / 2, TEXT / 2), column.title, INK, font, anchor="mm")
        for i, clip in enumerate(column.clips):
            top = TEXT + i * (SIDE + GAP)
            page.paste(Image.fromarray(clip[frame]).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, top))
    for i, name in enumerate(rows):
        pen.text((margin - GAP, TEXT + i * (SIDE + GAP) + SIDE / 2), name, INK, font, anchor="rm")
    return page
