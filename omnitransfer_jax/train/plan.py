"""What a training run would be, told without weights, data or devices."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from configs.run import Config
from omnitransfer_jax.mesh import DATA, specs
from omnitransfer_jax.models.omnitransfer import SHARDING
from omnitransfer_jax.train.flops import train_step
from omnitransfer_jax.train.step import abstract_params, split_trainable

GIB, PETA = 2**30, 1e15


def describe(config: Config) -> str:
    """The configuration as JSON, the parameters, the memory of each device and the work of a step."""
    return "\n\n".join([json.dumps(asdict(config), indent=2), parameter_table(config), memory_table(config), work(config)])


def parameter_table(config: Config) -> str:
    """Trainable and frozen parameters of each part that a training holds."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for column, params in enumerate(split_trainable(abstract_params(config), config.train)):
        for path, leaf in params.items():
            counts[group(path)][column] += leaf.size
    rows = [*sorted(counts.items()), ("total", [sum(column) for column in zip(*counts.values(), strict=True)])]
    lines = [f"{name:<32} {trainable:>18,} {frozen:>18,}" for name, (trainable, frozen) in rows]
    return "\n".join([f"{'parameters':<32} {'trainable':>18} {'frozen':>18}", *lines])


def group(path: str) -> str:
    """The row a parameter is counted in: its part and module, in stacked layers the module of a layer."""
    part, *names = path.split(".")
    depth = {"blocks": 2, "mllm": 3}.get(names[0], 1)
    return f"{part}/" + ".".join(names[:depth])


def memory_table(config: Config) -> str:
    """What lies on each device for the whole of a step, in GiB."""
    params, data, context = abstract_params(config), config.mesh.data, config.mesh.context
    trainable, frozen = split_trainable(params, config.train)
    spec = specs(params, SHARDING, data)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, config.dit.dtype) for path, leaf in frozen.items()}
    own = bytes_per_device(trainable, spec, data)
    sizes = {
        "parameters": own + bytes_per_device(frozen, spec, data),
        "gradients": own,
        "optimizer": 2 * own,
        "average": own if config.train.ema else 0,
    }
    lines = [f"{name:<32} {size / GIB:>18.3f}" for name, size in {**sizes, "sum": sum(sizes.values())}.items()]
    title = f"{'GiB per device':<32} {f'mesh {data} x {context}':>18}"
    return "\n".join([title, *lines, f"{'activations':<32} {'see launch.compile':>18}"])


def bytes_per_device(params: Mapping[str, Any], spec: Mapping[str, P], data: int) -> int:
    """Bytes of `params` that one of `data` devices holds."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize // (data if DATA in tuple(spec[path]) else 1) for path, leaf in params.items())


def work(config: Config) -> str:
    """The useful operations of a step."""
    step, samples = train_step(config), config.train.batch_size
    return f"FLOPs per step: {step:.4g} ({samples} samples of {step / samples / PETA:.4g} PFLOP, forward and backward)"
