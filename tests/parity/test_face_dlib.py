"""dlib's face network against the same layers in PyTorch, with random weights."""

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as functional

from evaluation.metrics import face_dlib


def random_weights(only=lambda layer: True):
    random, found = np.random.default_rng(0), {"fc": np.random.default_rng(1).normal(0, 0.06, (256, 128))}
    width = 32
    for layer in face_dlib.layers():
        inputs, width = width, int(layer.removeprefix("conv").split("_")[0])
        side, inputs = (7, 3) if layer == "conv32_down" else (3, inputs)
        if only(layer):
            found[f"{layer}/conv/filters"] = random.normal(0, (1 / (side**2 * inputs)) ** 0.5, (side, side, inputs, width))
            found[f"{layer}/conv/bias"], found[f"{layer}/scale/biases"] = random.normal(0, 0.1, (2, width))
            found[f"{layer}/scale/weights"] = random.uniform(0.5, 1.5, width)
    return {name: value.astype(np.float32) for name, value in found.items()}


def convolved(weights, name, x, stride=1, padding=1):
    kernel = torch.tensor(weights[f"{name}/conv/filters"]).permute(3, 2, 0, 1)
    x = functional.conv2d(x, kernel, torch.tensor(weights[f"{name}/conv/bias"]), stride, padding)
    scale, shift = (torch.tensor(weights[f"{name}/scale/{kind}"])[None, :, None, None] for kind in ("weights", "biases"))
    return x * scale + shift


def residual(weights, name, x):
    return functional.relu(convolved(weights, f"{name}/conv2", functional.relu(convolved(weights, f"{name}/conv1", x))) + x)


def residual_down(weights, name, x):
    """The picture is halved by the first convolution and, beside it, by means; zeros make both of one size (dlib's add_prev)."""
    y = functional.relu(convolved(weights, f"{name}/conv1", x, 2, 0))
    y, x = convolved(weights, f"{name}/conv2", y), functional.avg_pool2d(x, 2, 2)
    size = [max(p, q) for p, q in zip(x.shape, y.shape, strict=True)]
    whole = torch.zeros(size)
    for part in (x, y):
        whole[:, : part.shape[1], : part.shape[2], : part.shape[3]] += part
    return functional.relu(whole)


def test_the_network_is_that_of_pytorch():
    weights = random_weights()
    faces = np.random.default_rng(2).integers(0, 256, (2, 150, 150, 3)).astype(np.float32)
    x = (torch.tensor(faces) - torch.tensor([122.782, 117.001, 104.298])).permute(0, 3, 1, 2) / 256
    x = functional.max_pool2d(functional.relu(convolved(weights, "conv32_down", x, 2, 0)), 3, 2)
    for width, plain in ((32, 3), (64, 3), (128, 2), (256, 2)):
        if width > 32:
            x = residual_down(weights, f"conv{width}_down", x)
        for i in range(plain):
            x = residual(weights, f"conv{width}_{i + 1}", x)
    x = residual_down(weights, "conv256_down_out", x)
    expected = (x.mean((2, 3)) @ torch.tensor(weights["fc"])).numpy()
    found = np.asarray(face_dlib.vectors(weights, jnp.asarray(faces)))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
