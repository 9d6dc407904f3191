"""Every configuration field is of one of five kinds, and what must agree follows from them."""

import json
from dataclasses import replace
from typing import get_args

import pytest

from configs import follow_your_motion, kinds, mllm, stage3, vae, wan
from configs.errors import RequestError
from configs.run import Config, OptimizerConfig, record_fields

RUN = {
    "checkpoint.every", "checkpoint.keep", "data.quarantine", "data.threads", "dit.attention", "dit.remat", "mesh.auto",
    "mesh.data", "mesh.heads", "mesh.keys", "mesh.slices", "sampler.boundary",
    "sampler.guidance", "sampler.low_noise_guidance", "sampler.negative_prompt", "sampler.reference_cache", "sampler.shift",
    "sampler.skip_unconditional", "sampler.solver", "sampler.stack_references", "sampler.steps",
    "train.evaluate_every", "train.evaluate_suite", "train.hang_seconds", "train.log_every", "train.profile", "train.sample_every",
    "train.sample_prompts", "train.steps", "train.wandb",
    "vae.decode_frames", "vae.encode_frames",
}  # fmt: skip


@pytest.mark.parametrize("config", [Config(), vae.TINY, mllm.TINY, follow_your_motion.T2V_1_3B])
def test_every_field_is_of_one_kind(config):
    everything = kinds.flat(kinds.select(config, get_args(kinds.Kind)))
    of_one = [set(kinds.flat(kinds.select(config, [kind]))) for kind in get_args(kinds.Kind)]
    assert set().union(*of_one) == set(everything)
    assert sum(map(len, of_one)) == len(everything)
    assert all(everything[name] is value for name, value in leaves(config).items())
    assert len(everything) == len(leaves(config))


def leaves(config, prefix=""):
    """The fields by dotted name, found without `kinds`."""
    found = {}
    for name, value in vars(config).items():
        found |= leaves(value, f"{prefix}{name}.") if hasattr(value, "__dataclass_fields__") else {prefix + name: value}
    return found


def test_a_training_that_goes_on_may_change_these_fields():
    assert set(kinds.flat(kinds.select(Config(), ["run"]))) == RUN
    own = {name for name in kinds.flat(kinds.select(vae.TINY, ["run"])) if "." not in name}
    assert own == {"threads", "evaluate_clips", "statistics_clips"}
    assert "train.steps" not in kinds.flat(kinds.select(vae.TINY, ["run"])), "whole clips come in a share of all steps"
    assert not kinds.select(OptimizerConfig(), ["model", "method", "data", "run"])


def test_what_a_checkpoint_need_not_agree_in():
    """Training may compute in another type, and read references in another way, with the same weights."""
    other = set(kinds.flat(kinds.select(wan.I2V_480P.dit, ["method", "data", "training", "run"])))
    how = {"references", "reach", "offsets", "reference_flag", "reference_time", "reference_context"}
    assert set(kinds.select(wan.I2V_480P.dit, ["method"])) == how
    assert other == how | {"dtype", "attention", "remat", "text_len"}


def test_records_depend_on_data_fields_and_encoders():
    smoke = wan.VARIANTS["smoke"]
    fields = record_fields(smoke)
    assert set(fields) == {"video", "data", "dit", "vae", "text", "image"}
    assert fields["data"] == {"reference": {"frames": 81, "height": 480, "width": 832, "fps": 16}}
    assert fields["dit"] == {"text_len": 32}
    assert "encode_frames" not in fields["vae"]
    assert fields["text"]["dtype"] == "float32"
    same = replace(smoke, vae=replace(smoke.vae, encode_frames=8), dit=replace(smoke.dit, dim=96), seed=3)
    assert record_fields(same) == fields
    assert "image" in fields
    assert "image" not in record_fields(wan.get_config("smoke_2_2")), "a network without an image branch reads no CLIP features"
    assert record_fields(replace(smoke, text=replace(smoke.text, dtype="bfloat16"))) != fields
    aligned = record_fields(stage3.get_config("smoke"))
    assert set(aligned["alignment"]) == {"frames", "frame_pixels", "prompt_tokens"}
    assert set(aligned) - set(fields) == {"alignment", "mllm"}
    assert json.loads(json.dumps(aligned))["mllm"]["vision"]["patch"] == 14


@pytest.mark.parametrize(
    ("name", "value"),
    [("clip_norm", -1.0), ("clip_norm", float("nan")), ("b1", 1.0), ("b2", -0.1), ("weight_decay", -0.01), ("learning_rate", 0.0)],
)
def test_an_optimizer_that_cannot_learn_is_refused(name, value):
    OptimizerConfig(clip_norm=0.0, b1=0.0, weight_decay=0.0).validate()
    with pytest.raises(RequestError, match=f"optimizer.{name}={value}: "):
        OptimizerConfig(**{name: value}).validate()


def test_two_spellings_of_one_function_do_not_differ():
    dit = wan.I2V_480P.dit
    joint, other = (replace(dit, references=name) for name in ("joint", "bidirectional"))
    assert list(kinds.differences(dit, joint, kinds.FIXED)) == []
    assert list(kinds.differences(joint, other, kinds.FIXED)) == [("references", "joint", "bidirectional")]
    assert list(kinds.differences(wan.I2V_480P, replace(wan.I2V_480P, dit=other), ["method"])) == [
        ("dit.references", "split", "bidirectional")
    ]
