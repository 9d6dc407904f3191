"""The tensors of adapters by PEFT's names, `base_model.model.{module}.lora_A.weight` and `lora_B.weight`, and adapter_config.json.

A module's name is the one its weight has in the table of the model that the adapter belongs to. `read_adapters` takes what PEFT, diffusers,
ComfyUI and trainers for it write.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.base import LoRAConfig
from configs.errors import RequestError, require
from omnitransfer_jax.weights import files
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


def leaf_of(entry: Entry, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """What an entry stands for: a leaf, or one layer of it."""
    return leaves[entry.ours] if entry.layer is None else leaves[entry.ours][entry.layer]


def adapter_config(config: LoRAConfig, table: Sequence[Entry]) -> Mapping[str, Any]:
    """The contents of PEFT's adapter_config.json for the adapters in `table`."""
    modules = {entry.theirs.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for entry in table}
    return {
        "peft_type": "LORA", "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(modules), "task_type": None, "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip


NAMES = re.compile(  # of a tensor in a file of adapters: where it is from, the module, which half it is
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.)?(?P<module>.+?)"
    r"\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|(?P<alpha>alpha))"
)
HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


def read_adapters(
    source: str, params: Mapping[str, Any], config: LoRAConfig, tables: Sequence[Sequence[Entry]], name: str = "lora"
) -> dict[str, np.ndarray]:
    """The adapters `name` among `params` from PEFT's folder or from one file, whose modules have the names of any of `tables`.

    The file's own alpha / rank goes into `up`, so that the output under `config` is that of the file. A module too many or too few, and
    another rank, are a `RequestError`.
    """
    path, alpha = _file_of(source)
    found: dict[str, dict[str, np.ndarray]] = {}
    tensors = files.inspect([path])
    for key, array in zip(tensors, files.read(tensors.values()), strict=True):
        match = NAMES.fullmatch(key)
        if match is None:
            raise RequestError(
                f"{path}: {key} is no part of a low-rank adapter; give a file of lora_A and lora_B or of lora_down and lora_up"
            )
        found.setdefault(match["module"], {})[HALVES.get(match["half"], "alpha")] = array.astype(np.float32)
    modules = {entry.theirs.removesuffix(".weight"): entry for table in tables for entry in table if entry.ours.endswith(".kernel")}
    modules |= {f"lora_unet_{module.replace('.', '_')}": entry for module, entry in modules.items()}  # as musubi-tuner writes them
    unknown = sorted(set(found) - set(modules))
    require(not unknown, f"{path}: {len(unknown)} modules are not of this transformer, {', '.join(unknown[:3])} among them")
    filled = {path: np.zeros(leaf.shape, np.float32) for path, leaf in params.items()}
    wanted = {
        (path.removesuffix(f".{name}.down"), layer) for path, leaf in params.items() if path.endswith(".down") for layer in _layers(leaf)
    }
    given = {(modules[module].ours.removesuffix(".kernel"), modules[module].layer): halves for module, halves in found.items()}
    missing, more = sorted(wanted - set(given)), sorted(set(given) - wanted)
    require(
        not missing and not more,
        f"{path}: it adapts other projections than adapter.targets: {len(more)} more ({', '.join(at for at, _ in more[:2])}), "
        f"{len(missing)} fewer ({', '.join(at for at, _ in missing[:2])}); give --adapter.targets that fit",
    )
    for (at, layer), halves in given.items():
        require({"down", "up"} <= set(halves), f"{path}: {at} has half an adapter; give a whole file")
        rank = halves["down"].shape[0]
        require(rank == config.rank, f"{path}: its rank is {rank}; give --adapter.rank={rank}")
        scale = float(halves.get("alpha", rank if alpha is None else alpha)) / rank / config.scale
        for half, values in (("down", halves["down"].T), ("up", halves["up"].T * scale)):
            leaf = filled[f"{at}.{name}.{half}"]
            place = leaf if layer is None else leaf[layer]
            require(place.shape == values.shape, f"{path}: {half} of {at} is {values.shape}, not {place.shape}: of another transformer")
            place[...] = values
    return filled


def _layers(leaf: Any) -> Sequence[int | None]:
    """The indices of a stack of layers, or None for a projection that is not stacked."""
    return range(leaf.shape[0]) if len(leaf.shape) == 3 else [None]


def _file_of(source: str) -> tuple[Path, float | None]:
    """The file of adapters that `source` names, and the alpha of PEFT's configuration beside it."""
    path = Path(source)
    require(path.exists(), f"adapter_from={source}: no such file or folder; give a .safetensors file, or a folder of PEFT's")
    if path.is_file():
        return path, None
    file, settings = path / "adapter_model.safetensors", path / "adapter_config.json"
    require(file.is_file() and settings.is_file(), f"adapter_from={source}: no {file.name} and {settings.name} in it; give PEFT's folder")
    try:
        return file, float(json.loads(settings.read_text())["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{settings}: no lora_alpha in it ({type(error).__name__}); give the folder as PEFT wrote it") from None
