"""The programs that launch.compile compiles, traced for devices that are not here: a training step, a sampling, the encoders."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from configs.errors import require
from configs.run import Config
from data_pipelines import mllm_inputs
from launch.train import objective
from omnitransfer_jax import samplers
from omnitransfer_jax.compiled import encoding
from omnitransfer_jax.mesh import batch_sharding, placed, replicated, specs
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.alignment import sizes
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import abstract_conditions, denoise_part, program_on
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.train import flops, loop
from omnitransfer_jax.train.optimizer import make_optimizer
from omnitransfer_jax.train.step import placed_state


class Program(NamedTuple):
    """What is compiled."""

    traced: Any
    useful: float
    """Operations that the method needs, of all devices."""
    params: int
    """Of the network that it runs."""
    network: str = ""
    """Name of that network, which several encoders share."""
    weights: int = 0
    """Bytes of it on one device, also of what this program does not read."""
    inputs: int = 0
    """Bytes of what else it reads."""
    times: int = 1
    """How often launch.encode runs it for a pair."""


def train(config: Config, mesh: Mesh) -> Program:
    """A training step, as the loop compiles it."""
    trained = objective(config)
    optimizer = make_optimizer(config.optimizer, config.train.steps, trained.matrices)
    spec = specs({**trained.params, **trained.base}, trained.sharding, config.mesh)
    like = placed_state(trained, config, optimizer, mesh, spec)
    base = placed(mesh, dict(trained.base), {path: spec[path] for path in trained.base})
    key = placed(mesh, jax.eval_shape(trained.root_key), PartitionSpec())
    places = jax.tree.map(lambda leaf: leaf.sharding, like), replicated(mesh)
    step = jax.jit(loop.make_step(trained, config, optimizer, mesh, spec), donate_argnums=0, out_shardings=places)
    traced = step.trace(like, placed(mesh, trained.batch, batch_sharding(mesh).spec), key, base)
    require(trained.flops is not None, "--config: the operations of this training are not counted")
    return Program(traced, float(trained.flops or 0), sum(leaf.size for leaf in trained.params.values()))


def sample(config: Config, mesh: Mesh) -> Program:
    """A whole sampling of one video from one reference, with the reference's cache and guidance."""
    expert = samplers.experts(config.sampler)[0]
    run, params = program_on(mesh, config, partial(denoise_part, config, None))
    trees = placed(mesh, abstract_conditions(config), PartitionSpec())
    traced = run.trace(params, trees, batched=config.mesh.data == 1, static=(expert,))
    return Program(traced, float(flops.sampling(config)), sum(leaf.size for leaf in params.values()))


def encode(config: Config, mesh: Mesh) -> dict[str, Program]:
    """What launch.encode runs for one pair, each encoder by its name, on one device.

    The weights have the type in which their network computes.
    """

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))

    def network(make: Callable[[nnx.Rngs], Any], dtype: str) -> Any:
        model = abstract(make)
        return with_params(model, {path: array(leaf.shape, jnp.dtype(dtype)) for path, leaf in flat_params(model).items()})

    def program(part: str, run: Callable[..., Any], useful: int, model: Any, *arrays: Any, times: int = 1) -> Program:
        traced = jax.jit(partial(run)).trace(
            model, *arrays
        )  # as a function of its own: JAX keeps what it traced for the device that is here
        leaves = flat_params(model).values()
        return Program(traced, float(useful), sum(leaf.size for leaf in leaves), part, of_bytes(leaves), of_bytes(arrays), times)

    target, reference, tokens = config.video, config.data.reference, config.dit.text_len
    frame = array((1, target.height, target.width, 3))
    vae = network(lambda rngs: WanVAE(config.vae, rngs=rngs), config.vae.dtype)
    # A first frame is followed by grey and encoded as a clip is, so the target's program stands for it too.
    clips = {"clips": (target, 3)} if reference == target else {"targets": (target, 2), "references": (reference, 1)}
    found = {}
    for name, (size, times) in clips.items():
        clip = array((1, size.frames, size.height, size.width, 3))
        found[name] = program("vae", WanVAE.encode, encoding.latents(config.vae, size), vae, clip, times=times)
    text = network(lambda rngs: UMT5Encoder(config.text, rngs=rngs), config.text.dtype)
    words, mask = array((1, tokens), jnp.int32), array((1, tokens), jnp.bool_)
    found["text"] = program("text", omnitransfer.encode_text, encoding.text(config.text, tokens), text, words, mask)
    if config.dit.image_dim is not None:
        clip = network(lambda rngs: CLIPVision(config.image, rngs=rngs), config.image.dtype)
        found["image"] = program("image", omnitransfer.encode_image, encoding.image(config.image), clip, frame)
    if config.alignment.enabled:
        tower = network(lambda rngs: Qwen2_5VL(config.mllm, rngs=rngs), config.mllm.dtype).vision
        grids = [size.grid for size in sizes(config)]
        clip = array((1, config.alignment.frames, reference.height, reference.width, 3))
        useful = encoding.vision(config.mllm.vision, config.mllm.dim, grids)
        found["vision"] = program("vision", partial(mllm_inputs.vision_features, config), useful, tower, frame, array((1,)), clip)
    return found


def of_bytes(arrays: Iterable[Any]) -> int:
    """Their size."""
    return sum(each.size * each.dtype.itemsize for each in arrays)
