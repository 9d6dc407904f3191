"""Laws of Qwen2.5-VL that need no oracle: which tokens attend to which, the order of features, and memory."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import QwenConfig, QwenVisionConfig
from configs.errors import RequestError
from omnitransfer_jax.models.attend import CHUNK
from omnitransfer_jax.models.flat_params import abstract, flat_params, with_params
from omnitransfer_jax.models.qwen2_5_vision import fit, grid_of, patchify
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL, causal_attention, position_ids
from tests.compare import relative_l2

VISION = QwenVisionConfig(dim=16, ffn_dim=24, num_layers=2, num_heads=2, patch=2, window=8, full_attention=(1,))  # 2 x 2 features a window
TINY = QwenConfig(
    vocab_size=32, dim=24, ffn_dim=40, num_layers=2, num_heads=4, num_kv_heads=2, rope_sections=(1, 1, 1), rope_theta=100.0,
    image_token=30, video_token=31, vision_start=29, vision=VISION, dtype="float32",
)  # fmt: skip
GRID = (2, 6, 10)  # patches: 3 x 5 features a frame, which windows do not divide
SQUARE, FEATURES = 4, 15


@pytest.fixture(scope="module")
def model():
    """Random weights, biases and norms included."""
    model, draw = abstract(lambda rngs: Qwen2_5VL(TINY, rngs=rngs)), np.random.default_rng(0)
    params = {}
    for path, leaf in flat_params(model).items():
        noise = draw.standard_normal(leaf.shape, np.float32)
        kind = path.rsplit(".")[-1]
        params[path] = jnp.asarray(1 + 0.2 * noise if kind == "scale" else noise / 4 if kind == "kernel" else 0.2 * noise)
    return with_params(model, params)


@pytest.fixture(scope="module")
def patches():
    return jax.random.normal(jax.random.key(2), (np.prod(GRID), 24))


@partial(jax.jit, static_argnames="grids")
def vision_features(model, patches, grids):
    return model.vision(patches, grids)


@jax.jit
def read(model, embeddings, positions, mask):
    return model(embeddings, positions, mask)


def reached(model, patches) -> np.ndarray:
    """[feature, patch] of one frame: whether the feature changes with the patch. Each alteration is a frame of one long clip."""
    h, w = GRID[1:]
    frame = patches[: h * w]
    altered = jnp.stack([frame, *(frame.at[i].add(1.0) for i in range(h * w))]).reshape(-1, frame.shape[1])
    features = vision_features(model, altered, ((1 + h * w, h, w),)).reshape(1 + h * w, FEATURES, -1)
    return np.abs(features[1:] - features[:1]).max(-1).T > 1e-5


def with_full_attention(model, layers: tuple[int, ...]):
    config = replace(TINY, vision=replace(VISION, full_attention=layers))
    return with_params(abstract(lambda rngs: Qwen2_5VL(config, rngs=rngs)), flat_params(model))


def test_features_come_back_in_order(model, patches):
    """Without attention every feature is made of the four patches of its own square."""
    params = flat_params(model)
    zeroed = {path: jnp.zeros_like(params[path]) for path in params if path.startswith("vision.blocks.attention.out")}
    own = np.repeat(np.eye(FEATURES, dtype=bool), SQUARE, axis=1)
    np.testing.assert_array_equal(reached(with_params(model, params | zeroed), patches), own)


def test_windows_attend_to_themselves(model, patches):
    """Windows are cut from the upper left, so those at the right and lower edges are smaller."""
    row, column = np.divmod(np.arange(FEATURES), 5)
    window = (row // 2) * 10 + column // 2
    together = np.repeat(window[:, None] == window[None, :], SQUARE, axis=1)
    np.testing.assert_array_equal(reached(with_full_attention(model, ()), patches), together)


def test_full_attention_covers_the_frame(model, patches):
    assert reached(model, patches).all()


def test_frames_and_clips_do_not_attend_to_each_other(model, patches):
    """A clip's features do not depend on the other clips of the call, and a frame's not on the other frames."""
    t, h, w = GRID
    whole = vision_features(model, patches, (GRID,))
    np.testing.assert_array_equal(vision_features(model, patches, ((1, h, w),) * t), whole)
    others = jax.random.normal(jax.random.key(3), (4 * 4 + 2 * 2, 24))
    several = jnp.concatenate([others[:16], patches, others[16:]])
    grids = ((1, 4, 4), GRID, (1, 2, 2))
    together = vision_features(model, several, grids)
    assert relative_l2(together[4:-1], whole) < 1e-6
    altered = several.at[:16].add(1.0).at[-4:].set(0.0)
    np.testing.assert_array_equal(vision_features(model, altered, grids)[4:-1], together[4:-1])


def test_patches_must_be_the_grids(model, patches):
    with pytest.raises(RequestError, match=r"119 patches.*120"):
        model.vision(patches[:-1], (GRID,))


def test_later_tokens_change_nothing(model):
    x, positions, mask = prompt(12)
    states = read(model, x, positions, mask)
    for at in (1, 5, 11):
        other = read(model, x.at[:, at:].multiply(-3.0), positions, mask)
        np.testing.assert_array_equal(other[:, :at], states[:, :at])
        assert np.abs(other[:, at:] - states[:, at:]).max(-1).min() > 1e-3


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_is_not_attended_to(model, pad):
    x, positions, mask = prompt(12)
    seen = np.arange(12) >= 4 if pad == "left" else np.arange(12) < 8
    mask = mask & seen[None]
    states = read(model, x, positions, mask)
    other = read(model, jnp.where(mask[:, :, None], x, 9.0), positions, mask)
    np.testing.assert_array_equal(other[:, seen], states[:, seen])
    alone = read(model, x[:, seen], positions[:, :, seen], mask[:, seen])
    assert relative_l2(states[:, seen], alone) < 1e-6
    gradient = jax.grad(lambda x: jnp.square(read(model, x, positions, mask)[:, seen]).sum())(x)
    np.testing.assert_array_equal(gradient[:, ~seen], 0.0)
    assert np.isfinite(gradient).all()


def prompt(length: int):
    x = jax.random.normal(jax.random.key(5), (2, length, TINY.dim))
    return x, jnp.broadcast_to(jnp.arange(length)[None, None], (3, 2, length)), jnp.ones((2, length), bool)


def test_positions_matter_by_difference_alone(model):
    x, positions, mask = prompt(9)
    assert relative_l2(read(model, x, positions + 50, mask), read(model, x, positions, mask)) < 1e-5
    for axis in range(3):
        assert relative_l2(read(model, x, positions.at[axis].multiply(3), mask), read(model, x, positions, mask)) > 1e-3


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK + 44])
def test_causal_attention_in_chunks(length):
    """Equal to attention written out, heads in groups; gradients too."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, n, 8)) for i, n in enumerate((6, 2, 2)))
    mask = jnp.arange(length)[None] >= jnp.array([0, 20])[:, None]
    weight = jax.random.normal(jax.random.key(4), q.shape) * mask[:, :, None, None].astype(jnp.float32)

    def plain(q, k, v, mask):
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None] & mask[:, None, None]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k.repeat(3, axis=2)) / 8**0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v.repeat(3, axis=2))

    ours, expected = (
        jax.jit(jax.value_and_grad(lambda qkv, f=f: (f(*qkv, mask) * weight).sum()))((q, k, v)) for f in (causal_attention, plain)
    )
    assert relative_l2(ours[0], expected[0]) < 1e-5
    for a, b in zip(ours[1], expected[1], strict=True):
        assert relative_l2(a, b) < 1e-5


def test_memory_grows_with_the_length_not_its_square(model):
    def language(length):
        x, positions, mask = prompt(length)
        return jax.jit(jax.grad(lambda x: model(x, positions, mask).sum())).lower(x).compile().memory_analysis().temp_size_in_bytes

    def tower(side):
        x, grids = jnp.zeros((side * 32, 24)), ((1, side, 32),)
        return jax.jit(jax.grad(lambda x: model.vision(x, grids).sum())).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert language(2048) < 2.5 * language(1024)
    assert tower(128) < 2.5 * tower(64)


def test_bfloat16_weights_and_projections_stay_near_float32(model, patches):
    half = abstract(lambda rngs: Qwen2_5VL(replace(TINY, dtype="bfloat16"), rngs=rngs))
    half = with_params(half, {path: x.astype(jnp.bfloat16) for path, x in flat_params(model).items()})
    exact, rounded = vision_features(model, patches, (GRID,)), vision_features(half, patches, (GRID,))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < relative_l2(rounded, exact) < 3e-2
    x, positions, mask = prompt(12)
    exact, rounded = read(model, x, positions, mask), read(half, x, positions, mask)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < relative_l2(rounded, exact) < 3e-2
    assert half.embed(jnp.ones((1, 2), int)).dtype == half.logits(rounded).dtype == jnp.float32


def test_an_image_is_repeated_and_so_is_the_last_frame_of_a_clip():
    clip = jax.random.uniform(jax.random.key(0), (3, 8, 12, 3), minval=-1, maxval=1)
    assert grid_of(3, 8, 12, VISION) == (2, 4, 6)
    slots = patchify(clip, VISION).reshape(2, 24, 3, 2, 4)
    images = [patchify(frame[None], VISION).reshape(24, 3, 2, 4) for frame in clip]
    for slot, frame in enumerate((0, 1, 2, 2)):
        np.testing.assert_array_equal(slots[slot // 2, :, :, slot % 2], images[frame][:, :, 0])
        np.testing.assert_array_equal(images[frame][:, :, 0], images[frame][:, :, 1])


@pytest.mark.parametrize(("height", "width"), [(480, 832), (832, 480), (30, 31), (4000, 25)])
def test_fit_cuts_into_whole_squares(height, width):
    vision = QwenVisionConfig()
    h, w = fit(height, width, vision, 4 * 28**2, 300 * 28**2)
    assert grid_of(1, h, w, vision) == (1, h // 14, w // 14)
    assert 4 * 28**2 <= h * w <= 300 * 28**2


def test_impossible_sizes_are_refused():
    with pytest.raises(RequestError, match=r"3000x14 pixels.*200 times"):
        fit(3000, 14, QwenVisionConfig(), 3136, 10**6)
    with pytest.raises(RequestError, match=r"28x30 pixels: multiples of 28"):
        patchify(jnp.zeros((1, 28, 30, 3)), QwenVisionConfig())


def test_positions_of_text_after_a_clip():
    """By hand: two features a row, one row, four temporal steps of half a second at two positions a second."""
    tokens = np.array([[1, 31, 31, 31, 31, 31, 31, 31, 31, 5, 6]])
    found = position_ids(TINY, tokens, tokens > 0, video_grids=[(4, 2, 4)], seconds_per_grid=[0.5])
    expected = [[0, 1, 1, 2, 2, 3, 3, 4, 4, 3, 4], [0, 1, 1, 1, 1, 1, 1, 1, 1, 3, 4], [0, 1, 2, 1, 2, 1, 2, 1, 2, 3, 4]]
    np.testing.assert_array_equal(found[:, 0], expected)


def test_neighbouring_images_have_separate_positions():
    tokens = np.array([[30, 30, 30, 7]])
    found = position_ids(TINY, tokens, tokens > 0, image_grids=[(1, 2, 2), (1, 4, 2)])
    np.testing.assert_array_equal(found[:, 0], [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]])


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ({"image_grids": [(1, 4, 4)]}, "row 0: 2 placeholders 30 for the 4 features"),
        ({"image_grids": []}, "row 0, token 1: a placeholder 30 without a grid"),
        ({"image_grids": [(1, 2, 4), (1, 2, 2)]}, "1 grids more"),
        ({"image_grids": [(1, 2, 4)], "video_grids": [(1, 2, 2)]}, "0 seconds_per_grid: there are 1 videos"),
    ],
)
def test_placeholders_must_be_the_grids(grids, message):
    tokens = np.array([[1, 30, 30, 2, 3]])
    with pytest.raises(RequestError, match=message):
        position_ids(TINY, tokens, tokens > 0, **grids)
