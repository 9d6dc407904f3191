"""Adapters convert to and from PEFT: PEFT's give the same output here, and ours load in PEFT with the same output."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from configs.base import LoRAConfig
from omnitransfer_jax.models.flat_params import flat_params, with_params
from omnitransfer_jax.models.lora import add_lora
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights import lora
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import randomise, tensors, to_ours
from tests.parity.test_wan_dit import I2V, inputs

CONFIG = LoRAConfig(rank=4, alpha=8.0, targets=(r"blocks\.self_attention\..*", r"blocks\.ffn\..*"))
TARGETS = r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
DIT = replace(I2V, num_layers=2)


def test_both_ways(tmp_path):
    base = {k: v for k, v in config_json(DIT).items() if not k.startswith("_")}
    theirs = randomise(WanTransformer3DModel(**base))
    weights = {k: v.copy() for k, v in tensors(theirs).items()}
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomise(theirs, seed=3)
    theirs.load_state_dict(
        {
            k: torch.tensor(weights[n])
            for k in theirs.state_dict()
            if (n := k.removeprefix("base_model.model.").replace(".base_layer", "")) in weights
        },
        strict=False,
    )
    theirs.save_pretrained(tmp_path / "theirs")

    model = WanDiT(DIT, rngs=nnx.Rngs(0))
    add_lora(model, CONFIG, rngs=nnx.Rngs(1))
    table = lora.entries(entries(DIT, "diffusers"), flat_params(model), lora.PEFT_PREFIX)
    adapters = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    model = with_params(
        model, {k: jnp.asarray(v) for k, v in (to_ours(weights, entries(DIT, "diffusers")) | to_ours(adapters, table)).items()}
    )

    batch = inputs(DIT, 2, 4, 6, per_token=False)
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    feed = {name: torch.tensor(value) for name, value in zip(names, batch.values(), strict=True)}
    feed["hidden_states"] = feed["hidden_states"].permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        wanted = theirs(**feed).sample.permute(0, 2, 3, 4, 1).numpy()
    out = jax.jit(lambda m: m(**{k: jnp.asarray(v) for k, v in batch.items()}))(model)
    assert relative_l2(out, wanted) <= 1e-5

    (tmp_path / "ours").mkdir()
    ours = flat_params(model)
    rows = {e.theirs: e.layout.to_theirs(np.asarray(ours[e.ours] if e.layer is None else ours[e.ours][e.layer])) for e in table}
    save_file({k: np.ascontiguousarray(v) for k, v in rows.items()}, tmp_path / "ours" / "adapter_model.safetensors")
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(lora.adapter_config(CONFIG, table)))
    fresh = WanTransformer3DModel(**base)
    fresh.load_state_dict({k: torch.tensor(v) for k, v in weights.items()})
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        again = loaded(**feed).sample.permute(0, 2, 3, 4, 1).numpy()
    assert relative_l2(again, wanted) <= 1e-6
    assert rows.keys() == adapters.keys()
    assert all((rows[name] == adapters[name]).all() for name in rows)
