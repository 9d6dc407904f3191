"""What users give as --source, damaged, of another kind, in variants, under other names: imported right or told in one line."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import wan
from launch import command, export, import_weights, sample
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.weights import files
from omnitransfer_jax.weights.parts import PARTS
from tests.made_weights import random_leaves, write_part

DIT, VAE = PARTS[:2]
STEM = DIT.diffusers[1]


@pytest.fixture(scope="module")
def leaves():
    return random_leaves(DIT)


@pytest.fixture
def place(tmp_path, leaves):
    """The folder of a transformer in one file, in the diffusers folder tmp_path/source."""
    return write_part(tmp_path / "source", DIT, leaves)


def run_import(source, out, *args):
    return command.execute(import_weights.main, import_weights.FLAGS, [f"--source={source}", f"--out={out}", *args])


def refused(source, tmp_path, capfd, *args):
    """The line with which an import is refused; nothing may be written."""
    assert run_import(source, tmp_path / "ours", *args) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1, line
    assert not (tmp_path / "ours").exists() or not list((tmp_path / "ours").iterdir())
    return line


def imported(source, tmp_path, *args):
    assert run_import(source, tmp_path / "ours", *args) == 0
    return dict(model_folder.read_part(tmp_path / "ours", "dit"))


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in other)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_import_refuses_numbers_that_are_not_finite(place, tmp_path, capfd, value):
    write_part(tmp_path / "source", VAE, random_leaves(VAE))
    file = tmp_path / "source" / "vae" / f"{STEM}.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"].copy()
    tensors["encoder.conv_in.bias"][[1, 3]] = value
    save_file(tensors, file)
    line = refused(tmp_path / "source", tmp_path, capfd)
    assert line.startswith(f"{file}: numbers that are not finite (NaN or infinity): encoder.conv_in.bias has 2 of 8; download it again")


def test_a_number_that_the_wanted_type_cannot_hold(place, tmp_path, capfd):
    tensors = load_file(place / f"{STEM}.safetensors")
    tensors["proj_out.bias"] = np.full_like(tensors["proj_out.bias"], 3.4e38)  # infinity in bfloat16
    save_file(tensors, place / f"{STEM}.safetensors")
    assert "proj_out.bias has 64 of 64" in refused(tmp_path / "source", tmp_path, capfd, "--dtype=bfloat16")
    assert imported(tmp_path / "source", tmp_path)["head.bias"].max() < np.inf


def test_export_refuses_numbers_that_are_not_finite(leaves, tmp_path, capfd):
    spoilt = leaves | {"head.bias": np.full_like(leaves["head.bias"], np.nan)}
    model_folder.save_part(tmp_path / "ours", "dit", spoilt.items())
    model_folder.write_model(tmp_path / "ours", {"dit": wan.VARIANTS["smoke"].dit})
    arguments = ["--config=wan:smoke", f"--checkpoint={tmp_path / 'ours'}", f"--out={tmp_path / 'theirs'}"]
    assert command.execute(export.main, export.FLAGS, arguments) == 2
    assert "ours/dit: numbers that are not finite (NaN or infinity): head.bias has 64 of 64; import again" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("content", ["[1]", '{"_class_name": "WanTr', "3", "", "[" * 100_000, b"\xff\xfe", "null"])
def test_a_configuration_that_is_no_object(place, tmp_path, capfd, content):
    (place / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(tmp_path / "source", tmp_path, capfd)
    assert line.startswith(f"{place / 'config.json'}: ")
    assert "JSON" in line
    assert line.endswith("take the file that came with the weights\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ffn_dim": "96"}, "ffn_dim='96': a whole number"),
        ({"ffn_dim": None}, "no ffn_dim: all are needed"),
        ({"attention_head_dim": "24"}, "attention_head_dim='24': a whole number"),
        ({"patch_size": [1, 2]}, r"patch_size=\[1, 2\]: a list of 3, each a whole number"),
        ({"eps": float("nan")}, "dit.eps=nan: a finite number"),
        ({"num_layers": 10**7}, r"num_layers=10000000: the files have 87 tensors"),
        (
            {"patch_size": [10**6] * 3},
            r"patch=\(1000000, 1000000, 1000000\): the files have 87 tensors and 1048576 numbers, which is too few",
        ),
        ({"in_channels": 10**10}, "dit.in_channels=10000000000: at most 2147483647"),
    ],
)
def test_a_value_that_cannot_be_is_named(place, tmp_path, capfd, change, words):
    content = json.loads((place / "config.json").read_text()) | change
    (place / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None or key != "ffn_dim"}))
    line = refused(tmp_path / "source", tmp_path, capfd)
    assert re.match(f"{place / 'config.json'}: {words}", line), line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "the file is no JSON object"),
        ('{"metadata": {}}', "weight_map is no JSON object"),
        ('{"weight_map": ["a"]}', "weight_map is no JSON object"),
        ('{"weight_map": {}}', "weight_map names no file as a file"),
        ('{"weight_map": {"a": 3}}', "weight_map names 3 as a file"),
        ('{"weight_map": {"a": ["x"]}}', r"weight_map names \['x'\] as a file"),
        ('{"weight_map": {"a": "../../secret.safetensors"}}', r"names \.\./\.\./secret.safetensors, absent here"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names /etc/passwd, absent here"),
    ],
)
def test_an_index_that_cannot_be_followed(place, tmp_path, capfd, content, words):
    (tmp_path / "secret.safetensors").write_bytes((place / f"{STEM}.safetensors").read_bytes())
    (place / f"{STEM}.safetensors.index.json").write_text(content)
    line = refused(tmp_path / "source", tmp_path, capfd)
    assert f"{STEM}.safetensors.index.json" in line
    assert re.search(words.replace("names no file as a file", "names no file"), line), line


RUN = {"training": "transfer", "dit": {"dim": 48}, "train": {"init_from": ""}}


@pytest.mark.parametrize("main", ["export", "sample"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(RUN)[:40], "not JSON"),
        ("[1]", "the file is no JSON object"),
        (json.dumps(RUN | {"training": ["transfer"]}), r"training=\['transfer'\]: a text"),
        (json.dumps(RUN | {"train": 3}), "3 is no TransferTrainConfig|train.init_from=None: a text"),
        (json.dumps(RUN | {"train": {"init_from": 3}}), "init_from=3: a text"),
        (json.dumps(RUN | {"dit": {"dim": "48"}}), "dit: dim='48': a whole number"),
        (json.dumps(RUN | {"dit": {"dims": 48}}), "dims of DiTConfig is unknown to this version"),
    ],
)
def test_a_runs_configuration_that_cannot_be(tmp_path, capfd, main, content, words):
    module = {"export": export, "sample": sample}[main]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(content)
    out = tmp_path / ("out.mp4" if main == "sample" else "out")
    arguments = ["--config=wan:smoke", f"--checkpoint={tmp_path / 'run'}", f"--out={out}"]
    assert command.execute(module.main, module.FLAGS, arguments) == 2
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith(f"{tmp_path / 'run' / 'config.json'}: ")
    assert re.search(words, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def entry(**changes):
    return lambda header: header["proj_out.bias"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entry(data_offsets=[-4, 252]), r"proj_out.bias.data_offsets is \[-4, 252\]"),
        (entry(data_offsets=[256, 0]), r"proj_out.bias.data_offsets is \[256, 0\]"),
        (entry(data_offsets=[0, 256]), "data_offsets begin at"),
        (entry(data_offsets=[10**18, 10**18 + 256]), "data_offsets begin at [0-9]+, the tensor before ends at"),
        (entry(shape=[65]), r"proj_out.bias.data_offsets span 256 bytes, F32 of shape \[65\] has 260"),
        (entry(shape=[-64]), r"proj_out.bias.shape is \[-64\]"),
        (entry(shape=64), "proj_out.bias.shape is 64"),
        (entry(shape=[True] * 64), "proj_out.bias.shape is"),
        (entry(dtype="F33"), "proj_out.bias.dtype is F33"),
        (entry(dtype=None), "proj_out.bias.dtype is None"),
        (entry(dtype=["F32"]), r"proj_out.bias.dtype is \['F32'\]"),
        (lambda header: header["proj_out.bias"].pop("dtype"), "proj_out.bias.dtype is absent"),
        (lambda header: header.update({"proj_out.bias": 3}), "proj_out.bias.dtype is absent"),
        (lambda header: header.pop("proj_out.bias"), "data_offsets begin at|bytes more than its header lists"),
    ],
)
def test_a_header_that_cannot_be(place, tmp_path, capfd, change, words):
    file = place / f"{STEM}.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    line = refused(tmp_path / "source", tmp_path, capfd)
    assert line.startswith(f"{file}: ")
    assert re.search(words, line), line


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "transformer.blocks.0.attn1.to_q.lora_B.default.weight",
        "blocks.0.self_attn.q.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q.lora_up.weight",
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_adapters_are_told_as_such(tmp_path, capfd, name, as_folder):
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "pytorch_lora_weights.safetensors"
    save_file({name: np.ones((4, 8), np.float32)}, file)
    line = refused(tmp_path / "source" if as_folder else file, tmp_path, capfd)
    assert line.startswith(f"{file}: 1 tensors of adapters (LoRA), {name} among them")
    assert "load_lora_weights" in line


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("model.diffusion_model.vace_blocks.0.after_proj.bias", "VACE network, .*WanVACEPipeline"),
        ("img_emb.emb_pos", r"first and last frame \(FLF2V\) network, .*WanImageToVideoPipeline with last_image"),
        ("condition_embedder.image_embedder.pos_embed", "FLF2V"),
        ("ref_conv.weight", "Fun-Control network, .*VideoX-Fun"),
        ("face_adapter.fuser_blocks.0.linear1_kv.weight", "Animate network, .*WanAnimatePipeline"),
    ],
)
def test_relatives_of_wan_are_told_with_what_runs_them(place, tmp_path, capfd, extra, words):
    tensors = load_file(place / f"{STEM}.safetensors")
    save_file(tensors | {extra: np.ones(3, np.float32)}, tmp_path / "whole.safetensors")
    assert re.search(words, refused(tmp_path / "whole.safetensors", tmp_path, capfd))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "WanVACEPipeline"),
        ({"pos_embed_seq_len": 514}, "WanImageToVideoPipeline with last_image"),
        ({"in_channels": 48}, "in_channels=48: .*Fun-Control.*VideoX-Fun"),
    ],
)
def test_relatives_of_wan_are_known_by_their_configuration(place, tmp_path, capfd, change, words):
    (place / "config.json").write_text(json.dumps(json.loads((place / "config.json").read_text()) | change))
    assert re.search(words, refused(tmp_path / "source", tmp_path, capfd))


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model.", "_orig_mod.module.", "module.model.diffusion_model."]
)
def test_prefixes_of_wrappers(place, tmp_path, leaves, prefix):
    file = place / f"{STEM}.safetensors"
    tensors = load_file(file)
    save_file({f"{prefix}{name}".replace("blocks.1.", "blocks.1._orig_mod."): array for name, array in tensors.items()}, file)
    assert_same(imported(tmp_path / "source", tmp_path), leaves)


def as_variant(place, variant, tensors, shards=1):
    """Writes a second variant; names as diffusers and transformers give them."""
    names = (
        [f"{STEM}.{variant}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        if shards > 1
        else [f"{STEM}.{variant}.safetensors"]
    )
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, place / name)
    if shards > 1:
        index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
        (place / f"{STEM}.safetensors.index.{variant}.json").write_text(json.dumps(index))
    return [place / name for name in names]


@pytest.mark.parametrize("shards", [1, 2])
def test_variants_beside_each_other(place, tmp_path, capfd, leaves, shards):
    """The files without a variant, unless another is asked for, or they are not complete."""
    halves = {name: array.astype(np.float16) for name, array in load_file(place / f"{STEM}.safetensors").items()}
    as_variant(place, "fp16", halves, shards)
    assert_same(imported(tmp_path / "source", tmp_path), leaves)
    assert "variant " not in capfd.readouterr().out
    shutil.rmtree(tmp_path / "ours")
    narrow = {path: leaf.astype(np.float16) for path, leaf in leaves.items()}
    assert_same(imported(tmp_path / "source", tmp_path, "--variant=fp16"), narrow)
    shutil.rmtree(tmp_path / "ours")
    (place / f"{STEM}.safetensors").rename(place / f"{STEM}-00001-of-00002.safetensors")
    capfd.readouterr()
    assert_same(imported(tmp_path / "source", tmp_path), narrow)
    assert "dit: the files of variant fp16 are read, those without a variant are not complete" in capfd.readouterr().out


def test_variants_that_cannot_be(place, tmp_path, capfd):
    assert "--variant=fp16: no part has such files" in refused(tmp_path / "source", tmp_path, capfd, "--variant=fp16")
    tensors = load_file(place / f"{STEM}.safetensors")
    (place / f"{STEM}.safetensors").unlink()
    for variant in ("bf16", "fp16"):
        cut = as_variant(place, variant, tensors, 2)[0]
    assert "weights in the variants bf16, fp16; give one of them with --variant" in refused(tmp_path / "source", tmp_path, capfd)
    cut.unlink()
    assert f"names {cut.name}, absent here" in refused(tmp_path / "source", tmp_path, capfd, "--variant=fp16")


def test_indices_without_weights(place, tmp_path, capfd):
    (place / f"{STEM}.safetensors").rename(place / "other.safetensors")
    for name in ("", "-other"):
        (place / f"{STEM}{name}.safetensors.index.json").write_text("{}")
    assert f"{STEM}.safetensors.index.json and no weights" in refused(tmp_path / "source", tmp_path, capfd)


def test_a_part_without_the_variant_is_said(place, tmp_path, capfd):
    write_part(tmp_path / "source", VAE, random_leaves(VAE))
    as_variant(place, "fp16", load_file(place / f"{STEM}.safetensors"))
    assert run_import(tmp_path / "source", tmp_path / "ours", "--variant=fp16") == 0
    assert "vae: the files without a variant are read, there are none of fp16" in capfd.readouterr().out


def test_a_folder_with_a_gguf_file(tmp_path, capfd):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "wan.gguf").write_bytes(b"GGUF")
    assert f"give the GGUF file itself, as --source={tmp_path / 'source' / 'wan.gguf'}" in refused(tmp_path / "source", tmp_path, capfd)


def test_names_of_variants():
    names = {
        f"{STEM}.safetensors": "", f"{STEM}-00001-of-00002.safetensors": "", f"{STEM}.fp16.safetensors": "fp16",
        f"{STEM}.fp16-00001-of-00002.safetensors": "fp16", f"{STEM}-00001-of-00002.fp16.safetensors": "fp16",
        f"{STEM}.safetensors.index.json": "", f"{STEM}.safetensors.index.fp16.json": "fp16", f"{STEM}.fp16.safetensors.index.json": "fp16",
        f"{STEM}-other.safetensors": "",
    }  # fmt: skip
    assert {name: files.variant_of(files.Path(name), f"{STEM}*.safetensors") for name in names} == names
