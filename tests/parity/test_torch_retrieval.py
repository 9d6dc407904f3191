"""The package's own model on the demo's first held-out pairs: in PyTorch it makes the same clips and scores the same retrieval.

Minutes on two cores: python -m pytest -n 0 -m slow tests/parity/test_torch_retrieval.py
"""

import jax
import numpy as np
import pytest
import torch

from configs import stage1
from data_pipelines import clips
from data_pipelines.encoders import Encoders
from evaluation import transfer
from evaluation.transfer import Transfer
from launch import command, export
from omnitransfer_jax import tasks
from omnitransfer_torch import OmniTransferPipeline
from tests.compare import LOG
from world import pixels
from world.scores import scores

pytestmark = pytest.mark.slow
CONFIG = stage1.get_config("tiny")
PAIRS = 6  # of each task, those that the demo shows


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "tiny"
    assert command.execute(export.main, export.FLAGS, ["--config=stage1:tiny", "--checkpoint=embedded", f"--out={out}"]) == 0
    loaded = OmniTransferPipeline.from_pretrained(out)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def in_pytorch(pipe, pairs):
    """Their clips, from the noise that ours has."""
    shape = (transfer.BATCH, *CONFIG.video.latent_shape(CONFIG.vae))
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(CONFIG.seed), 0), shape))
    made = []
    for i, pair in enumerate(pairs):
        target, reference = (pixels.render(scene, CONFIG.video) for scene in (pair.target, pair.reference))
        first = target[0] if tasks.TASKS[tasks.task_index(pair.task)].family == "temporal" else None
        start = torch.tensor(noise[i : i + 1]).permute(0, 4, 1, 2, 3)
        frames = pipe(pair.task, reference, first, pair.prompt, latents=start).frames[0]
        made.append(clips.to_bytes(frames * 2 - 1))
    return np.stack(made)


@pytest.mark.parametrize("task", tasks.NAMES)
def test_the_same_retrieval(pipe, task):
    pairs = transfer.held_out(CONFIG, task, PAIRS)
    ours = Transfer(CONFIG, Encoders(CONFIG, "embedded"))(transfer.load(CONFIG, "embedded"), pairs)
    theirs = in_pytorch(pipe, pairs)
    difference = np.abs(ours.astype(int) - theirs).max()
    found = [[scores(pair, made[i], CONFIG.video)["retrieval"] for i, pair in enumerate(pairs)] for made in (ours, theirs)]
    LOG.info("%s: retrieval %s, grey levels apart at most %d", task, found[0], difference)
    assert found[0] == found[1]
    assert difference <= 2
