"""A whole transformer imported from float8 and GGUF files against diffusers' with the same weights, dequantised by PyTorch and by hand."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from configs import wan
from configs.base import DiTConfig
from launch import command, import_weights
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.wan_dit import WanDiT
from omnitransfer_jax.weights.wan_dit import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import randomise
from tests.weight_formats import FORMULAS, q8_0, random_blocks, write_gguf, write_safetensors

NARROW = DiTConfig(  # rows of whole blocks of 256
    dim=256, ffn_dim=512, num_layers=2, num_heads=2, in_channels=16, text_dim=256, image_dim=None, freq_dim=256, dtype="float32"
)  # fmt: skip
ORIGINAL = {
    theirs.theirs: original.theirs for theirs, original in zip(entries(NARROW, "diffusers"), entries(NARROW, "original"), strict=True)
}
K_TYPES = {"self_attn.q.weight": "Q4_K", "self_attn.k.weight": "Q6_K", "self_attn.v.weight": "Q5_K"}


def weights():
    """diffusers' transformer, and its weights by diffusers' names."""
    settings = {key: value for key, value in config_json(NARROW).items() if not key.startswith("_")}
    model = randomise(WanTransformer3DModel(**settings))
    return model, {name: value.detach() for name, value in model.named_parameters()}


def as_float8(path, values, dtype, names, scaled):
    """Writes the matrices of the blocks in float8 and the rest in float32; returns what PyTorch makes of them."""
    code = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}[dtype]
    written, meant = {}, {}
    for name, value in values.items():
        if not (name.startswith("blocks.") and value.ndim == 2):
            written[names(name)], meant[name] = ("F32", tuple(value.shape), value.numpy().tobytes()), value
            continue
        scale = value.abs().max() / torch.finfo(dtype).max if scaled else torch.tensor(1.0)
        narrow = (value / scale).to(dtype)
        written[names(name)] = code, tuple(value.shape), narrow.view(torch.uint8).numpy().tobytes()
        meant[name] = narrow.to(torch.float32) * scale
        if scaled:
            written[names(name).removesuffix("weight") + "scale_weight"] = "F32", (), scale.numpy().tobytes()
            written[names(name).removesuffix("weight") + "scale_input"] = "F32", (), np.float32(1).tobytes()
    if scaled:
        written[names("scaled_fp8")] = code, (0,), b""
    write_safetensors(path, written)
    return meant


def as_gguf(path, values):
    """Writes matrices as blocks, Q8_0 of the values or random ones of K types, the patch embedding in float16, the rest in float32."""
    written, meant = {}, {}
    for name, value in values.items():
        original, array = ORIGINAL[name], value.numpy()
        kind = next((kind for end, kind in K_TYPES.items() if original.endswith(end)), "Q8_0")
        if array.ndim == 5:
            written[original] = "F16", array.shape, array.astype("f2").tobytes()
            meant[name] = value.half().float()
        elif array.ndim != 2:
            written[original], meant[name] = ("F32", array.shape, array.tobytes()), value
        else:
            if kind == "Q8_0":
                rows = array.reshape(-1, 32)
                scale = np.abs(rows).max(1, keepdims=True) / 127
                blocks = np.hstack([scale.astype("<f2").view(np.uint8), np.rint(rows / scale).astype(np.int8).view(np.uint8)])
                numbers = [q8_0(block) for block in blocks.tolist()]
            else:
                blocks = random_blocks(kind, array.size // 256, seed=len(name))
                numbers = [FORMULAS[kind][0](block) for block in blocks.tolist()]
            written[original] = kind, array.shape, blocks.tobytes()
            meant[name] = torch.tensor(np.array(numbers, np.float32)).reshape(value.shape)
    write_gguf(path, written)
    return meant


def source(form, folder, values):
    """Writes a source of this form; returns the path to import and the weights it stands for."""
    if form == "gguf":
        return folder / "wan.gguf", as_gguf(folder / "wan.gguf", values)
    if form == "diffusers_scaled":
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps(config_json(NARROW)))
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        return folder, as_float8(file, values, torch.float8_e4m3fn, lambda name: name, True)

    def comfyui(name):
        return f"model.diffusion_model.{ORIGINAL.get(name, name)}"

    kind = torch.float8_e5m2 if form == "comfyui_plain" else torch.float8_e4m3fn
    return folder / "wan.safetensors", as_float8(folder / "wan.safetensors", values, kind, comfyui, form == "comfyui_scaled")


@jax.jit
def velocity(model, latents, timestep, text):
    return model(latents=latents, timestep=timestep, text=text)


@pytest.mark.parametrize("form", ["comfyui_plain", "comfyui_scaled", "diffusers_scaled", "gguf"])
def test_same_velocity_as_the_dequantised_weights(tmp_path, monkeypatch, capfd, form):
    if form == "gguf":
        pytest.importorskip("gguf")
    monkeypatch.setitem(import_weights.PRESETS, "narrow", replace(wan.VARIANTS["smoke"], dit=NARROW))
    theirs, values = weights()
    path, meant = source(form, tmp_path, values)
    out = tmp_path / "ours"
    arguments = [f"--source={path}", f"--out={out}", "--dtype=float32"]
    assert command.execute(import_weights.main, import_weights.FLAGS, arguments) == 0, capfd.readouterr().err
    assert "stored as the numbers they stand for" in capfd.readouterr().out

    leaves = model_folder.load_part(out, "dit", abstract_params := dict(model_folder.part_leaves(out, "dit")))
    assert {leaf.dtype for leaf in abstract_params.values()} == {np.dtype(np.float32)}
    for entry in entries(NARROW, "diffusers"):  # the dequantised weights themselves
        leaf = leaves[entry.ours] if entry.layer is None else leaves[entry.ours][entry.layer]
        np.testing.assert_allclose(
            entry.layout.to_theirs(np.asarray(leaf)), meant[entry.theirs], rtol=2e-7, atol=1e-9, err_msg=entry.theirs
        )

    theirs.load_state_dict(meant)
    rng = np.random.default_rng(1)
    latents, text = rng.standard_normal((1, 2, 4, 6, 16), np.float32), rng.standard_normal((1, 512, 256), np.float32)
    time = np.array([321.0], np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(latents).permute(0, 4, 1, 2, 3), torch.tensor(time), torch.tensor(text)).sample.permute(
            0, 2, 3, 4, 1
        )
    model = with_params(abstract(lambda rngs: WanDiT(NARROW, rngs=rngs)), leaves)
    assert relative_l2(velocity(model, jnp.asarray(latents), jnp.asarray(time), jnp.asarray(text)), expected) <= 1e-5


def test_float8_is_kept_as_bfloat16(tmp_path, monkeypatch):
    """The numbers of float32, rounded once, as PyTorch rounds them."""
    monkeypatch.setitem(import_weights.PRESETS, "narrow", replace(wan.VARIANTS["smoke"], dit=NARROW))
    path, meant = source("comfyui_scaled", tmp_path, weights()[1])
    assert command.execute(import_weights.main, import_weights.FLAGS, [f"--source={path}", f"--out={tmp_path / 'ours'}"]) == 0
    kernel = dict(model_folder.read_part(tmp_path / "ours", "dit"))["blocks.ffn.up.kernel"]
    expected = torch.stack([meant[f"blocks.{i}.ffn.net.0.proj.weight"].T for i in range(2)]).to(torch.bfloat16)
    np.testing.assert_array_equal(kernel.view(np.int16), expected.view(torch.int16).numpy())
