"""How long a compiled program takes at best on devices that are not here: its operations and what it sends, at assumed rates.

A bound, not a measurement. Memory traffic, the host and everything that is no product of matrices take no time here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from configs.chips import Chip
from omnitransfer_jax.compiled.collectives import Collective
from omnitransfer_jax.compiled.operations import Operations

PRODUCTS, ATTENTION = 0.8, 0.6  # shares of the peak at which matrix products and attention kernels are assumed to run


class Roofline(NamedTuple):
    """Seconds of one run of a program, and the share of the peak that its useful operations are (MFU)."""

    compute: float
    """Products and attention, without any communication."""
    exposed: float
    """Collectives that the compiler does not overlap with computing."""
    overlapped: float
    """Those that it does."""
    mfu: dict[str, float]
    """If nothing overlaps, if what the compiler makes asynchronous does, if everything does, and the second at published kernel rates."""


def roofline(chip: Chip, useful: float, executed: Operations, sent: Sequence[Collective], coordinates: Sequence[Any]) -> Roofline:
    """`useful` operations of all devices, those `executed` by one, what it sends, and every device's place (`mesh.place_of`)."""

    def compute(attention: float) -> float:
        return (executed.products / PRODUCTS + executed.attention / attention) / (chip.peak * 1e12)

    exposed = sum(seconds(each, chip, coordinates) for each in sent if not each.overlaps)
    overlapped = sum(seconds(each, chip, coordinates) for each in sent if each.overlaps)
    at_assumed, ideal = compute(ATTENTION), useful / (len(coordinates) * chip.peak * 1e12)
    times = {
        "nothing overlaps": at_assumed + exposed + overlapped,
        "as compiled": max(at_assumed, overlapped) + exposed,
        "everything overlaps": max(at_assumed, overlapped + exposed),
    }
    if chip.attention:
        times["as compiled, published kernel rate"] = max(compute(chip.attention), overlapped) + exposed
    return Roofline(at_assumed, exposed, overlapped, {name: ideal / time for name, time in times.items()})


def seconds(sent: Collective, chip: Chip, coordinates: Sequence[Any]) -> float:
    """Time of a collective on a torus, alone in it.

    Gathers and reductions use every axis that their group extends along. In an all-to-all each axis carries everything, a quarter of its
    devices far on average. Between slices a device has its own share of the network, which is so slow that the torus does not count.
    """
    slices, *extents = [len(set(axis)) for axis in zip(*(coordinates[i] for i in sent.group), strict=True)]
    if slices > 1:
        passes = 2 if sent.kind == "all-reduce" else 1
        return sent.count * passes * sent.bytes * (slices - 1) / slices / (chip.between_slices * 1e9)
    axes, longest, size = max(1, sum(n > 1 for n in extents)), max(extents, default=1), len(sent.group)
    share, rate = (size - 1) / size, chip.link * 1e9
    match sent.kind:
        case "all-to-all":
            each = sent.bytes * longest / 4 / rate
        case "all-reduce":
            each = 2 * sent.bytes * share / (axes * rate)
        case "collective-permute":
            each = sent.bytes / rate
        case _:
            each = sent.bytes * share / (axes * rate)
    return sent.count * each
