"""No NaN and no infinity among weights, wherever they lie; the message has the leaf and the count."""

import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs.errors import RequestError
from omnitransfer_jax.folders import fingerprint, model_folder
from omnitransfer_jax.folders.finite import _count_on_device, require_finite
from tests.devices import xla_flags

SIGNALLING = np.array([0x7FA0], np.uint16).view(ml_dtypes.bfloat16)[0]


def spoilt(dtype=np.float32):
    leaves = {"fine": np.ones((2, 3), dtype), "wrong": np.ones((40, 50), dtype)}
    leaves["wrong"][3, 4:7] = np.nan, np.inf, -np.inf
    return leaves


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("as_jax", [False, True])
def test_leaf_and_count_are_named(dtype, as_jax):
    leaves = spoilt(dtype)
    if dtype is ml_dtypes.bfloat16:
        leaves["wrong"][0, 0] = SIGNALLING  # numpy warns of it, and warnings are errors here
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()} if as_jax else leaves
    count = 4 if dtype is ml_dtypes.bfloat16 else 3
    with pytest.raises(RequestError, match=rf"^DIR: numbers that are not finite \(NaN or infinity\): wrong has {count} of 2,000; do this$"):
        require_finite(leaves, "DIR", "do this")
    require_finite({"fine": leaves["fine"], "empty": np.zeros(0, dtype)}, "DIR", "do this")


def test_many_are_counted():
    with pytest.raises(RequestError, match=r"a has 1 of 1, b has 1 of 1, c has 1 of 1 and 2 more tensors; do this"):
        require_finite({name: np.array([np.nan]) for name in "abcde"}, "DIR", "do this")


def test_counted_on_the_device_alike():
    """What an accelerator runs, here on the CPU."""
    counts = _count_on_device({path: jnp.asarray(leaf) for path, leaf in spoilt(ml_dtypes.bfloat16).items()})
    assert {path: int(count) for path, count in counts.items()} == {"fine": 0, "wrong": 3}


ON_TWO_DEVICES = """
import jax, numpy as np
from configs.errors import RequestError
from omnitransfer_jax.folders.finite import require_finite
leaf, mesh = np.ones((40, 50), np.float32), jax.sharding.Mesh(np.array(jax.devices()), ("data",))
leaf[[3, 20, 39], 4] = np.nan
for spec in (jax.P(), jax.P("data")):
    try:
        require_finite({"wrong": jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))}, "DIR", "do this")
    except RequestError as error:
        print(len(mesh.devices), error)
"""


def test_replicas_are_counted_once_and_shards_all():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2)}
    found = subprocess.run([sys.executable, "-c", ON_TWO_DEVICES], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["2 DIR: numbers that are not finite (NaN or infinity): wrong has 3 of 2,000; do this"] * 2


@pytest.mark.parametrize("save", [model_folder.save_part, lambda folder, name, leaves: model_folder.save_file(folder, name, dict(leaves))])
def test_a_part_with_nan_is_not_read(tmp_path, save):
    """By none of the ways: sampling and training load it, export reads leaf by leaf, encoding makes its digest."""
    leaves = spoilt()
    save(tmp_path, "dit", leaves.items())
    for read in (
        lambda: model_folder.load_part(tmp_path, "dit", leaves),
        lambda: dict(model_folder.read_part(tmp_path, "dit")),
        lambda: fingerprint.of_part(tmp_path, "dit"),
    ):
        with pytest.raises(RequestError, match=rf"^{tmp_path}/dit: numbers .*wrong has 3 of 2,000; import again: python -m launch.import"):
            read()
    assert not (tmp_path / fingerprint.DIGESTS_FILE).exists()
