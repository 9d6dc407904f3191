"""I3D against the same layers in PyTorch, with random weights: a module here, the whole network by

python -m pytest -n 0 -m slow tests/parity/test_i3d.py
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from evaluation.metrics import i3d
from tests.evaluation.metrics.test_i3d import random_weights


def padded(x, window, strides, value):
    """Padded as TensorFlow's SAME does, more behind than before."""
    pads = []
    for size, side, stride in zip(x.shape[2:], window, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return functional.pad(x, pads, value=value)


def unit(weights, name, x, stride=1):
    kernel = torch.tensor(weights[f"params/{name}/Conv_0/kernel"]).permute(4, 3, 0, 1, 2)
    x = functional.conv3d(padded(x, kernel.shape[2:], (stride,) * 3, 0.0), kernel, stride=stride)
    mean, var = (torch.tensor(weights[f"batch_stats/{name}/BatchNorm_0/{kind}"]) for kind in ("mean", "var"))
    bias = torch.tensor(weights[f"params/{name}/BatchNorm_0/bias"])
    return functional.relu(functional.batch_norm(x, mean, var, None, bias, eps=1e-3))


def pooled(x, window, strides):
    return functional.max_pool3d(padded(x, window, strides, -torch.inf), window, strides)


def mixed(weights, name, x):
    names = [f"{name}/{branch}" for branch in i3d.BRANCHES]
    b, c = unit(weights, names[1], x), unit(weights, names[3], x)
    last = unit(weights, names[5], pooled(x, (3, 3, 3), (1, 1, 1)))
    return torch.cat([unit(weights, names[0], x), unit(weights, names[2], b), unit(weights, names[4], c), last], 1)


def channels_first(x):
    return torch.tensor(x).permute(0, 4, 1, 2, 3)


def test_a_module_is_that_of_pytorch():
    weights = random_weights(lambda name: name.startswith(("Conv3d_1a", "Mixed_3b")))
    random = np.random.default_rng(1)
    for size in ((1, 5, 14, 9, 3), (1, 6, 7, 8, 3)):
        x = random.uniform(-1, 1, size).astype(np.float32)
        expected = pooled(unit(weights, "Conv3d_1a_7x7", channels_first(x), 2), (1, 3, 3), (1, 2, 2))
        found = i3d.pooled(i3d.unit(weights, "Conv3d_1a_7x7", jnp.asarray(x), 2), (1, 3, 3), (1, 2, 2))
        np.testing.assert_allclose(np.moveaxis(found, -1, 1), expected.numpy(), rtol=1e-4, atol=1e-4)
    x = random.normal(size=(1, 3, 5, 4, 192)).astype(np.float32)
    expected = mixed(weights, "Mixed_3b", channels_first(x)).numpy()
    np.testing.assert_allclose(np.moveaxis(i3d.mixed(weights, "Mixed_3b", jnp.asarray(x)), -1, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # half a minute
def test_the_network_is_that_of_pytorch():
    weights = random_weights()
    x = np.random.default_rng(2).uniform(-1, 1, (1, 17, 224, 224, 3)).astype(np.float32)
    y = channels_first(x)
    y = pooled(unit(weights, "Conv3d_1a_7x7", y, 2), (1, 3, 3), (1, 2, 2))
    y = unit(weights, "Conv3d_2c_3x3", unit(weights, "Conv3d_2b_1x1", y))
    y = pooled(y, (1, 3, 3), (1, 2, 2))
    for name in ("3b", "3c"):
        y = mixed(weights, f"Mixed_{name}", y)
    y = pooled(y, (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        y = mixed(weights, f"Mixed_{name}", y)
    y = pooled(y, (2, 2, 2), (2, 2, 2))
    for name in ("5b", "5c"):
        y = mixed(weights, f"Mixed_{name}", y)
    y = functional.avg_pool3d(y, (2, 7, 7), stride=1)
    kernel, bias = (torch.tensor(weights[f"{i3d.LOGITS}/{kind}"]) for kind in ("kernel", "bias"))
    expected = functional.conv3d(y, kernel.permute(4, 3, 0, 1, 2), bias).mean((2, 3, 4)).numpy()
    np.testing.assert_allclose(i3d.logits(weights, jnp.asarray(x)), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
