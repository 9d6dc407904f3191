"""The parts of a Wan model: what each is called here, in a diffusers folder and in the original's, and which table carries it over."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

from flax import nnx

from omnitransfer_jax.models.clip_vision import CLIPVision
from omnitransfer_jax.models.umt5 import UMT5Encoder
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.params import abstract, flat_params
from omnitransfer_jax.weights import clip_vision, umt5, wan_dit, wan_vae
from omnitransfer_jax.weights.table import Entry

Layout = Literal["diffusers", "original"]
TOKENIZERS: dict[Layout, str] = {"diffusers": "tokenizer", "original": "google/umt5-xxl"}  # where each layout keeps the vocabulary


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


@cache
def _shapes(model: Callable[..., nnx.Module], config: Any) -> Mapping[str, Any]:
    return flat_params(abstract(lambda rngs: model(config, rngs=rngs)))
