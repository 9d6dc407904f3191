"""launch.embed: parts from where they are said to be from, bit for bit, and no folder that the package could not hold."""

import json
import shutil
from dataclasses import asdict, replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import stage0
from launch import command, embed
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.tokenizer import word_tokenizer
from omnitransfer_jax.train.step import TrainState
from omnitransfer_jax.weights.parts import MLLM, PARTS
from tests.train.tiny_run import batches

TINY = stage0.get_config("tiny")
SHAPES = {part.name: part.shapes(getattr(TINY, part.name)) for part in (*PARTS, MLLM)}
ENCODERS = ("vae", "text", "image", "mllm")


def execute(*args):
    return command.execute(embed.main, embed.FLAGS, ["--config=stage0:tiny", *map(str, args)])


def drawn(name, seed):
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in SHAPES[name].items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(np.array_equal(x, other[path]) for path, x in one.items())


def trained_vae(folder, psnr=30.5, **fields):
    """A workdir as `launch.train --config=vae:tiny` leaves it, and its parameters."""
    folder.mkdir()
    leaves = drawn("vae", 1)
    save_file(leaves, folder / "vae.safetensors")
    (folder / "vae.json").write_text(json.dumps({"vae": asdict(replace(TINY.vae, **fields)), "held_out_psnr": psnr, "steps": 9}))
    return leaves


def trained_dit(workdir, origin):
    """A workdir of stage 0 whose average differs from its weights; the average."""
    weights, average = ({f"dit.{path}": jnp.asarray(x) for path, x in drawn("dit", seed).items()} for seed in (2, 3))
    state = TrainState(jnp.int32(40), weights, {}, {"moment": jnp.zeros(1)}, average, jnp.int32(0))
    with run_folder.open_checkpoints(workdir, TINY.checkpoint) as checkpoints:
        run_folder.save(checkpoints, 40, state, batches(TINY))
    run_folder.write_config(workdir, replace(TINY, train=replace(TINY.train, init_from=str(origin))))
    return {path.removeprefix("dit."): x for path, x in average.items()}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder without a transformer, and the autoencoder it was given."""
    folder = tmp_path_factory.mktemp("encoders")
    vae = trained_vae(folder / "run")
    assert execute(f"--vae={folder / 'run'}", f"--out={folder / 'out'}") == 0
    return folder / "out", vae


def test_without_a_base(encoders, tmp_path, capsys):
    folder, vae = encoders
    assert model_folder.read_model(folder) == {name: getattr(TINY, name) for name in ENCODERS}
    assert_same(load_file(folder / "vae.safetensors"), vae)
    for name in ENCODERS:
        stored = load_file(folder / f"{name}.safetensors")
        assert {path: (x.shape, x.dtype) for path, x in stored.items()} == {path: (x.shape, x.dtype) for path, x in SHAPES[name].items()}
    made = json.loads((folder / "made.json").read_text())
    assert made["parts"]["vae"]["from"] == {"held_out_psnr": 30.5, "steps": 9}
    assert made["parts"]["text"]["from"] == "random, seed 0"
    assert made["parts"]["vae"]["bytes"] == (folder / "vae.safetensors").stat().st_size
    assert made["parts"]["vae"]["parameters"] == sum(x.size for x in vae.values())
    assert load_models.load_vocabulary(str(folder)).get_vocab() == load_models.load_mllm_vocabulary(str(folder)).get_vocab()


def test_a_base_brings_the_transformer_and_all_it_started_from(encoders, tmp_path):
    """Its average, and the encoders and words it was trained with, though other random ones would be drawn now."""
    origin = shutil.copytree(encoders[0], tmp_path / "origin")
    word_tokenizer(["other words"]).save_pretrained(origin / "tokenizer")
    tokenizer = origin / "tokenizer" / "tokenizer.json"
    average = trained_dit(tmp_path / "base", origin)
    assert execute(f"--base={tmp_path / 'base'}", f"--out={tmp_path / 'out'}", "--seed=1") == 0
    assert_same(load_file(tmp_path / "out" / "dit.safetensors"), average)
    for name in ENCODERS:
        assert_same(load_file(tmp_path / "out" / f"{name}.safetensors"), load_file(origin / f"{name}.safetensors"))
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    made, before = (json.loads((folder / "made.json").read_text()) for folder in (tmp_path / "out", origin))
    assert {name: made["parts"][name] for name in ENCODERS} == before["parts"]
    assert made["parts"]["dit"]["from"]["steps"] == 40
    assert made["commands"] == [
        *before["commands"],
        f"python -m launch.embed --config=stage0:tiny --base={tmp_path / 'base'} --out={tmp_path / 'out'}",
    ]
    assert_same(load_file(tmp_path / "out" / "dit.safetensors"), model_folder.load_part(tmp_path / "out", "dit", SHAPES["dit"]))


def test_a_given_language_model(encoders, tmp_path):
    mllm = drawn("mllm", 4)
    save_file(mllm, tmp_path / "mllm.safetensors")
    (tmp_path / "mllm.json").write_text('{"held_out_accuracy": 0.9}')
    assert execute(f"--mllm={tmp_path}", f"--out={tmp_path / 'out'}") == 0
    assert_same(load_file(tmp_path / "out" / "mllm.safetensors"), mllm)
    assert json.loads((tmp_path / "out" / "made.json").read_text())["parts"]["mllm"]["from"] == {"held_out_accuracy": 0.9}
    for name in ("text", "image"):  # the seed decides what is drawn, and no other part does
        assert_same(load_file(tmp_path / "out" / f"{name}.safetensors"), load_file(encoders[0] / f"{name}.safetensors"))


def test_24_megabytes_at_most(tmp_path, capsys):
    assert execute("--text.vocab_size=100000", f"--out={tmp_path / 'out'}") == 2
    assert (
        "MB of weights: the package holds 24 MB at most; take a smaller configuration, the largest part is text" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_wrong_requests(tmp_path, capsys):
    trained_vae(tmp_path / "vae", latents_mean=(0.5,) * 16)
    (tmp_path / "other").mkdir()
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other" / "mllm.safetensors")
    (tmp_path / "other" / "mllm.json").write_text("{}")
    for args, words in (
        ([f"--vae={tmp_path / 'vae'}"], "another autoencoder than the configuration's: latents_mean is (0.5, 0.5,"),
        ([f"--vae={tmp_path}"], "no vae.json; train one to its end: python -m launch.train --config=vae:tiny"),
        ([f"--base={tmp_path}"], "no training run"),
        ([f"--mllm={tmp_path}"], "no mllm.json; train one to its end: python -m launch.train --config=mllm:tiny"),
        ([f"--mllm={tmp_path / 'other'}"], "not the mllm of this configuration"),
        ([f"--out={tmp_path}"], "not empty"),
        (["--text.vocab_size=100"], "the configuration's vocab_size has room for 100"),
    ):
        assert execute(f"--out={tmp_path / 'out'}", *args) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
