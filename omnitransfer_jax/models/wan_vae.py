"""The causal video autoencoder of Wan2.1: video <-> normalised latents, at full size 4 frames of 8x8 pixels to one latent.

A clip is processed in chunks. `Cache` passes the last input frames of each layer from one chunk to the next, so the chunk size changes
memory and speed but not the result.

WanVAE > Encoder | Decoder > ResidualBlock, Downsample | Upsample, Middle > Conv, Norm
The 1x1 convolutions are `Linear`.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from configs.base import VAEConfig
from configs.errors import require
from omnitransfer_jax.models.attend import attention
from omnitransfer_jax.models.layers import Linear

POINTWISE = r"(.*\.(qkv|out|shortcut)|(post_)?quant)\.kernel"  # products over channels alone
SHARDING = [  # the axes of every parameter; omnitransfer_jax/mesh.py maps their names to devices
    (POINTWISE, ("in", "out")),
    (rf"(?!{POINTWISE}).*\.kernel", (None, None, None, "in", "out")),
    (r".*\.(bias|scale)", ("vector",)),
]


class WanVAE(nnx.Module):
    """Encoder and decoder, each with its 1x1 convolution next to the latent (Wan2.1 vae.py)."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant = Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant = Linear(config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, video: Float[Array, "B T H W 3"]) -> Float[Array, "B F h w Z"]:
        """Video in [-1, 1] -> the mean of the posterior, each channel normalised, float32.

        T is time_stride * k + 1, H and W multiples of space_stride; `RequestError` otherwise.
        """
        mean, std = self._statistics()
        return (self.posterior(video)[0] - mean) / std

    def posterior(self, video: Float[Array, "B T H W 3"]) -> tuple[Float[Array, "B F h w Z"], Float[Array, "B F h w Z"]]:
        """Mean and log variance of the latents of a video in [-1, 1], not normalised, float32; sizes as in `encode`."""
        self._check(video.shape)
        moments = self.quant(in_chunks(self.encoder, video.astype(self.config.dtype), self.config.encode_frames))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)  # diffusers DiagonalGaussianDistribution

    def decode(self, latents: Float[Array, "B F h w Z"]) -> Float[Array, "B T H W 3"]:
        """Normalised latents -> video clamped to [-1, 1], float32; the first latent is 1 frame, each later one time_stride."""
        mean, std = self._statistics()
        return jnp.clip(self.reconstruct(latents.astype(jnp.float32) * std + mean), -1.0, 1.0)

    def reconstruct(self, z: Float[Array, "B F h w Z"]) -> Float[Array, "B T H W 3"]:
        """Latents that are not normalised -> video, float32; not clamped, because training needs a gradient outside [-1, 1] too."""
        video = in_chunks(self.decoder, self.post_quant(z.astype(self.config.dtype)), self.config.decode_frames)
        return video.astype(jnp.float32)

    def _statistics(self) -> tuple[Array, Array]:
        of_channel = (None, None, None, None)
        return jnp.asarray(self.config.latents_mean)[of_channel], jnp.asarray(self.config.latents_std)[of_channel]

    def _check(self, shape: tuple[int, ...]) -> None:
        _, frames, height, width, _ = shape
        step = self.config.time_stride
        require(
            frames >= 1 and (frames - 1) % step == 0,
            f"{frames} frames: the causal autoencoder needs {step}n+1, the nearest is {max(0, round((frames - 1) / step)) * step + 1}",
        )
        step = self.config.space_stride
        for name, size in (("height", height), ("width", width)):
            require(
                size > 0 and size % step == 0,
                f"{name} {size}: the autoencoder needs a multiple of {step}, the nearest is {max(1, round(size / step)) * step}",
            )


class Cache:
    """The last input frames of every causal layer, passed from one chunk of a clip to the next.

    A network calls its layers in the same order for every chunk, so the frames are a list in that order.
    `incoming` is the previous chunk's `outgoing`, or None at the start of a clip.
    """

    def __init__(self, incoming: list[Array] | None = None):
        self.incoming = incoming
        self.outgoing: list[Array] = []

    @property
    def at_start(self) -> bool:
        return self.incoming is None

    def extend(self, x: Float[Array, "B T H W C"], depth: int) -> Float[Array, "B t H W C"]:
        """The layer's last `depth` frames of the previous chunk (zeros at the start of a clip), then `x`."""
        start = jnp.zeros((x.shape[0], depth, *x.shape[2:]), x.dtype)
        past = start if self.incoming is None else self.incoming[len(self.outgoing)]
        x = jnp.concatenate([past, x], axis=1)
        self.outgoing.append(x[:, x.shape[1] - depth :])
        return x


def in_chunks(network: Callable[[Array, Cache], Array], x: Float[Array, "B T H W C"], size: int) -> Float[Array, "B t h w c"]:
    """`network` over `x`, `size` frames at a time, in one scan for a clip of any length.

    The network treats frame 0 differently, so the first chunk is frame 0 and the remainder of the division, 1 to `size` frames.
    A clip of up to `size` + 1 frames is one chunk and needs no scan.
    """
    later = max(0, (x.shape[1] - 2) // size)
    first = x.shape[1] - later * size
    cache = Cache()
    start = network(x[:, :first], cache)
    if not later:
        return start

    def step(frames: list[Array], chunk: Array) -> tuple[list[Array], Array]:
        cache = Cache(frames)
        y = network(chunk, cache)
        return cache.outgoing, y

    chunks = rearrange(x[:, first:], "b (n t) h w c -> n b t h w c", n=later)
    _, rest = jax.lax.scan(step, cache.outgoing, chunks)
    return jnp.concatenate([start, rearrange(rest, "n b t h w c -> b (n t) h w c")], axis=1)


def encoder_widths(config: VAEConfig) -> list[tuple[int, int]]:
    """(channels in, channels out) of the encoder's resolutions, finest first."""
    widths = [config.base_dim * m for m in (1, *config.dim_mult)]
    return list(pairwise(widths))


def decoder_widths(config: VAEConfig) -> list[tuple[int, int]]:
    """(channels in, channels out) of the decoder's resolutions, coarsest first; each upsampling halves the channels."""
    widths = [config.base_dim * m for m in reversed(config.dim_mult)]
    return list(zip([widths[0], *(w // 2 for w in widths[:-1])], widths, strict=True))


class Encoder(nnx.Module):
    """Video -> mean and log variance of the posterior, before the 1x1 convolution."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = encoder_widths(config)
        self.conv_in = Conv(3, widths[0][0], rngs=rngs)
        self.levels = nnx.List(
            EncoderLevel(inputs, outputs, config.num_res_blocks, halve_time, rngs=rngs)
            for (inputs, outputs), halve_time in zip(widths, (*config.temporal_downsample, None), strict=True)
        )
        self.middle = Middle(widths[-1][1], rngs=rngs)
        self.norm_out = Norm(widths[-1][1])
        self.conv_out = Conv(widths[-1][1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W 3"], cache: Cache) -> Float[Array, "B F h w C"]:
        x = causal(self.conv_in, x, cache)
        for level in self.levels:
            x = level(x, cache)
        x = self.middle(x, cache)
        return causal(self.conv_out, jax.nn.silu(self.norm_out(x)), cache)


class EncoderLevel(nnx.Module):
    """The residual blocks of one resolution and the step down to the next; `halve_time` is None where there is no next."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, halve_time: bool | None, *, rngs: nnx.Rngs):
        widths = [inputs, *[outputs] * num_blocks]
        self.blocks = nnx.List(ResidualBlock(a, b, rngs=rngs) for a, b in pairwise(widths))
        self.downsample = None if halve_time is None else Downsample(outputs, halve_time, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], cache: Cache) -> Float[Array, "B t h w c"]:
        for block in self.blocks:
            x = block(x, cache)
        return x if self.downsample is None else self.downsample(x, cache)


class Decoder(nnx.Module):
    """Latent, after its 1x1 convolution -> video, not clamped."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths = decoder_widths(config)
        self.conv_in = Conv(config.z_dim, widths[0][0], rngs=rngs)
        self.middle = Middle(widths[0][0], rngs=rngs)
        self.levels = nnx.List(
            DecoderLevel(inputs, outputs, config.num_res_blocks + 1, double_time, rngs=rngs)
            for (inputs, outputs), double_time in zip(widths, (*reversed(config.temporal_downsample), None), strict=True)
        )
        self.norm_out = Norm(widths[-1][1])
        self.conv_out = Conv(widths[-1][1], 3, rngs=rngs)

    def __call__(self, x: Float[Array, "B F h w Z"], cache: Cache) -> Float[Array, "B T H W 3"]:
        x = causal(self.conv_in, x, cache)
        x = self.middle(x, cache)
        for level in self.levels:
            x = level(x, cache)
        return causal(self.conv_out, jax.nn.silu(self.norm_out(x)), cache)


class DecoderLevel(nnx.Module):
    """The residual blocks of one resolution and the step up to the next; `double_time` is None where there is no next."""

    def __init__(self, inputs: int, outputs: int, num_blocks: int, double_time: bool | None, *, rngs: nnx.Rngs):
        widths = [inputs, *[outputs] * num_blocks]
        self.blocks = nnx.List(ResidualBlock(a, b, rngs=rngs) for a, b in pairwise(widths))
        self.upsample = None if double_time is None else Upsample(outputs, double_time, rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w C"], cache: Cache) -> Float[Array, "B T H W c"]:
        for block in self.blocks:
            x = block(x, cache)
        return x if self.upsample is None else self.upsample(x, cache)


class Middle(nnx.Module):
    """The coarsest resolution: residual block, attention within each frame, residual block."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.before = ResidualBlock(dim, dim, rngs=rngs)
        self.attention = FrameAttention(dim, rngs=rngs)
        self.after = ResidualBlock(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], cache: Cache) -> Float[Array, "B T H W C"]:
        return self.after(self.attention(self.before(x, cache)), cache)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice, plus a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = Norm(inputs)
        self.conv1 = Conv(inputs, outputs, rngs=rngs)
        self.norm2 = Norm(outputs)
        self.conv2 = Conv(outputs, outputs, rngs=rngs)
        self.shortcut = None if inputs == outputs else Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"], cache: Cache) -> Float[Array, "B T H W c"]:
        h = causal(self.conv1, jax.nn.silu(self.norm1(x)), cache)
        h = causal(self.conv2, jax.nn.silu(self.norm2(h)), cache)
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nnx.Module):
    """Self-attention of one head over the pixels of each frame."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.norm = Norm(dim)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.out = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b t h w (three n k) -> three (b t) (h w) n k", three=3, n=1)
        y = rearrange(attention(q, k, v), "(b t) (h w) 1 k -> b t h w k", b=x.shape[0], h=x.shape[2])
        return x + self.out(y)


class Downsample(nnx.Module):
    """Halves height and width. With `halve_time` also halves the number of frames after frame 0 of a clip."""

    def __init__(self, dim: int, halve_time: bool, *, rngs: nnx.Rngs):
        self.conv = Conv(dim, dim, window=(1, 3, 3), space_stride=2, rngs=rngs)
        self.time_conv = Conv(dim, dim, window=(3, 1, 1), time_stride=2, rngs=rngs) if halve_time else None

    def __call__(self, x: Float[Array, "B T H W C"], cache: Cache) -> Float[Array, "B t h w C"]:
        x = self.conv(x)
        if self.time_conv is None:
            return x
        extended = cache.extend(x, depth=1)
        if cache.at_start:
            return jnp.concatenate([x[:, :1], self.time_conv(x)], axis=1)
        return self.time_conv(extended)


class Upsample(nnx.Module):
    """Doubles height and width and halves the channels. With `double_time` also doubles the frames after frame 0 of a clip."""

    def __init__(self, dim: int, double_time: bool, *, rngs: nnx.Rngs):
        self.time_conv = Conv(dim, 2 * dim, window=(3, 1, 1), rngs=rngs) if double_time else None
        self.conv = Conv(dim, dim // 2, window=(1, 3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "B t h w C"], cache: Cache) -> Float[Array, "B T H W c"]:
        if self.time_conv is not None:
            # The windows of later frames do not contain frame 0 either, but zeros in its place (Wan2.1 vae.py, "Rep").
            skipped = int(cache.at_start)
            pairs = self.time_conv(cache.extend(x[:, skipped:], depth=2))
            doubled = rearrange(pairs, "b t h w (two c) -> b (t two) h w c", two=2)
            x = jnp.concatenate([x[:, :skipped], doubled], axis=1)
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))


class Norm(nnx.Module):
    """Divides the channels by their L2 norm, then multiplies by sqrt(C) and a learnt scale, in float32."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T H W C"]:
        f = x.astype(jnp.float32)
        # At least 1e-12 as in torch's normalize; the maximum is of the square, because the gradient of a root is infinite at zero.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(f * f, axis=-1, keepdims=True), 1e-24))
        scale = self.scale.astype(jnp.float32) * x.shape[-1] ** 0.5
        return (f / norm * scale[None, None, None, None]).astype(x.dtype)


def causal(conv: "Conv", x: Float[Array, "B T H W C"], cache: Cache) -> Float[Array, "B T H W c"]:
    """`conv`, whose window is three frames long, over `x` and the two frames before it."""
    return conv(cache.extend(x, depth=2))


class Conv(nnx.Module):
    """Convolution over time, height and width, with padding in height and width but not in time, in the dtype of `x`.

    The frames of a window are concatenated along the channels of a 2-D convolution, which sums the same products:
    with XLA's 3-D convolution, encoding takes 2.5 to 6 times as long on a CPU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        window: tuple[int, int, int] = (3, 3, 3),
        time_stride: int = 1,
        space_stride: int = 1,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(nnx.initializers.lecun_uniform()(rngs.params(), (*window, inputs, outputs), jnp.float32))
        # Torch's initial values. Without them a grey video is zero in every layer, and at zero the gradient of a norm is 1e12.
        bound = math.prod((*window, inputs)) ** -0.5
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (outputs,), jnp.float32, -bound, bound))
        self.time_stride, self.space_stride = time_stride, space_stride

    def __call__(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B t h w c"]:
        batch, depth, stride = x.shape[0], self.kernel.shape[0], self.time_stride
        last = x.shape[1] - depth  # first frame of the last window; negative if no window fits
        windows = [x[:, i : max(i, i + last + 1) : stride] for i in range(depth)]
        y = jax.lax.conv_general_dilated(
            rearrange(jnp.concatenate(windows, axis=-1), "b t h w c -> (b t) h w c"),
            rearrange(self.kernel.astype(x.dtype), "t h w i o -> h w (t i) o"),
            window_strides=(self.space_stride, self.space_stride),
            padding="SAME",  # for a 3x3 window one row and column on each side; with stride 2 only below and to the right
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return rearrange(y + self.bias.astype(x.dtype)[None, None, None], "(b t) h w c -> b t h w c", b=batch)
