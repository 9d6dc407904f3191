"""Encoders on several devices: the records are those of one, byte for byte. Each needs a process of its own with so many simulated devices.

python -m pytest -n 0 -o faulthandler_timeout=0 -m slow tests/data_pipelines/test_spread.py
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import stage2
from data_pipelines import example, records
from tests.devices import xla_flags

CONFIG = "stage2:smoke"


def encode(manifest, out, devices):
    """launch.encode with so many devices; its records."""
    command = [sys.executable, "-m", "launch.encode", f"--config={CONFIG}", f"--manifest={manifest}", f"--out={out}"]
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    opened = records.Records(out, stage2.get_config("smoke"))
    return [opened[i] for i in range(len(opened))]


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_devices(tmp_path):
    """Five pairs of all tasks with the language model's inputs; the last group is of two."""
    manifest = example.write_example(tmp_path / "clips")
    alone, spread = encode(manifest, tmp_path / "one", 1), encode(manifest, tmp_path / "three", 3)
    assert len(alone) == len(spread) == 5
    for one, other in zip(alone, spread, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), (one["id"], name)
