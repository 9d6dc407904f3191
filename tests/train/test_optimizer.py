"""AdamW as PyTorch has it, Muon by its definition, the warm-up, and what decays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stage1
from configs.errors import RequestError
from configs.run import MeshConfig, OptimizerConfig
from configs.wan import I2V_14B
from omnitransfer_jax.mesh import axes_of, specs
from omnitransfer_jax.models.flat_params import abstract, flat_params
from omnitransfer_jax.models.wan_dit import SHARDING, WanDiT
from omnitransfer_jax.train.optimizer import is_matrix, learning_rate, make_optimizer
from tests.compare import relative_l2

STEPS = 10


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_equals_pytorch():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.1, clip_norm=2.0)
    start = {"blocks.up.kernel": draw(0, 2, 3, 4), "blocks.up.bias": draw(1, 2, 4), "patch_embedding": draw(2, 1, 2, 2, 3, 4)}
    theirs = {path: torch.nn.Parameter(torch.tensor(x)) for path, x in start.items()}
    matrix, vector = [theirs["blocks.up.kernel"], theirs["patch_embedding"]], [theirs["blocks.up.bias"]]
    torch_adamw = torch.optim.AdamW([{"params": matrix, "weight_decay": 0.1}, {"params": vector, "weight_decay": 0.0}], lr=1e-2)
    warm_up = torch.optim.lr_scheduler.LambdaLR(torch_adamw, lambda done: min(1.0, (done + 1) / 4))
    optimizer = make_optimizer(config, STEPS)
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    for step in range(6):
        scale = 0.1 if step == 2 else 1.0  # that one is below the clipping norm
        grads = {path: scale * draw(10 * step + i, *x.shape) for i, (path, x) in enumerate(start.items())}
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = {path: x + updates[path] for path, x in ours.items()}
        for path, p in theirs.items():
            p.grad = torch.tensor(grads[path])
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        assert (norm < 2.0) == (step == 2)
        torch_adamw.step()
        warm_up.step()
    assert max(relative_l2(ours[path] - start[path], theirs[path].detach().numpy() - start[path]) for path in start) <= 1e-5


def test_muon_makes_singular_values_equal():
    """By its definition, from each gradient's own decomposition U S V: U V scaled up to the shape of (out, in), times the rate.

    Newton-Schulz leaves singular values between 0.68 and 1.13 (Jordan 2024, for values above 0.01 of the largest one).
    """
    config = OptimizerConfig(kind="muon", learning_rate=0.02, vector_learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, clip_norm=1e9)
    shapes = {
        "dit.blocks.ffn.up.kernel": (2, 4, 16),
        "alignment.mllm.layers.mlp.up.lora.down": (3, 16, 4),
        "dit.head.kernel": (4, 6),
        "dit.patch_embedding": (1, 2, 2, 3, 8),
        "dit.blocks.ffn.up.bias": (2, 16),
        "dit.head_modulation": (2, 4),
    }
    start = {path: jnp.asarray(draw(i, *shape)) for i, (path, shape) in enumerate(shapes.items())}
    grads = {path: jnp.asarray(draw(9 + i, *shape)) for i, (path, shape) in enumerate(shapes.items())}
    optimizer = make_optimizer(config, STEPS)
    state = optimizer.init(start)
    for n, share in ((1, 0.5), (2, 1.0), (3, 1.0)):  # the warm-up; a constant gradient's average is the gradient
        updates, state = optimizer.update(grads, state, start)
        nesterov = 0.9 * (1 - 0.9**n) / (1 - 0.9 ** (n + 1)) + 0.1 / (1 - 0.9**n)  # Dozat 2016, of a constant gradient
        for path, matrix in is_matrix(start).items():
            if matrix:
                moved = np.asarray(updates[path] / (0.02 * share) + 0.1 * start[path], np.float64)
                stack = [x.reshape(-1, moved.shape[-1]) for x in (moved if moved.ndim == 3 else moved[None])]
                whole = [x.reshape(-1, moved.shape[-1]) for x in (grads[path] if moved.ndim == 3 else grads[path][None])]
                for step, gradient in zip(stack, whole, strict=True):
                    u, _, v = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
                    rows, columns = gradient.shape
                    core = -u.T @ step @ v.T / max(1, columns / rows) ** 0.5
                    values = np.diag(core)
                    assert values.min() > 0.6, path
                    assert values.max() < 1.2, path
                    assert np.abs(core - np.diag(values)).max() < 1e-4, path
            else:
                np.testing.assert_allclose(updates[path], -3e-3 * share * nesterov * np.sign(grads[path]), rtol=1e-3)


@pytest.mark.parametrize(("warmup", "done", "share"), [(4, 0, 0.25), (4, 3, 1.0), (4, 9, 1.0), (1, 0, 1.0), (0, 0, 1.0)])
def test_warm_up_is_linear_then_constant(warmup, done, share):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=warmup)
    assert float(learning_rate(jnp.int32(done), config, STEPS)) == pytest.approx(2.0 * share)


def test_the_rate_falls_along_half_a_cosine():
    """From 0 to the highest rate at the end of the warm-up, and to 0 again at the last step; Muon's other rate has the same form."""
    config = OptimizerConfig(kind="muon", learning_rate=2.0, vector_learning_rate=0.5, warmup_steps=2, schedule="cosine", weight_decay=0.0)
    expected = [0.0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * np.arange(9) / 8))]
    rates = [float(learning_rate(jnp.int32(done), config, STEPS)) for done in range(11)]
    np.testing.assert_allclose(rates, 2.0 * np.array(expected), atol=1e-6)
    optimizer, start = make_optimizer(config, STEPS), {"bias": jnp.zeros(3)}
    state, moved = optimizer.init(start), []
    for _ in range(STEPS):
        updates, state = optimizer.update({"bias": jnp.full(3, 1e-3)}, state, start)
        moved.append(-float(updates["bias"][0]))
    n = np.arange(1, STEPS + 1)
    nesterov = 0.9 * (1 - 0.9**n) / (1 - 0.9 ** (n + 1)) + 0.1 / (1 - 0.9**n)  # Dozat 2016, of a constant gradient
    np.testing.assert_allclose(moved, 0.5 * nesterov * expected[:-1], rtol=1e-3, atol=1e-6)


def test_the_rate_stays_and_then_falls_along_a_line():
    """Warm-up, stable, decay: of 10 updates 2 rise, 4 stay and 4 fall; the last one still moves."""
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="wsd", decay_share=0.4)
    rates = [float(learning_rate(jnp.int32(done), config, 10)) for done in range(11)]
    np.testing.assert_allclose(rates, [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0], atol=1e-6)


def test_a_warm_up_ends_before_the_rate_falls():
    def config(warmup):
        optimizer = OptimizerConfig(warmup_steps=warmup, schedule="wsd", decay_share=0.4)
        return replace(stage1.get_config("smoke"), optimizer=optimizer, train=replace(stage1.get_config("smoke").train, steps=10))

    config(6).validate()
    with pytest.raises(RequestError, match=r"optimizer\.warmup_steps=7: at most 6, for with optimizer\.decay_share=0\.4 the rate falls"):
        config(7).validate()


@pytest.mark.parametrize(("limit", "expected"), [(1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (0.0, [3.0, 4.0])])
def test_gradients_are_clipped_by_their_norm(limit, expected):
    """`clip_norm=0` does not clip; AdamW's first moment is a tenth of the gradient after one update."""
    optimizer, start = make_optimizer(OptimizerConfig(clip_norm=limit), STEPS), {"bias": jnp.zeros(2)}
    _, state = optimizer.update({"bias": jnp.array([3.0, 4.0])}, optimizer.init(start), start)
    np.testing.assert_allclose(state[1].mu["bias"], 0.1 * np.array(expected), rtol=1e-6)


def test_matrices_are_what_maps_in_to_out():
    params = flat_params(abstract(lambda rngs: WanDiT(I2V_14B, rngs=rngs)))
    maps = {path for path, spec in specs(params, SHARDING, MeshConfig(data=2)).items() if axes_of(spec)}
    assert {path for path, decays in is_matrix(params).items() if decays} == maps
    assert 0 < len(maps) < len(params)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_adapters_and_queries_move_a_share(kind):
    shapes = {
        "dit.blocks.ffn.up.kernel": (2, 4, 16),
        "alignment.connector.first.kernel": (4, 6),
        "alignment.mllm.layers.mlp.up.lora.down": (3, 16, 4),
        "alignment.queries": (5, 2, 4),
    }
    start = {path: jnp.asarray(draw(i, *shape)) for i, (path, shape) in enumerate(shapes.items())}
    grads = {path: jnp.asarray(draw(9 + i, *shape)) for i, (path, shape) in enumerate(shapes.items())}

    def moved(share: float):
        optimizer = make_optimizer(OptimizerConfig(kind=kind, adapter_share=share), STEPS)
        return optimizer.update(grads, optimizer.init(start), start)[0]

    whole, part = moved(1.0), moved(0.25)
    for path in shapes:
        np.testing.assert_allclose(part[path], whole[path] * (0.25 if "lora" in path or "queries" in path else 1), rtol=1e-6)
    with pytest.raises(RequestError, match=r"optimizer\.adapter_share=-1: at least 0"):
        OptimizerConfig(adapter_share=-1).validate()
