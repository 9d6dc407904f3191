"""Clips and images on disk to arrays, and back, by PyAV, which gives each frame's time and the pixels' aspect.

Pixels here are uint8 "T H W 3"; `to_unit` and `to_bytes` go to and from the models' [-1, 1].
"""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from PIL import Image, ImageOps

from configs.errors import RequestError, require
from data_pipelines import streams
from data_pipelines.display import Screen, on_white, require_aspect
from data_pipelines.frame_times import EARLIER, FrameTimes
from omnitransfer_jax.folders.atomic import write_whole

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
H264 = {"crf": "15", "x264-params": "mbtree=0"}  # the macroblock tree reads memory that is not set: now and then other bytes
MOST_FRAMES = 100_000  # of a clip that is read whole: over an hour at 24 fps


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
    picked = Pictures(frames, height, width)
    try:
        with streams.open_clip(path) as container:
            stream = streams.video_stream(container, path)
            screen = Screen(path, stream.sample_aspect_ratio or Fraction(1), height, width, letterbox)
            times, previous = FrameTimes(container, stream, path), None
            for frame in streams.decode(container, stream, path):
                seen, now = screen.see(frame), times.of(frame)
                if previous is None:
                    wanted = _stretch(wanted, times, start, end)
                while previous is not None and len(picked) < len(wanted) and wanted[len(picked)] < now - EARLIER:
                    picked.add(screen.picture(previous))
                if len(picked) == len(wanted):
                    break
                previous = seen
            while previous is not None and len(picked) < len(wanted) and wanted[len(picked)] < times.until - EARLIER:
                picked.add(screen.picture(previous))
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except FFmpegError as error:
        raise RequestError(f"{path}: cannot be decoded ({error.strerror}); give an undamaged video file") from None
    if len(picked) < (frames or 1):
        span = f"from {start:g} s" + ("" if end is None else f" to {end:g} s")
        raise RequestError(f"{path}: {len(picked)} frames at {fps:g} fps {span}, {frames or 1} needed; take a longer clip or fewer frames")
    return picked.all


class Pictures:
    """The pictures of a clip as they come, each copied at once to its place, so that the decoder's memory is used again."""

    def __init__(self, count: int | None, height: int, width: int):
        """`count` is how many there will be, None if that is not known."""
        self._place = None if count is None else np.empty((count, height, width, 3), np.uint8)
        self._list: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, picture: np.ndarray) -> None:
        if self._place is None:
            self._list.append(np.ascontiguousarray(picture))
        else:
            self._place[self._count] = picture
        self._count += 1

    @property
    def all(self) -> np.ndarray:
        return np.stack(self._list) if self._place is None else self._place


def measure(path: str | Path) -> tuple[int, int, float]:
    """Height and width of a clip as it is displayed, and its length in seconds by its container; 0 if that does not say it."""
    try:
        with streams.open_clip(path) as container:
            stream = streams.video_stream(container, path)
            aspect = stream.sample_aspect_ratio or Fraction(1)
            screen = Screen(path, aspect, 1, 1)
            frame, turn = screen.see(next(streams.decode(container, stream, path)))
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else (container.duration or 0) / 1e6
            height, width = frame.height, max(1, round(frame.width * aspect))
            return (width, height, seconds) if turn[0] else (height, width, seconds)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (FFmpegError, StopIteration) as error:
        raise RequestError(f"{path}: cannot be decoded ({error}); give an undamaged video file") from None


def _stretch(steps: list[Fraction], times: FrameTimes, start: float, end: float | None) -> list[Fraction]:
    """The times, after the first frame, at `steps` from `start` on and before `end`, both counted from the container's zero."""
    begin = max(times.offset, Fraction(start).limit_denominator(10**6))
    steps = [step for step in steps if end is None or begin + step < Fraction(end) - EARLIER]
    after = begin - times.offset
    return [after + step + (times.slack if times.offset and after else 0) for step in steps]


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 "H W 3", turned upright as its EXIF tag says; transparent pixels are white, 16 bits are scaled to 8."""
    try:
        with open(path, "rb") as file:
            head = file.read(40)
        is_heic = head[4:8] == b"ftyp" and (b"heic" in head or b"heix" in head)
        require(not is_heic, f"{path}: a HEIC picture, which Pillow does not read; convert it: heif-convert PICTURE NEW.png")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            require_aspect(path, *image.size)
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path}: not an image that can be read ({error}); give a PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF") from None


def _to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """uint8 "H W 3" of a picture of any mode."""
    if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise RequestError(f"{path}: numbers without a known range (mode {image.mode}); save it with 8 or 16 bits a channel")
        return np.repeat(np.rint(grey / 257).astype(np.uint8)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        print(f"{path}: its transparent pixels are taken as white", flush=True)
        return on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def fit(image: np.ndarray, height: int, width: int, letterbox: bool = False) -> np.ndarray:
    """A picture, uint8 "H W 3", in the size of a clip: scaled and cropped, or with `letterbox` framed, as `read_clip` does it."""
    screen = Screen("a picture", Fraction(1), height, width, letterbox)
    return screen.picture(screen.see(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))


def without_letterbox(video: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The part of "T H W 3" in which a picture of height and width `shape` lies after `fit` with `letterbox`; even height and width."""
    _, height, width, _ = video.shape
    scale = min(height / shape[0], width / shape[1])
    down, across = (max(2, int(side * scale + 1e-6)) // 2 * 2 for side in shape)
    top, left = (height - down) // 2, (width - across) // 2
    return video[:, top : top + down, left : left + across]


def write_clip(path: str | Path, video: np.ndarray, fps: float, sound_of: str | Path | None = None, crf: int | None = None) -> None:
    """Writes uint8 "T H W 3" (even height and width) as an H.264 mp4 that every player opens; the file is there whole or not at all.

    It has the sound of the clip `sound_of`, if that has any, up to its own end. `crf` is x264's constant rate factor, that of `H264` if not
    given; 6 more make about half the bytes.
    """
    content, options = io.BytesIO(), H264 if crf is None else H264 | {"crf": str(crf)}
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        sound = container.add_stream("aac", rate=48_000) if sound_of is not None and has_sound(sound_of) else None
        for picture in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
        if sound is not None and sound_of is not None:
            _copy_sound(sound_of, sound, container, round(len(video) / fps * sound.rate))
    write_whole(path, content.getvalue())


def has_sound(path: str | Path) -> bool:
    """Whether a clip has an audio stream."""
    with streams.open_clip(path) as source:
        return bool(source.streams.audio)


def _copy_sound(path: str | Path, stream: av.AudioStream, output: OutputContainer, samples: int) -> None:
    """Encodes the first `samples` of the sound of a clip into `stream`."""
    resampler, done = av.AudioResampler(format="fltp", layout="stereo", rate=stream.rate), 0
    with streams.open_clip(path) as source:
        pieces = (piece.to_ndarray() for frame in source.decode(audio=0) for piece in resampler.resample(frame))
        while done < samples and (piece := next(pieces, None)) is not None:
            piece = np.ascontiguousarray(piece[:, : samples - done], np.float32)
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
