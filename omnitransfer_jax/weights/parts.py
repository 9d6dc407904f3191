"""The parts of a Wan model: the name of each here, in a diffusers folder and in the original's folder, and its table of tensors.

The language model of the alignment is one more part, which is published by itself, and the low-noise expert of Wan2.2 another.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType, ModuleType
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
TOKENIZERS: dict[Layout, str] = {"diffusers": "tokenizer", "original": "google/umt5-xxl"}  # the text encoder's vocabulary in each layout
MLLM_TOKENIZER = "mllm_tokenizer"  # the language model's vocabulary in our checkpoint
MLLM_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")  # and in the folder that is published


class Part(NamedTuple):
    """One model of the whole, and where its weights lie."""

    name: str
    """Its field in `Config` and its folder in our checkpoints."""
    model: Callable[..., nnx.Module]
    table: ModuleType
    """The module of this package that holds its table of tensors."""
    diffusers: tuple[str, str]
    """Folder and file stem in the diffusers layout."""
    original: str
    """File stem in the original's folder; a file is recognised by what stands before the first hyphen."""
    absent: str
    """What a checkpoint without this part cannot do."""
    prefixes: Sequence[str] = ()
    """Prefixes of tensor names that a file may have or leave off."""
    ignored: Sequence[str] = ()
    """fnmatch patterns of tensors that a file may hold and the table does not."""
    copies: Mapping[str, str] = MappingProxyType({})
    """By the name of an ignored tensor that of the table which it may take the place of."""

    def shapes(self, config: Any) -> Mapping[str, Any]:
        """The leaves of the model of this configuration, as shapes."""
        return _shapes(self.model, config)

    def entries(self, config: Any, layout: Layout) -> list[Entry]:
        """The table of the model of this configuration."""
        return self.table.entries(config, layout)


PARTS = (
    Part(
        name="dit",
        model=WanDiT,
        table=wan_dit,
        diffusers=("transformer", "diffusion_pytorch_model"),
        original="diffusion_pytorch_model",
        absent="nothing can be sampled or trained",
        prefixes=wan_dit.OPTIONAL_PREFIXES,
        ignored=wan_dit.IGNORED,
    ),
    Part(
        name="vae",
        model=WanVAE,
        table=wan_vae,
        diffusers=("vae", "diffusion_pytorch_model"),
        original="Wan2.1_VAE",
        absent="no video can be encoded or decoded",
    ),
    Part(
        name="text",
        model=UMT5Encoder,
        table=umt5,
        diffusers=("text_encoder", "model"),
        original="models_t5_umt5-xxl-enc-bf16",
        absent="no prompt can be encoded",
        ignored=umt5.IGNORED,
        copies=umt5.COPIES,
    ),
    Part(
        name="image",
        model=CLIPVision,
        table=clip_vision,
        diffusers=("image_encoder", "model"),
        original="models_clip_open-clip-xlm-roberta-large-vit-huge-14",
        absent="no first frame can be encoded; text-to-video needs none",
        prefixes=clip_vision.OPTIONAL_PREFIXES,
        ignored=clip_vision.IGNORED,
    ),
)
LOW_NOISE = PARTS[0]._replace(  # Wan2.2's second transformer; the first, at high noise levels, is PARTS[0]
    name="dit_low_noise",
    diffusers=("transformer_2", "diffusion_pytorch_model"),
    absent="Wan2.2 cannot be sampled, for it runs this expert below sampler.boundary",
)
EXPERT_FOLDERS = {"dit": "high_noise_model", "dit_low_noise": "low_noise_model"}  # in the original's folder of Wan2.2
MLLM = Part(
    name="mllm",
    model=Qwen2_5VL,
    table=qwen2_5_vl,
    diffusers=("mllm", "model"),
    original="model",
    absent="no alignment, which stages 2 and 3 need",
    prefixes=qwen2_5_vl.OPTIONAL_PREFIXES,
    ignored=qwen2_5_vl.IGNORED,
)


@cache
def _shapes(model: Callable[..., nnx.Module], config: Any) -> Mapping[str, Any]:
    return flat_params(abstract(lambda rngs: model(config, rngs=rngs)))
