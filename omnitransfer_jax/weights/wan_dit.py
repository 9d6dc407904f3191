"""The diffusion transformer's tensors: ours, diffusers' (WanTransformer3DModel) and the original's (Wan2.1 WanModel).

Wan-Animate-2 is the same network under other names: in both of its layouts the original's, with one difference each. It is known by
`dit.reference_context`, for no other published weights have references that read a context.
"""

from typing import Any, Literal

from configs.base import DiTConfig
from configs.errors import require
from configs.wan_animate_2 import ANIMATE_2
from omnitransfer_jax.folders.typed import read_fields
from omnitransfer_jax.weights.table import CONV, LINEAR, SAME, Entry, Layout

OPTIONAL_PREFIXES = ("model.diffusion_model.",)  # ComfyUI's files have the original's names behind this prefix
IGNORED = ("*.norm_added_q.weight",)  # some published files hold it; no model reads it

Row = tuple[str, str, str, Layout]

UNIT = Layout(lambda x: x[0], lambda x: x[None])  # (1, ...) <-> (...)

# Ours, diffusers', the original's. A row of a linear layer covers its kernel and its bias.
LINEARS = [
    ("text_embedder.up", "condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("text_embedder.down", "condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("time_embedder.up", "condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("time_embedder.down", "condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("time_projection", "condition_embedder.time_proj", "time_projection.1"),
    ("head", "proj_out", "head.head"),
]
IMAGE_LINEARS = [
    ("image_embedder.up", "condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("image_embedder.down", "condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
]
IMAGE_NORMS = [
    ("image_embedder.norm_in", "condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("image_embedder.norm_out", "condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
]
TENSORS: list[Row] = [
    ("patch_embedding", "patch_embedding.weight", "patch_embedding.weight", CONV),
    ("patch_bias", "patch_embedding.bias", "patch_embedding.bias", SAME),
    ("head_modulation", "scale_shift_table", "head.modulation", UNIT),
]
# Inside blocks.N. The affine norm before the cross-attention is called norm2 in diffusers and norm3 in the original.
BLOCK_LINEARS = [
    *[
        (f"{ours}.{name}", f"{diffusers}.{to}", f"{original}.{letter}")
        for ours, diffusers, original in (("self_attention", "attn1", "self_attn"), ("cross_attention", "attn2", "cross_attn"))
        for name, to, letter in (("query", "to_q", "q"), ("key", "to_k", "k"), ("value", "to_v", "v"), ("out", "to_out.0", "o"))
    ],
    ("ffn.up", "ffn.net.0.proj", "ffn.0"),
    ("ffn.down", "ffn.net.2", "ffn.2"),
]
BLOCK_IMAGE_LINEARS = [
    ("cross_attention.image_key", "attn2.add_k_proj", "cross_attn.k_img"),
    ("cross_attention.image_value", "attn2.add_v_proj", "cross_attn.v_img"),
]
BLOCK_TENSORS: list[Row] = [
    ("modulation", "scale_shift_table", "modulation", UNIT),
    ("self_attention.query_norm.scale", "attn1.norm_q.weight", "self_attn.norm_q.weight", SAME),
    ("self_attention.key_norm.scale", "attn1.norm_k.weight", "self_attn.norm_k.weight", SAME),
    ("cross_attention.query_norm.scale", "attn2.norm_q.weight", "cross_attn.norm_q.weight", SAME),
    ("cross_attention.key_norm.scale", "attn2.norm_k.weight", "cross_attn.norm_k.weight", SAME),
    ("cross_norm.scale", "norm2.weight", "norm3.weight", SAME),
    ("cross_norm.bias", "norm2.bias", "norm3.bias", SAME),
]
BLOCK_IMAGE_TENSORS: list[Row] = [
    ("cross_attention.image_key_norm.scale", "attn2.norm_added_k.weight", "cross_attn.norm_k_img.weight", SAME),
]


ANIMATE_2_CLASS = "WanAnimate2Transformer3DModel"
ANIMATE_2_NAMES = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
}  # fmt: skip


def entries(config: DiTConfig, layout: Literal["diffusers", "original"]) -> list[Entry]:
    """The table of a network of this configuration: 1,303 entries for I2V 14B."""
    has_image = config.image_dim is not None
    inside = ".block" if config.reference_context and layout == "original" else ""  # its blocks are wrapped there

    def theirs(row: Row) -> str:
        if config.reference_context and layout == "diffusers":
            return _animate_2(row[2])
        return row[1] if layout == "diffusers" else row[2]

    whole = TENSORS + _linears(LINEARS)
    block = BLOCK_TENSORS + _linears(BLOCK_LINEARS)
    if has_image:
        whole += _linears(IMAGE_LINEARS) + _norms(IMAGE_NORMS)
        block += BLOCK_IMAGE_TENSORS + _linears(BLOCK_IMAGE_LINEARS)
    table = [Entry(theirs(row), row[0], row[3]) for row in whole]
    for layer in range(config.num_layers):
        table += [Entry(f"blocks.{layer}{inside}.{theirs(row)}", f"blocks.{row[0]}", row[3], layer=layer) for row in block]
    return table


def _animate_2(original: str) -> str:
    """The name that diffusers' WanAnimate2Transformer3DModel has for a tensor: the original's but for the projections of attention."""
    module, *rest = original.split(".", 2)
    if module not in ("self_attn", "cross_attn"):
        return original
    return ".".join([module, ANIMATE_2_NAMES.get(rest[0], rest[0]), *rest[1:]])


def _linears(rows: list[tuple[str, str, str]]) -> list[Row]:
    kernels = [(f"{ours}.kernel", f"{a}.weight", f"{b}.weight", LINEAR) for ours, a, b in rows]
    return kernels + [(f"{ours}.bias", f"{a}.bias", f"{b}.bias", SAME) for ours, a, b in rows]


def _norms(rows: list[tuple[str, str, str]]) -> list[Row]:
    scales = [(f"{ours}.scale", f"{a}.weight", f"{b}.weight", SAME) for ours, a, b in rows]
    return scales + [(f"{ours}.bias", f"{a}.bias", f"{b}.bias", SAME) for ours, a, b in rows]


def config_json(config: DiTConfig, layout: Literal["diffusers", "original"] = "diffusers") -> dict[str, Any]:
    """The config.json diffusers (or the original code) reads beside the weights."""
    if config.reference_context:
        return {
            "_class_name": ANIMATE_2_CLASS, "patch_size": list(config.patch), "text_len": config.text_len, "in_dim": config.in_channels,
            "dim": config.dim, "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "text_dim": config.text_dim,
            "out_dim": config.out_channels, "num_heads": config.num_heads, "num_layers": config.num_layers, "cross_attn_norm": True,
            "eps": config.eps, "use_img_emb": config.image_dim is not None, "refer_offset_t": 1, "refer_offset_h": 0,
            "refer_offset_w": -1, "refer_stride": 1,
        }  # fmt: skip
    if layout == "original":
        return {
            "_class_name": "WanModel", "model_type": "i2v" if config.image_to_video else "t2v",
            "dim": config.dim, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers, "num_heads": config.num_heads,
            "in_dim": config.in_channels, "out_dim": config.out_channels, "freq_dim": config.freq_dim,
            "text_len": config.text_len, "text_dim": config.text_dim, "patch_size": list(config.patch), "eps": config.eps,
        }  # fmt: skip
    return {
        "_class_name": "WanTransformer3DModel", "patch_size": list(config.patch),
        "num_attention_heads": config.num_heads, "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels, "text_dim": config.text_dim,
        "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim, "num_layers": config.num_layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": config.eps, "image_dim": config.image_dim,
        "added_kv_proj_dim": None if config.image_dim is None else config.dim, "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
    }  # fmt: skip


DIFFUSERS_FIELDS = {
    "num_layers": "num_layers", "num_heads": "num_attention_heads", "ffn_dim": "ffn_dim", "in_channels": "in_channels",
    "out_channels": "out_channels", "freq_dim": "freq_dim", "text_dim": "text_dim", "patch": "patch_size", "eps": "eps",
}  # fmt: skip
ORIGINAL_FIELDS = {
    "dim": "dim", "num_layers": "num_layers", "num_heads": "num_heads", "ffn_dim": "ffn_dim", "in_channels": "in_dim",
    "out_channels": "out_dim", "freq_dim": "freq_dim", "text_len": "text_len", "text_dim": "text_dim", "patch": "patch_size", "eps": "eps",
}  # fmt: skip
ORIGINAL_DEFAULTS = {"text_len": 512, "text_dim": 4096, "patch_size": [1, 2, 2]}


def config_from_json(json: dict[str, Any]) -> DiTConfig:
    """The configuration a config.json of either layout describes; an unsupported or absent value is a `RequestError`.

    The original's does not say whether an i2v network has an image branch: Wan2.1's have one, Wan2.2's have none.
    """
    name = json.get("_class_name")
    if name == "WanModel":
        kind = json.get("model_type")
        require(kind in ("i2v", "t2v"), f"config.json model_type={kind!r}: this network is i2v or t2v")
        require(kind == "t2v" or json.get("image_dim", 1280) == 1280, "config.json image_dim: the original reads 1280")
        values = read_fields(DiTConfig, ORIGINAL_DEFAULTS | json, ORIGINAL_FIELDS)
        return DiTConfig(**values, image_dim=None if kind == "t2v" else 1280)
    if name == ANIMATE_2_CLASS:
        return _animate_2_config(json)
    require(
        name == "WanTransformer3DModel",
        f"config.json _class_name={name!r}: WanTransformer3DModel or {ANIMATE_2_CLASS} (diffusers) or WanModel",
    )
    for key, value in (("cross_attn_norm", True), ("qk_norm", "rms_norm_across_heads"), ("pos_embed_seq_len", None)):
        require(json.get(key, value) == value, f"config.json {key}={json.get(key)!r}: this network has {value!r}")
    values = read_fields(DiTConfig, json, DIFFUSERS_FIELDS)
    head = read_fields(DiTConfig, json, {"dim": "attention_head_dim"})["dim"]
    image = read_fields(DiTConfig, {"image_dim": None} | json, {"image_dim": "image_dim"})
    return DiTConfig(**values, **image, dim=values["num_heads"] * head)


def _animate_2_config(json: dict[str, Any]) -> DiTConfig:
    """The configuration of a Wan-Animate-2 transformer."""
    fixed = {"cross_attn_norm": True, "use_img_emb": True, "refer_stride": 1}
    fixed |= {"refer_offset_t": 1, "refer_offset_h": 0, "refer_offset_w": -1}
    for key, value in fixed.items():
        require(json.get(key, value) == value, f"config.json {key}={json.get(key)!r}: this network has {value!r}")
    return DiTConfig(**read_fields(DiTConfig, json, ORIGINAL_FIELDS), image_dim=1280, **ANIMATE_2)
