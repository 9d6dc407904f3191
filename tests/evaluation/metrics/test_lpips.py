"""LPIPS against its formula in PyTorch, with random weights and with the real ones where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from safetensors.numpy import load_file, save_file

from configs.errors import RequestError
from evaluation.metrics import lpips

REAL = Path(__file__).parents[4] / "shared" / "weights" / "lpips_alexnet.safetensors"
SHAPES = ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))


def random_weights():
    random, found = np.random.default_rng(0), {}
    for i, (size, inputs, outputs) in enumerate(SHAPES):
        found[f"AlexNet_0/Conv_{i}/kernel"] = random.normal(0, (2 / (size * size * inputs)) ** 0.5, (size, size, inputs, outputs))
        found[f"AlexNet_0/Conv_{i}/bias"] = random.normal(0, 0.1, outputs)
        found[f"NetLinLayer_{i}/Conv_0/kernel"] = random.uniform(0, 0.1, (1, 1, outputs, 1))
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.fixture(params=["random", "real"])
def weights(request):
    if request.param == "random":
        return random_weights()
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not at hand")
    return load_file(REAL)


def in_torch(weights, a, b):
    """The formula of the paper with the layers of torchvision's AlexNet."""
    found = []
    for picture in (a, b):
        x = torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        kept = []
        for i in range(5):
            if i in (1, 2):
                x = functional.max_pool2d(x, 3, 2)
            kernel = torch.tensor(weights[f"AlexNet_0/Conv_{i}/kernel"]).permute(3, 2, 0, 1)
            bias = torch.tensor(weights[f"AlexNet_0/Conv_{i}/bias"])
            x = functional.relu(functional.conv2d(x, kernel, bias, stride=4 if i == 0 else 1, padding=(2, 2, 1, 1, 1)[i]))
            kept.append(functional.normalize(x, dim=1))
        found.append(kept)
    heads = [torch.tensor(weights[f"NetLinLayer_{i}/Conv_0/kernel"]).view(1, -1, 1, 1) for i in range(5)]
    return sum(float(((x - y) ** 2 * head).sum(1).mean()) for x, y, head in zip(*found, heads, strict=True))


def pictures():
    random = np.random.default_rng(1)
    smooth = np.kron(random.integers(0, 256, (8, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noisy = np.clip(smooth + random.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    return smooth, noisy, random.integers(0, 256, smooth.shape, dtype=np.uint8)


def test_distances_are_those_of_pytorch(weights):
    smooth, noisy, other = pictures()
    found = [lpips.lpips(weights, smooth[None], each[None]) for each in (smooth, noisy, other)]
    assert found[0] == 0
    assert found[0] < found[1] < found[2]
    assert found == pytest.approx([in_torch(weights, smooth, each) for each in (smooth, noisy, other)], rel=1e-4, abs=1e-6)


def test_a_clip_is_compared_with_one_picture_or_frame_by_frame():
    weights, (smooth, noisy, other) = random_weights(), pictures()
    apart = [lpips.lpips(weights, x[None], y[None]) for x, y in ((smooth, other), (noisy, other), (noisy, smooth))]
    assert lpips.lpips(weights, np.stack([smooth, noisy]), other[None]) == pytest.approx(np.mean(apart[:2]))
    assert lpips.lpips(weights, np.stack([smooth, noisy]), np.stack([other, smooth])) == pytest.approx((apart[0] + apart[2]) / 2)


def test_files_and_clips_that_do_not_fit(tmp_path):
    save_file({"AlexNet_0/Conv_0/kernel": np.zeros((1,), np.float32)}, tmp_path / "part.safetensors")
    (tmp_path / "none.safetensors").write_bytes(b"none")
    for name, words in (("part", "not LPIPS on AlexNet"), ("none", "no safetensors"), ("absent", "no safetensors")):
        with pytest.raises(RequestError, match=words):
            lpips.load(str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(RequestError, match="needs 32 a side"):
        lpips.lpips(random_weights(), np.zeros((1, 16, 32, 3), np.uint8), np.zeros((1, 16, 32, 3), np.uint8))
