"""Task-adaptive multimodal alignment (paper section 4.4): what the transformer is told from stage 2 on, in place of the UMT5 text.

    [first frame, reference video, template, prompt] -> Qwen2.5-VL with LoRA <- the task's MetaQueries, behind everything else
    the queries' last states -> connector -> context of the target's cross-attention

Only the queries' states leave, so the context has as many rows as a task has queries, whatever was shown.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from configs.run import Config, VideoConfig
from omnitransfer_jax import tasks
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
    """What the language model sees of each sample, padded to one length (data_pipelines/mllm_inputs.py)."""

    tokens: Int[Array, "B S"]
    """Token ids; placeholders where vision features go."""
    mask: Bool[Array, "B S"]
    """False for padding."""
    positions: Int[Array, "B 3 S"]
    """Time, height and width of every token."""
    features: Float[Array, "B V D"]
    """Features of the first frame and of the reference video, from the frozen vision tower."""
    source: Int[Array, "B S"]
    """The row of `features` that stands in a token's place, or -1."""


# The words around what is shown, in Qwen's chat form: two clips' brackets, the turns' marks, and text of at most a token a byte.
USER, BREAK, ASSISTANT = "user\n", "\n", "assistant\n"
FIXED = 2 * 2 + 3 + len(USER + BREAK + ASSISTANT)


class Size(NamedTuple):
    """A clip as the vision tower sees it."""

    height: int
    width: int
    grid: Grid
    features: int
    """Tokens of the language model."""


def sizes(config: Config) -> tuple[Size, Size]:
    """Of the first frame and of the reference."""
    return _size(config, config.video, 1), _size(config, config.data.reference, config.alignment.frames)


def lengths(config: Config) -> tuple[int, int]:
    """Tokens S and features V of every sample; S is enough for any vocabulary that knows single bytes."""
    features = sum(size.features for size in sizes(config))
    return FIXED + features + config.alignment.prompt_tokens, features


def _size(config: Config, video: VideoConfig, frames: int) -> Size:
    vision = config.mllm.vision
    square = (vision.patch * vision.merge) ** 2
    height, width = fit(video.height, video.width, vision, min_pixels=square, max_pixels=config.alignment.frame_pixels)
    grid = grid_of(frames, height, width, vision)
    return Size(height, width, grid, grid[0] * grid[1] * grid[2] // vision.merge**2)


class Alignment(nnx.Module):
    """The language model with its adapters, the queries of every task, and the connector; the vision tower is not among them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.mllm = Qwen2_5VL(config.mllm, rngs=rngs)
        del self.mllm.vision  # frozen, and run once for every clip: data_pipelines/mllm_inputs.py
        lora.add_lora(self.mllm, config.lora, rngs=rngs)
        shape = (len(tasks.TASKS), config.alignment.queries, config.mllm.dim)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), shape) * config.mllm.dim**-0.5)
        out_dim = config.dit.text_dim if config.alignment.into == "text_embedder" else config.dit.dim
        self.connector = Connector(config.mllm.dim, config.alignment.connector_dim, out_dim, rngs=rngs)

    def __call__(self, shown: MLLMInputs, task: Int[Array, " B"]) -> Float[Array, "B Q E"]:
        """The context of each sample's task, float32."""
        x = embed(self.mllm, shown)
        queries = self.queries.astype(x.dtype)[task]
        count = queries.shape[1]
        # The queries are text to the rotation: they count on behind the last token shown.
        last = jnp.where(shown.mask[:, None], shown.positions, -1).max(axis=(1, 2))
        behind = jnp.broadcast_to((last[:, None] + 1 + jnp.arange(count)[None])[:, None], (x.shape[0], 3, count))
        positions = jnp.concatenate([shown.positions, behind], axis=-1).swapaxes(0, 1)
        mask = jnp.concatenate([shown.mask, jnp.ones((x.shape[0], count), bool)], axis=1)
        states = self.mllm(jnp.concatenate([x, queries], axis=1), positions, mask)
        return self.connector(states[:, -count:])


def embed(mllm: Qwen2_5VL, shown: MLLMInputs) -> Float[Array, "B S D"]:
    """What the language model takes for all that is shown: its words' embeddings, and the features in their places."""
    x = mllm.embed(shown.tokens)
    seen = jnp.take_along_axis(shown.features, jnp.maximum(shown.source, 0)[..., None], axis=1).astype(x.dtype)
    return jnp.where(shown.source[..., None] >= 0, seen, x)


class Connector(nnx.Module):
    """Three linear layers with GELU between them (section 4.4 says three layers; the rest is decision D5)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, rngs: nnx.Rngs):
        self.first = Linear(in_dim, hidden_dim, rngs=rngs)
        self.second = Linear(hidden_dim, hidden_dim, rngs=rngs)
        self.third = Linear(hidden_dim, out_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q E"]:
        return self.third(jax.nn.gelu(self.second(jax.nn.gelu(self.first(x)))))
