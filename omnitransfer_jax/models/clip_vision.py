"""CLIP image tower (ViT-H/14 of open-clip-xlm-roberta-large-vit-huge-14): the first frame to the context of Wan's image cross-attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Float32

from configs.base import CLIPVisionConfig
from omnitransfer_jax.models.attend import attention
from omnitransfer_jax.models.layers import LayerNorm, Linear, exact_gelu
from omnitransfer_jax.resize import bicubic_resize

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red green blue (OpenAI CLIP)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image: Float[Array, "B H W 3"], size: int) -> Float32[Array, "B {size} {size} 3"]:
    """An image in [-1, 1], resized whole to `size` x `size` (the aspect ratio changes), normalised by CLIP's mean and standard deviation.

    As in Wan2.1 (clip.py), without crop and antialias, unlike the processor that comes with the checkpoint on the hub.
    """
    x = bicubic_resize(image, size, size) * 0.5 + 0.5
    return (x - jnp.asarray(MEAN)[None, None, None]) / jnp.asarray(STD)[None, None, None]


class CLIPVision(nnx.Module):
    """Pixels to the output of the last layer but one.

    `last_layer` and `post_norm` are part of the checkpoint, so they are imported and exported; Wan does not run them.
    """

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, patch, scale = config.dim, config.patch, config.dim**-0.5
        positions = 1 + (config.image_size // patch) ** 2
        self.patch_embedding = nnx.Param(nnx.initializers.lecun_uniform(in_axis=(0, 1, 2))(rngs.params(), (patch, patch, 3, dim)))
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (dim,)) * scale)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), (positions, dim)) * scale)
        self.pre_norm = LayerNorm(dim, config.eps)
        self.layers = nnx.vmap(lambda key: Layer(config, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), config.num_layers - 1))
        self.last_layer = Layer(config, rngs=rngs)
        self.post_norm = LayerNorm(dim, config.eps)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B S D"]:
        """Features of the class token, then of the patches row by row, S = 1 + (H / patch)^2, without a final norm.

        `pixels` come from `preprocess`, with H = W = `config.image_size`.
        """
        dtype, patch = jnp.dtype(self.config.dtype), self.config.patch
        patches = rearrange(pixels.astype(dtype), "B (h p) (w q) C -> B (h w) (p q C)", p=patch, q=patch)
        kernel = rearrange(self.patch_embedding.astype(dtype), "p q C D -> (p q C) D")
        x = jnp.einsum("BLC,CD->BLD", patches, kernel, preferred_element_type=jnp.float32)
        first = jnp.broadcast_to(self.class_embedding.astype(jnp.float32), (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([first, x], axis=1) + self.position_embedding.astype(jnp.float32)[None]
        graphdef, layers = nnx.split(self.layers)

        def step(x, layer):
            return nnx.merge(graphdef, layer)(x), None

        x, _ = jax.lax.scan(step, self.pre_norm(x), layers)
        return x


class Layer(nnx.Module):
    """Self-attention and an MLP, each after a norm; the residual stream is float32."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.norm1 = LayerNorm(config.dim, config.eps)
        self.attention = SelfAttention(config, rngs=rngs)
        self.norm2 = LayerNorm(config.dim, config.eps)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float32[Array, "B S D"]) -> Float32[Array, "B S D"]:
        x = x + self.attention(self.norm1(x).astype(self.dtype)).astype(jnp.float32)
        return x + self.mlp(self.norm2(x).astype(self.dtype)).astype(jnp.float32)


class SelfAttention(nnx.Module):
    """Attention of every token to every token."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (Linear(config.dim, config.dim, rngs=rngs) for _ in range(4))

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        q, k, v = (rearrange(project(x), "B S (N K) -> B S N K", N=self.num_heads) for project in (self.query, self.key, self.value))
        return self.out(rearrange(attention(q, k, v), "B S N K -> B S (N K)"))


class MLP(nnx.Module):
    """down(gelu(up(x))); the GELU is exact."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.up = Linear(config.dim, config.ffn_dim, rngs=rngs)
        self.down = Linear(config.ffn_dim, config.dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.down(exact_gelu(self.up(x)))
