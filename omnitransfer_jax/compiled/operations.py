"""The floating-point operations of a traced program on one device: of its matrix products, and of its attention kernels.

Unlike XLA's own count it multiplies a loop's body by the number of its turns and knows the attention kernels. What XLA computes a second
time of its own accord, to fit, is not in it.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


class Operations(NamedTuple):
    """Counts of one device."""

    products: int
    attention: int

    def __add__(self, other: Any) -> "Operations":
        return Operations(self.products + other.products, self.attention + other.attention)

    def times(self, count: int) -> "Operations":
        """So many of them."""
        return Operations(self.products * count, self.attention * count)


def operations(jaxpr: Jaxpr) -> Operations:
    """Of everything in `jaxpr`; of a conditional, the larger branch. What is inside a `shard_map` is one device's."""
    total = Operations(0, 0)
    for equation in jaxpr.eqns:
        match equation.primitive.name:
            case "dot_general":
                total += Operations(_dot(equation), 0)
            case "conv_general_dilated":
                total += Operations(_convolution(equation), 0)
            case "pallas_call":
                total += Operations(0, _kernel(equation))
            case "scan":
                total += operations(equation.params["jaxpr"].jaxpr).times(equation.params["length"])
            case "cond":
                total += max((operations(branch.jaxpr) for branch in equation.params["branches"]), key=sum)
            case _:
                for inner in _inner(equation.params):
                    total += operations(inner)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    kernel, out_axis = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_axis]


def _kernel(equation: Any) -> int:
    """Of the splash kernels: two products of queries and keys forward, five in the fused backward. Masked tiles count too."""
    name = str(equation.params["name"])
    if "splash" not in name:
        return 0
    arrays = [v.aval.shape for v in equation.invars if v.aval.ndim >= 3 and v.aval.dtype in (jax.numpy.bfloat16, jax.numpy.float32)]
    (*lead, queries, width), (*_, keys, _) = arrays[0], arrays[1]
    return 2 * math.prod(lead) * queries * keys * width * (5 if "dkv" in name else 2)
