"""Who attends to whom in one layer, and the kernels that compute it.

A strategy takes the queries, keys and values of all streams of a layer:

    plain      the target attends to itself: Wan without references
    split      each reference attends to itself, the target to itself and to all references (Eq. 3 and 4)
    joint      the same function as one call under a one-directional mask
    cached     the target attends to itself and to the keys and values of references that were computed before
    together   every stream attends to all of them: the paper's baseline

One-directional attention needs no mask: it is the two calls of `split`. With a `Reach` the target reads of a reference the frame at its
own time alone, without a mask too: one call over the target, one over each reference batched over frames, merged by their log-sum-exp.
`on_shard` makes any strategy work on tokens that are divided over devices, and keeps what `cached` reads later; `injecting` gives the
target other keys and values. Kernels of softmax attention, whose memory grows with the sequence and not with its square:

    chunked   any backend: 256 queries of one head at a time against all keys, scores recomputed in the backward pass
    cudnn     GPU: cuDNN's fused kernel, bf16 or f16
    splash    TPU: the Pallas splash kernel, head width a multiple of 128
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, Int

from omnitransfer_jax.mesh import Shard

Kind = Literal["auto", "chunked", "cudnn", "splash"]

CHUNK = 256  # queries at a time: one head's scores against 2,304 keys fit a 2 MB cache; 64 to 256 were within 10 % of each other
SPLASH_BLOCK, SPLASH_COMPUTE = 1024, 512  # rows of one splash tile, and of what it computes at a time
SPLASH_WIDTHS = (128, 256)  # of heads; the autoencoder's 384 in float32 was tried by nobody
TILE = 128  # its lengths are multiples of this

_BACKEND: ContextVar[str | None] = ContextVar("backend", default=None)

ANSWER, PROJECTED = "attention", "qkv"
"""Names under which the self-attention's answers, and its queries, keys and values, can be saved for the backward pass."""
Keep = Literal["keys_values", "activations"]
"""What is kept of a reference for `cached`."""

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
    x: Float[Array, "B S D"]
    """What they were projected from."""


@partial(jax.tree_util.register_dataclass, data_fields=["later"], meta_fields=["tokens"])
@dataclass(frozen=True)
class Frames:
    """The frames of one reference: frame f is at the time f + `later`."""

    tokens: int
    """Tokens of one frame."""
    later: Int[Array, " b"]
    """The reference's offset in time, in frames."""


@dataclass(frozen=True)
class Reach:
    """Which frame of each reference a frame of the target reads: the one at the same time, or none if there is none."""

    tokens: int
    """Tokens of one frame of the target."""
    references: tuple[Frames, ...]
    start: Any = 0
    """The first of the target's tokens that this device has."""


KeysValues = tuple[Array, Array]  # "B S N K" each
Kept = tuple[tuple[Array, ...], ...]
"""What one layer keeps of each reference: keys and values, or the activations "B S D" that they are projected from."""
Attend = Callable[[Streams[QKV], Sequence[KeysValues] | None], tuple[Streams[Array], Kept | None]]
"""attend(qkv of all streams, the references' cached keys and values of this layer) -> (outputs "B L N K", what to cache)."""


def self_attention(qkv: QKV, kernel: Kind) -> Float[Array, "B L N K"]:
    """One stream alone."""
    return attention(qkv.q, qkv.k, qkv.v, kernel, ANSWER)


def plain(streams: Streams[QKV], cache: Sequence[KeysValues] | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """The target attends to itself."""
    return streams.map(partial(self_attention, kernel=kernel)), None


def split(
    streams: Streams[QKV], cache: Sequence[KeysValues] | None, kernel: Kind, reach: Reach | None = None
) -> tuple[Streams[Array], None]:
    """Each reference attends to itself, the target to itself and to all of them, or to what of them is in `reach`."""
    assert streams.target is not None
    references = tuple(self_attention(qkv, kernel) for qkv in streams.references)
    return Streams(read(streams.target, [(qkv.k, qkv.v) for qkv in streams.references], kernel, reach), references), None


def joint(streams: Streams[QKV], cache: Sequence[KeysValues] | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """`split` in one call under a one-directional mask."""
    assert streams.target is not None
    queries, keys, values, _ = zip(streams.target, *streams.references, strict=True)
    target, *references = one_directional_attention(queries, keys, values, kernel)
    return Streams(target, tuple(references)), None


def cached(
    streams: Streams[QKV], cache: Sequence[KeysValues] | None, kernel: Kind, reach: Reach | None = None
) -> tuple[Streams[Array], None]:
    """The target attends to itself and to the references' cached keys and values, or to what of them is in `reach`."""
    assert streams.target is not None
    assert cache is not None
    return Streams(read(streams.target, cache, kernel, reach), ()), None


def together(streams: Streams[QKV], cache: Sequence[KeysValues] | None, kernel: Kind) -> tuple[Streams[Array], None]:
    """Every stream attends to all of them."""
    assert streams.target is not None
    queries, keys, values, _ = zip(streams.target, *streams.references, strict=True)
    q, k, v = (jnp.concatenate(x, axis=1) for x in (queries, keys, values))
    target, *references = jnp.split(attention(q, k, v, kernel, ANSWER), np.cumsum([q.shape[1] for q in queries])[:-1].tolist(), axis=1)
    return Streams(target, tuple(references)), None


def on_shard(attend: Attend, shard: Shard, tokens: Streams[int], cached_tokens: tuple[int, ...] = (), keep: Keep | None = None) -> Attend:
    """`attend` where each device has equal parts of every stream's `tokens`, and of each cached reference's.

    The devices along `heads` exchange tokens for heads, before and after; those along `keys` gather the keys and values of all tokens. What
    they `keep` of a reference is divided likewise.
    """

    def attend_with_others(streams: Streams[QKV], cache: Sequence[KeysValues] | None) -> tuple[Streams[Array], Kept | None]:
        def exchanged(qkv: QKV) -> QKV:
            q, k, v = (checkpoint_name(shard.tokens_for_heads(x), PROJECTED) for x in qkv[:3])
            return QKV(q, k, v, qkv.x)

        def gathered(k: Array, v: Array, count: int) -> KeysValues:
            return shard.gather_keys(k, count), shard.gather_keys(v, count)

        def with_all_keys(qkv: QKV, count: int) -> QKV:
            k, v = gathered(qkv.k, qkv.v, count)
            return qkv._replace(k=k, v=v)

        streams = streams.map(exchanged)
        kept = tuple((qkv.x,) if keep == "activations" else (qkv.k, qkv.v) for qkv in streams.references) if keep else None
        if cache is not None:
            cache = [gathered(k, v, count) for (k, v), count in zip(cache, cached_tokens, strict=True)]
        outputs, further = attend(streams.map(with_all_keys, tokens), cache)
        return outputs.map(shard.heads_for_tokens), further if kept is None else kept

    return attend_with_others


def read(target: QKV, references: Sequence[KeysValues], kernel: Kind, reach: Reach | None) -> Float[Array, "B L N K"]:
    """What the target's queries read of its own keys and values and of those of its references."""
    if reach is None:
        k, v = (jnp.concatenate(x, 1) for x in zip((target.k, target.v), *references, strict=True))
        return attention(target.q, k, v, kernel, ANSWER)
    parts = [attention_and_lse(target.q, target.k, target.v, kernel)]
    for (k, v), frames in zip(references, reach.references, strict=True):
        parts.append(read_same_frame(target.q, k, v, frames, reach.tokens, reach.start, kernel))
    return checkpoint_name(merge(parts), ANSWER)


def read_same_frame(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    frames: Frames,
    tokens: int,
    start: Any,
    kernel: Kind,
) -> tuple[Float[Array, "B L N K"], Float[Array, "B L N"]]:
    """What queries read of the reference's frame at their own time, and the log-sum-exp of their scores: -inf where there is none.

    The queries are those of the target's tokens from `start` on, `tokens` a frame. Where a device's part begins in the middle of a
    frame, they are put into whole frames, so that one call batched over frames serves all devices.
    """
    (B, L, N, K), whole = q.shape, q.shape[1] % tokens == 0  # if it is, every device begins with a frame
    count = L // tokens if whole else (L + tokens - 2) // tokens + 1
    first, before = start // tokens, start % tokens
    if not whole:
        q = jax.lax.dynamic_update_slice_in_dim(jnp.zeros((B, count * tokens, N, K), q.dtype), q, before, axis=1)
    k, v = (rearrange(x, "B (F S) N K -> B F S N K", S=frames.tokens) for x in (k, v))
    wanted = jnp.broadcast_to(first + jnp.arange(count)[None] - frames.later[:, None], (B, count))
    there = (wanted >= 0) & (wanted < k.shape[1])
    index = jnp.clip(wanted, 0, k.shape[1] - 1)[:, :, None, None, None]
    k, v = (rearrange(jnp.take_along_axis(x, index, axis=1), "B F S N K -> (B F) S N K") for x in (k, v))
    out, lse = attention_and_lse(rearrange(q, "B (F L) N K -> (B F) L N K", L=tokens), k, v, kernel)
    lse = jnp.where(there.reshape(-1, 1, 1), lse, -jnp.inf)
    found = (rearrange(x, "(B F) L ... -> B (F L) ...", F=count) for x in (out, lse))
    out, lse = (x if whole else jax.lax.dynamic_slice_in_dim(x, before, L, axis=1) for x in found)
    return out, lse


def merge(parts: Sequence[tuple[Float[Array, "B L N K"], Float[Array, "B L N"]]]) -> Float[Array, "B L N K"]:
    """The attention over all keys from the answers over disjoint sets of them, each with the log-sum-exp of its scores."""
    highest = jax.lax.stop_gradient(jnp.max(jnp.stack([lse for _, lse in parts]), axis=0))
    weights = [jnp.exp(lse - highest)[..., None] for _, lse in parts]
    outs = [weight * out.astype(jnp.float32) for weight, (out, _) in zip(weights, parts, strict=True)]
    return (reduce(jnp.add, outs) / reduce(jnp.add, weights)).astype(parts[0][0].dtype)


def injecting(attend: Attend, keys_values: KeysValues, active: Bool[Array, ""]) -> Attend:
    """`attend` where the target has these keys and values instead of its own, if `active`."""

    def attend_to_others(streams: Streams[QKV], cache: Sequence[KeysValues] | None) -> tuple[Streams[Array], Kept | None]:
        assert streams.target is not None
        own = streams.target.k, streams.target.v
        k, v = (jnp.where(active, other.astype(mine.dtype), mine) for other, mine in zip(keys_values, own, strict=True))
        return attend(replace(streams, target=streams.target._replace(k=k, v=v)), cache)

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
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], kind: Kind = "auto", name: str | None = None
) -> Float[Array, "B L N K"]:
    """softmax(q k^T / sqrt(K)) v with the softmax in float32; the result has the dtype of q.

    What the backward pass needs of the answer can be saved under `name`: with `splash` as the kernel has it, with its log-sum-exp.
    """
    match _resolve(kind, q):
        case "cudnn":
            out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        case "splash":
            return splash_attention(q, k, v, name=name)
        case _:
            out = chunked_attention(q, k, v)
    return out if name is None else checkpoint_name(out, name)


def attention_and_lse(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], kind: Kind = "auto"
) -> tuple[Float[Array, "B L N K"], Float[Array, "B L N"]]:
    """`attention`, and log(sum(exp(q k^T / sqrt(K)))) in float32, by which answers over disjoint keys are merged.

    The fused kernels have no gradient for the second, so the backward pass of both is that of `chunked`.
    """
    kind = _resolve(kind, q)
    return chunked_attention_and_lse(q, k, v) if kind == "chunked" else _fused(q, k, v, kind)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(q: Array, k: Array, v: Array, kind: Kind) -> tuple[Array, Array]:
    if kind == "splash":
        return splash_attention(q, k, v, with_lse=True)
    out, lse = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", return_residual=True)
    return out, lse.astype(jnp.float32)


def _fused_forward(q: Array, k: Array, v: Array, kind: Kind) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return _fused(q, k, v, kind), (q, k, v)


def _fused_backward(kind: Kind, saved: tuple[Array, Array, Array], grads: tuple[Array, Array]) -> tuple[Array, ...]:
    return jax.vjp(chunked_attention_and_lse, *saved)[1](grads)


_fused.defvjp(_fused_forward, _fused_backward)


def one_directional_attention(
    queries: Sequence[Float[Array, "B _ N K"]],
    keys: Sequence[Float[Array, "B _ N K"]],
    values: Sequence[Float[Array, "B _ N K"]],
    kind: Kind = "auto",
) -> list[Float[Array, "B _ N K"]]:
    """The outputs of the target and of each reference, from one call under a one-directional mask (Eq. 3 and 4 at once)."""
    mask = OneDirection(tuple(q.shape[1] for q in queries), tuple(k.shape[1] for k in keys))
    q, k, v = (jnp.concatenate(x, axis=1) for x in (queries, keys, values))
    if _resolve(kind, q) == "splash":
        out = splash_attention(q, k, v, mask, name=ANSWER)
    else:
        out = checkpoint_name(chunked_attention(q, k, v, mask), ANSWER)
    return jnp.split(out, np.cumsum(mask.queries)[:-1].tolist(), axis=1)


@contextmanager
def compiled_for(backend: str) -> Iterator[None]:
    """What is traced here will run on `backend`, whatever this machine has: `auto` is that one's kernel."""
    before = _BACKEND.set(backend)
    try:
        yield
    finally:
        _BACKEND.reset(before)


def _resolve(kind: Kind, q: Array) -> Kind:
    """What `auto` means for these queries on this backend: the fused kernel if it takes them."""
    if kind != "auto":
        return kind
    backend, half = _BACKEND.get() or jax.default_backend(), q.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "gpu" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
        return "cudnn"
    if backend == "tpu" and q.shape[-1] in SPLASH_WIDTHS:
        return "splash"
    return "chunked"


def chunked_attention(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"], mask: OneDirection | None = None
) -> Float[Array, "B L N K"]:
    """Exact attention, one head and `CHUNK` queries at a time."""
    return _chunked(q, k, v, mask, with_lse=False)


def chunked_attention_and_lse(
    q: Float[Array, "B L N K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"]
) -> tuple[Float[Array, "B L N K"], Float[Array, "B L N"]]:
    """`chunked_attention` and the log-sum-exp of each query's scores."""
    return _chunked(q, k, v, None, with_lse=True)


def _chunked(q: Array, k: Array, v: Array, mask: OneDirection | None, with_lse: bool) -> Any:
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
        shift = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - shift)
        out = jnp.einsum("ls,sk->lk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = weights.sum(-1, keepdims=True)
        out = (out / total).astype(q.dtype)
        return (out, (shift + jnp.log(total))[:, 0]) if with_lse else out

    def head(qkv):
        q, k, v = qkv
        blocks = jnp.arange(padded).reshape(count, chunk), q.reshape(count, chunk, K)
        found = jax.lax.map(lambda block: queries(*block, k, v), blocks)
        return jax.tree.map(lambda x: x.reshape(padded, *x.shape[2:]), found)

    q, k, v = (x.swapaxes(1, 2).reshape(B * N, x.shape[1], K) for x in (q, k, v))
    found = jax.lax.map(head, (q, k, v))
    return jax.tree.map(lambda x: x.reshape(B, N, *x.shape[1:]).swapaxes(1, 2)[:, :L], found)


def splash_attention(
    q: Float[Array, "B L N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    mask: OneDirection | None = None,
    *,
    name: str | None = None,
    interpret: bool = False,
    with_lse: bool = False,
) -> Any:
    """The TPU kernel, forward and one fused backward. Lengths are padded to whole tiles; tiles that are masked whole cost nothing.

    Returns "B L N K", and `with_lse`, which has no backward, also the log-sum-exp of each query's scores "B L N".
    """
    (_, L, N, K), S = q.shape, k.shape[1]
    rows, columns = (-(-n // TILE) * TILE if n <= SPLASH_COMPUTE else SPLASH_BLOCK for n in (L, S))
    compute = min(columns, SPLASH_COMPUTE)
    q, k, v = (x.swapaxes(1, 2) for x in (q * K**-0.5, k, v))
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % n), (0, 0))) for x, n in ((q, rows), (k, columns), (v, columns)))
    shape = q.shape[2], k.shape[2]
    if mask is None and k.shape[2] != S:
        mask = OneDirection((L,), (S,))
    kernel: Any = splash.make_splash_mha_single_device(
        mask=splash_mask.MultiHeadMask([splash_mask.FullMask(shape) if mask is None else _SplashMask(shape, mask)] * N),
        block_sizes=splash.BlockSizes(
            block_q=rows,
            block_kv=columns,
            block_kv_compute=compute,
            block_q_dkv=rows,
            block_kv_dkv=columns,
            block_kv_dkv_compute=compute,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=name,
        save_residuals=with_lse,
        interpret=interpret,
    )
    found: Any = jax.vmap(kernel)(q, k, v)
    if with_lse:
        found = found[0], found[1][0]
    return jax.tree.map(lambda x: x.swapaxes(1, 2)[:, :L], found)


class _SplashMask(splash_mask._ComputableMask):
    """`OneDirection` as the kernel wants it: computed tile by tile, compared by value so that all heads share one."""

    def __init__(self, shape: tuple[int, int], mask: OneDirection):
        super().__init__(shape, mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SplashMask) and (self.shape, self.mask_function) == (other.shape, other.mask_function)

    def __hash__(self) -> int:
        return hash((self.shape, self.mask_function))
