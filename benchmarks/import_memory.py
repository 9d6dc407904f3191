"""How much memory importing and exporting need, for a transformer of 4 GB in float32, from safetensors to our checkpoint and back.

The limit is 1.5 GB beyond the arrays themselves. Leaves are read and written one at a time, so the peak follows from the largest leaf
(1.1 GB here, twice while it is read or written) and is below the size of all arrays. Needs 12 GB of disk for a minute.

    python -m benchmarks.import_memory

On two cores, while other programs were running, with 23 GB of memory:

| step | arrays GB | peak resident GB | beyond the arrays GB | s |
|---|---|---|---|---|
| import | 3.82 | 3.14 | -0.68 | 21 |
| export | 3.82 | 2.94 | -0.88 | 16 |
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from configs.wan import T2V_1_3B
from launch import command
from omnitransfer_jax.folders import outputs
from omnitransfer_jax.weights import convert
from omnitransfer_jax.weights.parts import PARTS

FLAGS = flags.FlagValues()
FOLDER = flags.DEFINE_string("folder", None, "folder for the files while it runs; a temporary folder by default", flag_values=FLAGS)
LAYERS = flags.DEFINE_integer("layers", 20, "layers of the transformer, of 0.19 GB each", flag_values=FLAGS)

LIMIT = 1.5e9


def main() -> None:
    if FOLDER.value is not None:
        outputs.require_folder("--folder", FOLDER.value)
        Path(FOLDER.value).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as name:
        folder = Path(name)
        size = write_source(folder / "source" / "transformer")
        print("| step | arrays GB | peak resident GB | beyond the arrays GB | s |\n|---|---|---|---|---|")
        steps = {
            "import": ["launch.import_weights", f"--source={folder / 'source'}", f"--out={folder / 'ours'}"],
            "export": [
                "launch.export", "--config=wan:t2v_1_3b", f"--dit.num_layers={LAYERS.value}", f"--checkpoint={folder / 'ours'}",
                "--layout=diffusers", f"--out={folder / 'theirs'}",
            ],
        }  # fmt: skip
        for step, arguments in steps.items():
            peak, seconds = run(arguments)
            print(f"| {step} | {size / 1e9:.2f} | {peak / 1e9:.2f} | {(peak - size) / 1e9:.2f} | {seconds:.0f} |", flush=True)
            if peak - size > LIMIT:
                sys.exit(f"{step}: {(peak - size) / 1e9:.2f} GB beyond the arrays, more than {LIMIT / 1e9} GB")


def write_source(folder: Path) -> int:
    """A diffusers folder of random weights in shards of 1 GB; returns the bytes of its tensors."""
    dit, config = PARTS[0], replace(T2V_1_3B, num_layers=LAYERS.value)
    shapes, rng = dit.shapes(config), np.random.default_rng(0)

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in shapes.items():
            yield path, rng.standard_normal(leaf.shape, np.float32)

    convert.save(leaves(), shapes, dit.entries(config, "diffusers"), folder, dit.diffusers[1], shard_bytes=1e9)
    (folder / "config.json").write_text(json.dumps(dit.table.config_json(config)))
    return sum(leaf.size * 4 for leaf in shapes.values())


def run(arguments: list[str]) -> tuple[int, float]:
    """Runs a command in a process of its own; its highest resident size in bytes, and seconds."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        # VmHWM is the kernel's own maximum, so polling can only miss growth after the last poll.
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))])
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return peak, time.monotonic() - start


if __name__ == "__main__":
    command.run(main, FLAGS)
