"""What the network costs: floating-point operations of its matrix products, counted from the sizes alone.

Only useful work counts: a target reads itself and its references, a reference reads itself (or, in the bidirectional form, everything),
and nothing is counted twice for being recomputed. Left out, under 1% together at full size: the embeddings, the head, the CLIP branch and
everything that is not a product.
"""

import math
from typing import Literal

from configs.base import DiTConfig
from configs.run import Config, ReferenceCache, SamplerConfig, VideoConfig

Trained = Literal["weights", "adapters", "context"]
"""What a step trains: the transformer's weights, whose gradients cost twice the forward pass; adapters in it, whose gradients go through
its activations alone; or what makes its context, from which a gradient goes back through the target and not through references."""


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


def read_again(config: DiTConfig, tokens: int) -> int:
    """Keys and values of a reference projected from cached activations, at every step."""
    return config.num_layers * 2 * tokens * 2 * config.dim**2


def cache_bytes(config: DiTConfig, cache: ReferenceCache, tokens: int) -> int:
    """What `sampler.reference_cache` keeps of a reference of so many tokens."""
    number = {"float32": 4, "bfloat16": 2}[config.dtype]
    size = {"full": 2 * number, "activations": number, "float8": 2, "int8": 2, "none": 0}[cache] * config.dim
    factors = 2 * 4 * config.num_heads if cache in ("float8", "int8") else 0
    return config.num_layers * tokens * (size + factors)


def denoising(config: DiTConfig, sampler: SamplerConfig, tokens: int, reference: int, frame: int) -> int:
    """All steps and passes of a sampling; arguments as for `reference_note`."""
    cache, passes = sampler.reference_cache, sampler.steps * (1 if sampler.guidance == 1 else 2)
    reads = frame if config.reach == "same_frame" else reference
    step = target_pass(config, tokens, reads) + (read_again(config, reference) if cache == "activations" else 0)
    once, each = (0, reference_pass(config, reference)) if cache == "none" else (reference_pass(config, reference), 0)
    return once + passes * (step + each)


def reference_note(config: DiTConfig, sampler: SamplerConfig, tokens: int, reference: int, frame: int) -> str:
    """One line for people: what a reference of so many tokens, `frame` a frame, costs a sampling of a target of `tokens`.

    The share of work is that of all steps and passes, against a network that reads target and reference as one sequence at each.
    """
    cache = sampler.reference_cache
    passes = sampler.steps * (1 if sampler.guidance == 1 else 2)
    share = denoising(config, sampler, tokens, reference, frame) / (passes * target_pass(config, tokens + reference))
    kept = f"{cache_bytes(config, cache, reference) / 1e9:.3g} GB of cache ({cache})" if cache != "none" else "no cache"
    return f"reference: {reference:,} tokens, {kept}, {share:.0%} of the work of one sequence with it"


def note_of(config: Config) -> str:
    """`reference_note` of a target and a reference of the configured sizes."""
    return reference_note(config.dit, config.sampler, *_sizes(config))


def sampling(config: Config) -> int:
    """`denoising` of a target and a reference of the configured sizes."""
    return denoising(config.dit, config.sampler, *_sizes(config))


def _sizes(config: Config) -> tuple[int, int, int]:
    """Tokens of the target, of the reference, and of one frame of the reference."""
    _, rows, columns = config.data.reference.patches(config.vae, config.dit.patch)
    return tokens(config, config.video), tokens(config, config.data.reference), rows * columns


def train_step(config: Config, trains: Trained = "weights") -> int:
    """A training step: forward of target and reference, and what the gradients of what it `trains` need, for every sample."""
    target, reference = tokens(config, config.video), tokens(config, config.data.reference)
    beside = 0
    if not config.train.references:
        forward = target_pass(config.dit, target)
    elif config.dit.references == "bidirectional":
        forward = target_pass(config.dit, target + reference)
    else:
        _, rows, columns = config.data.reference.patches(config.vae, config.dit.patch)
        reads = rows * columns if config.dit.reach == "same_frame" else reference
        forward, beside = target_pass(config.dit, target, reads), reference_pass(config.dit, reference)
    sample = {"weights": 3 * (forward + beside), "adapters": 2 * (forward + beside), "context": 2 * forward + beside}
    return sample[trains] * config.train.batch_size


def train_tokens(config: Config) -> int:
    """Tokens of a training step, of targets and references."""
    references = tokens(config, config.data.reference) if config.train.references else 0
    return (tokens(config, config.video) + references) * config.train.batch_size


def tokens(config: Config, video: VideoConfig) -> int:
    """Tokens of a video in the transformer."""
    return math.prod(video.patches(config.vae, config.dit.patch))
