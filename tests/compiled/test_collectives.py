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


def compiled_step(mesh_config: MeshConfig) -> str:
    """The text of a compiled step."""
    config = replace(WIDE, mesh=mesh_config)
    objective, mesh = omnitransfer.objective(config), make_mesh(mesh_config)
    optimizer, spec = make_optimizer(config.optimizer, config.train.steps), specs(objective.params, objective.sharding, mesh_config)
    like = placed_state(objective, config, optimizer, mesh, spec)
    step = jax.jit(make_train_step(objective, config, optimizer, mesh, spec))
    return step.lower(like, placed(mesh, objective.batch, batch_sharding(mesh).spec), jax.random.key(0)).compile().as_text()


def report() -> dict[str, Any]:
    """Counts and elements of what the blocks send, by kind."""
    text, found = compiled_step(MESH), {}
    for each in collectives(text):
        kind = each.kind if BLOCKS in each.where else f"{each.kind} outside"
        row = found.setdefault(kind, {"count": 0, "types": [], "groups": []})
        row["count"] += each.count
        row["types"] = sorted({*row["types"], each.dtype})
        row["groups"] = sorted({*row["groups"], len(each.group)})
    return {"sent": found, "executed": operations(text).products, "useful": flops.train_step(WIDE)}


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


if __name__ == "__main__":
    print(json.dumps(report()))
