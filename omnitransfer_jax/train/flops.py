"""What the network costs: floating-point operations of its matrix products, counted from the sizes alone.

Only useful work counts: a target reads itself and its references, a reference reads itself (or, in the bidirectional form, everything),
and nothing is counted twice for being recomputed. Left out, under 1% together at full size: the embeddings, the head, the CLIP branch and
everything that is not a product.
"""

import math

from configs.base import DiTConfig
from configs.run import Config, VideoConfig


def target_pass(config: DiTConfig, tokens: int, reference_tokens: int = 0) -> int:
    """One pass of a target that reads the kept keys and values of its references."""
    dim, context = config.dim, config.text_len
    linears = tokens * (6 * dim**2 + 2 * dim * config.ffn_dim) + context * 2 * dim**2  # q k v o, cross q o, up down; text k v
    attended = tokens * (tokens + reference_tokens + context)
    return config.num_layers * (2 * linears + 4 * attended * dim)


def reference_pass(config: DiTConfig, tokens: int) -> int:
    """One pass of a reference: no cross-attention."""
    dim = config.dim
    return config.num_layers * (2 * tokens * (4 * dim**2 + 2 * dim * config.ffn_dim) + 4 * tokens**2 * dim)


def train_step(config: Config) -> int:
    """A training step: forward of target and reference, and twice as much again for the gradients, for every sample."""
    target, reference = tokens(config, config.video), tokens(config, config.data.reference)
    if not config.train.references:
        forward = target_pass(config.dit, target)
    elif config.dit.references == "bidirectional":
        forward = target_pass(config.dit, target + reference)
    else:
        forward = target_pass(config.dit, target, reference) + reference_pass(config.dit, reference)
    return 3 * forward * config.train.batch_size


def tokens(config: Config, video: VideoConfig) -> int:
    """Tokens of a video in the transformer."""
    return math.prod(video.patches(config.vae, config.dit.patch))
