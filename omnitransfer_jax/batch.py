"""The one schema of a batch, from the record on disk to the device: its fields, and the shape and type of each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from configs.base import MASK_CHANNELS
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
    image: Float[Array, "B I J"] | None
    """CLIP features of the first frame; None for a network without an image branch."""
    has_image: Float[Array, " B"]
    """1 for image-to-video samples, 0 for the others, whose `image` is not used."""
    mllm_inputs: MLLMInputs | None = None
    """What the language model reads, from stage 2 on, where `text` is not used."""


def sample_spec(config: Config) -> Batch:
    """Shape and type of one sample: the fields of `Batch` without the batch axis."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    target, clip, (tokens, features) = config.video.latent_shape(config.vae), config.image, lengths(config)
    image = array(jnp.float32, (clip.image_size // clip.patch) ** 2 + 1, clip.dim)
    inputs = MLLMInputs(
        tokens=array(jnp.int32, tokens),
        mask=array(jnp.bool_, tokens),
        positions=array(jnp.int32, 3, tokens),
        features=array(jnp.float32, features, config.mllm.dim),
        source=array(jnp.int32, tokens),
    )
    return Batch(
        task=array(jnp.int32),
        target=array(jnp.float32, *target),
        condition=array(jnp.float32, *target[:-1], MASK_CHANNELS + config.vae.z_dim),
        reference=array(jnp.float32, *config.data.reference.latent_shape(config.vae)),
        text=array(jnp.float32, config.dit.text_len, config.text.dim),
        image=None if config.dit.image_dim is None else image,
        has_image=array(jnp.float32),
        mllm_inputs=inputs if config.alignment.enabled else None,
    )


def batch_spec(config: Config) -> Batch:
    """Shape and type of a whole batch over all processes."""
    size = config.train.batch_size
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), sample_spec(config))
