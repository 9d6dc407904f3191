"""float8 and GGUF weights: the numbers they stand for, by the formats' definitions; and what is no such file."""

import json
import sys

import numpy as np
import pytest

from configs.errors import RequestError
from omnitransfer_jax.weights import files, quantised
from tests.weight_formats import FORMULAS, float8, random_blocks, write_gguf, write_safetensors

RNG = np.random.default_rng(0)


def read(path):
    tensors = quantised.inspect([path])
    return {
        name: quantised.values(tensor, value) for (name, tensor), value in zip(tensors.items(), files.read(tensors.values()), strict=True)
    }


@pytest.mark.parametrize(("code", "bits"), [("F8_E4M3", 4), ("F8_E5M2", 5)])
def test_every_byte_of_float8(tmp_path, code, bits):
    path = write_safetensors(tmp_path / "model.safetensors", {"a.weight": (code, (16, 16), bytes(range(256)))})
    found = read(path)["a.weight"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([float8(b, bits) for b in range(256)], np.float32).reshape(16, 16))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("scale_name", "input_name"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("shape", [(), (1,), (4, 1)], ids=["scalar", "one", "rows"])
def test_scales_of_float8(tmp_path, prefix, scale_name, input_name, shape):
    """ComfyUI's names of both kinds; the scales of activations and the marks are left out, a plain tensor beside stays plain."""
    data, scale = bytes(range(0x30, 0x30 + 12)), RNG.uniform(0.001, 3, shape).astype(np.float32)
    plain = np.array([0x38, 0x40], np.uint8).tobytes()
    kind = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    path = write_safetensors(
        tmp_path / "model.safetensors",
        {
            f"{prefix}a.weight": ("F8_E4M3", (4, 3), data),
            f"{prefix}a.{scale_name}": ("F32", shape, scale.tobytes()),
            f"{prefix}a.{input_name}": ("F32", (), np.float32(1).tobytes()),
            f"{prefix}a.bias": ("BF16", (1,), b"\x80\x3f"),
            f"{prefix}b.weight": ("F8_E4M3", (2,), plain),
            **({f"{prefix}scaled_fp8": ("F8_E4M3", (0,), b"")} if scale_name == "scale_weight" else {}),
            **({f"{prefix}a.comfy_quant": ("U8", kind.shape, kind.tobytes())} if scale_name == "weight_scale" else {}),
        },
    )
    found = read(path)
    assert set(found) == {f"{prefix}a.weight", f"{prefix}a.bias", f"{prefix}b.weight"}
    numbers = np.array([float8(b, 4) for b in data], np.float32).reshape(4, 3)
    np.testing.assert_array_equal(found[f"{prefix}a.weight"], numbers * scale)
    np.testing.assert_array_equal(found[f"{prefix}b.weight"], [1.0, 2.0])
    assert quantised.note(quantised.inspect([path])) == "2 tensors of F8_E4M3, 1 of them scaled"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"a.scale_weight": ("F32", (3,), bytes(12))}, r"a.scale_weight is F32 of shape \(3,\); read is one float for a.weight"),
        ({"a.scale_weight": ("I32", (), bytes(4))}, "a.scale_weight is I32"),
        (
            {"a.comfy_quant": ("U8", (24,), b'{"format": "int8_block"}')},
            "a.comfy_quant is 'int8_block'; float8_e4m3fn, float8_e5m2 are read",
        ),
        ({"a.comfy_quant": ("U8", (2,), b"[]")}, "a.comfy_quant names no format"),
    ],
)
def test_scales_that_cannot_be(tmp_path, extra, message):
    path = write_safetensors(tmp_path / "model.safetensors", {"a.weight": ("F8_E4M3", (2, 2), bytes(4))} | extra)
    with pytest.raises(RequestError, match=message) as error:
        quantised.inspect([path])
    assert str(path) in str(error.value)


def test_scales_of_other_weights_are_not_taken(tmp_path):
    """They stay, so that the table, which does not have them, refuses them."""
    tensors = {"a.weight": ("F16", (2,), bytes(4)), "a.scale_weight": ("F32", (), bytes(4)), "scaled_fp8": ("F16", (0,), b"")}
    assert set(quantised.inspect([write_safetensors(tmp_path / "model.safetensors", tensors)])) == set(tensors)


@pytest.mark.parametrize("kind", FORMULAS)
def test_blocks_of_gguf(tmp_path, monkeypatch, kind):
    """In groups, a group at a time, and of a tensor that is stored as rows of 256."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(quantised, "GROUP", 5)
    formula, size, _ = FORMULAS[kind]
    numbers, blocks = 32 if kind == "Q8_0" else 256, random_blocks(kind, 12)
    expected = np.array([formula(block.tolist()) for block in blocks])
    tensors = {"a.weight": (kind, (6, 2 * numbers), blocks.tobytes()), "b.weight": (kind, (12, numbers), blocks.tobytes())}
    path = write_gguf(tmp_path / "model.gguf", tensors, fields={"comfy.gguf.orig_shape.b.weight": (numbers, 3, 4)})
    found = read(path)
    assert found["a.weight"].dtype == np.float32
    np.testing.assert_allclose(found["a.weight"], expected.reshape(6, 2 * numbers), rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(found["b.weight"], found["a.weight"].reshape(numbers, 3, 4))
    assert size == quantised.BLOCKS[kind][1]


def test_wide_types_of_gguf_are_kept(tmp_path):
    pytest.importorskip("gguf")
    arrays = {"F32": RNG.standard_normal((2, 3, 1, 2, 2)).astype("f4"), "F16": RNG.standard_normal((4, 3)).astype("f2")}
    tensors = {kind: (kind, array.shape, array.tobytes()) for kind, array in arrays.items()} | {"BF16": ("BF16", (3,), b"\x80\x3f" * 3)}
    found = read(write_gguf(tmp_path / "anything", tensors, architecture=None))
    for kind, array in arrays.items():
        assert found[kind].dtype == array.dtype
        np.testing.assert_array_equal(found[kind], array)
    np.testing.assert_array_equal(found["BF16"], np.ones(3, files.DTYPES["BF16"]))


def test_gguf_files_that_cannot_be(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    tensors = {"a.weight": ("F32", (4, 2), bytes(32))}
    with pytest.raises(RequestError, match="a GGUF file of 'flux'; read is the diffusion transformer, 'wan'"):
        quantised.inspect([write_gguf(tmp_path / "flux.gguf", tensors, architecture="flux")])
    path = write_gguf(tmp_path / "cut.gguf", tensors, fields={"comfy.gguf.orig_shape.a.weight": (2, 2)})
    with pytest.raises(RequestError, match=r"cut off or damaged .*a.weight has shape \(4, 2\), before it was stored \[2, 2\]"):
        quantised.inspect([path])
    whole = write_gguf(path, tensors).read_bytes()
    for length in (4, 20, 40, len(whole) - 32, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RequestError, match=r"cut.gguf: a GGUF file that is cut off or damaged .*; download it again"):
            quantised.inspect([path])


def test_gguf_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match="a GGUF file, for which the package gguf is needed: pip install gguf"):
        quantised.inspect([write_gguf(tmp_path / "model.gguf", {"a.weight": ("F32", (4, 2), bytes(32))})])
