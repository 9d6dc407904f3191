"""`pip install '.[torch]'` in an environment of its own, from which jax is then removed, samples from an export. It downloads PyTorch:

python -m pytest -n 0 -s -m slow tests/omnitransfer_torch/test_fresh_environment.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import clips
from launch import command, export

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".*", "out", "build", "docs", "tests", "*.egg-info", "__pycache__")
NO_JAX = "import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in ('jax', 'jaxlib', 'flax')))"

pytestmark = pytest.mark.slow


def run(*command_line, cwd):
    done = subprocess.run([str(part) for part in command_line], cwd=cwd, capture_output=True, text=True)
    print(f"$ {' '.join(Path(str(part)).name for part in command_line)}\n{done.stdout[-1500:]}", flush=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_an_export_is_sampled(tmp_path):
    model, source, python = tmp_path / "model", tmp_path / "source", tmp_path / "env" / "bin" / "python"
    assert command.execute(export.main, export.FLAGS, ["--config=stage1:tiny", "--checkpoint=embedded", f"--out={model}"]) == 0
    pictures = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    clips.write_clip(tmp_path / "ref.mp4", pictures, 8)
    Image.fromarray(pictures[0]).save(tmp_path / "a.png")

    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{source}[torch]", cwd=tmp_path)
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "jax", "jaxlib", "flax", "orbax-checkpoint", cwd=tmp_path)
    run(python, "-c", NO_JAX, cwd=tmp_path)
    flags = ["--task=motion", "--reference=ref.mp4", "--first_frame=a.png", "--prompt=a red ball", "--out=out.mp4", "--steps=4"]
    said = run(python, "-m", "omnitransfer_torch", f"--model={model}", *flags, cwd=tmp_path)
    assert "wrote out.mp4: 9 frames, 32 x 32, 8 fps" in said
    assert clips.read_clip(tmp_path / "out.mp4", frames=9, fps=8, height=32, width=32).std() > 0
    assert "torch" in run(python, "-m", "pip", "list", cwd=tmp_path)
