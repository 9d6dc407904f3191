"""What a mesh may not change: the step. And where parameters lie. The devices are simulated, in a process of their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from configs import stage1, wan
from configs.errors import RequestError
from configs.run import MeshConfig, ReferenceCache, RunConfig, SamplerConfig
from omnitransfer_jax.mesh import DATA, make_mesh, placed, replicated, specs, to_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.omnitransfer import Conditions, denoise_on, make_reference
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train.objective import Objective
from omnitransfer_jax.train.step import init_state, make_train_step, placed_state
from tests.compare import relative_l2
from tests.devices import xla_flags
from tests.train.tiny_run import EMPTY_TEXT, TINY, batch_of

HERE = Path(__file__).parents[1]
CASES = {"2x4": (2, 4, 1), "4x2_in_two_parts": (4, 2, 2), "8x1": (8, 1, 1)}  # data, context, accumulate


def drawn_params(objective: Objective) -> dict[str, np.ndarray]:
    """Values of every parameter that let no gradient vanish."""
    draw = np.random.default_rng(0).standard_normal
    params = {path: 0.2 * draw(leaf.shape) for path, leaf in {**objective.params, **objective.base}.items()}
    return {path: np.asarray(path.endswith("scale") + x, np.float32) for path, x in params.items()}


def step_on(
    objective: Objective, config: RunConfig, batch, data: int, context: int, accumulate: int
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one step over a whole batch; the optimizer keeps the gradients and does nothing else with them."""
    optimizer = optax.trace(decay=0.0)
    config = replace(config, mesh=MeshConfig(data=data, context=context), optimizer=replace(config.optimizer, accumulate=accumulate))
    mesh, params = make_mesh(config.mesh), drawn_params(objective)
    spec = specs(params, objective.sharding, config.mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, placed_state(objective, config, optimizer, mesh, spec))
    leaves = placed(mesh, dict(objective.base), {path: spec[path] for path in objective.base})
    base = {path: jax.device_put(params.pop(path).astype(leaf.dtype), leaf.sharding) for path, leaf in leaves.items()}
    state = jax.jit(lambda params: init_state(params, objective, config, optimizer), out_shardings=places)(params)
    key = jax.device_put(jax.random.key(1), replicated(mesh))
    step = jax.jit(make_train_step(objective, config, optimizer, mesh, spec), out_shardings=(places, None))
    state, metrics = step(state, to_mesh(batch, mesh), key, base)
    return float(metrics["loss"]), {path: np.asarray(x) for path, x in state.moments.trace.items()}


def differences(objective: Objective, config: RunConfig, batch, cases=CASES) -> dict[str, Any]:
    """For every case, the relative differences to a single device: of the loss, and the largest of a gradient."""
    loss, grads = step_on(objective, config, batch, 1, 1, 1)
    total = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
    alive = [path for path, g in grads.items() if np.linalg.norm(g) > 1e-6 * total]
    report = {}
    for name, case in cases.items():
        other, others = step_on(objective, config, batch, *case)
        report[name] = abs(other - loss) / loss, max(relative_l2(others[path], grads[path]) for path in alive)
    return {"dead": sorted(grads.keys() - alive), "cases": report}


SAMPLED = {"2x4": (2, 4), "1x8": (1, 8), "8x1": (8, 1)}  # data, context; 2 samples do not divide over 8 devices


def sampled(data: int, context: int, cache: ReferenceCache, reach: Literal["all", "same_frame"] = "all") -> Array:
    """Latents of two samples with guidance and references of both families, denoised by a mesh."""
    sampler = SamplerConfig(steps=3, guidance=4.0, reference_cache=cache, skip_unconditional=(0,) if reach == "same_frame" else ())
    config = replace(TINY, dit=replace(TINY.dit, reach=reach), sampler=sampler, mesh=MeshConfig(data=data, context=context))
    params = drawn_params(omnitransfer.objective(config))
    dit = with_params(abstract(lambda rngs: WanDiT(config.dit, rngs=rngs)), {p.removeprefix("dit."): x for p, x in params.items()})
    batch = jax.tree.map(jnp.asarray, batch_of(1, 2))
    noise = jax.random.normal(jax.random.key(2), batch.target.shape)
    reference = make_reference(batch.reference, batch.task, dit.grid(noise))
    negative = jnp.broadcast_to(jnp.asarray(EMPTY_TEXT), batch.text.shape)
    conditions = Conditions(batch.text, negative, batch.image, batch.condition, (reference,))
    return denoise_on(make_mesh(config.mesh), config)(lambda _: dit, conditions, noise)


def sampling() -> dict[str, float]:
    """For every mesh and cache, the relative difference of sampled latents to those of one device."""
    found = {}
    for cache in ("full", "none"):
        single = sampled(1, 1, cache)
        found |= {f"{name} {cache}": relative_l2(sampled(*mesh, cache), single) for name, mesh in SAMPLED.items()}
    frames = sampled(1, 1, "full", "same_frame")
    near = {cache: sampled(2, 4, cache, "same_frame") for cache in ("full", "activations")}
    return found | {f"same frame, {cache}": relative_l2(latents, frames) for cache, latents in near.items()}


def on_eight_devices(module: str) -> dict[str, Any]:
    """What `python -m module` prints in its last line, where there are eight devices."""
    env = os.environ | {"XLA_FLAGS": xla_flags(8)}
    done = subprocess.run([sys.executable, "-m", module], env=env, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sharded_equals_single():
    report = on_eight_devices("tests.test_mesh")
    assert report["dead"] == []  # no gradient vanishes
    assert {name: (loss, gradient) for name, (loss, gradient) in report["cases"].items() if loss > 1e-6 or gradient > 1e-5} == {}
    assert len(report["sampling"]) == 2 * len(SAMPLED) + 2
    assert {name: error for name, error in report["sampling"].items() if error > 1e-5} == {}


PRESETS = {f"wan:{name}": config for name, config in wan.VARIANTS.items()} | {
    f"stage1:{name}": config for name, config in stage1.VARIANTS.items()
}


@pytest.mark.parametrize("data", [1, 16])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_one_place(preset, data):
    objective, mesh = omnitransfer.objective(PRESETS[preset]), MeshConfig(data=data)
    params, found = objective.params, specs(objective.params, objective.sharding, mesh)  # raises for a path with no rule or with two
    assert found.keys() == params.keys()
    for path, spec in found.items():
        assert all(axis is None or params[path].shape[i] % data == 0 for i, axis in enumerate(spec))


def test_nearly_all_of_the_full_size_is_spread():
    objective = omnitransfer.objective(stage1.get_config())
    params, found = objective.params, specs(objective.params, objective.sharding, MeshConfig(data=16))
    whole = sum(leaf.size for path, leaf in params.items() if DATA not in tuple(found[path]))
    assert whole < 2e-3 * sum(leaf.size for leaf in params.values())


@pytest.mark.parametrize("rules", [[], [("a", ("in",))] * 2, [("a", ("in", "out"))]], ids=["none", "two", "rank"])
def test_a_parameter_without_its_rule_is_refused(rules):
    with pytest.raises(ValueError, match="exactly one"):
        specs({"a": jnp.zeros(3)}, rules, MeshConfig())


def test_more_devices_than_there_are():
    with pytest.raises(RequestError, match=r"mesh\.data=64 times mesh\.context=2 is 128 devices"):
        make_mesh(MeshConfig(data=64, context=2))


if __name__ == "__main__":
    eight = replace(TINY, train=replace(TINY.train, batch_size=8))
    report = differences(omnitransfer.objective(eight, EMPTY_TEXT), eight, batch_of(*range(8)))
    print(json.dumps(report | {"sampling": sampling()}))
