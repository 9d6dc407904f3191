"""The autoencoder's weight table: every tensor of the published layouts, both ways, bit for bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.base import VAEConfig
from configs.errors import RequestError
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.wan_vae import WanVAE
from omnitransfer_jax.weights.wan_vae import config_from_json, config_json, entries

torch, bridge = pytest.importorskip("torch"), pytest.importorskip("tests.parity.bridge")
diffusers, single_file = pytest.importorskip("diffusers"), pytest.importorskip("diffusers.loaders.single_file_utils")

FULL = VAEConfig()
SMALL = VAEConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 3, 2), num_res_blocks=1, temporal_downsample=(True, False),
    latents_mean=(0.1, -0.4, 0.3, 0.7), latents_std=(1.2, 0.6, 2.5, 1.6),
)  # fmt: skip


def check_table(shapes: dict[str, list[int]], originals: dict[str, str]) -> None:
    """The full-size table names exactly `shapes`, under either name, and gives our leaves their shapes; no memory is taken."""
    table, original = entries(FULL, "diffusers"), entries(FULL, "original")
    assert len(table) == 194
    assert {e.theirs for e in table} == set(shapes)
    assert {b.theirs: a.theirs for a, b in zip(table, original, strict=True)} == originals
    assert [e._replace(theirs="") for e in table] == [e._replace(theirs="") for e in original]
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    ours = flat_params(abstract(lambda rngs: WanVAE(FULL, rngs=rngs)))
    assert {k: v.shape for k, v in bridge.to_ours(zeros, table).items()} == {k: v.shape for k, v in ours.items()}


def test_full_size_names_and_shapes():
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKLWan().state_dict()
    originals = [e.theirs for e in entries(FULL, "original")]
    renamed = {name: next(iter(single_file.convert_wan_vae_to_diffusers({name: None}))) for name in originals}
    check_table({name: list(value.shape) for name, value in theirs.items()}, renamed)


def test_published_names_and_shapes(shared):
    shapes, keymap = (json.loads((shared / "spec" / f"wan_vae_{name}.json").read_text()) for name in ("shapes", "keymap"))
    check_table(shapes, keymap)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("config", [SMALL, replace(FULL, base_dim=4)], ids=["small", "wan"])
def test_there_and_back(config, layout):
    state, table = bridge.tensors(bridge.randomise(diffusers.AutoencoderKLWan.from_config(config_json(config)))), entries(config, layout)
    theirs = {new.theirs: state[old.theirs] for new, old in zip(table, entries(config, "diffusers"), strict=True)}
    ours = bridge.to_ours(theirs, table)
    assert len(ours) == len(table)
    for entry in table:
        back = entry.layout.to_theirs(ours[entry.ours])
        assert back.shape == theirs[entry.theirs].shape
        assert (back == theirs[entry.theirs]).all()


def test_diffusers_reads_what_we_write(tmp_path):
    state, table = bridge.tensors(bridge.randomise(diffusers.AutoencoderKLWan.from_config(config_json(SMALL)))), entries(SMALL, "diffusers")
    ours = bridge.to_ours(state, table)
    written = {e.theirs: np.ascontiguousarray(e.layout.to_theirs(ours[e.ours])) for e in table}
    save_file(written, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL)))
    model, report = diffusers.AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert all((value == state[name]).all() for name, value in bridge.tensors(model).items())
    assert (model.config.scale_factor_temporal, model.config.scale_factor_spatial) == (2, 4)


@pytest.mark.parametrize("config", [FULL, SMALL], ids=["full", "small"])
def test_config_there_and_back(config):
    assert config_from_json(json.loads(json.dumps(config_json(config)))) == config
    assert config_from_json(dict(diffusers.AutoencoderKLWan.from_config({**config_json(config), "base_dim": 4}).config)
                            | {"_class_name": "AutoencoderKLWan"}) == replace(config, base_dim=4)  # fmt: skip
    assert config_from_json({"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0"}) == FULL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_residual": True}, "is_residual=True: this autoencoder has False"),
        ({"patch_size": 2}, "patch_size=2: this autoencoder has None"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL': AutoencoderKLWan"),
        ({"z_dim": 8}, "vae.z_dim=8 needs as many"),
    ],
)
def test_unsupported_config(change, message):
    with pytest.raises(RequestError, match=message):
        config_from_json(config_json(FULL) | change)
