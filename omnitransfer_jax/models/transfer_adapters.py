"""The model whose transformer has adapters: its own weights frozen, in their type or in int8, and low-rank adapters that train."""

from typing import Any

from flax import nnx

from configs.errors import require
from configs.stage1 import TransferLoRA
from omnitransfer_jax.models import int8, lora
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.omnitransfer import OmniTransfer

BLOCKS = r"blocks\..*"  # whose kernels may be int8


def make_model(config: TransferLoRA, rngs: nnx.Rngs) -> OmniTransfer:
    """The model with fresh adapters on the transformer, and with int8 kernels if that is configured."""
    model = OmniTransfer(config, rngs=rngs)
    if config.base == "int8":
        int8.hold_int8(model.dit, BLOCKS)
    lora.add_lora(model.dit, config.adapter, rngs=rngs)
    require_whole_image_branch(model)
    return model


def require_whole_image_branch(model: OmniTransfer) -> None:
    """A `RequestError` if the keys of the image have adapters and the values none, or the reverse; diffusers takes no such file."""
    adapted = {path.split(".lora.")[0] for path in adapters(model)}
    pair = [any(path.endswith(f"cross_attention.{name}") for path in adapted) for name in ("image_key", "image_value")]
    require(
        pair[0] == pair[1],
        "adapter.targets: cross_attention.image_key and image_value: name both or none, for other tools take one without the other for "
        "a text-to-video adapter",
    )


def adapters(model: OmniTransfer) -> dict[str, Any]:
    """The parameters of a model's adapters by path."""
    return {path: x for path, x in flat_params(model).items() if lora.PATH.fullmatch(path)}
