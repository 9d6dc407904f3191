"""Clips of every ordinary kind, and what they show, from the formulas of the standards alone.

A clip is six patches of known colours, the last of which brightens with every frame. `cases` lists what is written: container, codec,
pixel format, matrix, range, transfer, orientation, aspect of a pixel, times of the frames.
"""

import random
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import av.bitstream
import numpy as np

PATCH = 32
COLOURS = np.array([[(200, 50, 40), (40, 180, 60), (50, 70, 210)], [(230, 225, 220), (90, 80, 30), (40, 40, 40)]]) / 255
FRAMES, BRIGHTER = 6, 30 / 255  # the last patch, from one frame to the next

# ITU-T H.273: what red and blue weigh in luma, by matrix coefficients. Clips without a matrix are read by BT.601, those without a range
# have the limited one, grey ones the full one, as in ffmpeg.
LUMA = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)} | dict.fromkeys((2, 5, 6), (0.299, 0.114))
OTHER_MATRICES = (8, 10, 14)  # YCgCo, BT.2020 of constant luminance, ICtCp
NO_MATRIX = (0, 2)  # RGB
PQ, HLG = 16, 18
OTHER_TRANSFERS = (8, 9, 10)  # linear light, two logarithms
SDR = (1, 1, 2, 2, 4, 5, 6, 7, 11, 13, 14, 15, *OTHER_TRANSFERS)
LIMITED, FULL = 1, 2

# Clockwise quarters, then whether left and right are exchanged; the display matrix takes (x, y) to (a x + c y, b x + d y).
TURNS = {0: (1, 0, 0, 1), 1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}
ORIENTATIONS = [(quarters, mirrored) for quarters in range(4) for mirrored in (False, True)]
ASPECTS = [Fraction(1), Fraction(4, 3), Fraction(16, 11), Fraction(1, 2)]
TIMINGS = {  # rate, places of the frames on its grid
    "10": (Fraction(10), list(range(FRAMES))),
    "23.976": (Fraction(24000, 1001), list(range(FRAMES))),
    "vfr": (Fraction(12), [0, 1, 3, 4, 7, 9]),
    "later": (Fraction(10), [5 + i for i in range(FRAMES)]),
}


@dataclass(frozen=True)
class Codec:
    """An encoder, where it may be put, and how far its colours may be off, of 255."""

    name: str
    containers: tuple[str, ...]
    pixels: tuple[str, ...]
    tolerance: int = 6
    options: tuple[tuple[str, str], ...] = ()


CODECS = (
    Codec("libx264", ("mp4", "m4v", "mov", "mkv", "ts", "flv", "avi"), ("yuv420p", "yuv422p", "yuv444p", "gray"), 5, (("crf", "4"),)),
    Codec("libx264", ("mp4", "mkv", "ts"), ("yuv420p10le", "yuv422p10le", "yuv444p10le"), 5, (("crf", "4"),)),
    Codec("libx264rgb", ("mp4", "mkv"), ("rgb24",), 3, (("qp", "0"),)),
    Codec(
        "libx265", ("mp4", "mkv", "ts"), ("yuv420p", "yuv420p10le", "yuv444p12le", "gbrp"), 6, (("x265-params", "crf=4:log-level=none"),)
    ),
    Codec("libvpx-vp9", ("webm", "mp4"), ("yuv420p", "yuv422p", "yuv444p", "gbrp"), 6, (("crf", "4"), ("b", "0"), ("cpu-used", "8"))),
    Codec("libsvtav1", ("mp4", "webm"), ("yuv420p", "yuv420p10le"), 8, (("crf", "4"), ("preset", "12"), ("g", "1"))),
    Codec("mpeg2video", ("mpg", "ts", "mkv"), ("yuv420p", "yuv422p"), 8, (("qmin", "1"), ("qmax", "2"))),
    Codec("mpeg4", ("mp4", "avi", "mkv"), ("yuv420p",), 8, (("qmin", "1"), ("qmax", "2"))),
    Codec("mjpeg", ("avi", "mov", "mkv"), ("yuvj420p", "yuvj444p"), 8, (("qmin", "1"), ("qmax", "2"))),
    Codec("prores_ks", ("mov", "mkv"), ("yuv422p10le", "yuv444p10le"), 6),
    Codec("ffv1", ("mkv", "avi"), ("yuv420p", "yuv411p", "yuv444p16le", "gray", "gray10le", "gbrp10le"), 3),
    Codec("ffv1", ("mkv", "nut"), ("yuv422p", "yuv420p12le", "bgra"), 3),
    Codec("ffvhuff", ("avi", "nut"), ("yuv420p", "yuv444p10le", "rgb24"), 3),
    Codec("huffyuv", ("avi",), ("yuv422p", "rgb24"), 3),
    Codec("utvideo", ("avi", "nut"), ("yuv420p", "yuv422p", "gbrp"), 3),
    Codec("rawvideo", ("nut",), ("yuv420p", "nv12", "rgb24", "yuv444p"), 3),
    Codec("rawvideo", ("avi",), ("yuv420p", "nv12", "bgr24"), 3),
    Codec("rawvideo", ("mkv",), ("yuv420p", "yuv422p"), 3),
    Codec("qtrle", ("mov",), ("rgb24", "argb"), 3),
    Codec("png", ("mov",), ("rgb24", "rgba", "gray"), 3),
    Codec("cfhd", ("mov",), ("yuv422p10le", "gbrp12le"), 8),
    Codec("v210", ("mov", "avi"), ("yuv422p10le",), 3),
    Codec("jpeg2000", ("mov", "mkv"), ("yuv420p", "rgb24"), 8),
    Codec("wmv2", ("wmv",), ("yuv420p",), 8, (("qmin", "1"), ("qmax", "2"))),
    Codec("flv", ("flv",), ("yuv420p",), 8, (("qmin", "1"), ("qmax", "2"))),
    Codec("apng", ("apng",), ("rgb24", "rgba"), 3),
    Codec("gif", ("gif",), ("rgb8",), 3),
)
CONSTANT_RATE = {"avi", "mpg", "apng"}
NO_RATE = {"flv", "gif", "wmv2"}  # codecs in containers that store no rate: six frames do not tell 23.976 from 24
TURNABLE = {"mp4", "m4v", "mov"}


@dataclass(frozen=True)
class Case:
    codec: Codec
    container: str
    pixels: str
    matrix: int
    range: int
    transfer: int
    orientation: tuple[int, bool]
    aspect: Fraction
    timing: str

    def __str__(self) -> str:
        words = [self.codec.name, self.container, self.pixels, f"m{self.matrix}", f"r{self.range}", f"t{self.transfer}"]
        turn = f"{90 * self.orientation[0]}{'m' * self.orientation[1]}"
        return "-".join([*words, turn, f"{self.aspect.numerator}to{self.aspect.denominator}", self.timing])

    @property
    def is_grey(self) -> bool:
        return self.pixels.startswith("gray")

    @property
    def is_rgb(self) -> bool:
        return "rgb" in self.pixels or "gbr" in self.pixels or "bgr" in self.pixels

    @property
    def is_hdr(self) -> bool:
        return self.transfer in (PQ, HLG)

    @property
    def refusal(self) -> str | None:
        """The words with which it is refused, if it is to be."""
        if self.matrix in OTHER_MATRICES:
            return f"matrix {self.matrix} "
        return f"transfer {self.transfer} " if self.transfer in OTHER_TRANSFERS else None


def cases(each: int) -> list[Case]:
    """`each` cases of every codec in every container with every of its pixel formats; the rest is drawn, the same in every run."""
    found = {}
    for codec in CODECS:
        for container in codec.containers:
            for pixels in codec.pixels:
                for number in range(each):
                    draw = random.Random(f"{codec.name} {container} {pixels} {number}")
                    case = _draw(draw, codec, container, pixels)
                    found[str(case)] = case
    return list(found.values())


def _draw(draw: random.Random, codec: Codec, container: str, pixels: str) -> Case:
    case = Case(codec, container, pixels, 2, 0, 2, (0, False), draw.choice(ASPECTS), "10")
    if case.is_rgb:
        matrix, coded_range = draw.choice([(0, FULL), (2, 0)])
    elif case.is_grey:
        matrix, coded_range = 2, draw.choice((0, LIMITED, FULL))
    else:
        matrix = draw.choice((*LUMA, *OTHER_MATRICES)) if draw.random() < 0.7 else 2
        coded_range = FULL if pixels.startswith("yuvj") else draw.choice((0, LIMITED, FULL))
    deep = any(bits in pixels for bits in ("10", "12", "16"))
    transfer = draw.choice((PQ, HLG)) if deep and draw.random() < 0.3 else draw.choice(SDR)
    if transfer in (PQ, HLG) and not (case.is_rgb or case.is_grey):
        matrix = 9
    turnable = container in TURNABLE or (codec.name == "libx264" and container in ("mkv", "ts"))
    orientation = draw.choice(ORIENTATIONS) if turnable else (0, False)
    timings = ["10"] if codec.name in NO_RATE else ["10", "23.976"] if container in CONSTANT_RATE else list(TIMINGS)
    return replace(case, matrix=matrix, range=coded_range, transfer=transfer, orientation=orientation, timing=draw.choice(timings))


def shown(case: Case, frame: int) -> np.ndarray:
    """The patches' colours on the screen, 0 to 1: "2 3 3"."""
    colours = COLOURS.copy()
    colours[1, 2] += frame * BRIGHTER
    if case.pixels == "rgb8":
        colours = np.rint(colours * [7, 7, 3]) / [7, 7, 3]
    if case.is_grey:
        colours = np.repeat(colours.mean(-1, keepdims=True), 3, -1)
    return colours * (0.6 if case.is_hdr else 1)  # below 0.3 of white nothing is compressed


def expected(case: Case) -> tuple[np.ndarray, list[int], Fraction]:
    """The patches of every frame, turned upright, of 255; which frame is shown at each reading; the rate of the readings."""
    rate, places = TIMINGS[case.timing]
    patches = [shown(case, frame) for frame in range(FRAMES)]
    quarters, mirrored = case.orientation
    upright = [np.rot90(patch[:, ::-1] if mirrored else patch, -quarters) for patch in patches]
    steps = range(places[-1] - places[0] + 1)
    return 255 * np.stack(upright), [bisect_right(places, places[0] + step) - 1 for step in steps], rate


def display_size(case: Case) -> tuple[int, int]:
    """Height and width on the screen."""
    height, width = 2 * PATCH, round(3 * PATCH * case.aspect)
    return (width, height) if case.orientation[0] % 2 else (height, width)


def signal(case: Case, frame: int) -> np.ndarray:
    """R'G'B' as the clip's transfer codes it, 0 to 1: "2 3 3"."""
    colours = shown(case, frame)
    if not case.is_hdr:
        return colours
    light = 203 * colours**2.4 @ _to_bt2020().T  # BT.1886 display, white of 203 cd/m2 (BT.2408)
    if case.transfer == PQ:
        y = (light / 10_000) ** (2610 / 16384)
        return ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)
    luma = (light @ np.array([0.2627, 0.6780, 0.0593]))[..., None] / 1000
    scene = light / 1000 * luma ** (-0.2 / 1.2)  # BT.2100: display light = 1000 * luma_of_scene^0.2 * scene
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073)


def _to_bt2020() -> np.ndarray:
    """Linear RGB of BT.709 to that of BT.2020, from the chromaticities of the primaries and of white (D65)."""

    def to_xyz(*primaries: tuple[float, float]) -> np.ndarray:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
        white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
        return columns * np.linalg.solve(columns, white)

    bt709, bt2020 = to_xyz((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)), to_xyz((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))
    return np.linalg.solve(bt2020, bt709)


def coded(case: Case, frame: int) -> list[np.ndarray]:
    """The numbers in the planes of a frame, "2 3" each: Y, Cb, Cr, or G, B, R, or the channels of packed RGB together."""
    rgb, layout = signal(case, frame), av.VideoFormat(case.pixels)
    bits = layout.components[0].bits
    if case.is_rgb:
        return [np.rint(rgb[..., channel] * (2**bits - 1)) for channel in (1, 2, 0)]
    red, blue = LUMA.get(case.matrix, LUMA[1])
    luma = rgb @ np.array([red, 1 - red - blue, blue])
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    if case.range == FULL or (case.is_grey and case.range == 0):
        planes = [luma * (2**bits - 1), *[each * (2**bits - 1) + 2 ** (bits - 1) for each in chroma]]
    else:
        planes = [(16 + 219 * luma) * 2 ** (bits - 8), *[(128 + 224 * each) * 2 ** (bits - 8) for each in chroma]]
    return [np.rint(plane) for plane in planes[: 1 if case.is_grey else 3]]


def picture(case: Case, number: int) -> av.VideoFrame:
    if case.is_rgb and not case.pixels.startswith("gbr"):
        return _packed(case, number)
    frame = av.VideoFrame(3 * PATCH, 2 * PATCH, case.pixels)
    layout, planes = frame.format, coded(case, number)
    kind = "<u2" if layout.components[0].bits > 8 else "u1"
    grown = []
    for place, values in enumerate(planes):
        across, down = 3 * PATCH, 2 * PATCH
        if place and not case.is_rgb:
            across, down = layout.chroma_width(across), layout.chroma_height(down)
        grown.append(values.repeat(down // 2, 0).repeat(across // 3, 1).astype(kind))
    if case.pixels == "nv12":
        grown = [grown[0], np.stack(grown[1:], -1).reshape(len(grown[1]), -1)]
    for plane, values in zip(frame.planes, grown, strict=True):
        padded = np.zeros((len(values), plane.line_size // values.itemsize), kind)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    return frame


def _packed(case: Case, number: int) -> av.VideoFrame:
    rgb = signal(case, number).repeat(PATCH, 0).repeat(PATCH, 1)
    if case.pixels == "rgb8":
        red, green, blue = np.moveaxis(np.rint(rgb * [7, 7, 3]).astype(np.uint8), -1, 0)
        return av.VideoFrame.from_ndarray(red << 5 | green << 2 | blue, format="rgb8")
    channels = dict(
        zip("rgba", [*np.moveaxis(np.rint(255 * rgb).astype(np.uint8), -1, 0), np.full(rgb.shape[:2], 255, np.uint8)], strict=True)
    )
    return av.VideoFrame.from_ndarray(np.stack([channels[name] for name in case.pixels.removesuffix("24")], -1), format=case.pixels)


def write(path: Path, case: Case) -> None:
    """In a thread of its own: SVT-AV1 gives the thread that encodes a real-time priority, if it may, and what it starts inherits it."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_encode, path, case).result()


def _encode(path: Path, case: Case) -> None:
    rate, places = TIMINGS[case.timing]
    with av.open(str(path), "w", format="mpeg" if case.container == "mpg" else None) as container:
        stream = container.add_stream(case.codec.name, rate=rate, options=dict(case.codec.options))
        stream.width, stream.height, stream.pix_fmt = 3 * PATCH, 2 * PATCH, case.pixels
        context = stream.codec_context
        context.thread_count = 1
        context.sample_aspect_ratio = case.aspect
        tags = {
            "colorspace": case.matrix,
            "color_range": case.range,
            "color_trc": case.transfer,
            "color_primaries": 9 if case.is_hdr else 1,
        }
        for tag, value in tags.items():
            setattr(context, tag, value)
        turning = None
        if case.orientation != (0, False) and case.container not in TURNABLE:
            container.start_encoding()
            turning = _turning(stream, case.orientation)
        for number, place in enumerate([*places, None]):
            frame = None
            if place is not None:
                frame = picture(case, number)
                frame.pts, frame.time_base = place, 1 / rate
                for tag, value in tags.items():
                    setattr(frame, tag, value)
            for packet in stream.encode(frame):
                for each in [packet] if turning is None else turning.filter(packet):
                    each.stream = stream
                    container.mux(each)
    if case.container in TURNABLE:
        turn(path, case.orientation)


def _turning(stream: av.VideoStream, orientation: tuple[int, bool]) -> av.bitstream.BitStreamFilterContext:
    """H.264 says its orientation itself: pictures are mirrored first, then turned to the left (ITU-T H.264, D.2.27)."""
    quarters, mirrored = orientation
    flip = ":flip=horizontal" if mirrored else ""
    options = f"h264_metadata=display_orientation=insert:rotate={-90 * quarters % 360}{flip}"
    return av.bitstream.BitStreamFilterContext(options, stream)


def turn(path: Path, orientation: tuple[int, bool]) -> None:
    """Writes the display matrix of an mp4 or mov: mirrored first, then turned."""
    quarters, mirrored = orientation
    a, b, c, d = TURNS[quarters]
    a, b = (-a, -b) if mirrored else (a, b)
    content = path.read_bytes()
    place = content.index(b"tkhd") + 44
    matrix = np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content[:place] + matrix + content[place + 36 :])


def is_stored(path: Path, case: Case) -> bool:
    """Whether the file, as libavcodec reads its first frame, still says what is needed to show it: some containers drop tags."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frame = next(container.decode(stream))
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        found = replace(case, matrix=int(frame.colorspace), range=int(frame.color_range), transfer=int(frame.color_trc), aspect=aspect)
    return _meaning(found) == _meaning(case)


def _meaning(case: Case) -> tuple:
    colours = LUMA.get(case.matrix, (case.matrix,)) if not (case.is_grey or case.is_rgb) else ()
    full = case.is_rgb or case.range == FULL or (case.is_grey and case.range == 0)
    return colours, full, case.transfer if case.is_hdr or case.transfer in OTHER_TRANSFERS else 1, case.aspect


def centres(video: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The mean colour in the middle of each patch of uint8 "T H W 3": "T rows columns 3"."""
    height, width = video.shape[1:3]
    down, across = ([round(size * (2 * i + 1) / (2 * n)) for i in range(n)] for size, n in ((height, rows), (width, columns)))
    return np.stack([np.stack([video[:, y - 3 : y + 3, x - 3 : x + 3].mean((1, 2)) for x in across], 1) for y in down], 1)
