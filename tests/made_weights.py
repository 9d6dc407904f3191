"""Sources for launch.import_weights of the smallest size, with random weights, made without PyTorch."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from configs import wan
from omnitransfer_jax.weights import convert
from omnitransfer_jax.weights.parts import Part

SMOKE = wan.VARIANTS["smoke"]


def random_leaves(part: Part, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for all leaves of a part."""
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in part.shapes(getattr(SMOKE, part.name)).items()}


def write_part(folder: Path, part: Part, leaves: Mapping[str, np.ndarray], shards: int = 1, stem: str = "") -> Path:
    """Writes a part as diffusers does, in about so many shards, with its config.json; returns the folder it lies in."""
    config, (place, name) = getattr(SMOKE, part.name), part.diffusers
    size = sum(leaf.nbytes for leaf in leaves.values())
    shapes, table = part.shapes(config), part.entries(config, "diffusers")
    convert.save(leaves.items(), shapes, table, folder / place, stem or name, shard_bytes=size / shards)
    (folder / place / "config.json").write_text(json.dumps(part.table.config_json(config)))
    return folder / place
