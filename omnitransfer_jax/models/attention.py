"""Softmax attention whose memory grows with the sequence, not with its square, behind one function.

    chunked   any backend: 256 queries of one head at a time against all keys, scores recomputed in the backward pass
    cudnn     GPU: cuDNN's fused kernel, bf16 or f16
    splash    TPU: the Pallas splash kernel, head width a multiple of 128

No kernel takes a mask: nothing in Wan needs one, and OmniTransfer's one direction is two calls.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

Kind = Literal["auto", "chunked", "cudnn", "splash"]

CHUNK = (
    256  # queries at a time on CPU: the scores of one head against 2,304 keys then fit a 2 MB cache; 64 to 512 are within 10 %
)
SPLASH_BLOCK = 512  # rows of one splash tile


def attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], kind: Kind = "auto"
) -> Float[Array, "B L N K"]:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32; the result has the dtype of q."""
    match _resolve(kind, q):
        case "cudnn":
            return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        case "splash":
            return splash_attention(q, k, v)
        case _:
            return chunked_attention(q, k, v)


def _resolve(kind: Kind, q: Array) -> Kind:
    """What `auto` means for these queries on this backend: the fused kernel if it takes them."""
    if kind != "auto":
        return kind
    backend, half = jax.default_backend(), q.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return "cudnn"
    if backend == "tpu" and q.shape[-1] % 128 == 0:
        return "splash"
    return "chunked"


def chunked_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"]
) -> Float[Array, "B L N K"]:
    """Exact attention, one head and `CHUNK` queries at a time."""
    B, L, N, K = q.shape
    chunk = min(CHUNK, L)
    padded = -(-L // chunk) * chunk
    q = jnp.pad(q, ((0, 0), (0, padded - L), (0, 0), (0, 0)))

    @jax.checkpoint
    def queries(q, k, v):
        scores = jnp.einsum("lk,sk->ls", q, k, preferred_element_type=jnp.float32) * K**-0.5
        # The shift cancels in the quotient, so no gradient has to pass through it.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("ls,sk->lk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)

    def head(qkv):
        q, k, v = qkv
        return jax.lax.map(lambda block: queries(block, k, v), q.reshape(-1, chunk, K)).reshape(-1, K)

    q, k, v = (x.swapaxes(1, 2).reshape(B * N, -1, K) for x in (q, k, v))
    out = jax.lax.map(head, (q, k, v))
    return out.reshape(B, N, padded, K).swapaxes(1, 2)[:, :L]


def splash_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], *, interpret: bool = False
) -> Float[Array, "B L N K"]:
    """The TPU kernel, forward and backward. Lengths are padded to whole tiles; segment ids keep the padding unseen."""
    (_, L, N, K), S = q.shape, k.shape[1]
    q, k, v = (x.swapaxes(1, 2) for x in (q * K**-0.5, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % SPLASH_BLOCK), (0, 0))) for x in (q, k, v))
    rows, columns = q.shape[2], k.shape[2]
    block = SPLASH_BLOCK
    kernel = splash.make_splash_mha_single_device(
        mask=splash_mask.MultiHeadMask([splash_mask.FullMask((rows, columns))] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    padding = None
    if columns != S:  # queries all belong to segment 0, and so do the real keys
        padding = splash.SegmentIds(jnp.zeros(rows, jnp.int32), (jnp.arange(columns) >= S).astype(jnp.int32))
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, padding)
    return out.swapaxes(1, 2)[:, :L]
