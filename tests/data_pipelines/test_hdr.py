"""HDR clips have the brightness of ordinary ones: values stated, and compared with ffmpeg's own tone mapping."""

import shutil
import subprocess

import av
import numpy as np
import pytest

from data_pipelines import clips, hdr

TRANSFERS = {"pq": hdr.PQ, "hlg": hdr.HLG}


def signal_of(light, transfer):
    """The coded value of a grey of so many cd/m2 (BT.2100)."""
    if transfer == hdr.PQ:
        y = (light / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375
    scene = (light / 1000) ** (1 / 1.2)
    return (3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073


def write(path, planes, transfer):
    """Ten frames of 10-bit Y, U and V, marked BT.2020."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *planes[0].shape, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        for _ in range(10):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
            frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, 9, 1
            for plane, values in zip(frame.planes, planes, strict=True):
                padded = np.zeros((values.shape[0], plane.line_size // 2), "<u2")
                padded[:, : values.shape[1]] = values
                plane.update(padded.tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("transfer", TRANSFERS.values(), ids=TRANSFERS)
@pytest.mark.parametrize(("light", "expected"), [(0, 0), (5, 54), (26, 108), (36.5, 125), (203, 216), (1000, 255)])
def test_greys(tmp_path, transfer, light, expected):
    """36.5 cd/m2, mid grey under a white of 203, is the 125 of mid grey in an ordinary clip; read without a tone mapping it is 104."""
    luma = np.full((64, 64), round(64 + 876 * signal_of(light, transfer)), np.uint16)
    write(tmp_path / "a.mp4", [luma, *[np.full((32, 32), 512, np.uint16)] * 2], transfer)
    picture = clips.read_clip(tmp_path / "a.mp4", frames=1, fps=10, height=64, width=64)[0]
    assert picture.std() < 1
    assert abs(picture.mean() - expected) <= 3, picture.mean()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs Debian's ffmpeg")
@pytest.mark.parametrize("name", TRANSFERS)
def test_it_is_near_ffmpegs_own(tmp_path, name):
    rng = np.random.default_rng(0)
    luma = np.kron(rng.integers(80, 650, (4, 4)), np.ones((16, 16), int)).astype(np.uint16)
    chroma = [np.kron(rng.integers(480, 545, (4, 4)), np.ones((8, 8), int)).astype(np.uint16) for _ in range(2)]
    write(tmp_path / "a.mp4", [luma, *chroma], TRANSFERS[name])
    filters = "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:peak=4.926:desat=0,zscale=t=bt709,format=gbrp"
    output = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.mp4", "-vf", filters, *output]
    shown = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8).reshape(64, 64, 3)
    picture = clips.read_clip(tmp_path / "a.mp4", frames=1, fps=10, height=64, width=64)[0]
    assert np.abs(picture.astype(int) - shown)[8::16, 8::16].mean() < 4
