"""Adapters as other code stores them: the names follow from the table of the model they adapt.

PEFT      base_model.model.{module}.lora_A.weight, lora_B.weight, and adapter_config.json
ComfyUI   diffusion_model.{module}.lora_A.weight, lora_B.weight, the scale folded into B
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs.base import LoRAConfig
from omnitransfer_jax.weights.table import LINEAR, Entry

PEFT_PREFIX, COMFY_PREFIX = "base_model.model.", "diffusion_model."


def entries(base: Sequence[Entry], params: Iterable[str], prefix: str) -> list[Entry]:
    """The table of the adapters among `params`, for a model whose own table is `base`."""
    adapted = {path.removesuffix(".lora.down") for path in params if path.endswith(".lora.down")}
    table = []
    for entry in base:
        ours, _, leaf = entry.ours.rpartition(".")
        if leaf == "kernel" and ours in adapted:
            module = prefix + entry.theirs.removesuffix(".weight")
            table += [
                Entry(f"{module}.lora_{letter}.weight", f"{ours}.lora.{half}", LINEAR, entry.layer)
                for letter, half in (("A", "down"), ("B", "up"))
            ]
    return table


def adapter_config(config: LoRAConfig, table: Sequence[Entry]) -> Mapping[str, Any]:
    """adapter_config.json of PEFT for these adapters."""
    modules = {entry.theirs.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for entry in table}
    return {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(modules), "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
