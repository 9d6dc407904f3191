"""Qwen2.5-VL's tensors as published ("diffusers") and as transformers names them in memory ("original"), and its config.json."""

from typing import Any, Literal

from configs.base import QwenConfig, QwenVisionConfig
from configs.errors import require
from omnitransfer_jax.folders.typed import read_fields
from omnitransfer_jax.weights.table import LINEAR, SAME, Entry, Layout

OPTIONAL_PREFIXES = ("model.language_model.", "model.")
"""Prefixes a checkpoint may leave off; with both, a table of either layout reads a file of either."""

IGNORED = ("lm_head.weight",)
"""fnmatch patterns of what a checkpoint may hold beside the table: some tools save a tied embedding a second time."""

PREFIXES = {"diffusers": ("model", "visual"), "original": ("model.language_model", "model.visual")}  # language model, vision tower
LAYER = (  # ours, theirs, whether there is a bias
    ("attention.query", "self_attn.q_proj", True),
    ("attention.key", "self_attn.k_proj", True),
    ("attention.value", "self_attn.v_proj", True),
    ("attention.out", "self_attn.o_proj", False),
    ("mlp.gate", "mlp.gate_proj", False),
    ("mlp.up", "mlp.up_proj", False),
    ("mlp.down", "mlp.down_proj", False),
)
BLOCK = (  # ours, theirs, which part of it; each has a bias
    ("attention.query", "attn.qkv", (0, 3)),
    ("attention.key", "attn.qkv", (1, 3)),
    ("attention.value", "attn.qkv", (2, 3)),
    ("attention.out", "attn.proj", (0, 1)),
    ("mlp.gate", "mlp.gate_proj", (0, 1)),
    ("mlp.up", "mlp.up_proj", (0, 1)),
    ("mlp.down", "mlp.down_proj", (0, 1)),
)

FIELDS = {  # transformers' name of each field of the language model
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "eps": "rms_norm_eps",
}
TOKENS = {"image_token": "image_token_id", "video_token": "video_token_id", "vision_start": "vision_start_token_id"}
VISION_FIELDS = {
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "num_layers": "depth",
    "num_heads": "num_heads",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "window": "window_size",
    "tokens_per_second": "tokens_per_second",
}


def entries(config: QwenConfig, layout: Literal["diffusers", "original"]) -> list[Entry]:
    """The table of a model of this configuration, with the names of `layout`."""
    language, visual = PREFIXES[layout]
    table = [
        Entry(f"{language}.embed_tokens.weight", "token_embedding"),
        Entry(f"{language}.norm.weight", "norm.scale"),
        *([] if config.tied else [Entry("lm_head.weight", "output.kernel", LINEAR)]),
    ]
    for i in range(config.num_layers):
        theirs = f"{language}.layers.{i}"
        table.append(Entry(f"{theirs}.input_layernorm.weight", "layers.norm1.scale", layer=i))
        table.append(Entry(f"{theirs}.post_attention_layernorm.weight", "layers.norm2.scale", layer=i))
        for ours, name, bias in LAYER:
            table += _projection(f"{theirs}.{name}", f"layers.{ours}", layer=i)[: 1 + bias]
    return table + _vision_entries(config.vision, visual)


def _vision_entries(config: QwenVisionConfig, visual: str) -> list[Entry]:
    window = (3, config.temporal_patch, config.patch, config.patch)
    flat = Layout(
        lambda x: x.reshape(len(x), -1).T, lambda x: x.T.reshape(-1, *window)
    )  # a convolution with the stride of its window is a matrix product
    table = [
        Entry(f"{visual}.patch_embed.proj.weight", "vision.patch_embedding.kernel", flat),
        Entry(f"{visual}.merger.ln_q.weight", "vision.merger.norm.scale"),
        *_projection(f"{visual}.merger.mlp.0", "vision.merger.up"),
        *_projection(f"{visual}.merger.mlp.2", "vision.merger.down"),
    ]
    for i in range(config.num_layers):
        theirs = f"{visual}.blocks.{i}"
        table += [Entry(f"{theirs}.{norm}.weight", f"vision.blocks.{norm}.scale", layer=i) for norm in ("norm1", "norm2")]
        for ours, name, part in BLOCK:
            table += _projection(f"{theirs}.{name}", f"vision.blocks.{ours}", layer=i, part=part)
    return table


def _projection(theirs: str, ours: str, *, layer: int | None = None, part: tuple[int, int] = (0, 1)) -> list[Entry]:
    """Weight and bias of one linear layer."""
    return [
        Entry(f"{theirs}.weight", f"{ours}.kernel", LINEAR, layer, part),
        Entry(f"{theirs}.bias", f"{ours}.bias", SAME, layer, part),
    ]


def config_json(config: QwenConfig) -> dict[str, Any]:
    """The config.json with which `Qwen2_5_VLForConditionalGeneration.from_pretrained` builds this model, laid out as published.

    Every value is written, because transformers' defaults describe a model of another size.
    """
    eps = QwenVisionConfig.eps
    require(config.vision.eps == eps, f"mllm.vision.eps={config.vision.eps}: transformers has {eps} and no field for it")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        **{theirs: getattr(config, ours) for ours, theirs in (FIELDS | TOKENS).items()},
        "vision_end_token_id": 151653,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(config.rope_sections)},
        "max_position_embeddings": 128000,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "in_channels": 3,
            "out_hidden_size": config.dim,
            **{theirs: getattr(config.vision, ours) for ours, theirs in VISION_FIELDS.items()},
            "fullatt_block_indexes": list(config.vision.full_attention),
        },
    }


def config_from_json(json: dict[str, Any]) -> QwenConfig:
    """The model that a config.json describes; `dtype` stays at its default.

    The published files hold the language model's fields at the top level; newer transformers write them under `text_config`, and
    leave older copies at the top level, which may be stale. Raises `RequestError` for another kind of model or an absent value.
    """
    kind = json.get("model_type")
    require(kind == "qwen2_5_vl", f"config.json: model_type={kind!r}: the language model is 'qwen2_5_vl'; take a Qwen2.5-VL checkpoint")
    text, vision = json | _inner(json, "text_config"), _inner(json, "vision_config")
    rope = _inner(text, "rope_parameters") or _inner(text, "rope_scaling")
    text = {"rope_theta": rope.get("rope_theta"), **text, "mrope_section": rope.get("mrope_section")}
    text["tie_word_embeddings"] = json.get("tie_word_embeddings") or text.get(
        "tie_word_embeddings"
    )  # in either place, as transformers reads it
    found = {
        "hidden_act": (text.get("hidden_act"), ("silu",)),
        "use_sliding_window": (text.get("use_sliding_window"), (False, None)),
        "rope_scaling type": (rope.get("rope_type", rope.get("type")), ("default", "mrope", None)),
        "vision_config.hidden_act": (vision.get("hidden_act"), ("silu",)),
        "vision_config.in_channels": (vision.get("in_channels", vision.get("in_chans")), (3, None)),
        "vision_config.out_hidden_size": (vision.get("out_hidden_size"), (text.get("hidden_size"),)),
    }
    for key, (value, supported) in found.items():
        require(value in supported, f"config.json: {key}={value!r}: supported is {supported[0]!r}; take a Qwen2.5-VL checkpoint")
    text_fields = FIELDS | {"rope_theta": "rope_theta", "rope_sections": "mrope_section", "tied": "tie_word_embeddings"}
    vision_fields = VISION_FIELDS | {"full_attention": "fullatt_block_indexes"}
    places = ((text, text_fields), (json, TOKENS), (vision, vision_fields))
    missing = [key for place, names in places for key in names.values() if place.get(key) is None]
    require(not missing, f"config.json: no {', '.join(missing)}: all are needed; take the file of a Qwen2.5-VL checkpoint")
    return QwenConfig(
        **read_fields(QwenConfig, text, text_fields),
        **read_fields(QwenConfig, json, TOKENS),
        vision=QwenVisionConfig(**read_fields(QwenVisionConfig, vision, vision_fields, "config.json vision_config.")),
    )


def _inner(json: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`, empty if there is none."""
    found = json.get(key) or {}
    require(isinstance(found, dict), f"config.json: {key}={str(found)[:60]}: an object")
    return found
