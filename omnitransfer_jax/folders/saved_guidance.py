"""What DiTFlow optimised, as a file: the latents or positions of each guided step, for another prompt.

One safetensors file with one tensor, `latents` or `positions`, guided steps first. Its metadata holds, as JSON, the fields with which they
were made and with which alone they make sense: the network, the video's size, the sampler's times and the guided steps.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from configs.ditflow import DiTFlow
from configs.errors import RequestError, require
from configs.kinds import flat, select
from configs.run import VideoConfig
from omnitransfer_jax.folders import atomic
from omnitransfer_jax.methods.ditflow import guided_steps

METADATA = "ditflow"


def write(path: str | Path, config: DiTFlow, video: VideoConfig, values: Float[np.ndarray, "S *lead"]) -> None:
    """Writes `Guided.saved` of one clip; `video` is its size."""
    metadata = {METADATA: json.dumps(_agreement(config, video))}
    atomic.write_whole(path, save({config.ditflow.variable: np.ascontiguousarray(values, np.float32)}, metadata))


def read(path: str | Path, config: DiTFlow, video: VideoConfig) -> Float[np.ndarray, "S *lead"]:
    """What `write` wrote; a `RequestError` if it was made with another network, size or schedule, or is no such file."""
    require(Path(path).is_file(), f"--ditflow.inject={path}: no such file; make it with --ditflow.save")
    try:
        with safe_open(path, "np") as file:
            made = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            arrays = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, ValueError) as error:
        raise RequestError(f"{path}: no whole file of --ditflow.save ({error}); make it again") from None
    require(bool(made), f"{path}: not made by --ditflow.save; give a file that was")
    wanted = json.loads(json.dumps(_agreement(config, video)))
    for name, value in wanted.items():
        given = f"--{name}={value!r}" if "." in name else f"{name} {value}"
        require(made.get(name) == value, f"{given}: {path} was made with {made.get(name)!r}; give that, or make it again")
    values = arrays.get(config.ditflow.variable)
    if values is None or len(values) != len(wanted["guided steps"]) or not np.isfinite(values).all():
        raise RequestError(f"{path}: its {config.ditflow.variable} are incomplete or not finite; make it again")
    return values


def _agreement(config: DiTFlow, video: VideoConfig) -> dict[str, Any]:
    """What must be the same when values are written and when they are read."""
    sampler, guided = config.sampler, guided_steps(config.sampler, config.ditflow)
    return {
        "ditflow.variable": config.ditflow.variable,
        **flat(select(config.dit, ("model",)), "dit"),
        **{f"video.{name}": getattr(video, name) for name in ("frames", "height", "width")},
        **{f"sampler.{name}": getattr(sampler, name) for name in ("solver", "steps", "shift")},
        "guided steps": guided.tolist(),
    }
