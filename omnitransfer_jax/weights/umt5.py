"""UMT5's tensors in transformers' checkpoints ("diffusers") and in Wan2.1's own file ("original"), and its config.json."""

from typing import Any, Literal

from configs.base import UMT5Config
from configs.errors import require
from omnitransfer_jax.folders.typed import read_fields
from omnitransfer_jax.weights.table import LINEAR, SAME, Entry

IGNORED = ("encoder.embed_tokens.weight", "decoder.*", "lm_head.weight")
"""fnmatch patterns of what a checkpoint may hold beside the table: a second copy of `shared.weight`, and the decoder of google/umt5."""

COPIES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Names that a checkpoint may have in the place of the table's: one tensor has both, and some tools save it under the other alone."""

OUTSIDE = (  # ours, transformers', Wan's
    ("token_embedding", "shared", "token_embedding"),
    ("norm.scale", "encoder.final_layer_norm", "norm"),
)
BLOCK = (
    ("norm1.scale", "layer.0.layer_norm", "norm1", SAME),
    ("attention.query.kernel", "layer.0.SelfAttention.q", "attn.q", LINEAR),
    ("attention.key.kernel", "layer.0.SelfAttention.k", "attn.k", LINEAR),
    ("attention.value.kernel", "layer.0.SelfAttention.v", "attn.v", LINEAR),
    ("attention.out.kernel", "layer.0.SelfAttention.o", "attn.o", LINEAR),
    ("attention.relative_bias", "layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding", SAME),
    ("norm2.scale", "layer.1.layer_norm", "norm2", SAME),
    ("ffn.gate.kernel", "layer.1.DenseReluDense.wi_0", "ffn.gate.0", LINEAR),
    ("ffn.up.kernel", "layer.1.DenseReluDense.wi_1", "ffn.fc1", LINEAR),
    ("ffn.down.kernel", "layer.1.DenseReluDense.wo", "ffn.fc2", LINEAR),
)

FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}  # the only variant that models/umt5.py computes
FIELDS = {  # transformers' name of each field
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "head_dim": "d_kv",
    "ffn_dim": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}


def entries(config: UMT5Config, layout: Literal["diffusers", "original"]) -> list[Entry]:
    """The table of an encoder of this configuration, with the names of `layout`."""
    column, blocks = (1, "encoder.block") if layout == "diffusers" else (2, "blocks")
    table = [Entry(f"{row[column]}.weight", row[0]) for row in OUTSIDE]
    return table + [
        Entry(f"{blocks}.{i}.{row[column]}.weight", f"blocks.{row[0]}", row[3], layer=i) for i in range(config.num_layers) for row in BLOCK
    ]


def config_json(config: UMT5Config) -> dict[str, Any]:
    """The config.json with which `UMT5EncoderModel.from_pretrained` builds this encoder."""
    return {
        "architectures": ["UMT5EncoderModel"],
        **FIXED,
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "is_encoder_decoder": False,
        "tie_word_embeddings": True,  # the file holds the embedding once, as `shared.weight`
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def config_from_json(json: dict[str, Any]) -> UMT5Config:
    """The encoder that a config.json describes; `dtype` stays at its default.

    Raises `RequestError` for another kind of model or an absent value.
    """
    for key, value in FIXED.items():
        found = json.get(key)
        require(found == value, f"config.json: {key}={found!r}: the text encoder needs {value!r}; take a UMT5 checkpoint")
    return UMT5Config(**read_fields(UMT5Config, json, FIELDS))
