"""OmniTransfer in PyTorch: runs what `launch.export` writes, on diffusers, transformers and PEFT. Nothing here imports jax."""

from omnitransfer_torch.pipeline import OmniTransferPipeline

__all__ = ["OmniTransferPipeline"]
