"""NaN and infinities in everything that a step reads and computes: the state stays as it was, bit for bit, and the next step goes on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tortures import tiny
from tortures.outcome import Outcome
from tortures.processes import Job

VALUES = ("nan", "inf", "-inf")
FIELDS = ("target", "text", "reference", "condition", "image")
LOSS = "the loss"


def not_finite(folder: Path, count: int) -> Outcome:
    """Values in latents, text and picture of one sample, in the gradient of one parameter, in the loss; on one device and on one of two,
    whole batches and in two parts."""
    data, failures, done = tiny.write_records(folder / "records", (9, 3)), [], 0
    setups = [(1, 1), (2, 1), (1, 2), (2, 2)]
    for number, (devices, parts) in enumerate(setups):
        share = count // len(setups) + (number < count % len(setups))
        if not share:
            continue
        with Job(poisoned, str(data), devices, parts, share, log=folder / "job.log", devices=devices) as job:
            code = job.wait(600)
            lines = [json.loads(line) for line in job.output.splitlines() if line.startswith('{"case"')]
        done += len(lines)
        failures += [f"{devices} devices, {parts} parts, {line['case']}: {line['trouble']}" for line in lines if line["trouble"]]
        if code or len(lines) != share:
            failures.append(f"{devices} devices, {parts} parts: code {code}, {len(lines)} of {share} cases: {job.output[-500:]}")
    return Outcome(done, failures, "1 and 2 devices, 1 and 2 parts of a batch")


def poisoned(data: str, devices: int, parts: int, count: int) -> None:
    """Prints a line for each case. The state is that after a good step; after a bad one follows a good one, which must be applied."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec

    from configs.run import MeshConfig
    from data_pipelines.batches import batches, empty_text
    from omnitransfer_jax.mesh import make_mesh, specs, to_mesh
    from omnitransfer_jax.methods import omnitransfer
    from omnitransfer_jax.train import loop
    from omnitransfer_jax.train.optimizer import make_optimizer
    from omnitransfer_jax.train.step import init_state

    found = tiny.config()
    config = replace(
        found,
        data=replace(found.data, path=data),
        train=replace(found.train, batch_size=4, ema=0.9),
        mesh=MeshConfig(data=devices),
        optimizer=replace(found.optimizer, accumulate=parts),
    )
    plain = omnitransfer.objective(config, empty_text(config))
    leaves = sorted(plain.params)
    objective = replace(plain, **with_poison(plain, leaves))
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer, 60)
    spec = {**specs({**objective.params, **objective.base}, objective.sharding, config.mesh)}
    step = jax.jit(loop.make_step(objective, config, optimizer, mesh, spec))
    key, source, clean = objective.root_key(), batches(config, seed=0), jnp.zeros(len(leaves) + 1)
    good = next(source)

    def run(state: Any, batch: Any, poison: Any) -> tuple[Any, Any]:
        return step(state, to_mesh(batch, mesh), key, {"poison.all": poison})

    def digests(state: Any) -> Any:
        kept = state._replace(step=0, skipped=0)
        return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(kept)]

    del PartitionSpec
    state, _ = run(init_state(objective.init(), objective, config, optimizer), good, clean)
    before = digests(state)
    assert digests(run(state, good, clean)[0]) != before
    for name, batch, poison in cases(good, leaves, np.asarray(clean), count):
        after, metrics = run(state, batch, jnp.asarray(poison))
        changed = sum(a != b for a, b in zip(digests(after), before, strict=True))
        trouble = f"{changed} arrays changed" if changed else ""
        if int(after.skipped) != 1 or int(after.step) != 2 or int(metrics["skipped"]) != 1:
            trouble += f" skipped {int(after.skipped)}, step {int(after.step)}"
        if not trouble and digests(run(after, good, clean)[0]) == before:
            trouble = "the next step is not applied"
        print(json.dumps({"case": name, "trouble": trouble}), flush=True)


def cases(good: Any, leaves: list[str], clean: Any, count: int) -> Iterator[tuple[str, Any, Any]]:
    """(name, batch, poison of each parameter's gradient and of the loss)."""
    import numpy as np

    everything = [(value, place) for value in VALUES for place in (*FIELDS, LOSS)]
    everything += [(value, path) for path in leaves for value in VALUES]
    for number in range(count):
        value, place = everything[number % len(everything)]
        batch, poison = good, clean.copy()
        if place in FIELDS:
            array = np.array(getattr(good, place))
            sample = -1 if place == "image" else number % len(array)  # a picture is read in temporal tasks alone
            array[sample].reshape(-1)[number % array[sample].size] = float(value)
            batch = good._replace(**{place: array}, has_image=np.ones_like(good.has_image))
        else:
            poison[len(leaves) if place == LOSS else leaves.index(place)] = float(value)
        yield f"{value} in {place}", batch, poison


def with_poison(plain: Any, leaves: list[str]) -> dict[str, Any]:
    """The fields of an objective whose base is added to the gradient of every parameter, one number each, and to the loss."""
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def pass_on(x: Any, poison: Any) -> Any:
        return x

    def forward(x: Any, poison: Any) -> tuple[Any, Any]:
        return x, poison

    def backward(poison: Any, gradient: Any) -> tuple[Any, Any]:
        return gradient.reshape(-1).at[0].add(poison).reshape(gradient.shape), jnp.zeros_like(poison)

    pass_on.defvjp(forward, backward)

    def loss(params: Any, batch: Any, drawn: Any, shard: Any) -> Any:
        poison = params["poison.all"]
        changed = {path: pass_on(params[path], poison[number]) for number, path in enumerate(leaves)}
        losses, metrics = plain.loss({**params, **changed}, batch, drawn, shard)
        return losses + jax.lax.stop_gradient(poison[-1]), metrics

    return {
        "loss": loss,
        "base": {"poison.all": jax.ShapeDtypeStruct((len(leaves) + 1,), jnp.float32)},
        "sharding": (*plain.sharding, (r"poison\.all", ("vector",))),
        "imported": {**plain.imported},
    }
