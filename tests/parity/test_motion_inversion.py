"""Motion-Textual Inversion against a loop over frames in diffusers' Wan: its loss, and the gradient with respect to the tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from configs import motion_inversion as configs
from configs.base import DiTConfig
from configs.motion_inversion import InversionConfig
from omnitransfer_jax.mesh import UNSHARDED
from omnitransfer_jax.methods import motion_inversion as method
from omnitransfer_jax.methods.motion_inversion import Drawn, Sample
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import port, randomise

TEXT_LEN = 512  # hard-coded in the oracle
FRAMES, ROWS, COLUMNS = 3, 4, 6
I2V = DiTConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, text_dim=24, image_dim=20, freq_dim=32, dtype="float32", remat="none")
T2V = replace(I2V, in_channels=16, image_dim=None)
CASES = {
    "text": (I2V, InversionConfig(tokens=3)),
    "both_in_encoder": (I2V, InversionConfig(tokens=3, branch="both", space="encoder", sink=False)),
    "t2v": (T2V, InversionConfig(tokens=3)),
}


class LoopOverFrames:
    """In the place of WanAttnProcessor: the queries of each frame, one frame after the other, against that frame's rows."""

    def __init__(self, text: list[torch.Tensor], image: list[torch.Tensor] | None):
        self.text, self.image = text, image

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        frames = hidden_states.chunk(FRAMES, 1)
        return torch.cat([self.of_frame(attn, x, frame) for frame, x in enumerate(frames)], 1)

    def of_frame(self, attn, x, frame):
        q = attn.norm_q(attn.to_q(x))
        out = read(attn, q, attn.norm_k(attn.to_k(self.text[frame])), attn.to_v(self.text[frame]))
        if self.image is not None:
            rows = self.image[frame]
            out = out + read(attn, q, attn.norm_added_k(attn.add_k_proj(rows)), attn.add_v_proj(rows))
        return attn.to_out[0](out)


def read(attn, q, k, v):
    """softmax(q k^T / sqrt(width)) v of every head."""
    q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def rows_of_frames(tokens, project, rest):
    """The rows that each frame reads: its own set, the shared one, then `rest`."""
    sets = [project(tokens[:, i]) for i in range(FRAMES + 1)]
    return [torch.cat([sets[i], sets[-1], *rest], 1) for i in range(FRAMES)]


def loss_of_oracle(theirs, inversion: InversionConfig, tokens, batch: Sample, drawn: Drawn):
    """The flow matching loss, from the formulas."""
    embedder, is_encoder = theirs.condition_embedder, inversion.space == "encoder"

    def same(x):
        return x

    embedded = embedder.text_embedder(batch.text)
    rest = [embedded] if inversion.sink or batch.image is None else []
    text = rows_of_frames(tokens["text"], embedder.text_embedder if is_encoder else same, rest)
    image = None
    if batch.image is not None:
        image = [embedder.image_embedder(batch.image)] * FRAMES
        if "image" in tokens:
            image = rows_of_frames(tokens["image"], embedder.image_embedder if is_encoder else same, [])
    for block in theirs.blocks:
        block.attn2.set_processor(LoopOverFrames(text, image))
    t = drawn.time[:, None, None, None, None]
    x = (1 - t) * batch.latents + t * drawn.noise
    latents = (x if batch.condition is None else torch.cat([x, batch.condition], -1)).permute(0, 4, 1, 2, 3)
    out = theirs(latents, 1000 * drawn.time, batch.text, batch.image).sample.permute(0, 2, 3, 4, 1)
    return (out - (drawn.noise - batch.latents)).square().mean((1, 2, 3, 4)), out


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case):
    dit, inversion = CASES[case]
    config = replace(configs.SMOKE, dit=dit, inversion=inversion)
    shape = FRAMES, ROWS, COLUMNS
    config = replace(config, video=replace(config.video, frames=4 * FRAMES - 3, height=8 * ROWS, width=8 * COLUMNS))
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    given = (normal(2, *shape, 20), normal(2, 257, 20)) if dit.image_dim else (None, None)
    text = normal(2, TEXT_LEN, 24) * (np.arange(TEXT_LEN) < 7)[None, :, None].astype(np.float32)
    batch = Sample(np.array([1, 0], np.int32), normal(2, *shape, 16), text, *given)
    drawn = Drawn(np.array([0.95, 0.4], np.float32), normal(2, *shape, 16))
    tokens = {name: normal(2, *size) for name, size in method.shapes(config).items()}

    settings = {k: v for k, v in config_json(dit).items() if not k.startswith("_")}
    theirs = randomise(WanTransformer3DModel(**settings))
    ours = port(lambda rngs: WanDiT(dit, rngs=rngs), theirs, entries(dit, "diffusers"))
    leaves = {name: torch.tensor(x, requires_grad=True) for name, x in tokens.items()}
    torch_batch, torch_drawn = (type(tree)(*(None if x is None else torch.tensor(x) for x in tree)) for tree in (batch, drawn))
    expected, _ = loss_of_oracle(
        theirs, inversion, {name: x[torch_batch.clip.long()] for name, x in leaves.items()}, torch_batch, torch_drawn
    )
    expected.sum().backward()

    trained, base = method.objective(config, clips=2), flat_params(ours, "dit.")

    def total(params):
        losses, _ = trained.loss(params | base, jax.tree.map(jnp.asarray, batch), jax.tree.map(jnp.asarray, drawn), UNSHARDED)
        return losses.sum(), losses

    gradients, losses = jax.jit(jax.grad(total, has_aux=True))({f"tokens.{name}": jnp.asarray(x) for name, x in tokens.items()})
    assert relative_l2(losses, expected.detach()) <= 1e-5
    for name, leaf in leaves.items():
        assert relative_l2(gradients[f"tokens.{name}"], leaf.grad) <= 1e-5, name
