"""The three layers that all models here share. They compute in float32 exactly where the original models do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """y = x @ kernel * kernel_scale + bias over the last axis, plus the outputs of its adapters, computed in the dtype of x."""

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_uniform()(rngs.params(), (in_dim, out_dim), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_dim,), jnp.float32)) if bias else None
        self.kernel_scale: nnx.Param | None = None  # one factor for each output of an int8 kernel (models/int8.py)
        self.adapters: tuple[str, ...] = ()  # attributes that hold a `LoRA`; `lora.add_lora` adds them

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        # Flattened to one matrix: with two leading axes XLA on CPU takes 1.5 times as long for the kernel's gradient.
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ self.kernel.astype(x.dtype)
        if self.kernel_scale is not None:
            y = y * self.kernel_scale.astype(x.dtype)[None]
        if self.bias is not None:
            y = y + self.bias.astype(x.dtype)[None]
        for name in self.adapters:
            y = y + getattr(self, name)(rows)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class LayerNorm(nnx.Module):
    """Layer norm in float32 over the last axis, with or without a learnt scale and bias; returns float32."""

    def __init__(self, dim: int, eps: float, *, affine: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32)) if affine else None
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32)) if affine else None

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            lead = (1,) * (x.ndim - 1)
            x = x * self.scale.astype(jnp.float32).reshape(*lead, -1) + self.bias.astype(jnp.float32).reshape(*lead, -1)
        return x


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32 over the last axis with a learnt scale; returns float32."""

    def __init__(self, dim: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return x * self.scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


def exact_gelu(x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    """x times the normal distribution's cumulative probability at x; the same bits as `jax.nn.gelu(x, approximate=False)`."""
    return 0.5 * x * _erfc(-x * np.sqrt(0.5).astype(x.dtype))


@jax.custom_jvp
def _erfc(x: Array) -> Array:
    """`jax.lax.erfc` with the derivative of jax 0.10: that of jax 0.12.0 raises inside a `shard_map` ("varying manual axes")."""
    return jax.lax.erfc(x)


@_erfc.defjvp
def _erfc_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _erfc(x), (-2 / math.sqrt(math.pi)) * (dx * jnp.exp(-jnp.square(x)))
