"""The ComfyUI nodes on ComfyUI's own Wan model, against omnitransfer_torch: a tiny random network, a step with references.

    COMFYUI=CHECKOUT python -m pytest -n 0 tests/comfyui

CHECKOUT is a clone of ComfyUI; without it these tests are skipped.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types

import numpy as np
import pytest

from configs.base import DiTConfig
from omnitransfer_jax import tasks
from omnitransfer_jax.weights import wan_dit

torch = pytest.importorskip("torch")
CHECKOUT, TOLERANCE = os.environ.get("COMFYUI", ""), 1e-5
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="ComfyUI is not part of a clone: set COMFYUI to a checkout of it"),
    pytest.mark.filterwarnings("default"),  # its own
]
CONFIG = DiTConfig(dim=48, ffn_dim=64, num_layers=2, num_heads=2, text_dim=24, image_dim=1280, freq_dim=32, dtype="float32")


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules and the nodes, on the CPU."""
    sys.path.insert(0, CHECKOUT)
    stubs = {}
    for name, found in (("torchvision", "transforms"), ("torchsde", "BrownianTree"), ("torchaudio", "functional")):
        if importlib.util.find_spec(name) is None:  # other models of ComfyUI import it
            stubs[name] = sys.modules[name] = types.ModuleType(name)
            setattr(stubs[name], found, types.SimpleNamespace())
            stubs[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.ldm.wan.model
    import comfy.model_patcher
    import comfy.ops

    importlib.import_module("comfyui_omnitransfer.nodes")
    for name in stubs:
        del sys.modules[name]
    yield comfy
    sys.path.remove(CHECKOUT)


class Model(torch.nn.Module):
    """What a ModelPatcher holds, of a network whose latents need no scaling."""

    def __init__(self, network):
        super().__init__()
        self.diffusion_model, self.model_config = network, types.SimpleNamespace(unet_config={})

    def process_latent_in(self, latents):
        return latents


@pytest.fixture(scope="module")
def networks(comfy):
    """The same weights in diffusers' class, with omnitransfer_torch's processors, and in ComfyUI's."""
    from omnitransfer_torch.references import install

    diffusers = pytest.importorskip("diffusers")
    randomise, to_ours = (getattr(pytest.importorskip("tests.parity.bridge"), name) for name in ("randomise", "to_ours"))
    settings = {name: value for name, value in wan_dit.config_json(CONFIG).items() if not name.startswith("_")}
    theirs = randomise(diffusers.WanTransformer3DModel(**settings))
    ours = to_ours({name: p.detach().numpy() for name, p in theirs.named_parameters()}, wan_dit.entries(CONFIG, "diffusers"))
    network = comfy.ldm.wan.model.WanModel(
        model_type="i2v",
        in_dim=36,
        dim=48,
        ffn_dim=64,
        freq_dim=32,
        text_dim=24,
        num_heads=2,
        num_layers=2,
        operations=comfy.ops.disable_weight_init,
    )
    state = {}
    for entry in wan_dit.entries(CONFIG, "original"):
        leaf = ours[entry.ours] if entry.layer is None else ours[entry.ours][entry.layer]
        state[entry.theirs] = torch.tensor(np.ascontiguousarray(entry.layout.to_theirs(leaf)))
    network.load_state_dict(state)
    return theirs, install(theirs, CONFIG.rope_base, CONFIG.rope_top), network.eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expected(networks, x, text, image, references, stack):
    """The velocity by omnitransfer_torch."""
    theirs, streams, _ = networks
    frames, _, columns = (n // p for n, p in zip(x.shape[2:], CONFIG.patch, strict=True))
    caches, families = [], []
    for name, latents in references:
        task = tasks.TASKS[tasks.task_index(name)]
        families.append(task.family)
        rank = families.count(task.family) if stack else 1
        offset = (0, 0, rank * columns) if task.family == "temporal" else (rank * frames, 0, 0)
        channels = torch.cat([latents, torch.full_like(latents[:, :4], task.flag), latents], 1)
        with streams.recording(offset) as cache:
            theirs(channels, torch.zeros(1), torch.zeros(1, 1, 24), return_dict=False)
        caches.append(cache)
    with streams.reading(caches, 0 if image is None else image.shape[1]):
        return theirs(x, torch.full((len(x),), 700.0), text, image, return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize(
    ("names", "stack"), [(("motion",), False), (("id",), False), (("style", "motion"), False), (("camera", "effect"), True)]
)
def test_a_step(comfy, networks, names, stack, with_image):
    from comfyui_omnitransfer.nodes import OmniTransferApply, Reference

    x, text = draw(2, 36, 3, 8, 12), draw(2, 17, 24, seed=1)
    image = draw(2, 5, 1280, seed=2) if with_image else None
    references = [(name, draw(1, 16, 2, 6, 4, seed=3 + i)) for i, name in enumerate(names)]
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(Model(networks[2]), load_device=device, offload_device=device)
    (patched,) = OmniTransferApply().apply(patcher, tuple(Reference(*each) for each in references), stack)

    def velocity(model):
        options = {"wrappers": {kind: {key: list(each) for key, each in found.items()} for kind, found in model.wrappers.items()}}
        return networks[2](x, torch.full((2,), 700.0), text, clip_fea=image, transformer_options=options)

    wanted, found = expected(networks, x, text, image, references, stack), velocity(patched)
    assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCE
    assert torch.equal(velocity(patched), found), "the second step reads what was kept"
    (reader,) = patched.wrappers["diffusion_model"]["omnitransfer"]
    assert reader.kept
    reader.forget()
    assert not reader.kept
    if with_image:
        assert float((velocity(patcher) - wanted).norm() / wanted.norm()) > 1e-3, "the unpatched model reads no reference"


def test_the_tasks_are_those_of_the_project(comfy):
    from comfyui_omnitransfer.references import FLAGS, TEMPORAL

    assert {task.name: task.flag for task in tasks.TASKS} == FLAGS
    assert tuple(task.name for task in tasks.TASKS if task.family == "temporal") == TEMPORAL


def test_adapters_find_their_weights(comfy, networks, tmp_path, monkeypatch):
    """ComfyUI's own key map takes every tensor of a file that was exported, and only such a file is loaded."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    import comfyui_omnitransfer.nodes as nodes

    names = [entry.theirs.removesuffix(".weight") for entry in wan_dit.entries(CONFIG, "original") if entry.ours.endswith(".kernel")]
    blocks = [name for name in names if name.startswith("blocks.")]
    weights = dict(networks[2].named_parameters())
    tensors = {}
    for name in blocks:
        out, into = weights[f"{name}.weight"].shape
        tensors[f"diffusion_model.{name}.lora_A.weight"], tensors[f"diffusion_model.{name}.lora_B.weight"] = draw(4, into), draw(out, 4)
    for file, about in (("ours", {"method": "OmniTransfer"}), ("other", {"format": "pt"})):
        save_file(tensors, tmp_path / f"{file}.safetensors", about)
    monkeypatch.setattr(nodes.folder_paths, "get_full_path_or_raise", lambda kind, name: str(tmp_path / name))
    device = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(Model(networks[2]), load_device=device, offload_device=device)
    monkeypatch.setitem(sys.modules, "comfy.sd", types.ModuleType("comfy.sd"))
    with pytest.raises(ValueError, match="no adapters of OmniTransfer"):
        nodes.OmniTransferLoadLoRA().load(patcher, "other.safetensors", 1.0)
    seen = {}
    loader = types.ModuleType("comfy.sd")  # ComfyUI's needs torchvision
    loader.load_lora_for_models = lambda model, clip, lora, *strength: seen.update(lora) or (model, None)
    monkeypatch.setitem(sys.modules, "comfy.sd", loader)
    monkeypatch.setattr(comfy, "sd", loader, raising=False)
    nodes.OmniTransferLoadLoRA().load(patcher, "ours.safetensors", 1.0)
    assert seen.keys() == tensors.keys()
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    assert all(name.split(".lora_")[0] in keys for name in tensors), "ComfyUI knows every module by its name in the file"


def test_a_reference_of_a_wrong_size(comfy):
    from comfyui_omnitransfer.nodes import OmniTransferReference

    with pytest.raises(ValueError, match=r"a reference of 4 frames, 32 x 40: 4n\+1 frames"):
        OmniTransferReference().encode(None, torch.zeros(4, 32, 40, 3), "motion")
