"""The nodes: load adapters, encode a reference with its task, patch the model, and begin without a first frame.

UNETLoader -> OmniTransferLoadLoRA -> OmniTransferApply -> KSampler        (an export of all weights needs no OmniTransferLoadLoRA)
LoadVideo -> OmniTransferReference (task) ----^   one behind the other for combined transfer
"""

from typing import Any

import comfy.patcher_extension
import comfy.utils
import folder_paths
import node_helpers
import torch

from .references import FLAGS, KEY, Reader, Reference

CATEGORY = "OmniTransfer"


class OmniTransferLoadLoRA:
    """Loads adapters that `launch.export --config=stage1:lora --layout=comfyui` wrote; other LoRAs are refused."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        files = folder_paths.get_filename_list("loras")
        return {"required": {"model": ("MODEL",), "lora_name": (files,), "strength": ("FLOAT", {"default": 1.0, "step": 0.05})}}

    def load(self, model: Any, lora_name: str, strength: float) -> tuple[Any]:
        import comfy.sd  # with all models that ComfyUI has; where nodes run it is there

        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        tensors, about = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        if (about or {}).get("method") != "OmniTransfer":
            raise ValueError(f"{lora_name}: no adapters of OmniTransfer, its metadata does not say so; take ComfyUI's own LoRA loader")
        return (comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0],)


class OmniTransferReference:
    """Encodes a reference clip; `references` takes those before it."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("OMNITRANSFER_REFERENCES",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        required = {"vae": ("VAE",), "clip": ("IMAGE",), "task": (list(FLAGS),)}
        return {"required": required, "optional": {"references": ("OMNITRANSFER_REFERENCES",)}}

    def encode(self, vae: Any, clip: torch.Tensor, task: str, references: tuple[Reference, ...] = ()) -> tuple[tuple[Reference, ...]]:
        frames, height, width, _ = clip.shape
        if (frames - 1) % 4 or height % 16 or width % 16:
            raise ValueError(f"a reference of {frames} frames, {height} x {width}: 4n+1 frames and sides in multiples of 16 are needed")
        return ((*references, Reference(task, vae.encode(clip[..., :3]))),)


class OmniTransferApply:
    """Patches a Wan image-to-video model so that it reads the references."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "apply", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        required = {"model": ("MODEL",), "references": ("OMNITRANSFER_REFERENCES",), "stack_references": ("BOOLEAN", {"default": False})}
        return {"required": required}

    def apply(self, model: Any, references: tuple[Reference, ...], stack_references: bool) -> tuple[Any]:
        patched = model.clone()
        placed = [Reference(each.task, patched.model.process_latent_in(each.latents)) for each in references]
        reader = Reader(placed, stack_references)
        patched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, KEY, reader)
        patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, KEY, reader.forget)
        return (patched,)


class OmniTransferNoFirstFrame:
    """For appearance tasks: grey frames in the place of a first frame, as in training. ComfyUI's own node gives zeros there."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "begin", ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        side = {"min": 16, "max": 8192, "step": 16}
        sizes = {"width": ("INT", {"default": 832, **side}), "height": ("INT", {"default": 480, **side})}
        sizes["length"] = ("INT", {"default": 81, "min": 1, "max": 8192, "step": 4})
        return {"required": {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "vae": ("VAE",), **sizes}}

    def begin(
        self, positive: Any, negative: Any, vae: Any, width: int, height: int, length: int
    ) -> tuple[Any, Any, dict[str, torch.Tensor]]:
        grey = vae.encode(torch.full((length, height, width, 3), 0.5))
        mask = torch.ones(1, 1, *grey.shape[2:])  # ComfyUI's mask is 1 where something is to be made
        given = {"concat_latent_image": grey, "concat_mask": mask}
        conditioned = (node_helpers.conditioning_set_values(each, given) for each in (positive, negative))
        return (*conditioned, {"samples": torch.zeros_like(grey)})


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind for kind in (OmniTransferLoadLoRA, OmniTransferReference, OmniTransferApply, OmniTransferNoFirstFrame)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "OmniTransferLoadLoRA": "OmniTransfer: load LoRA",
    "OmniTransferReference": "OmniTransfer: reference",
    "OmniTransferApply": "OmniTransfer: apply references",
    "OmniTransferNoFirstFrame": "OmniTransfer: no first frame",
}
