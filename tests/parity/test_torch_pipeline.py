"""Stage 1 in PyTorch (omnitransfer_torch) against ours: every step's latents and the pixels, from an export of random weights.

All requests: python -m pytest -n 0 -m "slow or not slow" FILE
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.run import SamplerConfig
from omnitransfer_torch import OmniTransferPipeline, references
from tests.compare import LOG, relative_l2
from tests.parity import exported
from tests.parity.exported import STAGE1, VIDEO, Wish, clip, picture

LATENTS, PIXELS = 1e-4, 2e-3
FRAME = picture(7, 40, 56)
PLAIN, GUIDED = SamplerConfig(steps=3, guidance=1.0), SamplerConfig(steps=3, guidance=5.0, negative_prompt="grey")
WISHES = {
    "id": Wish(("id",), (clip(1),), None, "a dog", GUIDED),
    "style": Wish(("style",), (clip(2),), None, "a dog", PLAIN),
    "motion": Wish(("motion",), (clip(3),), FRAME, "", GUIDED),
    "camera": Wish(("camera",), (clip(4),), FRAME, "a dog", GUIDED),
    "effect": Wish(("effect",), (clip(5),), FRAME, "", PLAIN),
    "style + motion": Wish(("style", "motion"), (clip(6), clip(7, VIDEO)), FRAME, "a dog", GUIDED),
    "motion + camera": Wish(("motion", "camera"), (clip(3), clip(4)), FRAME, "", GUIDED),
    "motion + camera, stacked": Wish(("motion", "camera"), (clip(3), clip(4)), FRAME, "", replace(GUIDED, stack_references=True)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Our side, theirs, and results of ours that are made once."""
    folder = tmp_path_factory.mktemp("stage1")
    ours = exported.import_random(folder, STAGE1)
    pipe = OmniTransferPipeline.from_pretrained(exported.exported(ours, folder / "export", "stage1:smoke"))
    pipe.set_progress_bar_config(disable=True)
    side, results = exported.Ours(STAGE1, ours), {}

    def both(name, cache="full"):
        wish = WISHES[name]
        if name not in results:
            results[name] = side(wish)
        shape = results[name].latents.shape[1:]
        return results[name], exported.theirs(pipe, wish, np.random.default_rng(5).standard_normal(shape).astype(np.float32), cache)

    return pipe, both


QUICK = ("motion", "style + motion")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WISHES])
def test_latents_and_pixels(made, name):
    ours, theirs = made[1](name)
    assert len(ours.latents) == len(theirs.latents) == 3
    for step, (a, b) in enumerate(zip(ours.latents, theirs.latents, strict=True)):
        assert relative_l2(b, a) <= LATENTS, step
    difference = np.abs(ours.frames - theirs.frames).max()
    LOG.info("pixels %.1e", difference)
    assert difference <= PIXELS
    assert ours.frames.std() > 0.03


def without_offset(monkeypatch, pipe):
    monkeypatch.setattr(pipe, "offsets", lambda tasks, shape: [(0, 0, 0)] * len(tasks))


def without_flag(monkeypatch, pipe):
    monkeypatch.setattr(pipe, "transfer", replace(pipe.transfer, references=replace(pipe.transfer.references, flag=0.0)))


def without_stacking(monkeypatch, pipe):
    found = type(pipe).offsets
    monkeypatch.setattr(pipe, "offsets", lambda tasks, shape: [found(pipe, [task], shape)[0] for task in tasks])


def with_text(monkeypatch, pipe):
    read = references.CrossAttention.__call__

    def as_target(self, *args):
        recorded, self.streams.recorded = self.streams.recorded, None
        try:
            return read(self, *args)
        finally:
            self.streams.recorded = recorded

    monkeypatch.setattr(references.CrossAttention, "__call__", as_target)


def at_the_targets_time(monkeypatch, pipe):
    monkeypatch.setattr(pipe, "transfer", replace(pipe.transfer, references=replace(pipe.transfer.references, time=500.0)))


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        (without_offset, "motion"),
        (without_flag, "motion"),
        pytest.param(without_offset, "id", marks=pytest.mark.slow),
        pytest.param(without_flag, "style", marks=pytest.mark.slow),
        pytest.param(without_stacking, "motion + camera, stacked", marks=pytest.mark.slow),
        (with_text, "motion"),
        (at_the_targets_time, "motion"),
    ],
)
def test_a_break_is_seen(made, monkeypatch, broken, name):
    pipe, both = made
    both(name)  # sets what the request needs before it is broken
    broken(monkeypatch, pipe)
    ours, theirs = both(name)
    assert relative_l2(theirs.latents[-1], ours.latents[-1]) > 3 * LATENTS


@pytest.mark.parametrize(("cache", "tolerance"), [("cpu", 0.0), ("int8", 5e-3)])
def test_other_caches(made, cache, tolerance):
    """In CPU memory it is the same cache; int8 costs a known difference of the last latents."""
    _, whole = made[1]("motion")
    _, other = made[1]("motion", cache)
    difference = relative_l2(other.latents[-1], whole.latents[-1])
    assert difference <= tolerance
    assert (difference > 0) == (cache == "int8")


def test_a_cache_in_int8_is_a_quarter(made):
    """One byte a number and a factor for each token and head, against float32."""
    pipe, latents = made[0], torch.randn(1, 16, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    full, narrow = (pipe.cache_of(latents, 0, (0, 0, 0), storage).nbytes() for storage in ("full", "int8"))
    assert narrow == full // 4 + full // (4 * 24) * 4  # heads are 24 wide


@pytest.mark.slow
def test_diffusers_memory_tools(made):
    """Groups of layers that leave their device between calls, and tiles of the autoencoder, change no number."""
    pipe, both = made
    _, whole = both("motion")
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    pipe.vae.enable_tiling()
    _, other = both("motion")
    pipe.vae.disable_tiling()
    assert np.array_equal(other.latents, whole.latents)
    assert np.array_equal(other.frames, whole.frames)


@pytest.mark.slow
def test_weights_in_bfloat16(made, tmp_path_factory):
    """As on a GPU: the autoencoder stays in float32, and the result is near that of float32."""
    pipe, both = made
    _, whole = both("motion")
    half = OmniTransferPipeline.from_pretrained(pipe.config._name_or_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert (half.transformer.dtype, half.vae.dtype) == (torch.bfloat16, torch.float32)
    wish = WISHES["motion"]
    noise = np.random.default_rng(5).standard_normal(whole.latents.shape[1:]).astype(np.float32)
    assert relative_l2(exported.theirs(half, wish, noise).latents[-1], whole.latents[-1]) <= 5e-2
