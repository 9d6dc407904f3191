"""How a target reads references in ComfyUI's Wan model: a wrapper of the diffusion model, as Comfy core has it for model patches.

Before the first step each reference runs through the blocks alone, and the keys and values of its self-attention are kept. In every step a
replacement of each block hands the attention an override that puts them behind the target's own. No weight and no class of ComfyUI changes.
"""

from itertools import count
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.ldm.wan.model import sinusoidal_embedding_1d
from torch import Tensor

FLAGS = {"id": -2.0, "style": -3.0, "motion": -1.0, "camera": -1.0, "effect": -1.0}
TEMPORAL = ("motion", "camera", "effect")  # beside the target, to the right; the others stand behind it in time
MASK_CHANNELS = 4
KEY = "omnitransfer"
Kept = list[tuple[Tensor, Tensor]]  # keys and values "1 S D" of every layer


class Reference(NamedTuple):
    """A reference of a task."""

    task: str
    latents: Tensor
    """"1 C F H W" as the VAE gives them."""


class Reader:
    """The wrapper of one patched model: it keeps the references' keys and values from one step to the next."""

    def __init__(self, references: list[Reference], stack: bool):
        """The latents as the model takes them; with `stack` the k-th reference of a family is k times as far away."""
        self.references, self.stack = references, stack
        self.kept: dict[Any, list[Kept]] = {}

    def forget(self, *_: Any) -> None:
        """Lets the keys and values go, when sampling has ended."""
        self.kept.clear()

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> Tensor:
        """The velocity of `x`, whose channels are noise, mask and first frame."""
        network, options = executor.class_obj, dict(transformer_options or {})
        grid = tuple(size // p for size, p in zip(x.shape[2:], network.patch_size, strict=True))
        key = (grid, x.dtype, x.device)
        if key not in self.kept:
            self.kept = {key: [record(network, r, place, x) for r, place in zip(self.references, self.offsets(grid), strict=True)]}
        without_image = clip_fea is None and network.img_emb is not None
        replace = {name: dict(patches) for name, patches in options.get("patches_replace", {}).items()}
        blocks = replace.setdefault("dit", {})
        for layer in range(len(network.blocks)):
            others_patch = blocks.get(("double_block", layer))
            blocks[("double_block", layer)] = reading([kept[layer] for kept in self.kept[key]], without_image, others_patch)
        return executor(x, timestep, context, clip_fea, time_dim_concat, options | {"patches_replace": replace}, **others)

    def offsets(self, grid: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Where each reference's first token stands: time, row, column."""
        frames, _, columns = grid
        families = [reference.task in TEMPORAL for reference in self.references]
        ranks = [families[: i + 1].count(family) if self.stack else 1 for i, family in enumerate(families)]
        return [(0, 0, rank * columns) if temporal else (rank * frames, 0, 0) for rank, temporal in zip(ranks, families, strict=True)]


def record(network: Any, reference: Reference, offset: tuple[int, int, int], like: Tensor) -> Kept:
    """The keys and values of a reference in every layer: at time 0, without context."""
    latents = reference.latents.to(like)
    flag = torch.full_like(latents[:, :1], FLAGS[reference.task]).expand(-1, MASK_CHANNELS, -1, -1, -1)
    x = network.patch_embedding(torch.cat([latents, flag, latents], 1).float()).to(like.dtype)
    t, h, w = x.shape[2:]
    axes = (torch.arange(start, start + size, device=x.device, dtype=x.dtype) for start, size in zip(offset, (t, h, w), strict=True))
    rotation = network.rope_embedder(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, 3)).movedim(1, 2)
    x = x.flatten(2).transpose(1, 2)
    time = network.time_embedding(sinusoidal_embedding_1d(network.freq_dim, torch.zeros(1, device=x.device)).to(x.dtype))
    modulation, kept = network.time_projection(time[:, None]).unflatten(2, (6, network.dim)), []

    def keep(original: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept.append((k, v))
        return original(q, k, v, *args, **kwargs)

    for block in network.blocks:
        x = reference_block(block, x, modulation, rotation, {"optimized_attention_override": keep})
    return kept


def reference_block(block: Any, x: Tensor, modulation: Tensor, rotation: Tensor, options: dict[str, Any]) -> Tensor:
    """A block without its cross-attention."""
    table = comfy.model_management.cast_to(block.modulation, dtype=x.dtype, device=x.device)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table[None] + modulation).unbind(2)
    x = x + gate * block.self_attn(block.norm1(x) * (1 + scale) + shift, rotation, transformer_options=options)
    return x + ffn_gate * block.ffn(block.norm2(x) * (1 + ffn_scale) + ffn_shift)


def reading(references: Kept, without_image: bool, others_patch: Any) -> Any:
    """The replacement of one block: the first attention in it, the self-attention, reads the references too.

    Without CLIP features ComfyUI lets the image branch, an image-to-video block's second attention, read the text; here it adds nothing.
    """

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options, numbers = args["transformer_options"], count()
        inner = options.get("optimized_attention_override")

        def attention(original: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
            number = next(numbers)
            if number == 1 and without_image:
                return torch.zeros_like(q)
            if number == 0:
                k, v = (torch.cat([own, *(x.expand(len(own), -1, -1) for x in each)], 1)
                        for own, each in zip((k, v), zip(*references, strict=True), strict=True))  # fmt: skip
            return inner(original, q, k, v, *rest, **kwargs) if inner else original(q, k, v, *rest, **kwargs)

        given = {**args, "transformer_options": {**options, "optimized_attention_override": attention}}
        return others_patch(given, extra) if others_patch else extra["original_block"](given)

    return patch
