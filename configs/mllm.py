"""The tiny language model of the procedural world: Qwen2.5-VL's, taught to say what it is shown.

Goal    states that know what a first frame, a reference and a prompt tell, as those of the published model do.
Trains  everything, the vision tower too, from the random weights of the encoders' folder; afterwards it is frozen.

    python -m launch.train_mllm --config=mllm:tiny --encoders=ENCODERS --workdir=DIR
"""

from dataclasses import dataclass, field

from configs import stage3
from configs.errors import require
from configs.run import Config, PartTraining


@dataclass(frozen=True, kw_only=True)
class MLLMTraining(PartTraining):
    """How a language model is trained on the procedural world."""

    model: Config = field(default_factory=Config)
    """What it is a part of; it is shown what stages 2 and 3 show it."""

    def validate(self) -> None:
        """Raises `RequestError` for the first value that cannot work."""
        super().validate()
        self.model.validate()


MODEL = stage3.get_config("tiny")
TINY = MLLMTraining(model=MODEL, steps=1_500, batch_size=32, learning_rate=1e-2, evaluate_every=250)


def get_config(variant: str = "") -> MLLMTraining:
    """The configuration named `mllm:tiny`."""
    require(variant == "tiny", f"variant {variant!r}: the only one is tiny; at full size the model is Qwen2.5-VL, imported")
    return TINY
