"""ComfyUI nodes for OmniTransfer: put this folder into ComfyUI/custom_nodes. docs/pytorch.md of the project says how to use them."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
