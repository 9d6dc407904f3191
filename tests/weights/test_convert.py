"""The road by a table, through real files: bit-identical both ways, strict with everything said at once, one leaf in memory."""

import weakref
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import wan
from configs.base import CLIPVisionConfig, DiTConfig, UMT5Config, VAEConfig
from configs.errors import RequestError
from omnitransfer_jax.weights import convert, files
from omnitransfer_jax.weights.parts import LOW_NOISE, PARTS
from omnitransfer_jax.weights.table import CONV, LINEAR, SAME, Entry

F32, BF16, F16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
LAYERS, DIM = 3, 4
# A made-up model with one of everything: whole and stacked leaves, each layout, and a projection their side fuses.
TABLE = [
    Entry("embed.weight", "embedding"),
    Entry("conv.weight", "conv.kernel", CONV),
    *[Entry(f"layers.{i}.norm", "blocks.norm.scale", SAME, layer=i) for i in range(LAYERS)],
    *[Entry(f"layers.{i}.up.weight", "blocks.up.kernel", LINEAR, layer=i) for i in range(LAYERS)],
    *[
        Entry(f"layers.{i}.qkv.weight", f"blocks.{name}.kernel", LINEAR, layer=i, part=(part, 3))
        for i in range(LAYERS)
        for part, name in enumerate(("query", "key", "value"))
    ],
]
SHAPES = {
    "embedding": (7, DIM),
    "conv.kernel": (1, 2, 2, 5, DIM),
    "blocks.norm.scale": (LAYERS, DIM),
    "blocks.up.kernel": (LAYERS, DIM, 6),
    **{f"blocks.{name}.kernel": (LAYERS, DIM, DIM) for name in ("query", "key", "value")},
}
THEIRS = {"embed.weight": (7, DIM), "conv.weight": (DIM, 5, 1, 2, 2)} | {
    f"layers.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in (("norm", (DIM,)), ("up.weight", (6, DIM)), ("qkv.weight", (3 * DIM, DIM)))
}


def params_of(shapes, dtype=F32):
    return {path: SimpleNamespace(shape=shape, dtype=dtype) for path, shape in shapes.items()}


def random_bits(shapes, dtype, seed=0):
    """Any bit pattern of a finite number, subnormals too: the road moves bits, it does not compute."""
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        whole = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), f"u{dtype.itemsize}")
        with np.errstate(invalid="ignore"):
            finite = np.where(np.isfinite(whole.view(dtype)), whole, np.bitwise_xor(whole, whole.dtype.type(1 << 8 * dtype.itemsize - 2)))
        found[name] = finite.view(dtype).reshape(shape)
    return found


def assert_same_bits(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        assert (array.shape, array.dtype, array.tobytes()) == (other[name].shape, other[name].dtype, other[name].tobytes()), name


def read_all(folder):
    return {name: array for path in files.find(folder) for name, array in load_file(path).items()}


def test_where_each_number_goes(tmp_path):
    """Spelled out by index, so that a layout and its inverse cannot be wrong together."""
    theirs = {name: np.arange(np.prod(shape), dtype=F32).reshape(shape) for name, shape in THEIRS.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    ours = convert.load(files.inspect(files.find(tmp_path)), TABLE, params_of(SHAPES))
    assert ours["embedding"][5, 2] == theirs["embed.weight"][5, 2]
    assert ours["conv.kernel"][0, 1, 0, 4, 3] == theirs["conv.weight"][3, 4, 0, 1, 0]
    for i in range(LAYERS):
        assert ours["blocks.norm.scale"][i, 1] == theirs[f"layers.{i}.norm"][1]
        assert ours["blocks.up.kernel"][i, 3, 5] == theirs[f"layers.{i}.up.weight"][5, 3]
        for part, name in enumerate(("query", "key", "value")):
            assert ours[f"blocks.{name}.kernel"][i, 2, 1] == theirs[f"layers.{i}.qkv.weight"][part * DIM + 1, 2]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shard_bytes", [100, 10**9], ids=["shards", "one_file"])
def test_theirs_to_ours_to_theirs_is_bit_identical(tmp_path, dtype, shard_bytes):
    theirs = random_bits(THEIRS, dtype)
    specs = {name: files.Spec(array.shape, array.dtype) for name, array in theirs.items()}
    files.write(tmp_path / "theirs", "model", specs, theirs.items(), shard_bytes)
    ours = convert.load(files.inspect(files.find(tmp_path / "theirs")), TABLE, params_of(SHAPES))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in ours.items()} == {path: (shape, dtype) for path, shape in SHAPES.items()}
    convert.save(reversed(ours.items()), params_of(SHAPES, dtype), TABLE, tmp_path / "again", "model", shard_bytes=shard_bytes)
    assert_same_bits(read_all(tmp_path / "again"), theirs)
    assert (len(files.find(tmp_path / "again")) > 1) == (shard_bytes == 100)


def test_shards_and_one_file_give_the_same(tmp_path):
    ours = random_bits(SHAPES, BF16)
    for folder, shard_bytes in (("one", 10**9), ("many", 60)):
        convert.save(ours.items(), params_of(SHAPES, BF16), TABLE, tmp_path / folder, "model", shard_bytes=shard_bytes)
    assert len(files.find(tmp_path / "one")) == 1 < len(files.find(tmp_path / "many"))
    for folder in ("one", "many"):
        assert_same_bits(convert.load(files.inspect(files.find(tmp_path / folder)), TABLE, params_of(SHAPES)), ours)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_part_goes_both_ways(tmp_path, part, layout, dtype):
    config = getattr(wan.VARIANTS["smoke"], part.name)
    shapes = {path: leaf.shape for path, leaf in part.shapes(config).items()}
    ours, table = random_bits(shapes, dtype), part.entries(config, layout)
    convert.save(ours.items(), params_of(shapes, dtype), table, tmp_path, "model", shard_bytes=10**5)
    tensors = convert.select(files.inspect(files.find(tmp_path)), table, part.prefixes, part.ignored)
    assert_same_bits(convert.load(tensors, table, part.shapes(config)), ours)


@pytest.mark.parametrize("names", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens"), ()])
def test_umt5s_embedding_under_either_name(tmp_path, names):
    """transformers ties the two, and tools save the one, the other, or both."""
    part, config = PARTS[2], wan.VARIANTS["smoke"].text
    shapes = {path: leaf.shape for path, leaf in part.shapes(config).items()}
    ours, table = random_bits(shapes, F32), part.entries(config, "diffusers")
    convert.save(ours.items(), params_of(shapes, F32), table, tmp_path / "shared", "model")
    theirs = read_all(tmp_path / "shared")
    embedding = theirs.pop("shared.weight")
    (tmp_path / "other").mkdir()
    save_file(theirs | {f"{name}.weight": embedding.copy() for name in names}, tmp_path / "other" / "model.safetensors")
    tensors = convert.select(files.inspect(files.find(tmp_path / "other")), table, part.prefixes, part.ignored, part.copies)
    if names:
        assert_same_bits(convert.load(tensors, table, part.shapes(config)), ours)
    else:
        assert convert.problems(tensors, table, part.shapes(config)) == ["1 missing: shared.weight"]


@pytest.mark.parametrize(
    ("part", "config", "parameters", "tensors"),
    [
        (PARTS[0], DiTConfig(), 16_394_878_784, 1303),
        (LOW_NOISE, wan.I2V_2_2_14B, 14_288_901_184, 1095),
        (LOW_NOISE, wan.T2V_14B, 57_153_966_336 // 4, 1095),
        (PARTS[1], VAEConfig(), 126_892_531, 194),
        (PARTS[2], UMT5Config(), 5_680_910_336, 242),
        (PARTS[3], CLIPVisionConfig(), 630_766_080, None),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_published_sizes_cost_nothing_to_check(part, config, parameters, tensors):
    """Counts: components.md, from the public classes; of Wan2.2's experts those that readers of the published files report, for T2V as
    the total_size of transformer_2's index, in float32. Shapes of 65 GB are found without memory."""
    for layout in ("diffusers", "original"):
        specs = convert.specs(part.entries(config, layout), part.shapes(config))
        assert sum(spec.nbytes for spec in specs.values()) == 4 * parameters
        assert tensors is None or len(specs) == tensors


def test_types_are_kept_or_converted_as_torch_does(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = {name: np.random.default_rng(1).standard_normal(shape).astype(F32) for name, shape in THEIRS.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    tensors = files.inspect(files.find(tmp_path))
    kept, converted = (convert.load(tensors, TABLE, params_of(SHAPES), dtype=dtype) for dtype in (None, BF16))
    assert {leaf.dtype for leaf in kept.values()} == {F32}
    for path, leaf in kept.items():
        expected = torch.tensor(leaf).to(torch.bfloat16).view(torch.int16).numpy()
        assert converted[path].dtype == BF16
        np.testing.assert_array_equal(converted[path].view(np.int16), expected)


@pytest.fixture
def no_reading(monkeypatch):
    def read(tensors):
        raise AssertionError("data was read although the headers are wrong")

    monkeypatch.setattr(files, "read", read)


def test_everything_wrong_is_in_one_message_before_anything_is_read(tmp_path, no_reading):
    theirs = random_bits(THEIRS, F32)
    del theirs["layers.1.norm"]  # missing
    theirs["layers.1.extra.weight"] = np.zeros(3, F32)  # unexpected
    theirs["conv.weight"] = np.zeros((DIM, 5, 1, 2, 3), F32)  # misshaped
    theirs["embed.weight"] = np.zeros((7, DIM), np.int32)  # not a float
    theirs["layers.2.up.weight"] = theirs["layers.2.up.weight"].astype(BF16)  # not its stack's type
    path = tmp_path / "model.safetensors"
    save_file(theirs, path)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 50)  # the bf16 tensor is last, 48 bytes, behind a float
    tensors = files.inspect([path])
    cut = {name for name, tensor in tensors.items() if tensor.truncated}
    assert "layers.2.up.weight" in cut
    with pytest.raises(RequestError) as error:
        convert.load(tensors, TABLE, params_of(SHAPES))
    message = str(error.value)
    for text in (
        "1 missing: layers.1.norm",
        "1 unexpected: layers.1.extra.weight",
        "1 misshaped: conv.weight is (4, 5, 1, 2, 3), not (4, 5, 1, 2, 2)",
        "embed.weight is I32",
        "layers.0.up.weight is F32 and layers.2.up.weight is BF16",
        f"{len(cut)} cut off, so download again: ",
        "layers.2.up.weight in model.safetensors",
    ):
        assert text in message
    assert "\n" not in message


def test_many_problems_are_counted(tmp_path, no_reading):
    save_file({f"other.{i}": np.zeros(1, F32) for i in range(30)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError) as error:
        convert.load(files.inspect(files.find(tmp_path)), TABLE, params_of(SHAPES))
    assert f"{len(THEIRS)} missing: embed.weight" in str(error.value)
    assert f"and {len(THEIRS) - 6} more; 30 unexpected: other.0" in str(error.value)
    assert str(error.value).endswith("and 24 more")


def test_a_stack_of_several_types_needs_a_type(tmp_path):
    theirs = {name: np.ones(shape, F32 if "0" in name else BF16) for name, shape in THEIRS.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    tensors = files.inspect(files.find(tmp_path))
    with pytest.raises(RequestError, match="of several types in one stack, so give --dtype"):
        convert.load(tensors, TABLE, params_of(SHAPES))
    assert {leaf.dtype for leaf in convert.load(tensors, TABLE, params_of(SHAPES), dtype=F32).values()} == {F32}


@pytest.mark.parametrize("on_file", [True, False])
@pytest.mark.parametrize("on_table", [True, False])
def test_a_prefix_may_be_on_either_side(tmp_path, on_file, on_table):
    theirs = random_bits(THEIRS, F32)
    table = [entry._replace(theirs=f"model.{entry.theirs}") for entry in TABLE] if on_table else TABLE
    prefix = "model." if on_file else ""
    extra = {f"{prefix}layers.0.unread": np.zeros(1, F32)}
    save_file({prefix + name: array for name, array in theirs.items()} | extra, tmp_path / "model.safetensors")
    tensors = convert.select(files.inspect(files.find(tmp_path)), table, ("model.",), ("*.unread",))
    assert not convert.problems(tensors, table, params_of(SHAPES))
    assert convert.load(tensors, table, params_of(SHAPES))["embedding"].tobytes() == theirs["embed.weight"].tobytes()


def test_one_tensor_under_two_names(tmp_path):
    arrays = {name: np.zeros(shape, F32) for name, shape in THEIRS.items()}
    save_file(arrays | {"model.conv.weight": arrays["conv.weight"]}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match=r"conv.weight and model.conv.weight|model.conv.weight and conv.weight"):
        convert.select(files.inspect(files.find(tmp_path)), TABLE, ("model.",))


def test_a_prefix_on_what_is_written(tmp_path):
    ours = random_bits(SHAPES, F32)
    convert.save(ours.items(), params_of(SHAPES), TABLE, tmp_path, "model", prefix="model.diffusion_model.")
    assert set(read_all(tmp_path)) == {f"model.diffusion_model.{name}" for name in THEIRS}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[1:], "differ in .'embedding'"),
        ([entry for entry in TABLE if entry.theirs != "layers.1.norm"], "blocks.norm.scale of shape .* is filled by layers"),
        ([*TABLE, Entry("layers.1.twice", "blocks.norm.scale", layer=1)], "filled by layers"),
        ([entry for entry in TABLE if (entry.part, entry.layer) != ((1, 3), 1)], "filled by layers"),
        ([*TABLE[1:], Entry("layers.0.norm", "embedding")], "layers.0.norm is used in parts"),
    ],
)
def test_a_table_that_does_not_cover_the_model_is_a_mistake_of_ours(table, message):
    with pytest.raises(ValueError, match=message):
        convert.specs(table, params_of(SHAPES))


def test_one_leaf_at_a_time(tmp_path):
    theirs = random_bits(THEIRS, F32)
    save_file(theirs, tmp_path / "model.safetensors")
    alive = []
    for path, leaf in convert.leaves(files.inspect(files.find(tmp_path)), TABLE, params_of(SHAPES)):
        assert all(reference() is None for reference in alive[:-1]), f"an older leaf lives on beside {path}"
        alive.append(weakref.ref(leaf))
        del leaf
    assert len(alive) == len(SHAPES)
