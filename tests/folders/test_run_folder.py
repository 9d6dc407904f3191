"""A run's folder: the configuration comes back with the name of its training, and says what may not change."""

import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, NamedTuple

import grain
import numpy as np
import pytest

from configs import mllm, stage1, stage2, vae
from configs.errors import RequestError
from configs.run import CheckpointConfig, OptimizerConfig, RunConfig
from omnitransfer_jax.folders import run_folder

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
        (replace(SMOKE, dit=replace(SMOKE.dit, references="joint")), "--dit.references='joint'"),
        (replace(SMOKE, data=replace(SMOKE.data, reference=replace(SMOKE.data.reference, fps=9))), "--data.reference.fps=9"),
    ],
)
def test_a_run_goes_on_as_it_was_started(tmp_path, config, message):
    run_folder.write_config(tmp_path, SMOKE)
    with pytest.raises(RequestError, match=message):
        run_folder.require_same_run(tmp_path, config)


def test_run_fields_may_change(tmp_path):
    run_folder.write_config(tmp_path, SMOKE)
    longer = replace(SMOKE, train=replace(SMOKE.train, steps=99, log_every=3), dit=replace(SMOKE.dit, remat="full"))
    run_folder.require_same_run(tmp_path, longer)


def test_the_steps_of_a_falling_rate_may_not_change(tmp_path):
    falling = replace(SMOKE, optimizer=OptimizerConfig(schedule="cosine"))
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
