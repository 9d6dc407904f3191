"""The model that the package holds: its folder is of the tiny configurations, and found and read from anywhere."""

from functools import partial
from importlib.resources import files as package

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import stage0, stage1, stage2, stage3, wan
from configs.errors import RequestError
from launch import embed
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders import model_folder, run_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.train import loop
from world import scenes, screens
from world.pairs import draw_pair

CONFIGS = {"wan": wan, "stage0": stage0, "stage1": stage1, "stage2": stage2, "stage3": stage3}
TINY = stage2.get_config("tiny")
FOLDER = model_folder.EMBEDDED_FOLDER


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_of_every_tiny_configuration(name):
    config = CONFIGS[name].get_config("tiny")
    config.validate()
    assert {"vae", "text", "image", "mllm"} <= set(model_folder.require_model(FOLDER, config))
    assert config.train.init_from == ("" if name == "stage0" else "embedded")


def test_there_is_no_stage_0_of_the_full_size():
    for variant in ("", "smoke"):
        with pytest.raises(RequestError, match=r"variant '.*': stage0 has `tiny` alone; .* python -m launch.import_weights"):
            stage0.get_config(variant)


def test_it_is_within_the_package_and_small():
    assert package("omnitransfer_jax") / "embedded" == FOLDER
    held = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in held) <= 24e6
    parts = {f"{name}.safetensors" for name in model_folder.read_model(FOLDER)}
    others = {"checksums.0-of-1.json", "made.json", "model.json", "tokenizer", "mllm_tokenizer"}
    assert {path.relative_to(FOLDER).parts[0] for path in held} == parts | others


def test_every_part_is_loaded_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = {
        "vae": load_models.load_vae,
        "text": load_models.load_text_encoder,
        "image": load_models.load_image_encoder,
        "mllm": load_models.load_mllm,
    }
    load["dit"] = partial(load_models.load_dit, mesh=make_mesh(TINY.mesh))
    for name in model_folder.read_model(FOLDER):
        params, stored = flat_params(load[name]("embedded", TINY)), load_file(FOLDER / f"{name}.safetensors")
        assert params.keys() == stored.keys()
        assert all(np.array_equal(params[path], x) and np.isfinite(x).all() for path, x in stored.items())
    assert len(load_models.load_vocabulary("embedded")) == len(load_models.load_mllm_vocabulary("embedded")) > 9
    with pytest.raises(RequestError, match="embedded: imported weights have no queries and no connector"):
        load_models.load_alignment("embedded", TINY)


def test_its_vocabulary_has_every_word_and_the_tokens_the_configuration_names():
    vocabulary = load_models.load_vocabulary("embedded")
    for text in [*scenes.WORDS, *(task.template for task in tasks.TASKS), "USER\n", "assistant\n"]:
        assert 2 not in vocabulary(text)["input_ids"], text
    found = vocabulary.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|video_pad|>"])
    assert found == [TINY.mllm.vision_start, TINY.mllm.image_token, TINY.mllm.video_token]
    assert len(vocabulary) <= min(TINY.text.vocab_size, TINY.mllm.vocab_size)
    assert load_models.load_mllm_vocabulary("embedded").get_vocab() == vocabulary.get_vocab()
    # It was made before stage 0 had words for two scenes on a screen.
    assert set(embed.world_vocabulary(TINY).get_vocab()) == {*vocabulary.get_vocab(), *screens.WORDS}


def test_nothing_the_world_says_is_cut():
    vocabulary = load_models.load_vocabulary("embedded")
    for index in range(60):
        example = draw_pair(0, index, "train")
        assert len(vocabulary(example.prompt)["input_ids"]) <= TINY.dit.text_len
        instruction = f"{tasks.TASKS[tasks.task_index(example.task)].template} {example.prompt}"
        assert len(vocabulary(instruction, add_special_tokens=False)["input_ids"]) <= TINY.alignment.prompt_tokens


def test_a_workdir_keeps_the_name_and_not_the_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loop.with_absolute_paths(TINY).train.init_from == "embedded"
    run_folder.write_config(tmp_path, TINY)
    assert run_folder.imported_weights(str(tmp_path)) == str(FOLDER)
    assert not run_folder.is_run("embedded")
    loop.require_weights(omnitransfer.objective(TINY), TINY)


def test_what_the_folder_lacks_starts_from_random_weights(tmp_path, capsys):
    for name in ("vae", "mllm"):
        (tmp_path / f"{name}.safetensors").symlink_to(FOLDER / f"{name}.safetensors")
    model_folder.write_model(tmp_path, {"vae": TINY.vae, "mllm": TINY.mllm})
    objective = omnitransfer.objective(TINY)
    params = objective.params
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    place = dict.fromkeys(params, jax.sharding.NamedSharding(mesh, jax.P()))
    found = loop.imported_params(str(tmp_path), objective, params, place)
    assert found.keys() == {path for path in params if path.startswith("alignment.mllm.") and ".lora." not in path}
    stored = load_file(FOLDER / "mllm.safetensors")
    assert all(np.array_equal(x, stored[path.removeprefix("alignment.mllm.")]) for path, x in found.items())
    assert "has no dit, which starts from random weights" in capsys.readouterr().out
