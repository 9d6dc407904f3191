"""Which video stream of a file is read, and by which decoder."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
from av.codec.codec import UnknownCodecError
from av.container import InputContainer
from av.stream import Disposition

from configs.errors import RequestError, require

# A cover, thumbnails, a still, and a layer that refines another stream are not what a player shows.
NO_CLIP = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
HEIF_BRANDS = {"heic", "heix", "heim", "heis", "hevc", "hevx", "hevm", "hevs", "mif1", "msf1", "avif", "avis"}
# ffmpeg's own decoders of these codecs drop the transparency.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
MOST_PIXELS = 2**26  # of a frame: 8192 x 8192
# Damage that ffmpeg would pass over or hide: checksums that differ, wrong bits and lengths are errors.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}
NOT_STRICT = {"tiff"}  # ffmpeg's decoder of these codecs then refuses what ffmpeg's encoder wrote
PROBED = 500  # packets that are read to find out which streams move
# PyAV before 19 raises for a tag that is not UTF-8, unless it is asked to replace what it cannot read; PyAV 19 never raises for one.
REPLACE_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def open_clip(path: str | Path) -> InputContainer:
    """The file, open. A clip may name other files or addresses to play; nothing but the file itself is opened."""
    return av.open(str(path), options={"protocol_whitelist": "file"} | STRICT, **REPLACE_TAGS)


def video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    """The video stream that players take: one marked as default before others, then the largest, then the first; never a cover picture."""
    kind, brand = container.format.name, container.metadata.get("major_brand", "")
    require(
        not (kind.endswith("_pipe") or kind == "image2" or brand in HEIF_BRANDS),
        f"{path}: a picture, or an animation that is not read ({brand or kind.removesuffix('_pipe')}); give a clip, such as an H.264 mp4",
    )
    streams = [stream for stream in container.streams.video if not stream.disposition & NO_CLIP]
    require(bool(streams), f"{path}: no video stream; give a clip that has one")
    known = [stream for stream in streams if stream.codec_context is not None]
    require(bool(known), f"{path}: cannot be decoded (its codec is unknown); give an H.264 mp4")
    if len(known) > 1:
        moving = _moving(path)
        known = [stream for stream in known if stream.index in moving] or known
    found = max(known, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.width * stream.height))
    require(
        found.width * found.height <= MOST_PIXELS,
        f"{path}: {found.width} x {found.height} pixels, at most {MOST_PIXELS:,} are read; give a smaller clip",
    )
    return found


def decode(container: InputContainer, stream: av.VideoStream, path: str | Path) -> Iterator[av.VideoFrame]:
    """The frames of a stream in the order of their display, with their transparency."""
    decoder = _decoder(stream, path)
    decoder.thread_type = "SLICE"  # frame threads hide damage and dead-lock with fork
    decoder.thread_count = 1
    if decoder.name not in NOT_STRICT:
        decoder.options = decoder.options | STRICT
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _moving(path: str | Path) -> set[int]:
    """The streams with more than one packet among the file's first: Matroska does not mark covers as such."""
    found: list[int] = []
    with open_clip(path) as container:
        for packet in islice(container.demux(*container.streams.video), PROBED):
            if packet.size:  # the last ones of each stream are empty
                found.append(packet.stream.index)
    return {index for index in found if found.count(index) > 1}


def _decoder(stream: av.VideoStream, path: str | Path) -> av.VideoCodecContext:
    ours, name = stream.codec_context, stream.codec_context.name
    transparent = "1" in [value for key, value in stream.metadata.items() if key.lower() == "alpha_mode"]
    if not transparent or name not in ALPHA_DECODERS:
        return ours
    try:
        decoder = av.CodecContext.create(ALPHA_DECODERS[name], "r")
    except UnknownCodecError:
        raise RequestError(f"{path}: transparent {name}, which needs PyAV with {ALPHA_DECODERS[name]}: pip install av") from None
    assert isinstance(decoder, av.VideoCodecContext)
    decoder.extradata = ours.extradata
    for tag in ("colorspace", "color_range", "color_trc", "color_primaries"):
        setattr(decoder, tag, getattr(ours, tag))
    return decoder


def side_data(frame: av.VideoFrame, name: str) -> bytes | None:
    """What a frame carries beside its pixels, by PyAV's name of it."""
    try:
        data = frame.side_data.get(name)
    except ValueError:  # PyAV 18 gives nothing at all of a frame that also carries what it has no name for, such as EXIF
        return None
    return None if data is None else bytes(data)
