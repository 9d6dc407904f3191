"""The CLIP image tower's tensors in transformers' checkpoints ("diffusers") and in Wan2.1's own file ("original"), and its config.json."""

from typing import Any, Literal

from configs.base import CLIPVisionConfig
from configs.errors import require
from omnitransfer_jax.folders.typed import read_fields
from omnitransfer_jax.weights.table import CONV, LINEAR, SAME, Entry, Layout

IGNORED = (
    "vision_model.embeddings.position_ids", "visual_projection.weight",
    "visual.head", "textual.*", "log_scale",
)  # fmt: skip
"""fnmatch patterns of what a checkpoint may hold beside the table: first line transformers', then the rest of CLIP in the original's."""

OPTIONAL_PREFIXES = ("vision_model.",)
"""Prefixes a checkpoint may leave off: published files and transformers 4 have this one, files saved by transformers 5 do not."""

FIRST_ROW = Layout(lambda x: x[0], lambda x: x[None])  # (1, S, D) <-> (S, D)
FIRST_CELL = Layout(lambda x: x[0, 0], lambda x: x[None, None])  # (1, 1, D) <-> (D,)

DIFFUSERS_OUTSIDE = (  # ours, theirs, layout
    ("class_embedding", "embeddings.class_embedding", SAME),
    ("patch_embedding", "embeddings.patch_embedding.weight", CONV),
    ("position_embedding", "embeddings.position_embedding.weight", SAME),
    ("pre_norm.scale", "pre_layrnorm.weight", SAME),
    ("pre_norm.bias", "pre_layrnorm.bias", SAME),
    ("post_norm.scale", "post_layernorm.weight", SAME),
    ("post_norm.bias", "post_layernorm.bias", SAME),
)
ORIGINAL_OUTSIDE = (
    ("class_embedding", "cls_embedding", FIRST_CELL),
    ("patch_embedding", "patch_embedding.weight", CONV),
    ("position_embedding", "pos_embedding", FIRST_ROW),
    ("pre_norm.scale", "pre_norm.weight", SAME),
    ("pre_norm.bias", "pre_norm.bias", SAME),
    ("post_norm.scale", "post_norm.weight", SAME),
    ("post_norm.bias", "post_norm.bias", SAME),
)
LAYER = (  # ours, transformers', the original's, which part of the original's; each has a weight and a bias
    ("norm1", "layer_norm1", "norm1", (0, 1)),
    ("attention.query", "self_attn.q_proj", "attn.to_qkv", (0, 3)),
    ("attention.key", "self_attn.k_proj", "attn.to_qkv", (1, 3)),
    ("attention.value", "self_attn.v_proj", "attn.to_qkv", (2, 3)),
    ("attention.out", "self_attn.out_proj", "attn.proj", (0, 1)),
    ("norm2", "layer_norm2", "norm2", (0, 1)),
    ("mlp.up", "mlp.fc1", "mlp.0", (0, 1)),
    ("mlp.down", "mlp.fc2", "mlp.2", (0, 1)),
)

FIXED = {"model_type": "clip_vision_model", "hidden_act": "gelu", "num_channels": 3}  # the only variant that models/clip_vision.py computes
FIELDS = {  # transformers' name of each field
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "image_size": "image_size",
    "patch": "patch_size",
    "eps": "layer_norm_eps",
}


def entries(config: CLIPVisionConfig, layout: Literal["diffusers", "original"]) -> list[Entry]:
    """The table of a tower of this configuration, with the names of `layout`; the original fuses query, key and value."""
    if layout == "diffusers":
        prefix, layers, outside = "vision_model", "encoder.layers", DIFFUSERS_OUTSIDE
    else:
        prefix, layers, outside = "visual", "transformer", ORIGINAL_OUTSIDE
    table = [Entry(f"{prefix}.{theirs}", ours, change) for ours, theirs, change in outside]
    last = config.num_layers - 1
    for i in range(config.num_layers):
        home, layer = ("layers", i) if i < last else ("last_layer", None)
        for ours, diffusers, original, fused in LAYER:
            name, part = (diffusers, (0, 1)) if layout == "diffusers" else (original, fused)
            weight, change = ("scale", SAME) if ours.startswith("norm") else ("kernel", LINEAR)
            theirs = f"{prefix}.{layers}.{i}.{name}"
            table.append(Entry(f"{theirs}.weight", f"{home}.{ours}.{weight}", change, layer, part))
            table.append(Entry(f"{theirs}.bias", f"{home}.{ours}.bias", SAME, layer, part))
    return table


def config_json(config: CLIPVisionConfig) -> dict[str, Any]:
    """The config.json with which `CLIPVisionModel.from_pretrained` builds this tower."""
    return {
        "architectures": ["CLIPVisionModel"],
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
    }


def config_from_json(json: dict[str, Any]) -> CLIPVisionConfig:
    """The tower that a config.json describes; `dtype` stays at its default.

    Raises `RequestError` for another kind of model or an absent value.
    """
    for key, value in FIXED.items():
        found = json.get(key)
        require(found == value, f"config.json: {key}={found!r}: the image encoder needs {value!r}; take a ViT-H/14 CLIPVisionModel")
    return CLIPVisionConfig(**read_fields(CLIPVisionConfig, json, FIELDS))
