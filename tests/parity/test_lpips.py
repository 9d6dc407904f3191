"""LPIPS against its formula in PyTorch, with random weights and with the real ones where they are at hand."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from safetensors.numpy import load_file

from evaluation.metrics import lpips
from tests.evaluation.metrics.test_lpips import pictures, random_weights

REAL = Path(__file__).parents[3] / "shared" / "weights" / "lpips_alexnet.safetensors"


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


def test_distances_are_those_of_pytorch(weights):
    smooth, noisy, other = pictures()
    found = [lpips.lpips(weights, smooth[None], each[None]) for each in (smooth, noisy, other)]
    assert found[0] == 0
    assert found[0] < found[1] < found[2]
    assert found == pytest.approx([in_torch(weights, smooth, each) for each in (smooth, noisy, other)], rel=1e-4, abs=1e-6)
