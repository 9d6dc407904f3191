"""Wan2.2's folders to our checkpoint and back, in diffusers', the original's and ComfyUI's layout: same bits, each expert in its place."""

import json

import pytest
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanImageToVideoPipeline, WanTransformer3DModel
from etils import epath
from safetensors.numpy import load_file

from configs import wan
from launch import command, export, import_weights
from omnitransfer_jax.folders import model_folder
from omnitransfer_jax.weights import files, wan_dit, wan_vae
from omnitransfer_jax.weights.parts import LOW_NOISE, PARTS
from tests.parity.bridge import randomise

SMOKE = wan.get_config("smoke_2_2")
EXPERTS = (PARTS[0], LOW_NOISE)
LAYOUTS = {  # where each expert lies
    "diffusers": ("transformer", "transformer_2"),
    "original": ("high_noise_model", "low_noise_model"),
}

THEIRS = dict(zip(LAYOUTS["original"], LAYOUTS["diffusers"], strict=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A diffusers folder of both experts, in shards, and the autoencoder."""
    folder = tmp_path_factory.mktemp("source")
    settings = {k: v for k, v in wan_dit.config_json(SMOKE.dit).items() if not k.startswith("_")}
    for seed, name in enumerate(LAYOUTS["diffusers"]):
        randomise(WanTransformer3DModel(**settings), seed).save_pretrained(folder / name, max_shard_size="100KB")
    settings = {k: v for k, v in wan_vae.config_json(SMOKE.vae).items() if not k.startswith("_")}
    randomise(AutoencoderKLWan(**settings)).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    assert run_import(source, folder) == 0
    return folder


def run_import(source, out):
    return command.execute(import_weights.main, import_weights.FLAGS, [f"--source={source}", f"--out={out}"])


def run_export(folder, out, layout):
    flags = ["--config=wan:smoke_2_2", f"--checkpoint={folder}", f"--layout={layout}", f"--out={out}"]
    return command.execute(export.main, export.FLAGS, flags)


def read(folder):
    return {
        name: array.tobytes()
        for path in files.find(folder, "diffusion_pytorch_model*.safetensors")
        for name, array in load_file(path).items()
    }


def part_bits(folder, part):
    return {path: leaf.tobytes() for path, leaf in model_folder.read_part(folder, part.name)}


def test_diffusers_to_ours_to_diffusers(source, ours, tmp_path):
    assert run_export(ours, tmp_path / "theirs", "diffusers") == 0
    first, second = (read(source / name) for name in LAYOUTS["diffusers"])
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)
    for name, expected in zip(LAYOUTS["diffusers"], (first, second), strict=True):
        assert read(tmp_path / "theirs" / name) == expected
    index = json.loads((tmp_path / "theirs" / "model_index.json").read_text())
    assert index["image_encoder"] == index["image_processor"] == [None, None]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "theirs", text_encoder=None, tokenizer=None)
    assert type(pipeline) is WanImageToVideoPipeline
    assert pipeline.config.boundary_ratio == 0.9
    for name in LAYOUTS["diffusers"]:
        theirs = {key: value.numpy().tobytes() for key, value in getattr(pipeline, name).state_dict().items()}
        assert theirs == read(source / name)


@pytest.mark.parametrize("config_json", [True, False], ids=["config.json", "no_config.json"])
def test_the_originals_layout_goes_both_ways(source, ours, tmp_path, config_json):
    """Its config.json does not say that there is no image branch, the tensors do; and it does not know the smoke text width."""
    assert run_export(ours, tmp_path / "original", "original") == 0
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == ["Wan2.1_VAE.safetensors", *sorted(LAYOUTS["original"])]
    for name in LAYOUTS["original"]:
        path = tmp_path / "original" / name / "config.json"
        assert read(path.parent)["head.head.weight"] == read(source / THEIRS[name])["proj_out.weight"]
        assert json.loads(path.read_text())["model_type"] == "i2v"
        if not config_json:
            path.unlink()
    assert run_import(tmp_path / "original", tmp_path / "again") == 0
    stored = model_folder.read_model(tmp_path / "again")
    assert stored.keys() == model_folder.read_model(ours).keys()
    assert stored["dit"].image_dim is stored["dit_low_noise"].image_dim is None
    for part in EXPERTS:
        assert part_bits(tmp_path / "again", part) == part_bits(ours, part)


def test_comfyuis_files_come_one_by_one(source, ours, tmp_path, capfd):
    """The file's name says which expert it is; until both are there, the next command is told what is absent."""
    assert run_export(ours, tmp_path / "comfy", "comfyui") == 0
    found = sorted((tmp_path / "comfy" / "diffusion_models").iterdir())
    assert [path.name for path in found] == ["wan_smoke_2_2_high_noise.safetensors", "wan_smoke_2_2_low_noise.safetensors"]
    for path, name in zip(found, LAYOUTS["diffusers"], strict=True):
        weight = load_file(path)["model.diffusion_model.head.head.weight"]
        assert weight.tobytes() == read(source / name)["proj_out.weight"]
    capfd.readouterr()
    assert run_import(found[0], tmp_path / "again") == 0
    printed = capfd.readouterr().out
    assert "dit_low_noise: not there; Wan2.2 cannot be sampled" in printed
    assert "image: not there" not in printed
    assert set(model_folder.read_model(tmp_path / "again")) == {"dit"}
    assert run_import(found[1], tmp_path / "again") == 0
    printed = capfd.readouterr().out
    assert "dit_low_noise: not there" not in printed
    assert "--config=wan:smoke_2_2" in printed
    for part in EXPERTS:
        assert part_bits(tmp_path / "again", part) == part_bits(ours, part)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("wan2.2_i2v_low_noise_14B_fp16.safetensors", "dit_low_noise"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "dit_low_noise"),
        ("Wan2.2-T2V-A14B-LowNoise.safetensors", "dit_low_noise"),
        ("wan2.2_i2v_high_noise_14B_fp16.safetensors", "dit"),
        ("Wan2_2-I2V-A14B-HIGH_bf16.safetensors", "dit"),
        ("wan2.1_i2v_480p_14B_bf16.safetensors", "dit"),
        ("yellow_flowers.safetensors", "dit"),
    ],
)
def test_what_published_file_names_say(tmp_path, name, part):
    (tmp_path / name).touch()
    assert [each.name for each, *_ in import_weights.locate(tmp_path / name)] == [part]


@pytest.mark.parametrize(("parts", "variant"), [(("dit",), "t2v_14b"), (("dit", "dit_low_noise"), "t2v_2_2_14b")])
def test_the_next_command_knows_wan2_2_by_its_second_expert(tmp_path, capsys, parts, variant):
    """One transformer of this size is Wan2.1's."""
    model_folder.write_model(tmp_path, dict.fromkeys(parts, wan.T2V_14B))
    import_weights.report(epath.Path(tmp_path))
    assert f"--config=wan:{variant} " in capsys.readouterr().out


def test_two_models_in_one_folder(tmp_path, capfd):
    for name in ("high_noise_model/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert run_import(tmp_path, tmp_path / "ours") == 2
    assert "diffusion_pytorch_model*.safetensors beside high_noise_model/, two models in one folder" in capfd.readouterr().err
