"""The batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from configs.run import Config
from omnitransfer_jax.models.alignment import MLLMInputs, lengths


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


def batch_spec(config: Config) -> Batch:
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
