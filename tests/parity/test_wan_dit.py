"""The diffusion transformer against diffusers' WanTransformer3DModel, every branch on, gradients too."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from configs.base import DiTConfig
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import gradients, port, randomise, to_ours

TEXT_LEN = 512  # hard-coded in the oracle
I2V = DiTConfig(dim=48, ffn_dim=64, num_layers=3, num_heads=2, text_dim=24, image_dim=20, freq_dim=32, dtype="float32", remat="none")
T2V = replace(I2V, in_channels=16, image_dim=None)
I2V_2_2 = replace(I2V, image_dim=None)


def oracle(config: DiTConfig) -> torch.nn.Module:
    settings = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    return randomise(WanTransformer3DModel(**settings))


def inputs(config: DiTConfig, frames: int, rows: int, columns: int, per_token: bool):
    draw = np.random.default_rng(1)

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    tokens = frames * (rows // 2) * (columns // 2)
    return dict(
        latents=normal(2, frames, rows, columns, config.in_channels),
        timestep=draw.integers(0, 1000, (2, tokens) if per_token else (2,)).astype(np.float32),
        text=normal(2, TEXT_LEN, config.text_dim) * (np.arange(TEXT_LEN) < 40)[None, :, None].astype(np.float32),
        image=None if config.image_dim is None else normal(2, 257, config.image_dim),
    )


FORMS = [(I2V, (3, 8, 12)), (I2V, (2, 10, 6)), (T2V, (3, 8, 6)), (I2V_2_2, (3, 8, 6))]


@pytest.mark.parametrize("per_token", [False, True], ids=["scalar_time", "token_time"])
@pytest.mark.parametrize(("config", "grid"), FORMS, ids=["wide", "tall", "t2v", "i2v_2_2"])
def test_forward_and_gradients(config, grid, per_token):
    theirs, batch = oracle(config), inputs(config, *grid, per_token)
    ours = port(lambda rngs: WanDiT(config, rngs=rngs), theirs, entries(config, "diffusers"))
    probe = np.random.default_rng(2).standard_normal((2, *grid, config.out_channels), np.float32)

    names = {"latents": "hidden_states", "text": "encoder_hidden_states", "image": "encoder_hidden_states_image"}
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in batch.items() if k in names and v is not None}
    feed = {names[k]: v.permute(0, 4, 1, 2, 3) if k == "latents" else v for k, v in leaves.items()}
    expected = theirs(timestep=torch.tensor(batch["timestep"]), **feed).sample.permute(0, 2, 3, 4, 1)
    (expected * torch.tensor(probe)).sum().backward()

    def loss(model, leaves):
        out = model(timestep=jnp.asarray(batch["timestep"]), **leaves)
        return (out * probe).sum(), out

    (_, out), (grads, input_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        ours, {k: jnp.asarray(batch[k]) for k in leaves}
    )
    assert relative_l2(out, expected.detach()) <= 1e-5
    ours = flat_params(grads)
    for path, wanted in to_ours(gradients(theirs), entries(config, "diffusers")).items():
        assert relative_l2(ours[path], wanted) <= 1e-4, path
    for name, leaf in leaves.items():
        assert relative_l2(input_grads[name], leaf.grad) <= 1e-4, name
