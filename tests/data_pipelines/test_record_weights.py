"""Records train with the encoders that made them, or it is an error: every combination of records and train.init_from."""

import json
from dataclasses import replace

import numpy as np
import pytest

from configs import stage1, stage2
from configs.errors import RequestError
from data_pipelines import batches, records
from data_pipelines.encoders import weights_of
from launch import command, train
from omnitransfer_jax.folders import model_folder, run_folder

SMOKE, ALIGNED = stage1.get_config("smoke"), stage2.get_config("smoke")
PARTS, VOCABULARIES = ("vae", "text", "image", "mllm"), ("tokenizer", "mllm_tokenizer")


def imported(folder, names, seed=0, changed=()):
    """A model folder with these parts and vocabularies; those `changed` have other values of the same sizes."""
    for name in names:
        values = np.random.default_rng(seed + (name in changed)).standard_normal(5).astype(np.float32)
        if name in VOCABULARIES:
            (folder / name).mkdir(parents=True)
            (folder / name / "tokenizer.json").write_text(json.dumps(values.tolist()))
        else:
            folder.mkdir(exist_ok=True)
            model_folder.save_file(folder, name, {"leaf": values})
    model_folder.write_model(folder, {name: getattr(ALIGNED, name) for name in names if name not in VOCABULARIES})


def starting(config, folder):
    return replace(config, train=replace(config.train, init_from=str(folder) if folder else ""))


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """By name, what train.init_from may be: imported weights, runs that came from them, and nothing."""
    root, everything = tmp_path_factory.mktemp("origins"), (*PARTS, *VOCABULARIES, "dit")
    imported(root / "A", everything)
    imported(root / "A again", everything)
    imported(root / "dit alone", ["dit"])
    for name in (*PARTS, *VOCABULARIES, "dit"):
        imported(root / f"other {name}", everything, changed=[name])
    run_folder.write_config(root / "run of A", starting(SMOKE, root / "A"))
    run_folder.write_config(root / "run of a run of A", starting(SMOKE, root / "run of A"))
    run_folder.write_config(root / "run of another", starting(SMOKE, root / "other vae"))
    run_folder.write_config(root / "run of random", starting(SMOKE, ""))
    (root / "moved").mkdir()
    return {path.name: path for path in root.iterdir()} | {"random": None}


@pytest.fixture
def made_by(write_records, origins):
    """A function that writes records made by the encoders of an origin, and gives the configuration that reads them."""

    def write(name, of=SMOKE):
        config = write_records(2)
        made = records.read_made(folder := records.Path(config.data.path))
        made["source"] = {"world": 0, "weights": weights_of(starting(of, origins[name]))}
        (folder / records.MADE_FILE).write_text(json.dumps(made))
        return config

    return write


@pytest.mark.parametrize(
    ("made", "origin", "message"),
    [
        ("random", "random", ""),
        ("random", "run of random", ""),
        ("random", "dit alone", ""),
        ("random", "A", r"made by random encoders, but train.init_from='.*/A' has weights of image and text and tokenizer and vae; give"),
        (
            "random",
            "run of A",
            r"made by random encoders, but train.init_from='.*/run of A' has weights of image and text and tokenizer and vae",
        ),
        ("random", "run of a run of A", "made by random encoders"),
        ("A", "random", r"made with weights of image and text and tokenizer and vae, but train.init_from='' has none; give"),
        ("A", "run of random", "made with weights of image and .*, but train.init_from='.*/run of random' has none"),
        ("A", "A", ""),
        ("A", "A again", ""),
        ("A", "run of A", ""),
        ("A", "run of a run of A", ""),
        ("A", "dit alone", ""),
        ("A", "other dit", ""),  # it encodes nothing
        ("A", "other mllm", ""),  # nor does this without the alignment
        ("A", "other vae", r"made by another vae than train.init_from='.*/other vae' has; give --train.init_from the weights that"),
        ("A", "other text", "made by another text than"),
        ("A", "other image", "made by another image than"),
        ("A", "other tokenizer", "made by another tokenizer than"),
        ("A", "run of another", "made by another vae than"),
        ("run of another", "A", "made by another vae than"),
        ("run of another", "other vae", ""),
    ],
)
def test_every_pair_of_records_and_origin(made_by, origins, made, origin, message):
    config = starting(made_by(made), origins[origin])
    if not message:
        batches.batches(config, seed=0)
        return
    with pytest.raises(RequestError, match=f"^{config.data.path}: records {message}"):
        batches.batches(config, seed=0)


@pytest.mark.parametrize("changed", ["", "vae", "mllm", "mllm_tokenizer"])
def test_with_the_language_model(made_by, origins, changed):
    config = starting(ALIGNED, origins[f"other {changed}" if changed else "A"])
    config = replace(config, data=replace(config.data, path=made_by("A", ALIGNED).data.path))
    if not changed:
        batches.require_same_weights(config)
        return
    with pytest.raises(RequestError, match=f"records made by another {changed} than"):
        batches.require_same_weights(config)


@pytest.mark.parametrize("source", [{}, {"weights": {"model.json": "digest", "path": "elsewhere"}}])
def test_records_that_do_not_say_it_are_told_once(write_records, origins, capsys, source):
    config = starting(write_records(2, name=f"records{len(source)}"), origins["A"])
    path = records.Path(config.data.path, records.MADE_FILE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    for _ in range(2):
        batches.batches(config, seed=0)
    assert capsys.readouterr().out.count("does not say which weights made it") == 1


def test_a_run_goes_on_without_the_folder_it_came_from(made_by, origins):
    """It was compared when the run began; without weights to compare, only new runs are refused (by the loop)."""
    batches.batches(starting(made_by("A"), origins["moved"]), seed=0)


def test_the_command_refuses_before_it_loads_anything(made_by, origins, tmp_path, capsys):
    config = made_by("random")
    args = [
        "--config=stage1:smoke",
        f"--data.path={config.data.path}",
        f"--train.init_from={origins['A']}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert command.execute(train.main, train.FLAGS, args) == 2
    err = capsys.readouterr().err
    assert "records made by random encoders" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
