"""A driving clip in clips that overlap, and the condition of each, as diffusers' modular pipeline has them."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs.run import VideoConfig
from data_pipelines import clips as files
from omnitransfer_jax.methods.wan_animate_2 import driving_reference, encode_condition, in_clips
from omnitransfer_jax.models.wan_vae import WanVAE


def numbered(count):
    return np.arange(count)[:, None, None, None]


@pytest.mark.parametrize(
    ("count", "length", "overlap", "expected"),
    [
        (17, 9, 1, [[*range(9)], [*range(8, 17)]]),
        (12, 9, 1, [[*range(9)], [8, 9, 10, 11, 11, 10, 9, 8, 7]]),
        (9, 9, 1, [[*range(9)]]),
        (4, 9, 1, [[0, 1, 2, 3, 3, 2, 1, 0, 0]]),
        (14, 9, 5, [[*range(9)], [4, 5, 6, 7, 8, 9, 10, 11, 12], [8, 9, 10, 11, 12, 13, 13, 12, 11]]),
    ],
)
def test_clips_overlap_and_the_last_one_is_played_backwards(count, length, overlap, expected):
    made = in_clips(numbered(count), length, overlap)
    assert [clip.ravel().tolist() for clip in made] == expected
    assert (len(made), made.wanted) == (len(expected), count)


class Codes(WanVAE):
    """An autoencoder whose latents name the frames that they are of."""

    def __init__(self):
        pass

    def encode(self, video):
        return jnp.concatenate([video[:, :1], video[:, 4::4]], axis=1)[:, :, ::8, ::8, :1]


@pytest.mark.parametrize("known", [None, 1, 5])
def test_condition(known):
    """The picture under a mask of ones, then what was made before under ones, then grey under zeros."""
    picture, before = jnp.full((1, 16, 16, 3), 0.5), None if known is None else jnp.full((1, known, 16, 16, 3), -0.5)
    made = encode_condition(Codes(), picture, before, frames=9)
    count = {None: 0, 1: 1, 5: 2}[known]
    assert made.shape == (1, 4, 2, 2, 5)
    assert made[0, :, 0, 0, -1].tolist() == [0.5] + [-0.5] * count + [0.0] * (3 - count)
    assert made[0, :, 0, 0, :4].tolist() == [[1.0] * 4] * (1 + count) + [[0.0] * 4] * (3 - count)


def test_reference():
    """Mask 1 on all frames, one frame later and one width to the right, with a context of its own."""
    latents, text, image = jnp.ones((1, 3, 4, 6, 16)), jnp.ones((1, 5, 8)), jnp.ones((1, 5, 8))
    made = driving_reference(latents, text, image, (1, 2, 2), 1.0)
    assert made.offset.tolist() == [[1, 0, 3]]
    assert (made.latents[..., 16:20] == 1).all()
    assert made.text is text
    assert made.image is image


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
def test_letterbox_and_back(shape):
    """The picture is whole between black bars, and they are cut off again."""
    size = VideoConfig(frames=1, height=48, width=64)
    picture = np.full((*shape, 3), 200, np.uint8)
    framed = files.fit(picture, size.height, size.width, letterbox=True)
    assert framed.shape == (48, 64, 3)
    scale = min(48 / shape[0], 64 / shape[1])
    assert (framed > 100).all(-1).sum() == int(shape[0] * scale + 1e-6) * int(shape[1] * scale + 1e-6)
    cut = files.without_letterbox(framed[None], shape)
    assert cut.shape[1] % 2 == cut.shape[2] % 2 == 0
    assert abs(cut.shape[1] / cut.shape[2] - shape[0] / shape[1]) < 0.06
    assert (np.abs(cut.astype(int) - 200) <= 2).all()
