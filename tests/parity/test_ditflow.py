"""DiTFlow and its baselines against PyTorch on diffusers' transformer: written from the formulas, with full maps of all tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from configs.base import DiTConfig
from configs.ditflow import GuidanceConfig
from omnitransfer_jax.methods.ditflow import FLOW, hard_flow, soft_flow
from omnitransfer_jax.methods.motion_guides import MOFT, SMM
from omnitransfer_jax.models.wan_dit import Injection, WanDiT
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import port, randomise

TEXT_LEN = 512  # hard-coded in the oracle
I2V = DiTConfig(dim=48, ffn_dim=64, num_layers=3, num_heads=2, text_dim=24, image_dim=20, freq_dim=32, dtype="float32", remat="none")
T2V = replace(I2V, in_channels=16, image_dim=None)
GRID, BLOCK = (3, 3, 4), 1
GUIDANCE = GuidanceConfig(block=BLOCK, channels=0.2)


class Recorder:
    """Self-attention from its formula, which keeps queries and keys after norm and rotation; with `injected` it reads other keys."""

    def __init__(self):
        self.queries, self.keys, self.values, self.rotations, self.injected = None, None, None, None, None

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]  # each stands there twice, for both of a pair
        (q_cos, q_sin), (k_cos, k_sin) = ((cos, sin), (cos, sin)) if self.rotations is None else self.rotations[:, :, :, :, None]
        self.queries, self.keys, self.values = self.turn(q, q_cos, q_sin), self.turn(k, k_cos, k_sin), v
        k, v = (self.keys, v) if self.injected is None else self.injected
        weights = (torch.einsum("bqhd,bkhd->bhqk", self.queries, k) / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    @staticmethod
    def turn(x, cos, sin):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def displacements(a):
    """All places of a frame against those of another: "P P 2", [dx, dy] from the first to the second."""
    _, rows, columns = GRID
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place = torch.stack([x.flatten(), y.flatten()], -1)
    return (place[None] - place[:, None]).to(a.dtype)


def frame_pairs(q, k):
    """Logits [b, i, j, p, q] of all tokens against all, the mean of the heads, cut into pairs of frames."""
    frames, places = GRID[0], GRID[1] * GRID[2]
    logits = (torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5).mean(1)
    return logits.unflatten(1, (frames, places)).unflatten(3, (frames, places)).permute(0, 1, 3, 2, 4)


def hard(q, k):
    best = frame_pairs(q, k).argmax(-1)
    return displacements(q)[torch.arange(best.shape[-1]), best]


def soft(q, k, temperature):
    weights = (temperature * frame_pairs(q, k)).softmax(-1)
    return (weights[..., None] * displacements(q)).sum(-2)


def flow_loss(recorder, reference):
    wanted, found = hard(*reference[:2]), soft(recorder.queries, recorder.keys, GUIDANCE.temperature)
    total = 0
    for sample in range(len(wanted)):
        errors = [
            (found[sample, i, j][moves] - wanted[sample, i, j][moves]).square()
            for i in range(GRID[0])
            for j in range(GRID[0])
            if i != j and (moves := wanted[sample, i, j].norm(dim=-1) > 0).any()
        ]
        total = total + torch.cat(errors).mean()
    return total


def frames_of(tokens):
    return tokens.unflatten(1, (GRID[0], -1))


def smm_loss(recorder, reference):
    ours, theirs, total = frames_of(recorder.output).mean(2), frames_of(reference[2]).mean(2), 0
    for i in range(GRID[0]):
        for j in range(GRID[0]):
            if i != j:
                total = total + (1 - torch.cosine_similarity(ours[:, j] - ours[:, i], theirs[:, j] - theirs[:, i])).sum()
    return total / (GRID[0] * (GRID[0] - 1))


def moft_loss(recorder, reference):
    ours, theirs = ((x - x.mean(1, keepdim=True)) for x in (frames_of(recorder.output), frames_of(reference[2])))
    total = 0
    for a, b in zip(ours, theirs, strict=True):
        _, _, rows = torch.linalg.svd(b.flatten(0, 1), full_matrices=False)
        channels = rows[0].abs().argsort(descending=True)[: int(GUIDANCE.channels * a.shape[-1])]
        total = total + (1 - torch.cosine_similarity(a[..., channels], b[..., channels], dim=-1)).mean()
    return total


LOSSES = {"flow": (FLOW, flow_loss), "smm": (SMM, smm_loss), "moft": (MOFT, moft_loss)}


class Oracle:
    """diffusers' transformer, run to what block `BLOCK` computes."""

    def __init__(self, config):
        self.module = randomise(WanTransformer3DModel(**{k: v for k, v in config_json(config).items() if not k.startswith("_")}))
        self.recorders = [Recorder() for _ in self.module.blocks]
        for block, recorder in zip(self.module.blocks, self.recorders, strict=True):
            block.attn1.set_processor(recorder)
        self.recorder = self.recorders[BLOCK]
        self.module.blocks[BLOCK].register_forward_hook(lambda module, args, output: setattr(self.recorder, "output", output))

    def __call__(self, latents, timestep, text, image=None):
        feed = {"hidden_states": latents.permute(0, 4, 1, 2, 3), "encoder_hidden_states": text, "encoder_hidden_states_image": image}
        self.module(timestep=timestep, **{k: v for k, v in feed.items() if v is not None})
        return self.recorder.queries, self.recorder.keys, self.recorder.output


def draw(config, seed):
    """(latents with all channels, timestep, text, image) of two samples."""
    normal = np.random.default_rng(seed).standard_normal
    latents = normal((2, GRID[0], 2 * GRID[1], 2 * GRID[2], config.in_channels), np.float32)
    text = normal((2, TEXT_LEN, config.text_dim), np.float32)
    image = None if config.image_dim is None else normal((2, 257, config.image_dim), np.float32)
    return [latents, np.full(2, 700.0 * (seed > 0), np.float32), text, *([] if image is None else [image])]


@pytest.fixture(scope="module", params=[I2V, T2V], ids=["i2v", "t2v"])
def models(request):
    oracle = Oracle(request.param)
    ours = port(lambda rngs: WanDiT(request.param, rngs=rngs), oracle.module, entries(request.param, "diffusers"))
    reference, sample = draw(request.param, 0), draw(request.param, 1)
    with torch.no_grad():
        of_reference = oracle(*map(torch.tensor, reference))
    return oracle, ours, reference, sample, of_reference


def test_queries_keys_and_flow(models):
    oracle, ours, _, sample, _ = models
    q, k = jax.jit(lambda dit, args: dit.tap(BLOCK, *args)[:2])(ours, sample)
    with torch.no_grad():
        wanted = oracle(*map(torch.tensor, sample))[:2]
        flows = hard(*wanted), soft(*wanted, 2.0)
    assert relative_l2(q, wanted[0]) <= 1e-5
    assert relative_l2(k, wanted[1]) <= 1e-5
    assert (np.asarray(hard_flow(q, k, GRID)) == flows[0].numpy()).all()
    assert relative_l2(soft_flow(q, k, GRID, 2.0), flows[1]) <= 1e-5


@pytest.mark.parametrize("name", list(LOSSES))
def test_loss_and_its_gradients(models, name):
    """With respect to the latents and to the rotations of queries and keys, the same in all blocks."""
    oracle, ours, reference, sample, of_reference = models
    guide, expected = LOSSES[name]
    table = oracle.module.rope(torch.tensor(sample[0]).permute(0, 4, 1, 2, 3))
    own = torch.stack([table[0][0, :, 0, 0::2], table[1][0, :, 0, 1::2]])
    noise = torch.tensor(np.random.default_rng(3).standard_normal((2, 2, *own.shape), np.float32))
    rotations = (own + 0.05 * noise).requires_grad_()  # "B queries/keys cos/sin L k": pairs that are no rotations any more
    latents = torch.tensor(sample[0], requires_grad=True)
    for recorder in oracle.recorders:
        recorder.rotations = rotations.permute(1, 2, 0, 3, 4)
    try:
        oracle(latents, *map(torch.tensor, sample[1:]))
        loss = expected(oracle.recorder, of_reference)
        loss.backward()
    finally:
        for recorder in oracle.recorders:
            recorder.rotations = None

    @jax.jit
    def ours_of(dit, latents, rotations, rest, reference):
        target = guide.target(guide.read(dit, BLOCK, *reference), GRID, GUIDANCE)

        def total(latents, rotations):
            features = guide.read(dit, BLOCK, latents, *rest, injection=Injection(jnp.array(True), rotations))
            return guide.loss(features, target, GRID, GUIDANCE).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(latents, rotations)

    value, (of_latents, of_rotations) = ours_of(ours, sample[0], rotations.detach().numpy(), sample[1:], reference)
    assert abs(float(value) - loss.item()) <= 1e-5 * abs(loss.item())
    assert relative_l2(of_latents, latents.grad) <= 1e-4
    assert relative_l2(of_rotations, rotations.grad) <= 1e-4


def test_injected_keys_and_values(models):
    """The velocity with the keys and values of another video in block 0, and there alone."""
    oracle, ours, reference, sample, _ = models
    with torch.no_grad():
        oracle(*map(torch.tensor, reference))
        first = oracle.recorders[0]
        injected = first.keys, first.values
        first.injected = injected
        try:
            feed = {"encoder_hidden_states_image": torch.tensor(sample[3])} if len(sample) > 3 else {}
            latents, timestep, text = map(torch.tensor, sample[:3])
            wanted = oracle.module(latents.permute(0, 4, 1, 2, 3), timestep, text, **feed).sample.permute(0, 2, 3, 4, 1)
        finally:
            first.injected = None

    @jax.jit
    def velocity(dit, sample, reference, active):
        keys_values = dit.tap(0, *reference)[1:3]
        return dit(*sample, injection=Injection(active, None, keys_values))

    assert relative_l2(velocity(ours, sample, reference, True), wanted) <= 1e-5
    assert relative_l2(velocity(ours, sample, reference, False), wanted) > 1e-2
