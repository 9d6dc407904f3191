"""Clips that were made, as files that lose nothing, so that a measure depends on no codec: H.264 of RGB with quantiser 0, in an mp4."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import UInt8

from configs.errors import RequestError, require
from configs.run import VideoConfig
from data_pipelines import clips
from omnitransfer_jax.folders.atomic import write_whole

Clip = UInt8[np.ndarray, "T H W 3"]
ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")


def write(path: Path, clip: Clip, fps: float) -> None:
    """Writes a clip whole or not at all."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001), options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "rgb24"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode())
    write_whole(path, content.getvalue())


def find(folder: Path, name: str) -> Path | None:
    """The file of a clip, whatever its format."""
    return next((path for ending in ENDINGS if (path := folder / f"{name}{ending}").is_file()), None)


def read(path: Path, size: VideoConfig) -> Clip:
    """A clip with all its frames, at the height and width of `size`; a `RequestError` if it has another number of frames.

    Frames are taken as they lie, one after the other: what a system calls its frame rate does not change what is measured.
    """
    frames, fps = count(path)
    require(frames == size.frames, f"{path}: {frames} frames, {size.frames} needed (video.frames)")
    return clips.read_clip(path, frames=frames, fps=fps, height=size.height, width=size.width)


def count(path: Path) -> tuple[int, float]:
    """How many frames can be decoded, and their rate; a `RequestError` where the clip is damaged."""
    try:
        with av.open(str(path)) as container:
            require(bool(container.streams.video), f"{path}: no video in it; give a clip")
            stream = container.streams.video[0]
            return sum(1 for _ in container.decode(stream)), float(stream.average_rate or 0) or 24.0
    except (FFmpegError, OSError) as error:
        raise RequestError(
            f"{path}: cannot be decoded ({getattr(error, 'strerror', None) or error}); give an undamaged video file"
        ) from None
