"""Files that look like the diffusion transformer and are something else: adapters, and networks with more inputs than Wan has here."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.base import MASK_CHANNELS
from configs.errors import RequestError, require
from omnitransfer_jax.weights.files import Tensor

# PEFT and diffusers (lora_A), kohya and musubi-tuner (lora_down, lora_unet_), older diffusers (lora.down)
ADAPTER = re.compile(r"(^|\.)lora_(A|B|down|up|unet_|te\d?_)|\.lora\.(down|up)\.")
FLF2V, FUN = "first and last frame (FLF2V)", "Fun-Control"
NETWORKS: dict[str, tuple[tuple[str, ...], str]] = {  # the names that its tensors begin with, and what runs it
    "VACE": (("vace_blocks.", "vace_patch_embedding."), "diffusers' WanVACEPipeline or ComfyUI"),
    FLF2V: (
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        "diffusers' WanImageToVideoPipeline with last_image, or ComfyUI",
    ),
    FUN: (("ref_conv.", "control_adapter."), "VideoX-Fun (aigc-apps) or ComfyUI"),
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
        for network, (begins, _) in NETWORKS.items():
            require(not name.startswith(begins), f"{file}: {name} is of {_relative(network)}")


def refuse_config(json: Mapping[str, Any], file: Path) -> None:
    """As `refuse_networks`, from the config.json of a diffusion transformer: its class, its type, or channels that Wan does not have."""
    kinds = f"{json.get('_class_name')} {json.get('model_type')}".lower().replace("wananimate2", "")  # which is read
    for network, word in (("VACE", "vace"), ("Animate", "animate"), (FLF2V, "flf2v")):
        require(word not in kinds, f"{file}: _class_name={json.get('_class_name')!r} is {_relative(network)}")
    require(json.get("pos_embed_seq_len") is None, f"{file}: pos_embed_seq_len={json.get('pos_embed_seq_len')!r} is of {_relative(FLF2V)}")
    key = "in_channels" if "in_channels" in json else "in_dim"
    inputs, outputs = json.get(key), json.get("out_channels", json.get("out_dim"))
    if isinstance(inputs, int) and isinstance(outputs, int) and 0 < outputs < inputs < 2**10:
        known = 2 * outputs + MASK_CHANNELS
        require(inputs == known, f"{file}: {key}={inputs}: here it is {outputs} (text) or {known} (image); more is of {_relative(FUN)}")


def _relative(network: str) -> str:
    return f"Wan's {network} network, which is not implemented here; {NETWORKS[network][1]} runs it"
