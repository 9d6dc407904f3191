"""Reading a reference frame by frame: two attention calls merged by their log-sum-exp are one call under a dense mask."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.errors import RequestError
from omnitransfer_jax.mesh import UNSHARDED
from omnitransfer_jax.models import attend
from omnitransfer_jax.models.attend import QKV, Frames, Reach, Streams
from omnitransfer_jax.models.wan_dit import WanDiT
from tests.compare import relative_l2
from tests.models.test_references import MIXED, PATCHES, draw, model, references  # noqa: F401
from tests.models.test_wan_dit import TINY

FRAMES, TOKENS = 3, 4  # of the target
SIZES = ((2, 5), (4, 3))  # frames of two references, and tokens of each of them
LATER = (jnp.array([1, -1]), jnp.array([0]))  # the first one's offset differs between the samples


def streams(seed=0):
    """Queries, keys and values of a target and two references, two samples, two heads."""

    def one(i, length):
        return QKV(*(draw(10 * seed + 3 * i + j, 2, length, 2, 8) for j in range(3)), x=draw(0, 2, length, 16))

    return Streams(one(0, FRAMES * TOKENS), tuple(one(i + 1, frames * tokens) for i, (frames, tokens) in enumerate(SIZES)))


REACH = Reach(TOKENS, tuple(Frames(tokens, later) for (_, tokens), later in zip(SIZES, LATER, strict=True)))


def dense(x: Streams) -> jax.Array:
    """Softmax over all keys under a mask of who reads whom, written out over pairs of tokens."""
    mask = np.ones((2, FRAMES * TOKENS, FRAMES * TOKENS), bool)
    for (frames, tokens), later in zip(SIZES, LATER, strict=True):
        time = np.arange(frames * tokens) // tokens
        theirs = np.broadcast_to(np.asarray(later)[:, None] + time[None], (2, frames * tokens))
        mine = np.arange(FRAMES * TOKENS) // TOKENS
        mask = np.concatenate([mask, theirs[:, None] == mine[None, :, None]], axis=2)
    k, v = (jnp.concatenate(parts, 1) for parts in zip(*((s.k, s.v) for s in (x.target, *x.references)), strict=True))
    scores = jnp.einsum("blnk,bsnk->bnls", x.target.q, k) * x.target.q.shape[-1] ** -0.5
    return jnp.einsum("bnls,bsnk->blnk", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)


def merged(x: Streams) -> jax.Array:
    return attend.split(x, None, "chunked", REACH)[0].target


def test_equals_a_dense_mask():
    """Values and gradients; with the scores raised, so that a merge without the maxima would overflow."""
    for scale in (1.0, 100.0):
        x = jax.tree.map(lambda a, scale=scale: a * scale**0.5, streams())
        assert relative_l2(merged(x), dense(x)) <= 1e-5
    probe = draw(5, *streams().target.q.shape)
    mine, wanted = (jax.grad(lambda x, f=form: (f(x) * probe).sum())(streams()) for form in (merged, dense))
    for found, value in zip(jax.tree.leaves(mine), jax.tree.leaves(wanted), strict=True):
        assert (not value.any() and not found.any()) or relative_l2(found, value) <= 1e-5


def test_split_and_cached_are_one_function():
    x = streams()
    cache = [(r.k, r.v) for r in x.references]
    found = attend.cached(Streams(x.target, ()), cache, "chunked", REACH)[0].target
    assert (found == merged(x)).all()


def test_devices_may_begin_inside_a_frame():
    """Parts of 5 tokens of frames of 4, as of a device each."""
    x, whole = streams(), merged(streams())
    for start in range(0, FRAMES * TOKENS - 4):
        part = replace(x, target=x.target._replace(q=x.target.q[:, start : start + 5]))
        reach = replace(REACH, start=jnp.int32(start))
        found = attend.split(part, None, "chunked", reach)[0].target
        assert relative_l2(found, whole[:, start : start + 5]) <= 1e-6


def test_splash_gives_the_log_sum_exp(monkeypatch):
    """The TPU kernel, interpreted; its backward pass is that of `chunked`."""
    q, k, v = draw(0, 1, 20, 2, 128), draw(1, 1, 30, 2, 128), draw(2, 1, 30, 2, 128)
    out, lse = attend.splash_attention(q, k, v, interpret=True, with_lse=True)
    wanted = attend.chunked_attention_and_lse(q, k, v)
    assert relative_l2(out, wanted[0]) <= 1e-5
    assert relative_l2(lse, wanted[1]) <= 1e-5
    whole = attend.splash_attention
    monkeypatch.setattr(attend, "splash_attention", lambda *args, **kw: whole(*args, **kw, interpret=True))

    def loss(kind):
        return jax.grad(lambda qkv: sum(jnp.sin(x).sum() for x in attend.attention_and_lse(*qkv, kind)))((q, k, v))

    for found, value in zip(loss("splash"), loss("chunked"), strict=True):
        assert relative_l2(found, value) <= 1e-5


@pytest.fixture(scope="module")
def near(model):  # noqa: F811
    """The same weights, references read frame by frame."""
    return nnx.merge(nnx.split(WanDiT(replace(TINY, reach="same_frame"), rngs=nnx.Rngs(0)))[0], nnx.state(model))


@jax.jit
def last_tokens(model, batch, made):  # noqa: F811
    x, inputs, contexts, _ = model.prepare(**batch, references=made)
    attend_to = model.strategy(True, reach=model.reach(PATCHES, model.frames(made), x.target.shape[1], UNSHARDED))
    return model.run(x, inputs, contexts, attend_to, None, UNSHARDED)[0].target


def test_a_frame_reads_its_own_frame_alone(near):
    """In one block: another frame of the reference is not noticed, and a reference at no time of the target is not read."""
    one = nnx.merge(nnx.split(WanDiT(replace(TINY, reach="same_frame", num_layers=1), rngs=nnx.Rngs(0)))[0], nnx.state(near_one(near)))
    batch = {"latents": draw(0, 2, 2, 4, 6, 36), "timestep": jnp.array([700.0, 30.0]), "text": draw(1, 2, 16, 8)}
    (made,) = references(3)
    base = last_tokens(one, batch, (made,))
    moved = made._replace(offset=jnp.zeros((2, 3), jnp.int32))  # both samples share the target's times
    here = last_tokens(one, batch, (moved,))
    frame = here.shape[1] // 2
    changed = last_tokens(one, batch, (moved._replace(latents=moved.latents.at[:, 1].add(1.0)),))
    assert relative_l2(changed[:, :frame], here[:, :frame]) <= 1e-6
    assert relative_l2(changed[:, frame:], here[:, frame:]) > 1e-4
    nothing = last_tokens(one, batch, ())
    assert relative_l2(base[1], nothing[1]) <= 1e-6  # the appearance sample's reference is after the target
    assert relative_l2(base[0], nothing[0]) > 1e-4


def near_one(near):
    """The state of a model of its first block alone."""
    graphdef, state = nnx.split(near)
    state["blocks"] = jax.tree.map(lambda leaf: leaf[:1], state["blocks"])
    return nnx.merge(graphdef, state)


def test_only_split_reads_single_frames():
    with pytest.raises(RequestError, match=r"dit\.reach='same_frame' with dit\.references='joint': only split"):
        replace(TINY, reach="same_frame", references="joint").validate()


def test_mixed_tasks(near):
    assert MIXED.tolist() == [2, 1]  # what the expectations above are about
