"""The text encoder against transformers' UMT5EncoderModel: two prompts of different lengths, gradients too, and the files it reads."""

import json
from fnmatch import fnmatch
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from configs.base import UMT5Config
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.umt5 import UMT5Encoder, position_buckets
from omnitransfer_jax.weights.umt5 import IGNORED, config_from_json, config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import gradients, randomise, tensors, to_ours

SIZES = dict(vocab_size=96, dim=32, head_dim=6, ffn_dim=48, num_layers=3, num_heads=4, eps=1e-3, dtype="float32")
WIDE = UMT5Config(**SIZES)  # head_dim * num_heads is not dim, and eps is large enough to be seen
NARROW = UMT5Config(**SIZES, relative_buckets=8, relative_max_distance=16)


def oracle(config: UMT5Config) -> torch.nn.Module:
    return randomise(transformers.UMT5EncoderModel(transformers.UMT5Config.from_dict(config_json(config))))


def file_of(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    """What a checkpoint of the oracle holds that is not a copy."""
    return {name: x for name, x in tensors(theirs).items() if not any(fnmatch(name, pattern) for pattern in IGNORED)}


def original_of(theirs: dict[str, np.ndarray], config: UMT5Config) -> dict[str, np.ndarray]:
    """The same tensors under Wan2.1's names (t5.py)."""
    original = {"token_embedding.weight": theirs["shared.weight"], "norm.weight": theirs["encoder.final_layer_norm.weight"]}
    for i in range(config.num_layers):
        attention, ffn = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for letter in "qkvo":
            original[f"blocks.{i}.attn.{letter}.weight"] = theirs[f"{attention}.SelfAttention.{letter}.weight"]
        bias = theirs[f"{attention}.SelfAttention.relative_attention_bias.weight"]
        original[f"blocks.{i}.pos_embedding.embedding.weight"] = bias
        original[f"blocks.{i}.norm1.weight"] = theirs[f"{attention}.layer_norm.weight"]
        original[f"blocks.{i}.norm2.weight"] = theirs[f"{ffn}.layer_norm.weight"]
        original[f"blocks.{i}.ffn.gate.0.weight"] = theirs[f"{ffn}.DenseReluDense.wi_0.weight"]
        original[f"blocks.{i}.ffn.fc1.weight"] = theirs[f"{ffn}.DenseReluDense.wi_1.weight"]
        original[f"blocks.{i}.ffn.fc2.weight"] = theirs[f"{ffn}.DenseReluDense.wo.weight"]
    return original


def to_theirs(ours: dict[str, np.ndarray], table) -> dict[str, np.ndarray]:
    """The way back of `to_ours`."""
    return {e.theirs: e.layout.to_theirs(ours[e.ours] if e.layer is None else ours[e.ours][e.layer]) for e in table}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("config", "length"), [(WIDE, 24), (NARROW, 40)], ids=["wide", "narrow_buckets"])
def test_forward_and_gradients(config, length):
    theirs, table, draw = oracle(config), entries(config, "diffusers"), np.random.default_rng(1)
    ours = with_params(
        abstract(lambda rngs: UMT5Encoder(config, rngs=rngs)),
        {path: jnp.asarray(x) for path, x in to_ours(file_of(theirs), table).items()},
    )
    mask = np.arange(length)[None] < np.array([[length - 3], [length // 3]])
    tokens = np.where(mask, draw.integers(2, config.vocab_size, mask.shape), 0).astype(np.int32)
    probe = draw.standard_normal((*mask.shape, config.dim), np.float32)

    hidden = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).last_hidden_state
    expected = hidden * torch.tensor(mask)[..., None]
    (expected * torch.tensor(probe)).sum().backward()

    def loss(model):
        out = model(jnp.asarray(tokens), jnp.asarray(mask))
        return (out * probe).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(ours)
    assert relative_l2(out, expected.detach()) <= 1e-5
    for path, wanted in to_ours(gradients(theirs), table).items():
        assert relative_l2(flat_params(grads)[path], wanted) <= 1e-4, path


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 16), (16, 100), (4, 3)])
def test_position_buckets(buckets, distance):
    oracle = SimpleNamespace(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance, is_decoder=False)
    position = torch.arange(600)
    expected = UMT5Attention._relative_position_bucket(oracle, position[None] - position[:, None])
    np.testing.assert_array_equal(position_buckets(600, buckets, distance), expected)


def test_names_shapes_and_both_layouts():
    file = file_of(oracle(NARROW))
    diffusers, original = entries(NARROW, "diffusers"), entries(NARROW, "original")
    ours = to_ours(file, diffusers)
    model = abstract(lambda rngs: UMT5Encoder(NARROW, rngs=rngs))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in flat_params(model).items()}
    assert same(to_theirs(ours, diffusers), file)
    assert same(to_ours(original_of(file, NARROW), original), ours)
    assert same(to_theirs(ours, original), original_of(file, NARROW))


def test_transformers_loads_what_we_write(tmp_path):
    theirs = oracle(NARROW)
    table = entries(NARROW, "diffusers")
    exported = to_theirs(to_ours(file_of(theirs), table), table)
    (tmp_path / "config.json").write_text(json.dumps(config_json(NARROW)))
    save_file({k: np.ascontiguousarray(v) for k, v in exported.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.UMT5EncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same(tensors(loaded), tensors(theirs))


def test_config_as_transformers_writes_it():
    read = config_from_json(oracle(NARROW).config.to_dict())
    assert read == UMT5Config(**{**SIZES, "dtype": "bfloat16"}, relative_buckets=8, relative_max_distance=16)
