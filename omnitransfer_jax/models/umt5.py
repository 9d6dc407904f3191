"""UMT5 encoder (google/umt5-xxl): prompt tokens to the text context of Wan's cross-attention.

A T5 v1.1 encoder in which every layer has its own table of relative position biases. No projection has a bias, and attention scores
are not divided by the square root of the head width: T5's query weights include that factor.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from configs.base import UMT5Config
from omnitransfer_jax.models.layers import Linear, RMSNorm


class UMT5Encoder(nnx.Module):
    """Tokens and their mask to features."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)))
        self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)

    def __call__(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> Float32[Array, "B S D"]:
        """Features of every token; no token attends to padding (mask False), and the rows of padding are exactly zero.

        Wan was trained with these zeros: its pipelines cut the features at each prompt's length and pad with zeros.
        """
        config = self.config
        buckets = jnp.asarray(position_buckets(tokens.shape[1], config.relative_buckets, config.relative_max_distance))
        graphdef, layers = nnx.split(self.blocks)

        def step(x, layer):
            return nnx.merge(graphdef, layer)(x, mask, buckets), None

        x, _ = jax.lax.scan(step, self.token_embedding[tokens].astype(jnp.float32), layers)
        return jnp.where(mask[:, :, None], self.norm(x), 0.0)


class Block(nnx.Module):
    """One layer: self-attention and a gated feed-forward, each after a norm; the residual stream is float32."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attention = BiasedAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = GatedMLP(config, rngs=rngs)

    def __call__(self, x: Float32[Array, "B S D"], mask: Bool[Array, "B S"], buckets: Int32[Array, "S S"]) -> Float32[Array, "B S D"]:
        x = x + self.attention(self.norm1(x).astype(self.dtype), mask, buckets).astype(jnp.float32)
        return x + self.ffn(self.norm2(x).astype(self.dtype)).astype(jnp.float32)


class BiasedAttention(nnx.Module):
    """Unscaled dot-product attention plus this layer's bias for (key position - query position)."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        inner = config.num_heads * config.head_dim
        self.query, self.key, self.value = (Linear(config.dim, inner, bias=False, rngs=rngs) for _ in range(3))
        self.out = Linear(inner, config.dim, bias=False, rngs=rngs)
        self.relative_bias = nnx.Param(jax.random.normal(rngs.params(), (config.relative_buckets, config.num_heads)))

    def __call__(self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"], buckets: Int32[Array, "S S"]) -> Float[Array, "B S D"]:
        q, k, v = (project(x).reshape(*x.shape[:2], self.num_heads, -1) for project in (self.query, self.key, self.value))
        bias = jnp.einsum("qsN->Nqs", self.relative_bias[buckets].astype(jnp.float32))
        scores = jnp.einsum("BqNK,BsNK->BNqs", q, k, preferred_element_type=jnp.float32) + bias[None]
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("BNqs,BsNK->BqNK", weights, v).reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)); the GELU is the tanh approximation."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs):
        self.gate, self.up = (Linear(config.dim, config.ffn_dim, bias=False, rngs=rngs) for _ in range(2))
        self.down = Linear(config.ffn_dim, config.dim, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


def position_buckets(length: int, buckets: int, max_distance: int) -> Int32[np.ndarray, "{length} {length}"]:
    """The row of the bias table for each (query, key); keys after the query use the second half of the rows.

    Within a half, the first rows cover one distance each, the others ranges that grow with the logarithm of the distance, and the last
    row `max_distance` and more. Computed in float32 as in T5's PyTorch code, because at powers of two the logarithm is on the boundary
    of two rows, where rounding decides.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(relative)
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(relative > 0, half, 0)).astype(np.int32)
