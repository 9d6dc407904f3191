"""The image tower against transformers' CLIPVisionModel, its preprocessing against the original's, gradients too."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from configs.base import CLIPVisionConfig
from omnitransfer_jax.models.clip_vision import CLIPVision, preprocess
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.weights.clip_vision import OPTIONAL_PREFIXES, config_from_json, config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import randomise, tensors, to_ours

SMALL = CLIPVisionConfig(dim=32, ffn_dim=48, num_layers=3, num_heads=2, image_size=28, eps=1e-3, dtype="float32")
FINE = CLIPVisionConfig(dim=24, ffn_dim=64, num_layers=4, num_heads=3, image_size=40, patch=8, eps=1e-3, dtype="float32")
PREFIX = "vision_model."
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Wan2.1 clip.py


def oracle(config: CLIPVisionConfig) -> torch.nn.Module:
    return randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig.from_dict(config_json(config))))


def file_of(theirs: torch.nn.Module) -> dict[str, np.ndarray]:
    """The oracle's tensors under the names of the published file."""
    return {PREFIX + name: x for name, x in tensors(theirs).items()}


def original_of(theirs: dict[str, np.ndarray], config: CLIPVisionConfig) -> dict[str, np.ndarray]:
    """The same tensors under Wan2.1's names (clip.py): query, key and value in one, in this order."""
    embeddings = f"{PREFIX}embeddings"
    original = {
        "visual.cls_embedding": theirs[f"{embeddings}.class_embedding"].reshape(1, 1, -1),
        "visual.pos_embedding": theirs[f"{embeddings}.position_embedding.weight"].reshape(1, -1, config.dim),
        "visual.patch_embedding.weight": theirs[f"{embeddings}.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        original[f"visual.pre_norm.{kind}"] = theirs[f"{PREFIX}pre_layrnorm.{kind}"]
        original[f"visual.post_norm.{kind}"] = theirs[f"{PREFIX}post_layernorm.{kind}"]
        for i in range(config.num_layers):
            ours, layer = f"visual.transformer.{i}", f"{PREFIX}encoder.layers.{i}"
            qkv = [theirs[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            original[f"{ours}.attn.to_qkv.{kind}"] = np.concatenate(qkv)
            original[f"{ours}.attn.proj.{kind}"] = theirs[f"{layer}.self_attn.out_proj.{kind}"]
            original[f"{ours}.norm1.{kind}"] = theirs[f"{layer}.layer_norm1.{kind}"]
            original[f"{ours}.norm2.{kind}"] = theirs[f"{layer}.layer_norm2.{kind}"]
            original[f"{ours}.mlp.0.{kind}"] = theirs[f"{layer}.mlp.fc1.{kind}"]
            original[f"{ours}.mlp.2.{kind}"] = theirs[f"{layer}.mlp.fc2.{kind}"]
    return original


def to_theirs(ours: dict[str, np.ndarray], table) -> dict[str, np.ndarray]:
    """The way back of `to_ours`; parts are joined in their order."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for e in table:
        leaf = ours[e.ours] if e.layer is None else ours[e.ours][e.layer]
        parts.setdefault(e.theirs, {})[e.part[0]] = e.layout.to_theirs(leaf)
    return {name: np.concatenate([p[i] for i in sorted(p)]) for name, p in parts.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("config", [SMALL, FINE], ids=["small", "fine"])
def test_forward_and_gradients(config):
    theirs, table, draw = oracle(config), entries(config, "diffusers"), np.random.default_rng(1)
    model = abstract(lambda rngs: CLIPVision(config, rngs=rngs))
    ours = with_params(model, {path: jnp.asarray(x) for path, x in to_ours(file_of(theirs), table).items()})
    pixels = draw.standard_normal((2, config.image_size, config.image_size, 3), np.float32)
    probe = draw.standard_normal((2, 1 + (config.image_size // config.patch) ** 2, config.dim), np.float32)

    leaf = torch.tensor(pixels, requires_grad=True)
    expected = theirs(pixel_values=leaf.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
    (expected * torch.tensor(probe)).sum().backward()

    def loss(model, pixels):
        out = model(pixels)
        return (out * probe).sum(), out

    (_, out), (grads, pixel_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(ours, jnp.asarray(pixels))
    assert relative_l2(out, expected.detach()) <= 1e-5
    assert relative_l2(pixel_grads, leaf.grad) <= 1e-4
    unused = {PREFIX + name for name, p in theirs.named_parameters() if p.grad is None}
    assert {e.ours.split(".")[0] for e in table if e.theirs in unused} == {"last_layer", "post_norm"}
    wanted = {PREFIX + name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in theirs.named_parameters()}
    for path, gradient in to_ours(wanted, table).items():
        found = flat_params(grads)[path]
        if path.startswith(("last_layer.", "post_norm.")):
            assert not np.any(found), path
        elif path.endswith("attention.key.bias"):  # a constant over the keys leaves softmax as it is: zero up to rounding
            assert np.abs(found).max() <= 1e-4 * np.abs(flat_params(grads)["layers.attention.value.bias"]).max(), path
        else:
            assert relative_l2(found, gradient) <= 1e-4, path


@pytest.mark.parametrize(("height", "width", "size"), [(61, 37, 28), (19, 33, 40), (240, 416, 224)])
def test_preprocess(height, width, size):
    image = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    squashed = torch.nn.functional.interpolate(
        torch.tensor(image).permute(0, 3, 1, 2), size=(size, size), mode="bicubic", align_corners=False
    )
    expected = ((squashed * 0.5 + 0.5) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert relative_l2(preprocess(jnp.asarray(image), size), expected.permute(0, 2, 3, 1)) <= 1e-5


def test_names_shapes_and_both_layouts():
    file = file_of(oracle(FINE))
    diffusers, original = entries(FINE, "diffusers"), entries(FINE, "original")
    ours = to_ours(file, diffusers)
    model = abstract(lambda rngs: CLIPVision(FINE, rngs=rngs))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in flat_params(model).items()}
    assert same(to_theirs(ours, diffusers), file)
    assert same(to_ours(original_of(file, FINE), original), ours)
    assert same(to_theirs(ours, original), original_of(file, FINE))


@pytest.mark.parametrize("prefix", [*OPTIONAL_PREFIXES, ""])
def test_transformers_loads_what_we_write(tmp_path, prefix):
    theirs, table = oracle(SMALL), entries(SMALL, "diffusers")
    exported = to_theirs(to_ours(file_of(theirs), table), table)
    file = {prefix + k.removeprefix(PREFIX): np.ascontiguousarray(v) for k, v in exported.items()}
    (tmp_path / "config.json").write_text(json.dumps(config_json(SMALL)))
    save_file(file, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert same(tensors(loaded), tensors(theirs))


def test_config_as_transformers_writes_it():
    read = config_from_json(oracle(FINE).config.to_dict())
    assert read == CLIPVisionConfig(dim=24, ffn_dim=64, num_layers=4, num_heads=3, image_size=40, patch=8, eps=1e-3)
