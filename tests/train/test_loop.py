"""A run as a whole: resumed it equals one that never stopped, bit for bit; where it starts, how it stops, what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import stage1, stage3
from configs.errors import RequestError
from configs.run import MeshConfig, OptimizerConfig
from omnitransfer_jax.folders import checksums, model_folder, run_folder
from omnitransfer_jax.mesh import make_mesh, specs, to_mesh
from omnitransfer_jax.methods.omnitransfer import objective
from omnitransfer_jax.models.omnitransfer import SHARDING
from omnitransfer_jax.train import incidents, loop, stopping
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import init_state, placed_state
from tests.devices import xla_flags
from tests.train.tiny_run import EMPTY_TEXT, TINY, batches, sample, train

HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run of 8 steps, not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    train(TINY, workdir)
    return workdir


def with_steps(steps, config=TINY):
    return replace(config, train=replace(config.train, steps=steps))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def parts_of_a_run(config):
    """Mesh, optimizer and abstract state."""
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, config.train.steps)
    spec = specs(objective(config).params, SHARDING, config.mesh)
    return mesh, optimizer, placed_state(objective(config), config, optimizer, mesh, spec)


def left_by(workdir, config=TINY) -> dict[str, np.ndarray]:
    """Everything in the latest checkpoint of a run, the batch that would come next, and all losses."""
    _, _, like = parts_of_a_run(config)
    data = batches(config)
    with run_folder.open_checkpoints(workdir, config.checkpoint) as checkpoints:
        state = run_folder.restore(checkpoints, like, data)
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    metrics = {
        name: np.array([line[name] for line in lines(workdir)]) for name in ("step", "loss", "grad_norm", "learning_rate", "skipped")
    }
    return leaves | metrics | {"next": next(data).target}


def assert_same(workdir, other, config=TINY):
    ours, theirs = left_by(workdir, config), left_by(other, config)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def start_process(workdir, *options, devices=1):
    flags = {"XLA_FLAGS": xla_flags(devices)} if devices > 1 else {}  # they are part of what a compiled program is found by
    command = [sys.executable, "-m", "tests.train.tiny_run", str(workdir), *options]
    return subprocess.Popen(command, cwd=HERE, env=os.environ | flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, workdir, step):
    path = workdir / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_workdir_holds_what_is_promised(whole):
    assert [line["step"] for line in lines(whole)] == list(range(1, 9))
    assert saved_steps(whole) == ["6", "8"]  # of 2, 4, 6, 8 the latest two
    assert run_folder.read_config(whole) == TINY
    assert len(list(whole.glob("events.*"))) == 1


def test_resumed_equals_uninterrupted(whole, tmp_path):
    train(with_steps(3), tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()  # as a save that was cut off leaves it
    train(TINY, tmp_path)
    assert_same(tmp_path, whole)
    assert saved_steps(tmp_path) == ["6", "8"]


def test_muon_resumed_equals_uninterrupted(tmp_path):
    muon = replace(TINY, optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2, warmup_steps=2))
    train(muon, tmp_path / "whole")
    train(with_steps(3, muon), tmp_path / "again")
    train(muon, tmp_path / "again")
    assert_same(tmp_path / "again", tmp_path / "whole", muon)


def test_killed_and_stopped_equals_uninterrupted(whole, tmp_path):
    killed = start_process(tmp_path, "milliseconds=100")
    wait_for_step(killed, tmp_path, 3)
    with pytest.raises(RequestError, match=rf"{tmp_path}: a training runs there, process {killed.pid} on host .*, since \d+-.*; wait"):
        train(TINY, tmp_path)
    killed.kill()
    killed.communicate()
    saved = [name for name in saved_steps(tmp_path) if name.isdecimal()]  # beside them may lie what the kill cut off
    assert lines(tmp_path)[-1]["step"] < 8

    stopped = start_process(tmp_path, "milliseconds=100")
    out = []
    with stopped:
        for line in stopped.stdout:
            if line.startswith("step") and not any(each.startswith("step") for each in out):
                stopped.send_signal(signal.SIGTERM)
            out.append(line)
        assert "again to stop at once" in stopped.stderr.read()
    assert stopped.returncode == 0
    going_on = [int(line.split()[-1]) for line in out if "going on after step" in line]
    assert going_on in (
        [],
        [int(step) for step in saved[-1:]],
        [int(step) for step in saved[-2:-1]],
    )  # a save without checksums was cut off
    done = going_on[0] if going_on else 0
    reached = int(out[-1].split()[3])
    assert out[-1] == f"stopped after step {reached} of 8; the same command goes on from there\n"
    assert done < reached < 8
    assert saved_steps(tmp_path)[-1] == str(reached)

    train(TINY, tmp_path)
    assert_same(tmp_path, whole)
    assert saved_steps(tmp_path) == ["6", "8"]  # a save that was cut off left no files


def test_two_processes_stop_together_and_one_goes_on(whole, tmp_path):
    """Two processes of two devices each; which of them receives the signal does not matter."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [f"port={port}", "processes=2", "data=2", "heads=2", "milliseconds=300"]
    both = [start_process(tmp_path, *options, f"process={i}", devices=2) for i in range(2)]
    wait_for_step(both[0], tmp_path, 2)
    both[1].send_signal(signal.SIGTERM)
    last_lines = [process.communicate()[0].splitlines()[-1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    reached = int(saved_steps(tmp_path)[-1])
    assert reached < 8
    last = tmp_path / "checkpoints" / str(reached)
    assert {path.name for path in last.glob("checksums.*")} == {"checksums.0-of-2.json", "checksums.1-of-2.json"}
    files = {str(path.relative_to(last)) for path in last.rglob("*") if path.is_file() and not path.name.startswith("checksums")}
    assert checksums.known(last).keys() == files
    assert checksums.mismatch(last) == ""
    assert last_lines == [f"stopped after step {reached} of 8; the same command goes on from there"] * 2

    train(TINY, tmp_path)
    ours, theirs = left_by(tmp_path), left_by(whole)
    np.testing.assert_array_equal(ours["next"], theirs["next"])
    np.testing.assert_array_equal(ours["step"], theirs["step"])
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)  # a mesh changes rounding, and steps carry it on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_is_not_caught(number):
    before = signal.getsignal(number)
    with stopping.stop_signals() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(2)
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_every_step_draws_anew():
    mesh, optimizer, like = parts_of_a_run(TINY)
    spec = {path: leaf.sharding.spec for path, leaf in like.trainable.items()}
    trained = objective(TINY, EMPTY_TEXT)
    step = jax.jit(loop.make_step(trained, TINY, optimizer, mesh, spec))
    params = {path: np.full(leaf.shape, 0.1, np.float32) for path, leaf in like.trainable.items()}
    batch = to_mesh(next(batches(TINY)), mesh)

    def loss(number, key):
        state = init_state(jax.tree.map(jax.numpy.asarray, params), trained, TINY, optimizer)._replace(step=jax.numpy.int32(number))
        return float(step(state, batch, jax.random.key(key))[1]["loss"])

    assert loss(0, 1) == loss(0, 1)
    assert len({loss(0, 1), loss(1, 1), loss(0, 2)}) == 3


def test_a_finished_run_does_nothing(whole, capsys):
    before = left_by(whole)
    train(TINY, whole)
    assert "8 steps are done, 8 are asked for; raise --train.steps" in capsys.readouterr().out
    assert all(np.array_equal(before[name], value) for name, value in left_by(whole).items())


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("train", {"batch_size": 4}, "--train.batch_size=4: the run in .* was started with 2; give that, or another --workdir"),
        ("optimizer", {"learning_rate": 1.0}, "--optimizer.learning_rate=1.0: .* 0.003"),
        ("dit", {"num_heads": 4}, "--dit.num_heads=4: .* 2"),
    ],
)
def test_another_run_is_refused(whole, part, change, message):
    config = replace(TINY, **{part: replace(getattr(TINY, part), **change)})
    with pytest.raises(RequestError, match=message):
        run_folder.require_same_run(whole, config)


def test_what_may_change(whole):
    config = replace(
        TINY,
        train=replace(TINY.train, steps=99, log_every=7),
        checkpoint=replace(TINY.checkpoint, every=1, keep=9),
        mesh=MeshConfig(data=2),
        dit=replace(TINY.dit, remat="full"),
    )
    run_folder.require_same_run(whole, config)


def test_a_refused_run_is_left_as_it_was(whole):
    before = left_by(whole)
    with pytest.raises(RequestError, match=r"optimizer.b1"):
        train(replace(with_steps(9), optimizer=replace(TINY.optimizer, b1=0.5)), whole)
    assert all(np.array_equal(before[name], value) for name, value in left_by(whole).items())
    assert run_folder.read_config(whole) == TINY


def started(config, workdir):
    """The state a run with this configuration starts from."""
    _, optimizer, like = parts_of_a_run(config)
    with run_folder.open_checkpoints(workdir, config.checkpoint) as checkpoints:
        return loop.start(objective(config), config, workdir, checkpoints, like, optimizer, batches(config))


def test_starts_from_random_weights_of_the_seed(tmp_path):
    one, same, other = (started(replace(TINY, seed=seed), tmp_path / str(i)) for i, seed in enumerate((3, 3, 4)))
    assert all(np.array_equal(x, same.trainable[path]) for path, x in one.trainable.items())
    assert not np.array_equal(one.trainable["dit.head.kernel"], other.trainable["dit.head.kernel"])
    assert all(np.array_equal(x, one.trainable[path]) for path, x in one.ema.items())
    assert (int(one.step), int(one.skipped)) == (0, 0)


def test_starts_from_another_run(whole, tmp_path):
    config = replace(TINY, train=replace(TINY.train, init_from=str(whole), trainable=("dit/head.*",)))
    state = started(config, tmp_path)
    averaged = {name: value for name, value in left_by(whole).items() if name.startswith(".ema")}
    found = state.trainable | state.frozen
    assert averaged.keys() == {f".ema['{path}']" for path in found}
    assert all(np.array_equal(averaged[f".ema['{path}']"], x) for path, x in found.items())
    assert set(state.trainable) == {"dit.head.kernel", "dit.head.bias", "dit.head_modulation"}
    assert int(state.step) == 0


def test_starts_from_imported_weights(tmp_path):
    folder = tmp_path / "imported"
    params = {path: np.full(leaf.shape, i, np.float16) for i, (path, leaf) in enumerate(objective(TINY).params.items())}
    model_folder.save_part(folder, "dit", ((path.removeprefix("dit."), leaf) for path, leaf in params.items()))
    model_folder.write_model(folder, {"dit": TINY.dit})
    state = started(replace(TINY, train=replace(TINY.train, init_from=str(folder))), tmp_path / "run")
    assert all(x.dtype == np.float32 and np.array_equal(x, params[path]) for path, x in state.trainable.items())


def test_the_full_size_does_not_start_from_random_weights(tmp_path):
    with pytest.raises(RequestError, match=r"no weights for dit \(16.4 billion .* python -m launch.import_weights"):
        loop.require_weights(objective(stage1.get_config()), stage1.get_config())
    with pytest.raises(RequestError, match=r"no weights for dit \(16.4 .* and mllm \(3.1 billion .* python -m launch.import_weights"):
        loop.require_weights(objective(stage3.get_config()), stage3.get_config())
    absent = replace(stage3.get_config(), train=replace(TINY.train, init_from=str(tmp_path)))
    with pytest.raises(RequestError, match=r"an empty folder; give --train\.init_from=DIR, a folder of"):
        loop.require_weights(objective(absent), absent)


def test_another_network_is_no_start(whole, tmp_path):
    config = replace(TINY, dit=replace(TINY.dit, num_heads=4), train=replace(TINY.train, init_from=str(whole)))
    with pytest.raises(RequestError, match=r"--dit.num_heads=4: the run in .* has 2"):
        started(config, tmp_path)


def test_sampling_finds_the_average_or_the_weights(whole, tmp_path):
    params = objective(TINY).params
    saved = left_by(whole)
    average = run_folder.load_params(whole, params, dtype="bfloat16")
    assert average.keys() == params.keys()
    assert all(x.dtype == "bfloat16" and np.array_equal(x, saved[f".ema['{path}']"].astype(x.dtype)) for path, x in average.items())
    plain = replace(TINY, train=replace(TINY.train, steps=1, ema=0.0, trainable=("dit/head.*",)))
    state = started(plain, tmp_path)
    with run_folder.open_checkpoints(tmp_path, plain.checkpoint) as checkpoints:
        run_folder.save(checkpoints, 1, state, batches(plain))
    run_folder.write_config(tmp_path, plain)
    found = run_folder.load_params(tmp_path, params)
    assert found.keys() == params.keys()
    assert all(np.array_equal(x, (state.trainable | state.frozen)[path]) for path, x in found.items())


def test_a_run_with_nan_is_neither_sampled_nor_a_start(tmp_path):
    config = replace(TINY, train=replace(TINY.train, steps=1, ema=0.0))
    state = started(config, tmp_path / "run")
    spoilt = {path: leaf.at[:2].set(np.nan) if path == "dit.head.bias" else leaf for path, leaf in state.trainable.items()}
    with run_folder.open_checkpoints(tmp_path / "run", config.checkpoint) as checkpoints:
        run_folder.save(checkpoints, 1, state._replace(trainable=spoilt), batches(config))
    run_folder.write_config(tmp_path / "run", config)
    message = (
        rf"^{tmp_path}/run/checkpoints/1: numbers that are not finite \(NaN or infinity\): dit.head.bias has 2 of 64; move it elsewhere"
    )
    with pytest.raises(RequestError, match=message):
        run_folder.load_params(tmp_path / "run", objective(TINY).params)
    with pytest.raises(RequestError, match=message):
        started(replace(config, train=replace(config.train, init_from=str(tmp_path / "run"))), tmp_path / "next")


def test_sampling_refuses_another_network(whole, tmp_path):
    smaller = replace(TINY, dit=replace(TINY.dit, ffn_dim=16))
    with pytest.raises(RequestError, match=r"not the model of this configuration, 3 of its parameters differ, dit\.blocks\.ffn"):
        run_folder.load_params(whole, objective(smaller).params)
    run_folder.write_config(tmp_path, TINY)
    with pytest.raises(RequestError, match=r"this run has no checkpoint yet"):
        run_folder.load_params(tmp_path, objective(TINY).params)


def test_the_other_parts_are_where_the_first_run_started(tmp_path):
    imported, first, second = (str(tmp_path / name) for name in ("imported", "first", "second"))
    run_folder.write_config(first, replace(TINY, train=replace(TINY.train, init_from=imported)))
    run_folder.write_config(second, replace(TINY, train=replace(TINY.train, init_from=first)))
    assert run_folder.imported_weights(second) == imported
    run_folder.write_config(first, TINY)
    assert run_folder.imported_weights(second) == ""
    assert run_folder.imported_weights(imported) == imported


def test_paths_in_the_workdir_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = replace(TINY, train=replace(TINY.train, init_from="weights"), data=replace(TINY.data, path="records"))
    found = loop.with_absolute_paths(config)
    assert (found.train.init_from, found.data.path) == (str(tmp_path / "weights"), str(tmp_path / "records"))
    assert loop.with_absolute_paths(TINY) == TINY


def test_a_field_of_another_version_is_named(whole, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY) | {"colour": 3}))
    with pytest.raises(RequestError, match=r"config.json: colour of Config is unknown"):
        run_folder.read_config(tmp_path)
    with pytest.raises(RequestError, match=r"no training run, config.json is absent"):
        run_folder.read_config(tmp_path / "nowhere")


def test_updates_that_are_not_finite_end_the_run(tmp_path):
    config = with_steps(40)

    def broken(i):
        return sample(i) | {"target": np.full_like(sample(i)["target"], np.nan)}

    with pytest.raises(FloatingPointError, match=r"step 10: .* 10 times in a row; the weights are those of step 0"):
        train(config, tmp_path, broken)
    assert [(line["step"], line["loss"], line["skipped"]) for line in lines(tmp_path)] == [(n, None, n) for n in range(1, 11)]
    state = left_by(tmp_path, config)
    assert all(np.array_equal(x, state[name.replace("ema", "trainable")]) for name, x in state.items() if name.startswith(".ema"))


def test_only_failures_in_a_row_count(tmp_path):
    def metrics(skipped):
        return {"loss": 1.0, "grad_norm": 1.0, "skipped": skipped}

    found = incidents.Incidents(tmp_path, 0, 5)
    for step in range(1, 60):
        found.watch(step, metrics(5 + step - step // 10), True)  # nine of ten fail
    found = incidents.Incidents(tmp_path, 0, 5)
    for step in range(1, 10):
        found.watch(step, metrics(5 + step), True)
    with pytest.raises(FloatingPointError):
        found.watch(10, metrics(15), True)
