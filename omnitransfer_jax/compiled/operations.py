"""The floating-point operations of a compiled program on one device: of its matrix products, and of its attention kernels.

XLA's own count takes a loop's body once and the attention kernels for nothing. This one multiplies by the turns and knows the kernels; what
XLA computes a second time of its own accord, so that the program fits, is in it.
"""

import re
from typing import NamedTuple

from omnitransfer_jax.compiled.hlo import Run, runs, shapes


class Operations(NamedTuple):
    """Counts of one device."""

    products: int
    attention: int


def operations(text: str) -> Operations:
    """Of a program's text. Of a conditional every branch is counted."""
    products = attention = 0
    for run in runs(text):
        match run.instruction.opcode:
            case "convolution":
                products += run.count * _convolution(run)
            case "dot":
                products += run.count * _dot(run)
            case "custom-call":
                attention += run.count * _kernel(run)
    return Operations(products, attention)


def _convolution(run: Run) -> int:
    """A TPU's compiler writes every product as a convolution.

    Its sum is over the features of the left side and over the window. A window that slides over as much padding as it is wide, or over
    dilated rows, is a product's other axis, and of its places one counts; that of a picture's convolution has less padding.
    """
    (left, *_), rest = run.operands, run.instruction.rest
    labels = re.search(r"dim_labels=(\w+)_", rest)
    assert labels is not None
    summed = left.sizes[labels[1].index("f")]
    if window := re.search(r"window=\{([^}]*)\}", rest):
        fields = dict(field.split("=") for field in window[1].split())
        sizes = fields["size"].split("x")
        pads = fields.get("pad", "x".join(["0_0"] * len(sizes))).split("x")
        spread = fields.get("lhs_dilate", "x".join(["1"] * len(sizes))).split("x")
        for size, pad, apart in zip(sizes, pads, spread, strict=True):
            summed *= 1 if pad == f"{int(size) - 1}_{int(size) - 1}" or apart != "1" else int(size)
    return 2 * shapes(run.instruction.type)[0].elements * summed


def _dot(run: Run) -> int:
    (left, *_), summed = run.operands, 1
    if axes := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", run.instruction.rest):
        for axis in axes[1].split(","):
            summed *= left.sizes[int(axis)] if axis else 1
    return 2 * shapes(run.instruction.type)[0].elements * summed


def _kernel(run: Run) -> int:
    """The splash kernels: two products of queries and keys forward, five in the fused backward. Tiles that are masked whole count too."""
    name = run.instruction.name
    if "splash" not in name:
        return 0
    constraints = re.search(r"operand_layout_constraints=\{(.*?)\}(?:, \w+=|$)", run.instruction.rest)
    arrays = [each for each in shapes(constraints[1] if constraints else "") if each.dtype in ("bf16", "f32") and len(each.sizes) >= 3]
    queries, keys = arrays[0], arrays[1]
    return 2 * queries.elements * keys.sizes[-2] * (5 if "dkv" in name else 2)
