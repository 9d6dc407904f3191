"""The counted operations of the encoders are those of the programs that JAX traces for them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage3
from configs.run import VideoConfig
from omnitransfer_jax.compiled import encoding
from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.flat_params import abstract
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_vae import WanVAE

SMOKE = stage3.get_config("smoke")


def counted(function, *args, branch=0) -> int:
    """Operations of the products and convolutions of a function; of every conditional those of one branch."""

    def of(jaxpr) -> int:
        total = 0
        for line in jaxpr.eqns:
            inputs, outputs = [each.aval.shape for each in line.invars], [each.aval.shape for each in line.outvars]
            if line.primitive.name == "dot_general":
                (summed, _), _ = line.params["dimension_numbers"]
                total += 2 * int(np.prod(outputs[0])) * int(np.prod([inputs[0][axis] for axis in summed]))
            elif line.primitive.name == "conv_general_dilated":
                kernel, numbers = inputs[1], line.params["dimension_numbers"]
                total += 2 * int(np.prod(outputs[0])) * int(np.prod(kernel)) // kernel[numbers.rhs_spec[0]]
            elif line.primitive.name == "cond":
                total += of(line.params["branches"][branch].jaxpr)
            else:
                inner = [getattr(each, "jaxpr", each) for each in line.params.values() if hasattr(each, "eqns") or hasattr(each, "jaxpr")]
                total += line.params.get("length", 1) * sum(map(of, inner))
        return total

    return of(jax.make_jaxpr(function)(*args).jaxpr)


def test_the_autoencoder():
    size = VideoConfig(frames=17, height=32, width=48)  # the first chunk and a scan over two more
    vae = abstract(lambda rngs: WanVAE(SMOKE.vae, rngs=rngs))
    video = jax.ShapeDtypeStruct((1, size.frames, size.height, size.width, 3), jnp.float32)
    assert encoding.latents(SMOKE.vae, size) == counted(lambda vae, video: vae.encode(video), vae, video)


def test_the_text_encoder():
    encoder, tokens = abstract(lambda rngs: UMT5Encoder(SMOKE.text, rngs=rngs)), jax.ShapeDtypeStruct((1, 12), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 12), jnp.bool_)
    assert encoding.text(SMOKE.text, 12) == counted(lambda encoder, *args: encoder(*args), encoder, tokens, mask)


def test_the_image_encoder():
    clip = abstract(lambda rngs: CLIPVision(SMOKE.image, rngs=rngs))
    pixels = jax.ShapeDtypeStruct((1, SMOKE.image.image_size, SMOKE.image.image_size, 3), jnp.float32)
    assert encoding.image(SMOKE.image) == counted(lambda clip, pixels: clip(pixels), clip, pixels)


@pytest.mark.parametrize("whole", [True, False])
def test_the_vision_tower(whole):
    vision = replace(SMOKE.mllm.vision, full_attention=tuple(range(SMOKE.mllm.vision.num_layers)) if whole else ())
    config, grids = replace(SMOKE.mllm, vision=vision), ((1, 6, 4), (3, 4, 10))
    tower = abstract(lambda rngs: Qwen2_5VL(config, rngs=rngs)).vision
    pixels = jax.ShapeDtypeStruct((24 + 120, 3 * vision.temporal_patch * vision.patch**2), jnp.float32)
    found = counted(lambda tower, pixels: tower(pixels, grids), tower, pixels, branch=int(whole))
    assert encoding.vision(vision, config.dim, grids) == found
