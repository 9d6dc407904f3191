"""Softmax attention whose memory grows with the sequence, not with its square, behind one function.

    chunked   any backend: 256 queries of one head at a time against all keys, scores recomputed in the backward pass
    cudnn     GPU: cuDNN's fused kernel, bf16 or f16
    splash    TPU: the Pallas splash kernel, head width a multiple of 128

Wan needs no mask, and OmniTransfer's one direction is two calls without one. `one_directional_attention` is the same thing as one
call under a mask, for chunked and splash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Float

Kind = Literal["auto", "chunked", "cudnn", "splash"]

CHUNK = 256  # queries at a time: one head's scores against 2,304 keys fit a 2 MB cache; 64 to 256 were within 10 % of each other
SPLASH_BLOCK = 512  # rows of one splash tile


@dataclass(frozen=True)
class OneDirection:
    """Who sees whom when the target and its references lie behind one another: the target everyone, each reference itself."""

    queries: tuple[int, ...]
    """Query rows of the target, then of each reference."""
    keys: tuple[int, ...]
    """Key rows, likewise."""

    def __call__(self, q: Any, k: Any) -> Any:
        """Whether query `q` sees key `k`, by index.

        Padding behind the keys is seen by none; padding behind the queries counts as target.
        """
        rows, columns = np.cumsum((0, *self.queries)).tolist(), np.cumsum((0, *self.keys)).tolist()
        seen = (q < rows[1]) | (q >= rows[-1])
        for i in range(1, len(self.queries)):
            seen = seen | ((q >= rows[i]) & (q < rows[i + 1]) & (k >= columns[i]) & (k < columns[i + 1]))
        return seen & (k < columns[-1])


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


def one_directional_attention(
    queries: Sequence[Float[Array, "B _ N K"]],
    keys: Sequence[Float[Array, "B _ N K"]],
    values: Sequence[Float[Array, "B _ N K"]],
    kind: Kind = "auto",
) -> list[Float[Array, "B _ N K"]]:
    """The answers of the target and of each reference, from one call under a one-directional mask (Eq. 3 and 4 at once)."""
    mask = OneDirection(tuple(q.shape[1] for q in queries), tuple(k.shape[1] for k in keys))
    q, k, v = (jnp.concatenate(x, axis=1) for x in (queries, keys, values))
    kernel = splash_attention if _resolve(kind, q) == "splash" else chunked_attention
    return jnp.split(kernel(q, k, v, mask), np.cumsum(mask.queries)[:-1].tolist(), axis=1)


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
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], mask: OneDirection | None = None
) -> Float[Array, "B L N K"]:
    """Exact attention, one head and `CHUNK` queries at a time."""
    B, L, N, K = q.shape
    chunk = min(CHUNK, L)
    count = -(-L // chunk)
    padded = count * chunk
    q = jnp.pad(q, ((0, 0), (0, padded - L), (0, 0), (0, 0)))
    columns = jnp.arange(k.shape[1])[None]

    @jax.checkpoint
    def queries(rows, q, k, v):
        scores = jnp.einsum("lk,sk->ls", q, k, preferred_element_type=jnp.float32) * K**-0.5
        if mask is not None:
            scores = jnp.where(mask(rows[:, None], columns), scores, -jnp.inf)
        # The shift cancels in the quotient, so no gradient has to pass through it.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        out = jnp.einsum("ls,sk->lk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)

    def head(qkv):
        q, k, v = qkv
        blocks = jnp.arange(padded).reshape(count, chunk), q.reshape(count, chunk, K)
        return jax.lax.map(lambda block: queries(*block, k, v), blocks).reshape(padded, K)

    q, k, v = (x.swapaxes(1, 2).reshape(B * N, x.shape[1], K) for x in (q, k, v))
    out = jax.lax.map(head, (q, k, v))
    return out.reshape(B, N, padded, K).swapaxes(1, 2)[:, :L]


def splash_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    mask: OneDirection | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B L N K"]:
    """The TPU kernel, forward and backward. Lengths are padded to whole tiles; tiles nobody sees cost nothing."""
    (_, L, N, K), S, block = q.shape, k.shape[1], SPLASH_BLOCK
    q, k, v = (x.swapaxes(1, 2) for x in (q * K**-0.5, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0))) for x in (q, k, v))
    shape = q.shape[2], k.shape[2]
    if mask is None and k.shape[2] != S:
        mask = OneDirection((L,), (S,))
    kernel: Any = splash.make_splash_mha_single_device(
        mask=splash_mask.MultiHeadMask([splash_mask.FullMask(shape) if mask is None else _SplashMask(shape, mask)] * N),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    out: Any = jax.vmap(kernel)(q, k, v)
    return out.swapaxes(1, 2)[:, :L]


class _SplashMask(splash_mask._ComputableMask):
    """`OneDirection` as the kernel wants it: computed tile by tile, compared by value so that all heads share one."""

    def __init__(self, shape: tuple[int, int], mask: OneDirection):
        super().__init__(shape, mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SplashMask) and (self.shape, self.mask_function) == (other.shape, other.mask_function)

    def __hash__(self) -> int:
        return hash((self.shape, self.mask_function))
