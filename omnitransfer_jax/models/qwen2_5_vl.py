"""Qwen2.5-VL, the language model that reads OmniTransfer's prompt and clips, from tokens and pixels to the states before the output layer.

A prompt has one placeholder token for each vision feature of an image or video:

    patches, grid = patchify(clip, config.vision), grid_of(*clip.shape[:3], config.vision)
    vision_features = model.vision(patches, (grid,))
    x = model.embed(tokens)                                 then replace the placeholders' rows by the features (`alignment.embed`)
    states = model(x, position_ids(config, tokens, mask, video_grids=[grid], seconds_per_grid=[0.5]), mask)

Learnt queries may be appended to `x`; for `position_ids` they count as text tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from configs.base import QwenConfig
from configs.errors import require
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.models.attend import CHUNK
from omnitransfer_jax.models.layers import Linear, RMSNorm
from omnitransfer_jax.models.qwen2_5_vision import Grid, QwenVision, SwiGLU, frequencies, rotate

SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    (r"(layers|vision\.blocks)\..*\.kernel", ("layers", "in", "out")),
    (r"(layers|vision\.blocks)\..*\.(bias|scale)", ("layers", "vector")),
    (r"token_embedding", ("in", "out")),
    (r"(?!layers\.|vision\.blocks\.).*\.kernel", ("in", "out")),
    (r"(?!layers\.|vision\.blocks\.).*\.(bias|scale)", ("vector",)),
]


def position_ids(
    config: QwenConfig,
    tokens: Int[np.ndarray, "B S"],
    mask: Bool[np.ndarray, "B S"],
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    seconds_per_grid: Sequence[float] = (),
) -> Int32[np.ndarray, "3 B S"]:
    """Position of every token in time, height and width, computed on the host.

    A text token has the same position in all three, one more than the text token before it. A feature of an image or video has the
    position of its cell in the grid, counted from the end of the text before it; time advances by `seconds_per_grid` (one number for
    each video) from one temporal step to the next. Text continues after the longer side of the grid. The grids are those of all rows
    of the batch, in the order of their placeholders. Padding (mask False) has position 0.
    """
    require(
        len(seconds_per_grid) == len(video_grids),
        f"{len(seconds_per_grid)} seconds_per_grid: there are {len(video_grids)} videos; give one number for each",
    )
    intervals = [np.float32(config.vision.tokens_per_second) * np.float32(seconds) for seconds in seconds_per_grid]
    pending = {
        config.image_token: [(grid, np.float32(1)) for grid in image_grids],
        config.video_token: list(zip(video_grids, intervals, strict=True)),
    }
    positions = np.zeros((3, *tokens.shape), np.int32)
    for row, real in enumerate(mask):
        ids = tokens[row, real]
        parts: list[np.ndarray] = []
        at = start = 0
        while at < len(ids):
            if ids[at] not in pending:
                parts.append(np.full((3, 1), start))
                at, start = at + 1, start + 1
                continue
            token = int(ids[at])
            require(len(pending[token]) > 0, f"row {row}, token {at}: a placeholder {token} without a grid; give one for each clip")
            grid, interval = pending[token].pop(0)
            parts.append(start + _grid_positions(grid, config.vision.merge, interval))
            count = parts[-1].shape[1]
            found = int((ids[at : at + count] == token).sum())
            require(found == count, f"row {row}: {found} placeholders {token} for the {count} features of the grid {grid}; write {count}")
            at, start = at + count, start + max(grid[1:]) // config.vision.merge
        positions[:, row, real] = np.concatenate(parts, axis=1) if parts else 0
    left = sum(map(len, pending.values()))
    require(left == 0, f"{left} grids more than there are placeholders in the tokens; give one for each clip")
    return positions


def _grid_positions(grid: Grid, merge: int, interval: np.float32) -> np.ndarray:
    """(time, row, column) of each feature; the time is computed in float32 and truncated to an integer, as in the original."""
    t, h, w = grid
    time, rows, columns = np.indices((t, h // merge, w // merge)).reshape(3, -1)
    return np.stack([(time.astype(np.float32) * interval).astype(np.int64), rows, columns])


class Qwen2_5VL(nnx.Module):  # noqa: N801
    """Embedding, vision tower, language model and output layer, called separately as in the file's docstring."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vision = QwenVision(config, rngs=rngs)
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.dim)) * config.dim**-0.5)
        self.layers = nnx.vmap(lambda key: Layer(config, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)
        self.output = None if config.tied else Linear(config.dim, config.vocab_size, bias=False, rngs=rngs)

    def embed(self, tokens: Int[Array, "B S"]) -> Float32[Array, "B S D"]:
        """The embedding of each token."""
        return self.token_embedding[tokens].astype(jnp.float32)

    def __call__(
        self,
        embeddings: Float[Array, "B S D"],
        positions: Int[Array, "3 B S"],
        mask: Bool[Array, "B S"],
        shard: Shard = UNSHARDED,
    ) -> Float32[Array, "B S D"]:
        """The last states, after the final norm. A token attends to itself and to earlier tokens, but not to padding (mask False).

        The states of padding are undefined. Each device computes its part of the tokens, and all return the states of all.
        """
        table = rotation(jax.vmap(shard.local)(positions), self.config)
        graphdef, layers = nnx.split(self.layers)

        @jax.checkpoint
        def step(x, layer):
            return nnx.merge(graphdef, shard.gather_layer(layer))(x, table, mask, shard), None

        x, _ = jax.lax.scan(step, shard.local(embeddings.astype(jnp.float32)), layers)
        return shard.gather(self.norm(x), embeddings.shape[1])

    def logits(self, states: Float[Array, "*lead D"]) -> Float32[Array, "*lead vocabulary"]:
        """The score of every word of the vocabulary as the next token."""
        x = states.astype(jnp.dtype(self.config.dtype))
        scores = x @ self.token_embedding.astype(x.dtype).T if self.output is None else self.output(x)
        return scores.astype(jnp.float32)


class Layer(nnx.Module):
    """Causal self-attention and a gated MLP, each after a norm; the residual stream is float32."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attention = CausalAttention(config, rngs=rngs)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.mlp = SwiGLU(config.dim, config.ffn_dim, bias=False, rngs=rngs)

    def __call__(
        self, x: Float32[Array, "B L D"], table: Float32[Array, "2 B L k"], mask: Bool[Array, "B S"], shard: Shard = UNSHARDED
    ) -> Float32[Array, "B L D"]:
        x = x + self.attention(self.norm1(x).astype(self.dtype), table, mask, shard).astype(jnp.float32)
        return x + self.mlp(self.norm2(x).astype(self.dtype)).astype(jnp.float32)


class CausalAttention(nnx.Module):
    """Grouped-query attention of each token to itself and to earlier tokens."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.dim // config.num_heads
        self.query = Linear(config.dim, config.dim, rngs=rngs)
        self.key, self.value = (Linear(config.dim, config.num_kv_heads * self.head_dim, rngs=rngs) for _ in range(2))
        self.out = Linear(config.dim, config.dim, bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], table: Float32[Array, "2 B L k"], mask: Bool[Array, "B S"], shard: Shard = UNSHARDED
    ) -> Float[Array, "B L D"]:
        q, k, v = (rearrange(project(x), "B S (N K) -> B S N K", K=self.head_dim) for project in (self.query, self.key, self.value))
        k, v = (shard.gather(each, mask.shape[1]) for each in (rotate(k, table), v))
        out = causal_attention(rotate(q, table), k, v, mask, shard.index * x.shape[1])
        return self.out(rearrange(out, "B S N K -> B S (N K)"))


def causal_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B S n K"], v: Float[Array, "B S n K"], mask: Bool[Array, "B S"], start: Any = 0
) -> Float[Array, "B L N K"]:
    """Exact attention, the softmax in float32, `CHUNK` queries at a time: memory grows with the sequence, not with its square.

    Each of the n heads of keys and values is shared by N / n consecutive heads of queries. The queries are those of the tokens from `start`
    on.
    """
    (B, L, N, K), (_, S, n, _) = q.shape, k.shape
    chunk = min(CHUNK, L)
    count = -(-L // chunk)
    q = jnp.pad(q, ((0, 0), (0, count * chunk - L), (0, 0), (0, 0)))
    rows, columns = start + jnp.arange(count * chunk).reshape(count, chunk), jnp.arange(S)

    @jax.checkpoint
    def queries(block):
        rows, q = block
        visible = (columns[None] <= rows[:, None])[None] & mask[:, None]
        scores = jnp.einsum("BcngK,BsnK->Bngcs", q, k, preferred_element_type=jnp.float32) * K**-0.5
        # A finite minimum: a row of padding may have no visible key, and must not become NaN here or in the gradients.
        weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
        return jnp.einsum("Bngcs,BsnK->BcngK", weights.astype(v.dtype), v)

    out = jax.lax.map(queries, (rows, q.reshape(B, count, chunk, n, N // n, K).swapaxes(0, 1)))
    return out.swapaxes(0, 1).reshape(B, count * chunk, N, K)[:, :L]


def rotation(positions: Int[Array, "3 B S"], config: QwenConfig) -> Float32[Array, "2 B S k"]:
    """Cosines and sines: the highest frequencies encode time, the next height, the lowest width."""
    axes = np.repeat(np.arange(3), config.rope_sections)
    angles = jnp.moveaxis(positions[axes], 0, -1).astype(jnp.float32)
    angles = angles * jnp.asarray(frequencies(config.rope_theta, config.dim // config.num_heads))[None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])
