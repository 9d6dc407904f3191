"""Stage 2: the multimodal language model learns to make the transformer's context (paper section 5.1).

Goal    Qwen2.5-VL replaces UMT5: MetaQueries attend to the clips and the prompt, and a connector maps their states to Wan's context.
Trains  queries, connector and the language model's LoRA (decision D7); the transformer is frozen. For the connector alone:
        --train.trainable 'alignment/connector.*'
Cost    2,000 steps of 16 samples. The transformer runs as in stage 1, but the gradients of its parameters are not computed.
Result  not run at full size. `tiny` is for a run of stage1:tiny; `smoke` has random weights, for tests.

    python -m launch.train --config=stage2 --workdir=DIR --data.path=RECORDS --train.init_from=STAGE1
"""

from dataclasses import replace

from configs import stage1
from configs.base import AlignmentConfig
from configs.run import Config, variant_of

TRAINABLE = ("alignment/queries", r"alignment/connector\..*", r"alignment/mllm\..*\.lora\..*")


def aligned(config: Config, steps: int) -> Config:
    """A stage-1 configuration with the transformer frozen and its context from the language model."""
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
