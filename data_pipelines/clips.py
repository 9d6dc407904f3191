"""Clips and images on disk to arrays, and back, by PyAV, which gives each frame's time and the pixels' aspect.

Pixels here are uint8 "T H W 3"; `to_unit` and `to_bytes` go to and from the models' [-1, 1].
"""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image, ImageOps

from configs.errors import RequestError
from data_pipelines import hdr
from data_pipelines.frame_times import EARLIER, FrameTimes
from omnitransfer_jax.folders.atomic import write_whole

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP")
MOST_FRAMES = 100_000  # of a clip that is read whole: over an hour at 24 fps
WIDEST = 4  # longer side of a picture over the shorter one
# PyAV before 19 raises for a tag that is not UTF-8, unless it is asked to replace what it cannot read; PyAV 19 never raises for one.
REPLACE_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def read_clip(
    path: str | Path,
    *,
    frames: int | None,
    fps: float,
    height: int,
    width: int,
    start: float = 0.0,
    end: float | None = None,
    letterbox: bool = False,
) -> np.ndarray:
    """`frames` frames at `fps` from `start` seconds on, scaled to cover `height` x `width` and cropped to its centre: uint8 "T H W 3".

    With `frames=None` they are all that the clip has. With `letterbox` they are scaled to fit inside, and what is left is black.

    Each frame is the one on the screen at its time; none is taken from `end` seconds on. Both count from the container's zero, as a
    player's clock does, and the first frame is the earliest that is read. A clip that is missing, broken, without video or
    too short is a `RequestError` that begins with its path.
    """
    wanted = [Fraction(i) / Fraction(fps).limit_denominator(10**6) for i in range(MOST_FRAMES if frames is None else frames)]
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
                    picked.append(_pixels(previous, aspect, height, width, letterbox))
                if len(picked) == len(wanted):
                    break
                previous = frame
            while previous is not None and len(picked) < len(wanted) and wanted[len(picked)] < times.until - EARLIER:
                picked.append(_pixels(previous, aspect, height, width, letterbox))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except FFmpegError as error:
        raise RequestError(f"{path}: cannot be decoded ({error.strerror}); give an undamaged video file") from None
    if len(picked) < (frames or 1):
        span = f"from {start:g} s" + ("" if end is None else f" to {end:g} s")
        raise RequestError(f"{path}: {len(picked)} frames at {fps:g} fps {span}, {frames or 1} needed; take a longer clip or fewer frames")
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


def _pixels(frame: av.VideoFrame, aspect: Fraction, height: int, width: int, letterbox: bool = False) -> np.ndarray:
    """The frame as a player displays it (pixels of `aspect` made square, upright), scaled to cover height x width and centre-cropped.

    With `letterbox` it is scaled to fit inside, and what is left is black.
    """
    turned, flip_rows, flip_columns = _orientation(frame)
    across, down = frame.width * float(aspect), float(frame.height)
    need_across, need_down = (height, width) if turned else (width, height)
    if letterbox:
        scale = min(need_across / across, need_down / down)
        size = max(1, int(across * scale + 1e-6)), max(1, int(down * scale + 1e-6))
    else:
        scale = max(need_across / across, need_down / down)
        size = max(need_across, round(across * scale)), max(need_down, round(down * scale))
    pixels = "rgb48le" if hdr.is_hdr(frame) else "rgb24"
    picture = frame.reformat(width=size[0], height=size[1], format=pixels, interpolation="BICUBIC").to_ndarray()
    picture = hdr.to_bt709(picture, frame.color_trc) if hdr.is_hdr(frame) else picture
    picture = picture.swapaxes(0, 1) if turned else picture
    picture = picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    if letterbox:
        above, before = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        room = (above, height - picture.shape[0] - above), (before, width - picture.shape[1] - before)
        return np.pad(picture, (*room, (0, 0)))
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


def fit(image: np.ndarray, height: int, width: int, letterbox: bool = False) -> np.ndarray:
    """A picture, uint8 "H W 3", in the size of a clip: scaled and cropped, or with `letterbox` framed, as `read_clip` does it."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return _pixels(frame, Fraction(1), height, width, letterbox)


def without_letterbox(video: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The part of "T H W 3" in which a picture of height and width `shape` lies after `fit` with `letterbox`; even height and width."""
    _, height, width, _ = video.shape
    scale = min(height / shape[0], width / shape[1])
    down, across = (max(2, int(side * scale + 1e-6)) // 2 * 2 for side in shape)
    top, left = (height - down) // 2, (width - across) // 2
    return video[:, top : top + down, left : left + across]


def write_clip(path: str | Path, video: np.ndarray, fps: float, sound_of: str | Path | None = None) -> None:
    """Writes uint8 "T H W 3" (even height and width) as an H.264 mp4 that every player opens; the file is there whole or not at all.

    It has the sound of the clip `sound_of`, if that has any, up to its own end.
    """
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        sound = None if sound_of is None or not has_sound(sound_of) else container.add_stream("aac", rate=48_000)
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
        if sound is not None:
            _copy_sound(sound_of, sound, container, round(len(video) / fps * sound.rate))
    write_whole(path, content.getvalue())


def has_sound(path: str | Path) -> bool:
    """Whether a clip has an audio stream."""
    with av.open(str(path), options={"protocol_whitelist": "file"}, **REPLACE_TAGS) as source:
        return bool(source.streams.audio)


def _copy_sound(path: str | Path, stream: av.AudioStream, output: OutputContainer, samples: int) -> None:
    """Encodes the first `samples` of the sound of a clip into `stream`."""
    resampler, done = av.AudioResampler(format="fltp", layout="stereo", rate=stream.rate), 0
    with av.open(str(path), options={"protocol_whitelist": "file"}, **REPLACE_TAGS) as source:
        pieces = (piece.to_ndarray() for frame in source.decode(audio=0) for piece in resampler.resample(frame))
        while done < samples and (piece := next(pieces, None)) is not None:
            piece = np.ascontiguousarray(piece[:, : samples - done])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = stream.rate, done
            output.mux(stream.encode(frame))
            done += piece.shape[1]
    output.mux(stream.encode())


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 -1..1."""
    return pixels.astype(np.float32) / 127.5 - 1


def to_bytes(video: np.ndarray) -> np.ndarray:
    """float -1..1 -> uint8 0..255, rounded and clipped."""
    return np.clip(np.rint((np.asarray(video, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
