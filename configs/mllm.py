"""The tiny language model of the procedural world: Qwen2.5-VL's architecture, trained to describe its inputs in words.

Goal    hidden states that hold the content of a first frame, a reference and a prompt, as those of the published model do.
Trains  everything, the vision tower too, from the random weights of the encoders' folder; afterwards it is frozen.

    python -m launch.train --config=mllm:tiny --train.init_from=ENCODERS --workdir=DIR
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from configs import stage3, vae
from configs.errors import require
from configs.kinds import RUN
from configs.run import Config, RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class MLLMTraining(RunConfig):
    """How a language model is trained on the procedural world."""

    training: ClassVar[str] = "mllm"

    model: Config = field(default_factory=Config)
    """The model that it is a part of, which decides its inputs: those of stages 2 and 3."""
    evaluate_clips: int = field(default=256, metadata=RUN)
    """Held-out pairs of the last evaluation; earlier ones use an eighth of them."""
    threads: int = field(default=2, metadata=RUN)
    """Threads that generate clips."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.model.validate()
        unit = 8 * self.train.batch_size
        require(self.evaluate_clips % unit == 0, f"evaluate_clips={self.evaluate_clips}: a multiple of {unit}")


MODEL = stage3.get_config("tiny")
TINY = MLLMTraining(
    model=MODEL,
    train=TrainConfig(steps=1_500, batch_size=32, evaluate_every=250, log_every=50),
    optimizer=replace(vae.WORLD_OPTIMIZER, learning_rate=1e-2),
)
VARIANTS = {"tiny": TINY}


def get_config(variant: str = "") -> MLLMTraining:
    """The configuration named `mllm:tiny`."""
    require(variant in VARIANTS, f"variant {variant!r}: the only one is tiny; at full size the model is Qwen2.5-VL, imported")
    return VARIANTS[variant]
