"""OmniTransfer's training (paper section 4): the target's velocity by flow matching, reading a noise-free reference.

    draw times, noise and dropped prompts -> noisy target -> context -> velocity -> squared error of each sample

Stages 0 to 3 are this one objective. They differ in data, in `train.trainable`, in where they start and in numbers.
"""

import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from configs.buckets import bucket_configs
from configs.run import Config
from omnitransfer_jax.batch import Batch, batch_spec
from omnitransfer_jax.flow import TIMESTEPS, draw_time, interpolate, loss_per_example, loss_weight
from omnitransfer_jax.load_models import EXPERTS
from omnitransfer_jax.mesh import Shard
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import SHARDING, OmniTransfer, make_reference
from omnitransfer_jax.tasks import TASKS
from omnitransfer_jax.train import flops
from omnitransfer_jax.train.log import LOSS, SHARE
from omnitransfer_jax.train.objective import Form, Metrics, Objective, Params

BINS = 5  # parts of the time whose losses are logged apart


class Drawn(NamedTuple):
    """The random numbers of a step."""

    time: Float[Array, " B"]
    noise: Float[Array, "B F H W C"]
    drop_text: Float[Array, " B"]
    """1 where the prompt is replaced by the empty one."""


def objective(config: Config, empty_text: Float[np.ndarray, "S E"] | None = None) -> Objective:
    """The objective of a stage. `empty_text` encodes the empty prompt, which dropped prompts become; zeros if it is not given."""
    model = abstract(lambda rngs: OmniTransfer(config, rngs=rngs))
    empty = np.zeros((config.dit.text_len, config.dit.text_dim), np.float32) if empty_text is None else empty_text
    params = flat_params(model)
    transformer = [path.replace(".", "/", 1) for path in params if path.startswith("dit.")]
    learns = any(re.fullmatch(pattern, name) for pattern in config.train.trainable for name in transformer)
    first, *others = forms(config, "weights" if learns else "context")
    return Objective(
        params=params,
        sharding=SHARDING,
        trainable=config.train.trainable,
        batch=first.batch,
        others=tuple(others),
        draw=partial(draw, config),
        loss=partial(loss, config, model, empty),
        init=lambda: flat_params(OmniTransfer(config, rngs=nnx.Rngs(keys(config)[0]))),
        root_key=lambda: keys(config)[1],
        stacks={"dit.blocks.": config.dit.dtype, **({"alignment.mllm.layers.": config.mllm.dtype} if config.alignment.enabled else {})},
        frozen_dtype=config.dit.dtype,
        models=config,
        imported={"dit.": EXPERTS[config.train.expert or "high_noise"], "alignment.mllm.": "mllm"},
        flops=first.flops,
        tokens=first.tokens,
    )


def forms(config: Config, trains: flops.Trained) -> list[Form]:
    """The batches of each bucket, and what a step on them costs."""
    return [Form(batch_spec(each), flops.train_step(each, trains), flops.train_tokens(each)) for each in bucket_configs(config).values()]


def keys(config: Config) -> Array:
    """The keys of the initial weights and of the steps."""
    return jax.random.split(jax.random.key(config.seed))


def draw(config: Config, key: Array, batch: Batch) -> Drawn:
    """Times, noise and dropped prompts of one step."""
    key_time, key_noise, key_drop = jax.random.split(key, 3)
    size = batch.target.shape[0]
    return Drawn(
        draw_time(key_time, size, config.train.shift),
        jax.random.normal(key_noise, batch.target.shape),
        jax.random.bernoulli(key_drop, config.data.text_drop, (size,)).astype(jnp.float32),
    )


def loss(
    config: Config, model: OmniTransfer, empty_text: Any, params: Params, batch: Batch, drawn: Drawn, shard: Shard
) -> tuple[Float[Array, " B"], Metrics]:
    """The loss of each sample: flow matching on the target, which reads its reference unless `train.references` is off."""
    model = with_params(model, params)
    x = interpolate(batch.target, drawn.noise, drawn.time)
    if model.alignment is None:
        context, empty = batch.text, jnp.asarray(empty_text)[None]
    else:
        assert batch.mllm_inputs is not None  # records of a configuration with alignment have them
        context, empty = model.alignment(batch.mllm_inputs, batch.task, shard), jnp.zeros((1, 1, 1))
    context = jnp.where(drawn.drop_text[:, None, None] > 0, empty, context)
    reference = make_reference(batch.reference, batch.task, model.dit.grid(x), by=config.dit.offsets, flag=config.dit.reference_flag)
    velocity = model.dit(
        jnp.concatenate([x, batch.condition], axis=-1),
        TIMESTEPS * drawn.time,
        context,
        batch.image,
        batch.has_image,
        (reference,) if config.train.references else (),
        shard=shard,
        embed_text=model.embed_text,
    )
    losses = loss_weight(drawn.time, config.train.weighting, config.train.shift) * loss_per_example(velocity, batch.target, drawn.noise)
    return losses, of_groups(losses, batch.task, drawn.time)


def of_groups(losses: Float[Array, " B"], task: Int32[Array, " B"], time: Float[Array, " B"]) -> Metrics:
    """The losses of each task and of each fifth of the time, zeros elsewhere, and which samples they are of (train/log.py)."""
    groups = {each.name: task == number for number, each in enumerate(TASKS)}
    groups |= {f"t{k / BINS:.1f}-{(k + 1) / BINS:.1f}": jnp.minimum(jnp.floor(time * BINS), BINS - 1) == k for k in range(BINS)}
    found: Metrics = {}
    for name, belongs in groups.items():
        found |= {f"{LOSS}{name}": jnp.where(belongs, losses, 0.0), f"{SHARE}{name}": belongs.astype(losses.dtype)}
    return found
