"""From the libraries' own folders to our checkpoint and back: same bits, loaded over there strictly, all or nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import tokenizers
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import kinds, wan
from launch import command, export, import_weights
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.weights import files
from omnitransfer_jax.weights.parts import PARTS

torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
randomise = pytest.importorskip("tests.parity.bridge").randomise
load_torch_file = pytest.importorskip("safetensors.torch").load_file

SMOKE = wan.VARIANTS["smoke"]
CLASSES = {
    "dit": diffusers.WanTransformer3DModel,
    "vae": diffusers.AutoencoderKLWan,
    "text": transformers.UMT5EncoderModel,
    "image": transformers.CLIPVisionModel,
}
CONFIGS = {"text": transformers.UMT5Config, "image": transformers.CLIPVisionConfig}


def unigram_tokenizer():
    """A vocabulary of UMT5's kind (Unigram), of single letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in ascii_lowercase)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def oracle(part):
    """The library's own model of the smoke size, with random weights."""
    settings = {key: value for key, value in part.table.config_json(getattr(SMOKE, part.name)).items() if not key.startswith("_")}
    if part.name in CONFIGS:
        return randomise(CLASSES[part.name](CONFIGS[part.name].from_dict(settings)))
    return randomise(CLASSES[part.name](**settings))


def make_source(folder, dtype):
    """A diffusers folder as the libraries save it, the transformer in shards."""
    for part in PARTS:
        oracle(part).to(dtype).save_pretrained(folder / part.diffusers[0], max_shard_size="100KB")
    unigram_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), torch.float32)


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    assert run_import(source, folder) == 0
    return folder


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def source_and_export(request, tmp_path_factory):
    """A source, and what is left of it after the road to our checkpoint and back."""
    folder = tmp_path_factory.mktemp("road")
    source = make_source(folder / "source", request.param)
    assert run_import(source, folder / "ours") == 0
    assert run_export(folder / "ours", folder / "theirs") == 0
    return source, folder / "theirs"


def run_import(source, out, *args):
    return command.execute(import_weights.main, import_weights.FLAGS, [f"--source={source}", f"--out={out}", *args])


def run_export(folder, out, *args):
    flags = ["--config=wan:smoke", f"--checkpoint={folder}", f"--out={out}", *args]
    return command.execute(export.main, export.FLAGS, flags)


def read_all(folder, pattern="*.safetensors"):
    return {name: array for path in files.find(Path(folder), pattern) for name, array in load_file(path).items()}


def assert_same_bits(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        assert (array.shape, array.dtype, array.tobytes()) == (other[name].shape, other[name].dtype, other[name].tobytes()), name


def only_line(capfd):
    output = capfd.readouterr()
    assert output.err.count("\n") == 1, output.err
    return output.err


def test_import_says_what_it_did_and_what_comes_next(source, tmp_path, capfd):
    assert run_import(source, tmp_path / "ours") == 0
    output = capfd.readouterr()
    assert not output.err
    lines = output.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["dit", "vae", "text", "image", "tokenizer", "Next"]
    assert lines[0].startswith("dit: 87 tensors, 0.000")
    sample = f'--config=wan:smoke --checkpoint={tmp_path / "ours"} --first_frame=IMAGE --prompt="..." --out=out.mp4'
    assert lines[-1] == f"Next: python -m launch.sample {sample}"
    stored = model_folder.read_model(tmp_path / "ours")
    assert set(stored) == {part.name for part in PARTS}
    for name, part in stored.items():
        assert part == replace(type(part)(), **kinds.select(getattr(SMOKE, name), ["model"])), "a config.json tells model fields alone"


def test_diffusers_to_ours_to_diffusers_is_bit_identical(source_and_export):
    source, theirs = source_and_export
    for part in PARTS:
        folder, prefix = part.diffusers[0], "vision_model." if part.name == "image" else ""  # transformers 5 leaves it off
        expected = {prefix + name: array for name, array in read_all(source / folder).items()}
        assert_same_bits(read_all(theirs / folder), expected)
    vocabularies = [sorted((path.name, path.read_bytes()) for path in (root / "tokenizer").iterdir()) for root in source_and_export]
    assert vocabularies[0] == vocabularies[1]
    assert len(files.find(source / "transformer")) > 1 == len(files.find(theirs / "transformer"))


def test_the_libraries_load_the_export_and_miss_nothing(source_and_export):
    source, theirs = source_and_export
    for part in PARTS:
        model, information = CLASSES[part.name].from_pretrained(theirs / part.diffusers[0], output_loading_info=True)
        assert {kind: list(found) for kind, found in information.items() if len(found)} == {}, part.name
        expected = {name: value for path in files.find(source / part.diffusers[0]) for name, value in load_torch_file(path).items()}
        state = model.state_dict()
        assert set(expected) == set(state) - {"encoder.embed_tokens.weight"}  # UMT5's other name of `shared`
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value.to(state[name].dtype), rtol=0, atol=0)


def test_the_export_is_a_pipeline(ours, tmp_path):
    assert run_export(ours, tmp_path / "theirs", "--sampler.shift=4.5") == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "theirs")
    assert type(pipeline) is diffusers.WanImageToVideoPipeline
    assert all(getattr(pipeline, name) is not None for name in ("transformer", "vae", "text_encoder", "image_encoder", "tokenizer"))
    scheduler = pipeline.scheduler.config
    assert (scheduler.flow_shift, scheduler.prediction_type, scheduler.use_flow_sigmas) == (4.5, "flow_prediction", True)
    assert pipeline.image_processor.crop_size["height"] == SMOKE.image.image_size


def test_the_originals_layout_goes_both_ways(ours, tmp_path):
    """The transformer needs no config.json to be recognised; the original's cannot tell the smoke width of the image features."""
    assert run_export(ours, tmp_path / "original", "--layout=original") == 0
    assert json.loads((tmp_path / "original" / "config.json").read_text())["_class_name"] == "WanModel"
    (tmp_path / "original" / "config.json").unlink()
    assert (tmp_path / "original" / "google" / "umt5-xxl" / "tokenizer.json").is_file()
    assert run_import(tmp_path / "original", tmp_path / "again") == 0
    for part in PARTS:
        assert_same_bits(dict(model_folder.read_part(tmp_path / "again", part.name)), dict(model_folder.read_part(ours, part.name)))


def test_comfyuis_single_file_goes_both_ways(ours, tmp_path, capfd):
    assert run_export(ours, tmp_path / "comfy", "--layout=comfyui") == 0
    file = tmp_path / "comfy" / "diffusion_models" / "wan_smoke.safetensors"
    assert [path for path in (tmp_path / "comfy").rglob("*") if path.is_file()] == [file]
    with safe_open(file, "np") as stream:
        assert all(name.startswith("model.diffusion_model.") for name in stream.keys())  # noqa: SIM118 - no mapping
    assert run_import(file, tmp_path / "again") == 0
    assert_same_bits(dict(model_folder.read_part(tmp_path / "again", "dit")), dict(model_folder.read_part(ours, "dit")))
    assert "vae: not there; no video can be encoded or decoded" in capfd.readouterr().out


def test_weights_are_converted_on_request(source, ours, tmp_path):
    assert run_import(source, tmp_path / "ours", "--dtype=bfloat16") == 0
    for part in PARTS:
        kept, converted = dict(model_folder.read_part(ours, part.name)), dict(model_folder.read_part(tmp_path / "ours", part.name))
        assert_same_bits(converted, {path: leaf.astype(files.DTYPES["BF16"]) for path, leaf in kept.items()})


def damage(folder):
    """One tensor missing, one too many, one of another shape, one cut off, in two parts."""
    paths = files.find(folder / "vae")
    tensors = load_file(paths[0])
    missing, misshaped = sorted(tensors)[:2]
    del tensors[missing]
    tensors[misshaped] = np.zeros((3, *tensors[misshaped].shape), np.float32)
    tensors["surplus"] = np.zeros(3, np.float32)
    save_file(tensors, paths[0])
    path = files.find(folder / "transformer")[0]
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    (cut,) = [name for name, tensor in files.inspect([path]).items() if tensor.truncated]
    return missing, misshaped, cut


def test_everything_wrong_is_said_at_once_and_nothing_is_written(source, tmp_path, capfd):
    shutil.copytree(source, tmp_path / "source")
    missing, misshaped, cut = damage(tmp_path / "source")
    assert run_import(tmp_path / "source", tmp_path / "ours") == 2
    message = only_line(capfd)
    for text in ("nothing imported", f"vae: 1 missing: {missing}", "vae: 1 unexpected: surplus", f"1 misshaped: {misshaped} is (3, ", cut):
        assert text in message
    assert "dit: 1 cut off, so download again" in message
    assert not (tmp_path / "ours").exists()


def test_a_part_that_exists_is_not_overwritten(source, ours, capfd):
    before = sorted(path.stat().st_mtime_ns for path in ours.rglob("*"))
    assert run_import(source, ours) == 2
    assert f"{ours / 'dit'} exists already, so give another --out" in only_line(capfd)
    assert sorted(path.stat().st_mtime_ns for path in ours.rglob("*")) == before


def test_parts_can_come_one_by_one(source, tmp_path, capfd):
    for part in PARTS:
        shutil.copytree(source / part.diffusers[0], tmp_path / part.name / part.diffusers[0])
        assert run_import(tmp_path / part.name, tmp_path / "ours") == 0
        capfd.readouterr()
    assert set(model_folder.read_model(tmp_path / "ours")) == set(CLASSES)


def test_a_folder_of_another_network_is_said_to_be_left_out(source, tmp_path, capfd):
    for name in ("transformer", "controlnet"):
        shutil.copytree(source / "transformer", tmp_path / "source" / name)
    assert run_import(tmp_path / "source", tmp_path / "ours") == 0
    assert "controlnet: not imported; this project has no such network" in capfd.readouterr().out
    assert set(model_folder.read_model(tmp_path / "ours")) == {"dit"}


def test_an_interrupted_export_can_be_run_again(ours, tmp_path, monkeypatch, capfd):
    write, calls = export.convert.save, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    monkeypatch.setattr(export.convert, "save", full)
    assert run_export(ours, tmp_path / "theirs") == 1
    assert only_line(capfd).startswith("writing: No space left on device")
    assert not list(tmp_path.iterdir())
    assert run_export(ours, tmp_path / "theirs") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_interrupted_import_can_be_run_again(source, tmp_path, monkeypatch, capfd):
    save, calls = model_folder.save_part, []

    def full(folder, name, leaves):
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(folder, name, leaves)

    monkeypatch.setattr(model_folder, "save_part", full)
    for name in ("transformer", "vae"):
        shutil.copytree(source / name, tmp_path / "source" / name)
    assert run_import(tmp_path / "source", tmp_path / "ours") == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("writing: No space left on device")
    assert not list((tmp_path / "ours").iterdir())
    (tmp_path / "ours" / ".unfinished" / "dit").mkdir(parents=True)  # a process was killed
    assert run_import(tmp_path / "source", tmp_path / "ours") == 0
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"dit", "vae", "model.json", "digests.json"}


def test_sizes_nobody_published_need_a_config_file(tmp_path, capfd):
    save_file({"blocks.0.modulation": np.zeros((1, 6, 8), np.float32)}, tmp_path / "dit.safetensors")
    assert run_import(tmp_path / "dit.safetensors", tmp_path / "ours") == 2
    message = only_line(capfd)
    assert "1 misshaped: blocks.0.modulation is (1, 6, 8), not (1, 6, 48)" in message
    assert "there is no config.json, and this is the published size that comes closest" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("models_t5_umt5-xxl-enc-bf16.pth", b"\x80", "a pickle, which can run code when it is read; convert it"),
        ("notes.txt", b"", "neither a diffusers folder (transformer/, vae/, text_encoder/, image_encoder/) nor the original's"),
        ("transformer/config.json", b"{}", "no diffusion_pytorch_model*.safetensors in it"),
        ("vae/diffusion_pytorch_model.bin", b"\x80", "a pickle"),
    ],
)
def test_folders_that_cannot_be_imported(tmp_path, capfd, name, content, message):
    (tmp_path / "source" / name).parent.mkdir(parents=True)
    (tmp_path / "source" / name).write_bytes(content)
    assert run_import(tmp_path / "source", tmp_path / "ours") == 2
    assert message in only_line(capfd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(qk_norm="other"), "qk_norm='other'"),
        (lambda config: config.pop("ffn_dim"), "config.json: no ffn_dim: all are needed"),
        (lambda config: config.update(num_attention_heads=0), "dit.dim=0: at least 1"),
        (lambda config: config.update(num_layers="many"), "config.json: num_layers='many': a whole number"),
    ],
)
def test_a_config_file_we_cannot_follow_is_named(source, tmp_path, capfd, change, message):
    shutil.copytree(source / "transformer", tmp_path / "source" / "transformer")
    path = tmp_path / "source" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    assert run_import(tmp_path / "source", tmp_path / "ours") == 2
    line = only_line(capfd)
    assert str(path) in line
    assert message in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=wan"], "made with dit.dim=48, the configuration has 5120"),
        (["--dit.ffn_dim=64"], "made with dit.ffn_dim=96, the configuration has 64"),
        (["--checkpoint=no/such/folder"], "--checkpoint=no/such/folder: no such folder; give --checkpoint=DIR, a folder of"),
        (["--layout=onnx"], "--layout=onnx: value should be one of <diffusers|original|comfyui>"),
        (["--out={used}"], "this command reads it; give another name"),
    ],
)
def test_exports_that_cannot_be(ours, tmp_path, capfd, args, message):
    assert run_export(ours, tmp_path / "theirs", *(arg.format(used=ours) for arg in args)) == 2
    assert message in only_line(capfd)
    assert not (tmp_path / "theirs").exists()


def test_only_the_parts_that_are_there_are_exported(ours, tmp_path):
    shutil.copytree(ours / "dit", tmp_path / "ours" / "dit")
    model_folder.write_model(tmp_path / "ours", {"dit": SMOKE.dit})
    assert run_export(tmp_path / "ours", tmp_path / "theirs") == 0
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert index["vae"] == index["text_encoder"] == index["image_encoder"] == index["tokenizer"] == [None, None]
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"model_index.json", "transformer", "scheduler", "image_processor"}
