"""Whether an export computes in PyTorch what it was made of: one velocity of a small random request, in float32, on both sides."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.errors import RequestError, require
from configs.run import Config
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.models.omnitransfer import embeds_text, make_reference

TOLERANCE = 1e-4
TOKENS = (2, 2, 3)  # patches of the target; the reference has one column less
TASK, TIMESTEP = "motion", 500.0


class Request(NamedTuple):
    """Random numbers in place of encoded pictures and texts, in our layout."""

    target: np.ndarray
    """"1 F H W C", all channels."""
    reference: np.ndarray
    """"1 F H W c", the latents alone."""
    text: np.ndarray
    image: np.ndarray | None


def verify(config: Config, checkpoint: str, out: Path) -> float:
    """The relative difference of the two velocities; a `RequestError` if it is above `TOLERANCE`.

    Each side loads the transformer alone, one after the other, so the memory is that of one transformer in float32.
    """
    require_pytorch()
    request = draw(config)
    ours = velocity_here(config, checkpoint, request)
    theirs = velocity_in_pytorch(out, request)
    difference = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    require(
        difference <= TOLERANCE,
        f"{out}: its velocity in PyTorch differs by {difference:.1e} from that of {checkpoint}, at most {TOLERANCE:.0e} is rounding; "
        "do not use this folder, and report it",
    )
    return difference


def require_pytorch() -> None:
    """A `RequestError` unless PyTorch is installed."""
    try:
        import omnitransfer_torch  # noqa: F401 - heavy, and needed here alone
    except ImportError as error:
        raise RequestError(f"--verify: {error}; it compares with PyTorch: pip install '.[torch]', or leave it out") from None


def draw(config: Config) -> Request:
    """A request of the smallest size."""
    rng, dit = np.random.default_rng(0), config.dit

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    frames, rows, columns = (n * p for n, p in zip(TOKENS, dit.patch, strict=True))
    width = dit.text_dim if embeds_text(config) else dit.dim
    return Request(
        target=normal(1, frames, rows, columns, dit.in_channels),
        reference=normal(1, frames, rows, columns - dit.patch[2], config.vae.z_dim),
        text=normal(1, 7, width),
        image=None if dit.image_dim is None else normal(1, 5, dit.image_dim),
    )


def velocity_here(config: Config, checkpoint: str, request: Request) -> np.ndarray:
    """Ours, "1 F H W C"."""
    config = replace(config, dit=replace(config.dit, dtype="float32"))
    dit = load_models.load_dit(checkpoint, config, make_mesh(config.mesh))
    task = jnp.asarray([tasks.task_index(TASK)])
    target, reference, text = (jnp.asarray(x) for x in request[:3])
    image = None if request.image is None else jnp.asarray(request.image)
    placed = make_reference(reference, task, TOKENS, by=config.dit.offsets, flag=config.dit.reference_flag)

    @jax.jit
    def velocity(dit):
        with jax.default_matmul_precision("highest"):
            return dit(target, jnp.full((1,), TIMESTEP), text, image, references=(placed,), embed_text=embeds_text(config))

    return np.asarray(velocity(dit))


def velocity_in_pytorch(out: Path, request: Request) -> np.ndarray:
    """That of the folder, "1 F H W C"."""
    from omnitransfer_torch.one_velocity import velocity  # it imports PyTorch

    return velocity(out, TASK, TIMESTEP, *request)
