"""The transformer with Wan-Animate-2's values against diffusers' WanAnimate2Transformer3DModel: cache, velocity, gradients, sampling."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, ModularPipeline, WanAnimate2Transformer3DModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.transformers import transformer_wan_animate_2 as module
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.wan_animate_2 import WanAnimate2ModularPipeline
from diffusers.modular_pipelines.wan_animate_2.denoise import WanAnimate2SegmentDenoiseInner
from safetensors.torch import load_file, save_file

from configs import wan_animate_2
from configs.base import DiTConfig
from configs.run import SamplerConfig
from configs.wan_animate_2 import ANIMATE_2
from launch import command, import_weights
from launch import export as export_weights
from omnitransfer_jax import samplers
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import Conditions, denoise, make_reference
from omnitransfer_jax.models.rope3d import rotate
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights import convert
from omnitransfer_jax.weights.parts import PARTS
from omnitransfer_jax.weights.wan_dit import ANIMATE_2_NAMES, config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import gradients, port, randomise, to_ours

CONFIG = DiTConfig(
    dim=48, ffn_dim=64, num_layers=11, num_heads=2, text_dim=24, text_len=40, image_dim=1280, freq_dim=32, dtype="float32", remat="none",
    **ANIMATE_2,
)  # fmt: skip
pytestmark = [  # of the oracle
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),
]
SKIPPED = 9  # the block that the unconditional pass leaves out


@pytest.fixture(autouse=True)
def uncompiled_mask(monkeypatch):
    monkeypatch.setattr(module, "create_block_mask", lambda *args, **kw: torch_mask(*args, **(kw | {"_compile": False})))


torch_mask = module.create_block_mask


@pytest.fixture(scope="module")
def theirs():
    settings = {k: v for k, v in config_json(CONFIG).items() if not k.startswith("_")}
    return randomise(WanAnimate2Transformer3DModel(**settings))


@pytest.fixture(scope="module")
def ours(theirs):
    return port(lambda rngs: WanDiT(CONFIG, rngs=rngs), theirs, entries(CONFIG, "diffusers"))


def inputs(frames: int, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Latents of the target (identity picture and `frames` more) and of the reference, channels last, and both contexts."""
    draw = np.random.default_rng(frames)

    def normal(*shape):
        return draw.standard_normal(shape, np.float32)

    return {
        "noise": normal(1, frames + 1, rows, columns, 16),
        "condition": normal(1, frames + 1, rows, columns, 20),
        "driving": normal(1, frames, rows, columns, 16),
        "text": normal(1, CONFIG.text_len, 24),
        "reference_text": normal(1, CONFIG.text_len, 24),
        "image": normal(1, 257, 1280),
        "reference_image": normal(1, 257, 1280),
    }


def channels_first(x):
    return x[0].permute(3, 0, 1, 2)


def run_theirs(model, x, time: float, unconditional: bool):
    """(velocity, cache) of the oracle; leaves of `x` may need gradients."""
    cache = module.WanAnimate2KVCache(CONFIG.num_layers)
    _, frames, rows, columns, _ = x["driving"].shape
    grid = torch.tensor([[frames, rows // 2, columns // 2]])
    tokens = int(grid.prod())
    ones = torch.ones(4, frames, rows, columns)
    driving = channels_first(x["driving"])
    common = {"timestep": torch.tensor([time]), "kv_cache": cache}
    model(
        [driving], encoder_hidden_states=[x["reference_text"][0]], encoder_hidden_states_image=x["reference_image"],
        condition_latents=[torch.cat([ones, driving])], kv_cache_mode="extract", seq_len=tokens, offset_grid_sizes=grid, **common,
    )  # fmt: skip
    made = model(
        [channels_first(x["noise"])], encoder_hidden_states=[x["text"][0]], encoder_hidden_states_image=x["image"],
        condition_latents=[channels_first(x["condition"])], kv_cache_mode="cached", seq_len=tokens // frames * (frames + 1),
        reference_grid_sizes=grid, origin_len=4 * (frames - 1) + 1, origin_area=[8 * rows, 8 * columns], is_uncondtion=unconditional,
        **common,
    ).sample[0]  # fmt: skip
    return made.permute(1, 2, 3, 0)[None], cache


def target_grid(x) -> tuple[int, int, int]:
    _, frames, rows, columns, _ = x["noise"].shape
    return frames, rows // 2, columns // 2


def reference(x):
    made = make_reference(x["driving"], jnp.array([0]), target_grid(x), by=CONFIG.offsets, flag=CONFIG.reference_flag)
    return made._replace(text=x["reference_text"], image=x["reference_image"])


def run_ours(model, x, time: float, active=None, cache: bool = True, activations: bool = False):
    latents = jnp.concatenate([x["noise"], x["condition"]], -1)
    references, kv_cache = (reference(x),), None
    if cache:
        kv_cache, references = model.make_kv_cache(references, model.grid(latents), activations=activations), ()
    return model(latents, jnp.array([time]), x["text"], x["image"], references=references, kv_cache=kv_cache, active=active)


def all_but(block: int):
    return jnp.arange(CONFIG.num_layers) != block


run = jax.jit(run_ours, static_argnames=("cache", "activations"))


def both(grid):
    """The same inputs for the oracle and for ours."""
    x = inputs(*grid)
    return {name: torch.tensor(value) for name, value in x.items()}, {name: jnp.asarray(value) for name, value in x.items()}


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 6, 4), (6, 4, 8)], ids=lambda grid: "x".join(map(str, grid)))
def test_cache_and_velocity(theirs, ours, grid):
    feed, x = both(grid)
    with torch.no_grad():
        wanted, cache = run_theirs(theirs, feed, 700.0, unconditional=False)
    kv_cache = jax.jit(lambda model: model.make_kv_cache((reference(x),), target_grid(x)))(ours)
    (keys, values), (table,) = kv_cache.kept[0], kv_cache.rotations
    for i in range(CONFIG.num_layers):
        key, value = (each.numpy() for each in cache.get(i).get())
        assert relative_l2(keys.values[i], rotate(jnp.asarray(key), table)) <= 1e-5  # theirs is kept before its rotation
        assert relative_l2(values.values[i], value) <= 1e-5
    assert relative_l2(run(ours, x, 700.0), wanted) <= 1e-5


def test_other_forms(theirs, ours):
    """Without a cache, with one of activations, and with the unconditional pass's missing block."""
    feed, x = both((3, 6, 4))
    with torch.no_grad():
        wanted, _ = run_theirs(theirs, feed, 700.0, unconditional=False)
        negative, _ = run_theirs(theirs, feed, 700.0, unconditional=True)
    assert relative_l2(run(ours, x, 700.0, cache=False), wanted) <= 1e-5
    assert relative_l2(run(ours, x, 700.0, activations=True), wanted) <= 1e-5
    assert relative_l2(run(ours, x, 700.0, active=all_but(SKIPPED)), negative) <= 1e-5
    assert relative_l2(negative, wanted) > 1e-3


def dense(query, key, value, attn_mask=None, **_):
    """The oracle's attention with its own mask function as a dense mask; PyTorch's flex attention has no backward pass on a CPU.

    Padding, whose answers are cut off, attends to everything instead of nothing, so that it has a gradient.
    """
    if attn_mask is not None:
        rows, columns = (torch.arange(x.shape[1]) for x in (query, key))
        attn_mask = attn_mask.mask_mod(0, 0, rows[:, None], columns[None])
        attn_mask = attn_mask | ~attn_mask.any(1, keepdim=True)
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=attn_mask).transpose(1, 2)


def test_gradients(theirs, ours, monkeypatch):
    """Of a random projection of the velocity, through the reference pass too: every parameter and every input."""
    monkeypatch.setattr(module, "dispatch_attention_fn", dense)
    x = inputs(3, 6, 4)
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in x.items()}
    theirs.zero_grad()
    wanted, _ = run_theirs(theirs, leaves, 700.0, unconditional=False)
    probe = np.random.default_rng(9).standard_normal(wanted.shape, np.float32)
    (wanted * torch.tensor(probe)).sum().backward()

    for cache, activations in ((False, False), (True, False), (True, True)):

        def loss(model, x, cache=cache, activations=activations):
            return (run_ours(model, x, 700.0, cache=cache, activations=activations) * probe).sum()

        grads, of_inputs = jax.jit(jax.grad(loss, argnums=(0, 1)))(ours, {name: jnp.asarray(value) for name, value in x.items()})
        found = flat_params(grads)
        for path, value in to_ours(gradients(theirs), entries(CONFIG, "diffusers")).items():
            assert relative_l2(found[path], value) <= 1e-4, path
        for name, leaf in leaves.items():
            assert relative_l2(of_inputs[name], leaf.grad) <= 1e-4, name


def test_guided_sampling(theirs, ours):
    """Four steps with guidance by the modular pipeline's own denoising loop, from the same noise."""
    feed, x = both((3, 6, 4))
    negative = np.random.default_rng(8).standard_normal(x["text"].shape, np.float32)
    sampler = SamplerConfig(solver="dpm++", steps=4, shift=5.0, guidance=3.0, skip_unconditional=(SKIPPED,))
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(4)
    _, frames, rows, columns, _ = x["driving"].shape
    with torch.no_grad():
        _, cache = run_theirs(theirs, feed, 999.0, unconditional=False)
        state = BlockState(
            latents=channels_first(feed["noise"]), reference_latents=channels_first(feed["condition"]), kv_cache=cache, num_segments=1,
            timesteps=scheduler.timesteps, num_inference_steps=4, max_seq_len=(frames + 1) * rows * columns // 4, generator=None,
            grid_sizes_ref=torch.tensor([[frames, rows // 2, columns // 2]]), segment_frame_length=4 * (frames - 1) + 1,
            height=8 * rows, width=8 * columns, prompt_embeds=feed["text"], negative_prompt_embeds=torch.tensor(negative),
            denoiser_input_fields={"encoder_hidden_states_image": feed["image"]},
        )  # fmt: skip
        parts = SimpleNamespace(transformer=theirs, scheduler=scheduler, guider=ClassifierFreeGuidance(guidance_scale=3.0))
        _, state = WanAnimate2SegmentDenoiseInner()(parts, state, k=0)
    wanted = state.latents.permute(1, 2, 3, 0)[None]
    conditions = Conditions(x["text"], jnp.asarray(negative), x["image"], x["condition"], (reference(x),))

    def sample(sampler):
        expert = samplers.experts(sampler)[0]
        return jax.jit(lambda model: denoise(model, conditions, samplers.start(x["noise"]), sampler, expert).latents)(ours)

    made = sample(sampler)
    assert relative_l2(made, wanted) <= 1e-4
    assert relative_l2(sample(replace(sampler, skip_unconditional=())), made) > 1e-3


def test_weights_there_and_back(theirs, tmp_path, capsys):
    """A diffusers folder and an original file are imported and exported again, bit for bit; a modular pipeline loads the export."""
    theirs.save_pretrained(tmp_path / "theirs" / "transformer")
    state = theirs.state_dict()
    attention = {new: old for old, new in ANIMATE_2_NAMES.items()}

    def original(name: str) -> str:
        """The release's name (single_file_utils.py of diffusers, read backwards)."""
        name = re.sub(r"^(blocks\.\d+)\.", r"\1.block.", name)
        return re.sub(r"(self_attn|cross_attn)\.(to_out\.0|\w+)\.", lambda m: f"{m[1]}.{attention.get(m[2], m[2])}.", name)

    (tmp_path / "original").mkdir()
    save_file({original(name): value.contiguous() for name, value in state.items()}, tmp_path / "original" / "m.safetensors")
    sizes = [
        f"--dit.{name}={getattr(CONFIG, name)}"
        for name in ("dim", "ffn_dim", "num_layers", "num_heads", "text_dim", "text_len", "freq_dim")
    ]
    sizes += ["--text.dim=24", "--text.num_heads=4", "--dit.image_dim=1280", "--image.dim=1280"]
    place = tmp_path / "ours"
    assert command.execute(import_weights.main, import_weights.FLAGS, [f"--source={tmp_path / 'theirs'}", f"--out={place}"]) == 0
    export = ["--config=wan_animate_2:smoke", *sizes, f"--checkpoint={place}"]
    for layout in ("diffusers", "original"):
        args = [*export, f"--layout={layout}", f"--out={tmp_path / layout}.out"]
        assert command.execute(export_weights.main, export_weights.FLAGS, args) == 0, capsys.readouterr().err
    again = load_file(tmp_path / "diffusers.out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == state.keys()
    assert all((again[name] == value).all() for name, value in state.items())
    files = load_file(tmp_path / "original.out" / "diffusion_pytorch_model.safetensors")
    assert {name: files[original(name)].tolist() for name in state} == {name: value.tolist() for name, value in state.items()}
    pipe = ModularPipeline.from_pretrained(str(tmp_path / "diffusers.out"))
    pipe.load_components(names=["transformer", "scheduler"])
    assert isinstance(pipe, WanAnimate2ModularPipeline)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert all((value == state[name]).all() for name, value in pipe.transformer.state_dict().items())


def test_full_size_has_the_published_names():
    """Names, shapes and number of parameters of the release's transformer, from diffusers' class on the meta device."""
    config = wan_animate_2.get_config().dit
    settings = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    with torch.device("meta"):
        model = WanAnimate2Transformer3DModel(**settings)
    shapes = convert.specs(entries(config, "diffusers"), PARTS[0].shapes(config))
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {name: spec.shape for name, spec in shapes.items()}
    assert sum(value.numel() for value in model.parameters()) == 16_394_878_784  # as Wan2.1 I2V 14B, tests/weights/test_convert.py
