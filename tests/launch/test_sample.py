"""launch.sample writes a video that plays, for every kind of request; a wrong request is an error of one line."""

import gc
import weakref

import av
import numpy as np
import pytest
from PIL import Image

from configs import wan
from configs.errors import RequestError
from data_pipelines import clips
from data_pipelines.encoders import Encoders
from launch import command, sample
from omnitransfer_jax import load_models, tasks

SMALL = ["--config=stage1:smoke", "--vae.base_dim=4", "--vae.num_res_blocks=1", "--video.frames=5", "--data.reference.frames=5"]
QUICK = ["--sampler.steps=2", "--dit.num_layers=1"]


def run(*args):
    return command.execute(sample.main, sample.FLAGS, [*SMALL, *QUICK, *args])


def picture(path, height=40, width=60):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def moving(path, frames=8):
    random = np.random.default_rng(0).integers(0, 256, (48, 64 + frames, 3), dtype=np.uint8)
    clips.write_clip(path, np.stack([random[:, i : i + 64] for i in range(frames)]), fps=8)
    return path


def properties(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return len(frames), frames[0].height, frames[0].width, container.streams.video[0].average_rate


@pytest.fixture
def loaded(monkeypatch):
    """The networks in the order they are loaded; fails if an earlier one is still in memory when another is loaded."""
    names, alive = [], []

    def watch(name, load):
        def watched(*args):
            gc.collect()
            assert not any(network() is not None for network in alive), f"{names} before {name}"
            names.append(name)
            network = load(*args)
            alive.append(weakref.ref(network))
            return network

        return watched

    for name in ("vae", "text_encoder", "image_encoder", "mllm", "alignment", "dit"):
        monkeypatch.setattr(load_models, f"load_{name}", watch(name, getattr(load_models, f"load_{name}")))
    return names


def test_image_to_video(tmp_path, capsys, loaded):
    """The picture's own shape at the configured area: 32 x 48 pixels are 1,536, and 2:3 fits."""
    assert run(f"--first_frame={picture(tmp_path / 'a.png')}", "--prompt=a cat", f"--out={tmp_path / 'new' / 'a.MP4'}") == 0
    assert properties(tmp_path / "new" / "a.MP4") == (5, 32, 48, 8)
    printed = capsys.readouterr()
    assert "the weights are random" in printed.out
    assert "2/2" in printed.err  # the progress bar
    assert loaded == ["text_encoder", "image_encoder", "vae", "dit", "vae"]


def test_text_to_video(tmp_path):
    assert run("--dit.image_dim=None", "--dit.in_channels=16", "--sampler.guidance=1", f"--out={tmp_path / 'a.mp4'}") == 0
    assert properties(tmp_path / "a.mp4") == (5, 32, 48, 8)


def test_combined_transfer(tmp_path):
    clip, image = moving(tmp_path / "r.mp4"), picture(tmp_path / "a.png")
    request = ["--task=motion", f"--reference={clip}", "--task=style", f"--reference={clip}", f"--first_frame={image}"]
    outputs = []
    for name, extra in {"a": [], "b": ["--sampler.reference_cache=none"], "c": ["--task=camera", f"--reference={clip}"]}.items():
        assert run(*request, *extra, "--sampler.solver=euler", f"--out={tmp_path / name}.mp4") == 0
        outputs.append(clips.read_clip(tmp_path / f"{name}.mp4", frames=5, fps=8, height=32, width=48).astype(int))
    assert np.abs(outputs[0] - outputs[1]).max() <= 3  # the cache changes nothing but rounding
    assert np.abs(outputs[0] - outputs[2]).max() > 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out=a.gif"], "--out=a.gif: an mp4 is written"),
        (["--task=style", "--reference={clip}", "--out={folder}/x/../r.mp4"], "this command reads it; give another name"),
        (["--task=motion"], "1 --task and 0 --reference"),
        (["--task=motion", "--reference={clip}"], "give --first_frame"),
        (["--task=style", "--reference=absent.mp4"], "absent.mp4: no such file"),
        (["--task=dance", "--reference={clip}"], "id|style|motion|camera|effect"),
        (["--first_frame=absent.png"], "absent.png: no such file"),
        (["--first_frame={image}", "--dit.image_dim=None", "--dit.in_channels=16"], "this network is text-to-video"),
        (
            ["--task=style", "--reference={clip}", "--dit.image_dim=None", "--dit.in_channels=16"],
            "--reference: this network is text-to-video",
        ),
        (["--task=style", "--reference={clip}", "--data.reference.frames=33"], "33 needed"),
        (["--video.frames=42"], "video.frames=42: the causal autoencoder needs 4n+1"),
        (["--video.width=50"], "video.width=50: a multiple of 16"),
        (["--checkpoint=absent"], "absent"),
    ],
)
def test_wrong_requests(tmp_path, capsys, args, words):
    names = {"folder": tmp_path, "clip": moving(tmp_path / "r.mp4"), "image": picture(tmp_path / "a.png")}
    assert run(*(arg.format(**names) for arg in args)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_what_is_left_out_is_said_before_sampling(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sample, "encode", lambda encoders, request: None)
    monkeypatch.setattr(sample, "generate", lambda encoders, request, encoded, finish: None)
    monkeypatch.setattr(Encoders, "decode", lambda self, latents: np.zeros((1, 5, 32, 48, 3), np.float32))
    image, out = picture(tmp_path / "a.png"), f"--out={tmp_path / 'a.mp4'}"
    long, cut = "--prompt=" + 40 * "x", "--prompt has 41 tokens: 32 are read (dit.text_len), the end is cut off"
    no_picture = "no --first_frame: this is an image-to-video network"

    def said(*args):
        assert run(out, *args) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("no --first", "--"))]

    assert said(f"--first_frame={image}", f"--prompt={31 * 'x'}") == []
    assert said(f"--first_frame={image}", long) == [cut]
    (line,) = said()
    assert line.startswith(no_picture)
    assert said("--dit.image_dim=None", "--dit.in_channels=16") == []
    assert said("--task=style", f"--reference={moving(tmp_path / 'r.mp4')}", f"--sampler.negative_prompt={50 * 'x'}") == [
        "--sampler.negative_prompt has 51 tokens: 32 are read (dit.text_len), the end is cut off"
    ]
    assert said("--task=style", f"--reference={tmp_path / 'r.mp4'}", "--alignment.enabled=True", "--prompt=" + 99 * "x") == [
        f"--prompt has {len(tasks.TASKS[1].template) + 100} tokens: 96 are read (alignment.prompt_tokens), the end is cut off"
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=wan"], "no weights for dit (16.4 billion parameters) and text (5.7 billion parameters)"),
        (["--config=wan:t2v_1_3b"], "no weights for dit (1.4 billion parameters) and text"),
        (["--config=stage2", "--task=style", "--reference=r.mp4"], "no weights for dit (16.4 billion parameters) and mllm (3.8 billion"),
    ],
)
def test_the_full_size_needs_weights(args, words, capsys, tmp_path):
    assert command.execute(sample.main, sample.FLAGS, [*args, f"--out={tmp_path / 'a.mp4'}"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.endswith("give --checkpoint=DIR, made with python -m launch.import_weights --source=DIR --out=DIR\n")
    assert error.count("\n") == 1


def test_no_large_network_is_drawn_at_random():
    """Wherever it is loaded: commands check before they read anything, this is the last guard."""
    with pytest.raises(RequestError, match=r"no weights for text \(5.7 billion parameters\), too large for random ones"):
        load_models.load_text_encoder("", wan.get_config())


@pytest.mark.slow  # the same way as on what the project makes: pytest -n 0 -m slow -k real
def test_a_real_picture(shared, tmp_path):
    image = shared / "clips" / "misc" / "wan_i2v_input.jpg"
    assert run(f"--first_frame={image}", f"--out={tmp_path / 'a.mp4'}") == 0
    frames, height, width, _ = properties(tmp_path / "a.mp4")
    with Image.open(image) as picture:
        assert abs(np.log(height / width * picture.width / picture.height)) < np.log(1.5)  # as near as 32 x 48 pixels of area allow
    assert frames == 5
