"""What a training step sends: the number, kind, group and type of its collectives, so that an accidental gather fails."""

import json
from dataclasses import replace
from typing import Any

import jax
import pytest

from configs.run import MeshConfig
from omnitransfer_jax.compiled.collectives import collectives
from omnitransfer_jax.compiled.operations import operations
from omnitransfer_jax.mesh import batch_sharding, make_mesh, placed, specs
from omnitransfer_jax.methods import omnitransfer
from omnitransfer_jax.train import flops
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import make_train_step, placed_state
from tests.test_mesh import WIDE, on_eight_devices

MESH = MeshConfig(data=2, heads=2, keys=2)
LAYERS, STREAMS, MATRICES = WIDE.dit.num_layers, 2, 12  # a block's matrices: 2 x q k v o, image k v, up down
BLOCKS = "while/body"


def traced_step(mesh_config: MeshConfig, dtype: str = "float32") -> Any:
    """A step, traced."""
    config = replace(WIDE, mesh=mesh_config, dit=replace(WIDE.dit, dtype=dtype))
    objective, mesh = omnitransfer.objective(config), make_mesh(mesh_config)
    optimizer, spec = make_optimizer(config.optimizer, config.train.steps), specs(objective.params, objective.sharding, mesh_config)
    like = placed_state(objective, config, optimizer, mesh, spec)
    step = jax.jit(make_train_step(objective, config, optimizer, mesh, spec))
    return step.trace(like, placed(mesh, objective.batch, batch_sharding(mesh).spec), jax.random.key(0))


def sent_in_loops(jaxpr: Any, in_loop: bool = False) -> set[tuple[str, str, str]]:
    """Kind, axes of the mesh and type of what a traced program sends inside of its loops over blocks.

    The compiled program of this machine does not tell: XLA widens bf16 on a CPU.
    """
    found = set()
    for line in jaxpr.eqns:
        name = line.primitive.name
        if name in ("all_gather", "reduce_scatter") and in_loop:
            axes = line.params["axis_name"]
            found.add((name, " ".join((axes,) if isinstance(axes, str) else axes), str(line.invars[0].aval.dtype)))
        for inner in line.params.values():
            for each in inner if isinstance(inner, tuple | list) else [inner]:
                each = getattr(each, "jaxpr", each)
                if hasattr(each, "eqns"):
                    found |= sent_in_loops(each, in_loop or name == "scan")
    return found


def report() -> dict[str, Any]:
    """Counts and elements of what the blocks send, by kind."""
    text, found = traced_step(MESH).lower().compile().as_text(), {}
    for each in collectives(text):
        kind = each.kind if BLOCKS in each.where else f"{each.kind} outside"
        row = found.setdefault(kind, {"count": 0, "types": [], "groups": []})
        row["count"] += each.count
        row["types"] = sorted({*row["types"], each.dtype})
        row["groups"] = sorted({*row["groups"], len(each.group)})
    half = sorted(sent_in_loops(traced_step(MESH, "bfloat16").jaxpr.jaxpr))
    return {"sent": found, "half": half, "executed": operations(text).products, "useful": flops.train_step(WIDE)}


@pytest.fixture(scope="module")
def found():
    return on_eight_devices("tests.compiled.test_collectives")


def test_the_blocks_exchange_what_they_must(found):
    sent = found["sent"]
    # q, k, v and the answers of each stream: forward, again for the backward pass, and the gradients' way back.
    assert sent["all-to-all"] == {"count": 3 * 4 * STREAMS * LAYERS, "types": ["f32"], "groups": [2]}
    # Keys and values over `keys`, and every matrix over three axes: forward, and again for the backward pass. Gradients back, once.
    keys, matrices = 2 * STREAMS * LAYERS, 3 * MATRICES * LAYERS
    assert sent["all-gather"] == {"count": 2 * (keys + matrices), "types": ["f32"], "groups": [2]}
    assert sent["reduce-scatter"] == {"count": keys + matrices, "types": ["f32"], "groups": [2]}
    assert set(sent) <= {"all-to-all", "all-gather", "reduce-scatter"} | {kind for kind in sent if "outside" in kind}


def test_weights_are_gathered_in_the_compute_type_and_gradients_summed_in_float32(found):
    """And along one axis after the other. Over `keys` the gradients of keys and values come back too, in their own type."""
    weights = [["all_gather", axis, "bfloat16"] for axis in ("data", "heads", "keys")]
    gradients = [["reduce_scatter", axis, "float32"] for axis in ("data", "heads", "keys")]
    assert found["half"] == sorted([*weights, *gradients, ["reduce_scatter", "keys", "bfloat16"]])


if __name__ == "__main__":
    print(json.dumps(report()))
