"""The parts of a Wan model: what each is called here, in a diffusers folder and in the original's, and which table carries it over.

Beside them stands the language model of the alignment, which is published by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

from flax import nnx

from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.weights import clip_vision, qwen2_5_vl, umt5, wan_dit, wan_vae
from omnitransfer_jax.weights.table import Entry

Layout = Literal["diffusers", "original"]
TOKENIZERS: dict[Layout, str] = {"diffusers": "tokenizer", "original": "google/umt5-xxl"}  # where each layout keeps the vocabulary
MLLM_TOKENIZER = "mllm_tokenizer"  # the language model's, in our checkpoint
MLLM_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")  # and where it is published


class Part(NamedTuple):
    """One model of the whole, and where its weights lie."""

    name: str
    """Its field in `Config` and its folder in our checkpoints."""
    model: Callable[..., nnx.Module]
    table: ModuleType
    """Its table of tensors, a module of this package."""
    diffusers: tuple[str, str]
    """Folder and file stem in the diffusers layout."""
    original: str
    """File stem in the original's folder; its own files may go on after the part before the first hyphen or dot."""
    absent: str
    """What a checkpoint without it cannot do."""
    prefixes: Sequence[str] = ()
    ignored: Sequence[str] = ()
    ignored_of: Callable[[Any], Sequence[str]] = lambda config: ()
    """What else is ignored for this configuration."""

    def shapes(self, config: Any) -> Mapping[str, Any]:
        """The leaves of the model of this configuration, as shapes."""
        return _shapes(self.model, config)

    def entries(self, config: Any, layout: Layout) -> list[Entry]:
        return self.table.entries(config, layout)


PARTS = (
    Part(
        "dit", WanDiT, wan_dit, ("transformer", "diffusion_pytorch_model"), "diffusion_pytorch_model",
        "nothing can be sampled or trained", wan_dit.OPTIONAL_PREFIXES, wan_dit.IGNORED,
    ),
    Part(
        "vae", WanVAE, wan_vae, ("vae", "diffusion_pytorch_model"), "Wan2.1_VAE",
        "no video can be encoded or decoded",
    ),
    Part(
        "text", UMT5Encoder, umt5, ("text_encoder", "model"), "models_t5_umt5-xxl-enc-bf16",
        "no prompt can be encoded", (), umt5.IGNORED,
    ),
    Part(
        "image", CLIPVision, clip_vision, ("image_encoder", "model"), "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
        "no first frame can be encoded; text-to-video needs none", clip_vision.OPTIONAL_PREFIXES, clip_vision.IGNORED,
    ),
)  # fmt: skip
MLLM = Part(
    "mllm", Qwen2_5VL, qwen2_5_vl, ("mllm", "model"), "model", "no alignment, which stages 2 and 3 need",
    qwen2_5_vl.OPTIONAL_PREFIXES, (), qwen2_5_vl.ignored,
)  # fmt: skip


@cache
def _shapes(model: Callable[..., nnx.Module], config: Any) -> Mapping[str, Any]:
    return flat_params(abstract(lambda rngs: model(config, rngs=rngs)))
