"""The picture of a training's samples: a row a prompt, beside each other what was given and what was made, moving.

WORKDIR/samples/step_000500.webp          the grid, small and of at most `FRAMES` frames
WORKDIR/samples/step_000500/1_motion.mp4  each sample as it was made
WORKDIR/samples/base.npz                  the small clips of before the first step, which every later grid shows
"""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from omnitransfer_jax.folders.atomic import write_whole

FRAMES, HEIGHT, LEAST = 25, 144, 96  # frames and rows of a small clip, at most; rows that are too few to see
GAP, TEXT, SIZE = 8, 22, 14  # pixels between clips, of a line of text, of its letters
PAPER, INK, FAINT = (255, 255, 255), (40, 44, 52), (238, 238, 238)
BASE_FILE = "base.npz"

Clip = UInt8[np.ndarray, "T H W 3"]


class Row(NamedTuple):
    """One prompt."""

    title: str
    clips: tuple[Clip | None, ...]
    """Small clips of as many frames, or one for a still; None where there is none."""


def small(clip: Clip, fps: float, seconds: Sequence[float]) -> Clip:
    """The frames of a clip at these times, scaled down to `HEIGHT`; tiny ones are enlarged, each pixel to a square."""
    picked = [clip[min(round(second * fps), len(clip) - 1)] for second in seconds]
    height, width = clip.shape[1:3]
    if height <= HEIGHT:
        times = max(1, LEAST // height)
        return np.stack(picked).repeat(times, axis=1).repeat(times, axis=2)
    size = (max(1, round(width * HEIGHT / height)), HEIGHT)
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)) for picture in picked])


def times(frames: int, fps: float) -> list[float]:
    """The seconds of the frames that a small clip shows of one of so many frames."""
    return [i / fps for i in np.linspace(0, frames - 1, min(frames, FRAMES)).round().astype(int).tolist()]


def write(path: Path, columns: Sequence[str], rows: Sequence[Row], seconds: Sequence[float]) -> bytes:
    """Writes the grid as a WebP that moves; its middle frame as a JPEG, for where nothing moves."""
    frames = [drawn(columns, rows, t) for t in range(len(seconds))]
    period = round(1000 * seconds[-1] / max(len(seconds) - 1, 1)) or 100
    moving, still = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "webp", save_all=True, append_images=frames[1:], duration=period, loop=0, quality=85, method=2)
    frames[len(frames) // 2].save(still, "jpeg", quality=90)
    write_whole(path, moving.getvalue())
    return still.getvalue()


def drawn(columns: Sequence[str], rows: Sequence[Row], t: int) -> Image.Image:
    """The grid at frame `t`."""
    font = ImageFont.load_default(size=SIZE)
    shown = [[None if clip is None else clip[min(t, len(clip) - 1)] for clip in row.clips] for row in rows]
    least = max(round(font.getlength(name)) for name in columns)
    widths = [max([least, *(cell.shape[1] for row in shown if (cell := row[j]) is not None)]) for j in range(len(columns))]
    heights = [max([TEXT, *(cell.shape[0] for cell in row if cell is not None)]) for row in shown]
    page = Image.new("RGB", (GAP + sum(widths) + GAP * len(widths), GAP + TEXT + sum(heights) + (GAP + TEXT) * len(rows)), PAPER)
    pen, lefts = ImageDraw.Draw(page), [GAP + sum(widths[:j]) + GAP * j for j in range(len(widths))]
    for left, name in zip(lefts, columns, strict=True):
        pen.text((left, GAP), name, INK, font)
    top = GAP + TEXT
    for row, cells, height in zip(rows, shown, heights, strict=True):
        pen.text((GAP, top), fitting(row.title, page.width - 2 * GAP, font), INK, font)
        for left, width, cell in zip(lefts, widths, cells, strict=True):
            if cell is None:
                pen.rectangle((left, top + TEXT, left + width - 1, top + TEXT + height - 1), FAINT)
            else:
                page.paste(Image.fromarray(cell), (left, top + TEXT))
        top += TEXT + height + GAP
    return page


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """One line of text, cut where it would be longer than `width` pixels."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[: min(len(text) - 2, int(len(text) * width / font.getlength(text)))].rstrip() + "…" if len(text) > 2 else ""
    return text


def write_base(folder: Path, base: Mapping[str, Clip]) -> None:
    """Keeps the small clips of before the first step, by what was asked for."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **base)
    write_whole(folder / BASE_FILE, content.getvalue())


def read_base(folder: Path) -> dict[str, Clip]:
    """Those that are kept; none if the file is absent or damaged, for a grid is worth no stop."""
    try:
        with np.load(io.BytesIO((folder / BASE_FILE).read_bytes()), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return {}
