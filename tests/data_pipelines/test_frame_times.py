"""A clip gives the same pictures in every container: those of the times at which its frames were written."""

import shutil
import subprocess
from bisect import bisect_right
from fractions import Fraction
from pathlib import Path

import av
import av.bitstream
import numpy as np
import pytest

from configs.errors import RequestError
from data_pipelines import clips
from data_pipelines.frame_times import FrameTimes

RATES = [Fraction(8), Fraction(12), Fraction(16), Fraction(24), Fraction(24000, 1001), Fraction(30), Fraction(60)]
READ = (8, 16, 24)
HEIGHT, WIDTH = 32, 128
MOV = {"mov_600.mov": 600, "mov_90000.mov": 90000}


def numbered(number):
    """A picture that shows `number` as eight black or white columns."""
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
    return np.broadcast_to(np.repeat(bits, WIDTH // 8)[None, :, None], (HEIGHT, WIDTH, 3))


def number_of(picture):
    return sum(int(picture[HEIGHT // 2, WIDTH * (2 * bit + 1) // 16, 0] > 128) << bit for bit in range(8))


def write(path, rate, places, codec="libx264", pixels="yuv420p", sound_before=0.0, **options):
    """Numbered frames at `places` / rate seconds, after so many seconds of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        if sound_before:
            sound = container.add_stream("aac", rate=48000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 48000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
        for number, place in enumerate(places):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(numbered(number)), format="rgb24")
            frame.pts, frame.time_base = place + round(sound_before * rate), 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def remux(source, target, **options):
    """The same coded frames in another container."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        to_avi = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream, copy) if target.suffix == ".avi" else None
        for packet in read.demux(stream):
            for each in [] if packet.dts is None else [packet] if to_avi is None else to_avi.filter(packet):
                each.stream = copy
                written.mux(each)


def write_all(folder: Path, rate: Fraction, places) -> list[Path]:
    """The frames in every container; the first path is an mp4, which holds their times exactly."""
    places = list(places)
    write(folder / "h264.mp4", rate, places, bf="3")
    write(folder / "vp9.mp4", rate, places, "libvpx-vp9", deadline="realtime", **{"cpu-used": "8"})
    write(folder / "paletted.gif", rate, places, "gif", "rgb8")
    remux(folder / "vp9.mp4", folder / "vp9.webm")
    for name, ticks in MOV.items():
        remux(folder / "h264.mp4", folder / name, video_track_timescale=str(ticks))
    for kind in ("mkv", "flv", "ts"):
        remux(folder / "h264.mp4", folder / f"h264.{kind}")
    if places == list(range(len(places))):  # AVI counts frames
        write(folder / "no_b.avi", rate, places, bf="0")
        write(folder / "b.avi", rate, places, bf="3", **{"x264-params": "b-adapt=0"})
        remux(folder / "h264.mp4", folder / "ticks_of_600.avi")
    return [folder / "h264.mp4", *sorted(set(folder.iterdir()) - {folder / "h264.mp4"})]


def numbers(path, frames, fps, start=0.0):
    return [number_of(picture) for picture in clips.read_clip(path, frames=frames, fps=fps, height=HEIGHT, width=WIDTH, start=start)]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):g}fps")
def test_remuxing_never_changes_a_picture(tmp_path, rate):
    paths = write_all(tmp_path, rate, range(int(2 * rate) + 4))
    assert len(paths) == 12
    for fps in READ:
        expected = [int(Fraction(i, fps) * rate) for i in range(2 * fps + 1)]
        assert {path.name: numbers(path, len(expected), fps) for path in paths} == {path.name: expected for path in paths}
    last = {}
    for path in paths:  # as many frames as were written, and no more
        assert numbers(path, int(2 * rate) + 4, float(rate)) == list(range(int(2 * rate) + 4)), path
        with pytest.raises(RequestError, match="take a longer clip"):
            last[path.name] = numbers(path, int(2 * rate) + 5, float(rate))
    assert not last


@pytest.mark.parametrize("seed", range(3))
def test_remuxing_a_clip_with_dropped_frames_never_changes_a_picture(tmp_path, seed):
    places = [0, *(1 + np.flatnonzero(np.random.default_rng(seed).random(60) < 0.7)).tolist()]
    rate = (Fraction(24), Fraction(24000, 1001), Fraction(30))[seed]
    paths = [path for path in write_all(tmp_path, rate, places) if path.suffix != ".gif" or seed != 1]  # there 24 and 23.976 look alike
    for fps in READ:
        expected = [bisect_right(places, Fraction(i, fps) * rate) - 1 for i in range(fps + 1)]
        assert {path.name: numbers(path, fps + 1, fps) for path in paths} == {path.name: expected for path in paths}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs Debian's ffmpeg")
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):g}fps")
def test_times_are_those_of_ffmpeg(tmp_path, rate):
    """`fps=round=up` shows the last frame at or before each time. Times differ by no more than a tick, to which a container rounds them."""
    paths = write_all(tmp_path, rate, range(int(2 * rate) + 4))
    for fps in READ:
        command = ["ffmpeg", "-v", "error", "-i", paths[0], "-vf", f"fps={fps}:round=up", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        shown = [number_of(picture) for picture in np.frombuffer(raw, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)]
        assert numbers(paths[0], 2 * fps + 1, fps) == shown[: 2 * fps + 1]
    for path in paths:
        if path.suffix == ".gif" and rate > 50:
            continue  # older ffmpeg shows a frame of one hundredth of a second for ten
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            times, tick = FrameTimes(container, stream, path), stream.time_base
            ours = [times.of(frame) for frame in container.decode(stream)]
        command = ["ffprobe", "-v", "error", "-show_entries", "frame=best_effort_timestamp", "-of", "csv=p=0", path]
        found = subprocess.run(command, capture_output=True, check=True, text=True).stdout.replace(",", "").split()
        assert len(found) == len(ours)
        known = [(int(ticks), time) for ticks, time in zip(found, ours, strict=True) if ticks != "N/A"]  # of an AVI's last frames
        assert [time for ticks, time in known if abs((ticks - known[0][0]) * tick - time) > tick] == [], path


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts"])
def test_start_counts_from_the_containers_zero(tmp_path, kind):
    """Sound begins half a second before the pictures, and with it the players' clock; the first picture is the earliest that is read."""
    path, rate = tmp_path / f"a.{kind}", Fraction(12)
    write(path, rate, range(30), sound_before=0.5)
    assert numbers(path, 5, 12, start=1.0) == [6, 7, 8, 9, 10]
    assert numbers(path, 5, 12, start=0.75) == [3, 4, 5, 6, 7]
    assert numbers(path, 5, 12) == numbers(path, 5, 12, start=0.25) == [0, 1, 2, 3, 4]
    size = {"fps": 12, "height": HEIGHT, "width": WIDTH}
    assert len(clips.read_clip(path, frames=6, end=0.95, **size)) == 6
    with pytest.raises(RequestError, match=r"6 frames at 12 fps from 0 s to 0\.95 s, 7 needed"):
        clips.read_clip(path, frames=7, end=0.95, **size)


def test_times_that_go_back_are_refused(tmp_path):
    write(tmp_path / "a.ts", Fraction(12), range(20), bf="0")
    (tmp_path / "twice.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    with pytest.raises(RequestError, match=r"twice\.ts: its frames' times go back at .* write it anew"):
        numbers(tmp_path / "twice.ts", 30, 12)
