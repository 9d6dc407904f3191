"""What was given for weights, when it is something else: one line says what it is and what to give."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from configs import stage1, vae, wan
from configs.errors import RequestError
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import inputs, model_folder, run_folder
from tests.folders.test_run_folder import started_from

SMOKE = stage1.get_config("smoke")
GIVE = "give --checkpoint=DIR, a folder of launch.import_weights or the workdir of a training$"
IMPORT = "import it: python -m launch.import_weights --source="


@pytest.fixture
def here(tmp_path):
    """One folder of each kind."""
    model_folder.write_model(tmp_path / "model", {"dit": SMOKE.dit})
    run_folder.write_config(tmp_path / "run", started_from(SMOKE, tmp_path / "model"))
    for name in ("run/checkpoints/8/trainable", "model/dit", "empty", "other/x", "records", "diffusers", "original", "comfyui"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "records" / "records.json").write_text("{}")
    (tmp_path / "diffusers" / "model_index.json").write_text("{}")
    (tmp_path / "original" / "config.json").write_text('{"model_type": "i2v", "dim": 5120}')
    for name in ("comfyui/wan.safetensors", "file", "file.safetensors", "file.gguf"):
        (tmp_path / name).write_text("")
    (tmp_path / "damaged" / "checkpoints").mkdir(parents=True)
    (tmp_path / "damaged" / "config.json").write_text('{"dit": {"di')
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", f"no such folder; {GIVE}"),
        ("run/checkpoints/9", f"no such folder; {GIVE}"),
        ("file", f"a file; {GIVE}"),
        ("file.safetensors", f"a file of weights; {IMPORT}"),
        ("file.gguf", f"a file of weights; {IMPORT}"),
        ("empty", f"an empty folder; {GIVE}"),
        ("other", f"neither imported weights nor a run, model.json is absent; {GIVE}"),
        ("records", f"a folder of records, for --data.path; {GIVE}"),
        ("run/checkpoints", "inside of the workdir of a run; give --checkpoint=.*/run$"),
        ("run/checkpoints/8", "inside of the workdir of a run; give --checkpoint=.*/run$"),
        ("run/checkpoints/8/trainable", "inside of the workdir of a run; give --checkpoint=.*/run$"),
        ("model/dit", "inside of a folder of imported weights; give --checkpoint=.*/model$"),
        ("diffusers", f"published weights that are not imported; {IMPORT}"),
        ("original", f"published weights that are not imported; {IMPORT}"),
        ("comfyui", f"published weights that are not imported; {IMPORT}"),
        ("damaged", "not JSON"),
    ],
)
def test_what_holds_no_weights_is_named(here, name, message):
    with pytest.raises(RequestError, match=f"{here / name}.*: {message}"):
        inputs.require_checkpoint("--checkpoint", str(here / name))


def test_what_cannot_be_read_is_one_line(here, monkeypatch):
    with pytest.raises(RequestError, match=r"^--source=x+: cannot be read \(File name too long\); give another folder$"):
        inputs.require_source("--source", "x" * 300)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    for check in (inputs.require_checkpoint, inputs.require_source):
        with pytest.raises(RequestError, match=r"^--flag=.*/other: cannot be read \(Permission denied\); give another folder$"):
            check("--flag", str(here / "other"))


def test_weights_are_taken(here, monkeypatch):
    monkeypatch.chdir(here)
    for name in ("", "embedded", "model", "model/", "run", str(here / "run")):
        inputs.require_checkpoint("--checkpoint", name)
    run_folder.write_config(here / "vae", vae.TINY)
    inputs.require_checkpoint("--train.init_from", "vae", vae.VAETraining)
    with pytest.raises(RequestError, match="a run of the autoencoder's training; give one of the transformer's"):
        inputs.require_checkpoint("--checkpoint", "vae")


def test_the_weights_behind_a_run_must_be_there(here):
    shutil.rmtree(here / "model")
    with pytest.raises(
        RequestError, match=r"run: the run started from .*/model, where its encoders are, and no imported weights are there"
    ):
        inputs.require_checkpoint("--checkpoint", str(here / "run"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such file or folder; give the folder or the .safetensors file that was downloaded$"),
        ("empty", "an empty folder; give"),
        ("run", "the workdir of a run, no published weights; give"),
        ("run/checkpoints/8", "inside of .*/run, the workdir of a run, no published weights; give"),
        ("model", "a folder of imported weights, no published weights; give"),
        ("records", "a folder of records, no published weights; give"),
    ],
)
def test_a_source_is_published_weights(here, name, message):
    with pytest.raises(RequestError, match=f"^--source={here / name}: {message}"):
        inputs.require_source("--source", str(here / name))
    for right in ("diffusers", "original", "comfyui", "file.safetensors"):
        inputs.require_source("--source", str(here / right))
    with pytest.raises(RequestError, match="no such file or folder"):
        inputs.require_source("--source", "")


def test_what_a_command_needs_of_the_weights_is_there_before_it_starts(here, monkeypatch):
    model, run = str(here / "model"), str(here / "run")
    monkeypatch.setattr(model_folder, "_read", None)
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", None)
    with pytest.raises(RequestError, match=r"^--checkpoint=.*model has no vae \(no video .*\) and no text \(no prompt .*\); import it"):
        load_models.require_weights(model, SMOKE, ("dit", "vae", "text"), "--checkpoint")
    shutil.rmtree(here / "run" / "checkpoints")
    with pytest.raises(RequestError, match="this run has no checkpoint yet"):
        load_models.require_weights(run, SMOKE, ("dit",))
    model_folder.write_model(here / "model", {name: getattr(SMOKE, name) for name in ("vae", "text", "mllm")})
    for names, vocabulary in ((("vae", "text"), "tokenizer"), (("mllm",), "mllm_tokenizer")):
        with pytest.raises(RequestError, match=r"no tokenizer\.json"):
            load_models.require_weights(model, SMOKE, names)
        (here / "model" / vocabulary).mkdir()
        (here / "model" / vocabulary / "tokenizer.json").write_text("{}")
        load_models.require_weights(model, SMOKE, names)
    aligned = replace(SMOKE, alignment=replace(SMOKE.alignment, enabled=True))
    with pytest.raises(
        RequestError, match="imported weights have no queries and no connector; give the workdir of a stage 2 or 3 training"
    ):
        load_models.require_weights(model, aligned, ("dit", "vae"))


@pytest.mark.parametrize(("variant", "fit"), [("t2v_1_3b", "wan:t2v_1_3b"), ("t2v_14b", "wan:t2v_14b"), ("tiny", "wan:tiny"), ("", "wan")])
def test_the_configuration_that_fits_is_named(tmp_path, variant, fit):
    made = wan.get_config(variant)
    model_folder.write_model(tmp_path, {"dit": made.dit, "vae": made.vae})
    with pytest.raises(
        RequestError, match=rf"made with dit\.\w+=.*, the configuration has .*; what fits is --config=(.*, |.* or )?{fit}\b"
    ):
        model_folder.require_model(tmp_path, SMOKE)


def test_no_configuration_fits_weights_of_another_size(tmp_path):
    model_folder.write_model(tmp_path, {"dit": replace(SMOKE.dit, num_heads=4)})
    with pytest.raises(RequestError, match=r"made with dit.num_heads=4, the configuration has 2; .* or --dit.num_heads=4$"):
        model_folder.require_model(tmp_path, SMOKE)


def test_the_configuration_that_fits_a_run_is_named(tmp_path):
    run_folder.write_config(tmp_path, SMOKE)
    with pytest.raises(RequestError, match=r"or --dit.dim=48; what fits is --config=stage1:smoke or wan:smoke$"):
        run_folder.require_same_function(str(tmp_path), stage1.get_config("tiny"))
    run_folder.write_config(tmp_path, replace(SMOKE, dit=replace(SMOKE.dit, eps=1e-5)))
    assert json.loads((tmp_path / "config.json").read_text())["dit"]["eps"] == 1e-5
    with pytest.raises(RequestError, match=r"or --dit.eps=1e-05$"):
        run_folder.require_same_function(str(tmp_path), SMOKE)
