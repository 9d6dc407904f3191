"""Task-adaptive multimodal alignment (paper section 4.4): the context of the cross-attention from stage 2 on, in place of UMT5's text.

    [first frame, reference video, template, prompt], the task's MetaQueries -> Qwen2.5-VL with LoRA
    the queries' last states -> connector -> context of the target's cross-attention

The context is made of the queries' states alone, so it has as many rows as a task has queries, however long the inputs are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from configs.run import Config, VideoConfig
from omnitransfer_jax import tasks
from omnitransfer_jax.mesh import UNSHARDED, Shard
from omnitransfer_jax.models import lora, qwen2_5_vl
from omnitransfer_jax.models.layers import Linear
from omnitransfer_jax.models.qwen2_5_vision import Grid, fit, grid_of
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL

SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    *lora.sharding(r"mllm\.layers\."),
    *((rf"mllm\.(?:{pattern})", axes) for pattern, axes in qwen2_5_vl.SHARDING),
    (r"connector\..*\.kernel", ("in", "out")),
    (r"connector\..*\.bias", ("vector",)),
    (r"queries", (None, None, "vector")),
]


class MLLMInputs(NamedTuple):
    """What the language model reads of each sample, padded to one length (data_pipelines/mllm_inputs.py)."""

    tokens: Int[Array, "B S"]
    """Token ids; a placeholder in the place of each vision feature."""
    mask: Bool[Array, "B S"]
    """False for padding."""
    positions: Int[Array, "B 3 S"]
    """Time, height and width of every token."""
    features: Float[Array, "B V D"]
    """Vision features of the first frame and of the reference video, from the frozen vision tower."""
    source: Int[Array, "B S"]
    """The row of `features` that replaces a token's embedding, or -1."""


# The text around the inputs, in Qwen's chat format.
USER, BREAK, ASSISTANT = "user\n", "\n", "assistant\n"
FIXED_TOKENS = 2 * 2 + 3 + len(USER + BREAK + ASSISTANT)  # start and end of two clips, three marks of turns, a token for every byte


class Size(NamedTuple):
    """The size of a clip when the vision tower reads it."""

    height: int
    width: int
    grid: Grid
    features: int
    """Number of vision features, each in the place of one token."""


def sizes(config: Config) -> tuple[Size, Size]:
    """The sizes of the first frame and of the reference."""
    return _size(config, config.video, 1), _size(config, config.data.reference, config.alignment.frames)


def lengths(config: Config) -> tuple[int, int]:
    """Tokens S and vision features V of every sample; S is enough for any vocabulary that has a token for every byte."""
    features = sum(size.features for size in sizes(config))
    return FIXED_TOKENS + features + config.alignment.prompt_tokens, features


def _size(config: Config, video: VideoConfig, frames: int) -> Size:
    vision = config.mllm.vision
    square = (vision.patch * vision.merge) ** 2
    height, width = fit(video.height, video.width, vision, min_pixels=square, max_pixels=config.alignment.frame_pixels)
    grid = grid_of(frames, height, width, vision)
    return Size(height, width, grid, grid[0] * grid[1] * grid[2] // vision.merge**2)


class Alignment(nnx.Module):
    """The language model with its adapters, the queries of every task, and the connector; without the frozen vision tower."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.mllm = Qwen2_5VL(config.mllm, rngs=rngs)
        del self.mllm.vision  # its features are in the inputs (data_pipelines/mllm_inputs.py)
        lora.add_lora(self.mllm, config.lora, rngs=rngs)
        shape = (len(tasks.TASKS), config.alignment.queries, config.mllm.dim)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), shape) * config.mllm.dim**-0.5)
        out_dim = config.dit.text_dim if config.alignment.into == "text_embedder" else config.dit.dim
        self.connector = Connector(config.mllm.dim, config.alignment.connector_dim, out_dim, rngs=rngs)

    def __call__(self, inputs: MLLMInputs, task: Int[Array, " B"], shard: Shard = UNSHARDED) -> Float[Array, "B Q E"]:
        """The context of each sample, by the queries of its task, float32. The language model's tokens are divided over the devices."""
        x = embed(self.mllm, inputs)
        queries = self.queries.astype(x.dtype)[task]
        count = queries.shape[1]
        # The queries have positions like text: one more each, from the last position of the inputs on.
        last = jnp.where(inputs.mask[:, None], inputs.positions, -1).max(axis=(1, 2))
        following = jnp.broadcast_to((last[:, None] + 1 + jnp.arange(count)[None])[:, None], (x.shape[0], 3, count))
        positions = jnp.concatenate([inputs.positions, following], axis=-1).swapaxes(0, 1)
        mask = jnp.concatenate([inputs.mask, jnp.ones((x.shape[0], count), bool)], axis=1)
        states = self.mllm(jnp.concatenate([x, queries], axis=1), positions, mask, shard)
        return self.connector(states[:, -count:])


def embed(mllm: Qwen2_5VL, inputs: MLLMInputs) -> Float[Array, "B S D"]:
    """The language model's input embeddings: those of the tokens, replaced by the vision features where `source` names one."""
    x = mllm.embed(inputs.tokens)
    features = jnp.take_along_axis(inputs.features, jnp.maximum(inputs.source, 0)[..., None], axis=1).astype(x.dtype)
    return jnp.where(inputs.source[..., None] >= 0, features, x)


class Connector(nnx.Module):
    """Three linear layers with GELU between them (section 4.4 says three layers; the rest is decision D5)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.first = Linear(in_dim, hidden_dim, rngs=rngs)
        self.second = Linear(hidden_dim, hidden_dim, rngs=rngs)
        self.third = Linear(hidden_dim, out_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q E"]:
        return self.third(jax.nn.gelu(self.second(jax.nn.gelu(self.first(x)))))
