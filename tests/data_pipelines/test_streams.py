"""Of several video streams the one is read that players take."""

from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.stream import Disposition

from configs.errors import RequestError
from data_pipelines import clips, streams

GREY, DEFAULT = {"small": 60, "large": 180}, Disposition.default
SIZES = {"small": (48, 32), "large": (96, 64)}
NONE = Disposition(0)


def write(path, *wanted):
    """Each stream is a size, which is told by its grey, its disposition, and how many frames it has if not six."""
    with av.open(str(path), "w") as container:
        opened = []
        for size, disposition, *_ in wanted:
            stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt, stream.disposition = *SIZES[size], "yuv420p", disposition
            opened.append(stream)
        for stream, (size, _, *length) in zip(opened, wanted, strict=True):
            width, height = SIZES[size]
            picture = np.full((height, width, 3), GREY[size], np.uint8)
            for number in range(length[0] if length else 6):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())


CHOICES = {
    "the largest": ([("small", NONE), ("large", NONE)], "large"),
    "the default": ([("large", NONE), ("small", DEFAULT)], "small"),
    "the default, first": ([("small", DEFAULT), ("large", NONE)], "small"),
    "the largest default": ([("small", DEFAULT), ("large", DEFAULT)], "large"),
    "no single picture": ([("large", DEFAULT, 1), ("small", DEFAULT)], "small"),
}


@pytest.mark.parametrize(("written", "taken"), CHOICES.values(), ids=CHOICES)
def test_the_stream_of_players(tmp_path, written, taken):
    write(tmp_path / "a.mkv", *written)
    picture = clips.read_clip(tmp_path / "a.mkv", frames=6, fps=10, height=32, width=48)
    assert abs(picture.mean() - GREY[taken]) <= 2


def container_of(*dispositions):
    """A stand-in for a file, each of its streams smaller than the one before: PyAV writes few dispositions."""
    streams = [
        SimpleNamespace(index=index, disposition=disposition, width=90 - index, height=50, codec_context=object())
        for index, disposition in enumerate(dispositions)
    ]
    return SimpleNamespace(format=SimpleNamespace(name="matroska,webm"), metadata={}, streams=SimpleNamespace(video=streams))


@pytest.mark.parametrize("what", ["attached_pic", "timed_thumbnails", "still_image", "dependent"])
def test_what_is_no_clip_is_not_taken_even_if_it_is_the_default(monkeypatch, what):
    monkeypatch.setattr(streams, "_moving", lambda path: {0, 1, 2})
    assert streams.video_stream(container_of(Disposition[what] | DEFAULT, NONE, NONE), "a").index == 1
    with pytest.raises(RequestError, match="a: no video stream; give a clip that has one"):
        streams.video_stream(container_of(Disposition[what], Disposition[what] | DEFAULT), "a")


def test_a_stream_of_an_unknown_codec_is_not_taken(monkeypatch):
    container = container_of(DEFAULT, NONE)
    container.streams.video[0].codec_context = None
    assert streams.video_stream(container, "a").index == 1
    container.streams.video[1].codec_context = None
    with pytest.raises(RequestError, match="its codec is unknown"):
        streams.video_stream(container, "a")


def test_a_single_picture_is_taken_if_there_is_no_clip(tmp_path):
    write(tmp_path / "a.mkv", ("small", DEFAULT, 1), ("large", DEFAULT, 1))
    assert abs(clips.read_clip(tmp_path / "a.mkv", frames=1, fps=10, height=32, width=48).mean() - GREY["large"]) <= 2
