"""The tensors of adapters by PEFT's names, `base_model.model.{module}.lora_A.weight` and `lora_B.weight`, and adapter_config.json.

A module's name is the one its weight has in the table of the model that the adapter belongs to.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from configs.base import LoRAConfig
from configs.errors import require
from omnitransfer_jax.weights.table import LINEAR, Entry

PEFT_PREFIX = "base_model.model."


def entries(base: Sequence[Entry], params: Collection[str], prefix: str, name: str = "lora") -> list[Entry]:
    """The table of the adapters `name` among `params`, for a model whose own table is `base`.

    PEFT has no head masks: `lora.fold_head_masks` first, or a `RequestError` says so.
    """
    suffix = f".{name}.down"
    adapted = {path.removesuffix(suffix) for path in params if path.endswith(suffix)}
    masked = sorted(path for path in params if path.endswith(f".{name}.head_mask"))
    require(not masked, f"{', '.join(masked[:3])}: PEFT has no head masks; call fold_head_masks on the parameters first")
    table = []
    for entry in base:
        ours, _, leaf = entry.ours.rpartition(".")
        if leaf == "kernel" and ours in adapted:
            module = prefix + entry.theirs.removesuffix(".weight")
            table += [
                Entry(f"{module}.lora_{letter}.weight", f"{ours}.{name}.{half}", LINEAR, entry.layer)
                for letter, half in (("A", "down"), ("B", "up"))
            ]
    return table


def adapter_config(config: LoRAConfig, table: Sequence[Entry]) -> Mapping[str, Any]:
    """The contents of PEFT's adapter_config.json for the adapters in `table`."""
    modules = {entry.theirs.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for entry in table}
    return {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(modules), "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
