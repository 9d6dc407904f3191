"""The video autoencoder's tensors: ours, diffusers' (AutoencoderKLWan) and the original's (Wan2.1 WanVAE_)."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np

from configs.base import VAEConfig
from configs.errors import require
from omnitransfer_jax.folders.typed import read_fields
from omnitransfer_jax.models.wan_vae import decoder_widths, encoder_widths
from omnitransfer_jax.weights.table import CONV, SAME, Entry, Layout

FLAT = Layout(np.ravel, lambda x: x[:, None, None, None])  # the scale of a norm (C, 1, 1, 1) <-> (C,)
FLAT_2D = Layout(np.ravel, lambda x: x[:, None, None])  # (C, 1, 1) <-> (C,)
POINTWISE = Layout(lambda x: x[:, :, 0, 0, 0].T, lambda x: x.T[:, :, None, None, None])  # (out, in, 1, 1, 1) <-> (in, out)
POINTWISE_2D = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # (out, in, 1, 1) <-> (in, out)
CONV_2D = Layout(lambda x: CONV.to_ours(x)[None], lambda x: CONV.to_theirs(x[0]))  # (out, in, 3, 3) <-> (1, 3, 3, in, out)


class Name(NamedTuple):
    """The name of one module, or of one tensor, in the three code bases."""

    ours: str
    diffusers: str
    original: str

    def __truediv__(self, inner: tuple[str, str, str]) -> "Name":
        """The name of a submodule, or of a tensor, that the code bases call `inner`."""
        return Name(*(f"{outer}.{name}" for outer, name in zip(self, inner, strict=True)))


Row = tuple[Name, Layout]


def entries(config: VAEConfig, layout: Literal["diffusers", "original"]) -> list[Entry]:
    """The table of an autoencoder of this configuration: 194 entries at full size."""
    rows = [
        *_encoder(config),
        *_layer(Name("quant", "quant_conv", "conv1"), POINTWISE),
        *_layer(Name("post_quant", "post_quant_conv", "conv2"), POINTWISE),
        *_decoder(config),
    ]
    return [Entry({"diffusers": name.diffusers, "original": name.original}[layout], name.ours, change) for name, change in rows]


def _encoder(config: VAEConfig) -> list[Row]:
    """Both other code bases number the residual blocks and downsamplers of all resolutions in one list."""
    rows, index = _ends("encoder"), 0

    def next_place(ours: str) -> Name:
        nonlocal index
        index += 1
        return Name(f"encoder.levels.{ours}", f"encoder.down_blocks.{index - 1}", f"encoder.downsamples.{index - 1}")

    for level, (inputs, outputs) in enumerate(encoder_widths(config)):
        for block in range(config.num_res_blocks):
            rows += _residual(next_place(f"{level}.blocks.{block}"), widens=block == 0 and inputs != outputs)
        if level < len(config.temporal_downsample):
            rows += _resample(next_place(f"{level}.downsample"), config.temporal_downsample[level])
    return rows


def _decoder(config: VAEConfig) -> list[Row]:
    """Only the original numbers the modules of all resolutions in one list."""
    rows, steps = _ends("decoder"), config.temporal_downsample[::-1]
    blocks = config.num_res_blocks + 1
    for level, (inputs, outputs) in enumerate(decoder_widths(config)):
        ours, diffusers, index = f"decoder.levels.{level}", f"decoder.up_blocks.{level}", level * (blocks + 1)
        for block in range(blocks):
            name = Name(f"{ours}.blocks.{block}", f"{diffusers}.resnets.{block}", f"decoder.upsamples.{index + block}")
            rows += _residual(name, widens=block == 0 and inputs != outputs)
        if level < len(steps):
            name = Name(f"{ours}.upsample", f"{diffusers}.upsamplers.0", f"decoder.upsamples.{index + blocks}")
            rows += _resample(name, steps[level])
    return rows


def _ends(half: str) -> list[Row]:
    """The modules that encoder and decoder both have: first convolution, middle blocks, last norm and convolution."""
    name = Name(half, half, half)
    attention = name / ("middle.attention", "mid_block.attentions.0", "middle.1")
    return [
        *_layer(name / ("conv_in", "conv_in", "conv1"), CONV),
        *_residual(name / ("middle.before", "mid_block.resnets.0", "middle.0"), widens=False),
        (attention / ("norm.scale", "norm.gamma", "norm.gamma"), FLAT_2D),
        *_layer(attention / ("qkv", "to_qkv", "to_qkv"), POINTWISE_2D),
        *_layer(attention / ("out", "proj", "proj"), POINTWISE_2D),
        *_residual(name / ("middle.after", "mid_block.resnets.1", "middle.2"), widens=False),
        (name / ("norm_out.scale", "norm_out.gamma", "head.0.gamma"), FLAT),
        *_layer(name / ("conv_out", "conv_out", "head.2"), CONV),
    ]


def _residual(name: Name, *, widens: bool) -> list[Row]:
    return [
        (name / ("norm1.scale", "norm1.gamma", "residual.0.gamma"), FLAT),
        *_layer(name / ("conv1", "conv1", "residual.2"), CONV),
        (name / ("norm2.scale", "norm2.gamma", "residual.3.gamma"), FLAT),
        *_layer(name / ("conv2", "conv2", "residual.6"), CONV),
        *(_layer(name / ("shortcut", "conv_shortcut", "shortcut"), POINTWISE) if widens else []),
    ]


def _resample(name: Name, in_time: bool) -> list[Row]:
    return [
        *_layer(name / ("conv", "resample.1", "resample.1"), CONV_2D),
        *(_layer(name / ("time_conv", "time_conv", "time_conv"), CONV) if in_time else []),
    ]


def _layer(name: Name, layout: Layout) -> list[Row]:
    """Kernel and bias of a convolution."""
    return [(name / ("kernel", "weight", "weight"), layout), (name / ("bias", "bias", "bias"), SAME)]


# Our field and diffusers' (its spelling).
FIELDS = [
    ("base_dim", "base_dim"),
    ("z_dim", "z_dim"),
    ("dim_mult", "dim_mult"),
    ("num_res_blocks", "num_res_blocks"),
    ("temporal_downsample", "temperal_downsample"),
    ("latents_mean", "latents_mean"),
    ("latents_std", "latents_std"),
]
# Options of diffusers that Wan2.1 leaves at these values.
FIXED = {
    "decoder_base_dim": None, "attn_scales": [], "dropout": 0.0, "is_residual": False,
    "in_channels": 3, "out_channels": 3, "patch_size": None,
}  # fmt: skip


def config_json(config: VAEConfig) -> dict[str, Any]:
    """The config.json diffusers reads beside the weights."""
    values = {theirs: getattr(config, ours) for ours, theirs in FIELDS}
    return {
        "_class_name": "AutoencoderKLWan",
        **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
        **FIXED,
        "scale_factor_temporal": config.time_stride,
        "scale_factor_spatial": config.space_stride,
    }


def config_from_json(json: dict[str, Any]) -> VAEConfig:
    """The configuration that a config.json of diffusers describes; absent fields have diffusers' defaults, which are also ours.

    An unsupported value is a `RequestError`. The scale factors are not read: they follow from `temperal_downsample`.
    """
    name = json.get("_class_name")
    require(name == "AutoencoderKLWan", f"config.json _class_name={name!r}: AutoencoderKLWan")
    for key, value in FIXED.items():
        require(json.get(key, value) == value, f"config.json {key}={json.get(key)!r}: this autoencoder has {value!r}")
    config = replace(VAEConfig(), **read_fields(VAEConfig, json, {ours: theirs for ours, theirs in FIELDS if theirs in json}))
    config.validate()
    return config
