"""Stage 2: the multimodal language model learns to speak to the transformer (paper section 5.1).

Goal    Qwen2.5-VL replaces UMT5: MetaQueries read the clips and the prompt, a connector turns their states into Wan's context.
Trains  queries, connector and the language model's LoRA (decision D7); the transformer is frozen. For the connector alone:
        --train.trainable 'alignment/connector.*'
Cost    2,000 steps of 16 samples. The transformer runs as in stage 1, its own gradients are left out.
Result  not run at full size. `tiny` is for a run of stage1:tiny; `smoke` has random weights, for tests.

    python -m launch.train --config=stage2 --workdir=DIR --data.path=RECORDS --train.init_from=STAGE1
"""

from dataclasses import replace

from configs import stage1
from configs.base import AlignmentConfig
from configs.run import Config, variant_of

TRAINABLE = ("alignment/queries", r"alignment/connector\..*", r"alignment/mllm\..*\.lora\..*")


def aligned(config: Config, steps: int) -> Config:
    """A stage-1 configuration whose transformer listens to the language model and is frozen."""
    alignment = replace(config.alignment, enabled=True)
    return replace(config, alignment=alignment, train=replace(config.train, steps=steps, trainable=TRAINABLE))


VARIANTS = {
    "": aligned(replace(stage1.get_config(), alignment=AlignmentConfig()), steps=2_000),
    "tiny": aligned(stage1.get_config("tiny"), steps=150),
    "smoke": aligned(stage1.get_config("smoke"), steps=40),
}


def get_config(variant: str = "") -> Config:
    """The configuration named `stage2[:variant]`."""
    return variant_of(VARIANTS, variant)
