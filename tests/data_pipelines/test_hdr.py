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


def write(path, planes, transfer, matrix=9, **light):
    """Ten frames of 10-bit Y, U and V, marked BT.2020; `light` is what the clip says of it, as x264 takes it."""
    parameters = ":".join(f"{name.replace('_', '-')}={value}" for name, value in light.items())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"} | ({"x264-params": parameters} if light else {}))
        stream.height, stream.width, stream.pix_fmt = *planes[0].shape, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, matrix, 1
        for _ in range(10):
            frame = av.VideoFrame(stream.width, stream.height, "yuv420p10le")
            frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, matrix, 1
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


def read_grey(path):
    picture = clips.read_clip(path, frames=1, fps=10, height=64, width=64)[0]
    assert picture.std() < 1
    return picture.mean()


def write_grey(path, light, transfer=hdr.PQ, **more):
    luma = np.full((64, 64), round(64 + 876 * signal_of(light, transfer)), np.uint16)
    write(path, [luma, *[np.full((32, 32), 512, np.uint16)] * 2], transfer, **more)


MASTERED = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L({},50)"  # primaries of P3; the peak in 1/10,000 cd/m2


@pytest.mark.parametrize(
    ("stated", "peak"),
    [
        ({"cll": "4000,400"}, 4000),
        ({"mastering_display": MASTERED.format(40_000_000)}, 4000),
        ({"cll": "600,100", "mastering_display": MASTERED.format(40_000_000)}, 600),  # what is in the clip, not what its display could
        ({"cll": "0,0", "mastering_display": MASTERED.format(20_000_000)}, 2000),  # 0 is unknown
        ({"cll": "0,0"}, 1000),
        ({}, 1000),
        ({"cll": "100,50"}, 205.03),  # never darker than white
    ],
)
def test_the_stated_peak_becomes_the_brightest_value(tmp_path, stated, peak):
    """The curve has the form (p x + q) / (x + r), leaves 0.3 of white where it is, with a slope of 1, and takes the peak to 1."""
    knee, top = 0.3, peak / 203
    r = (top * (1 - 2 * knee) + knee**2) / (top - 1)
    for light in (36.5, 120, 203, peak / 2, peak):
        write_grey(tmp_path / "a.mp4", light, **stated)
        share = light / 203
        mapped = share if share < knee else ((2 * knee + r) * share - knee**2) / (share + r)
        assert abs(read_grey(tmp_path / "a.mp4") - 255 * mapped ** (1 / 2.4)) <= 2, light


def test_hlg_is_relative_to_its_display(tmp_path):
    """What HLG clips state of light does not change them."""
    write_grey(tmp_path / "a.mp4", 203, hdr.HLG)
    plain = read_grey(tmp_path / "a.mp4")
    write_grey(tmp_path / "a.mp4", 203, hdr.HLG, cll="4000,400")
    assert abs(read_grey(tmp_path / "a.mp4") - plain) <= 1


def test_hdr_without_a_matrix_has_that_of_bt2020(tmp_path):
    """A red of BT.2020 at 20 cd/m2 is coded by its weight in luma, 0.2627, and read the same, with a matrix and without."""
    red = signal_of(20, hdr.PQ)
    luma = np.full((64, 64), round(64 + 876 * 0.2627 * red), np.uint16)
    chroma = [np.full((32, 32), round(512 + 896 * each * red), np.uint16) for each in (-0.2627 / 1.8814, 0.5)]
    found = []
    for matrix in (9, 2):
        write(tmp_path / "a.mp4", [luma, *chroma], hdr.PQ, matrix=matrix)
        found.append(clips.read_clip(tmp_path / "a.mp4", frames=1, fps=10, height=64, width=64)[0])
    assert np.abs(found[0].astype(int) - found[1]).max() <= 1


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs Debian's ffmpeg")
def test_a_ramp_to_4000_is_that_of_ffmpeg(tmp_path):
    """A peak of 1000 cd/m2 in its place is off by 8 of 255 at most, at 700 cd/m2, and by 3 on average."""
    levels = 64 + 876 * np.array([signal_of(light, hdr.PQ) for light in np.linspace(5, 4000, 16)])
    luma = np.broadcast_to(np.rint(levels).repeat(16), (64, 256)).astype(np.uint16)
    write(tmp_path / "a.mp4", [luma, *[np.full((32, 128), 512, np.uint16)] * 2], hdr.PQ, cll="4000,400")
    filters = f"zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:peak={4000 / 203}:desat=0,zscale=t=bt709,format=gbrp"
    output = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.mp4", "-vf", filters, *output]
    shown = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8).reshape(64, 256, 3)
    picture = clips.read_clip(tmp_path / "a.mp4", frames=1, fps=10, height=64, width=256)[0]
    assert np.abs(picture.astype(int) - shown)[32, 8::16].max() <= 2
