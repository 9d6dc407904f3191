"""One velocity of an export from encoded inputs, with the transformer alone in memory; `launch.export --verify` compares it with ours."""

from pathlib import Path

import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from omnitransfer_torch import exported
from omnitransfer_torch.pipeline import OmniTransferPipeline


@torch.no_grad()
def velocity(
    folder: Path, task: str, timestep: float, target: np.ndarray, reference: np.ndarray, text: np.ndarray, image: np.ndarray | None
) -> np.ndarray:
    """The velocity "1 F H W C" of `target` "1 F H W C" (all channels) with one `reference` "1 F H W c" (latents), in float32."""
    transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    pipe = OmniTransferPipeline(transformer, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())  # pyright: ignore[reportArgumentType]
    pipe.prepare(exported.read(folder))
    x, latents = (torch.from_numpy(each).permute(0, 4, 1, 2, 3) for each in (target, reference))
    channels, index = pipe.transformer.config.out_channels, pipe.transfer.task_index(task)
    cache = pipe.cache_of(latents, index, pipe.offsets([index], x.shape)[0], "full")
    features = None if image is None else torch.from_numpy(image)
    time = torch.tensor(timestep)
    out = pipe.velocity(x[:, :channels], x[:, channels:], time, torch.from_numpy(text), features, [cache])
    return out.permute(0, 2, 3, 4, 1).numpy()
