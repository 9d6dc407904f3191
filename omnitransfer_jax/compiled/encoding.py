"""What the frozen encoders cost: floating-point operations of their products and convolutions, counted from the sizes alone.

Resizing of pictures, norms and everything that is no product are left out.
"""

from collections.abc import Sequence
from itertools import pairwise

from configs.base import CLIPVisionConfig, QwenVisionConfig, UMT5Config, VAEConfig
from configs.run import VideoConfig
from omnitransfer_jax.models.qwen2_5_vision import Grid, window_patches
from omnitransfer_jax.models.wan_vae import encoder_widths


def text(config: UMT5Config, tokens: int) -> int:
    """UMT5 over one prompt of `tokens` tokens, its padding included."""
    inner = config.num_heads * config.head_dim
    layer = tokens * (4 * config.dim * inner + 3 * config.dim * config.ffn_dim) + 2 * tokens**2 * inner
    return 2 * config.num_layers * layer


def image(config: CLIPVisionConfig) -> int:
    """CLIP over one picture, without the last layer, which nobody reads."""
    dim, patches = config.dim, (config.image_size // config.patch) ** 2
    tokens = patches + 1
    layer = tokens * (4 * dim**2 + 2 * dim * config.ffn_dim) + 2 * tokens**2 * dim
    return 2 * (patches * 3 * config.patch**2 * dim + (config.num_layers - 1) * layer)


def vision(config: QwenVisionConfig, out_dim: int, grids: Sequence[Grid]) -> int:
    """Qwen's vision tower over pictures and clips of so many patches; `out_dim` is the width of the language model."""
    dim, whole = config.dim, len(config.full_attention)
    patches = sum(t * h * w for t, h, w in grids)
    in_windows = sum(len(window) ** 2 for window in window_patches(grids, config))
    in_frames = sum(t * (h * w) ** 2 for t, h, w in grids)
    blocks = config.num_layers * patches * (4 * dim**2 + 3 * dim * config.ffn_dim)
    attended = 2 * dim * ((config.num_layers - whole) * in_windows + whole * in_frames)
    width = dim * config.merge**2
    merged = patches // config.merge**2 * (width**2 + width * out_dim)
    return 2 * (patches * 3 * config.temporal_patch * config.patch**2 * dim + blocks + attended + merged)


def latents(config: VAEConfig, video: VideoConfig) -> int:
    """The autoencoder's encoder over one clip. Windows that reach over an edge count whole."""
    frames, rows, columns = video.frames, video.height, video.width
    widths = encoder_widths(config)
    total = frames * rows * columns * 27 * 3 * widths[0][0]
    for (inputs, width), halve_time in zip(widths, (*config.temporal_downsample, None), strict=True):
        channels = [inputs, *[width] * config.num_res_blocks]
        total += frames * rows * columns * sum(_block(a, b) for a, b in pairwise(channels))
        if halve_time is not None:
            rows, columns = rows // 2, columns // 2
            total += frames * rows * columns * 9 * width**2
        if halve_time:
            frames = (frames - 1) // 2 + 1
            total += (frames - 1) * rows * columns * 3 * width**2
    width, pixels, out = widths[-1][1], rows * columns, 2 * config.z_dim
    middle = 2 * _block(width, width) + 4 * width**2 + 2 * pixels * width
    return 2 * (total + frames * pixels * (middle + 27 * width * out + out**2))


def _block(inputs: int, outputs: int) -> int:
    """Products of a residual block at one pixel."""
    return 27 * (inputs * outputs + outputs**2) + (inputs * outputs if inputs != outputs else 0)
