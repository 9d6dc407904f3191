"""How a target reads references in diffusers' WanTransformer3DModel: attention processors, rotary positions, cached keys and values.

    streams = install(transformer, rope_base, rope_top)
    with streams.recording(offset, storage) as cache:      a reference attends to itself and reads no context
        transformer(reference_latents, time 0, ...)
    with streams.reading(caches, image_rows):              the target attends to itself and to the keys and values of all references
        transformer(target_latents, timestep, context)

The modules and weights are diffusers' own; only processors and the rotary embedding are exchanged, so diffusers' offloading, attention
backends and LoRA loading work as before.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from configs.errors import require

POSITIONS = 1024  # rows of the table on every axis, as in Wan2.1
LARGEST = 127  # of int8

Storage = Literal["full", "cpu", "int8"]
Offset = tuple[int, int, int]
Rotation = tuple[Tensor, Tensor]


class ReferenceCache:
    """Keys and values "B S N K" of one reference in every layer, normalised and rotated."""

    def __init__(self, storage: Storage):
        self.storage: Storage = storage
        self.layers: dict[int, tuple[tuple[Tensor, Tensor | None], ...]] = {}

    def put(self, layer: int, *keys_values: Tensor) -> None:
        """Keeps the keys and values of a layer: where they are, in CPU memory, or in one byte a number."""
        self.layers[layer] = tuple(self._stored(x) for x in keys_values)

    def get(self, layer: int, like: Tensor) -> tuple[Tensor, ...]:
        """Those of a layer, on the device and in the dtype of `like`."""
        return tuple(self._read(values, scale, like) for values, scale in self.layers[layer])

    def nbytes(self) -> int:
        """The memory that it takes."""
        tensors = [x for pairs in self.layers.values() for pair in pairs for x in pair if x is not None]
        return sum(x.nbytes for x in tensors)

    def _stored(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.storage == "int8":
            scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
            return (x.float() / scale).round().to(torch.int8), scale
        if self.storage == "cpu" and x.device.type != "cpu":
            return x.to("cpu").pin_memory(), None
        return x, None

    @staticmethod
    def _read(values: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
        values = values.to(like.device, non_blocking=True)
        return values.to(like.dtype) if scale is None else (values.float() * scale.to(like.device)).to(like.dtype)


class Streams:
    """What the processors of all layers share: whether a reference is recorded, and what the target reads."""

    def __init__(self) -> None:
        self.recorded: ReferenceCache | None = None
        self.caches: Sequence[ReferenceCache] = ()
        self.offset: Offset = (0, 0, 0)
        self.image_rows = 0

    @contextmanager
    def recording(self, offset: Offset, storage: Storage = "full") -> Iterator[ReferenceCache]:
        """Within it a forward pass is one of a reference whose first token is at `offset` (time, row, column), and fills the cache."""
        self.recorded, self.offset = ReferenceCache(storage), offset
        try:
            yield self.recorded
        finally:
            self.recorded, self.offset = None, (0, 0, 0)

    @contextmanager
    def reading(self, caches: Sequence[ReferenceCache], image_rows: int) -> Iterator[None]:
        """Within it a forward pass is one of a target; its context begins with `image_rows` rows of CLIP features."""
        self.caches, self.image_rows = caches, image_rows
        try:
            yield
        finally:
            self.caches, self.image_rows = (), 0


class SelfAttention:
    """Processor of attn1: a reference's keys and values are recorded, the target's queries read those of all references too."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, layer: int, streams: Streams):
        self.layer, self.streams = layer, streams

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> Tensor:
        assert rotary_emb is not None
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        q, k = rotate(q, rotary_emb), rotate(k, rotary_emb)
        if self.streams.recorded is not None:
            self.streams.recorded.put(self.layer, k, v)
        elif self.streams.caches:
            others = [cache.get(self.layer, k) for cache in self.streams.caches]
            k, v = (
                torch.cat([own, *(x.expand(len(own), -1, -1, -1) for x in each)], 1) for own, *each in zip((k, v), *others, strict=True)
            )
        out = dispatch_attention_fn(q, k, v, backend=self._attention_backend)
        return _projected(attn, out.flatten(2, 3).type_as(hidden_states))


class CrossAttention:
    """Processor of attn2: the target reads CLIP features and text of any length; a reference reads nothing."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, streams: Streams):
        self.streams = streams

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> Tensor:
        assert encoder_hidden_states is not None
        if self.streams.recorded is not None:
            return torch.zeros_like(hidden_states)
        rows = self.streams.image_rows
        image, text = encoder_hidden_states[:, :rows], encoder_hidden_states[:, rows:]
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))

        def read(keys: Tensor, values: Tensor) -> Tensor:
            k, v = (x.unflatten(2, (attn.heads, -1)) for x in (keys, values))
            return dispatch_attention_fn(q, k, v, backend=self._attention_backend).flatten(2, 3).type_as(hidden_states)

        out = read(attn.norm_k(attn.to_k(text)), attn.to_v(text))
        if rows:
            out = out + read(attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
        return _projected(attn, out)


class Rotary(nn.Module):
    """Wan's rotary embedding with an offset of the first token, and with frequencies `top * base ** (-2i / width)`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, patch: Sequence[int], base: float, top: float, streams: Streams):
        super().__init__()
        side = 2 * (head_dim // 6)
        self.widths, self.patch, self.streams = (head_dim - 2 * side, side, side), tuple(patch), streams
        positions = torch.arange(POSITIONS, dtype=torch.float64)[:, None]
        angles = [positions * (top * base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width))[None] for width in self.widths]
        whole = torch.cat([each.repeat_interleave(2, dim=1) for each in angles], dim=1)
        self.register_buffer("cos", whole.cos().float(), persistent=False)
        self.register_buffer("sin", whole.sin().float(), persistent=False)

    def forward(self, hidden_states: Tensor) -> Rotation:
        """Cosines and sines "1 L 1 K" for latents "B C F H W"."""
        sizes = [size // p for size, p in zip(hidden_states.shape[2:], self.patch, strict=True)]
        ends = [start + size for start, size in zip(self.streams.offset, sizes, strict=True)]
        require(max(ends) <= POSITIONS, f"position {max(ends)}: Wan's table has {POSITIONS}; take smaller or fewer references")
        return self._table(self.cos, sizes), self._table(self.sin, sizes)

    def _table(self, whole: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = []
        for axis, (values, start, size) in enumerate(zip(whole.split(self.widths, 1), self.streams.offset, sizes, strict=True)):
            shape = [1, 1, 1, values.shape[1]]
            shape[axis] = size
            parts.append(values[start : start + size].view(shape).expand(*sizes, -1))
        return torch.cat(parts, -1).flatten(0, 2)[None, :, None]


def rotate(x: Tensor, table: Rotation) -> Tensor:
    """Rotates each pair (2i, 2i + 1) of the dimensions of "B L N K" by its angle, in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (each[..., ::2] for each in table)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def install(transformer: WanTransformer3DModel, rope_base: float, rope_top: float) -> Streams:
    """Makes `transformer` read references; its weights do not change."""
    streams, network = Streams(), cast(Any, transformer)  # diffusers' types do not know its modules
    head_dim, patch = network.config.attention_head_dim, network.config.patch_size
    network.rope = Rotary(head_dim, patch, rope_base, rope_top, streams).to(network.device)
    for layer, block in enumerate(network.blocks):
        block.attn1.set_processor(SelfAttention(layer, streams))
        block.attn2.set_processor(CrossAttention(streams))
    return streams


def _projected(attn: Any, x: Tensor) -> Tensor:
    for layer in attn.to_out:
        x = layer(x)
    return x
