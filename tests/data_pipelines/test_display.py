"""How frames are shown: transparent ones on white, shapes within bounds, orientation whatever else a frame carries."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from configs.errors import RequestError
from data_pipelines import clips, display
from tests.data_pipelines import clip_matrix

SIZE = {"frames": 6, "fps": 10, "height": 48, "width": 64}


def transparent(colour=(200, 40, 60)):
    """Opaque on the left; on the right nothing above, where blue lies hidden, and half of it below: uint8 "H W 4"."""
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[...] = (*colour, 255)
    rgba[:24, 32:] = (0, 0, 255, 0)
    rgba[24:, 32:, 3] = 128
    return rgba


def write(path, codec, pixels, rgba, tag=None, size=(64, 48), **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if tag:
            stream.metadata[tag] = "1"
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def middles(picture):
    """The colours of the four quarters."""
    return [picture[y, x].tolist() for y in (12, 36) for x in (16, 48)]


ALPHA = [
    ("webm", "libvpx-vp9", "yuva420p"),
    ("mkv", "libvpx-vp9", "yuva420p"),
    ("mov", "prores_ks", "yuva444p10le"),
    ("mkv", "prores_ks", "yuva444p10le"),
    ("mov", "png", "rgba"),
    ("mov", "qtrle", "argb"),
    ("mov", "cfhd", "gbrap12le"),
    ("mov", "jpeg2000", "rgba"),
    ("mkv", "ffv1", "yuva420p"),
    ("mkv", "ffv1", "bgra"),
    ("avi", "ffv1", "bgra"),
    ("mkv", "ffv1", "gbrap10le"),
    ("avi", "utvideo", "gbrap"),
    ("nut", "rawvideo", "rgba"),
    ("apng", "apng", "rgba"),
    ("apng", "apng", "ya8"),
]


@pytest.mark.parametrize(("kind", "codec", "pixels"), ALPHA, ids=str)
def test_transparent_clips_are_shown_on_white(tmp_path, capsys, kind, codec, pixels):
    """Half transparent pixels are half white: 255 - 128/255 (255 - colour). It is said once a clip."""
    path = tmp_path / f"a.{kind}"
    write(path, codec, pixels, transparent(), "alpha_mode" if kind in ("webm", "mkv") else None)
    video = clips.read_clip(path, **SIZE)
    colour = np.array((200, 40, 60) if pixels != "ya8" else [90] * 3)
    expected = [colour, (255, 255, 255), colour, 255 - 128 / 255 * (255 - colour)]
    assert np.abs(np.array(middles(video[0])) - expected).max() <= 7
    assert (video[0] == video[5]).all()
    assert capsys.readouterr().out == f"{path}: its transparent pixels are taken as white\n"


@pytest.mark.parametrize("tag", ["alpha_mode", "ALPHA_MODE"])
def test_the_tag_of_matroska_may_be_in_capitals(tmp_path, tag):
    write(tmp_path / "a.webm", "libvpx-vp9", "yuva420p", transparent(), tag)
    assert middles(clips.read_clip(tmp_path / "a.webm", **SIZE)[0])[1] == [255, 255, 255]


def test_what_lies_under_transparent_pixels_is_not_seen_at_their_edges(tmp_path):
    """A hidden blue, at twice and at half the size: along a red edge red falls as green does, on the way to white."""
    rgba = np.full((48, 64, 4), 255, np.uint8)
    rgba[:, :32], rgba[:, 32:] = (255, 255, 255, 255), (0, 0, 255, 0)
    write(tmp_path / "a.mov", "png", "rgba", rgba)
    for height, width in ((96, 128), (24, 32)):
        assert clips.read_clip(tmp_path / "a.mov", **SIZE | {"height": height, "width": width}).min() >= 254


def test_opaque_clips_with_an_alpha_channel_are_left_as_they_are(tmp_path, capsys):
    rgba = transparent()
    rgba[..., 3] = 255
    write(tmp_path / "a.mov", "png", "rgba", rgba)
    assert (clips.read_clip(tmp_path / "a.mov", **SIZE)[0] == rgba[..., :3]).all()
    assert capsys.readouterr().out == ""


def test_transparent_vp9_without_its_decoder_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.webm", "libvpx-vp9", "yuva420p", transparent(), "alpha_mode")
    monkeypatch.setattr("data_pipelines.streams.ALPHA_DECODERS", {"vp9": "libvpx-absent"})
    with pytest.raises(RequestError, match=r"a\.webm: transparent vp9, which needs PyAV with libvpx-absent: pip install av"):
        clips.read_clip(tmp_path / "a.webm", **SIZE)


def test_a_transparent_hdr_clip_is_mapped_before_it_is_shown_on_white(tmp_path):
    """PQ codes 0.58 and 0: white, and nothing above a hidden black."""
    rgba = np.zeros((48, 64, 4), np.uint16)
    rgba[:, :32, :3], rgba[:, :32, 3] = round(0.5807 * 65535), 65535
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gbrap16le"
        stream.codec_context.color_trc = 16
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba64le")
            frame.color_trc = 16
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    picture = clips.read_clip(tmp_path / "a.mkv", **SIZE)[0]
    assert abs(int(picture[24, 16, 0]) - 216) <= 2  # as in test_hdr.py
    assert picture[24, 48].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_animations_are_clips_or_are_refused(tmp_path, kind):
    """As Pillow writes them. PyAV 18 does not read animated WebP."""
    pictures = [np.roll(transparent(), 8 * number, axis=0) for number in range(6)]
    images = [Image.fromarray(picture) for picture in pictures]
    more = {"webp": {"lossless": True, "exact": True}, "gif": {"disposal": 2}}.get(kind, {})
    images[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=images[1:], duration=100, **more)
    if kind == "webp" and int(av.__version__.partition(".")[0]) < 19:
        with pytest.raises(RequestError, match=r"a\.webp: a picture, or an animation that is not read \(webp\); give a clip"):
            clips.read_clip(tmp_path / f"a.{kind}", **SIZE)
        return
    video = clips.read_clip(tmp_path / f"a.{kind}", **SIZE)
    with Image.open(tmp_path / f"a.{kind}") as animation:
        for number, found in enumerate(video):
            animation.seek(number)
            rgba = np.asarray(animation.convert("RGBA")).astype(float)
            assert np.abs(found - (255 - rgba[..., 3:] / 255 * (255 - rgba[..., :3]))).max() <= 1, number


@pytest.mark.parametrize(("coded", "aspect", "named"), [((256, 48), Fraction(1), "256 x 48"), ((128, 64), Fraction(3), "384 x 64")])
def test_a_clip_beyond_one_to_four_is_refused(tmp_path, coded, aspect, named):
    """Its shape on the screen counts, not that of its pixels."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = *coded, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((*coded[::-1], 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with pytest.raises(RequestError, match=rf"a\.mp4: {named} pixels: its sides differ by more than 4 times; cut it to 1:4 or less"):
        clips.read_clip(tmp_path / "a.mp4", **SIZE)


def test_a_clip_of_one_to_four_is_read(tmp_path):
    write(tmp_path / "a.mkv", "ffv1", "bgra", np.full((48, 192, 4), 255, np.uint8), size=(192, 48))
    assert clips.read_clip(tmp_path / "a.mkv", **SIZE).shape == (6, 48, 64, 3)


@pytest.mark.parametrize("quarters", range(4))
def test_a_frame_that_carries_more_is_turned_too(tmp_path, quarters):
    """TIFF frames carry EXIF, of which PyAV 18 knows no name; it then lists nothing of what a frame carries."""
    rgba = np.dstack([np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((32, 32)))] * 3 + [np.full((64, 96), 255)]).astype(np.uint8)
    write(tmp_path / "a.mov", "tiff", "rgba", rgba, size=(96, 64))
    clip_matrix.turn(tmp_path / "a.mov", (quarters, False))
    height, width = (96, 64) if quarters % 2 else (64, 96)
    picture = clips.read_clip(tmp_path / "a.mov", frames=1, fps=10, height=height, width=width)[0]
    assert np.abs(picture.astype(int) - np.rot90(rgba[..., :3], -quarters)).max() <= 1


HEIC = b"\x00\x00\x00\x1cftypheic\x00\x00\x00\x00mif1heicmiaf" + bytes(100)
OLD_HEIC = b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1heicmiaf" + bytes(100)


@pytest.mark.parametrize("content", [HEIC, OLD_HEIC])
def test_a_heic_picture_is_named(tmp_path, content):
    (tmp_path / "a.heic").write_bytes(content)
    with pytest.raises(
        RequestError, match=r"a\.heic: a HEIC picture, which Pillow does not read; convert it: heif-convert PICTURE NEW\.png"
    ):
        clips.read_image(tmp_path / "a.heic")


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "avif"])
def test_a_picture_is_not_a_clip(tmp_path, kind):
    Image.fromarray(transparent()[..., :3]).save(tmp_path / f"a.{kind}")
    with pytest.raises(RequestError, match=rf"a\.{kind}: a picture, or an animation that is not read \({kind}\); give a clip"):
        clips.read_clip(tmp_path / f"a.{kind}", **SIZE | {"frames": 1})


def test_a_gif_is_a_picture_too(tmp_path):
    Image.fromarray(transparent()).save(tmp_path / "a.gif")
    found = middles(clips.read_image(tmp_path / "a.gif"))
    assert found[0] == [200, 40, 60]
    assert found[1] == [255, 255, 255]


@pytest.mark.parametrize("pixels", ["gray", "gray10le"])
@pytest.mark.parametrize(("coded_range", "expected"), [(clip_matrix.LIMITED, 128), (clip_matrix.FULL, 126), (0, 126)])
def test_grey_of_the_limited_range_is_stretched(tmp_path, pixels, coded_range, expected):
    """Code 126 of 255 is (126 - 16) / 219 of white in the limited range. libswscale takes every grey for full range."""
    kind, top = (np.uint8, 255) if pixels == "gray" else (np.uint16, 1023)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.color_range = 64, 48, pixels, coded_range
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64), round(126 / 255 * top), kind), format=pixels)
            frame.color_range = coded_range
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert np.abs(clips.read_clip(tmp_path / "a.mkv", **SIZE).astype(int) - expected).max() <= 1


def test_full_range_is_that_of_the_standard():
    assert display.full_range(np.array([0, 16, 125, 126, 235, 255], np.uint8)).tolist() == [0, 0, 127, 128, 255, 255]
    assert display.full_range(np.array([16 * 257, 235 * 257], np.uint16)).tolist() == [0, 65535]
