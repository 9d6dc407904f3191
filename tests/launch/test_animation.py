"""launch.sample --config=wan_animate_2: a driving clip and a picture to a video of several clips, with the driving clip's sound."""

import io

import av
import numpy as np
import pytest

from launch import command, sample
from tests.launch.test_sample import moving, picture, properties

SMALL = ["--config=wan_animate_2:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--sampler.steps=2", "--video.frames=5"]


def run(*args):
    return command.execute(sample.main, sample.FLAGS, [*SMALL, *args])


def with_sound(path, seconds):
    """The clip `moving` with a tone of 440 Hz."""
    silent, rate = moving(path.with_suffix(".silent.mp4"), frames=round(8 * seconds)), 48_000
    tone = np.sin(2 * np.pi * 440 * np.arange(round(rate * seconds)) / rate).astype(np.float32) / 2
    content = io.BytesIO()
    with av.open(str(silent)) as source, av.open(content, "w", format="mp4") as output:
        video, audio = output.add_stream_from_template(source.streams.video[0]), output.add_stream("aac", rate=rate)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = video
                output.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), format="fltp", layout="stereo")
        frame.sample_rate = rate
        output.mux(audio.encode(frame))
        output.mux(audio.encode())
    path.write_bytes(content.getvalue())
    return path


def sound(path):
    """(seconds, loudest frequency) of a clip's sound."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    spectrum = np.abs(np.fft.rfft(samples))
    return len(samples) / rate, float(np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()])


def test_three_clips_with_sound(tmp_path, capsys):
    """13 frames are three clips of 5 that share one; the picture's proportions at the configured area, 48 x 32 pixels."""
    driving, person, out = with_sound(tmp_path / "d.mp4", 2.5), picture(tmp_path / "p.png", 40, 60), tmp_path / "o.mp4"
    assert run(f"--reference={driving}", f"--first_frame={person}", "--prompt=a cat", "--frames=13", f"--out={out}") == 0
    assert properties(out) == (13, 32, 48, 8)
    seconds, frequency = sound(out)
    assert abs(seconds - 13 / 8) < 0.05
    assert abs(frequency - 440) < 2
    printed = capsys.readouterr()
    assert "clip 3 of 3" in printed.err
    assert "reference: 12 tokens, 9.22e-06 GB of cache (full)" in printed.out  # 2 latent frames x 2 x 3; 2 layers x 2 x 48 x 4 bytes


def test_a_clip_without_sound_to_its_end(tmp_path):
    """All 8 frames of the driving clip, the second clip filled up and cut off."""
    driving, person, out = moving(tmp_path / "d.mp4"), picture(tmp_path / "p.png", 60, 40), tmp_path / "o.mp4"
    assert run(f"--reference={driving}", f"--first_frame={person}", "--sampler.guidance=1", f"--out={out}") == 0
    assert properties(out) == (8, 48, 32, 8)
    with av.open(str(out)) as container:
        assert not container.streams.audio


@pytest.mark.slow  # the same way as on what the project makes: pytest -n 0 -m slow -k real
def test_real_clips(tmp_path, shared):
    clip, person = shared / "clips/omnitransfer/Motion__ref1.mp4", shared / "clips/omnitransfer/Motion__ref1.jpg"
    out = tmp_path / "o.mp4"
    assert run(f"--reference={clip}", f"--first_frame={person}", "--frames=13", f"--out={out}") == 0
    assert properties(out)[0] == 13


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "0 --reference: Wan-Animate-2 takes one"),
        (["--reference={clip}"], "no --first_frame: Wan-Animate-2 needs a picture of the person"),
        (["--reference={clip}", "--first_frame={person}", "--task=motion"], "--task=motion: Wan-Animate-2 has one task"),
        (["--reference={clip}", "--first_frame={person}", "--frames=99"], "99 needed; take a longer clip or fewer frames"),
        (["--reference={clip}", "--first_frame={person}", "--overlap=5"], "overlap=5: 4n+1 frames, fewer than video.frames=5"),
        (["--reference={clip}", "--first_frame={person}", "--out={clip}"], "this command reads it; give another name"),
    ],
)
def test_wrong_requests(tmp_path, capsys, args, words):
    paths = {"clip": moving(tmp_path / "d.mp4"), "person": picture(tmp_path / "p.png")}
    assert run(f"--out={tmp_path / 'o.mp4'}", *(arg.format(**paths) for arg in args)) == 2
    assert words in capsys.readouterr().err
