"""LPIPS of clips, and what it refuses. Its values against PyTorch: tests/parity/test_lpips.py."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.errors import RequestError
from evaluation.metrics import lpips

SHAPES = ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))


def random_weights():
    random, found = np.random.default_rng(0), {}
    for i, (size, inputs, outputs) in enumerate(SHAPES):
        found[f"AlexNet_0/Conv_{i}/kernel"] = random.normal(0, (2 / (size * size * inputs)) ** 0.5, (size, size, inputs, outputs))
        found[f"AlexNet_0/Conv_{i}/bias"] = random.normal(0, 0.1, outputs)
        found[f"NetLinLayer_{i}/Conv_0/kernel"] = random.uniform(0, 0.1, (1, 1, outputs, 1))
    return {name: value.astype(np.float32) for name, value in found.items()}


def pictures():
    random = np.random.default_rng(1)
    smooth = np.kron(random.integers(0, 256, (8, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    noisy = np.clip(smooth + random.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    return smooth, noisy, random.integers(0, 256, smooth.shape, dtype=np.uint8)


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
