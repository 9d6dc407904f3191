"""The small networks around the blocks of the diffusion transformer (Wan2.1 model.py): embeddings of text, image and time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from omnitransfer_jax.models.layers import LayerNorm, Linear, exact_gelu


class MLP(nnx.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.up = Linear(in_dim, hidden_dim, rngs=rngs)
        self.down = Linear(hidden_dim, out_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class ImageEmbedder(nnx.Module):
    """CLIP features to the model's width (Wan2.1 MLPProj): its norms have PyTorch's epsilon 1e-5 and its GELU is exact."""

    def __init__(self, image_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = LayerNorm(image_dim, 1e-5), LayerNorm(dim, 1e-5)
        self.up, self.down = Linear(image_dim, image_dim, rngs=rngs), Linear(image_dim, dim, rngs=rngs)

    def __call__(self, image: Float[Array, "B I J"]) -> Float[Array, "B I D"]:
        h = self.up(self.norm_in(image).astype(image.dtype))
        h = self.down(exact_gelu(h))
        return self.norm_out(h).astype(image.dtype)


class TimeEmbedder(nnx.Module):
    """Sinusoids [cos | sin] of the timestep (0..1000) through two layers, all in float32."""

    def __init__(self, freq_dim: int, dim: int, *, rngs: nnx.Rngs):
        self.freq_dim = freq_dim
        self.up, self.down = Linear(freq_dim, dim, rngs=rngs), Linear(dim, dim, rngs=rngs)

    def __call__(self, timestep: Float[Array, "B L"]) -> Float[Array, "B L D"]:
        half = self.freq_dim // 2
        frequencies = jnp.asarray(10_000.0 ** -(np.arange(half) / half), jnp.float32)
        angles = timestep.astype(jnp.float32)[..., None] * frequencies[None, None]
        embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        return self.down(jax.nn.silu(self.up(embedding)))
