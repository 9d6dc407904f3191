"""Whatever number a field is given, `validate` takes it or answers in one line; and it takes what is right."""

import re
from dataclasses import fields, is_dataclass, replace

import pytest

from configs import mllm, stage1, stage3, vae, wan
from configs.errors import RequestError
from configs.kinds import flat, select

NUMBERS = (0, -1, 10**30, 0.0, -1.0, float("nan"), float("inf"))
CONFIGS = {
    "stage3": stage3.get_config("smoke"), "t2v": wan.get_config("t2v_1_3b"), "two experts": wan.get_config("i2v_2_2_14b"),
    "vae": vae.TINY, "mllm": mllm.TINY,
}  # fmt: skip


def numeric(config, path=()):
    """(path, value) of every field that holds numbers."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numeric(value, (*path, field.name))
        elif type(value) in (int, float) or (isinstance(value, tuple) and value and type(value[0]) in (int, float)):
            yield (*path, field.name), value


def put(config, path, value):
    name, *rest = path
    return replace(config, **{name: put(getattr(config, name), rest, value) if rest else value})


def answer(config):
    """What `validate` answers; empty if it takes the configuration."""
    try:
        config.validate()
    except RequestError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_number_is_taken_or_answered_in_one_line(config):
    config.validate()
    count = 0
    for path, value in numeric(config):
        kind = type(value[0] if isinstance(value, tuple) else value)
        for number in (x for x in NUMBERS if type(x) is kind):
            given, name = (number, *value[1:]) if isinstance(value, tuple) else number, ".".join(path).removeprefix("model.")
            message = answer(put(config, path, given))
            assert re.match(rf"{re.escape(name)}[=.: ]", message) or (number in (0, -1) and name in ACCEPTED), f"{name}={given}: {message}"
            assert "\n" not in message
            count += 1
    assert count > 60


ACCEPTED = {  # where 0 has a meaning
    "seed", "optimizer.warmup_steps", "optimizer.adapter_share", "optimizer.b1", "optimizer.b2", "optimizer.weight_decay",
    "optimizer.clip_norm", "train.ema", "train.evaluate_every", "train.sample_every", "data.quarantine", "data.text_drop",
    "vae.latents_mean",
    "mllm.vision.full_attention", "mllm.image_token", "mllm.video_token", "mllm.vision_start",
    "kl_weight", "whole_share", "grey_share", "optimizer.decay_share", "sampler.boundary",
    "dit.reference_time", "train.hang_seconds",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_what_may_be_0_may_be_0(name):
    config = vae.TINY if name in ("kl_weight", "whole_share", "grey_share") else stage3.get_config("smoke")
    value = flat(select(config, ("model", "method", "data", "training", "run")))[name]
    put(config, name.split("."), (0, *value[1:]) if isinstance(value, tuple) else type(value)(0)).validate()


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "*"])
def test_a_wrong_regular_expression_is_answered_in_one_line(pattern):
    for path in ("train.trainable", "lora.targets"):
        with pytest.raises(RequestError, match=rf"{path}: .* is not a regular expression \([^\n]*\)"):
            put(stage1.get_config(), path.split("."), (".*", pattern)).validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dit.freq_dim", 31, "dit.freq_dim=31: even"),
        ("dit.in_channels", 37, "dit.in_channels=37: 16, the noisy latent's channels, or for image-to-video 36: 4 more"),
        ("dit.in_channels", 16, "dit.image_dim=1280: text-to-video, dit.in_channels=16, reads no image; give --dit.image_dim=None"),
        ("sampler.low_noise_guidance", 3.0, "sampler.low_noise_guidance=3.0: that of a second expert; give --sampler.boundary too"),
    ],
)
def test_widths_that_no_network_has(name, value, message):
    with pytest.raises(RequestError, match=message):
        put(stage1.get_config(), name.split("."), value).validate()


def test_the_largest_seed():
    replace(stage1.get_config(), seed=2**32 - 1).validate()
    with pytest.raises(RequestError, match="seed=4294967296: at most 4294967295"):
        replace(stage1.get_config(), seed=2**32).validate()
