"""A run's folder: the configuration comes back with the name of its training, and says what may not change."""

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, NamedTuple

import grain
import numpy as np
import pytest

from configs import mllm, stage1, stage2, vae
from configs.errors import RequestError
from configs.run import CheckpointConfig, OptimizerConfig, RunConfig
from launch import command as launch_command
from launch import export, sample
from omnitransfer_jax import load_models
from omnitransfer_jax.folders import model_folder, run_folder

SMOKE = stage1.get_config("smoke")


@dataclass(frozen=True, kw_only=True)
class Toy(RunConfig):
    """A training that run_folder.py has no entry for."""

    training: ClassVar[str] = "toy"


def started_from(config, folder):
    return replace(config, train=replace(config.train, init_from=str(folder)))


@pytest.mark.parametrize("config", [SMOKE, stage2.get_config("smoke"), vae.TINY, mllm.TINY, Toy()])
def test_the_configuration_of_any_training_comes_back(tmp_path, config):
    run_folder.write_config(tmp_path, config)
    assert run_folder.read_config(tmp_path, type(config)) == config
    run_folder.require_same_run(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["training"] == config.training


@pytest.mark.parametrize(
    ("wrote", "reads", "message"),
    [
        (vae.TINY, SMOKE, r"a run of the autoencoder's training; give one of the transformer's, made with --config=stage1, "),
        (mllm.TINY, SMOKE, r"a run of the language model's training; give one of the transformer's"),
        (SMOKE, vae.TINY, r"a run of the transformer's training; give one of the autoencoder's, made with --config=vae"),
        (Toy(), SMOKE, r"a run of the toy's training; give one of the transformer's"),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_run_of_another_training_is_named(tmp_path, wrote, reads, message, named):
    run_folder.write_config(tmp_path, wrote)
    if not named and wrote.training != "toy":  # as earlier versions wrote it
        (tmp_path / "config.json").write_text(json.dumps(asdict(wrote)))
    for read in (run_folder.read_config, lambda folder, of: run_folder.require_same_run(folder, reads)):
        with pytest.raises(RequestError, match=f"{tmp_path}: {message}"):
            read(tmp_path, type(reads))


def test_imported_weights_are_found_behind_runs_of_any_training(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run_folder.write_config(first, started_from(SMOKE, "imported"))
    run_folder.write_config(second, started_from(Toy(), first))
    run_folder.write_config(third, started_from(SMOKE, second))
    assert [run_folder.imported_weights(str(folder)) for folder in (first, second, third)] == ["imported"] * 3
    run_folder.write_config(first, started_from(mllm.TINY, "encoders"))
    assert run_folder.imported_weights(str(first), mllm.MLLMTraining) == "encoders"
    with pytest.raises(RequestError, match="a run of the language model's training"):
        run_folder.imported_weights(str(first))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(SMOKE, seed=1), r"--seed=1: the run in .* was started with 0; give that, or another --workdir"),
        (replace(SMOKE, dit=replace(SMOKE.dit, dtype="bfloat16")), "--dit.dtype='bfloat16'"),
        (replace(SMOKE, dit=replace(SMOKE.dit, references="bidirectional")), "--dit.references='bidirectional'"),
        (replace(SMOKE, data=replace(SMOKE.data, reference=replace(SMOKE.data.reference, fps=9))), "--data.reference.fps=9"),
    ],
)
def test_a_run_goes_on_as_it_was_started(tmp_path, config, message):
    run_folder.write_config(tmp_path, SMOKE)
    with pytest.raises(RequestError, match=message):
        run_folder.require_same_run(tmp_path, config)


def test_run_fields_may_change(tmp_path):
    run_folder.write_config(tmp_path, SMOKE)
    longer = replace(SMOKE, train=replace(SMOKE.train, steps=99, log_every=3), dit=replace(SMOKE.dit, remat="full", references="joint"))
    run_folder.require_same_run(tmp_path, longer)


def field(config, name, value):
    """`config` with the field of this dotted name set."""
    part, _, rest = name.partition(".")
    return replace(config, **{part: field(getattr(config, part), rest, value) if rest else value})


ALIGNED = stage2.get_config("smoke")
OTHER_FUNCTIONS = [
    (SMOKE, "dit.references", "bidirectional"),
    (SMOKE, "dit.offsets", "frames"),
    (SMOKE, "dit.num_heads", 4),
    (SMOKE, "dit.rope_top", 2.0),
    (SMOKE, "dit.eps", 1e-5),
    (SMOKE, "dit.text_len", 64),
    (SMOKE, "vae.latents_mean", (0.0,) * 16),
    (SMOKE, "text.relative_max_distance", 64),
    (SMOKE, "image.num_heads", 4),
    (SMOKE, "alignment.enabled", True),
    (ALIGNED, "alignment.enabled", False),
    (ALIGNED, "alignment.into", "blocks"),
    (ALIGNED, "alignment.frames", 3),
    (ALIGNED, "lora.alpha", 8.0),
    (ALIGNED, "mllm.rope_theta", 1e4),
]


@pytest.mark.parametrize(("config", "name", "value"), OTHER_FUNCTIONS)
def test_a_run_is_used_as_the_function_it_was_trained_to_be(tmp_path, config, name, value):
    run_folder.write_config(tmp_path, config)
    run_folder.require_same_function(str(tmp_path), config)
    with pytest.raises(RequestError, match=rf"^--{name}=.*: the run in .* has .*; give its --config, or --{name}="):
        run_folder.require_same_function(str(tmp_path), field(config, name, value))


@pytest.mark.parametrize(("config", "name", "value"), OTHER_FUNCTIONS)
@pytest.mark.parametrize("command", [sample, export])
def test_no_command_uses_a_run_as_another_function(tmp_path, capsys, monkeypatch, command, config, name, value):
    """The whole command: an error before anything is loaded."""
    workdir, out = tmp_path / "run", tmp_path / "out.mp4"
    run_folder.write_config(workdir, config)
    monkeypatch.setattr(load_models, "_load", None)
    monkeypatch.setattr(run_folder, "load_params", None)
    stage = "stage2" if config is ALIGNED else "stage1"
    given = [*map(str, value)] if isinstance(value, tuple) else [str(value)]
    args = [f"--config={stage}:smoke", f"--checkpoint={workdir}", f"--out={out}", f"--{name}", *given]
    assert launch_command.execute(command.main, command.FLAGS, args) == 2
    assert f"the run in {workdir} has" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dit.references", "joint"),
        ("dit.dtype", "bfloat16"),
        ("dit.attention", "chunked"),
        ("vae.encode_frames", 8),
        ("video.frames", 5),
        ("sampler.steps", 3),
        ("seed", 7),
        ("alignment.queries", 4),  # without the alignment
    ],
)
def test_what_leaves_the_function_alone_may_change(tmp_path, name, value):
    run_folder.write_config(tmp_path, SMOKE)
    run_folder.require_same_function(str(tmp_path), field(SMOKE, name, value))


def test_a_training_may_start_from_weights_of_another_method(tmp_path):
    """As the rows of benchmarks.ablation do; the model itself stays."""
    run_folder.write_config(tmp_path / "run", SMOKE)
    model_folder.write_model(tmp_path / "model", {"dit": SMOKE.dit, "vae": SMOKE.vae})
    for other in (field(SMOKE, "dit.references", "bidirectional"), field(SMOKE, "dit.offsets", "frames")):
        run_folder.require_same_model(tmp_path / "run", other)
        assert model_folder.require_model(tmp_path / "model", other) == ("dit", "vae")
        with pytest.raises(RequestError, match=r"made with dit\.(references|offsets)="):
            run_folder.require_same_function(str(tmp_path / "model"), other)
    run_folder.require_same_model(tmp_path / "run", ALIGNED)
    for name, value in (("dit.rope_base", 20.0), ("vae.latents_std", (1.0,) * 16), ("dit.num_heads", 4)):
        with pytest.raises(RequestError, match=f"--{name}="):
            run_folder.require_same_model(tmp_path / "run", field(SMOKE, name, value))


def test_a_run_behind_a_base_of_another_method_is_used(tmp_path):
    """The transformer is the run's own; the method of the base that it started from does not matter."""
    model_folder.write_model(tmp_path / "base", {"dit": SMOKE.dit, "vae": SMOKE.vae})
    joint = started_from(field(SMOKE, "dit.references", "bidirectional"), tmp_path / "base")
    run_folder.write_config(tmp_path / "run", joint)
    run_folder.require_same_function(str(tmp_path / "run"), joint)


def test_a_run_goes_on_with_the_same_records_wherever_they_are(tmp_path):
    def at(path):
        return replace(SMOKE, data=replace(SMOKE.data, path=path))

    run_folder.write_config(tmp_path, at("here"), "digest")
    assert run_folder.read_config(tmp_path) == at("here")
    run_folder.require_same_run(tmp_path, at("elsewhere"), "digest")
    with pytest.raises(RequestError, match=r"started with other records than --data\.path has now"):
        run_folder.require_same_run(tmp_path, at("here"), "other")
    run_folder.write_config(tmp_path, at("here"))  # as earlier versions did
    run_folder.require_same_run(tmp_path, at("here"), "digest")
    with pytest.raises(RequestError, match=r"--data\.path='elsewhere': the run in .* was started with 'here'"):
        run_folder.require_same_run(tmp_path, at("elsewhere"), "digest")


@pytest.mark.parametrize("content", ["", '{"training": "transfer", "dit": {"di', "[1]", "3", "[" * 100_000])
def test_a_cut_configuration_is_one_short_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for read in (run_folder.read_config, run_folder.training_of, lambda folder: run_folder.imported_weights(str(folder))):
        with pytest.raises(RequestError, match=rf"^{tmp_path}/config.json: .* JSON.*; restore it from a copy") as error:
            read(tmp_path)
        assert len(str(error.value)) < 300
    (tmp_path / "config.json").write_text('{"training": "transfer", "dit": 3}')
    with pytest.raises(RequestError, match=r"config.json: dit: 3 is no DiTConfig; use the one that wrote it"):
        run_folder.read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dit.num_layers", "2", "dit: num_layers='2': a whole number; use the one that wrote it"),
        ("dit.patch", [1, 2], r"dit: patch=\[1, 2\]: a list of 3, each a whole number"),
        ("dit.references", "sideways", "dit: references='sideways': one of split, joint, bidirectional"),
        ("dit.image_dim", True, "dit: image_dim=True: a whole number or null"),
        ("vae.latents_mean", ["0"] * 16, r"vae: latents_mean=\[.*: a list, each a number"),
        ("optimizer.learning_rate", None, "optimizer: learning_rate=None: a number"),
        ("train", [], r"train.init_from=None: a text; restore it|train: \[\] is no TransferTrainConfig"),
        ("train.init_from", 5, "train.init_from=5: a text; restore it|train: init_from=5: a text"),
        ("training", ["transfer"], r"training=\['transfer'\]: a text"),
        ("data_digest", 7, "data_digest=7: a text"),
        ("origin_digest", {}, "origin_digest={}: a text"),
        ("colour", 3, "colour of Config is unknown to this version"),
    ],
)
def test_a_damaged_configuration_names_its_file_and_field(tmp_path, name, value, message):
    """Whatever reads the run: going on, the next stage, sampling, export."""
    run_folder.write_config(tmp_path, SMOKE, "data", "weights")
    content = json.loads((tmp_path / "config.json").read_text())
    *parts, last = name.split(".")
    inner = content[parts[0]] if parts else content
    inner[last] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=rf"^{tmp_path}/config.json: ({message})"):
        run_folder.require_same_run(tmp_path, SMOKE)
    with pytest.raises(RequestError, match=rf"^{tmp_path}/config.json: ({message})"):
        run_folder.require_same_function(str(tmp_path), SMOKE)


def mutated(whole, draw):
    """Bytes that were cut off, have one flipped bit, or have another value for one field."""
    at = draw.randrange(len(whole))
    match draw.choice(["cut", "flip", "value"]):
        case "cut":
            return whole[:at]
        case "flip":
            return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
    lines = whole.split(b"\n")
    number = draw.randrange(len(lines))
    lines[number] = lines[number].partition(b":")[0] + draw.choice([b": null,", b": [],", b': "x",', b": {},", b": -1,", b": 1e999,"])
    return b"\n".join(lines)


def use_of(workdir, config):
    run_folder.require_same_function(str(workdir), config)


@pytest.mark.parametrize("use", [run_folder.require_same_run, use_of])
def test_no_mutation_of_a_configuration_is_a_traceback(tmp_path, use):
    """300 seeded ones: each is read, or refused in one short line that names the folder."""
    draw, refusals, path = random.Random(0), [], tmp_path / "config.json"
    run_folder.write_config(tmp_path, ALIGNED, "data", "weights")
    whole = path.read_bytes()
    for _ in range(300):
        path.write_bytes(mutated(whole, draw))
        try:
            use(tmp_path, ALIGNED)
        except RequestError as error:
            refusals.append(str(error))
    assert len(refusals) > 150
    assert [text for text in refusals if str(tmp_path) not in text or len(text) > 700] == []


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_steps_of_a_falling_rate_may_not_change(tmp_path, schedule):
    falling = replace(SMOKE, optimizer=OptimizerConfig(schedule=schedule))
    run_folder.write_config(tmp_path, falling)
    run_folder.require_same_run(tmp_path, falling)
    with pytest.raises(RequestError, match=r"--train.steps=99: the run in .* was started with 60"):
        run_folder.require_same_run(tmp_path, replace(falling, train=replace(falling.train, steps=99)))


class State(NamedTuple):
    """A state as train/step.py has it; any other order of its fields would make old checkpoints unreadable."""

    step: np.ndarray
    trainable: dict
    frozen: dict
    moments: dict
    ema: dict
    skipped: np.ndarray


def test_a_state_comes_back_with_the_position_in_the_data(tmp_path):
    def read():
        return iter(grain.MapDataset.range(10).to_iter_dataset())

    data, number = read(), np.array(2)
    state = State(number, {"a": np.ones(2)}, {}, {"mu": np.zeros(3)}, {}, number)
    next(data)
    with run_folder.open_checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        run_folder.save(checkpoints, 2, state, data)
    assert {path.name for path in run_folder.latest(tmp_path).iterdir()} >= {"trainable", "progress", "data"}
    again = read()
    with run_folder.open_checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        found = run_folder.restore(checkpoints, state, again)
    assert next(again) == 1
    assert (found.frozen, found.ema, int(found.step), int(found.skipped)) == ({}, {}, 2, 2)
    np.testing.assert_array_equal(found.trainable["a"], state.trainable["a"])
    np.testing.assert_array_equal(found.moments["mu"], state.moments["mu"])
