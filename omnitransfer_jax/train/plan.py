"""What a training would cost: parameters, memory of each device, operations of a step. No weights, no data, no devices."""

import json
from collections import defaultdict
from dataclasses import asdict

from configs.run import RunConfig
from omnitransfer_jax.mesh import bytes_per_device, specs, specs_of
from omnitransfer_jax.train.objective import Objective
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import abstract_state, split_trainable

GIB, PETA = 2**30, 1e15


def describe(objective: Objective, config: RunConfig) -> str:
    """The configuration as JSON, the parameters, the memory of each device and the work of a step."""
    tables = [json.dumps(asdict(config), indent=2), parameter_table(objective), memory_table(objective, config)]
    return "\n\n".join([*tables, *([work(objective.flops, config.train.batch_size)] if objective.flops else [])])


def parameter_table(objective: Objective) -> str:
    """Trainable and frozen parameters of each part."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    trainable, frozen = split_trainable(objective.params, objective)
    for column, params in enumerate((trainable, {**frozen, **objective.base})):
        for path, leaf in params.items():
            counts[group(path)][column] += leaf.size
    rows = [*sorted(counts.items()), ("total", [sum(column) for column in zip(*counts.values(), strict=True)])]
    lines = [f"{name:<32} {trainable:>18,} {frozen:>18,}" for name, (trainable, frozen) in rows]
    return "\n".join([f"{'parameters':<32} {'trainable':>18} {'frozen':>18}", *lines])


def group(path: str) -> str:
    """The row a parameter is counted in: its part and module, in stacked layers the module of a layer."""
    part, _, rest = path.partition(".")
    names = rest.split(".")
    depth = {"blocks": 2, "mllm": 3}.get(names[0], 1)
    return "/".join(filter(None, (part, ".".join(names[:depth]))))


def memory(objective: Objective, config: RunConfig) -> dict[str, int]:
    """Bytes on each device for the whole of a step: the abstract state itself, and the gradients."""
    spec = specs({**objective.params, **objective.base}, objective.sharding, config.mesh)
    state = abstract_state(objective, config, make_optimizer(config.optimizer, config.train.steps, objective.matrices))

    def held(tree) -> int:
        return bytes_per_device(tree, specs_of(tree, spec), config.mesh)

    return {
        "parameters": held(state.trainable) + held(state.frozen) + held(dict(objective.base)),
        "gradients": held(state.trainable),
        "optimizer": held(state.moments),
        "average": held(state.ema),
    }


def memory_table(objective: Objective, config: RunConfig) -> str:
    """`memory` in GiB."""
    sizes = memory(objective, config)
    lines = [f"{name:<32} {size / GIB:>18.3f}" for name, size in {**sizes, "sum": sum(sizes.values())}.items()]
    title = f"{'GiB per device':<32} {f'on {config.mesh.devices}':>18}"
    return "\n".join([title, *lines, f"{'activations':<32} {'not counted':>18}"])


def work(flops: int, samples: int) -> str:
    """The useful operations of a step."""
    return f"FLOPs per step: {flops:.4g} ({samples} samples of {flops / samples / PETA:.4g} PFLOP, forward and backward)"
