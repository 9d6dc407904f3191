"""Every kernel is the same function, and its memory grows with the sequence, not with its square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnitransfer_jax.models import attend
from tests.compare import relative_l2

SPLASH = attend.splash_attention


def dense(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("blnk,bsnk->bnls", q, k) / q.shape[-1] ** 0.5, axis=-1)
    return jnp.einsum("bnls,bsnk->blnk", weights, v)


def draw(batch, queries, keys, heads, width, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys)]
    return [jnp.asarray(random.standard_normal(s) * 2, dtype) for s in shapes]


@pytest.mark.parametrize(
    ("kernel", "shape", "tolerance"),
    [
        (attend.chunked_attention, (2, 600, 333, 3, 20), 1e-6),  # neither length is a multiple of the chunk
        (attend.chunked_attention, (1, 7, 300, 2, 16), 1e-6),
        (lambda q, k, v: attend.splash_attention(q, k, v, interpret=True), (2, 200, 300, 2, 128), 1e-5),
        (lambda q, k, v: attend.splash_attention(q, k, v, interpret=True), (1, 600, 1100, 1, 128), 1e-5),  # more than a tile, both padded
    ],
    ids=["chunked", "chunked_short", "splash", "splash_tiles"],
)
def test_kernels_equal_dense_attention(kernel, shape, tolerance):
    qkv = draw(*shape)
    probe = jnp.asarray(np.random.default_rng(1).standard_normal(qkv[0].shape), jnp.float32)
    loss = lambda f: jax.jit(jax.value_and_grad(lambda qkv: ((o := f(*qkv)) * probe).sum() + 0 * o.sum()))  # noqa: E731
    assert relative_l2(kernel(*qkv), dense(*qkv)) <= tolerance
    for ours, wanted in zip(loss(kernel)(qkv)[1], loss(dense)(qkv)[1], strict=True):
        assert relative_l2(ours, wanted) <= tolerance


def test_half_precision_keeps_its_dtype_and_a_float32_softmax():
    qkv = draw(1, 64, 4096, 1, 16, jnp.bfloat16)
    out = attend.chunked_attention(*qkv)
    assert out.dtype == jnp.bfloat16
    assert relative_l2(out.astype(jnp.float32), dense(*(x.astype(jnp.float32) for x in qkv))) <= 2**-7


def test_memory_grows_linearly():
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: jnp.square(attend.attention(q, k, v)).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) / temporary_bytes(2048) < 4.5  # dense attention: 16


@pytest.mark.parametrize("kernel", ["chunked", "splash"])
def test_one_direction_equals_separate_calls(kernel, monkeypatch):
    """One masked call is the target over everything and each reference over itself, forward and backward."""
    if kernel == "splash":
        interpreted = lambda *a, **names: SPLASH(*a, interpret=True, **names)  # noqa: E731
        monkeypatch.setattr(attend, "splash_attention", interpreted)
    streams = [draw(1, length, length, 1, 128) for length in (200, 130, 300)]
    probe = [jnp.asarray(np.random.default_rng(i).standard_normal(q.shape), jnp.float32) for i, (q, _, _) in enumerate(streams)]

    def separate(streams):
        keys, values = (jnp.concatenate([s[i] for s in streams], 1) for i in (1, 2))
        return [dense(streams[0][0], keys, values), *(dense(*s) for s in streams[1:])]

    def masked(streams):
        return attend.one_directional_attention(*zip(*streams, strict=True), kernel)

    def gradients(f):
        return jax.jit(jax.grad(lambda s: sum((o * p).sum() for o, p in zip(f(s), probe, strict=True))))(streams)

    for ours, wanted in zip(masked(streams), separate(streams), strict=True):
        assert relative_l2(ours, wanted) <= 1e-5
    for ours, wanted in zip(jax.tree.leaves(gradients(masked)), jax.tree.leaves(gradients(separate)), strict=True):
        assert relative_l2(ours, wanted) <= 1e-5


@pytest.mark.parametrize(
    ("backend", "width", "dtype", "kernel"),
    [
        ("tpu", 128, jnp.bfloat16, "splash"),
        ("tpu", 384, jnp.float32, "chunked"),  # the autoencoder
        ("tpu", 80, jnp.bfloat16, "chunked"),  # CLIP
        ("gpu", 128, jnp.bfloat16, "cudnn"),
        ("gpu", 384, jnp.bfloat16, "chunked"),
        ("cpu", 128, jnp.bfloat16, "chunked"),
    ],
)
def test_auto_is_the_kernel_of_the_backend_that_is_compiled_for(backend, width, dtype, kernel):
    queries = jnp.zeros((1, 1, 1, width), dtype)
    with attend.compiled_for(backend):
        assert attend._resolve("auto", queries) == kernel
        assert attend._resolve("chunked", queries) == "chunked"
    assert attend._resolve("auto", queries) == "chunked"  # on this machine
