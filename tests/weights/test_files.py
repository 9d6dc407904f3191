"""safetensors files: exact bytes, whole or absent, streamed, and diagnosed when they are not what they should be."""

import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from configs.errors import RequestError
from omnitransfer_jax.weights import files
from omnitransfer_jax.weights.files import Spec

RNG = np.random.default_rng(0)
ARRAYS = {
    "b.second": RNG.standard_normal((3, 5)).astype(np.float32),
    "a.first": RNG.standard_normal(7).astype(ml_dtypes.bfloat16),
    "half": RNG.standard_normal((2, 3, 1)).astype(np.float16),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    'odd "näme"': RNG.standard_normal(3).astype(ml_dtypes.bfloat16),
}


def specs_of(arrays):
    return {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}


def assert_same(one, other):
    assert set(one) == set(other)
    for name, array in one.items():
        assert (array.shape, array.dtype, array.tobytes()) == (other[name].shape, other[name].dtype, other[name].tobytes()), name


def test_a_file_has_the_bytes_the_library_would_write(tmp_path):
    reverse = list(ARRAYS.items())[::-1]  # the order values come in does not matter
    (path,) = files.write(tmp_path, "model", specs_of(ARRAYS), reverse)
    assert path == tmp_path / "model.safetensors"
    assert path.read_bytes() == save(ARRAYS, metadata={"format": "pt"})


def test_views_are_written_as_they_look(tmp_path):
    whole = RNG.standard_normal((4, 6, 5)).astype(np.float32)
    views = {"transposed": whole[1].T, "row": whole[2, 3], "strided": whole[:, ::2, 1]}
    (path,) = files.write(tmp_path, "model", specs_of(views), views.items())
    assert_same(load_file(path), views)


def test_shards_are_named_sized_and_indexed_as_diffusers_does(tmp_path):
    arrays = {f"blocks.{i}": np.full((10, 10), i, np.float32) for i in range(5)}  # 400 bytes each
    paths = files.write(tmp_path, "diffusion_pytorch_model", specs_of(arrays), arrays.items(), shard_bytes=800)
    assert [path.name for path in paths] == [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"] == {f"blocks.{i}": paths[i // 2].name for i in range(5)}
    assert_same({name: array for path in paths for name, array in load_file(path).items()}, arrays)
    assert files.find(tmp_path) == paths
    assert set(os.listdir(tmp_path)) == {"diffusion_pytorch_model.safetensors.index.json", *(path.name for path in paths)}


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    arrays = {name: np.zeros(size, np.float32) for name, size in (("large", 100), ("small", 2), ("huge", 100))}
    assert len(files.write(tmp_path, "model", specs_of(arrays), arrays.items(), shard_bytes=50)) == 3


def test_reading_gives_back_what_was_written_in_the_order_asked(tmp_path):
    files.write(tmp_path, "model", specs_of(ARRAYS), ARRAYS.items(), shard_bytes=30)
    tensors = files.inspect(files.find(tmp_path))
    assert {name: (t.shape, files.DTYPES[t.dtype], t.nbytes, t.truncated) for name, t in tensors.items()} == {
        name: (array.shape, array.dtype, array.nbytes, False) for name, array in ARRAYS.items()
    }
    names = sorted(ARRAYS)
    assert_same(dict(zip(names, files.read(tensors[name] for name in names), strict=True)), ARRAYS)


def test_one_file_is_open_at_a_time(tmp_path):
    arrays = {f"{i}": np.ones(100, np.float32) for i in range(6)}
    paths = files.write(tmp_path, "model", specs_of(arrays), arrays.items(), shard_bytes=800)
    tensors = files.inspect(paths)

    def open_files():
        links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
        return {*(os.readlink(link) for link in links if link.exists()), *mapped} & set(map(str, paths))

    for tensor, _ in zip(tensors.values(), files.read(tensors.values()), strict=True):
        assert open_files() <= {str(tensor.file)}
    assert not open_files()


def test_writing_and_reading_hold_one_tensor(tmp_path):
    size, count = 2**20, 24
    specs = {f"{i:02d}": Spec((size // 4,), np.dtype(np.float32)) for i in range(count)}
    tracemalloc.start()
    files.write(tmp_path, "model", specs, ((name, np.ones(size // 4, np.float32)) for name in specs), shard_bytes=10 * size)
    for array in files.read(files.inspect(files.find(tmp_path)).values()):
        del array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * size


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, interruption):
    def values():
        yield from list(ARRAYS.items())[:3]
        raise interruption

    with pytest.raises(interruption):
        files.write(tmp_path, "model", specs_of(ARRAYS), values(), shard_bytes=30)
    assert not list(tmp_path.iterdir())


def test_nothing_has_its_final_name_before_the_last_byte(tmp_path):
    def values():
        for item in ARRAYS.items():
            yield item
            assert not list(tmp_path.glob("*.safetensors")), "a reader would take this for a whole file"

    files.write(tmp_path, "model", specs_of(ARRAYS), values(), shard_bytes=30)


def test_values_must_be_as_announced(tmp_path):
    specs = specs_of(ARRAYS)
    with pytest.raises(ValueError, match="no values for"):
        files.write(tmp_path, "model", specs, list(ARRAYS.items())[1:])
    with pytest.raises(ValueError, match="announced as"):
        files.write(tmp_path, "model", specs, [("b.second", np.zeros((5, 3), np.float32))])
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_names_what_it_lost(tmp_path):
    (path,) = files.write(tmp_path, "model", specs_of(ARRAYS), ARRAYS.items())
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    os.truncate(path, header + 66)  # empty 0, b.second 60, scalar 4, then 2 bytes of a.first's 14
    cut = {name for name, tensor in files.inspect([path]).items() if tensor.truncated}
    assert cut == {"a.first", 'odd "näme"', "half"}


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html>" * 20, b"\x20" + b"\0" * 7 + b"{"],
)
def test_what_is_no_safetensors_file_is_told_with_its_beginning(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        files.inspect([path])
    assert str(path) in str(error.value)
    assert f"has {len(content)} bytes; download it again" in str(error.value)


def test_all_damaged_files_are_in_one_message(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "0.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "1.safetensors")
    with open(tmp_path / "1.safetensors", "ab") as stream:
        stream.write(b"more")
    (tmp_path / "2.safetensors").write_bytes(b"not this")
    with pytest.raises(RequestError) as error:
        files.inspect(files.find(tmp_path))
    for part in ("a and maybe more is in", "4 bytes more than its header lists", "2.safetensors: no safetensors file"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_an_index_that_names_an_absent_shard(tmp_path):
    paths = files.write(tmp_path, "model", specs_of(ARRAYS), ARRAYS.items(), shard_bytes=30)
    paths[1].unlink()
    with pytest.raises(RequestError, match=f"{paths[1].name}, absent here; download the folder again"):
        files.find(tmp_path)


def test_a_folder_without_index_is_all_its_files(tmp_path):
    paths = files.write(tmp_path, "model", specs_of(ARRAYS), ARRAYS.items(), shard_bytes=30)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert files.find(tmp_path) == paths
    assert files.find(paths[0]) == [paths[0]]


@pytest.mark.parametrize("name", ["models_t5.pth", "model.pt", "pytorch_model.bin"])
def test_a_pickle_is_refused_with_the_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(RequestError) as error:
        files.find(tmp_path)
    message = str(error.value)
    assert str(path) in message
    assert "torch.load" in message
    assert "weights_only=True" in message
    assert path.with_suffix(".safetensors").name in message
    assert "\n" not in message


def test_what_is_not_there(tmp_path):
    with pytest.raises(RequestError, match="no such file or folder"):
        files.find(tmp_path / "absent")
    with pytest.raises(RequestError, match=r"no \*.safetensors in it"):
        files.find(tmp_path)
