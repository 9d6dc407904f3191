"""Motion-Textual Inversion: what its tokens may reach, what they start from, and that they alone are learnt."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import motion_inversion as configs
from configs.motion_inversion import InversionConfig, MotionInversion
from configs.run import MeshConfig, SamplerConfig, plain
from omnitransfer_jax.flow import draw_time
from omnitransfer_jax.mesh import UNSHARDED, make_mesh
from omnitransfer_jax.methods import motion_inversion as method
from omnitransfer_jax.methods.motion_inversion import Drawn, Sample, Start
from omnitransfer_jax.models import omnitransfer
from omnitransfer_jax.models.cross_attention import Context, Rows
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import Conditions
from omnitransfer_jax.models.wan_dit import WanDiT
from tests.compare import relative_l2
from tests.test_mesh import differences, on_eight_devices
from tests.train.tiny_run import TINY

CONFIG = replace(configs.on(TINY), inversion=InversionConfig(tokens=2), sampler=SamplerConfig(steps=2, guidance=4.0))
T2V = replace(CONFIG, dit=replace(CONFIG.dit, image_dim=None, in_channels=16))
FRAMES, WIDTH = 2, CONFIG.dit.dim  # latent frames of a clip, width of the blocks


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_dit(config: MotionInversion) -> WanDiT:
    return WanDiT(config.dit, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def dit():
    return make_dit(CONFIG)


def prompts(*rows: int):
    """Encoded prompts of so many rows, zeros behind them."""
    return jnp.stack([normal(i, 6, 8) * (jnp.arange(6) < n).astype(jnp.float32)[:, None] for i, n in enumerate(rows)])


def sample(size: int, config: MotionInversion = CONFIG) -> Sample:
    is_i2v = config.dit.image_dim is not None
    frame = (normal(2, size, 2, 4, 8, 20), normal(3, size, 2, 8)) if is_i2v else (None, None)
    return Sample(jnp.arange(size, dtype=jnp.int32), normal(1, size, 2, 4, 8, 16), prompts(*[1] * size), *frame)


def tokens_of(config: MotionInversion, clips: int = 1):
    return {name: normal(4 + i, clips, *shape) for i, (name, shape) in enumerate(method.shapes(config).items())}


def test_tokens_that_are_the_prompt_reproduce_it(dit):
    """Bit for bit if no frame has rows, for the program is the same; else to rounding, for each frame's queries are multiplied apart."""
    batch, text = sample(2), prompts(3, 6)
    latents, timestep = jnp.concatenate([batch.latents, batch.condition], axis=-1), jnp.array([900.0, 300.0])
    expected = jax.jit(lambda dit: dit(latents, timestep, text, batch.image))(dit)
    plainly = jax.jit(lambda dit: dit(latents, timestep, dit.embed_context(text, batch.image)))
    assert np.array_equal(plainly(dit), expected)

    @jax.jit
    def with_frames(dit: WanDiT, rows):
        """The shared set is the prompt, and each frame has `rows`."""
        given = dit.embed_context(text, batch.image)
        return dit(latents, timestep, given._replace(text=Rows(given.text.shared, rows)))

    assert relative_l2(with_frames(dit, jnp.zeros((2, FRAMES, 0, WIDTH))), expected) <= 1e-6
    # Rows that come twice have half the weight each.
    same = {"text": jnp.broadcast_to(dit.embed_context(text).text.shared[:, None], (2, FRAMES + 1, 6, WIDTH))}
    read = method.context(dit, replace(CONFIG.inversion, tokens=6, sink=False), same, text, batch.image)
    assert np.array_equal(read.text.shared, same["text"][:, -1])
    assert relative_l2(with_frames(dit, read.text.of_frames), expected) <= 1e-6


def test_a_frame_reads_its_own_set_and_the_shared_one(dit):
    graphdef, layers = nnx.split(dit.blocks)
    attention = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], layers)).cross_attention
    x, frames, shared = normal(0, 1, 3 * 5, WIDTH), normal(1, 1, 3, 2, WIDTH), normal(2, 1, 4, WIDTH)
    read = jax.jit(lambda frames, shared: attention(x, Context(Rows(shared, frames), None, None)).reshape(3, 5, WIDTH))
    out = read(frames, shared)
    for changed in range(3):
        other = read(frames.at[0, changed].add(1.0), shared)
        assert [np.array_equal(other[f], out[f]) for f in range(3)] == [f != changed for f in range(3)]
    assert not any(np.array_equal(a, b) for a, b in zip(read(frames, shared + 1.0), out, strict=True))


@pytest.mark.parametrize(("branch", "sink"), [("text", True), ("image", True), ("both", False)])
def test_the_unconditional_pass_has_the_same_layout(dit, branch, sink):
    """Every frame reads the negative prompt: with more of its padding, or its first rows where nothing is beside the tokens."""
    config, batch, negative = replace(CONFIG.inversion, branch=branch, sink=sink), sample(2), prompts(3, 1)
    read = method.context(dit, config, tokens_of(replace(CONFIG, inversion=config), 2), batch.text, batch.image)
    unread = method.negative_context(dit, config, read, negative, batch.image)
    assert jax.tree.map(jnp.shape, unread) == jax.tree.map(jnp.shape, read)
    count = {"text": 10, "image": 6, "both": 4}[branch]
    rows = dit.embed_context(jnp.pad(negative, ((0, 0), (0, 4), (0, 0)))[:, :count]).text.shared
    for frame in range(FRAMES):
        own = [] if branch == "image" else [unread.text.of_frames[:, frame]]
        assert np.allclose(jnp.concatenate([*own, unread.text.shared], 1), rows, atol=1e-6)
    if branch != "text":
        classes = dit.embed_context(negative, batch.image).image.shared[:, 0]
        assert np.allclose(unread.image.of_frames[:, :, 0], classes[:, None], atol=1e-6)
        assert np.allclose(unread.image.shared[:, 0], classes, atol=1e-6)


def test_a_prompt_stays_where_tokens_leave_it(dit):
    """In text-to-video networks the prompt follows the tokens; tokens of the image branch leave it alone."""
    text = prompts(4)
    t2v = make_dit(T2V)
    read = method.context(t2v, replace(T2V.inversion, sink=False), tokens_of(T2V), text, None)
    assert np.array_equal(read.text.shared[:, 2:], t2v.embed_context(text).text.shared)
    config = replace(CONFIG, inversion=replace(CONFIG.inversion, branch="image"))
    read = method.context(dit, config.inversion, tokens_of(config), text, sample(1).image)
    assert np.array_equal(read.text.shared, dit.embed_context(text).text.shared)
    assert read.text.of_frames is None
    assert T2V.keeps_prompt
    assert config.keeps_prompt
    assert not CONFIG.keeps_prompt


def test_guidance_moves_away_from_the_negative_prompt(dit):
    """A sample with tokens that are the negative prompt's own rows is that prompt's, whatever the scale."""
    batch, negative = sample(1), prompts(6)
    noise, config = normal(9, 1, 2, 4, 8, 16), replace(CONFIG, inversion=replace(CONFIG.inversion, tokens=3, sink=False))
    rows = dit.embed_context(negative).text.shared
    own = {"text": jnp.stack([rows[:, :3]] * FRAMES + [rows[:, 3:]], 1)}
    encoded = Conditions(batch.text, negative, batch.image, batch.condition)

    def latents(conditions, guidance):
        sampler = replace(CONFIG.sampler, guidance=guidance)
        return omnitransfer.denoise_on(make_mesh(config.mesh), replace(config, sampler=sampler))(lambda part: dit, conditions, noise)

    expected = latents(encoded._replace(text_context=negative), 1.0)
    assert relative_l2(latents(method.conditions(config, own, dit, encoded), 4.0), expected) <= 1e-5
    assert relative_l2(latents(method.conditions(config, {"text": own["text"] + 1}, dit, encoded), 4.0), expected) > 1e-3


def test_noise_levels_are_those_of_the_edm_noise():
    """sigma = t / (1 - t) is log-normal: quantiles of t are sigmoids of those of N(2.8, 1.6^2)."""
    key, batch = jax.random.key(0), Sample(jnp.zeros(20_000, jnp.int32), jnp.zeros((20_000, 1, 1, 1, 1)), jnp.zeros((20_000, 1, 1)))
    times = np.asarray(method.draw(CONFIG, key, batch).time)
    logs = np.log(times.astype(np.float64) / (1 - times))
    assert logs.mean() == pytest.approx(2.8, abs=0.05)
    assert logs.std() == pytest.approx(1.6, abs=0.05)
    uniform = replace(CONFIG, inversion=replace(CONFIG.inversion, times="uniform"))
    assert np.array_equal(method.draw(uniform, key, batch).time, draw_time(jax.random.split(key)[0], 20_000, CONFIG.train.shift))


@pytest.mark.parametrize("space", ["blocks", "encoder"])
def test_tokens_start_from_caption_and_frames(dit, space):
    config = replace(CONFIG, inversion=InversionConfig(tokens=3, branch="both", space=space, init_noise=0.0))
    start = Start(normal(0, 7, 8), normal(1, FRAMES, 9, 8))
    found = method.initial_tokens(config, dit, start, jax.random.key(0))
    pieces = jnp.stack([start.caption[:2].mean(0), start.caption[2:4].mean(0), start.caption[4:].mean(0)])
    patches = jnp.stack([jnp.stack([f[0], f[1:5].mean(0), f[5:].mean(0)]) for f in start.frames])
    if space == "blocks":
        read = dit.embed_context(jnp.stack([pieces] * FRAMES), patches)
        pieces, patches = read.text.shared[0], read.image.shared
    assert found["text"].shape == found["image"].shape == (FRAMES + 1, 3, WIDTH if space == "blocks" else 8)
    assert all(np.allclose(rows, pieces, atol=1e-6) for rows in found["text"])
    assert np.allclose(found["image"], jnp.concatenate([patches, patches[:1]]), atol=1e-6)
    noisy = method.initial_tokens(replace(config, inversion=replace(config.inversion, init_noise=0.1)), dit, start, jax.random.key(0))
    for name, rows in noisy.items():
        assert float((rows - found[name]).std() / found[name].std()) == pytest.approx(0.1, rel=0.3)
    short = method.initial_tokens(config, dit, start._replace(caption=start.caption[:1]), jax.random.key(0))
    assert np.allclose(short["text"], short["text"][0, 0], atol=1e-6)  # fewer rows than a set are repeated


def test_each_clip_has_its_own_tokens(dit):
    """A sample's loss depends on the tokens of its clip and no others."""
    trained, batch = method.objective(CONFIG, clips=3), sample(2)
    batch = batch._replace(clip=jnp.array([2, 0], jnp.int32))
    base = flat_params(dit, "dit.")
    drawn = Drawn(jnp.array([0.9, 0.7]), normal(7, *batch.latents.shape))

    def second(tokens):
        losses, metrics = trained.loss({"tokens.text": tokens} | base, batch, drawn, UNSHARDED)
        return losses[1], (losses, metrics)

    tokens = tokens_of(CONFIG, 3)["text"]
    gradient, (losses, metrics) = jax.jit(jax.grad(second, has_aux=True))(tokens)
    assert [bool(jnp.any(g != 0)) for g in gradient] == [True, False, False]
    assert losses.shape == metrics["text_rms"].shape == (2,)
    assert np.allclose(metrics["text_rms"], jnp.sqrt(jnp.square(tokens[jnp.array([2, 0])]).mean((1, 2, 3))))


@pytest.mark.parametrize("config", [CONFIG, T2V, *configs.VARIANTS.values()])
def test_what_trains_and_what_is_read(config):
    trained, latent_frames = method.objective(config), config.video.latent_shape(config.vae)[0]
    (path,) = trained.params
    assert trained.params[path].shape == (1, latent_frames + 1, config.inversion.tokens, config.dit.dim)
    assert all(path.startswith("dit.") for path in trained.base)
    assert (trained.batch.image is None) == (config.dit.image_dim is None)
    assert type(trained.models) is type(plain(config))


def sharded() -> dict:
    """A step of the tokens: each device holds a part of the transformer and of the clips."""
    config = replace(CONFIG, inversion=replace(CONFIG.inversion, branch="both"), train=replace(CONFIG.train, batch_size=4))
    trained = method.objective(config, clips=4)
    return differences(trained, config, jax.tree.map(np.asarray, sample(4)), {"2x2": (MeshConfig(data=2, heads=2), 1)})


def test_sharded_equals_single():
    """Each device has whole latent frames and their tokens."""
    report = on_eight_devices("tests.methods.test_motion_inversion")
    assert report["dead"] == []
    ((loss, gradient),) = report["cases"].values()
    assert loss < 1e-6
    assert gradient < 1e-5


if __name__ == "__main__":
    print(json.dumps(sharded()))
