"""Training: the state of a run, and the step that turns a batch into the next state. The loop around it is `run.py`.

    draw times and noise -> corrupt the targets -> velocity, reading the references -> loss per example -> gradients -> update

Everything a step needs is in its arguments: state, batch, key. The stages differ in data, in `train.trainable`, in where they start
and in numbers; nothing here asks which one it is.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey
from jaxtyping import Array, Float, Int32

from configs.errors import require
from configs.run import Config, TransferTrainConfig
from omnitransfer_jax.flow import TIMESTEPS, draw_time, interpolate, loss_per_example, loss_weight
from omnitransfer_jax.mesh import CONTEXT, DATA, layer_gatherer, unshard
from omnitransfer_jax.models.alignment import MLLMInputs, lengths
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer, make_reference
from omnitransfer_jax.models.wan_dit import Shard

Params = dict[str, Array]
LAYERS = "dit.blocks."  # where the paths of the transformer's stacked layers begin


class Batch(NamedTuple):
    """One training batch, as data_pipelines/batches.py makes it; tasks may be mixed freely."""

    task: Int32[Array, " B"]
    """Index into `tasks.TASKS`."""
    target: Float[Array, "B F H W C"]
    """Clean latents of the target."""
    condition: Float[Array, "B F H W M"]
    """Mask and first-frame latents of the target; the mask is 0 for text-to-video samples."""
    reference: Float[Array, "B f h w C"]
    """Clean latents of the reference."""
    text: Float[Array, "B S E"]
    """Encoded prompt, zero rows beyond its end."""
    image: Float[Array, "B I J"]
    """CLIP features of the first frame."""
    has_image: Float[Array, " B"]
    """1 for image-to-video samples, 0 for the others, whose `image` counts for nothing."""
    mllm_inputs: MLLMInputs | None = None
    """What the language model sees, from stage 2 on, where `text` is not read."""


class Corruption(NamedTuple):
    """The random part of a step, drawn for the whole batch before it is divided, so that no division changes it."""

    time: Float[Array, " B"]
    noise: Float[Array, "B F H W C"]
    drop_text: Float[Array, " B"]
    """1 where the prompt is replaced by the empty one."""


class TrainState(NamedTuple):
    """All that changes in a run. Parameters are flat: path -> array."""

    step: Int32[Array, ""]
    trainable: Params
    frozen: Params
    moments: Any
    """The optimizer's state, for the trainable parameters alone."""
    ema: Params
    """Running average of the trainable parameters; empty if there is none."""
    skipped: Int32[Array, ""]
    """Updates left out because they were not finite."""


def split_trainable(params: Mapping[str, Any], config: TransferTrainConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) by `config.trainable`, whose expressions match whole names, `dit/blocks...` or `alignment/queries`."""
    chosen = {p for p in params if any(re.fullmatch(pattern, _name(p)) for pattern in config.trainable)}
    return {p: x for p, x in params.items() if p in chosen}, {p: x for p, x in params.items() if p not in chosen}


def _name(path: str) -> str:
    """A parameter's name for people: its part, a slash, its path in the part."""
    return path.replace(".", "/", 1)


def abstract_params(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of every parameter by path; a `RequestError` if an expression of `train.trainable` names none of them."""
    params = flat_params(abstract(lambda rngs: OmniTransfer(config, rngs=rngs)))
    for pattern in config.train.trainable:
        require(
            any(re.fullmatch(pattern, _name(path)) for path in params),
            f"train.trainable: {pattern!r} matches no parameter; they are named like {_name(min(params))}",
        )
    return params


def abstract_batch(config: Config) -> Batch:
    """Shape and type of a whole batch, as the records of this configuration give it."""
    size, vae, dit, image = config.train.batch_size, config.vae, config.dit, config.image

    target = config.video.latent_shape(vae)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    return Batch(
        task=array(jnp.int32),
        target=array(jnp.float32, *target),
        condition=array(jnp.float32, *target[:-1], dit.in_channels - vae.z_dim),
        reference=array(jnp.float32, *config.data.reference.latent_shape(vae)),
        text=array(jnp.float32, dit.text_len, dit.text_dim),
        image=array(jnp.float32, (image.image_size // image.patch) ** 2 + 1, image.dim),
        has_image=array(jnp.float32),
        mllm_inputs=abstract_mllm_inputs(config) if config.alignment.enabled else None,
    )


def abstract_mllm_inputs(config: Config) -> MLLMInputs:
    """Shape and type of what the language model is shown in a batch."""
    size, (tokens, features) = config.train.batch_size, lengths(config)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    return MLLMInputs(
        tokens=array(jnp.int32, tokens),
        mask=array(jnp.bool_, tokens),
        positions=array(jnp.int32, 3, tokens),
        features=array(jnp.float32, features, config.mllm.dim),
        source=array(jnp.int32, tokens),
    )


def init_state(params: Params, config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    trainable, frozen = split_trainable(params, config.train)
    frozen = {path: x.astype(config.dit.dtype) for path, x in frozen.items()}  # what it is computed in; there is nothing to accumulate
    ema = jax.tree.map(jnp.copy, trainable) if config.train.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable), ema, jnp.zeros((), jnp.int32))


def abstract_state(config: Config, mesh: Mesh, specs: Mapping[str, P], optimizer: optax.GradientTransformation) -> TrainState:
    """Shape, type and place of everything in the state: what is kept of a parameter lies as the parameter does."""
    state = jax.eval_shape(lambda params: init_state(params, config, optimizer), abstract_params(config))

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = specs[path[-1].key] if isinstance(path[-1], DictKey) else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(placed, state)


def corrupt(key: Array, batch: Batch, config: Config) -> Corruption:
    """Times, noise and dropped prompts of one step."""
    key_time, key_noise, key_drop = jax.random.split(key, 3)
    size = batch.target.shape[0]
    return Corruption(
        draw_time(key_time, size, config.train.shift),
        jax.random.normal(key_noise, batch.target.shape),
        jax.random.bernoulli(key_drop, config.data.text_drop, (size,)).astype(jnp.float32),
    )


def losses(
    model: OmniTransfer, batch: Batch, drawn: Corruption, empty_text: Float[Array, "S E"], config: TransferTrainConfig, shard: Shard
) -> Float[Array, " B"]:
    """The loss of each sample: flow matching on the target, which reads its reference unless `config.references` is off."""
    x = interpolate(batch.target, drawn.noise, drawn.time)
    if model.alignment is None:
        text, nothing = batch.text, empty_text[None]
    else:
        assert batch.mllm_inputs is not None  # records of a configuration with alignment have it
        text, nothing = model.alignment(batch.mllm_inputs, batch.task), jnp.zeros((1, 1, 1))
    text = jnp.where(drawn.drop_text[:, None, None] > 0, nothing, text)
    reference = make_reference(batch.reference, batch.task, model.dit.grid(x), by=model.dit.config.offsets)
    velocity = model.dit(
        jnp.concatenate([x, batch.condition], axis=-1),
        TIMESTEPS * drawn.time,
        text,
        batch.image,
        batch.has_image,
        (reference,) if config.references else (),
        shard=shard,
        embed_text=model.embed_text,
    )
    return loss_weight(drawn.time, config.weighting) * loss_per_example(velocity, batch.target, drawn.noise)


def make_loss(config: Config, mesh: Mesh, specs: Mapping[str, P]) -> Callable[[Params, Batch, Corruption, Array], Float[Array, ""]]:
    """The mean loss over a batch as a function of all parameters, computed by all devices of `mesh`.

    Each device holds its part of the parameters (`specs`), of the batch and of every sample's tokens. The transformer's layers are
    completed one at a time; the rest, the language model included, is small beside it and completed at once.
    """
    blank = abstract(lambda rngs: OmniTransfer(config, rngs=rngs))
    shard = Shard(CONTEXT, layer_gatherer({p.removeprefix(LAYERS): s for p, s in specs.items() if p.startswith(LAYERS)}))

    def local_loss(params: Params, batch: Batch, drawn: Corruption, empty_text: Array) -> Array:
        params = {p: x if p.startswith(LAYERS) else unshard(x, specs[p]) for p, x in params.items()}
        mean = losses(with_params(blank, params), batch, drawn, empty_text, config.train, shard).mean()
        return jax.lax.pmean(mean, (DATA, CONTEXT))

    rows = P(DATA)
    return jax.shard_map(local_loss, mesh=mesh, in_specs=(dict(specs), rows, rows, P()), out_specs=P())


def make_train_step(
    config: Config, mesh: Mesh, specs: Mapping[str, P], optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch, Array, Array], tuple[TrainState, dict[str, Array]]]:
    """train_step(state, batch, key, empty_text) -> (state, metrics), pure, to be compiled once for all tasks."""
    loss_of = make_loss(config, mesh, specs)
    parts = config.optimizer.accumulate

    def gradients(state: TrainState, batch: Batch, drawn: Corruption, empty_text: Array) -> tuple[Array, Params]:
        """Mean loss and gradients, `load_models` pieces of the batch one after the other."""

        def loss(trainable: Params, batch: Batch, drawn: Corruption) -> Array:
            return loss_of(trainable | state.frozen, batch, drawn, empty_text)

        value_and_grad = jax.value_and_grad(loss)
        if parts == 1:
            return value_and_grad(state.trainable, batch, drawn)

        def add(total, piece):
            return jax.tree.map(lambda a, b: a + b / parts, total, value_and_grad(state.trainable, *piece)), None

        # Every part takes an equal share of each device's rows.
        pieces = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), (batch, drawn))
        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable)
        return jax.lax.scan(add, zero, pieces)[0]

    def train_step(state: TrainState, batch: Batch, key: Array, empty_text: Array) -> tuple[TrainState, dict[str, Array]]:
        drawn = corrupt(key, batch, config)
        loss, grads = gradients(state, batch, drawn, empty_text)
        norm = optax.tree.norm(grads)
        updates, moments = optimizer.update(grads, state.moments, state.trainable)
        trainable: Any = optax.apply_updates(state.trainable, updates)
        number = state.step - state.skipped + 1  # of this update
        decay = jnp.minimum(config.train.ema, (1 + number) / (10 + number))
        ema = {p: decay * old + (1 - decay) * trainable[p] for p, old in state.ema.items()}
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        moved = (trainable, moments, ema)
        stayed = (state.trainable, state.moments, state.ema)
        trainable, moments, ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, stayed)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        state = TrainState(state.step + 1, trainable, state.frozen, moments, ema, skipped)
        return state, {"loss": loss, "grad_norm": norm, "skipped": skipped}

    return train_step
