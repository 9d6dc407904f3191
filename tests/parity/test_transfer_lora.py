"""stage1:lora in the files that it is exported to: diffusers, PEFT and ours compute the same velocity; its training goes on bit for bit.

The quick tests draw the adapters at random; the slow ones train them for 20 steps: python -m pytest -n 0 -m slow FILE.
"""

import json
from dataclasses import replace
from functools import partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from orbax.checkpoint import v1 as ocp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import stage1
from configs.base import LoRAConfig
from configs.errors import RequestError
from configs.run import CheckpointConfig, TransferTrainConfig
from launch.exporting import adapters as exporting
from omnitransfer_jax import load_models, tasks
from omnitransfer_jax.folders import run_folder
from omnitransfer_jax.mesh import make_mesh
from omnitransfer_jax.methods import transfer_lora
from omnitransfer_jax.models import transfer_adapters
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.omnitransfer import make_reference
from omnitransfer_jax.train import loop
from omnitransfer_jax.train.step import TrainState
from omnitransfer_torch import OmniTransferPipeline
from omnitransfer_torch.one_velocity import velocity as velocity_of_export
from tests.compare import LOG, relative_l2
from tests.parity import exported
from tests.train import tiny_run

TOLERANCE = 1e-5
SIZE = replace(tiny_run.TINY, vae=replace(tiny_run.TINY.vae, base_dim=4, num_res_blocks=1))
ADAPTER = LoRAConfig(rank=4, alpha=8.0, targets=stage1.TARGETS)
TRAIN = TransferTrainConfig(steps=20, batch_size=2)


def configured(origin, base="dtype", **fields):
    config = stage1.lora(SIZE, ADAPTER, replace(TRAIN, init_from=str(origin)), learning_rate=3e-3)
    return replace(config, base=base, **fields)


def train(config, workdir):
    mesh = make_mesh(config.mesh)
    trained = transfer_lora.objective(config, tiny_run.EMPTY_TEXT)
    base = transfer_lora.load_base(config, trained, mesh)
    loop.train(trained, config, workdir, mesh, tiny_run.batches(config), base=base)
    return base


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return exported.import_random(tmp_path_factory.mktemp("imported"), SIZE)


def write_run(config, workdir, spread):
    """A run with one checkpoint whose adapters were not trained: `up` is random of this size."""
    draw, zero = np.random.default_rng(3), jnp.zeros((), jnp.int32)
    params = {
        path: jnp.asarray(spread * draw.standard_normal(x.shape).astype(np.float32)) if path.endswith(".up") else x
        for path, x in transfer_lora.init(config).items()
    }
    run_folder.write_config(workdir, config)
    with run_folder.open_checkpoints(workdir, CheckpointConfig()) as checkpoints:
        data = iter(grain.MapDataset.range(3).to_iter_dataset())
        run_folder.save(checkpoints, 20, TrainState(zero + 20, params, {}, {}, {}, zero), data)
    return workdir


@pytest.fixture(scope="module")
def trained(tmp_path_factory, origin):
    workdir = tmp_path_factory.mktemp("lora") / "run"
    train(configured(origin), workdir)
    return workdir


@pytest.fixture(scope="module", params=["drawn", pytest.param("trained", marks=pytest.mark.slow)])
def run(request, tmp_path_factory, origin):
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return write_run(configured(origin), tmp_path_factory.mktemp("drawn") / "run", 0.2)


@pytest.fixture(scope="module")
def written(tmp_path_factory, origin, run):
    """The folders of both layouts."""
    folder = tmp_path_factory.mktemp("written")
    for layout in ("comfyui", "diffusers"):
        exporting.write(configured(origin), str(run), layout, folder / layout, "stage1:lora_smoke")
    return folder


def inputs():
    draw = np.random.default_rng(1)

    def normal(*shape):
        return draw.standard_normal(shape).astype(np.float32)

    return normal(1, 2, 4, 8, 36), normal(1, 2, 4, 4, 16), normal(1, 512, 8), normal(1, 257, 8)


def ours(config, folder, reference=False):
    """The velocity of a request."""
    dit = load_models.load_dit(str(folder), config, make_mesh(config.mesh))
    target, latents, text, image = map(jnp.asarray, inputs())
    placed = make_reference(latents, jnp.asarray([tasks.task_index("motion")]), dit.grid(target))
    return np.asarray(jax.jit(lambda dit: dit(target, jnp.full((1,), 500.0), text, image, references=(placed,) if reference else ()))(dit))


@torch.no_grad()
def plain(transformer):
    """Plain Wan's velocity of the same request, without a reference."""
    target, _, text, image = map(torch.from_numpy, inputs())
    out = transformer(target.permute(0, 4, 1, 2, 3), torch.full((1,), 500.0), text, image).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def transformer_of(origin):
    return WanTransformer3DModel.from_pretrained(origin.parent / "source" / "transformer")


def stored(workdir):
    folder = run_folder.latest(workdir)
    leaves = ocp.metadata(folder, checkpointable_name="trainable").metadata
    return ocp.load(folder, {path: np.zeros(x.shape, x.dtype) for path, x in leaves.items()}, checkpointable_name="trainable")


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_alone(trained, origin):
    found = stored(trained)
    assert all(".lora." in path for path in found)
    assert len(found) == 2 * 12
    assert all(x.any() for path, x in found.items() if path.endswith(".up")), "every adapter has learnt"
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20
    assert relative_l2(ours(configured(origin), trained), ours(configured(origin), origin)) > 1e-2


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained, origin, tmp_path):
    config = configured(origin)
    train(replace(config, train=replace(config.train, steps=8)), tmp_path / "run")
    assert run_folder.steps_done(tmp_path / "run") == 8
    train(config, tmp_path / "run")
    whole, resumed = stored(trained), stored(tmp_path / "run")
    assert [path for path in whole if not np.array_equal(whole[path], resumed[path])] == []


def test_diffusers_loads_comfyuis_file(written, run, origin):
    file = written / "comfyui" / "loras" / "stage1_lora_smoke.safetensors"
    with safe_open(file, "np") as stream:
        about, names = stream.metadata(), set(stream.keys())
    assert "reference branch" in about["needs"]
    assert json.loads(about["omnitransfer"])["tasks"][1]["flag"] == -3
    assert "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight" in names
    assert not any(name.endswith("alpha") for name in names)
    expected = ours(configured(origin), run)
    for path in (file, written / "diffusers" / "pytorch_lora_weights.safetensors"):
        pipe = WanImageToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer_of(origin)
        )
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        assert relative_l2(plain(pipe.transformer), expected) <= TOLERANCE
    assert relative_l2(plain(transformer_of(origin)), expected) > 1e-2


def test_with_a_reference_in_pytorch(written, run, origin, tmp_path, monkeypatch):
    """omnitransfer_torch on the base's export, with the adapters loaded as diffusers loads them."""
    out = exported.exported(origin, tmp_path / "base", "stage1:smoke", *fields_of(SIZE))
    prepare = OmniTransferPipeline.prepare

    def with_adapters(pipe, transfer):
        prepare(pipe, transfer)
        pipe.load_lora_weights(written / "comfyui" / "loras", weight_name="stage1_lora_smoke.safetensors")

    monkeypatch.setattr(OmniTransferPipeline, "prepare", with_adapters)
    found = velocity_of_export(out, "motion", 500.0, *inputs())
    assert relative_l2(found, ours(configured(origin), run, reference=True)) <= TOLERANCE


def fields_of(config):
    """The flags that make `stage1:smoke` this size."""
    smoke, flags = stage1.get_config("smoke"), []
    for part in ("dit", "text", "image", "video"):
        a, b = getattr(smoke, part), getattr(config, part)
        flags += [f"--{part}.{name}={value}" for name, value in vars(b).items() if vars(a)[name] != value]
    return flags


def test_peft_both_ways(written, run, origin):
    """PEFT loads its form; read here again it is what was trained, bit for bit."""
    folder, expected = written / "diffusers", ours(configured(origin), run)
    assert relative_l2(plain(PeftModel.from_pretrained(transformer_of(origin), folder).eval()), expected) <= TOLERANCE
    again = load_models.given_adapters(configured(origin, adapter_from=str(folder)))
    trained = {path.removeprefix("dit."): x for path, x in stored(run).items()}
    assert again.keys() == trained.keys()
    assert [path for path, x in again.items() if not np.array_equal(x, trained[path])] == []


@pytest.mark.parametrize("form", ["peft", "comfyui", "musubi"])
def test_an_adapter_from_elsewhere_is_read(written, run, origin, tmp_path, form):
    expected = ours(configured(origin), run)
    if form == "peft":
        targets = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|ffn\.net\.(0\.proj|2))"
        theirs = get_peft_model(transformer_of(origin), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        theirs.save_pretrained(tmp_path)
        source, expected = tmp_path, plain(theirs.eval())
    else:
        source = written / "comfyui" / "loras" / "stage1_lora_smoke.safetensors"
    if form == "musubi":
        source = as_musubi(source, tmp_path / "musubi.safetensors")
    found = ours(configured(origin, adapter_from=str(source)), origin)
    assert relative_l2(found, expected) <= TOLERANCE


def as_musubi(source, path):
    """The same adapters under musubi-tuner's names, with an alpha of their own."""
    tensors = {}
    for name, x in load_file(source).items():
        module, half, _ = name.removeprefix("diffusion_model.").rsplit(".", 2)
        place = f"lora_unet_{module.replace('.', '_')}"
        up = half == "lora_B"
        tensors[f"{place}.lora_{'up' if up else 'down'}.weight"] = x * np.float32(2) if up else x
        tensors[f"{place}.alpha"] = np.array(len(x) / 2 if not up else x.shape[1] / 2, np.float32)
    save_file(tensors, path)
    return path


def test_training_can_start_from_it(written, origin):
    config = configured(origin, adapter_from=str(written / "diffusers"))
    started = transfer_lora.init(config)
    given = load_models.given_adapters(config)
    assert all(np.array_equal(started[f"dit.{path}"], x) for path, x in given.items())


@pytest.mark.slow
def test_an_int8_base(trained, origin, tmp_path):
    """It trains, and what it computes differs from the base in float32 by what rounding of kernels makes."""
    config = configured(origin, base="int8")
    base = train(replace(config, train=replace(config.train, steps=2)), tmp_path / "run")
    assert base["dit.blocks.ffn.up.kernel"].dtype == jnp.int8
    model = abstract(partial(transfer_adapters.make_model, config))
    assert set(base) == {path for path in flat_params(model) if ".lora." not in path}
    exact = load_models.load_dit(str(origin), config, make_mesh(config.mesh))
    kernel = np.asarray(exact.blocks.ffn.up.kernel.get_value())
    restored = np.asarray(base["dit.blocks.ffn.up.kernel"], np.float32) * np.asarray(base["dit.blocks.ffn.up.kernel_scale"])[:, None]
    step = np.abs(kernel).max(-2, keepdims=True) / 127
    assert (np.abs(restored - kernel) <= step / 2 + 1e-7).all()
    LOG.info("int8 kernels: relative error %.1e", np.linalg.norm(restored - kernel) / np.linalg.norm(kernel))
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"] for folder in (trained, tmp_path / "run")]
    LOG.info("loss of the first step %.6f, in int8 %.6f", *first)
    assert 0 < abs(first[0] - first[1]) < 1e-2 * first[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapter": replace(ADAPTER, rank=8)}, "its rank is 4; give --adapter.rank=4"),
        ({"adapter": replace(ADAPTER, targets=(r"blocks\.ffn\..*",))}, r"it adapts other projections than adapter.targets: \d+ more"),
        ({"adapter_from": "absent"}, "adapter_from=absent: no such file or folder"),
    ],
)
def test_another_adapter_is_refused(written, origin, fields, message):
    config = configured(origin, **({"adapter_from": str(written / "diffusers")} | fields))
    with pytest.raises(RequestError, match=message):
        load_models.given_adapters(config)


def test_wrong_requests(run, origin, tmp_path):
    with pytest.raises(RequestError, match="a run, and adapters stand on imported weights"):
        transfer_lora.require_imported(configured(run))
    with pytest.raises(RequestError, match="image_key and image_value: name both or none"):
        transfer_lora.objective(configured(origin, adapter=replace(ADAPTER, targets=(r"blocks\.cross_attention\.image_key",))))
    fresh = write_run(configured(origin), tmp_path / "fresh", 0.0)
    with pytest.raises(RequestError, match="all adapters are zero"):
        exporting.write(configured(origin), str(fresh), "comfyui", tmp_path / "out", "stage1:lora")
    assert [path.name for path in tmp_path.iterdir()] == ["fresh"]
