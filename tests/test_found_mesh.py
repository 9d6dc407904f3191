"""mesh.auto: the documented mesh of the devices that are found, on stand-ins for them and on those that TPU's compiler describes."""

import importlib.util
from dataclasses import dataclass, replace

import jax
import pytest

from configs import stage1
from configs.chips import MESHES
from configs.errors import RequestError
from configs.run import MeshConfig
from launch import command, compile, sample, train
from omnitransfer_jax.mesh import make_mesh, place_of, topology_of, with_found_mesh

AUTO = MeshConfig(auto=True)
SMOKE = replace(stage1.get_config("smoke"), dit=replace(stage1.get_config("smoke").dit, dim=48, num_heads=8))


@dataclass
class Device:
    device_kind: str
    coords: tuple[int, ...] | None = None
    slice_index: int | None = 0


def grid(kind, *sides, slices=1):
    x, y, z = (*sides, 1)[:3]
    return [Device(kind, (i, j, k), s) for s in range(slices) for k in range(z) for j in range(y) for i in range(x)]


def chosen(mesh):
    """The mesh of a small training."""
    return with_found_mesh(replace(SMOKE, mesh=mesh, train=replace(SMOKE.train, batch_size=32))).mesh


@pytest.fixture
def devices(monkeypatch):
    return lambda found: monkeypatch.setattr(jax, "devices", lambda: found)


@pytest.mark.parametrize(
    ("found", "expected", "said"),
    [
        (grid("TPU v5", 4, 4, 4), MeshConfig(data=16, heads=4), "v5p:4x4x4 is found, the mesh is data 16 x heads 4 x keys 1"),
        (grid("TPU v5", 4, 8, 4), MeshConfig(data=16, heads=8), "v5p:4x4x8 is found"),  # the same torus, turned
        (grid("TPU v6 lite", 16, 16), MeshConfig(data=16, heads=8, keys=2), "v6e:16x16 is found"),
        (grid("TPU v6 lite", 4, 2), MeshConfig(heads=8), "v6e:2x4 is found"),
        (grid("TPU v5", 4, 4, 4, slices=2), MeshConfig(slices=2, data=16, heads=4), "2 x v5p:4x4x4 is found, the mesh is slices 2 x data"),
        ([Device("NVIDIA H100 80GB HBM3", None, None)] * 8, MeshConfig(heads=8), "H100:8 is found"),
        ([Device("cpu", None, None)], MeshConfig(), "cpu:1 is found, the mesh is data 1"),
    ],
)
def test_the_documented_mesh_is_taken_and_said(found, expected, said, devices, capsys):
    devices(found)
    assert chosen(AUTO) == expected
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "name"), [(grid("TPU v5", 2, 4, 4), "v5p:2x4x4"), (grid("TPU v5 lite", 2, 2), "v5e:1x2x2"), ([Device("cpu")] * 8, "cpu:8")]
)
def test_where_none_is_documented_it_says_so(found, name, devices):
    devices(found)
    with pytest.raises(RequestError, match=rf"^{name}: no mesh is recommended for it, there is one for v5p:4x4x4, .*; give --mesh\.data"):
        chosen(AUTO)


def test_a_given_mesh_is_kept(devices):
    devices(grid("TPU v5", 4, 4, 4))
    assert chosen(MeshConfig(data=8, heads=8)) == MeshConfig(data=8, heads=8)
    with pytest.raises(RequestError, match=r"mesh\.auto=True chooses the mesh, and mesh\.data=8 and mesh\.heads=2 was given; leave one"):
        MeshConfig(auto=True, data=8, heads=2).validate()
    with pytest.raises(RequestError, match=r"mesh\.auto=True: this command does not choose"):
        make_mesh(AUTO)


def test_commands_take_it(devices, capsys):
    devices(grid("TPU v5", 2, 2, 1))
    args = ["--config=stage1:smoke", "--mesh.auto=True", "--dit.dim=48", "--dit.num_heads=4"]
    assert command.execute(train.main, train.FLAGS, [*args, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "the mesh is data 1 x heads 4 x keys 1" in out
    assert "on 4" in out
    refused = [*args, "--dit.num_heads=3"]
    assert command.execute(train.main, train.FLAGS, [*refused, "--dry_run"]) == 2
    assert "mesh.heads=4: a divisor of dit.num_heads=3" in capsys.readouterr().err
    devices(grid("TPU v5", 2, 2, 2))
    assert command.execute(sample.main, sample.FLAGS, [*args, "--prompt=x", "--out=x.mp4"]) == 2
    assert capsys.readouterr().err.startswith("v5p:2x2x2: no mesh is recommended")


def test_processes_use_all_their_devices(devices, monkeypatch):
    devices(grid("TPU v5", 4, 4, 4))
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    with pytest.raises(RequestError, match=r"mesh\.data=1 is 1 devices, and 16 processes have 64; give --mesh\.auto=True"):
        make_mesh(MeshConfig())


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler, libtpu, is not installed")
@pytest.mark.parametrize("topology", [name for name in MESHES if name.startswith("v")])
def test_devices_of_the_compiler_are_recognised(topology):
    for slices in (1, 2):
        found = compile.devices_of(topology, slices)
        assert len({place_of(device)[0] for device in found}) == slices
        assert topology_of(found, slices) == topology
