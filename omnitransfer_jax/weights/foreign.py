"""Files that look like the diffusion transformer and are something else: adapters, and networks with more inputs than Wan has here."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from configs.errors import RequestError, require
from omnitransfer_jax.weights.files import Tensor

# PEFT and diffusers (lora_A), kohya and musubi-tuner (lora_down, lora_unet_), older diffusers (lora.down)
ADAPTER = re.compile(r"(^|\.)lora_(A|B|down|up|unet_|te\d?_)|\.lora\.(down|up)\.")
NETWORKS: dict[str, tuple[tuple[str, ...], str]] = {  # the names that its tensors begin with, and what runs it
    "VACE": (("vace_blocks.", "vace_patch_embedding."), "diffusers' WanVACEPipeline or ComfyUI"),
    "first and last frame (FLF2V)": (
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        "diffusers' WanImageToVideoPipeline with last_image, or ComfyUI",
    ),
    "Fun-Control": (("ref_conv.", "control_adapter."), "VideoX-Fun (aigc-apps) or ComfyUI"),
    "Animate": (("face_adapter.", "motion_encoder.", "pose_patch_embedding."), "diffusers' WanAnimatePipeline or ComfyUI"),
}


def refuse_adapters(tensors: Mapping[str, Tensor]) -> None:
    """A `RequestError` that says what to do with adapters, if there are any among `tensors`."""
    found = [name for name in tensors if ADAPTER.search(name)]
    if found:
        raise RequestError(
            f"{tensors[found[0]].file}: {len(found)} tensors of adapters (LoRA), {found[0]} among them, no weights of a whole network; no "
            "command here takes them: diffusers loads them (load_lora_weights) and can write whole weights with them (fuse_lora, "
            "unload_lora_weights, save_pretrained), which can be imported"
        )


def refuse_networks(names: Iterable[str], file: Path) -> None:
    """A `RequestError` that says what runs the network, if tensors of these names are of a relative of Wan that has more inputs."""
    for name in names:
        for network, (begins, runs) in NETWORKS.items():
            require(
                not name.startswith(begins), f"{file}: {name} is of Wan's {network} network, which is not implemented here; {runs} runs it"
            )
