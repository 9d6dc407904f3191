"""The transformer's table names every tensor of the published networks, in both layouts, with its shape."""

import json
from dataclasses import replace

import pytest

from configs.base import DiTConfig
from configs.errors import RequestError
from configs.wan import I2V_2_2_14B, I2V_14B, T2V_1_3B, T2V_14B
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights.convert import specs
from omnitransfer_jax.weights.wan_dit import config_from_json, config_json, entries

torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

TINY = DiTConfig(dim=24, ffn_dim=32, num_layers=2, num_heads=2)


def theirs(config, layout):
    """Name -> shape of everything the exporter writes, from shapes alone."""
    params = flat_params(abstract(lambda rngs: WanDiT(config, rngs=rngs)))
    return {name: tuple(spec.shape) for name, spec in specs(entries(config, layout), params).items()}


@pytest.mark.parametrize("config", [I2V_14B, T2V_14B, T2V_1_3B, I2V_2_2_14B], ids=["i2v_14b", "t2v_14b", "t2v_1_3b", "i2v_2_2_14b"])
def test_full_size_names_and_shapes(config):
    with torch.device("meta"):
        oracle = diffusers.WanTransformer3DModel(**{k: v for k, v in config_json(config).items() if not k.startswith("_")})
    assert theirs(config, "diffusers") == {name: tuple(x.shape) for name, x in oracle.state_dict().items()}


def test_the_published_list(shared):
    listed = json.loads((shared / "spec" / "wan_i2v_14b_shapes.json").read_text())
    assert len(listed) == 1303
    assert theirs(I2V_14B, "diffusers") == {name: tuple(shape) for name, shape in listed.items()}


def test_original_names_are_what_diffusers_converts_from():
    original = {name: torch.empty(shape) for name, shape in theirs(TINY, "original").items()}
    converted = single_file.convert_wan_transformer_to_diffusers(dict(original))
    assert {name: tuple(x.shape) for name, x in converted.items()} == theirs(TINY, "diffusers")


def test_the_original_key_map(shared):
    listed = json.loads((shared / "spec" / "wan_dit_keymap_tiny.json").read_text())
    ours = {a.theirs: b.theirs for a, b in zip(entries(TINY, "original"), entries(TINY, "diffusers"), strict=True)}
    assert ours == listed


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_config_json_goes_both_ways(layout):
    config = replace(TINY, image_dim=1280)
    assert config_from_json(json.loads(json.dumps(config_json(config, layout)))) == config


def test_a_network_without_image_branch_is_image_to_video_all_the_same():
    """Wan2.2's I2V: diffusers' config.json says so, the original's leaves it open."""
    config = replace(TINY, image_dim=None)
    assert config_from_json(config_json(config)) == config
    assert config_json(config, "original")["model_type"] == "i2v"
    assert config_from_json(config_json(config, "original")) == replace(config, image_dim=1280)
    assert config_json(replace(config, in_channels=16), "original")["model_type"] == "t2v"


@pytest.mark.parametrize("change", [{"_class_name": "Other"}, {"cross_attn_norm": False}, {"qk_norm": "none"}, {"pos_embed_seq_len": 514}])
def test_another_network_is_refused(change):
    with pytest.raises(RequestError, match=next(iter(change))):
        config_from_json(config_json(TINY) | change)
