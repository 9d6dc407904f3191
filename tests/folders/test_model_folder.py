"""Our checkpoint: parts come back as they went in, are whole or absent, and say which model they are."""

import json
import weakref
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from configs import wan
from configs.errors import RequestError
from configs.run import Config
from omnitransfer_jax.folders import model_folder

RNG = np.random.default_rng(0)
PARAMS = {
    "blocks.attention.query.kernel": RNG.standard_normal((2, 6, 4)).astype(np.float32),
    "blocks.norm.scale": RNG.standard_normal((2, 4)).astype(ml_dtypes.bfloat16),
    "head.bias": RNG.standard_normal(5).astype(np.float16),
    "patch_embedding": RNG.standard_normal((1, 2, 2, 3, 4)).astype(np.float32),
}
SMOKE = wan.VARIANTS["smoke"]


def assert_same_bits(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        array, expected = np.asarray(array), np.asarray(other[name])
        assert (array.shape, array.dtype, array.tobytes()) == (expected.shape, expected.dtype, expected.tobytes()), name


def test_a_part_in_one_file_is_read_as_any_other(tmp_path):
    """Whole, cast, placed, shapes alone; and it says what it is not."""
    model_folder.save_file(tmp_path, "dit", PARAMS)
    assert_same_bits(model_folder.load_part(tmp_path, "dit", PARAMS), PARAMS)
    read = dict(model_folder.read_part(tmp_path, "dit"))
    assert all(isinstance(leaf, np.ndarray) for leaf in read.values())
    assert_same_bits(read, PARAMS)
    leaves = model_folder.part_leaves(tmp_path, "dit")
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {p: (a.shape, a.dtype) for p, a in PARAMS.items()}
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), jax.P("data"))
    loaded = model_folder.load_part(tmp_path, "dit", PARAMS, sharding, "bfloat16")
    assert {leaf.sharding for leaf in loaded.values()} == {sharding}
    assert_same_bits(loaded, {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in PARAMS.items()})
    with pytest.raises(RequestError, match=r"dit: not the dit of this configuration: head.bias is \(5,\), not \(6,\)"):
        model_folder.load_part(tmp_path, "dit", {**PARAMS, "head.bias": np.zeros(6)})
    assert [path.name for path in tmp_path.iterdir()] == ["dit.safetensors"]


@pytest.mark.parametrize("group_bytes", [1, 100, 2**28])
def test_a_part_comes_back_as_it_went_in(tmp_path, monkeypatch, group_bytes):
    monkeypatch.setattr(model_folder, "GROUP_BYTES", group_bytes)
    model_folder.save_part(tmp_path, "dit", PARAMS.items())
    loaded = model_folder.load_part(tmp_path, "dit", PARAMS)
    assert all(isinstance(leaf, jax.Array) for leaf in loaded.values())
    assert_same_bits(loaded, PARAMS)
    read = dict(model_folder.read_part(tmp_path, "dit"))
    assert all(isinstance(leaf, np.ndarray) for leaf in read.values())
    assert_same_bits(read, PARAMS)
    leaves = model_folder.part_leaves(tmp_path, "dit")
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {p: (a.shape, a.dtype) for p, a in PARAMS.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]


def test_jax_arrays_are_saved_as_well(tmp_path):
    model_folder.save_part(tmp_path, "dit", {path: jax.numpy.asarray(leaf) for path, leaf in PARAMS.items()}.items())
    assert_same_bits(model_folder.load_part(tmp_path, "dit", PARAMS), PARAMS)
    assert_same_bits(dict(model_folder.read_part(tmp_path, "dit")), PARAMS)


def test_loading_casts_and_places(tmp_path):
    model_folder.save_part(tmp_path, "dit", PARAMS.items())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = {path: jax.sharding.NamedSharding(mesh, jax.P("data")) for path in PARAMS}
    for given in (sharding, sharding["head.bias"]):
        loaded = model_folder.load_part(tmp_path, "dit", PARAMS, given, "bfloat16")
        assert {leaf.sharding for leaf in loaded.values()} == {sharding["head.bias"]}
        assert_same_bits(loaded, {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in PARAMS.items()})


def test_another_models_part_is_refused_with_everything_said(tmp_path):
    model_folder.save_part(tmp_path, "dit", PARAMS.items())
    shapes = {**PARAMS, "blocks.norm.scale": np.zeros((3, 4)), "more": np.zeros(2)}
    del shapes["head.bias"]
    with pytest.raises(RequestError) as error:
        model_folder.load_part(tmp_path, "dit", shapes)
    message = str(error.value)
    for text in (
        f"{tmp_path / 'dit'}: not the dit of this configuration",
        "blocks.norm.scale is (2, 4), not (3, 4)",
        "more is absent",
        "head.bias is not of this model",
        "python -m launch.import_weights",
    ):
        assert text in message
    assert "\n" not in message


def test_a_part_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"this checkpoint has no vae; import one: python -m launch.import_weights"):
        model_folder.load_part(tmp_path, "vae", PARAMS)


def test_an_interrupted_save_leaves_no_part_and_can_be_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "GROUP_BYTES", 1)

    def leaves():
        yield from list(PARAMS.items())[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model_folder.save_part(tmp_path, "dit", leaves())
    assert not (tmp_path / "dit").exists()
    model_folder.save_part(tmp_path, "dit", PARAMS.items())
    assert_same_bits(model_folder.load_part(tmp_path, "dit", PARAMS), PARAMS)
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]


def test_a_part_is_never_overwritten(tmp_path):
    model_folder.save_part(tmp_path, "dit", PARAMS.items())
    with pytest.raises(RequestError, match="dit: exists already; give another folder"):
        model_folder.save_part(tmp_path, "dit", PARAMS.items())


def test_saving_holds_one_leaf(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "GROUP_BYTES", 1)
    alive = []

    def leaves():
        for path in "abcd":
            assert all(reference() is None for reference in alive), "a leaf that is on the disk lives on"
            leaf = np.ones((64, 64), np.float32)
            alive.append(weakref.ref(leaf))
            yield path, leaf
            del leaf

    model_folder.save_part(tmp_path, "dit", leaves())
    assert len(alive) == 4


def test_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    """A process of a pod reads its shard of an array, not the whole of it."""
    monkeypatch.setattr(model_folder, "CHUNK_BYTES", 2**20)
    model_folder.save_part(tmp_path, "dit", [("kernel", np.zeros((2, 1024, 1024), np.float32))])
    with model_folder._context():
        stored = model_folder.ocp.metadata(tmp_path / "dit").metadata["kernel"].storage_metadata
    assert np.prod(stored.chunk_shape) * 4 <= 2**20


def test_the_configuration_of_each_part_comes_back(tmp_path):
    model_folder.write_model(tmp_path, {"dit": SMOKE.dit, "vae": SMOKE.vae})
    model_folder.write_model(tmp_path, {"text": SMOKE.text, "image": SMOKE.image})
    assert model_folder.read_model(tmp_path) == {name: getattr(SMOKE, name) for name in ("dit", "vae", "text", "image")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format=99), "format 99, this version reads 1"),
        (lambda content: content["parts"]["dit"].update(novelty=1), "dit: novelty of DiTConfig is unknown to this version"),
        (lambda content: content["parts"].update(other={}), "part other is unknown to this version"),
    ],
)
def test_a_model_file_of_another_version(tmp_path, change, message):
    model_folder.write_model(tmp_path, {"dit": SMOKE.dit})
    content = json.loads((tmp_path / "model.json").read_text())
    change(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=message):
        model_folder.read_model(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(RequestError, match=r"no checkpoint, model.json is absent; make one: python -m launch.import_weights"):
        model_folder.read_model(tmp_path)


def test_the_configuration_must_be_the_checkpoints_model_however_it_runs(tmp_path):
    model_folder.write_model(tmp_path, {"dit": SMOKE.dit, "vae": SMOKE.vae})
    runs = replace(SMOKE, dit=replace(SMOKE.dit, dtype="bfloat16", remat="full", text_len=64), vae=replace(SMOKE.vae, encode_frames=8))
    assert model_folder.require_model(tmp_path, runs) == ("dit", "vae")
    other = replace(SMOKE, dit=replace(SMOKE.dit, eps=1e-5))
    with pytest.raises(RequestError, match=r"made with dit.eps=1e-06, the configuration has 1e-05; .* or --dit.eps=1e-06"):
        model_folder.require_model(tmp_path, other)
    assert model_folder.require_model(tmp_path, replace(Config(), dit=SMOKE.dit, vae=SMOKE.vae)) == ("dit", "vae")
