"""Follow-Your-Motion against PyTorch, written from its formulas on diffusers' transformer: head scores, split projections, losses, and the
exported LoRA in diffusers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open

from configs import follow_your_motion as configs
from configs.base import LoRAConfig
from data_pipelines import in_memory
from launch import command, export
from omnitransfer_jax.flow import TIMESTEPS, interpolate, loss_weight
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.mesh import UNSHARDED
from omnitransfer_jax.methods import follow_your_motion as method
from omnitransfer_jax.methods.follow_your_motion import Drawn, Sample
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer
from omnitransfer_jax.train.step import TrainState
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import randomise, tensors, to_ours
from tests.parity.test_wan_dit import T2V, TEXT_LEN

HEADS = np.array([[True, False, False, True], [False, True, False, False]])
SMOKE = configs.get_config("smoke")
CONFIG = replace(
    SMOKE,
    dit=replace(T2V, num_layers=2, num_heads=4, text_len=TEXT_LEN),
    text=replace(SMOKE.text, dim=T2V.text_dim),
    motion=replace(SMOKE.motion, lora=LoRAConfig(rank=3, alpha=6.0, targets=configs.QKV), head_draws=2),
    train=replace(SMOKE.train, weighting="bell"),
)
ROWS = CONFIG.dit.dim // CONFIG.dit.num_heads  # of a head


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def oracle():
    return randomise(WanTransformer3DModel(**{k: v for k, v in config_json(CONFIG.dit).items() if not k.startswith("_")}))


def ported(theirs):
    """The parameters of our transformer, as a training names them."""
    leaves = to_ours(tensors(theirs), entries(CONFIG.dit, "diffusers"))
    return {f"dit.{path}": jnp.asarray(x) for path, x in leaves.items()}


def run(theirs, latents, time, text):
    """The velocity of latents "B F H W C", in our layout."""
    x = torch.as_tensor(latents).permute(0, 4, 1, 2, 3)
    return theirs(x, torch.as_tensor(1000 * time), torch.as_tensor(text)).sample.permute(0, 2, 3, 4, 1)


def adapters():
    """Random adapters of both kinds, with the masks of `HEADS`."""
    found = {p: x for p, x in flat_params(abstract(partial(method.make_model, CONFIG))).items() if ".lora_" in p}
    random = {p: jnp.asarray(0.3 * draw(i, *x.shape)) for i, (p, x) in enumerate(found.items())}
    return method.with_heads(random, HEADS)


def test_head_scores_against_whole_maps():
    """300 tokens, so that the last chunk of queries is not full."""
    theirs, clip, text = oracle(), draw(0, 1, 3, 20, 20, 16), draw(1, 1, TEXT_LEN, 24)
    model, key = abstract(lambda rngs: OmniTransfer(CONFIG, rngs=rngs)), jax.random.key(5)
    dit = with_params(model, ported(theirs)).dit
    config = replace(CONFIG, motion=replace(CONFIG.motion, band_tokens=16))
    found = method.head_scores(config, dit, Sample(jnp.asarray(clip), jnp.asarray(text)), key)

    maps = []

    class Recorder:
        """q and k as diffusers' processor makes them, before the attention itself."""

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, attn, x, context=None, mask=None, rotary_emb=None):
            def rotated(y):
                pairs = torch.view_as_complex(y.unflatten(2, (4, -1)).unflatten(-1, (-1, 2)).contiguous())
                cos, sin = (part[..., ::2] for part in rotary_emb)
                return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)

            q, k = rotated(attn.norm_q(attn.to_q(x))), rotated(attn.norm_k(attn.to_k(x)))
            maps.append(torch.softmax(torch.einsum("blnk,bsnk->bnls", q, k) * ROWS**-0.5, -1)[0].double())
            return self.inner(attn, x, context, mask, rotary_emb)

    for block in theirs.blocks:
        block.attn1.set_processor(Recorder(block.attn1.processor))

    bs, pixels, frames = 16, 100, 3
    p = torch.arange(pixels * frames)
    perm = (p % pixels) * frames + p // pixels

    def band(a):
        return ((a[:, None] // bs - a[None] // bs).abs() < pixels // bs).double()

    wanted = []
    for i in range(2):
        noise = np.asarray(jax.random.normal(jax.random.fold_in(key, i), clip.shape))
        maps.clear()
        with torch.no_grad():
            run(theirs, (1 - 0.9998) * clip + 0.9998 * noise, np.float32([0.9998]), text)
        maps_of_layers = torch.stack(maps)
        sums = [(maps_of_layers * m).sum((-1, -2)) for m in (band(p), band(perm))]
        norms = maps_of_layers.square().sum((-1, -2)).sqrt()
        wanted.append([*(s / len(p) for s in sums), *(s / norms / m.norm() for s, m in zip(sums, (band(p), band(perm)), strict=True))])
    for ours, name in zip(found, found._fields, strict=True):
        mean = torch.stack([each[found._fields.index(name)] for each in wanted]).mean(0)
        assert mean.shape == (2, 4)
        assert relative_l2(ours, mean) <= 1e-5, name


class Split(torch.nn.Module):
    """A projection whose rows are divided into those of spatial and of temporal heads, each with its own low-rank adapter."""

    def __init__(self, linear, temporal, adapters):
        super().__init__()
        rows = torch.arange(linear.out_features).reshape(4, -1)
        self.parts = [rows[~temporal].flatten(), rows[temporal].flatten()]
        self.weight, self.bias = linear.weight.detach(), linear.bias.detach()
        self.down = torch.nn.ParameterList([torch.nn.Parameter(torch.tensor(down)) for down, _ in adapters])
        self.up = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.tensor(up)[part]) for (_, up), part in zip(adapters, self.parts, strict=True)]
        )

    def forward(self, x):
        outs = [
            x @ self.weight[part].T + self.bias[part] + 2.0 * (x @ down.T @ up.T)
            for part, down, up in zip(self.parts, self.down, self.up, strict=True)
        ]
        return torch.cat(outs, -1)[..., torch.argsort(torch.cat(self.parts))]  # the order of the heads again


def test_masked_adapters_against_split_projections():
    """Velocity, the temporal stage's loss, and its gradients with respect to the adapters."""
    theirs, added = oracle(), adapters()
    base, modules = ported(theirs), {}
    for layer, block in enumerate(theirs.blocks):
        for ours, name in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            path = f"dit.blocks.self_attention.{ours}."
            pairs = [[np.asarray(added[f"{path}{kind}.{half}"][layer]).T for half in ("down", "up")] for kind in method.ADAPTERS.values()]
            modules[layer, path] = Split(getattr(block.attn1, name), torch.tensor(HEADS[layer]), [[d, u] for d, u in pairs])
            setattr(block.attn1, name, modules[layer, path])

    config = method.stage(CONFIG, "temporal", "")
    clip, noise, text, time = draw(0, 1, 3, 4, 6, 16), draw(1, 1, 3, 4, 6, 16), draw(2, 1, TEXT_LEN, 24), np.float32([0.4])
    found = run(theirs, (1 - 0.4) * clip + 0.4 * noise, time, text)
    true = torch.tensor(noise - clip)
    differences = [x[:, 1:] - x[:, :-1] for x in (found, true)]
    motion = 1 - torch.nn.functional.cosine_similarity(*differences, dim=-1).mean()
    grid = torch.linspace(1, 0, 1001)[:-1].double()
    grid = 5 * grid / (1 + 4 * grid)
    bell = torch.exp(-2 * ((1000 * grid - 500) / 1000) ** 2)
    weight = (np.exp(-2 * 0.1**2) - bell.min()) * 1000 / (bell - bell.min()).sum()
    wanted = weight * ((found - true).square().mean() + motion)
    wanted.backward()

    model = abstract(partial(method.make_model, config))
    still = replace(config, motion=replace(config.motion, stretch="none"))
    batch, drawn = Sample(jnp.asarray(clip), jnp.asarray(text)), Drawn(jnp.asarray(time), jnp.asarray(noise))

    def loss(added):
        return method.loss(still, model, base | added, batch, drawn, UNSHARDED)[0][0]

    value, grads = jax.jit(jax.value_and_grad(loss))(added)
    assert abs(value / wanted.item() - 1) <= 1e-5
    x = interpolate(batch.latents, drawn.noise, drawn.time)
    ours = method.velocity(with_params(model, base | added).dit, x, TIMESTEPS * drawn.time, batch.text, None, 1.0)
    assert relative_l2(ours, found.detach()) <= 1e-5
    for (layer, path), split in modules.items():
        for kind, name in enumerate(method.ADAPTERS.values()):
            assert relative_l2(grads[f"{path}{name}.down"][layer].T, split.down[kind].grad) <= 1e-4
            assert relative_l2(grads[f"{path}{name}.up"][layer].T[split.parts[kind].numpy()], split.up[kind].grad) <= 1e-4


def test_the_released_motion_loss_and_weight():
    """Absolute differences, and the cosine along time in torch's order of axes "B C F H W"."""
    a, b = draw(0, 2, 4, 3, 5, 16), draw(1, 2, 4, 3, 5, 16)
    x, y = (torch.tensor(z).permute(0, 4, 1, 2, 3) for z in (a, b))
    x, y = ((z[:, :, 1:] - z[:, :, :-1]).abs() for z in (x, y))
    wanted = 1 - torch.nn.functional.cosine_similarity(x, y, dim=2).mean((1, 2, 3))
    np.testing.assert_allclose(method.motion_loss(jnp.asarray(a), jnp.asarray(b), "absolute"), wanted, rtol=1e-5)
    sigmas = torch.linspace(1, 0, 1001)[:-1]
    steps = 1000 * 5 * sigmas / (1 + 4 * sigmas)
    y = torch.exp(-2 * ((steps - 500) / 1000) ** 2)
    weights = (y - y.min()) * (1000 / (y - y.min()).sum())
    np.testing.assert_allclose(loss_weight(jnp.asarray(steps.numpy() / 1000), "bell", 5.0), weights, atol=2e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the temporal stage on the oracle's transformer: its workdir, and all parameters."""
    workdir, base, added = tmp_path_factory.mktemp("run"), ported(oracle()), adapters()
    trainable = {path: x for path, x in added.items() if ".lora_temporal." in path and not path.endswith("mask")}
    frozen = {path: x for path, x in added.items() if path not in trainable}
    state = TrainState(jnp.int32(7), trainable, frozen, {"mu": jnp.zeros(1)}, {}, jnp.int32(0))
    with run_folder.open_checkpoints(workdir, CONFIG.checkpoint) as checkpoints:
        run_folder.save(checkpoints, 7, state, in_memory.batches(np.zeros((1, 1)), 1, seed=0))
    run_folder.write_config(workdir, method.stage(CONFIG, "temporal", ""))
    return workdir, base | added


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_the_exported_lora_in_diffusers(layout, trained, tmp_path, monkeypatch):
    workdir, params = trained
    monkeypatch.setattr(command, "load_config", lambda *_: CONFIG)
    args = ["--config=follow_your_motion:smoke", f"--checkpoint={workdir}", f"--layout={layout}", f"--out={tmp_path / 'lora'}"]
    assert command.execute(export.main, export.FLAGS, args) == 0
    (file,) = (tmp_path / "lora").rglob("*.safetensors")
    with safe_open(file, "np") as stored:
        assert stored.metadata()["method"] == "Follow-Your-Motion"
        assert stored.metadata()["rank"] == "6"
        names = set(stored.keys())
    first = "diffusion_model.blocks.0.self_attn.q" if layout == "comfyui" else "transformer.blocks.0.attn1.to_q"
    assert {f"{first}.lora_A.weight", f"{first}.lora_B.weight"} < names
    assert len(names) == 2 * 3 * 2

    clip, text, time = draw(0, 1, 3, 4, 6, 16), draw(2, 1, TEXT_LEN, 24), np.float32([0.4])
    dit = with_params(abstract(partial(method.make_model, CONFIG)), params).dit
    ours = jax.jit(dit)(jnp.asarray(clip), jnp.asarray(1000 * time), jnp.asarray(text))
    fresh = oracle()
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=fresh)
    with torch.no_grad():
        assert relative_l2(run(fresh, clip, time, text), ours) > 1e-2
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        assert relative_l2(run(pipeline.transformer, clip, time, text), ours) <= 1e-5
