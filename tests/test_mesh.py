"""What a mesh may not change: the step. And where parameters lie. The devices are simulated, in a process of their own.

The quick tests take some meshes of eight devices; all of them, with stages 1 and 3, and their figures are

    python -m pytest -o faulthandler_timeout=0 -s -m slow -n 0 tests/test_mesh.py
"""

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

from configs import stage1, stage3, wan
from configs.errors import RequestError
from configs.run import Config, MeshConfig, ReferenceCache, RunConfig, SamplerConfig, VideoConfig
from omnitransfer_jax.batch import Batch, batch_spec
from omnitransfer_jax.mesh import axes_of, make_mesh, placed, replicated, specs, to_mesh
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.omnitransfer import Conditions, denoise_on, make_reference
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.train.objective import Objective
from omnitransfer_jax.train.step import init_state, make_train_step, placed_state
from tests.compare import relative_l2
from tests.devices import xla_flags
from tests.train.tiny_run import EMPTY_TEXT, TINY

HERE = Path(__file__).parents[1]
# An 80 x 32 target has 20 tokens and a 48 x 32 reference 12: over 8 devices both are uneven.
WIDE = replace(
    TINY,
    dit=replace(TINY.dit, dim=48, num_heads=4),
    video=VideoConfig(frames=5, height=32, width=80),
    data=replace(TINY.data, reference=VideoConfig(frames=5, height=32, width=48)),
    train=replace(TINY.train, batch_size=8),
)
CASES = {  # the mesh, and in how many parts a batch is computed
    "all": (MeshConfig(data=2, heads=2, keys=2), 1),
    "slices, in two parts": (MeshConfig(slices=2, data=2, heads=2), 2),
    "tokens": (MeshConfig(heads=4, keys=2), 1),
    "keys": (MeshConfig(keys=8), 1),
    "data": (MeshConfig(data=8), 1),
}
ALL = [MeshConfig(slices=s, data=d, heads=h, keys=8 // s // d // h)
       for s in (1, 2, 4, 8) for d in (1, 2, 4, 8) for h in (1, 2, 4) if 8 % (s * d * h) == 0]  # fmt: skip


def drawn_params(objective: Objective) -> dict[str, np.ndarray]:
    """Values of every parameter that let no gradient vanish."""
    draw = np.random.default_rng(0).standard_normal
    params = {path: 0.2 * draw(leaf.shape) for path, leaf in {**objective.params, **objective.base}.items()}
    return {path: np.asarray(path.endswith("scale") + x, np.float32) for path, x in params.items()}


def samples(config: Config, count: int) -> Batch:
    """A batch of whatever fields the configuration's records have, drawn alike."""

    def fill(index: int, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        draw, name, shape = np.random.default_rng(index), path[-1].name, (count, *leaf.shape[1:])
        if name == "mask":
            return np.ones(shape, bool)
        if name == "positions":
            return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
        if np.issubdtype(leaf.dtype, np.integer):  # tasks, tokens, and the features that replace some tokens: -1 for none
            return draw.integers(0, 5, shape, leaf.dtype) - (name == "source")
        return draw.integers(0, 2, shape).astype(leaf.dtype) if name == "has_image" else draw.standard_normal(shape).astype(leaf.dtype)

    leaves, tree = jax.tree_util.tree_flatten_with_path(batch_spec(config))
    return jax.tree.unflatten(tree, [fill(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


def step_on(
    objective: Objective, config: RunConfig, batch, mesh_config: MeshConfig, accumulate: int
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one step over a whole batch; the optimizer keeps the gradients and does nothing else with them."""
    optimizer = optax.trace(decay=0.0)
    config = replace(config, mesh=mesh_config, optimizer=replace(config.optimizer, accumulate=accumulate))
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
    loss, grads = step_on(objective, config, batch, MeshConfig(), 1)
    total = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
    alive = [path for path, g in grads.items() if np.linalg.norm(g) > 1e-6 * total]
    report = {}
    for name, case in cases.items():
        other, others = step_on(objective, config, batch, *case)
        report[name] = abs(other - loss) / loss, max(relative_l2(others[path], grads[path]) for path in alive)
    return {"dead": sorted(grads.keys() - alive), "cases": report}


SAMPLED = {  # 2 samples do not divide over 8 devices
    "all": MeshConfig(data=2, heads=2, keys=2),
    "tokens": MeshConfig(heads=4, keys=2),
    "data": MeshConfig(data=8),
}


def sampled(mesh: MeshConfig, cache: ReferenceCache, reach: Literal["all", "same_frame"] = "all") -> Array:
    """Latents of two samples with guidance and references of both families, denoised by a mesh."""
    sampler = SamplerConfig(steps=3, guidance=4.0, reference_cache=cache, skip_unconditional=(0,) if reach == "same_frame" else ())
    config = replace(WIDE, dit=replace(WIDE.dit, reach=reach), sampler=sampler, mesh=mesh)
    params = drawn_params(omnitransfer.objective(config))
    dit = with_params(abstract(lambda rngs: WanDiT(config.dit, rngs=rngs)), {p.removeprefix("dit."): x for p, x in params.items()})
    batch = jax.tree.map(jnp.asarray, samples(WIDE, 2))
    noise = jax.random.normal(jax.random.key(2), batch.target.shape)
    reference = make_reference(batch.reference, batch.task, dit.grid(noise))
    negative = jnp.broadcast_to(jnp.asarray(EMPTY_TEXT), batch.text.shape)
    conditions = Conditions(batch.text, negative, batch.image, batch.condition, (reference,))
    return denoise_on(make_mesh(config.mesh), config)(lambda _: dit, conditions, noise)


def sampling() -> dict[str, float]:
    """For every mesh and cache, the relative difference of sampled latents to those of one device."""
    found = {}
    for cache in ("full", "none"):
        single = sampled(MeshConfig(), cache)
        found |= {f"{name} {cache}": relative_l2(sampled(mesh, cache), single) for name, mesh in SAMPLED.items()}
    frames = sampled(MeshConfig(), "full", "same_frame")
    near = {cache: sampled(SAMPLED["tokens"], cache, "same_frame") for cache in ("full", "activations")}
    return found | {f"same frame, {cache}": relative_l2(latents, frames) for cache, latents in near.items()}


def on_eight_devices(module: str, *args: str) -> dict[str, Any]:
    """What `python -m module` prints in its last line, where there are eight devices."""
    env = os.environ | {"XLA_FLAGS": xla_flags(8)}
    done = subprocess.run([sys.executable, "-m", module, *args], env=env, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_one_step(report: dict[str, Any]) -> None:
    """Every mesh has the loss and the gradients of one device."""
    assert report["dead"] == []  # no gradient vanishes
    assert {name: (loss, gradient) for name, (loss, gradient) in report["cases"].items() if loss > 1e-6 or gradient > 1e-5} == {}


def test_sharded_equals_single():
    report = on_eight_devices("tests.test_mesh", "stage1")
    assert_one_step(report)
    assert len(report["sampling"]) == 2 * len(SAMPLED) + 2
    assert {name: error for name, error in report["sampling"].items() if error > 1e-5} == {}


def test_the_language_model_is_sharded_too():
    report = on_eight_devices("tests.test_mesh", "stage3")
    assert_one_step(report)
    assert len(report["cases"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_every_mesh_of_eight_devices(stage):
    report = on_eight_devices("tests.test_mesh", stage, "all")
    print(stage, json.dumps(report["cases"], indent=1))
    assert_one_step(report)
    assert len(report["cases"]) == len(ALL) == 19


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


def test_an_axis_is_spread_over_what_divides_it():
    mesh, rules = MeshConfig(data=2, heads=4, keys=3), [("a", ("in", "out"))]

    def place(size):
        return specs({"a": jnp.zeros((size, 5))}, rules, mesh)["a"][0]

    assert place(24) == ("data", "heads", "keys")
    assert place(8) == ("data", "heads")
    assert place(6) == ("data", "keys")
    assert place(5) is None


def test_nearly_all_of_the_full_size_is_spread():
    objective = omnitransfer.objective(stage1.get_config())
    params, found = objective.params, specs(objective.params, objective.sharding, MeshConfig(data=16, heads=8, keys=2))
    whole = sum(leaf.size for path, leaf in params.items() if axes_of(found[path]) != ("data", "heads", "keys"))
    assert whole < 2e-3 * sum(leaf.size for leaf in params.values())


@pytest.mark.parametrize("rules", [[], [("a", ("in",))] * 2, [("a", ("in", "out"))]], ids=["none", "two", "rank"])
def test_a_parameter_without_its_rule_is_refused(rules):
    with pytest.raises(ValueError, match="exactly one"):
        specs({"a": jnp.zeros(3)}, rules, MeshConfig())


def test_more_devices_than_there_are():
    with pytest.raises(RequestError, match=r"mesh\.data=64 times mesh\.heads=2 is 128 devices"):
        make_mesh(MeshConfig(data=64, heads=2))


def test_heads_that_do_not_divide():
    with pytest.raises(RequestError, match=r"mesh\.heads=16: a divisor of dit\.num_heads=40"):
        replace(stage1.get_config(), mesh=MeshConfig(heads=16)).validate()


def report_of(stage: str, everything: bool) -> dict[str, Any]:
    """The differences of a stage's step."""
    config = WIDE
    if stage == "stage3":
        smoke = stage3.get_config("smoke")
        alignment, mllm = replace(smoke.alignment, queries=3, connector_dim=16, prompt_tokens=9), replace(smoke.mllm, num_layers=2)
        config = replace(WIDE, alignment=alignment, mllm=mllm, lora=smoke.lora, train=replace(smoke.train, batch_size=8))
    cases = {str(mesh): (mesh, 1) for mesh in ALL} if everything else CASES if stage == "stage1" else {"all": CASES["all"]}
    return differences(omnitransfer.objective(config, EMPTY_TEXT), config, samples(config, 8), cases)


if __name__ == "__main__":
    report = report_of(sys.argv[1], "all" in sys.argv)
    print(json.dumps(report if "all" in sys.argv or sys.argv[1] == "stage3" else report | {"sampling": sampling()}))
