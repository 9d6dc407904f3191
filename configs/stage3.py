"""Stage 3: everything learns together (paper section 5.1).

Goal    the finished model: transformer, connector, queries and adapters are trained together.
Trains  every parameter of the transformer, queries, connector and LoRA; the language model's own weights stay frozen.
Cost    5,000 steps of 16 samples, each as expensive as in stage 1, and the language model in addition.
Result  not run at full size. `tiny` is for a run of stage2:tiny; `smoke` has random weights, for tests.

    python -m launch.train --config=stage3 --workdir=DIR --data.path=RECORDS --train.init_from=STAGE2
"""

from dataclasses import replace

from configs import stage2
from configs.run import Config, variant_of

VARIANTS = {
    name: replace(config, train=replace(config.train, steps=steps, trainable=("dit/.*", *stage2.TRAINABLE)))
    for (name, config), steps in zip(stage2.VARIANTS.items(), (5_000, 310, 40), strict=True)
}


def get_config(variant: str = "") -> Config:
    """The configuration named `stage3[:variant]`."""
    return variant_of(VARIANTS, variant)
