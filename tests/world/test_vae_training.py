"""The autoencoder's training: it learns, goes on where it stopped, and what it writes is what it says."""

import json
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from configs import vae as configs_vae
from configs.base import VAEConfig
from configs.errors import RequestError
from configs.run import CheckpointConfig, VideoConfig
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.wan_vae import WanVAE
from world import part_training, pixels, vae_training
from world.pairs import draw_pair

SMALL = replace(
    configs_vae.TINY,
    vae=VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1,), num_res_blocks=1, temporal_downsample=(), encode_frames=4, decode_frames=4,
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    ),
    video=VideoConfig(frames=5, height=8, width=8, fps=8),
    steps=40, batch_size=2, crop=4, whole_share=0.25, warmup_steps=2, kl_weight=1e-3,
    log_every=4, evaluate_every=20, evaluate_clips=16, statistics_clips=4, checkpoint=CheckpointConfig(every=100), threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    vae_training.train(SMALL, workdir)
    return workdir


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def written(workdir) -> WanVAE:
    """The autoencoder as the two files give it."""
    fields = json.loads((workdir / "vae.json").read_text())["vae"]
    config = VAEConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    return with_params(abstract(lambda rngs: WanVAE(config, rngs=rngs)), jax.tree.map(jnp.asarray, load_file(workdir / "vae.safetensors")))


def first_weights():
    return vae_training.init_state(SMALL).trainable


def decibels(clips, vae: WanVAE) -> float:
    """Mean PSNR of clips that were encoded and decoded."""
    reconstruct, found = jax.jit(lambda video: vae.decode(vae.encode(video))), []
    for clip in clips:
        video = np.asarray(reconstruct(clip[None].astype(np.float32) / 127.5 - 1))[0]
        error = np.rint((video.astype(np.float64) + 1) * 127.5) - clip
        found.append(20 * np.log10(255) - 10 * np.log10((error**2).mean()))
    return float(np.mean(found))


def clips_of(split, count):
    examples = [draw_pair(SMALL.seed, i, split) for i in range(count // 2)]
    return [pixels.render(scene, SMALL.video) for e in examples for scene in (e.reference, e.target)]


def test_it_learns(whole):
    """Clips of held-out values look better than what the first weights make of them, by more than 2 dB."""
    before = decibels(clips_of("held_out", 16), with_params(abstract(lambda rngs: WanVAE(SMALL.vae, rngs=rngs)), first_weights()))
    assert json.loads((whole / "vae.json").read_text())["held_out_psnr"] > before + 2


def test_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    """Bit for bit: weights, losses, and what is said of them."""

    @contextmanager
    def after_three():
        yield lambda step: step == 3

    with monkeypatch.context() as patch:
        patch.setattr(part_training, "stop_signals", after_three)
        vae_training.train(SMALL, tmp_path)
    assert not (tmp_path / "vae.json").exists()
    vae_training.train(SMALL, tmp_path)
    ours, theirs = (load_file(folder / "vae.safetensors") for folder in (tmp_path, whole))
    assert [name for name in theirs if not np.array_equal(ours[name], theirs[name])] == []
    timings = ("seconds", "data_wait")
    ours, theirs = ([{k: v for k, v in line.items() if k not in timings} for line in lines(folder)] for folder in (tmp_path, whole))
    assert ours == theirs
    ours, theirs = (json.loads((folder / "vae.json").read_text()) | {"seconds": 0} for folder in (tmp_path, whole))
    assert ours == theirs


def test_another_configuration_is_another_run(whole):
    with pytest.raises(RequestError, match=r"kl_weight=0\.5: the run in .* was started with 0\.001"):
        vae_training.train(replace(SMALL, kl_weight=0.5), whole)


def test_the_files_reproduce_what_is_reported(whole):
    """Held-out PSNR through normalised latents, by hand."""
    result = json.loads((whole / "vae.json").read_text())
    assert (result["steps"], result["held_out_clips"]) == (40, 16)
    assert decibels(clips_of("held_out", 16), written(whole)) == pytest.approx(result["held_out_psnr"], abs=1e-4)
    assert [line["step"] for line in lines(whole) if "held_out_psnr" in line] == [20, 40]


def test_latents_are_normal_over_the_training_clips(whole):
    """With the statistics in the configuration, which has four decimals, every channel has mean 0 and deviation 1."""
    vae, encode = written(whole), jax.jit(WanVAE.encode)
    latents = np.concatenate([encode(vae, clip[None].astype(np.float32) / 127.5 - 1) for clip in clips_of("train", 4)])
    rounding = 0.5e-4 / np.array(vae.config.latents_std)
    assert (abs(latents.mean((0, 1, 2, 3), dtype=np.float64)) <= rounding + 1e-5).all()
    assert (abs(latents.std((0, 1, 2, 3), dtype=np.float64) - 1) <= rounding + 1e-5).all()


def test_grey_clips_show_their_first_frame_alone():
    """With all clips grey, the later frames do not matter to a step, and the first one does."""
    step = vae_training.make_train_step(replace(SMALL, grey_share=1.0))
    clips = np.stack(clips_of("train", 2))

    def error(clips):
        return step(vae_training.init_state(SMALL), clips, jax.random.key(0), False)[1]["squared_error"].item()

    first, later = (np.concatenate([255 - clips[:, :1], clips[:, 1:]], 1), np.concatenate([clips[:, :1], 255 - clips[:, 1:]], 1))
    assert error(later) == error(clips) != error(first)


def test_a_crop_is_one_part_of_every_clip():
    """The step's error is that of a step on whole clips which were cut by hand, at one place for all of them."""
    step, state, clips = vae_training.make_train_step(SMALL), vae_training.init_state(SMALL), np.stack(clips_of("train", 2))

    def error(clips, crop):
        return step(jax.tree.map(jnp.copy, state), clips, jax.random.key(0), crop)[1]["squared_error"].item()

    parts = [error(clips[:, :, i : i + 4, j : j + 4], False) for i in range(5) for j in range(5)]
    assert sum(part == pytest.approx(error(clips, True), rel=1e-6) for part in parts) == 1


def test_divergence_is_torch_s():
    draw = np.random.default_rng(0)
    mean, log_variance = draw.standard_normal((2, 5, 3)).astype(np.float32)
    normal, standard = torch.distributions.Normal, torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal(torch.tensor(mean), torch.tensor(np.exp(log_variance / 2))), standard)
    np.testing.assert_allclose(vae_training.kl_divergence(jnp.asarray(mean), jnp.asarray(log_variance)), expected, rtol=1e-5, atol=1e-6)


def test_batches_are_the_pairs_of_the_world():
    data = vae_training.batches(SMALL)
    batches = np.concatenate([next(data) for _ in range(3)])
    assert np.array_equal(batches, np.stack(clips_of("train", 6)))


def test_training_posterior_is_what_encode_normalises():
    config = replace(SMALL.vae, latents_mean=(0.1, -0.4, 0.3, 0.7), latents_std=(1.2, 0.6, 2.5, 1.6))
    vae = with_params(abstract(lambda rngs: WanVAE(config, rngs=rngs)), first_weights())
    video = jnp.asarray(np.stack(clips_of("train", 2)).astype(np.float32) / 127.5 - 1)

    @jax.jit
    def all_four(video):
        mean, _ = vae.posterior(video)
        latents = vae.encode(video)
        return mean, vae.reconstruct(mean), latents, vae.decode(latents)

    mean, open_video, latents, clamped = map(np.asarray, all_four(video))
    np.testing.assert_allclose(latents, (mean - np.array(config.latents_mean)) / np.array(config.latents_std), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(clamped, np.clip(open_video, -1, 1), atol=1e-5)
