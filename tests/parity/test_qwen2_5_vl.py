"""Qwen2.5-VL against transformers': states, gradients, positions, and patches against its processor."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from configs.base import QwenConfig, QwenVisionConfig
from omnitransfer_jax.models.flat_params import flat_params
from omnitransfer_jax.models.qwen2_5_vision import fit, frequencies, grid_of, patchify
from omnitransfer_jax.models.qwen2_5_vl import Qwen2_5VL, position_ids
from omnitransfer_jax.weights.qwen2_5_vl import config_json, entries
from tests.compare import relative_l2
from tests.parity.bridge import gradients, port, randomise, to_ours

SMALL = QwenConfig(
    vocab_size=64, dim=48, ffn_dim=40, num_layers=2, num_heads=4, num_kv_heads=2, rope_theta=1e4, rope_sections=(1, 2, 3), eps=1e-4,
    image_token=60, video_token=61, vision_start=62, dtype="float32",
    vision=QwenVisionConfig(dim=32, ffn_dim=24, num_layers=4, num_heads=2, patch=4, window=16, full_attention=(0, 2)),
)  # fmt: skip
ODD = replace(
    SMALL, dim=36, num_heads=3, num_kv_heads=1, tied=False,
    vision=QwenVisionConfig(
        dim=24, ffn_dim=20, num_layers=3, num_heads=3, patch=2, temporal_patch=3, merge=3, window=12, full_attention=(1,),
        tokens_per_second=5,
    ),
)  # fmt: skip
QUERIES = 3  # further inputs behind every prompt

# A prompt is a list of text lengths and of clips; a clip's grid counts features, not patches. A window has 2 x 2 features.
IMAGE = [[3, ("image", 1, 3, 5), 4]]
VIDEO = [[2, ("video", 3, 2, 3), 3], [1, ("video", 2, 3, 1), 1]]
BOTH = [[2, ("image", 1, 3, 5), 1, ("video", 2, 2, 4), 3], [1, ("image", 1, 2, 2), 2, ("image", 1, 7, 1), 5]]
SEVERAL = [[("video", 4, 1, 2), 2, ("video", 7, 3, 1), 0], [9], [1, ("image", 1, 1, 6), 1, ("video", 2, 5, 5)]]


def oracle(config: QwenConfig) -> torch.nn.Module:
    return randomise(transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config_json(config))))


def prompt(config: QwenConfig, rows: list[list], pad: str, queries: int = QUERIES):
    """Tokens, mask and the grids of all images and of all videos; the rows are padded on the side `pad`, before the queries."""
    draw, kinds = np.random.default_rng(3), {"image": config.image_token, "video": config.video_token}
    grids: dict[str, list] = {"image": [], "video": []}
    texts = []
    for row in rows:
        pieces = []
        for piece in row:
            if isinstance(piece, int):
                pieces.append(draw.integers(0, 50, piece))
            else:
                kind, t, h, w = piece
                grids[kind].append((t, h * config.vision.merge, w * config.vision.merge))
                pieces.append(np.full(t * h * w, kinds[kind]))
        texts.append(np.concatenate(pieces))
    length = max(map(len, texts))
    tokens, mask = np.full((len(rows), length + queries), 7), np.zeros((len(rows), length + queries), bool)
    for i, text in enumerate(texts):
        at = slice(length - len(text), length) if pad == "left" else slice(len(text))
        tokens[i, at], mask[i, at], mask[i, length:] = text, True, True
    return tokens, mask, tuple(grids["image"]), tuple(grids["video"])


def their_grids(config: QwenConfig, tokens, images, videos, seconds) -> dict[str, torch.Tensor]:
    """What their model wants to know of a prompt beside its tokens."""
    kinds = np.where(tokens == config.image_token, 1, np.where(tokens == config.video_token, 2, 0))
    given = {"mm_token_type_ids": torch.tensor(kinds), "second_per_grid_ts": torch.tensor(seconds)}
    named = {"image_grid_thw": images, "video_grid_thw": videos}
    return given | {name: torch.tensor(grids) for name, grids in named.items() if grids}


@pytest.mark.parametrize(
    ("config", "rows", "pad"),
    [(SMALL, IMAGE, "left"), (ODD, VIDEO, "right"), (SMALL, BOTH, "left")],
    ids=["image", "video-untied", "both"],
)
def test_states_and_gradients(config, rows, pad):
    theirs, table, draw = oracle(config), entries(config, "original"), np.random.default_rng(1)
    ours = port(lambda rngs: Qwen2_5VL(config, rngs=rngs), theirs, table)
    tokens, mask, images, videos = prompt(config, rows, pad)
    seconds, width = [0.6] * len(videos), 3 * config.vision.temporal_patch * config.vision.patch**2
    clips = {"pixel_values": images, "pixel_values_videos": videos}
    patches = {k: draw.standard_normal((sum(map(np.prod, g)), width), np.float32) for k, g in clips.items() if g}
    queries = draw.standard_normal((len(rows), QUERIES, config.dim), np.float32)
    probe, score_probe = (
        draw.standard_normal((*mask.shape, size), np.float32) * mask[:, :, None] for size in (config.dim, config.vocab_size)
    )

    leaves = {k: torch.tensor(x, requires_grad=True) for k, x in (patches | {"queries": queries}).items()}
    given = their_grids(config, tokens, images, videos, seconds) | {k: leaves[k] for k in patches}
    embeddings = torch.cat([theirs.get_input_embeddings()(torch.tensor(tokens[:, :-QUERIES])), leaves["queries"]], dim=1)
    expected = theirs.model(
        input_ids=torch.tensor(tokens), inputs_embeds=embeddings, attention_mask=torch.tensor(mask).long(), use_cache=False, **given
    ).last_hidden_state
    expected_scores = theirs.lm_head(expected)
    ((expected * torch.tensor(probe)).sum() + (expected_scores * torch.tensor(score_probe)).sum()).backward()

    positions = jnp.asarray(position_ids(config, tokens, mask, images, videos, seconds))
    ids = jnp.asarray(tokens)

    def loss(model, inputs):
        x = model.embed(ids[:, :-QUERIES])
        for name, token in (("pixel_values", config.image_token), ("pixel_values_videos", config.video_token)):
            if name in inputs:
                features = model.vision(inputs[name], clips[name])
                x = x.at[np.nonzero(tokens == token)].set(features)
        states = model(jnp.concatenate([x, inputs["queries"]], axis=1), positions, jnp.asarray(mask))
        scores = model.logits(states)
        return (states * probe).sum() + (scores * score_probe).sum(), (states, scores)

    inputs = {k: jnp.asarray(x) for k, x in (patches | {"queries": queries}).items()}
    (_, (states, scores)), (grads, input_grads) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(ours, inputs)
    assert relative_l2(np.asarray(states)[mask], expected.detach().numpy()[mask]) <= 1e-5
    assert relative_l2(np.asarray(scores)[mask], expected_scores.detach().numpy()[mask]) <= 1e-5
    for name, leaf in leaves.items():
        assert relative_l2(input_grads[name], leaf.grad) <= 1e-4, name
    for path, gradient in to_ours(gradients(theirs), table).items():
        assert relative_l2(flat_params(grads)[path], gradient) <= 1e-4, path


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize(
    ("config", "rows"),
    [(SMALL, IMAGE), (SMALL, VIDEO), (ODD, BOTH), (ODD, SEVERAL), (SMALL, SEVERAL)],
    ids=["image", "video", "both", "several", "several-small"],
)
def test_positions(config, rows, pad):
    theirs = oracle(config)
    tokens, mask, images, videos = prompt(config, rows, pad)
    seconds = [2 / 16, 0.7, 1.0][: len(videos)]
    expected, _ = theirs.model.get_rope_index(
        torch.tensor(tokens), attention_mask=torch.tensor(mask).long(), **their_grids(config, tokens, images, videos, seconds)
    )
    found = position_ids(config, tokens, mask, images, videos, seconds)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("fps", [1, 2, 4, 7, 8, 15, 16, 23.976, 24, 25, 29.97, 30])
def test_positions_at_every_rate(fps):
    """Whole numbers of tokens and seconds meet at a rounding edge; theirs is float32's."""
    theirs, rows = oracle(SMALL), [[1, ("video", 200, 1, 1), 2]]
    tokens, mask, _, videos = prompt(SMALL, rows, "left")
    expected, _ = theirs.model.get_rope_index(torch.tensor(tokens), **their_grids(SMALL, tokens, (), videos, [2 / fps]))
    np.testing.assert_array_equal(position_ids(SMALL, tokens, mask, (), videos, [2 / fps]), expected)


@pytest.mark.parametrize(("theta", "width"), [(1e4, 40), (1e6, 128)])
def test_frequencies(theta, width):
    expected = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    np.testing.assert_array_max_ulp(frequencies(theta, width), expected.numpy(), 2)


@pytest.mark.parametrize("vision", [SMALL.vision, ODD.vision, QwenVisionConfig()], ids=["small", "odd", "published"])
@pytest.mark.parametrize("frames", [1, 5])
def test_patches(vision, frames):
    """Their video processor needs torchvision; each of its frames is the image processor's, `temporal_patch` of them to a patch."""
    unit = vision.patch * vision.merge
    clip = np.random.default_rng(0).integers(0, 256, (frames, 3 * unit, 2 * unit, 3), np.uint8)
    processor = Qwen2VLImageProcessorPil(
        do_resize=False, patch_size=vision.patch, temporal_patch_size=vision.temporal_patch, merge_size=vision.merge
    )
    seen = processor(list(clip), return_tensors="np")
    grid = grid_of(frames, 3 * unit, 2 * unit, vision)
    assert grid[1:] == tuple(seen["image_grid_thw"][0, 1:])
    by_frame = seen["pixel_values"].reshape(frames, grid[1] * grid[2], 3, vision.temporal_patch, vision.patch, vision.patch)
    last = np.minimum(np.arange(grid[0] * vision.temporal_patch), frames - 1).reshape(grid[0], -1)
    expected = np.stack([np.stack([by_frame[i, :, :, 0] for i in step], axis=2) for step in last])
    found = patchify(jnp.asarray(clip / np.float32(127.5) - 1), vision)
    assert relative_l2(found, expected.reshape(found.shape)) <= 1e-6
    if frames == 1:
        assert relative_l2(found, seen["pixel_values"]) <= 1e-6


@pytest.mark.parametrize("vision", [SMALL.vision, QwenVisionConfig()], ids=["small", "published"])
def test_fit(vision):
    unit, draw = vision.patch * vision.merge, np.random.default_rng(0)
    sides = np.exp(draw.uniform(np.log(20), np.log(3000), (500, 2))).astype(int).tolist()
    for height, width in [*sides, (480, 832), (70, 70), (14, 2800), (42, 98)]:
        low, high = 4 * unit**2, 300 * unit**2
        assert fit(height, width, vision, low, high) == smart_resize(height, width, unit, low, high), (height, width)
