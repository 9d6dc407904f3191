"""What a mesh may not change: the step. And where parameters lie. The devices are simulated, in a process of their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import stage1, wan
from configs.errors import RequestError
from configs.run import MeshConfig
from omnitransfer_jax.mesh import DATA, make_mesh, shardings, specs
from omnitransfer_jax.models.omnitransfer import SHARDING
from omnitransfer_jax.train.loop import to_mesh
from omnitransfer_jax.train.step import abstract_params, abstract_state, init_state, make_train_step
from tests.compare import relative_l2
from tests.devices import xla_flags
from tests.train.tiny_run import EMPTY_TEXT, TINY, sample

HERE = Path(__file__).parents[1]
CASES = {"2x4": (2, 4, 1), "4x2_in_two_parts": (4, 2, 2), "8x1": (8, 1, 1)}  # data, context, accumulate


def step_on(data: int, context: int, accumulate: int) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one step over a batch of 8; the optimizer keeps the gradients and does nothing else with them."""
    optimizer = optax.trace(decay=0.0)
    config = replace(
        TINY,
        train=replace(TINY.train, batch_size=8),
        mesh=MeshConfig(data=data, context=context),
        optimizer=replace(TINY.optimizer, accumulate=accumulate),
    )
    mesh = make_mesh(config.mesh)
    spec = specs(abstract_params(config), SHARDING, data)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh, spec, optimizer))
    draw = np.random.default_rng(0).standard_normal
    params = {path: 0.2 * draw(leaf.shape) for path, leaf in abstract_params(config).items()}
    params = {path: np.asarray(path.endswith("scale") + x, np.float32) for path, x in params.items()}
    state = jax.jit(lambda params: init_state(params, config, optimizer), out_shardings=places)(params)
    batch = to_mesh({name: np.stack([sample(i)[name] for i in range(8)]) for name in sample(0)}, mesh)
    key, empty = jax.device_put((jax.random.key(1), EMPTY_TEXT), NamedSharding(mesh, P()))
    state, metrics = jax.jit(make_train_step(config, mesh, spec, optimizer), out_shardings=(places, None))(state, batch, key, empty)
    return float(metrics["loss"]), {path: np.asarray(x) for path, x in state.moments.trace.items()}


def compare() -> None:
    """Prints, for every case, the relative differences to a single device: of the loss, and the largest of a gradient."""
    loss, grads = step_on(1, 1, 1)
    total = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
    alive = [path for path, g in grads.items() if np.linalg.norm(g) > 1e-6 * total]
    report = {}
    for name, case in CASES.items():
        other, others = step_on(*case)
        report[name] = abs(other - loss) / loss, max(relative_l2(others[path], grads[path]) for path in alive)
    print(json.dumps({"leaves": len(grads), "alive": len(alive), "cases": report}))


def test_sharded_equals_single():
    env = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run([sys.executable, "-m", "tests.test_mesh"], env=env, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["alive"] == report["leaves"]  # no gradient vanishes
    assert {name: (loss, gradient) for name, (loss, gradient) in report["cases"].items() if loss > 1e-6 or gradient > 1e-5} == {}


PRESETS = {f"wan:{name}": config for name, config in wan.VARIANTS.items()} | {
    f"stage1:{name}": config for name, config in stage1.VARIANTS.items()
}


@pytest.mark.parametrize("data", [1, 16])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_one_place(preset, data):
    params = abstract_params(PRESETS[preset])
    found = specs(params, SHARDING, data)  # raises for a path with no rule or with two
    assert found.keys() == params.keys()
    for path, spec in found.items():
        assert all(axis is None or params[path].shape[i] % data == 0 for i, axis in enumerate(spec))


def test_nearly_all_of_the_full_size_is_spread():
    params = abstract_params(stage1.get_config())
    found = specs(params, SHARDING, 16)
    whole = sum(leaf.size for path, leaf in params.items() if DATA not in tuple(found[path]))
    assert whole < 2e-3 * sum(leaf.size for leaf in params.values())


@pytest.mark.parametrize("rules", [[], [("a", ("in",))] * 2, [("a", ("in", "out"))]], ids=["none", "two", "rank"])
def test_a_parameter_without_its_rule_is_refused(rules):
    with pytest.raises(ValueError, match="exactly one"):
        specs({"a": jnp.zeros(3)}, rules, 1)


def test_more_devices_than_there_are():
    with pytest.raises(RequestError, match=r"mesh\.data=64 times mesh\.context=2 is 128 devices"):
        make_mesh(MeshConfig(data=64, context=2))


def test_shardings_are_of_the_mesh():
    mesh = make_mesh(MeshConfig())
    assert shardings(mesh, {"a": P(DATA)})["a"] == NamedSharding(mesh, P(DATA))


if __name__ == "__main__":
    compare()
