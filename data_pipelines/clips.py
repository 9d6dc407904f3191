"""Clips and images on disk to arrays, and back, by PyAV, which gives each frame's time and the pixels' aspect.

Pixels here are uint8 "T H W 3"; `to_unit` and `to_bytes` go to and from the models' [-1, 1].
"""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image, ImageOps

from configs.errors import RequestError
from data_pipelines import hdr
from data_pipelines.frame_times import EARLIER, FrameTimes
from omnitransfer_jax.folders.atomic import write_whole

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP")
WIDEST = 4  # longer side of a picture over the shorter one
# PyAV before 19 raises for a tag that is not UTF-8, unless it is asked to replace what it cannot read; PyAV 19 never raises for one.
REPLACE_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def read_clip(
    path: str | Path, *, frames: int, fps: float, height: int, width: int, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """`frames` frames at `fps` from `start` seconds on, scaled to cover `height` x `width` and cropped to its centre: uint8 "T H W 3".

    Each frame is the one on the screen at its time; none is taken from `end` seconds on. Both count from the container's zero, as a
    player's clock does, and the first frame is the earliest that is read. A clip that is missing, broken, without video or
    too short is a `RequestError` that begins with its path.
    """
    wanted = [Fraction(i) / Fraction(fps).limit_denominator(10**6) for i in range(frames)]
    picked: list[np.ndarray] = []
    try:
        # A clip may name other files or addresses to play; nothing but the file itself is opened.
        with av.open(str(path), options={"protocol_whitelist": "file"}, **REPLACE_TAGS) as container:
            stream = _video_stream(container, path)
            aspect = stream.sample_aspect_ratio or Fraction(1)
            times, previous = FrameTimes(container, stream, path), None
            for frame in container.decode(stream):
                _check_frame(frame, path)
                now = times.of(frame)
                if previous is None:
                    wanted = _stretch(wanted, times, start, end)
                while previous is not None and len(picked) < len(wanted) and wanted[len(picked)] < now - EARLIER:
                    picked.append(_pixels(previous, aspect, height, width))
                if len(picked) == len(wanted):
                    break
                previous = frame
            while previous is not None and len(picked) < len(wanted) and wanted[len(picked)] < times.until - EARLIER:
                picked.append(_pixels(previous, aspect, height, width))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except FFmpegError as error:
        raise RequestError(f"{path}: cannot be decoded ({error.strerror}); give an undamaged video file") from None
    if len(picked) < frames:
        span = f"from {start:g} s" + ("" if end is None else f" to {end:g} s")
        raise RequestError(f"{path}: {len(picked)} frames at {fps:g} fps {span}, {frames} needed; take a longer clip or fewer frames")
    return np.stack(picked)


def _video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    """The video stream that a player takes, set up to be decoded; a cover picture is none."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
        raise RequestError(f"{path}: no video stream; give a clip that has one")
    if stream.codec_context is None:
        raise RequestError(f"{path}: cannot be decoded (its codec is unknown); give an H.264 mp4")
    stream.thread_type = "SLICE"  # frame threads hide damage and dead-lock with fork
    stream.codec_context.thread_count = 1
    return stream


def _check_frame(frame: av.VideoFrame, path: str | Path) -> None:
    if frame.is_corrupt:  # the decoder filled in what it could not read
        raise RequestError(f"{path}: cannot be decoded (a damaged picture); give an undamaged video file")


def _stretch(steps: list[Fraction], times: FrameTimes, start: float, end: float | None) -> list[Fraction]:
    """The times, after the first frame, at `steps` from `start` on and before `end`, both counted from the container's zero."""
    begin = max(times.offset, Fraction(start).limit_denominator(10**6))
    steps = [step for step in steps if end is None or begin + step < Fraction(end) - EARLIER]
    after = begin - times.offset
    return [after + step + (times.slack if times.offset and after else 0) for step in steps]


def _pixels(frame: av.VideoFrame, aspect: Fraction, height: int, width: int) -> np.ndarray:
    """The frame as a player displays it (pixels of `aspect` made square, upright), scaled to cover height x width and centre-cropped."""
    turned, flip_rows, flip_columns = _orientation(frame)
    across, down = frame.width * float(aspect), float(frame.height)
    need_across, need_down = (height, width) if turned else (width, height)
    scale = max(need_across / across, need_down / down)
    size = max(need_across, round(across * scale)), max(need_down, round(down * scale))
    pixels = "rgb48le" if hdr.is_hdr(frame) else "rgb24"
    picture = frame.reformat(width=size[0], height=size[1], format=pixels, interpolation="BICUBIC").to_ndarray()
    picture = hdr.to_bt709(picture, frame.color_trc) if hdr.is_hdr(frame) else picture
    picture = picture.swapaxes(0, 1) if turned else picture
    picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How the frame is turned upright: whether rows and columns are swapped, then rows reversed, then columns reversed.

    Its display matrix takes a place (x, y) to (a x + c y, b x + d y). Like ffmpeg, one that takes all places to a line is passed over.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), "<i4")[:5].tolist()
    if a * d == b * c:
        return False, False, False
    turned = abs(a) + abs(d) < abs(b) + abs(c)
    return (True, b < 0, c < 0) if turned else (False, d < 0, a < 0)


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 "H W 3", turned upright as its EXIF tag says; transparent pixels are white, 16 bits are scaled to 8."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > WIDEST * min(image.size):
                size = f"{image.width} x {image.height} pixels"
                raise RequestError(f"{path}: {size}: its sides differ by more than {WIDEST} times; cut it to 1:{WIDEST} or less")
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not an image that can be read ({error}); give a PNG, JPEG, WebP, AVIF, TIFF or BMP") from None


def _to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """uint8 "H W 3" of a picture of any mode."""
    if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise RequestError(f"{path}: numbers without a known range (mode {image.mode}); save it with 8 or 16 bits a channel")
        return np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        print(f"{path}: its transparent pixels are taken as white", flush=True)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture, uint8 "H W 3", in the size of a clip: scaled and cropped as `read_clip` does it."""
    return _pixels(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), Fraction(1), height, width)


def write_clip(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes uint8 "T H W 3" (even height and width) as an H.264 mp4 that every player opens; the file is there whole or not at all."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_bytes(video: np.ndarray) -> np.ndarray:
    """float -1..1 -> uint8 0..255, rounded and clipped."""
    return np.clip(np.rint((np.asarray(video, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
