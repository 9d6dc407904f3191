"""Decoded frames as a player displays them: RGB of BT.709, opaque, upright, with square pixels."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from configs.errors import RequestError, require
from data_pipelines import hdr
from data_pipelines.streams import side_data

WIDEST = 4  # longer side of a picture over the shorter one
UNSPECIFIED, BT2020 = 2, 9  # ITU-T H.273, matrix coefficients
LIMITED = 1  # AVCOL_RANGE_MPEG
# The matrices that libswscale knows, and the reserved 3, which says nothing: it would read others as BT.601 without a word.
MATRICES = {0, 1, UNSPECIFIED, 3, 4, 5, 6, 7, BT2020}
# Transfers whose signal is not near that of a display: linear light, logarithmic ones, and the XYZ of cinemas.
OTHER_TRANSFERS = {8: "linear light", 9: "a logarithm", 10: "a logarithm", 17: "SMPTE 428"}
# How a frame is turned by so many quarters to the left: rows and columns swapped, rows reversed, columns reversed.
QUARTERS = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))


class Seen(NamedTuple):
    """A frame and how it is turned upright, as `orientation` says it."""

    frame: av.VideoFrame
    turn: tuple[bool, bool, bool]


class Screen:
    """Where the frames of one clip or picture are shown; `path` is for messages.

    Transparent pixels are white, which is said once. HDR frames are tone-mapped by the peak that the first one states.
    """

    def __init__(self, path: str | Path, aspect: Fraction, height: int, width: int, letterbox: bool = False) -> None:
        """`aspect` is that of a pixel, width over height. With `letterbox` frames are shown whole, between black bars."""
        self._path, self._aspect, self._size, self._letterbox = path, float(aspect), (height, width), letterbox
        self._turn = QUARTERS[0]
        self._peak: float | None = None
        self._said = False
        self._scaler = VideoReformatter()  # its tables are made once for all frames

    def see(self, frame: av.VideoFrame) -> Seen:
        """Takes the next frame of the clip, shown or not; refuses one that would be shown wrong."""
        # The decoder filled in what it could not read.
        require(not frame.is_corrupt, f"{self._path}: cannot be decoded (a damaged picture); give an undamaged video file")
        require_aspect(self._path, round(frame.width * self._aspect), frame.height)
        check_colours(frame, self._path)
        self._turn = orientation(frame) or self._turn  # H.264 states it once for many frames
        if hdr.is_hdr(frame) and self._peak is None:
            self._peak = hdr.peak(frame)
        return Seen(frame, self._turn)

    def picture(self, seen: Seen) -> np.ndarray:
        """The frame scaled to cover the screen and cut at its centre, or between black bars: uint8 "H W 3"."""
        frame, (turned, flip_rows, flip_columns) = seen
        height, width = self._size
        across, down = frame.width * self._aspect, float(frame.height)
        need_across, need_down = (height, width) if turned else (width, height)
        if self._letterbox:
            scale = min(need_across / across, need_down / down)
            size = max(1, int(across * scale + 1e-6)), max(1, int(down * scale + 1e-6))
        else:
            scale = max(need_across / across, need_down / down)
            size = max(need_across, round(across * scale)), max(need_down, round(down * scale))
        picture = self._rgb(frame, *size)
        picture = picture.swapaxes(0, 1) if turned else picture
        picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        if self._letterbox:
            above, before = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
            room = (above, height - picture.shape[0] - above), (before, width - picture.shape[1] - before)
            return np.pad(picture, (*room, (0, 0)))
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        return picture[top : top + height, left : left + width]

    def _rgb(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """The frame in this size, not turned yet: uint8 "H W 3"."""
        if has_alpha(frame):
            rgba = self._converted(frame, frame.width, frame.height, alpha=True)
            if rgba[..., 3].min() < 255:
                if not self._said:
                    print(f"{self._path}: its transparent pixels are taken as white", flush=True)
                    self._said = True
                # Before it is scaled: what lies under transparent pixels would else be mixed into their neighbours.
                frame = av.VideoFrame.from_ndarray(on_white(rgba), format="rgb24")
        return self._converted(frame, width, height)

    def _converted(self, frame: av.VideoFrame, width: int, height: int, alpha: bool = False) -> np.ndarray:
        """uint8 "H W 3" of BT.709, "H W 4" with `alpha`."""
        is_hdr = hdr.is_hdr(frame)
        layout = ("rgba64le" if alpha else "rgb48le") if is_hdr else "rgba" if alpha else "rgb24"
        matrix = Colorspace.BT2020 if is_hdr and frame.colorspace == UNSPECIFIED else None
        pixels = self._scaler.reformat(frame, width, height, layout, src_colorspace=matrix, interpolation="BICUBIC").to_ndarray()
        colours = pixels[..., :3]
        if frame.color_range == LIMITED and frame.format.name.startswith(("gray", "ya")):  # libswscale takes grey for full range
            colours = full_range(colours)
        if is_hdr:
            colours = hdr.to_bt709(colours, frame.color_trc, self._peak or hdr.PEAK)
        return np.dstack([colours, pixels[..., 3] // (257 if is_hdr else 1)]).astype(np.uint8) if alpha else colours


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool] | None:
    """How the frame is turned upright: whether rows and columns are swapped, then rows reversed, then columns reversed; None if unsaid.

    Its display matrix takes a place (x, y) to (a x + c y, b x + d y). Like ffmpeg, one that takes all places to a line is passed over.
    """
    matrix = side_data(frame, "DISPLAYMATRIX")
    if matrix is None:
        return QUARTERS[round(frame.rotation / 90) % 4] if frame.rotation else None
    a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
    if a * d == b * c:
        return None
    turned = abs(a) + abs(d) < abs(b) + abs(c)
    return (True, b < 0, c < 0) if turned else (False, d < 0, a < 0)


def require_aspect(path: str | Path, width: int, height: int) -> None:
    if max(width, height) > WIDEST * min(width, height):
        size = f"{width} x {height} pixels"
        raise RequestError(f"{path}: {size}: its sides differ by more than {WIDEST} times; cut it to 1:{WIDEST} or less")


def check_colours(frame: av.VideoFrame, path: str | Path) -> None:
    """Refuses what would be shown in wrong colours."""
    remedy = "convert it: ffmpeg -i CLIP -vf zscale=m=709:t=709:p=709,format=yuv420p NEW.mp4"
    require(frame.colorspace in MATRICES, f"{path}: colours by matrix {frame.colorspace} (ITU-T H.273), which is not read; {remedy}")
    other = OTHER_TRANSFERS.get(frame.color_trc)
    require(other is None, f"{path}: transfer {frame.color_trc} (ITU-T H.273), {other}, which is not read; {remedy}")


def has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 "H W 4" over a white ground: uint8 "H W 3"."""
    share = rgba[..., 3:].astype(np.float32) / 255
    return np.rint(255 + share * (rgba[..., :3].astype(np.float32) - 255)).astype(np.uint8)


def full_range(pixels: np.ndarray) -> np.ndarray:
    """Numbers of the limited range, 16 to 235 of 255, in the whole range of their type."""
    top = np.iinfo(pixels.dtype).max
    return np.clip(np.rint((pixels.astype(np.float32) - 16 / 255 * top) * (255 / 219)), 0, top).astype(pixels.dtype)
