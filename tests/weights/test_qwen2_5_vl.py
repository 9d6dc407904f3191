"""Qwen2.5-VL's weight table and config.json: the published names and sizes, and both ways with transformers, bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import transformers

from configs.base import QwenConfig, QwenVisionConfig
from configs.errors import RequestError
from omnitransfer_jax.models.flat_params import abstract, count, flat_params
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL
from omnitransfer_jax.weights.convert import load, save, select, specs
from omnitransfer_jax.weights.files import find, inspect
from omnitransfer_jax.weights.qwen2_5_vl import IGNORED, OPTIONAL_PREFIXES, config_from_json, config_json, entries

torch, bridge = pytest.importorskip("torch"), pytest.importorskip("tests.parity.bridge")
save_file = pytest.importorskip("safetensors.torch").save_file

QWEN_3B = QwenConfig()
QWEN_7B = QwenConfig(vocab_size=152064, dim=3584, ffn_dim=18944, num_layers=28, num_heads=28, num_kv_heads=4, tied=False)
TIED = QwenConfig(
    vocab_size=40, dim=24, ffn_dim=20, num_layers=2, num_heads=2, num_kv_heads=1, rope_theta=5e3, rope_sections=(1, 2, 3), eps=1e-3,
    image_token=31, video_token=32, vision_start=33,
    vision=QwenVisionConfig(
        dim=16, ffn_dim=12, num_layers=3, num_heads=2, patch=2, temporal_patch=3, merge=3, window=18, full_attention=(0, 2),
        tokens_per_second=5,
    ),
)  # fmt: skip
UNTIED = replace(TIED, tied=False)
BOTH = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def oracle(config: QwenConfig):
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config_json(config)))


def params_of(config: QwenConfig):
    return flat_params(abstract(lambda rngs: Qwen2_5VL(config, rngs=rngs)))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("config", "total", "vision"),
    [(QWEN_3B, 3_754_622_976, 668_684_288), (QWEN_7B, 8_292_166_656, 676_550_144)],
    ids=["3b", "7b"],
)
def test_full_size(config, total, vision):
    model = abstract(lambda rngs: Qwen2_5VL(config, rngs=rngs))
    assert (count(model), count(model.vision)) == (total, vision)
    with torch.device("meta"):
        theirs = {name: tuple(p.shape) for name, p in oracle(config).named_parameters()}
    assert {name: spec.shape for name, spec in specs(entries(config, "original"), flat_params(model)).items()} == theirs


@BOTH
def test_their_file_there_and_back(config, tmp_path):
    theirs = bridge.randomise(oracle(config))
    theirs.save_pretrained(tmp_path / "theirs")
    params, table, files = params_of(config), entries(config, "diffusers"), find(tmp_path / "theirs")
    stored = inspect(files)
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: spec.shape for name, spec in specs(table, params).items()}

    ours = load(stored, table, params)
    save(ours.items(), params, table, tmp_path / "ours", "model")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config_json(config)))
    loaded, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert same(bridge.tensors(loaded), bridge.tensors(theirs))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == config.tied


@BOTH
def test_either_spelling_is_read(config, tmp_path):
    """Tools that skip transformers' renaming write the live model's names, and some the tied embedding twice."""
    theirs = {name: x.contiguous() for name, x in bridge.randomise(oracle(config)).state_dict().items()}
    theirs["lm_head.weight"] = theirs["lm_head.weight"].clone()
    save_file(theirs, tmp_path / "model.safetensors")
    params, stored = params_of(config), inspect(find(tmp_path))
    read = [
        load(select(stored, table, OPTIONAL_PREFIXES, IGNORED), table, params)
        for table in (entries(config, "diffusers"), entries(config, "original"))
    ]
    assert same(*read)
    np.testing.assert_array_equal(read[0]["token_embedding"], theirs["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize("config", [TIED, UNTIED, QWEN_3B, QWEN_7B], ids=["tied", "untied", "3b", "7b"])
def test_config_there_and_back(config):
    written = json.loads(json.dumps(config_json(config)))
    assert config_from_json(written) == config
    assert config_from_json(json.loads(transformers.Qwen2_5_VLConfig(**written).to_json_string())) == config


def test_older_nested_config():
    """transformers 4.52 to 4.57 wrote the language model's fields twice, and the rotation its own way."""
    flat = config_json(UNTIED)
    vision = {k: v for k, v in flat["vision_config"].items() if k != "in_channels"} | {"in_chans": 3}
    text = {k: v for k, v in flat.items() if k not in ("vision_config", "architectures", "tie_word_embeddings")}
    text |= {"model_type": "qwen2_5_vl_text", "image_token_id": None, "video_token_id": None}
    text["rope_scaling"] = {"mrope_section": [1, 2, 3], "rope_type": "default", "type": "default"}
    assert config_from_json(flat | {"vision_config": vision, "text_config": text}) == UNTIED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type='qwen2_vl'.*'qwen2_5_vl'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [1, 2, 3]}}, "'yarn'.*'default'"),
        ({"rope_scaling": None, "rms_norm_eps": None}, "no rms_norm_eps, mrope_section"),
        ({"image_token_id": None}, "no image_token_id"),
        ({"hidden_size": 32}, "out_hidden_size=24: supported is 32"),
        ({"num_key_value_heads": None}, "no num_key_value_heads"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act='gelu'"),
    ],
)
def test_unsupported_config(change, message):
    with pytest.raises(RequestError, match=message):
        config_from_json(config_json(TIED) | change)


def test_vision_eps_has_no_field():
    with pytest.raises(RequestError, match=r"mllm.vision.eps=0.001"):
        config_json(replace(TIED, vision=replace(TIED.vision, eps=1e-3)))
