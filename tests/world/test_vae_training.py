"""The autoencoder's training: it learns, it goes on where it stopped, and its files reproduce the reported result."""

import json
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import vae as configs_vae
from configs.base import VAEConfig
from configs.errors import RequestError
from configs.run import CheckpointConfig, TrainConfig, VideoConfig
from omnitransfer_jax.folders.lock import alone
from omnitransfer_jax.mesh import UNSHARDED, make_mesh
from omnitransfer_jax.models.flat_params import abstract, with_params
from omnitransfer_jax.models.wan_vae import WanVAE
from tests.world.every_training import assert_not_finite_is_refused, assert_same_run, lines, stop_after_first_step
from world import pixels, vae_training
from world.pairs import draw_pair

SMALL = replace(
    configs_vae.TINY,
    vae=VAEConfig(
        base_dim=4, z_dim=4, dim_mult=(1,), num_res_blocks=1, temporal_downsample=(), encode_frames=4, decode_frames=4,
        latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    ),
    video=VideoConfig(frames=5, height=8, width=8, fps=8),
    train=TrainConfig(steps=40, batch_size=2, log_every=4, evaluate_every=20),
    optimizer=replace(configs_vae.TINY.optimizer, warmup_steps=2),
    crop=4, whole_share=0.25, kl_weight=1e-3, evaluate_clips=16, statistics_clips=4, checkpoint=CheckpointConfig(every=100), threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    train(workdir)
    return workdir


def train(workdir, config=SMALL):
    vae_training.train(config, workdir, make_mesh(config.mesh))


def written(workdir) -> WanVAE:
    """The autoencoder as the two files give it."""
    fields = json.loads((workdir / "vae.json").read_text())["vae"]
    config = VAEConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    return with_params(abstract(lambda rngs: WanVAE(config, rngs=rngs)), jax.tree.map(jnp.asarray, load_file(workdir / "vae.safetensors")))


def first_weights():
    return jax.jit(vae_training.objective(SMALL).init)()


def squared_error(config, clips, crop=None):
    """That of a step of first weights on whole clips or on crops, over all clips."""
    objective, batch = vae_training.objective(config), vae_training.Clips(jnp.asarray(clips), crop)
    drawn = objective.draw(jax.random.key(0), batch)
    return objective.loss(first_weights(), batch, drawn, UNSHARDED)[1]["squared_error"].mean().item()


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


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(whole, tmp_path, capsys):
    """Bit for bit: weights, losses, and the reported result."""
    stop_after_first_step(vae_training.objective(SMALL), SMALL, tmp_path, vae_training.batches(SMALL), capsys)
    train(tmp_path)
    assert_same_run(tmp_path, whole, "vae")


def test_a_second_training_is_refused(tmp_path):
    with alone(tmp_path), pytest.raises(RequestError, match=f"{tmp_path}: a training runs there, process {os.getpid()} on host"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training.lock"]


def test_updates_that_are_not_finite_end_the_run(tmp_path):
    assert_not_finite_is_refused(vae_training.objective(SMALL), SMALL, tmp_path, vae_training.batches(SMALL))


def test_another_configuration_is_another_run(whole):
    with pytest.raises(RequestError, match=r"kl_weight=0\.5: the run in .* was started with 0\.001"):
        train(whole, replace(SMALL, kl_weight=0.5))


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
    grey, clips = replace(SMALL, grey_share=1.0), np.stack(clips_of("train", 2))
    first, later = (np.concatenate([255 - clips[:, :1], clips[:, 1:]], 1), np.concatenate([clips[:, :1], 255 - clips[:, 1:]], 1))
    assert squared_error(grey, later) == squared_error(grey, clips) != squared_error(grey, first)


def test_a_crop_is_one_part_of_every_clip():
    """The step's video is a part of the clips, cut at one place for all of them."""
    clips = np.stack(clips_of("train", 2))
    draw = vae_training.objective(replace(SMALL, grey_share=0.0)).draw
    video = draw(jax.random.key(0), vae_training.Clips(jnp.asarray(clips), SMALL.crop)).video
    parts = [clips[:, :, i : i + 4, j : j + 4] / np.float32(127.5) - 1 for i in range(5) for j in range(5)]
    assert sum(np.allclose(part, video, rtol=0, atol=1e-6) for part in parts) == 1


def test_divergence_is_torch_s():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    mean, log_variance = draw.standard_normal((2, 5, 3)).astype(np.float32)
    normal, standard = torch.distributions.Normal, torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal(torch.tensor(mean), torch.tensor(np.exp(log_variance / 2))), standard)
    np.testing.assert_allclose(vae_training.kl_divergence(jnp.asarray(mean), jnp.asarray(log_variance)), expected, rtol=1e-5, atol=1e-6)


def test_batches_are_the_pairs_of_the_world():
    """The last quarter of the steps takes whole clips; two processes divide each batch."""
    data = vae_training.batches(SMALL)
    batches = [next(data) for _ in range(SMALL.train.steps)]
    assert np.array_equal(np.concatenate([batch.video for batch in batches[:3]]), np.stack(clips_of("train", 6)))
    assert [batch.crop for batch in batches] == [4] * 30 + [None] * 10
    four = replace(SMALL, train=replace(SMALL.train, batch_size=4))
    parts = [next(vae_training.batches(four, index, 2)).video for index in (0, 1)]
    assert np.array_equal(np.concatenate(parts), np.stack(clips_of("train", 4)))


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
