"""Who attends to whom in one layer, and the kernels that compute it.

A strategy takes the queries, keys and values of all streams of a layer:

    plain      the target attends to itself: Wan without references
    split      each reference attends to itself, the target to itself and to all references (Eq. 3 and 4)
    joint      the same function as one call under a one-directional mask
    cached     the target attends to itself and to the keys and values of references that were computed before
    recording  each reference attends to itself, and the layer returns their keys and values, for `cached`

One-directional attention needs no mask: it is the two calls of `split`. `gathered` makes any strategy work on tokens that are divided
over devices; `injecting` gives the target other keys and values. Kernels of softmax attention, whose memory grows with the sequence and
not with its square:

    chunked   any backend: 256 queries of one head at a time against all keys, scores recomputed in the backward pass
    cudnn     GPU: cuDNN's fused kernel, bf16 or f16
    splash    TPU: the Pallas splash kernel, head width a multiple of 128
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from omnitransfer_jax.mesh import Shard

Kind = Literal["auto", "chunked", "cudnn", "splash"]

CHUNK = 256  # queries at a time: one head's scores against 2,304 keys fit a 2 MB cache; 64 to 256 were within 10 % of each other
SPLASH_BLOCK = 512  # rows of one splash tile


T = TypeVar("T")
U = TypeVar("U")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Streams(Generic[T]):
    """One thing for each sequence of tokens in the blocks: for the target, if it takes part, and for each reference."""

    target: T | None
    references: tuple[T, ...]

    def map(self, function: Callable[..., U], *others: "Streams[Any]") -> "Streams[U]":
        """`function` of each stream's things, as `jax.tree.map`."""
        target = None if self.target is None else function(self.target, *(other.target for other in others))
        rows = zip(self.references, *(other.references for other in others), strict=True)
        return Streams(target, tuple(function(*row) for row in rows))


class QKV(NamedTuple):
    """One stream's queries, keys and values in one layer: normalised, rotated, in the compute dtype."""

    q: Float[Array, "B L N K"]
    k: Float[Array, "B S N K"]
    v: Float[Array, "B S N K"]


KeysValues = tuple[Array, Array]  # "B S N K" each
Attend = Callable[[Streams[QKV], KeysValues | None], tuple[Streams[Array], KeysValues | None]]
"""attend(qkv of all streams, this layer's cached keys and values) -> (outputs "B L N K", keys and values to cache)."""


def self_attention(qkv: QKV, kernel: Kind) -> Float[Array, "B L N K"]:
    """One stream alone."""
    return attention(qkv.q, qkv.k, qkv.v, kernel)


def plain(streams: Streams[QKV], cache: KeysValues | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """The target attends to itself."""
    return streams.map(partial(self_attention, kernel=kernel)), None


def split(streams: Streams[QKV], cache: KeysValues | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """Each reference attends to itself, the target to everything."""
    assert streams.target is not None
    references = tuple(self_attention(qkv, kernel) for qkv in streams.references)
    k, v = (jnp.concatenate(x, 1) for x in zip(*(qkv[1:] for qkv in (streams.target, *streams.references)), strict=True))
    return Streams(attention(streams.target.q, k, v, kernel), references), None


def joint(streams: Streams[QKV], cache: KeysValues | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """`split` in one call under a one-directional mask."""
    assert streams.target is not None
    queries, keys, values = zip(streams.target, *streams.references, strict=True)
    target, *references = one_directional_attention(queries, keys, values, kernel)
    return Streams(target, tuple(references)), None


def cached(streams: Streams[QKV], cache: KeysValues | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """The target attends to itself and to the references' cached keys and values."""
    assert streams.target is not None
    assert cache is not None
    k, v = (jnp.concatenate(x, 1) for x in zip(streams.target[1:], cache, strict=True))
    return Streams(attention(streams.target.q, k, v, kernel), ()), None


def recording(streams: Streams[QKV], cache: KeysValues | None, kernel: Kind) -> tuple[Streams[Array], KeysValues]:
    """Each reference attends to itself; their keys and values, one reference after another, are what the target will read."""
    k, v = (jnp.concatenate(x, 1) for x in zip(*(qkv[1:] for qkv in streams.references), strict=True))
    return streams.map(partial(self_attention, kernel=kernel)), (k, v)


def gathered(attend: Attend, shard: Shard) -> Attend:
    """`attend` where each device has equal parts of every stream's tokens: it computes its own queries against everyone's keys."""

    def attend_to_all(streams: Streams[QKV], cache: KeysValues | None) -> tuple[Streams[Array], KeysValues | None]:
        return attend(streams.map(lambda qkv: QKV(qkv.q, shard.gather(qkv.k), shard.gather(qkv.v))), cache)

    return attend_to_all


def injecting(attend: Attend, keys_values: KeysValues, active: Bool[Array, ""]) -> Attend:
    """`attend` where the target has these keys and values instead of its own, if `active`."""

    def attend_to_others(streams: Streams[QKV], cache: KeysValues | None) -> tuple[Streams[Array], KeysValues | None]:
        assert streams.target is not None
        q, k, v = streams.target
        others = (jnp.where(active, other.astype(own.dtype), own) for other, own in zip(keys_values, (k, v), strict=True))
        return attend(replace(streams, target=QKV(q, *others)), cache)

    return attend_to_others


@dataclass(frozen=True)
class OneDirection:
    """The one-directional mask over the target followed by its references: the target attends to all, each reference to itself."""

    queries: tuple[int, ...]
    """Query rows of the target, then of each reference."""
    keys: tuple[int, ...]
    """Key rows, likewise."""

    def __call__(self, q: Any, k: Any) -> Any:
        """Whether query `q` attends to key `k`, by index. Nobody attends to padding after the keys; padding after the queries is target."""
        rows, columns = np.cumsum((0, *self.queries)).tolist(), np.cumsum((0, *self.keys)).tolist()
        visible = (q < rows[1]) | (q >= rows[-1])
        for i in range(1, len(self.queries)):
            visible = visible | ((q >= rows[i]) & (q < rows[i + 1]) & (k >= columns[i]) & (k < columns[i + 1]))
        return visible & (k < columns[-1])


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
    """The outputs of the target and of each reference, from one call under a one-directional mask (Eq. 3 and 4 at once)."""
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
    """The TPU kernel, forward and backward. Lengths are padded to whole tiles; tiles that are masked whole cost nothing."""
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
