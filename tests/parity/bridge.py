"""Between a PyTorch oracle and our model: random weights with every branch alive, carried over by the weight tables under test."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.weights.table import Entry


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter, norm scales and biases too, random values that keep activations near unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_scale = (p.ndim == 1 and name.endswith("weight")) or name.endswith("gamma")
            fan_in = max(1, p[0].numel()) if p.ndim > 1 else 1
            p.copy_(1 + 0.2 * noise if is_scale else noise / fan_in**0.5 if p.ndim > 1 else 0.2 * noise)
    return module.eval()


def tensors(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The module's weights as numpy arrays by name; one that is shared under two names comes once."""
    return {name: value.detach().numpy() for name, value in module.named_parameters()}


def gradients(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients of all parameters by name; a parameter without one is an error, for then a branch was off."""
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {name: p.grad.numpy() for name, p in module.named_parameters()}


def to_ours(theirs: dict[str, np.ndarray], table: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Arrays under their names (weights or gradients) -> arrays under ours, by `table`; every name on both sides is used."""
    assert {e.theirs for e in table} == set(theirs)
    rows: dict[str, dict[int | None, np.ndarray]] = {}
    for entry in table:
        index, parts = entry.part
        rows.setdefault(entry.ours, {})[entry.layer] = entry.layout.to_ours(np.split(theirs[entry.theirs], parts)[index])
    whole = {path: layers[None] for path, layers in rows.items() if None in layers}
    return whole | {path: np.stack([layers[i] for i in sorted(layers)]) for path, layers in rows.items() if path not in whole}


def port(make: Callable[[nnx.Rngs], nnx.Module], module: torch.nn.Module, table: Sequence[Entry], prefix: str = ""):
    """Our model holding the oracle's weights, whose names stand behind `prefix` in the table; paths and shapes must agree."""
    model, ours = abstract(make), to_ours({prefix + k: v for k, v in tensors(module).items()}, table)
    assert {k: v.shape for k, v in flat_params(model).items()} == {k: v.shape for k, v in ours.items()}
    return with_params(model, {k: jnp.asarray(v) for k, v in ours.items()})
