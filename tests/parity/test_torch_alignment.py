"""Stage 3 in PyTorch (omnitransfer_torch) against ours: the context from Qwen2.5-VL, and the video."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch.nn.functional as F  # noqa: N812

from configs.run import SamplerConfig
from launch import command, export
from omnitransfer_torch import OmniTransferPipeline, alignment
from tests.compare import LOG, relative_l2
from tests.parity import exported
from tests.parity.exported import REFERENCE, STAGE3, VIDEO, Wish, clip, picture

pytestmark = pytest.mark.slow  # about a minute: python -m pytest -n 0 -m slow FILE
LATENTS, PIXELS = 1e-4, 2e-3
FRAME = picture(7, 40, 56)
PLAIN, GUIDED = SamplerConfig(steps=3, guidance=1.0), SamplerConfig(steps=3, guidance=5.0)
WISHES = {
    "id": Wish(("id",), (clip(1),), None, "a dog", GUIDED),
    "style": Wish(("style",), (clip(2),), None, "a dog", GUIDED),
    "motion": Wish(("motion",), (clip(3),), FRAME, "", GUIDED),
    "camera": Wish(("camera",), (clip(4),), FRAME, "a dog", GUIDED),
    "effect": Wish(("effect",), (clip(5),), FRAME, "", PLAIN),
    "style + motion": Wish(("style", "motion"), (clip(6), clip(7, replace(VIDEO, frames=REFERENCE.frames))), FRAME, "a dog", GUIDED),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Our side, theirs, and results of ours that are made once."""
    folder = tmp_path_factory.mktemp("stage3")
    origin = exported.import_random(folder, STAGE3, mllm=True)
    run = exported.write_run(folder / "run", STAGE3, origin)
    out = exported.exported(run, folder / "export", "stage3:smoke", "--verify")
    side, results = exported.Ours(STAGE3, run), {}

    def both(pipe, name):
        wish = WISHES[name]
        if name not in results:
            results[name] = side(wish)
        shape = results[name].latents.shape[1:]
        return results[name], exported.theirs(pipe, wish, np.random.default_rng(5).standard_normal(shape).astype(np.float32))

    return out, both


@pytest.fixture(scope="module")
def pipe(made):
    loaded = OmniTransferPipeline.from_pretrained(made[0])
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("name", WISHES)
def test_latents_and_pixels(made, pipe, name):
    ours, theirs = made[1](pipe, name)
    for step, (a, b) in enumerate(zip(ours.latents, theirs.latents, strict=True)):
        assert relative_l2(b, a) <= LATENTS, step
    difference = np.abs(ours.frames - theirs.frames).max()
    LOG.info("pixels %.1e", difference)
    assert difference <= PIXELS


def test_merged_adapters_are_the_same_function(made):
    merged = OmniTransferPipeline.from_pretrained(made[0], merge_adapters=True)
    merged.set_progress_bar_config(disable=True)
    ours, theirs = made[1](merged, "motion")
    assert relative_l2(theirs.latents[-1], ours.latents[-1]) <= LATENTS


def queries_of_another_task(monkeypatch, pipe):
    context = alignment.context
    monkeypatch.setattr(alignment, "context", lambda *args: context(*args[:4], 0, *args[5:]))


def exact_gelu(monkeypatch, pipe):
    connector = pipe.alignment.connector
    monkeypatch.setattr(connector, "forward", lambda x: connector.third(F.gelu(connector.second(F.gelu(connector.first(x))))))


def without_adapters(monkeypatch, pipe):
    pipe.mllm.disable_adapters()  # the test enables them again


def template_of_another_task(monkeypatch, pipe):
    tasks = pipe.transfer.tasks
    monkeypatch.setattr(pipe, "transfer", replace(pipe.transfer, tasks=tuple(replace(t, template=tasks[0].template) for t in tasks)))


@pytest.mark.parametrize("broken", [queries_of_another_task, exact_gelu, without_adapters, template_of_another_task])
def test_a_break_is_seen(made, pipe, monkeypatch, broken):
    made[1](pipe, "motion")
    broken(monkeypatch, pipe)
    ours, theirs = made[1](pipe, "motion")
    pipe.mllm.enable_adapters()
    assert relative_l2(theirs.latents[-1], ours.latents[-1]) > LATENTS


def test_the_card_names_the_training(made):
    card, training = (made[0] / "README.md").read_text(), json.loads((made[0] / "training.json").read_text())
    assert "`stage3:smoke` (`training.json`), 8 steps of 4 samples" in card
    assert "MetaQueries" in card
    assert (training["alignment"]["queries"], training["train"]["init_from"]) == (8, "")


def test_adapters_that_learnt_nothing_are_refused(made, tmp_path, capfd):
    origin = made[0].parent / "ours"
    run = exported.write_run(tmp_path / "run", STAGE3, origin, learnt=False)
    flags = ["--config=stage3:smoke", *exported.FIELDS, f"--checkpoint={run}", f"--out={tmp_path / 'out'}"]
    assert command.execute(export.main, export.FLAGS, flags) == 2
    assert "all 7 adapters of the language model are zero" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
